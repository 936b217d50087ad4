"""The plots of TinyWorld's stories, and questions whose answers are in the state of the story's world.

Training stories contain no reserved (name, thing) pair. At the end of every test story, somebody has a thing that makes
a reserved pair with their name.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tinylm.dataset.tinyworld.stories import ENDINGS, Story, Teller
from tinylm.dataset.tinyworld.words import (
    COLOURS,
    FEELINGS,
    NAMES,
    PLACES,
    THINGS,
    capitalise,
    num_sentences,
    reserved,
)

STORY_QUESTION_SKILLS = ("who_has", "where_is", "what_colour", "how_feels", "not_in_story")
NOT_IN_STORY = "The story does not say."

MIN_SENTENCES, MAX_SENTENCES = 4, 7


@dataclass(frozen=True)
class Question:
    """A question, its right answers (the first is the reference), and plausible wrong answers.

    `words` is used only for `write_story`: the words that the story must contain.
    """

    skill: str
    text: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    words: tuple[str, ...] = ()


def _cast(rng: random.Random, split: str) -> tuple[list[str], list[str]]:
    """Two or three people and one to three things; the module's docstring explains the reserved pairs."""
    num_people = 2 if rng.random() < 0.6 else 3
    num_things = rng.choices((1, 2, 3), (0.3, 0.5, 0.2))[0]
    while True:
        people, things = rng.sample(NAMES, num_people), rng.sample(THINGS, num_things)
        if any(reserved("has", name, thing) for name in people for thing in things) == (split != "train"):
            return people, things


def _possessions(rng: random.Random, teller: Teller, people: list[str], things: list[str]) -> None:
    """Tell who has what at the beginning. The first person always has the first thing."""
    if len(things) == 1:
        teller.has(people[0], things[0])
    elif rng.random() < 0.25:
        teller.have(people[0], things[0], people[0], things[1])
    elif rng.random() < 0.5:
        teller.have(people[0], things[0], people[1], things[1])
    else:
        teller.has(people[0], things[0])
        teller.has(people[1], things[1])
    if len(things) == 3:
        teller.has(people[-1], things[2])


def _event(rng: random.Random, teller: Teller) -> None:
    """One change of state: a gift, a trade, a walk, a thing put down. Gifts need two people in one place."""
    story = teller.story
    held = list(story.holder)
    kind = rng.choices(("give", "swap", "move", "put"), (0.42, 0.08, 0.36, 0.14))[0]
    if kind == "give" and held:
        thing = rng.choice(held)
        giver = story.holder[thing]
        near = [name for name in story.people if name != giver and story.where[name] == story.where[giver]]
        if near:
            return teller.give(thing, rng.choice(near))
    if kind == "swap" and len(held) >= 2:
        one, other = rng.sample(held, 2)
        a, b = story.holder[one], story.holder[other]
        if a != b and story.where[a] == story.where[b]:
            return teller.swap(one, other)
    if kind == "put" and len(held) >= 2:  # somebody still has something at the end
        return teller.put(rng.choice(held))
    return teller.move(rng.choice(story.people))


def _tell(rng: random.Random, people: list[str], things: list[str]) -> Story:
    teller = Teller(rng, people, things)
    here = teller.places.pop()
    if len(people) == 3 and rng.random() < 0.6:
        teller.together(people[:2], here)
        order = people[:2] if rng.random() < 0.5 else people[1::-1]
        if len(things) == 1 or rng.random() < 0.5:
            order = [*order, people[2]]
        teller.alone(people[2], teller.places.pop())
    else:
        teller.together(people, here)
        order = rng.sample(people, len(people))
    if rng.random() < 0.25:
        teller.aside()
    felt = rng.sample(people, 1 if rng.random() < 0.65 else 2)
    early = rng.random() < 0.25
    _possessions(rng, teller, order, things)
    if early:
        teller.feel(felt[0])
    for _ in range(rng.choices((0, 1, 2), (0.15, 0.6, 0.25))[0]):
        _event(rng, teller)
    if not early or rng.random() < 0.25:  # an early feeling may change
        teller.feel(felt[0])
    for name in felt[1:]:
        teller.feel(name)
    if rng.random() < 0.2:
        teller.aside(ENDINGS)
    return teller.story


def make_story(rng: random.Random, split: str) -> Story:
    """A story of four to seven sentences, some 35 to 75 words."""
    while True:
        people, things = _cast(rng, split)
        story = _tell(rng, people, things)
        if MIN_SENTENCES <= num_sentences(story.text) <= MAX_SENTENCES and (
            split == "train" or story.reserved_things()
        ):
            return story


_WHO_HAS = (
    "Who has {it}?",
    "Who has {it} now?",
    "Tell me who has {it}.",
    "At the end, who has {it}?",
)
_WHERE_IS = (
    "Where is {who}?",
    "Where is {who} now?",
    "Tell me where {who} is.",
    "At the end, where is {who}?",
)
_WHAT_COLOUR = (
    "What colour is the {thing}?",
    "What is the colour of the {thing}?",
    "Tell me the colour of the {thing}.",
    "Which colour is the {thing}?",
)
_HOW_FEELS = (
    "How does {who} feel?",
    "How does {who} feel now?",
    "Tell me how {who} feels.",
    "At the end, how does {who} feel?",
)


