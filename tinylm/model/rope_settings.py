"""What a `config.json` says about rotary positions: their base, and YaRN's settings, checked."""

from __future__ import annotations

import sys
from typing import Any

from tinylm.untrusted_files import shown

_YARN_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
}
_YARN_LIMITS = {
    "factor": (1.0, 1e4),
    "original_max_position_embeddings": (1, 2**31),
    "attention_factor": (1e-3, 1e3),
    "beta_fast": (1e-3, 1e6),
    "beta_slow": (1e-3, 1e6),
    "mscale": (0.0, 1e3),
    "mscale_all_dim": (0.0, 1e3),
}
"""Lowest and highest value of YaRN's numbers: wider than any in use (a factor of 4 to 40, betas of 32 and 1)."""


def is_number(value: object) -> bool:
    """Whether it is a finite number. A bool is none here, nor is a whole number that no float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def rope_of(data: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, YaRN settings or None) from either generation of keys."""
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or data.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"partial_rotary_factor {shown(rope['partial_rotary_factor'])} is not supported; expected 1"
            )
        return theta, None
    return theta, {key: value for key, value in rope.items() if key != "rope_theta"}


def checked_yarn(scaling: dict[str, Any], max_positions: int) -> dict[str, Any] | None:
    """`rope_scaling` with defaults filled in, or ValueError."""
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rope_type {shown(kind)} is not supported; expected default or yarn")
    if unknown := sorted(set(scaling) - _YARN_KEYS):
        raise ValueError(
            f"rope_scaling has the unknown key {shown(unknown[0])}; expected {', '.join(sorted(_YARN_KEYS))}"
        )
    out = {key: value for key, value in scaling.items() if key not in ("type", "rope_theta") and value is not None}
    out["rope_type"] = "yarn"
    out.setdefault("original_max_position_embeddings", max_positions)
    for name, (least, most) in _YARN_LIMITS.items():
        if not is_number(value := out.get(name, least)) or not least <= value <= most:
            raise ValueError(
                f"rope_scaling has {name} {shown(value)}; expected a {name} of at least {least:g} and at most {most:g}"
            )
    original = out["original_max_position_embeddings"]
    out.setdefault("factor", max_positions / original)
    return out
