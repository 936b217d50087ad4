"""YAML as settings need it: mappings, lists and plain values, checked before anything is built."""

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
        load: builds it, by a reader's own rules; called once the text is found harmless.

    Raises:
        yaml.YAMLError: no YAML, or what `_check_events` refuses. It may carry a line in `problem_mark`.
    """
    _check_events(text)
    try:
        return load(text)
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        # what PyYAML raises itself for `!!bool foo`, `!!timestamp foo` or a number of 5,000 digits
        raise yaml.MarkedYAMLError(problem=f"a value that cannot be read: {error}") from None


def _check_events(text: str) -> None:
    """Raise yaml.YAMLError for what a file of settings never has.

    An alias (`*name`) repeats a part of the file: nine lines of aliases of aliases are 10^9 values as soon as they
    are copied or printed. The native reader recurses for each bracket, and 30,000 of them end the process. And of
    two equal keys it takes the last without a word.
    """
    seen: list[set[str] | None] = []  # for each open mapping its keys so far; None for a list
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
