"""Read YAML of mappings, lists and plain values, and check it before anything is built from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

MAX_YAML_BYTES = 1 << 16
"""A run's settings take 2 KB."""

_MAX_DEPTH = 16


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
    """Raise yaml.YAMLError for anchors, aliases, deep nesting and equal keys. No file of settings needs them.

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
