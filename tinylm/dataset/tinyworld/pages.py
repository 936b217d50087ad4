"""The pages of TinyWorld's reading book: stories, stories with questions and answers, pages of closed skills."""

from __future__ import annotations

import random

from tinylm.dataset.tinyworld.drills import make_drill
from tinylm.dataset.tinyworld.plots import all_facts, ask, make_story
from tinylm.dataset.tinyworld.skills import CLOSED

STORY_SHARE, STORY_WITH_QUESTIONS_SHARE, DRILL_SHARE = 0.04, 0.33, 0.40  # the rest are pages of closed skills

# Skills whose answers state the complete fact: "7 plus 5 is 12."
_FACTS = ("addition", "subtraction", "spelling", "opposites", "categories", "comparing")
_PAGE_WEIGHTS = {
    "addition": 11, "subtraction": 12, "counting": 13, "comparing": 15, "sorting": 17, "spelling": 6,
    "reversing": 7, "opposites": 6, "categories": 6, "capitals": 7,
}  # fmt: skip


def _story_with_questions(rng: random.Random, split: str) -> str:
    story = make_story(rng, split)
    facts: list = all_facts(story)
    facts += [("not_in_story", None)] * rng.randint(1, 3)
    rng.shuffle(facts)
    questions = [ask(rng, story, skill, split, subject) for skill, subject in facts[: rng.randint(6, 9)]]
    form = "Question: {} Answer: {}" if rng.random() < 0.3 else "{} {}"
    return "\n".join([story.text, *(form.format(question.text, question.answers[0]) for question in questions)])


def _closed_page(rng: random.Random, split: str) -> str:
    skill = rng.choices(tuple(_PAGE_WEIGHTS), tuple(_PAGE_WEIGHTS.values()))[0]
    questions = [CLOSED[skill](rng, split) for _ in range(rng.randint(5, 10))]
    if skill in _FACTS and rng.random() < 0.5:
        return " ".join(question.answers[0] for question in questions)
    return "\n".join(f"{question.text} {question.answers[0]}" for question in questions)


def make_page(rng: random.Random, split: str) -> str:
    draw = rng.random()
    if draw < STORY_SHARE:
        return make_story(rng, split).text
    if draw < STORY_SHARE + STORY_WITH_QUESTIONS_SHARE:
        return _story_with_questions(rng, split)
    if draw < STORY_SHARE + STORY_WITH_QUESTIONS_SHARE + DRILL_SHARE:
        return make_drill(rng, split)
    return _closed_page(rng, split)
