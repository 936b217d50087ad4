"""The chats of TinyWorld: how questions become turns, and how the assistant words its answers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from tinylm.dataset.tinyworld.plots import STORY_QUESTION_SKILLS, Question, Story, all_facts, ask, make_story
from tinylm.dataset.tinyworld.skills import ASSISTANT_NAME, CLOSED, identity_question
from tinylm.dataset.tinyworld.words import (
    CATEGORIES,
    CATEGORY_OF,
    OPPOSITES,
    a_or_an,
    capitalise,
    draw_pair,
    join_and,
)
from tinylm.tokenizer.chat_template import Message

WARM_OPENERS = ("Sure! ", "Of course! ", "Happy to help! ", "Gladly! ")
WARM_SHARE = 0.3

_GIVE_STORY = (
    "{story}\n{question}",
    "Read this story. {story}\n{question}",
    "Here is a story: {story}\n{question}",
    "{story}\n\n{question}",
    "Listen to this. {story}\n{question}",
    # In a terminal, people type both on one line.
    "{story} {question}",
    "Read this story. {story} {question}",
    "Here is a story: {story} {question}",
)
_ONE_WORD = (
    "Answer in one word. {question}",
    "{question} Answer in one word.",
    "In one word: {question}",
    "{question} Use one word only.",
    "One word, please. {question}",
)
_WRITE = (
    "Write a short story about {people} with {words}.",
    "Tell me a story about {people} with {words}.",
    "Please write a story about {people}. Use {words}.",
    "Can you make up a short story about {people} with {words} in it?",
    "I would like a story about {people} with {words}.",
    "Make up a story about {people}. Use {words} in it.",
)
_WRITE_ANY = (
    "Tell me a story.",
    "Tell me a short story.",
    "Please tell me a story.",
    "Can you tell me a story?",
    "Write a story.",
    "Write a short story.",
    "Please write a short story.",
    "I would like a story.",
)
_HELLO = ("Hello!", "Hi!", "Hello.", "Hi there!", "Hello there!", "Good morning!", "Good evening!")
_HOW_ARE_YOU = ("How are you?", "How are you today?", "Are you well?")
_THANKS = (
    "Thank you!",
    "Thanks a lot!",
    "Thank you very much.",
    "Great, thanks!",
    "That was all, thank you.",
)
WELCOME = "You are welcome!"
_NICE_TO_MEET_YOU = "Hello! It is nice to meet you."
_WELL = "I am well, thank you."

# Relative frequencies. More stories do not teach to answer questions about them sooner; more of the other skills does
# (docs/trials.md), so most chats are about these.
STORY_SHARE, SMALL_TALK_SHARE = 0.38, 0.04
_STORY_WEIGHTS = {"who_has": 30, "where_is": 24, "what_colour": 14, "how_feels": 16, "not_in_story": 26}
_CLOSED_WEIGHTS = {
    "write_story": 25, "addition": 19, "subtraction": 20, "counting": 10, "comparing": 17, "sorting": 18, "spelling": 5,
    "reversing": 9, "opposites": 5, "categories": 6, "greeting": 3, "identity": 3, "one_word": 22, "capitals": 7,
}  # fmt: skip
SKILLS = (*_STORY_WEIGHTS, *_CLOSED_WEIGHTS)
_STORY_DRAW = (tuple(_STORY_WEIGHTS), tuple(_STORY_WEIGHTS.values()))
_CLOSED_DRAW = (tuple(_CLOSED_WEIGHTS), tuple(_CLOSED_WEIGHTS.values()))


@dataclass(frozen=True)
class Voice:
    """How the assistant speaks: its name, and how it changes a plain answer."""

    name: str
    style: Callable[[random.Random, str], str]


def plain_or_warm(rng: random.Random, answer: str) -> str:
    return rng.choice(WARM_OPENERS) + answer if rng.random() < WARM_SHARE else answer


PLAIN = Voice(ASSISTANT_NAME, lambda rng, answer: answer)
MIXED = Voice(ASSISTANT_NAME, plain_or_warm)


def write_story(rng: random.Random, split: str) -> Question:
    """The request for a story: in training one in four leaves the story free, the others name people and words.

    The words are a thing that one of the people has at the end, and perhaps a place or a feeling. All people of the
    story are named, because a reader cannot guess a name, and the likeliest guess is a name that the story already has.
    """
    story = make_story(rng, split)
    one, other = story.people[:2]
    confused = re.sub(rf"\b{other}\b", one, story.text)  # one person has the names of two
    if split == "train" and rng.random() < 0.25:
        return Question("write_story", rng.choice(_WRITE_ANY), (story.text,), (confused,))
    words = [rng.choice(list(story.holder) if split == "train" else story.reserved_things())]
    if rng.random() < 0.6:
        words.append(rng.choice([*story.where.values(), *story.feels.values()]))
    rng.shuffle(words)
    given = f"the word{'s' * (len(words) > 1)} {join_and(words)}"
    text = rng.choice(_WRITE).format(people=join_and(story.people), words=given)
    words += story.people
    unasked = make_story(rng, split)
    while all(word in unasked.text for word in words):
        unasked = make_story(rng, split)
    return Question("write_story", text, (story.text,), (unasked.text, confused), tuple(words))


def _short(word: str) -> tuple[str, str]:
    return capitalise(word) + ".", capitalise(word)


def _one_word_closed(rng: random.Random, split: str) -> Question:
    if rng.random() < 0.5:
        word, form = draw_pair(rng, split, "one word", tuple(OPPOSITES), _ONE_WORD)
        question = rng.choice(("What is the opposite of {}?", "Which word is the opposite of {}?")).format(word)
        right, wrong = OPPOSITES[word], rng.choice([w for w in OPPOSITES if w not in (word, OPPOSITES[word])])
    else:
        word, form = draw_pair(rng, split, "one word", tuple(CATEGORY_OF), _ONE_WORD)
        right = CATEGORY_OF[word]
        wrong = rng.choice([category for category in CATEGORIES if category != right])
        either = (right, wrong) if rng.random() < 0.5 else (wrong, right)
        question = f"Is {a_or_an(word)} {a_or_an(either[0])} or {a_or_an(either[1])}?"
    return Question("one_word", form.format(question=question), _short(right), (_short(wrong)[0],))


def _one_word_story(rng: random.Random, story: Story, split: str) -> Question:
    full = ask(rng, story, rng.choice(("who_has", "what_colour", "how_feels")), split)
    cut = 0 if full.skill == "who_has" else -1  # "Mia has the ball." -> Mia; "The ball is red." -> red
    right, *wrong = (_short(text.rstrip(".").split()[cut]) for text in (full.answers[0], *full.wrong))
    text = rng.choice(_ONE_WORD).format(question=full.text)
    return Question("one_word", text, right, tuple(other[0] for other in wrong))


def closed_question(rng: random.Random, split: str, skill: str, name: str) -> Question:
    """A question without a story, of any skill but the story questions."""
    if skill == "write_story":
        return write_story(rng, split)
    if skill == "one_word":
        return _one_word_closed(rng, split)
    if skill == "identity":
        return identity_question(rng, split, name)
    return CLOSED[skill](rng, split)


class _Chat:
    """Builds a chat: its messages so far, and the last question."""

    def __init__(self, rng: random.Random, voice: Voice):
        self.rng, self.voice = rng, voice
        self.messages: list[Message] = []

    def turn(self, question: Question, text: str | None = None) -> None:
        self.last = question
        self.messages.append({"role": "user", "content": text or question.text})
        self.messages.append({"role": "assistant", "content": self.voice.style(self.rng, question.answers[0])})


def _story_chat(chat: _Chat, split: str, num_questions: int, last_skill: str | None) -> None:
    """A story with its first question, then more questions; no fact is asked for twice."""
    rng, story = chat.rng, make_story(chat.rng, split)
    last = None
    if last_skill == "one_word":
        last = _one_word_story(rng, story, split)
    elif last_skill is not None:
        last = ask(rng, story, last_skill, split)
    facts = all_facts(story)
    if last is not None:
        facts = [fact for fact in facts if fact[0] != last.skill]
    num_questions = min(num_questions, len(facts) + 1)
    for k in range(num_questions):
        if last is not None and k == num_questions - 1:
            question = last
        elif rng.random() < 0.15:
            question = _one_word_story(rng, story, split)
        else:
            skill = rng.choices(*_STORY_DRAW)[0]
            open_facts = [fact for fact in facts if fact[0] == skill]
            subject = None
            if skill != "not_in_story" and facts:
                fact = rng.choice(open_facts or facts)
                facts.remove(fact)
                skill, subject = fact
            question = ask(rng, story, skill, split, subject)
        text = rng.choice(_GIVE_STORY).format(story=story.text, question=question.text) if k == 0 else None
        chat.turn(question, text)


def _closed_chat(chat: _Chat, split: str, num_questions: int, last_skill: str | None) -> None:
    for k in range(num_questions):
        skill = last_skill if last_skill and k == num_questions - 1 else chat.rng.choices(*_CLOSED_DRAW)[0]
        chat.turn(closed_question(chat.rng, split, skill, chat.voice.name))


def _small_talk(chat: _Chat, split: str) -> None:
    """A greeting with or without a name, a question or two, and thanks."""
    if chat.rng.random() < 0.5:
        chat.turn(closed_question(chat.rng, split, "greeting", chat.voice.name))
    else:
        chat.turn(Question("greeting", chat.rng.choice(_HELLO), (_NICE_TO_MEET_YOU,), (WELCOME,)))
    if chat.rng.random() < 0.3:
        chat.turn(Question("greeting", chat.rng.choice(_HOW_ARE_YOU), (_WELL,), (WELCOME,)))
    _closed_chat(chat, split, chat.rng.randint(1, 2), None)
    chat.turn(Question("greeting", chat.rng.choice(_THANKS), (WELCOME,), ("It is nice to meet you.",)))


def make_chat(
    rng: random.Random, split: str, voice: Voice, skill: str | None = None, max_questions: int = 6
) -> tuple[list[Message], Question]:
    """A chat that ends with the answer to a question of `skill` (of any skill if None), and this last question.

    Without a skill, `STORY_SHARE` of the chats are about a story, `SMALL_TALK_SHARE` are small talk, and the rest are
    questions without a story. A chat has at least three questions, but never more than `max_questions`.
    """
    if skill is not None and skill not in SKILLS:
        raise ValueError(f"skill {skill!r}; expected one of {', '.join(SKILLS)}; choose one of them")
    chat, draw = _Chat(rng, voice), rng.random()
    about_story = (
        skill in STORY_QUESTION_SKILLS or (skill == "one_word" and draw < 0.5) or (skill is None and draw < STORY_SHARE)
    )
    if about_story:
        _story_chat(chat, split, min(max_questions, rng.randint(5, 7)), skill)
    elif skill is None and draw < STORY_SHARE + SMALL_TALK_SHARE and max_questions >= 4:
        _small_talk(chat, split)
    else:
        _closed_chat(chat, split, min(max_questions, rng.randint(3, 7)), skill)
    return chat.messages, chat.last
