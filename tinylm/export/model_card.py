"""The model card: README.md of a folder on the Hugging Face hub, with the hub's facts as YAML at its head.

The fields are described at https://huggingface.co/docs/hub/model-cards. There is no `model-index`: it is for results on
data sets of the hub, and ours are on generated questions and on held-out parts of the maker's own data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from shlex import quote
from typing import Any

import yaml

from tinylm import __version__
from tinylm.model.config import TinyLMConfig
from tinylm.model.hf_config import config_to_hf
from tinylm.model.lora import LoRAConfig

_HUB_DATA = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@[^/]*)?(?:/|$)")
_STAGES = {
    "pretrain": "pretraining",
    "full_sft": "supervised fine-tuning",
    "lora": "LoRA",
    "merged": "LoRA, merged",
    "dpo": "DPO",
    "imported": "imported",
    "original": "imported from a `.pth`",
}
_TINYWORLD = {"tinyworld_documents": "pages", "tinyworld_chats": "chats", "tinyworld_pairs": "pairs"}
_OTHER_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Scores:
    """What the quickstart measured on held-out TinyWorld questions."""

    shares: dict[str, float]
    """What was counted -> its share."""
    num_items: int
    """Questions per skill."""
    dtype: str
    """The type of numbers in which the model computed."""


@dataclass(frozen=True)
class Card:
    """What a card is made from."""

    name: str
    """The folder's name; its repository on the hub is `OWNER/name`."""
    config: TinyLMConfig
    dtype: str
    """f32, f16 or bf16."""
    line: list[dict[str, Any]]
    """The lineages of the model, its parent and so on."""
    is_complete: bool
    """Whether the line ends with a model that has no parent."""
    is_base: bool
    """The model continues texts, and knows no chats."""
    document_start: str = ""
    """The text of the token that documents begin with."""
    license_name: str = ""
    base_model: str = ""
    """The hub's name of the model that this one comes from, or that an adapter is for."""
    adapter: LoRAConfig | None = None
    base_name: str = ""
    """What adapter_config.json names as the base model: the same, or the name of a folder."""
    scores: Scores | None = None

    @property
    def repository(self) -> str:
        return _repository(self.name)

    @property
    def base_repository(self) -> str:
        return self.base_model or _repository(self.base_name)


def _repository(name: str) -> str:
    """A name that the hub allows: letters, digits, dots, hyphens and underscores."""
    return "OWNER/" + (_OTHER_CHARACTERS.sub("-", name).strip("-.") or "model")


def model_card(card: Card) -> str:
    """The text of README.md."""
    head = yaml.safe_dump(_head(card), sort_keys=False, allow_unicode=True)
    parts = [f"# {_plain(card.name)}", *_what(card), "## Training", *_training(card), "## Evaluation"]
    parts += [*_evaluation(card), "## How to use it", *_use(card), "## Licence", _licence(card)]
    return f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n"


def _head(card: Card) -> dict[str, Any]:
    kind = config_to_hf(card.config)["model_type"]
    datasets = [name for lineage in reversed(card.line) for name in _hub_data(lineage)]
    all_tinyworld = card.is_complete and all(_is_tinyworld(lineage) for lineage in card.line)
    fields = {
        "license": card.license_name.lower(),  # the hub's names are small letters
        "language": ["en"] if all_tinyworld else [],
        "library_name": "peft" if card.adapter else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": card.base_model,
        "base_model_relation": "adapter" if card.adapter and card.base_model else "",
        "tags": ["tinylm", kind, *(["lora"] if card.adapter else [])],
        "datasets": list(dict.fromkeys(datasets)),
        "metrics": ["accuracy"] if card.scores else [],
    }
    return {name: value for name, value in fields.items() if value}


def _what(card: Card) -> Iterator[str]:
    config, millions = card.config, f"{card.config.num_parameters() / 1e6:.3g}M"
    made = f"Tiny Language Model (`tinylm` {__version__})"
    theirs = [lineage for lineage in card.line if lineage.get("stage") == "imported"]
    if theirs and len(theirs) == len(card.line):
        made = f"of another maker, converted with {made}"
    else:
        made = f"tuned with {made} from a model of another maker" if theirs else f"made with {made}"
    if card.adapter:
        base = f"`{card.base_model}`" if card.base_model else "a model"
        yield f"A LoRA adapter for {base} of {millions} parameters, {made}."
        projections = ", ".join(f"`{name}`" for name in card.adapter.target_modules)
        yield f"Rank {card.adapter.rank}, alpha {card.adapter.alpha:g}, on {projections}. Weights in {card.dtype}."
        return
    does = "continues texts and knows no chats" if card.is_base else "answers in chats"
    yield f"A language model of {millions} parameters that {does}, {made}."
    rows = {
        "architecture": f"`{config_to_hf(config)['architectures'][0]}`",
        "layers, width": f"{config.num_hidden_layers}, {config.hidden_size}",
        "heads, of which for keys and values": f"{config.num_attention_heads}, {config.num_key_value_heads}",
        "context": f"{config.max_position_embeddings:,} tokens",
        "vocabulary": f"{config.vocab_size:,} entries",
        "weights": card.dtype,
    }
    yield _table(("", ""), rows.items())
    yield "A model of this size knows what its data shows, and little else. Check what it says."


