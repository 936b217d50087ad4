"""Drill pages of TinyWorld's reading book: repeated lists, spelled words, short facts to remember.

Most words of a story are new and hard to predict. In a drill, nearly every word of the second half follows from the
first half. On such pages attention learns within a few hundred steps to look things up (the induction heads of Olsson
et al. 2022, arXiv:2209.11895), and this then helps with stories.
"""

from __future__ import annotations

import random

from tinylm.dataset.tinyworld.plots import all_facts, ask
from tinylm.dataset.tinyworld.skills import CAPITAL_WORDS, LIST_WORDS, SPELLING_WORDS, number_pair, spelled, word_list
from tinylm.dataset.tinyworld.stories import Story
from tinylm.dataset.tinyworld.words import COLOURS, FEELINGS, NAMES, PLACES, THINGS, a_or_an, join_and, reserved

_HAS = ("{who} has {a_thing}.", "{who} had {a_thing}.", "{who} found {a_thing}.", "{who} got {a_thing}.")
_IS = ("{who} is in {place}.", "{who} was in {place}.", "{who} went to {place}.")
_FEELS = ("{who} feels {feeling}.", "{who} is {feeling}.", "{who} felt {feeling}.")
_HAD = ("had", "had found", "was carrying", "was holding")

# All the words that an answer may have to copy, because copying is learnt separately for each word. Towns are listed
# twice, because nothing but these lists repeats a town before a question asks for it.
_ALL_WORDS = (*LIST_WORDS, *NAMES, *PLACES, *PLACES, *COLOURS, *FEELINGS)


def _say_again(rng: random.Random, split: str) -> str:
    """Lists, each written twice."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        words = ", ".join(rng.sample(_ALL_WORDS, rng.randint(4, 9)))
        lines.append(f"Say after me: {words}. {words}.")
    return "\n".join(lines)


def _backwards(rng: random.Random, split: str) -> str:
    """Lists and their reversals."""
    lists = [word_list(rng, split, "reverse", rng.randint(3, 5)) for _ in range(rng.randint(4, 6))]
    return "\n".join(f"{', '.join(words)}. Backwards: {', '.join(words[::-1])}." for words in lists)


def _letters(rng: random.Random, split: str) -> str:
    """Words spelled, counted and in capitals."""
    lines = []
    for word in rng.sample(SPELLING_WORDS, rng.randint(5, 8)):
        lines.append(f"{spelled(word)} The word {word} has {len(word)} letters.")
    lines += [f"{word} in capital letters is {word.upper()}." for word in rng.sample(CAPITAL_WORDS, rng.randint(3, 6))]
    return "\n".join(lines)


def _remember(rng: random.Random, split: str) -> str:
    """Short facts about a few people, then a question about each."""
    while True:
        people, things = rng.sample(NAMES, rng.randint(2, 4)), rng.sample(THINGS, 4)
        if not any(reserved("has", name, thing) for name in people for thing in things) or split != "train":
            break
    colours = rng.sample(COLOURS, 4)
    story = Story(tuple(people), dict(zip(things[: len(people)], colours, strict=False)))
    facts: list[str] = []
    for who, thing in zip(people, things, strict=False):
        if not facts or rng.random() < 0.8:
            story.holder[thing] = who
            a_thing = a_or_an(f"{story.colour[thing]} {thing}")
            facts.append(rng.choice(_HAS).format(who=who, a_thing=a_thing))
        else:
            del story.colour[thing]
        if rng.random() < 0.65:
            story.where[who] = rng.choice(PLACES)
            facts.append(rng.choice(_IS).format(who=who, place=story.where[who]))
        if rng.random() < 0.5:
            story.feels[who] = rng.choice(FEELINGS)
            facts.append(rng.choice(_FEELS).format(who=who, feeling=story.feels[who]))
    rng.shuffle(facts)
    questions = all_facts(story)
    questions += [("not_in_story", None)] * rng.randint(0, 2)  # type: ignore[list-item]
    rng.shuffle(questions)
    asked = [ask(rng, story, skill, split, subject) for skill, subject in questions[:8]]
    return "\n".join([" ".join(facts), *(f"{question.text} {question.answers[0]}" for question in asked)])


def _look_up(rng: random.Random, split: str) -> str:
    """Three or four tables."""
    return "\n".join(_table(rng, split) for _ in range(rng.randint(3, 4)))


def _table(rng: random.Random, split: str) -> str:
    """One to four facts, then each of them again in another order, as notes ("ball red") or as sentences.

    The only thing to learn here is what belongs to what. A single fact teaches how to copy; several teach which one to
    copy. Facts in the past tense are repeated in the present tense, so the words around a fact do not help.
    """
    n = rng.randint(1, 4)
    while True:
        people, things = rng.sample(NAMES, n), rng.sample(THINGS, n)
        if not any(reserved("has", name, thing) for name in people for thing in things) or split != "train":
            break
    kind = rng.choices(("things", "places", "feelings"), (0.6, 0.2, 0.2))[0]
    told, notes, sentences = [], [], []
    if kind == "things":
        for who, thing, colour in zip(people, things, rng.sample(COLOURS, n), strict=True):
            told.append(f"{who} {rng.choice(_HAD)} {a_or_an(f'{colour} {thing}')}")
            notes += [f"{thing} {colour}", f"{thing} {who}"]
            sentences += [f"The {thing} is {colour}.", f"Who has the {thing}? {who} has the {thing}."]
    elif kind == "places":
        for who, place in zip(people, rng.sample(PLACES, n), strict=True):
            told.append(f"{who} {rng.choice(('was in', 'went to'))} {place}")
            notes.append(f"{who} {place}")
            sentences.append(f"{who} is in {place}.")
    else:
        for who, feeling in zip(people, rng.sample(FEELINGS, n), strict=True):
            told.append(f"{who} {rng.choice(('was', 'felt'))} {feeling}")
            notes.append(f"{who} {feeling}")
            sentences.append(f"{who} feels {feeling}.")
    rng.shuffle(notes)
    rng.shuffle(sentences)
    asked = ", ".join(notes) + "." if rng.random() < 0.5 else " ".join(sentences)
    return f"{join_and(told)}. {asked}"


def _sums(rng: random.Random, split: str) -> str:
    """Sums and differences in random order: the shortest way to show many."""
    facts: list[str] = []
    for _ in range(rng.randint(12, 20)):
        kind = rng.choice(("plus", "minus"))
        a, b = number_pair(rng, kind)
        facts.append(f"{a} {kind} {b} is {a + b if kind == 'plus' else a - b}.")
    return " ".join(facts)


_DRILLS = (
    (_remember, _look_up, _sums, _say_again, _backwards, _letters),
    (0.32, 0.26, 0.24, 0.06, 0.06, 0.06),
)


def make_drill(rng: random.Random, split: str) -> str:
    """One page of drills."""
    return rng.choices(*_DRILLS)[0](rng, split)
