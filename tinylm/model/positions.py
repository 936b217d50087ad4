"""Where a token stands: rotary embeddings (RoPE), also for longer contexts; sinusoidal and learned positions for study.

Shapes: B batch, T time, C width, H heads, D head dim, P positions in the table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tinylm.model.config import TinyLMConfig


def rope_frequencies(config: TinyLMConfig) -> tuple[Tensor, float]:
    """Rotation speeds in radians per position, [D/2] float32, and the factor on cos and sin.

    Plain RoPE (Su et al. 2021, arXiv:2104.09864): theta_i = base ** (-2i/D), factor 1.

    Linear position interpolation (Chen et al. 2023, arXiv:2306.15595): theta_i / s for a factor of s.
    """
    dim, base, scaling = config.head_width, config.rope_theta, config.rope_scaling or {"rope_type": "default"}
    inverse_speeds = base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kind = scaling["rope_type"]
    if kind == "yarn":
        return _yarn_speeds(inverse_speeds, base, scaling), _yarn_temperature(scaling, scaling["factor"])
    speeds = 1.0 / inverse_speeds
    if kind == "linear":
        speeds = speeds / scaling["factor"]
    elif kind == "llama3":
        speeds = _llama3_speeds(speeds, scaling)
    return speeds, 1.0


def _llama3_speeds(speeds: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1's rule (Grattafiori et al. 2024, arXiv:2407.21783; the code of Meta's release states it):

        theta' = theta                               where the pair turns more than `high` times in the original context
        theta' = theta / s                           where it turns less than `low` times
        theta' = (1 - r) theta / s + r theta         between, r = (turns - low) / (high - low)

    with turns = original_context * theta / 2 pi.
    """
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    wavelengths = 2 * math.pi / speeds
    kept = ((scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * speeds / factor + kept * speeds


def _yarn_speeds(inverse_speeds: Tensor, base: float, yarn: dict[str, Any]) -> Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): pairs that turn often within the original context keep their
    speed, pairs that never complete a turn are slowed by `factor`, and a linear ramp joins the two; the
    attention temperature of its equation 22 is folded into cos and sin as 0.1 ln(factor) + 1.
    """
    dim, original, factor = 2 * len(inverse_speeds), yarn["original_max_position_embeddings"], yarn["factor"]

    def pair_turning(turns: float) -> float:
        """The (fractional) pair index that makes `turns` full turns within the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_turning(yarn.get("beta_fast", 32)), pair_turning(yarn.get("beta_slow", 1))
    if yarn.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001  # the reference's guard against a ramp of no length
    slowed = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    # Rounded like the reference: an error of 1e-7 in a speed becomes 1e-5 in the angle after a hundred positions.
    kept = 1 - slowed
    return 1.0 / (factor * inverse_speeds) * (1 - kept) + 1.0 / inverse_speeds * kept


def _yarn_temperature(yarn: dict[str, Any], factor: float) -> float:
    if "attention_factor" in yarn:
        return float(yarn["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if yarn.get("mscale") and yarn.get("mscale_all_dim"):
        return scale(yarn["mscale"]) / scale(yarn["mscale_all_dim"])
    return scale(1.0)


class RotaryEmbedding(nn.Module):
    """Precomputed cos and sin of every position up to `max_position_embeddings`.

    The sign of rotate-half is stored in the sine table ([-sin, sin]), so that turning a vector costs one roll
    and two multiplications: rotate_half(x) * sin == roll(x, D/2) * [-sin, sin].
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TinyLMConfig):
        super().__init__()
        speeds, temperature = rope_frequencies(config)
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
        angles = torch.outer(positions, speeds)  # [P, D/2]
        # In place where possible: a table of a million positions is large, and every operation would make another.
        cos = angles.cos().mul_(temperature)
        # Not persistent: the tables follow from the config, so checkpoints do not contain them.
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1), persistent=False)  # [P, D]
        del cos
        sin = angles.sin_().mul_(temperature)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=-1), persistent=False)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Follow the model to another device, but stay float32 when its weights are halved.

        Tables rounded once and then moved back to float32 would no longer be the tables of the paper.
        """
        tables = self.cos, self.sin
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            self.cos, self.sin = (table.to(self.cos.device) for table in tables)
        return self

    def forward(self, positions: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin at `positions`, as [B, T, 1, D] or, for a slice of the table, [T, 1, D].

        They come in the dtype of the queries and keys, so that RoPE never promotes those.
        """
        return self.cos[positions].unsqueeze(-2).to(dtype), self.sin[positions].unsqueeze(-2).to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head's vector [B, T, H, D] by its position's angles; the dtype stays.

    x' = x * cos + rotate_half(x) * sin, the halves of D forming the pairs (GPT-NeoX's and Llama's layout).
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def sinusoidal_table(num_positions: int, hidden_size: int) -> Tensor:
    """[P, C] float32: sin in even columns, cos in odd ones (Vaswani et al. 2017, section 3.5)."""
    position = torch.arange(num_positions, dtype=torch.float32)[:, None]
    columns = torch.arange(0, hidden_size, 2, dtype=torch.float32)
    speed = torch.exp(columns * (-math.log(10_000.0) / hidden_size))
    table = torch.empty(num_positions, hidden_size)
    table[:, 0::2] = torch.sin(position * speed)
    table[:, 1::2] = torch.cos(position * speed)
    return table


class SinusoidalPositions(nn.Module):
    """Fixed sinusoids, added to the token embeddings."""

    table: Tensor

    def __init__(self, config: TinyLMConfig):
        super().__init__()
        table = sinusoidal_table(config.max_position_embeddings, config.hidden_size)
        # Embeddings start with a small standard deviation; a table of ones and zeros would drown them.
        self.register_buffer("table", table * config.initializer_range, persistent=False)

    def forward(self, positions: Tensor | slice) -> Tensor:
        return self.table[positions]  # [B, T, C] or [T, C]


class LearnedPositions(nn.Embedding):
    """One trained vector per position, added to the token embeddings (GPT-2's way)."""

    def __init__(self, config: TinyLMConfig):
        super().__init__(config.max_position_embeddings, config.hidden_size)

    def forward(self, positions: Tensor | slice) -> Tensor:
        return self.weight[positions]  # [B, T, C] or [T, C]
