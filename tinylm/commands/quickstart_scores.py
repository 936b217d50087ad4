"""The end of the quickstart: the scoreboard of its models, the goals, sample chats, and prompts to type."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinylm.checkpoint.loading import load_for_use
from tinylm.commandline.exit_status import Stopped, StopRequest
from tinylm.commandline.terminal import progress
from tinylm.dataset import tinyworld
from tinylm.evaluation.skills import MEAN, PERSONA, PERSONA_RIGHT, PREFERENCE, STORY_MEAN, WARM, Scoreboard, scoreboard
from tinylm.files.atomic import sha256_of
from tinylm.files.untrusted import read_own_json
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.model.lora import unload_lora
from tinylm.model.weights import weights_fingerprint
from tinylm.system.code_version import code_version
from tinylm.system.cpu_parallel import num_cores
from tinylm.system.runtime import Runtime

COLUMNS = {"base": "pretrain", "SFT": "full_sft", "LoRA": "lora", "DPO": "dpo"}
"""The columns of the scoreboard, and the stage of each."""
MOST_BASE_ITEMS = 20
"""Questions of a skill that the base model answers at most: it has never seen a chat, and no answer of it is right."""
GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=80)
AS_IN_CHAT = SamplingSettings(max_new_tokens=80)
"""The default temperature, at which people chat."""
SHOWN_SKILLS = ("where_is", "addition", "reversing", "identity", "write_story")
"""The skills that the closing chats show."""
PROMPT_SKILLS = ("where_is", "who_has", "sorting", "reversing", "opposites", "spelling")
"""Skills from which a prompt to type may come, the most telling first."""
CANDIDATES, NUM_TRIES, NUM_PROMPTS = 3, 3, 3
"""Held-out questions of a skill to try, replies to each, and prompts to show at most."""
FREE_STORY = "Tell me a story."


@dataclass(frozen=True)
class Scores:
    """What was measured on the quickstart's models."""

    board: Scoreboard
    untouched: bool
    """Whether the adapter's base has the same bits as before."""
    prompts: tuple[str, ...]
    """Prompts that the DPO model answers rightly, in each of three tries and when it is greedy."""

    def to_json(self) -> dict[str, Any]:
        return {"untouched": self.untouched, "prompts": list(self.prompts), "scoreboard": self.board.to_json()}


def score_key(folders: dict[str, Path], num_items: int, runtime: Runtime) -> dict[str, Any]:
    """What the scores follow from: the models' files, the settings of the scoring, and the code."""
    return {
        "models": {column: digest_of(folders[stage]) for column, stage in COLUMNS.items()},
        "num_items": num_items,
        "max_new_tokens": GREEDY.max_new_tokens,
        "device": runtime.device.type,
        "dtype": str(runtime.compute_dtype).removeprefix("torch."),
        "code": code_version()["code"],
    }


