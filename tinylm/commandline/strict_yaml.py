"""Read YAML of mappings, lists and plain values, and check it before anything is built from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

MAX_YAML_BYTES = 1 << 16
"""A run's settings take 2 KB."""

_MAX_DEPTH = 16

_ODD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|0[xXoObB][0-9a-fA-F_]+|[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?)")
"""Octal 010, hexadecimal 0x10, binary 0b11 and base 60, in which 1:30 is 90 (YAML 1.1, yaml.org/type/int.html)."""


def is_odd_number(text: str) -> bool:
    """Whether a text is a number to YAML, but perhaps another one to its author: 010 is 8, and 1:30 is 90."""
    return _ODD_NUMBER.fullmatch(text) is not None


def parse_yaml(text: str, load: Callable[[str], Any]) -> Any:
    """The value of a YAML text.

    Args:
        load: parses the text by the caller's rules; it is called after the checks.

    Raises:
        yaml.YAMLError: the text is not YAML, or `_check_events` refuses it. `problem_mark` may hold the line.
    """
    _check_events(text)
    try:
        return load(text)
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        # raised by PyYAML for `!!bool foo`, `!!timestamp foo` or a number of 5,000 digits
        raise yaml.MarkedYAMLError(problem=f"a value that cannot be read: {error}") from None


def _check_events(text: str) -> None:
    """Raise yaml.YAMLError for anchors, aliases, deep nesting, equal keys and odd numbers. No settings need them.

    An alias (`*name`) repeats a part of the file: nine lines of aliases of aliases become 10^9 values when they are
    copied or printed. The native reader recurses for each bracket, and 30,000 brackets end the process. Of two equal
    keys it silently takes the last.
    """
    seen: list[set[str] | None] = []  # the keys so far of each open mapping; None for a list
    key_is_next: list[bool] = []
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionEndEvent):
            seen.pop()
            key_is_next.pop()
        if not isinstance(event, yaml.NodeEvent):
            continue
        is_plain = isinstance(event, yaml.ScalarEvent) and event.implicit[0]
        if is_plain and is_odd_number(event.value):
            problem = f"{event.value:.40} could be another number; write it in decimal digits, or a text in quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        if event.anchor is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not accepted", problem_mark=event.start_mark)
        if seen and (keys := seen[-1]) is not None:
            if key_is_next[-1] and isinstance(event, yaml.ScalarEvent):
                if event.value in keys:
                    raise yaml.MarkedYAMLError(problem="a key that appears twice", problem_mark=event.start_mark)
                keys.add(event.value)
            key_is_next[-1] = not key_is_next[-1]
        if isinstance(event, yaml.CollectionStartEvent):
            seen.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
            key_is_next.append(True)
            if len(seen) > _MAX_DEPTH:
                raise yaml.MarkedYAMLError(problem=f"nested deeper than {_MAX_DEPTH}", problem_mark=event.start_mark)
