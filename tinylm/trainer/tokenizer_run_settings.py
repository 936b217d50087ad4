"""Settings of `tinylm tokenizer`, which trains a tokenizer or measures one that exists."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tinylm.files.atomic import require_file_name
from tinylm.tokenizer.split_patterns import Digits
from tinylm.tokenizer.tokenizer import SMALLEST_VOCAB
from tinylm.tokenizer.tokenizer_json import MAX_TRAINED_VOCAB
from tinylm.trainer.run.train_settings import require_at_least, require_output_dir, require_share

ONLY_TO_TRAIN = ("output_dir", "vocab_size", "digits", "special_tokens", "tinyworld_documents", "overwrite")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Settings of tokenizer training."""

    data_path: str | None = None
    """text to learn from: a file, a folder or a glob; without it, TinyWorld"""
    output_dir: str = "out/tokenizer"
    """folder for tokenizer.json and its companions"""
    vocab_size: int = 6400
    """number of entries, control tokens and bytes included; 272 to 262,144"""
    digits: Digits = "split"
    """split: each digit is a token (as in Qwen); grouped: up to three digits may be one (as in Llama 3)"""
    special_tokens: str | None = None
    """control tokens of your own, such as '<|fim|>,<|lang:de|>', or a file with one a line; part of vocab_size"""
    tokenizer_path: str | None = None
    """tokenizer or model folder to measure on data_path; nothing is trained then"""
    report_by: str = "language"
    """field of the records whose values are reported apart; records without it are reported by file"""
    output: str | None = None
    """JSON file to write the report to: bytes and characters per token of each part of the data"""
    max_bytes: int = 200_000_000
    """stop reading after this many bytes of text; merges hardly change after the first tens of megabytes"""
    max_bad_rows: float = 0.001
    """share of rows that may be broken (listed and skipped) before the data is refused"""
    tinyworld_documents: int = 8_000
    """stories, and as many chats, of TinyWorld to learn from when there is no data_path"""
    overwrite: bool = False
    """replace the tokenizer in output_dir"""

    def __post_init__(self) -> None:
        require_output_dir(self)
        require_at_least(1, self, "max_bytes", "tinyworld_documents")
        require_share(self, "max_bad_rows")
        if self.report_by != "language" and self.data_path is None:
            raise ValueError("report_by names a field of your records, and there is no --data_path; leave it out")
        if self.output is not None:
            require_file_name(self.output)
        if not SMALLEST_VOCAB <= self.vocab_size <= MAX_TRAINED_VOCAB:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; expected {SMALLEST_VOCAB} (control tokens and bytes) to "
                f"{MAX_TRAINED_VOCAB:,} (the largest in use); pass --vocab_size 6400"
            )
        if self.tokenizer_path is None:
            return
        given = [f.name for f in fields(self) if f.name in ONLY_TO_TRAIN and getattr(self, f.name) != f.default]
        if given:
            raise ValueError(
                f"--{given[0]} is for training, and with --tokenizer_path nothing is trained; leave one of them out"
            )