def digest_of(model: Path) -> str:
    """16 hex digits over the files that decide what a model answers."""
    digest = hashlib.sha256()
    for path in sorted(model.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja"):
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()[:16]


def kept_scores(path: Path, key: dict[str, Any]) -> Scores | None:
    """The scores in the report at `path`, if they follow from `key`."""
    try:
        report = read_own_json(path)
        if report["key"] != key:
            return None
        return Scores(Scoreboard.from_json(report["scoreboard"]), report["untouched"], tuple(report["prompts"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none yet, or of another version
        return None


def measure(folders: dict[str, Path], num_items: int, runtime: Runtime, console: Console) -> Scores:
    """Score all models.

    Raises:
        Stopped: a signal asked to stop.
    """
    models = {name: load_for_use(folders[stage], device=runtime.device, merge=False) for name, stage in COLUMNS.items()}
    engines = {name: Engine(loaded.model, loaded.tokenizer, runtime.compute_dtype) for name, loaded in models.items()}
    with progress(console, "scoreboard") as show, _stoppable(console) as stop:

        def show_and_stop(what: str, done: int, total: int) -> None:
            show(f"{done} of {total}: {what}", done, total)
            if stop.signum:
                raise Stopped(stop.signum, f" at {done} of {total} of the scoreboard, which is scored again next time")

        board = scoreboard(
            engines,
            tinyworld,
            GREEDY,
            reference="SFT",
            num_items=num_items,
            fewer_items={"base": min(num_items, MOST_BASE_ITEMS)},
            at_once=num_cores(runtime.device),
            progress=show_and_stop,
        )
    prompts = working_prompts(engines["DPO"])
    untouched = weights_fingerprint(models["SFT"].model) == weights_fingerprint(unload_lora(models["LoRA"].model))
    return Scores(board, untouched, prompts)


@contextlib.contextmanager
def _stoppable(console: Console) -> Iterator[StopRequest]:
    """A request to stop that is acknowledged at once."""
    words = "stopping after the questions in work; once more stops at once"
    with StopRequest(lambda: console.print(words)) as stop:
        yield stop


def working_prompts(engine: Engine) -> tuple[str, ...]:
    """Up to three prompts that the model answers rightly when it is greedy, and in each of three tries at the default
    temperature; of a skill the shortest.

    They are the free story and held-out questions, of one line and without an earlier turn.
    """
    user, nobody = {"role": "user", "content": FREE_STORY}, {"role": "assistant", "content": ""}
    items = [tinyworld.Item([user, nobody], "write_story", ("",), ())]
    for skill in PROMPT_SKILLS:
        held_out = (tinyworld.test_item(skill, index) for index in range(20))
        short = (item for item in held_out if len(item.messages) == 2 and "\n" not in item.messages[0]["content"])
        items += itertools.islice(short, CANDIDATES)
    questions = [item.messages[:-1] for item in items]
    ways = [replace(AS_IN_CHAT, temperature=0.0), *(replace(AS_IN_CHAT, seed=seed) for seed in range(NUM_TRIES))]
    tries = [engine.reply_batch(questions, settings) for settings in ways]
    right: dict[str, list[str]] = {}
    for item, *replies in zip(items, *tries, strict=True):
        if all(tinyworld.check(item, reply) for reply in replies):
            right.setdefault(item.skill, []).append(item.messages[0]["content"])
    return tuple(min(prompts, key=len) for prompts in right.values())[:NUM_PROMPTS]


def goals(scores: Scores) -> list[dict[str, Any]]:
    """What the quickstart wants to reach, and whether this run did."""
    board = scores.board

    def value(column: str, row: str) -> float:
        found = board.value(column, row)
        assert found is not None
        return found

    worst = min(board.columns["SFT"].accuracy, key=board.columns["SFT"].accuracy.__getitem__)
    checks = [
        ("SFT: mean of skills", value("SFT", MEAN), 0.85, ">="),
        (f"SFT: weakest skill ({worst})", value("SFT", worst), 0.60, ">="),
        ("SFT: story questions", value("SFT", STORY_MEAN), 0.75, ">="),
        ("LoRA: replies in persona", value("LoRA", PERSONA), 0.95, ">="),
        ("LoRA: points lost, persona aside", value("SFT", MEAN) - value("LoRA", PERSONA_RIGHT), 0.03, "<="),
        ("DPO: held-out pairs preferred", value("DPO", PREFERENCE), 0.90, ">="),
        ("DPO: warm replies before", value("SFT", WARM), 0.50, "<"),
        ("DPO: warm replies after", value("DPO", WARM), 0.85, ">="),
        ("DPO: points lost", value("SFT", MEAN) - value("DPO", MEAN), 0.03, "<="),
    ]
    compare = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b + 1e-9, "<": lambda a, b: a < b}
    rows = [
        {"what": what, "measured": f"{got:.1%}", "wanted": f"{sign} {goal:.0%}", "met": compare[sign](got, goal)}
        for what, got, goal, sign in checks
    ]
    base = {"what": "LoRA: base weights bit-identical without it", "wanted": "yes", "met": scores.untouched}
    return [*rows, {**base, "measured": "yes" if scores.untouched else "no"}]


def show_goals(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the goals, and whether this run met them."""
    table = Table("goal", "measured", "wanted", "", title="goals of this run", title_justify="left")
    for row in rows:
        met = Text("met", "green") if row["met"] else Text("missed", "red")
        table.add_row(row["what"], row["measured"], row["wanted"], met)
    console.print(table)


def show_sample_chats(board: Scoreboard, console: Console) -> None:
    """Print held-out questions with the DPO model's replies, and how many questions of the kind it answers rightly."""
    column = board.columns["DPO"]
    console.print("the first held-out question of some skills, answered by the DPO model:\n")
    for skill in SHOWN_SKILLS:
        example = column.examples[skill]
        verdict = "right" if example["right"] else f"wrong; right is: {example['reference']}"
        share = f"{column.accuracy[skill]:.0%} of the {column.num_items} questions of this skill are right"
        console.print(f"  you: {example['question']}\n  model: {example['reply']}")
        console.print(f"  ({verdict} · {skill}: {share})\n", style="dim")


def show_prompts(prompts: tuple[str, ...], folders: dict[str, str], console: Console) -> None:
    """Print commands that ask what the models answer rightly, to type or to paste."""
    console.print("to type next:")
    if activate := activation():
        console.print(f"  {activate}    # so that the shell knows tinylm")
    for prompt in prompts:
        console.print(f"  tinylm chat --model_path {folders['dpo']} --prompt {shlex.quote(prompt)}")
    console.print(f"  tinylm chat --model_path {folders['dpo']}")
    console.print(f"  tinylm chat --model_path {folders['lora']}    # {tinyworld.PERSONA_NAME}")
    folder = Path(folders["dpo"]).parent
    console.print(f"  tinylm serve {folder}    # all of them on a page in your browser")
    console.print(f"  tinylm export {folder} --format html    # the same page as one file, for a friend")


def activation() -> str:
    """The line that activates the environment in which this program runs; empty if it is active, or none is needed."""
    if sys.prefix == sys.base_prefix or os.environ.get("VIRTUAL_ENV"):
        return ""
    folder = Path(os.path.relpath(sys.prefix))
    if sys.platform == "win32":
        return rf"{folder}\Scripts\activate"
    return f"source {shlex.quote(str(folder))}/bin/activate"
