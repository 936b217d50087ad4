"""The shape of a model: `TinyLMConfig` and its presets."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from tinylm.files.untrusted import shown

POSITION_EMBEDDING_TYPES = ("rope", "sinusoidal", "learned")
_MAX_POSITIONS = 2**20
_SMALL_TABLE = 2**24
"""Numbers that any position table may have (64 MB: 131,072 positions of heads 64 wide). A larger table must not outgrow
the model's weights."""

_ROPE_NUMBERS: dict[str, dict[str, tuple[float, float]]] = {
    "linear": {"factor": (1.0, 1e4)},
    "llama3": {
        "factor": (1.0, 1e4),
        "low_freq_factor": (1e-3, 1e6),
        "high_freq_factor": (1e-3, 1e6),
        "original_max_position_embeddings": (1, 2**31),
    },
    "yarn": {
        "factor": (1.0, 1e4),
        "original_max_position_embeddings": (1, 2**31),
        "attention_factor": (1e-3, 1e3),
        "beta_fast": (1e-3, 1e6),
        "beta_slow": (1e-3, 1e6),
        "mscale": (0.0, 1e3),
        "mscale_all_dim": (0.0, 1e3),
    },
}
"""The numbers of each kind of `rope_scaling`, with the lowest and highest value: wider than any in use (a factor of 4
to 40, betas of 32 and 1)."""
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}


