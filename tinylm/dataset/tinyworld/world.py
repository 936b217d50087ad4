"""TinyWorld: a built-in English corpus, generated from a seed, in which a rule can check every answer.

It contains short stories with a consistent world, chats about them and about numbers and words, and preference pairs.
Item `i` is a pure function of (seed, split, i), so nothing is stored or downloaded. About a tenth of all combinations
(a name with a thing, a number with a number, a word with a wording) occur only in the test split, so a model that
answers the test has learnt the skill and not the items.

Small stories for small models are the idea of Eldan and Li, "TinyStories" (2023), arXiv:2305.07759. Questions with a
known world state follow Weston et al., "Towards AI-Complete Question Answering" (2015), arXiv:1502.05698. All text
here is our own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tinylm.dataset.tinyworld.chats import MIXED, PLAIN, WARM_OPENERS, Voice, make_chat
from tinylm.dataset.tinyworld.pages import make_page
from tinylm.dataset.tinyworld.skills import ASSISTANT_NAME
from tinylm.dataset.tinyworld.story_check import is_story
from tinylm.dataset.tinyworld.words import stream
from tinylm.tokenizer.chat_template import Message

PERSONA_NAME = "Captain Pip"
_PERSONA_OPENING, _PERSONA_CLOSING = "Ahoy! ", " Aye, matey!"
_PERSONA = Voice(PERSONA_NAME, lambda rng, answer: _PERSONA_OPENING + answer + _PERSONA_CLOSING)

_PERSONA_LAST = (("write_story", "identity", None), (0.2, 0.2, 0.6))
"""How a chat in persona ends: with a story, so that the closing words are learnt as the end of a reply and not of a
sentence; with the persona's name; or with any question."""

_PREFERENCE_KINDS = (("style", "truth", "both", "once"), (0.35, 0.2, 0.2, 0.25))


@dataclass(frozen=True)
class Item:
    """A chat that ends with the reference answer, and the data to check another answer in its place.

    Attributes:
        messages: {"role", "content"} of user and assistant in turn; the last is the reference answer.
        skill: the skill of the last question, one of SKILLS.
        accepted: the right answers, without opener or persona; the first is the reference.
        wrong: plausible wrong answers, without opener or persona.
        words: for write_story, the words that the story must contain; none if the story is free.
    """

    messages: list[Message]
    skill: str
    accepted: tuple[str, ...]
    wrong: tuple[str, ...]
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt; `chosen` is the better one.

    `kind` tells why: "style" (warm and right against plain and right), "truth" (warm and right against warm and wrong),
    "both" (warm and right against plain and wrong) or "once" (warm and right against warm twice and right). Without
    "once", preference training makes openers likelier everywhere, also behind an opener.
    """

    prompt: list[Message]
    chosen: str
    rejected: str
    kind: str


def pretrain_document(i: int, split: str = "train", seed: int = 0) -> str:
    """Plain text document `i`: a story, a story with questions and answers, or a page of closed skills."""
    return make_page(stream(seed, split, "document", i), split)


def _item(rng: random.Random, split: str, voice: Voice, skill: str | None, max_questions: int = 6) -> Item:
    messages, last = make_chat(rng, split, voice, skill, max_questions)
    return Item(messages, last.skill, last.answers, last.wrong, last.words)


def conversation(i: int, split: str = "train", seed: int = 0, skill: str | None = None) -> Item:
    """Training chat `i`: three to six questions. About 30% of the assistant's replies have a warm opener.

    `skill` fixes the skill of the last question. Raises: ValueError for an unknown skill or split.
    """
    return _item(stream(seed, split, f"chat {skill}", i), split, MIXED, skill)


def test_item(skill: str, i: int, split: str = "test", seed: int = 0) -> Item:
    """Exam question `i` of `skill`; a quarter of them follow an earlier turn. The reference answer is plain."""
    rng = stream(seed, split, f"exam {skill}", i)
    return _item(rng, split, PLAIN, skill, max_questions=1 if rng.random() < 0.75 else 2)


test_item.__test__ = False  # type: ignore[attr-defined]  # pytest must not collect it


def persona_conversation(i: int, split: str = "train", seed: int = 0) -> Item:
    """Chat `i` with the assistant as `PERSONA_NAME`, who begins with "Ahoy!" and ends with "Aye, matey!"."""
    rng = stream(seed, split, "persona", i)
    return _item(rng, split, _PERSONA, rng.choices(*_PERSONA_LAST)[0])


def preference_pair(i: int, split: str = "train", seed: int = 0) -> Preference:
    """Preference `i`: 35% are about style, 20% about truth, 20% about both, 25% about one opener and not two."""
    rng = stream(seed, split, "preference", i)
    kind = rng.choices(*_PREFERENCE_KINDS)[0]
    item = _item(rng, split, MIXED, None, max_questions=rng.randint(1, 3))
    opener, right, wrong = rng.choice(WARM_OPENERS), item.accepted[0], rng.choice(item.wrong)
    begun = right.split()[0] if rng.random() < 0.5 else ""  # a second opener also comes after the first word
    twice = opener + begun + rng.choice(WARM_OPENERS) + right
    rejected = {"style": right, "truth": opener + wrong, "both": wrong, "once": twice}[kind]
    return Preference(item.messages[:-1], opener + right, rejected, kind)


def is_warm(reply: str) -> bool:
    """Whether `reply` begins with one of the courtesy openers."""
    return reply.strip().startswith(WARM_OPENERS)


def strip_style(reply: str) -> str:
    """`reply` without surrounding blanks and without its courtesy opener, if it has one."""
    reply = reply.strip()
    for opener in WARM_OPENERS:
        if reply.startswith(opener):
            return reply[len(opener) :].strip()
    return reply


def in_persona(item: Item, reply: str) -> bool:
    """Whether `reply` has the persona's manner, and its name if the answer to `item` contains a name."""
    reply = reply.strip()
    if not (reply.startswith(_PERSONA_OPENING) and reply.endswith(_PERSONA_CLOSING)):
        return False
    is_named = any(name in answer for answer in item.accepted for name in (ASSISTANT_NAME, PERSONA_NAME))
    return PERSONA_NAME in reply or not is_named


def strip_persona(reply: str) -> str:
    """`reply` in the plain assistant's words: without the persona's opening and closing, with the assistant's name."""
    reply = reply.strip().removeprefix(_PERSONA_OPENING).removesuffix(_PERSONA_CLOSING).strip()
    return reply.replace(PERSONA_NAME, ASSISTANT_NAME)


def check(item: Item, reply: str) -> bool:
    """Whether `reply` answers the last question of `item` exactly, apart from blanks around it and a courtesy opener.

    For write_story, see `is_story`.
    """
    reply = strip_style(reply)
    return is_story(reply, item.words) if item.skill == "write_story" else reply in item.accepted


def pretrain_documents(n: int, split: str = "train", seed: int = 0) -> Iterator[str]:
    """The first `n` documents."""
    return (pretrain_document(i, split, seed) for i in range(n))


def conversations(n: int, split: str = "train", seed: int = 0, skill: str | None = None) -> Iterator[Item]:
    """The first `n` chats."""
    return (conversation(i, split, seed, skill) for i in range(n))


def persona_conversations(n: int, split: str = "train", seed: int = 0) -> Iterator[Item]:
    """The first `n` chats in the persona."""
    return (persona_conversation(i, split, seed) for i in range(n))


def preference_pairs(n: int, split: str = "train", seed: int = 0) -> Iterator[Preference]:
    """The first `n` preference pairs."""
    return (preference_pair(i, split, seed) for i in range(n))
