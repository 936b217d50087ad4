"""What the page knows of a model before it is unpacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinylm.files.untrusted import read_own_json

MOST_PROMPTS, LONGEST_PROMPT = 3, 500


def page_card(name: str, parameters: int, context: int, why_no_chats: str, prompts: tuple[str, ...]) -> dict[str, Any]:
    """A card with the names of those that a server lists at /v1/models.

    Args:
        context: tokens.
        why_no_chats: why it continues text; empty if it answers conversations.
        prompts: questions that one may ask it.
    """
    return {
        "id": name,
        "parameters": parameters,
        "max_model_len": context,
        "chats": not why_no_chats,
        "why_no_chats": why_no_chats,
        "prompts": prompts,
    }


def prompts_for(model: Path) -> tuple[str, ...]:
    """Questions that the last model of a quickstart answered rightly in each try, from the scoreboard that it leaves
    beside its stages; empty where there is none."""
    try:
        prompts = read_own_json(model.absolute().parent.parent / "scoreboard.json").get("prompts")
    except (OSError, ValueError):
        return ()
    if not isinstance(prompts, list):
        return ()
    found = [each for each in prompts if isinstance(each, str) and 0 < len(each) <= LONGEST_PROMPT]
    return tuple(found[:MOST_PROMPTS])