def _training(card: Card) -> Iterator[str]:
    rows = [
        (
            _STAGES.get(str(lineage.get("stage")), "not recorded"),
            _data(lineage, card.base_model),
            _number(lineage.get("step")),
            _product(lineage, "batch_size", "accumulation_steps"),
            _number(_settings(lineage).get("max_seq_len")),
            _optimizer(lineage),
            _number(lineage.get("seed")),
            _number(lineage.get("validation_loss")),
        )
        for lineage in reversed(card.line)
    ]
    columns = ("stage", "data", "steps", "rows of a step", "tokens of a row", "optimizer, peak learning rate", "seed")
    yield _table((*columns, "validation loss"), rows)
    if any(map(_is_tinyworld, card.line)):
        yield "TinyWorld is a generated world of short stories, questions and answers in English."
    yield "Rows are those of one process. The loss is on held-out data, in nats per token (DPO: per pair)."
    if not card.is_complete:
        yield "What came before is not recorded."


def _evaluation(card: Card) -> Iterator[str]:
    if card.scores is None:
        yield "None but the validation loss above."
        return
    yield (
        f"Greedy answers to held-out TinyWorld questions, {card.scores.num_items} for each skill, computed in "
        f"{card.scores.dtype} before the export."
    )
    yield _table(("", "share"), ((_plain(name), f"{share:.1%}") for name, share in card.scores.shares.items()))


def _use(card: Card) -> Iterator[str]:
    name, short = card.repository, card.repository.partition("/")[2]
    yield "`OWNER` is the account on the hub. A folder on the disk works in its place."
    yield "**PEFT** (`pip install peft`):" if card.adapter else "**transformers** (`pip install transformers`):"
    yield f"```python\n{_code(card)}\n```"
    yield "**llama.cpp and Ollama** run a GGUF, which `tinylm` writes (`pip install 'tinylm[export]'`):"
    lines = [f"hf download {name} --local-dir {short}"]
    if card.adapter:
        lines.insert(0, f"hf download {card.base_repository} --local-dir {quote(card.base_name)}")
    merge = " --merge" * bool(card.adapter)
    lines.append(f"tinylm export --model_path {short} --format gguf --dtype f16{merge} --output gguf/{short}.gguf")
    lines += [
        f"llama-cli -m gguf/{short}.gguf",
        f"ollama create {short} -f gguf/{short}.Modelfile && ollama run {short}",
    ]
    yield "```sh\n" + "\n".join(lines) + "\n```"


def _code(card: Card) -> str:
    """An example in Python that prints what the model writes."""
    chat = 'messages = [{"role": "user", "content": "Who are you?"}]'
    if card.is_base:
        call = f'pipe("{card.document_start}Once upon a time", max_new_tokens=60, return_full_text=False)'
        call = f'print({call}[0]["generated_text"])'
    else:
        call = f'{chat}\nprint(pipe(messages, max_new_tokens=60)[0]["generated_text"][-1]["content"])'
    if not card.adapter:
        return f'from transformers import pipeline\n\npipe = pipeline("text-generation", "{card.repository}")\n{call}'
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline\n\n"
        f'base = "{card.base_repository}"\n'
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "{card.repository}")\n'
        # Not merged: PEFT's merge adds an adapter of one of two tied tables to both.
        'pipe = pipeline("text-generation", model.get_base_model(), tokenizer=AutoTokenizer.from_pretrained(base))\n'
        f"{call}"
    )


def _licence(card: Card) -> str:
    return _plain(card.license_name) or "The maker has not stated one."


# --------------------------------------------------------------------------------------------------
# The facts of one lineage, which may come from a stranger
# --------------------------------------------------------------------------------------------------


def _settings(lineage: dict[str, Any]) -> dict[str, Any]:
    settings = lineage.get("settings")
    return settings if isinstance(settings, dict) else {}


def _is_tinyworld(lineage: dict[str, Any]) -> bool:
    settings = _settings(lineage)
    return "data_path" in settings and settings["data_path"] is None


def _hub_data(lineage: dict[str, Any]) -> list[str]:
    """The names of the data sets of the hub that the model learned from."""
    paths = _settings(lineage).get("data_path")
    return _HUB_DATA.findall(paths.replace(",", "/ ")) if isinstance(paths, str) else []


def _data(lineage: dict[str, Any], base_model: str) -> str:
    """What the model learned from; of files on the maker's machine only the fingerprint, and no path."""
    settings = _settings(lineage)
    if _is_tinyworld(lineage):
        counts = [f"{_number(settings[name])} {unit}" for name, unit in _TINYWORLD.items() if settings.get(name)]
        return ", ".join(["TinyWorld", *counts])
    if names := _hub_data(lineage):
        return ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in names)
    if lineage.get("source") is not None:
        return f"that of {base_model}" if base_model else "not recorded"
    fingerprint = lineage.get("data_fingerprint")
    marked = f" (fingerprint {_plain(fingerprint)})" if isinstance(fingerprint, str) else ""
    return ("the maker's own" if settings.get("data_path") else "not recorded") + marked


def _optimizer(lineage: dict[str, Any]) -> str:
    settings = _settings(lineage)
    name = settings.get("optimizer")
    return f"{_plain(name)}, {_number(settings.get('learning_rate'))}" if isinstance(name, str) else ""


def _product(lineage: dict[str, Any], *names: str) -> str:
    one, other = (_settings(lineage).get(name) for name in names)
    return f"{one * other:,}" if isinstance(one, int) and isinstance(other, int) else ""


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _plain(text: str) -> str:
    """A text on one line that Markdown shows as it is."""
    visible = "".join(character for character in text if character.isprintable())[:100]
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", visible)


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)
