"""The settings of `tinylm bench`, and the sizes that each part takes when none are given."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylm.files.atomic import require_file_name, require_new
from tinylm.model.model_tinylm import PRESETS, TinyLMConfig
from tinylm.trainer.core.optimizer import OPTIMIZERS

PARTS = ("ceilings", "step", "compiled", "memory", "run", "decode", "prefill", "evaluate", "tokenize", "start")
PRECISIONS = ("auto", "float32", "bfloat16")
PRESETS_OF = {"step": "tiny,small", "compiled": "tiny,small", "run": "tiny"}
"""Part -> presets measured unless --preset is given; all others take small."""
SHAPES = {"tiny": (256, 8), "small": (512, 8), "large": (512, 8)}
"""Preset -> (tokens in a row, rows in a batch) unless given."""
QUICK: dict[str, Any] = {
    "preset": "tiny", "optimizer": "muon", "documents": 2, "rounds": 1, "steps": 1, "max_seq_len": 16, "batch_size": 2,
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1, "streams": "1,2", "prompt_tokens": 4,
    "max_new_tokens": 4, "prefill_tokens": 16, "run_steps": 4, "text_kb": 20, "memory_mb": 4,
}  # fmt: skip
"""What --quick takes for settings that are not given."""


@dataclass(frozen=True)
class BenchSettings:
    """Settings of the benchmark."""

    only: str = "all"
    """comma-separated parts: ceilings, step, compiled, memory, run, decode, prefill, evaluate, tokenize, start"""
    preset: str | None = None
    """comma-separated presets: tiny, small, large; unset takes tiny and small for training steps, tiny for the run,
    small for the rest"""
    precision: str = "auto"
    """comma-separated precisions of matrix products: float32, bfloat16, or auto: bfloat16 where the hardware has it,
    else float32"""
    optimizer: str = "adamw,muon"
    """comma-separated optimizers of our training step: adamw, muon; transformers has AdamW always"""
    documents: int = 8
    """documents in a row of the packed training step, which takes the last optimizer; 1 leaves it out"""
    compare: bool = True
    """measure transformers beside it, if it is installed"""
    rounds: int = 3
    """turns of each contender; the median is reported"""
    steps: int | None = None
    """training steps in a turn; unset takes 4 for tiny, else 1, and 10 on a GPU"""
    max_seq_len: int | None = None
    """tokens in a row; unset takes 256 for tiny, else 512"""
    batch_size: int | None = None
    """rows in a batch; unset takes 8"""
    vocab_size: int | None = None
    """entries of the vocabulary, in place of the preset's; the run takes those of its tokenizer"""
    hidden_size: int | None = None
    """width, in place of the preset's"""
    num_hidden_layers: int | None = None
    """layers, in place of the preset's"""
    streams: str = "1,16"
    """comma-separated numbers of texts that are decoded together"""
    prompt_tokens: int = 32
    """tokens in each prompt of decoding"""
    max_new_tokens: int = 128
    """tokens to decode for each prompt"""
    prefill_tokens: int = 400
    """tokens in the prompt of prefill"""
    run_steps: int = 100
    """training steps of the whole run"""
    text_kb: int = 1000
    """text (kB) to tokenise; a twentieth of it is evaluated"""
    memory_mb: int = 256
    """numbers (MB) that are read to measure the memory's speed"""
    quick: bool = False
    """rehearse each part in a second or two with a tiny shape; its figures say nothing about the machine"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    output: str | None = None
    """JSON file for the figures; unset takes bench.json, or bench-2.json and so on where that exists"""
    overwrite: bool = False
    """replace the file that --output names"""

    def __post_init__(self) -> None:
        for name, values, known in (
            ("only", self.only, ("all", *PARTS)),
            ("preset", self.preset or "tiny", tuple(PRESETS)),
            ("precision", self.precision, PRECISIONS),
            ("optimizer", self.optimizer, OPTIMIZERS),
        ):
            for value in words(values):
                if value not in known:
                    raise ValueError(f"{name} has {value!r}; expected {', '.join(known)}; correct --{name}")
        for value in words(self.streams):
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"streams has {value!r}; expected positive numbers, such as --streams 1,16")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{field.name} is {value}; expected at least 1; pass --{field.name} 1")
        if self.output is not None:
            require_file_name(self.output)
            require_new(Path(self.output), self.overwrite, "output")
        elif self.overwrite:
            raise ValueError("--overwrite without --output; expected the file to replace; add --output bench.json")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts to measure, in the order of the suite."""
        chosen = words(self.only)
        return PARTS if "all" in chosen else tuple(part for part in PARTS if part in chosen)

    def presets(self, part: str) -> list[str]:
        """The presets that a part measures."""
        return words(self.preset or PRESETS_OF.get(part, "small"))

    def shape(self, preset: str) -> tuple[int, int]:
        """(tokens in a row, rows in a batch) of a training step."""
        length, rows = SHAPES[preset]
        return self.max_seq_len or length, self.batch_size or rows

    def config(self, preset: str, longest: int) -> TinyLMConfig:
        """The model's shape, with room for `longest` tokens."""
        fields = ("vocab_size", "hidden_size", "num_hidden_layers")
        given = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        config = TinyLMConfig.preset(preset, **given)
        context = max(longest, config.max_position_embeddings)
        return dataclasses.replace(config, max_position_embeddings=context)

    def with_quick_sizes(self) -> BenchSettings:
        """The settings with small sizes where none are given, if --quick is."""
        if not self.quick:
            return self
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        unset = {name: value for name, value in QUICK.items() if getattr(self, name) == defaults[name]}
        return dataclasses.replace(self, **unset)


def words(text: str) -> list[str]:
    """The values of a comma-separated setting, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",")))