def is_number(value: object) -> bool:
    """Whether `value` is a finite number. Booleans, and whole numbers too large for a float, do not count."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class TinyLMConfig:
    """Every number that fixes the architecture; the field names are `LlamaConfig`'s.

    Raises:
        ValueError: the numbers do not fit together (the message names them and the way out).
    """

    vocab_size: int = 6400
    """Number of entries in the vocabulary V."""
    hidden_size: int = 512
    """Width C of the residual stream."""
    intermediate_size: int | None = None
    """Inner width of the feed-forward layers; default 64 * ceil(8/3 * hidden_size / 64)."""
    num_hidden_layers: int = 8
    """Number of transformer blocks."""
    num_attention_heads: int = 8
    """Number of query heads H."""
    num_key_value_heads: int = 2
    """Number of key/value heads K: H is multi-head, 1 multi-query, anything between grouped-query."""
    head_dim: int | None = None
    """Width D of one head; default hidden_size / num_attention_heads."""
    max_position_embeddings: int = 2048
    """Longest context, in tokens."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    rope_theta: float = 1e6
    """Base of the rotary wavelengths."""
    rope_scaling: dict[str, Any] | None = None
    """Context extension in Hugging Face's keys: rope_type linear, llama3 or yarn, e.g. {"rope_type": "yarn",
    "factor": 4.0, "original_max_position_embeddings": 2048}."""
    tie_word_embeddings: bool = True
    """Use one matrix for the embedding and the output projection."""
    qk_norm: bool = False
    """RMSNorm on every query and key head before RoPE, as Qwen3 does."""
    attention_bias: bool = False
    """Biases on the four attention projections."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections only, as Qwen2 has them."""
    mlp_bias: bool = False
    """Biases on the three feed-forward projections."""
    hidden_dropout: float = 0.0
    """Dropout probability on the embeddings and on what each sub-layer adds to the residual stream."""
    attention_dropout: float = 0.0
    """Dropout probability on the attention weights."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    position_embedding_type: str = "rope"
    """"rope", or "sinusoidal" / "learned" for study (those two cannot be exported as a Llama)."""
    bos_token_id: int | None = 1
    """Token id that starts a message."""
    eos_token_id: int | list[int] | None = 2
    """Token id that ends a message, or several."""
    pad_token_id: int | None = 0
    """Token id of padding and of a document's end."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            self._require_positive(name)
        for name in ("num_key_value_heads", "max_position_embeddings"):
            self._require_positive(name)
        if self.max_position_embeddings > _MAX_POSITIONS:
            raise ValueError(
                f"max_position_embeddings is {self.max_position_embeddings}; at most {_MAX_POSITIONS} "
                "positions are "
                "tabulated: lower it to the context you use"
            )
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 64 * math.ceil(8 * self.hidden_size / (3 * 64)))
        self._require_positive("intermediate_size")
        self._check_heads()
        if self.position_embedding_type not in POSITION_EMBEDDING_TYPES:
            raise ValueError(
                f"position_embedding_type {shown(self.position_embedding_type)} is unknown; "
                f"choose one of {', '.join(POSITION_EMBEDDING_TYPES)}"
            )
        if self.position_embedding_type == "rope" and self.head_width % 2:
            raise ValueError(
                f"head_dim (hidden_size / num_attention_heads) is {self.head_dim}, which is odd; RoPE turns pairs of "
                "numbers: choose widths that make it even"
            )
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"hidden_size {self.hidden_size} is odd; sinusoidal positions need an even one")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range", "hidden_dropout", "attention_dropout"):
            if not is_number(getattr(self, name)):
                raise ValueError(f"{name} is {shown(getattr(self, name))}; it must be a number")
            object.__setattr__(self, name, float(getattr(self, name)))  # JSON allows 10**30, torch does not
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} {getattr(self, name)} is not a probability; choose 0 <= {name} < 1")
        if self.rms_norm_eps < 0 or self.rope_theta <= 1 or self.initializer_range <= 0:
            raise ValueError(
                f"rms_norm_eps {self.rms_norm_eps} must be >= 0, rope_theta {self.rope_theta} > 1 and "
                f"initializer_range {self.initializer_range} > 0; correct the one that is not"
            )
        for name in ("tie_word_embeddings", "qk_norm", "attention_bias", "qkv_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {shown(getattr(self, name))}; it must be true or false")
        if self.attention_bias and self.qkv_bias:
            raise ValueError("attention_bias and qkv_bias are both true; set the one that describes the biases")
        self._check_tokens()
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", checked_rope(self.rope_scaling, self.max_position_embeddings))
        self._check_tables()

    def _check_heads(self) -> None:
        """Fill in `head_dim`; ValueError if the heads do not divide the width, or the key/value heads the heads."""
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                half = self.hidden_size // (1 if self.hidden_size % 2 else 2)  # so that the width of a head is even
                heads = _near_divisors(half, self.num_attention_heads, self.num_key_value_heads)
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                    f"{self.num_attention_heads}; choose num_attention_heads {heads}, or a hidden_size of "
                    f"{self.num_attention_heads * max(1, round(self.hidden_size / self.num_attention_heads))}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        self._require_positive("head_dim")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}; every key/value head must serve the same number of query heads; choose "
                f"num_key_value_heads {_near_divisors(self.num_attention_heads, self.num_key_value_heads)}"
            )

    def _check_tokens(self) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            several = value if isinstance(value, list) and name == "eos_token_id" else [value or 0]
            if not all(type(token_id) is int and abs(token_id) < 2**31 for token_id in several) or value is False:
                raise ValueError(f"{name} is {shown(value)}; it must be a whole number or null")

    def _check_tables(self) -> None:
        """Position tables are computed, not stored, so no file size limits them: a config alone could ask for 100 GB.

        Raises:
            ValueError: they would take more than 64 MB and more than the weights themselves.
        """
        width = {"rope": 2 * self.head_width, "sinusoidal": self.hidden_size, "learned": 0}
        numbers = self.max_position_embeddings * width[self.position_embedding_type]
        if numbers > max(_SMALL_TABLE, self.num_parameters()):
            raise ValueError(
                f"max_position_embeddings is {self.max_position_embeddings}, whose position tables of {numbers:,} "
                f"numbers are larger than the model of {self.num_parameters():,}: lower it to the context you use"
            )

    def _require_positive(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {shown(value)}; it must be a whole number of at least 1")

    @property
    def head_width(self) -> int:
        """D as a plain int (`head_dim` may be None only before construction ends)."""
        return int(self.head_dim or 0)

    @property
    def ffn_width(self) -> int:
        """The inner width of the feed-forward layers as a plain int."""
        return int(self.intermediate_size or 0)

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end a message, as a list: none, one or several."""
        several = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return [token_id for token_id in several if token_id is not None]

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TinyLMConfig:
        """One of `PRESETS`, with fields replaced. A new `hidden_size` takes its usual `intermediate_size`."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        fields = dict(PRESETS[name])
        if overrides.get("hidden_size", fields["hidden_size"]) != fields["hidden_size"]:
            fields.pop("intermediate_size", None)
        return cls(**{**fields, **overrides})

    def num_parameters(self) -> int:
        """Number of distinct weights of the model (a tied matrix counts once)."""
        width, head = self.hidden_size, self.head_width
        query, key = self.num_attention_heads * head, self.num_key_value_heads * head
        attention = width * (2 * query + 2 * key)
        attention += (self.attention_bias or self.qkv_bias) * (query + 2 * key) + self.attention_bias * width
        mlp = 3 * width * self.ffn_width + self.mlp_bias * (2 * self.ffn_width + width)
        block = attention + mlp + 2 * width + self.qk_norm * 2 * head
        embeddings = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        if self.position_embedding_type == "learned":
            embeddings += self.max_position_embeddings * width
        return embeddings + self.num_hidden_layers * block + width


def _near_divisors(number: int, wanted: int, divided_by: int = 1) -> str:
    """The divisors of `number` below and above `wanted`, as words: "4 or 8"; if possible, multiples of `divided_by`."""
    divisors = [n for n in range(1, min(number, 2 * wanted + 64, 4096) + 1) if number % n == 0]
    divisors = [n for n in divisors if n % divided_by == 0] or divisors
    below, above = [n for n in divisors if n < wanted][-1:], [n for n in divisors if n > wanted][:1]
    return " or ".join(map(str, below + above))


def checked_rope(scaling: dict[str, Any], max_positions: int) -> dict[str, Any] | None:
    """`rope_scaling` with defaults filled in, None for the default kind, or ValueError."""
    kind = scaling.get("rope_type", scaling.get("type"))
    if not isinstance(kind, str) or kind not in (*_ROPE_NUMBERS, "default"):
        raise ValueError(f"rope_type {shown(kind)} is not supported; expected default, {', '.join(_ROPE_NUMBERS)}")
    numbers = _ROPE_NUMBERS.get(kind, {})
    known = {"rope_type", "type", "rope_theta", *numbers, *(("truncate",) if kind == "yarn" else ())}
    if unknown := sorted(set(scaling) - known):
        raise ValueError(
            f"rope_scaling has the unknown key {shown(unknown[0])}; for rope_type {kind}, expected "
            f"{', '.join(sorted(known))}"
        )
    if kind == "default":
        return None
    out = {key: value for key, value in scaling.items() if key not in ("type", "rope_theta") and value is not None}
    out["rope_type"] = kind
    if missing := [name for name in _ROPE_REQUIRED[kind] if name not in out]:
        raise ValueError(f"rope_scaling has no {missing[0]}; rope_type {kind} needs it")
    if "original_max_position_embeddings" in numbers:
        out.setdefault("original_max_position_embeddings", max_positions)
    for name, (least, most) in numbers.items():
        if not is_number(value := out.get(name, least)) or not least <= value <= most:
            raise ValueError(
                f"rope_scaling has {name} {shown(value)}; expected a {name} of at least {least:g} and at most {most:g}"
            )
    if kind == "llama3" and out["high_freq_factor"] <= out["low_freq_factor"]:
        raise ValueError(
            f"rope_scaling has high_freq_factor {out['high_freq_factor']} and low_freq_factor "
            f"{out['low_freq_factor']}; expected a high_freq_factor above the low one"
        )
    if kind == "yarn":
        out.setdefault("factor", max_positions / out["original_max_position_embeddings"])
    return out


PRESETS: dict[str, dict[str, Any]] = {
    # 3,214,592 parameters: trains on a laptop CPU in minutes, with its own vocabulary. Deep and narrow: the same number
    # of parameters in 4 layers of 704 learned less from the same tokens (docs/trials.md).
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        # The other presets' 1e6 is as good on text but not in TinyWorld, whose rows are short (docs/training.md).
        "rope_theta": 1e4,
    },
    # 25,829,888 parameters.
    "small": {"hidden_size": 512, "num_hidden_layers": 8},
    # 104,030,976 parameters.
    "large": {"hidden_size": 768, "num_hidden_layers": 16},
}
