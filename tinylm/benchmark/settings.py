"""The settings of `tinylm bench`, and the sizes that each part takes when none are given."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylm.files.atomic import require_file_name, require_new
from tinylm.model.model_tinylm import PRESETS, TinyLMConfig
from tinylm.trainer.core.optimizer import OPTIMIZERS

PARTS = ("ceilings", "step", "compiled", "memory", "run", "decode", "prefill", "serve", "evaluate", "tokenize", "start")
PRECISIONS = ("auto", "float32", "bfloat16")
PRESETS_OF = {"step": "tiny,small", "compiled": "tiny,small", "run": "tiny"}
"""Part -> presets measured unless --preset is given; all others take small."""
SHAPES = {"tiny": (256, 8), "small": (512, 8), "large": (512, 8)}
"""Preset -> (tokens in a row, rows in a batch) unless given."""
FULL: dict[str, Any] = {
    "optimizer": "adamw,muon", "rounds": 3, "streams": "1,16", "prompt_tokens": 32, "max_new_tokens": 128,
    "prefill_tokens": 400, "run_steps": 100, "text_kb": 1000, "memory_mb": 256,
}  # fmt: skip
"""What is measured where nothing else is given."""
QUICK: dict[str, Any] = {
    "preset": "tiny", "optimizer": "muon", "documents": 2, "rounds": 1, "steps": 1, "max_seq_len": 16, "batch_size": 2,
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1, "streams": "1,2", "prompt_tokens": 4,
    "max_new_tokens": 4, "prefill_tokens": 16, "run_steps": 4, "text_kb": 20, "memory_mb": 4,
}  # fmt: skip
"""The same with --quick."""


@dataclass(frozen=True)
class BenchSettings:
    """Settings of the benchmark."""

    only: str = "all"
    """comma-separated parts: ceilings, step, compiled, memory, run, decode, prefill, serve, evaluate, tokenize,
    start"""
    preset: str = "auto"
    """comma-separated presets: tiny, small, large; auto takes tiny and small for training steps, tiny for the run,
    small for the rest"""
    precision: str = "auto"
    """comma-separated precisions of matrix products: float32, bfloat16, or auto: bfloat16 where the hardware has it,
    else float32"""
    optimizer: str = "auto"
    """comma-separated optimizers of our training step: adamw, muon; auto takes both; transformers has AdamW always"""
    documents: int = 0
    """documents in a row of the packed training step, which takes the last optimizer; 1 leaves it out; 0 takes 8, and
    leaves it out of the compiled steps, because compiling takes long"""
    compare: bool = True
    """measure transformers beside it, if it is installed"""
    rounds: int = 0
    """turns of each contender, of which the median is reported; 0 takes 3"""
    steps: int = 0
    """training steps in a turn; 0 takes 4 for tiny, else 1, and 10 on a GPU"""
    max_seq_len: int = 0
    """tokens in a row; 0 takes 256 for tiny, else 512"""
    batch_size: int = 0
    """rows in a batch; 0 takes 8"""
    vocab_size: int = 0
    """entries of the vocabulary; 0 takes the preset's; the run and the evaluation take those of their tokenizer"""
    hidden_size: int = 0
    """width of the model; 0 takes the preset's"""
    num_hidden_layers: int = 0
    """number of blocks; 0 takes the preset's"""
    streams: str = "auto"
    """comma-separated numbers of texts that are decoded together; auto takes 1 and 16"""
    prompt_tokens: int = 0
    """tokens in each prompt of decoding; 0 takes 32"""
    max_new_tokens: int = 0
    """tokens to decode for each prompt; 0 takes 128"""
    prefill_tokens: int = 0
    """tokens in the prompt of prefill; 0 takes 400"""
    run_steps: int = 0
    """training steps of the whole run; 0 takes 100"""
    text_kb: int = 0
    """text (kB) to tokenise; a twentieth of it is evaluated; 0 takes 1,000"""
    memory_mb: int = 0
    """numbers (MB) that are read to measure the memory's speed; 0 takes 256"""
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
            ("preset", self.preset, ("auto", *PRESETS)),
            ("precision", self.precision, PRECISIONS),
            ("optimizer", self.optimizer, ("auto", *OPTIMIZERS)),
        ):
            for value in words(values):
                if value not in known:
                    raise ValueError(f"{name} has {value!r}; expected {', '.join(known)}; correct --{name}")
        for value in [] if self.streams == "auto" else words(self.streams):
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"streams has {value!r}; expected positive numbers, such as --streams 1,16")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{field.name} is {value}; expected a positive number; pass --{field.name} 1")
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
        return words(PRESETS_OF.get(part, "small") if self.preset == "auto" else self.preset)

    def shape(self, preset: str) -> tuple[int, int]:
        """(tokens in a row, rows in a batch) of a training step."""
        length, rows = SHAPES[preset]
        return self.max_seq_len or length, self.batch_size or rows

    def documents_in(self, part: str) -> int:
        """Documents in a row of the packed step; 1 for no packed step."""
        return self.documents or (1 if part == "compiled" else 8)

    def config(self, preset: str, longest: int) -> TinyLMConfig:
        """The model's shape, with room for `longest` tokens."""
        fields = ("vocab_size", "hidden_size", "num_hidden_layers")
        given = {name: getattr(self, name) for name in fields if getattr(self, name)}
        config = TinyLMConfig.preset(preset, **given)
        context = max(longest, config.max_position_embeddings)
        return dataclasses.replace(config, max_position_embeddings=context)

    def filled(self) -> BenchSettings:
        """The settings with the sizes that are not given: the usual ones, or those of --quick."""
        sizes = FULL | (QUICK if self.quick else {})
        unset = {name: size for name, size in sizes.items() if getattr(self, name) in (0, "auto")}
        return dataclasses.replace(self, **unset)


def words(text: str) -> list[str]:
    """The values of a comma-separated setting, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",")))
