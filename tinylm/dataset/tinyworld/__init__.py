"""TinyWorld, the embedded corpus: stories, chats and preference pairs, each a function of a seed and a number."""

from tinylm.dataset.tinyworld.chats import SKILLS
from tinylm.dataset.tinyworld.plots import STORY_QUESTION_SKILLS
from tinylm.dataset.tinyworld.skills import ASSISTANT_NAME
from tinylm.dataset.tinyworld.world import (
    PERSONA_NAME,
    Item,
    Preference,
    check,
    conversation,
    conversations,
    in_persona,
    is_warm,
    persona_conversation,
    persona_conversations,
    preference_pair,
    preference_pairs,
    pretrain_document,
    pretrain_documents,
    strip_persona,
    strip_style,
    test_item,
)

__all__ = [
    "ASSISTANT_NAME",
    "PERSONA_NAME",
    "SKILLS",
    "STORY_QUESTION_SKILLS",
    "Item",
    "Preference",
    "check",
    "conversation",
    "conversations",
    "in_persona",
    "is_warm",
    "persona_conversation",
    "persona_conversations",
    "preference_pair",
    "preference_pairs",
    "pretrain_document",
    "pretrain_documents",
    "strip_persona",
    "strip_style",
    "test_item",
]
