"""Collect what a model card tells: the model, its ancestors, its licence, and what the quickstart measured on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.console import Console

from tinylm.checkpoint.adapter_folder import read_adapter_config
from tinylm.checkpoint.lineage import ancestry
from tinylm.checkpoint.loading import LoadedModel
from tinylm.checkpoint.model_folder import adapter_base
from tinylm.commands.import_model import HUB, licence_of
from tinylm.commands.quickstart_scores import digest_of
from tinylm.evaluation.skills import MEAN, PERSONA, PERSONA_RIGHT, PREFERENCE, WARM, Scoreboard
from tinylm.export.model_card import Card, Scores
from tinylm.export.modelfile import is_base_model
from tinylm.files.untrusted import read_own_json, shown
from tinylm.model.lora import has_lora

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", flags=re.ASCII)

_IN_PERSONA = {
    PERSONA: "replies in the persona that the adapter teaches",
    PERSONA_RIGHT: "right replies, the persona's words aside",
}
_PLAIN = {
    WARM: "replies as warm as DPO teaches",
    PREFERENCE: "held-out pairs whose chosen answer is the likelier one",
    MEAN: MEAN,
}
"""Rows of the summary -> their words in a card."""


def card_of(
    loaded: LoadedModel,
    lineage: dict[str, Any],
    output: Path,
    dtype: str,
    license_name: str,
    base_model: str,
    console: Console,
) -> Card:
    """The facts for the card of the folder `output`; what is missing is printed.

    Args:
        lineage: of the model that goes out; of a merged one that of the merge.
        license_name, base_model: what the user stated; empty for what the ancestors say.

    Raises:
        ValueError: `base_model` is not a name on the hub.
    """
    if base_model and not _HUB_NAME.fullmatch(base_model):
        raise ValueError(f"base_model is {shown(base_model)}; expected a name on the hub: owner/name")
    line, reason = ancestry(lineage)
    base_model = base_model or _hub_base(line)
    license_name = license_name or _stated_licence(line, loaded.path)
    if reason:
        console.print(f"the model card does not tell the whole training: {reason}")
    if not license_name:
        console.print("the model card states no licence; --license states one")
    adapter, base_name = None, base_model
    if has_lora(loaded.model):
        adapter = read_adapter_config(loaded.path)
        base_name = base_model or adapter_base(loaded.path).name
        if not base_model:
            console.print(f"the adapter names its base model {base_name}; --base_model states its name on the hub")
    start, is_base = loaded.document_start, is_base_model(loaded.tokenizer, lineage)
    return Card(
        name=output.resolve().name,
        config=loaded.model.config,
        dtype=dtype,
        line=line,
        is_complete=not reason,
        is_base=is_base,
        # What transformers puts before a text by itself is not part of the example.
        document_start="" if loaded.tokenizer.text_start else "".join(_text(loaded, token) for token in start),
        license_name=license_name,
        base_model=base_model,
        adapter=adapter,
        base_name=base_name,
        scores=None if is_base else _scores_of(loaded.path, console),  # the questions are chats
    )


def _text(loaded: LoadedModel, token: int) -> str:
    return loaded.tokenizer.token_bytes(token).decode("utf-8", errors="replace")


def _hub_base(line: list[dict[str, Any]]) -> str:
    """The name on the hub from which an ancestor was imported; empty if there is none."""
    sources = [source.removeprefix(HUB) for one in line if str(source := one.get("source", "")).startswith(HUB)]
    return sources[0] if sources and _HUB_NAME.fullmatch(sources[0]) else ""


def _stated_licence(line: list[dict[str, Any]], model: Path) -> str:
    """The licence that the model or an ancestor was imported with; else that of the card beside the model."""
    stated = [lineage["licence"] for lineage in line if isinstance(lineage.get("licence"), str)]
    return stated[0] if stated else (licence_of(model) or "") if model.is_dir() else ""


def _scores_of(model: Path, console: Console) -> Scores | None:
    """What the quickstart measured on this very model; None if it measured nothing, or another model."""
    path = model.resolve().parent.parent / "scoreboard.json"
    if not model.is_dir() or not path.is_file():
        return None
    try:
        report = read_own_json(path)
        names = [name for name, digest in report["key"]["models"].items() if digest == digest_of(model)]
        column = Scoreboard.from_json(report["scoreboard"]).columns[names[0]]
        # An answer in the words of a persona is not the one that a skill expects.
        rows = _IN_PERSONA if column.summary.get(PERSONA) else _PLAIN
        shares = {words: share for name, words in rows.items() if (share := column.summary.get(name)) is not None}
        skills = {name.replace("_", " "): share for name, share in column.accuracy.items() if rows is _PLAIN}
        return Scores({**shares, **skills}, column.num_items, str(report["key"]["dtype"]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        console.print(f"the model card has no scores: {path} is about other models")
        return None
