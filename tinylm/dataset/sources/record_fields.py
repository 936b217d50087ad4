"""What the fields of a row and of a message mean: read, refused by name, or counted.

This table is the only place that decides it. A field that `record_shapes.py` reads is not in it. A field that changes
what is to be learnt, in a way that no stage follows, is refused. Every other field (an id, a source, a score) is
counted, and the run says how often it was found. An empty field (null, "", [] or {}) says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tinylm.dataset.sources.record import Record, fail, is_empty

ROLE_ALIASES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Accepted name of a role -> our name."""

LEARN_FLAGS = ("weight", "train", "training", "loss")
"""Fields of a message that say whether it is learnt: 0 or false, 1 or true."""

THINKING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that the chat template has no place for."""

TEXT_ONLY = "a model here reads only text; remove the field, and what stands for it in the text"
PAIR = "it belongs to a preference pair; use tinylm dpo, or remove the field"
GOOD_OR_BAD = "it marks an answer as good or bad; keep only the rows with good answers, and remove the field"
PART_OF_TURN = "it masks a part of a turn; expected `weight` of 0 or 1 for the whole turn"

_MEDIA = dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), TEXT_ONLY)
_REJECTED = ("rejected_response", "rejected_messages", "preferred_output", "non_preferred_output")
_MASKS = ("mask", "masked", "loss_mask", "loss_scale", "loss_weight", "train_detail", "training_detail")

REFUSED_IN_PAIR = {**_MEDIA, "label": GOOD_OR_BAD, "kto_tag": GOOD_OR_BAD}
REFUSED_IN_CHAT = {**REFUSED_IN_PAIR, **dict.fromkeys(("chosen", "rejected", *_REJECTED), PAIR)}
REFUSED_IN_MESSAGE = {**_MEDIA, **dict.fromkeys(_MASKS, PART_OF_TURN)}
"""Field -> why it is refused, and what to do."""

UNUSED = "fields that training does not use"
LEFT_OUT_THINKING = "thinking that is left out; to have it learnt, write it into the content"
NOT_LEARNT = "answers marked as not to be learnt, and masked"
NEVER_LEARNT = "marked to be learnt, but only the assistant's turns are"


def check_fields(
    record: Record, data: Mapping[str, Any], read: Iterable[str], refused: Mapping[str, str], at: str = ""
) -> None:
    """Refuse or count the fields of `data`, a row or a message, that are not in `read`.

    Args:
        at: "" for a row, or the place of a message, such as `messages[3]`.

    Raises:
        BadRow: a field is refused.
    """
    for name, value in data.items():
        if name in read or is_empty(value):
            continue
        shown = f"{at.partition('[')[0]}.{name}" if at else str(name)
        if name in refused and not (name == "label" and isinstance(value, str)):  # a text is the name of a class
            fail(record, f"{at + '.' if at else ''}{name}: {refused[name]}")
        record.notes[LEFT_OUT_THINKING if at and name in THINKING else UNUSED, shown] += 1


def is_learnt(record: Record, data: Mapping[str, Any], flags: Iterable[str], at: str) -> bool | None:
    """What the `flags` of a message or row say: whether it is to be learnt; None if there are none.

    Raises:
        BadRow: a flag has another value than 0, 1, true and false, or two of them disagree.
    """
    found = {name: data[name] for name in flags if not is_empty(data.get(name))}
    for name, value in found.items():
        if not isinstance(value, (int, float)) or value not in (0, 1):
            fail(record, f"{at}{name} is {value!r:.40}; expected 0 or 1, true or false")
    if len(set(map(bool, found.values()))) > 1:
        fail(record, f"{at}{' and '.join(found)} disagree; expected one that says whether the turn is learnt")
    return bool(next(iter(found.values()))) if found else None