def _others(rng: random.Random, all_values: tuple[str, ...], value: str, n: int = 2) -> list[str]:
    return rng.sample([other for other in all_values if other != value], n)


def _who_has(rng: random.Random, story: Story, thing: str) -> Question:
    holder, named = story.holder[thing], f"the {story.colour[thing]} {thing}"
    both = [named, f"the {thing}"]
    if rng.random() < 0.4:
        both.reverse()  # the answer names the thing as the question did
    wrong = tuple(f"{name} has {both[0]}." for name in story.people if name != holder)
    answers = tuple(f"{holder} has {it}." for it in both)
    return Question("who_has", rng.choice(_WHO_HAS).format(it=both[0]), answers, wrong)


def _where_is(rng: random.Random, story: Story, who: str) -> Question:
    if who in story.where:
        place, names = story.where[who], [who]
    else:
        place, names = story.lies[who], [f"the {story.colour[who]} {who}", f"the {who}"]
    elsewhere = {*story.where.values(), *story.lies.values()} - {place}
    wrong = sorted(elsewhere) or _others(rng, PLACES, place)
    answers = tuple(f"{capitalise(name)} is in {place}." for name in names)
    return Question(
        "where_is",
        rng.choice(_WHERE_IS).format(who=names[0]),
        answers,
        tuple(f"{capitalise(names[0])} is in {other}." for other in wrong),
    )


def _what_colour(rng: random.Random, story: Story, thing: str) -> Question:
    colour = story.colour[thing]
    wrong = [story.colour[other] for other in story.things if other != thing] or _others(rng, COLOURS, colour)
    return Question(
        "what_colour",
        rng.choice(_WHAT_COLOUR).format(thing=thing),
        (f"The {thing} is {colour}.",),
        tuple(f"The {thing} is {other}." for other in wrong),
    )


def _how_feels(rng: random.Random, story: Story, who: str) -> Question:
    feeling = story.feels[who]
    wrong = [other for other in story.feels.values() if other != feeling] or _others(rng, FEELINGS, feeling)
    return Question(
        "how_feels",
        rng.choice(_HOW_FEELS).format(who=who),
        (f"{who} feels {feeling}.",),
        tuple(f"{who} feels {other}." for other in wrong),
    )


def _not_in_story(rng: random.Random, story: Story) -> Question:
    """A question in one of the other four forms, about a person or thing that is not in the story."""
    name = rng.choice([name for name in NAMES if name not in story.people])
    thing = rng.choice([thing for thing in THINGS if thing not in story.colour])
    form = rng.randrange(4)
    if form == 0:
        colour = rng.choice(COLOURS)
        it = f"the {colour} {thing}" if rng.random() < 0.6 else f"the {thing}"
        text = rng.choice(_WHO_HAS).format(it=it)
        wrong = [f"{somebody} has {it}." for somebody in story.people]
    elif form == 1:
        text = rng.choice(_WHERE_IS).format(who=name)
        wrong = [f"{name} is in {place}." for place in story.where.values()]
    elif form == 2:
        text = rng.choice(_WHAT_COLOUR).format(thing=thing)
        wrong = [f"The {thing} is {colour}." for colour in story.colour.values()]
    else:
        text = rng.choice(_HOW_FEELS).format(who=name)
        wrong = [f"{name} feels {feeling}." for feeling in story.feels.values()]
    return Question("not_in_story", text, (NOT_IN_STORY,), tuple(dict.fromkeys(wrong)))


def ask(rng: random.Random, story: Story, skill: str, split: str, subject: str | None = None) -> Question:
    """A question of `skill` about `story`; in the test split, who_has asks for a reserved pair.

    `subject` fixes the person or thing that the question is about.
    """
    if skill == "not_in_story":
        return _not_in_story(rng, story)
    if skill == "who_has":
        return _who_has(
            rng,
            story,
            subject or rng.choice(list(story.holder) if split == "train" else story.reserved_things()),
        )
    if skill == "where_is":
        return _where_is(rng, story, subject or rng.choice([*story.where, *story.lies]))
    if skill == "what_colour":
        return _what_colour(rng, story, subject or rng.choice(story.things))
    return _how_feels(rng, story, subject or rng.choice(list(story.feels)))


def all_facts(story: Story) -> list[tuple[str, str]]:
    """Every (skill, subject) that `ask` accepts for `story`, except not_in_story."""
    facts = [("who_has", thing) for thing in story.holder]
    facts += [("where_is", who) for who in (*story.where, *story.lies)]
    facts += [("what_colour", thing) for thing in story.things]
    return facts + [("how_feels", name) for name in story.feels]
