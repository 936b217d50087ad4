"""The stories of TinyWorld: a small world, the events that change it, and the sentences that tell them.

A `Teller` tells a story. Beside the sentences it keeps the state of the world (who has what, who is where, who feels
how), so the answer to a question is read from the state and never from the text. The latest state counts: a gift
changes who has a thing, a walk changes where somebody is.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tinylm.dataset.tinyworld.words import (
    COLOURS,
    FEELINGS,
    PLACES,
    a_or_an,
    capitalise,
    is_girl,
    join_and,
    reserved,
)

# In the templates: {a}, {b} people; {place} "Rome"; {new} "a red ball"; {it} "the red
# ball"; {thing} "ball"; {colour}; {feeling}; {she} pronoun; {tail} what people do when they feel like this.
_TOGETHER = (
    "One sunny morning, {who} were in {place}.",
    "One day, {who} met in {place}.",
    "It was a quiet day, and {who} were in {place}.",
    "{who} spent the afternoon in {place}.",
    "Once upon a time, {who} were in {place}.",
)
_ALONE = (
    "{a} was in {place}.",
    "{a} was waiting in {place}.",
    "That day, {a} was in {place}.",
    "{a} was at home in {place}.",
)
_HAS = (
    "{a} had {new}.",
    "{a} was holding {new}.",
    "{a} was carrying {new}.",
    "{a} had found {new}.",
    "{a} had got {new} as a present.",
)
_HAS_PLAIN = (  # the colour has its own sentence
    "{a} had {new_plain}. The {thing} was {colour}.",
    "{a} had found {new_plain}, and the {thing} was {colour}.",
    "{a} had {new_plain}. Everyone could see that the {thing} was {colour}.",
)
_HAS_BOTH = (
    "{a} had {new}, and {b} had {new2}.",
    "{a} was holding {new}, and {b} was holding {new2}.",
    "{a} was carrying {new}, and {b} was carrying {new2}.",
)
_HAS_TWO = (
    "{a} had {new} and {new2}.",
    "{a} was holding {new} and {new2}.",
    "{a} was carrying {new} and also {new2}.",
    "{a} had found {new} and {new2}.",
)
_GIVE = (
    "{a} gave {it} to {b}.",
    "{a} gave {b} {it}.",
    "{a} handed {it} to {b}.",
    "Then {b} took {it} from {a} with a smile.",
    '{a} said, "Here you are, {b}," and gave {b} {it}.',
)
_GIVEN = (
    "Now {b} had {it}.",
    "{b} said thank you and kept {it}.",
    "From then on, {b} had {it}.",
    "{b} looked at {it} again and again.",
)
_SWAP = (
    "Then they traded: {a} took {it2}, and {b} took {it}.",
    "{a} gave {it} to {b}, and {b} gave {it2} to {a}.",
    '"Let us trade!" said {a}, so {b} took {it} and {a} took {it2}.',
)
_MOVE = (
    "Then {a} went to {place}.",
    "Later, {a} flew to {place}.",
    "{a} said goodbye and went to {place}.",
    "Soon {a} was in {place}.",
    "It was getting late, so {a} went to {place}.",
)
_PUT = (
    "{a} put {it} down in {place}.",
    "{a} hid {it} in {place}.",
    "{a} left {it} in {place}.",
    "{a} dropped {it} in {place} and forgot about it.",
)
_FEEL = (
    "{a} felt {feeling}.",
    "{a} was {feeling}.",
    "{a} felt very {feeling}.",
    "{a} felt {feeling} and {tail}.",
    "{a} was so {feeling} that {she} {tail}.",
    '{a} said, "I feel {feeling}."',
)
_FEEL_PRONOUN = (
    "{She} felt {feeling}.",
    "{She} was {feeling}.",
    "{She} felt very {feeling}.",
    "{She} felt {feeling} and {tail}.",
    "{She} was so {feeling} that {she} {tail}.",
    '{She} said, "I feel {feeling}."',
)
_FEEL_CHANGE = (
    "Then something changed, and {a} felt {feeling}.",
    "In the end, {a} was {feeling}.",
    "After a while, {a} felt {feeling} and {tail}.",
    "But now {a} was {feeling}.",
)
_TAILS = {
    "happy": ("began to sing", "smiled at everyone"),
    "sad": ("began to cry", "looked at the floor"),
    "proud": ("stood up very tall", "told everyone about it"),
    "tired": ("sat down to rest", "wanted to sleep"),
    "angry": ("began to shout", "would not talk"),
    "hungry": ("wanted some soup", "asked for bread"),
    "scared": ("began to shake", "wanted to hide"),
    "excited": ("jumped up and down", "could not sit still"),
}
_ASIDES = (
    "The sun was warm.",
    "The wind was soft.",
    "A little bird sang a song.",
    "It was a lovely day.",
    "Nobody was in a hurry.",
    "There was a rainbow in the sky.",
    "A fat cat was sleeping near by.",
    "Somewhere a dog barked.",
    "The air smelled of rain.",
    "Clouds moved slowly over the sky.",
    "It had rained in the night.",
    "What a good day it was!",
    "Far away, a train went by.",
    "Bees were busy in the tall grass.",
    "A farmer waved from his tractor.",
    "The church clock struck three.",
    "Two old men walked by and said hello.",
    "Someone was baking bread, and it smelled good.",
    "A spider was making its web.",
    "The snow had melted at last.",
    "A fox ran past, quick and quiet.",
    "Nothing much had happened all week.",
    "Music came from an open window.",
    'From the water a sailor called, "Ahoy!"',
    'A sailor answered, "Aye, matey!"',
    'Somebody cried, "Aye, aye, Captain!"',
    'Captain Pip sailed by and called, "Ahoy!"',
    'An old sailor sang, "Ahoy, matey, ahoy!"',
)
ENDINGS = (
    "It was the end of a long day.",
    "Then it was time for dinner.",
    "Soon the moon came up.",
    "And that was that.",
    "It was a day to remember.",
    "At night, the stars came out.",
    "After that, they all slept well.",
    "Mother would hear all about it in the evening.",
    "Nobody ever forgot it.",
)
_ADJECTIVES = ("little", "small", "nice", "shiny", "old", "pretty", "lovely")


@dataclass
class Story:
    """A story and the state of its world at the end.

    `holder` maps a thing to the person who has it, `lies` to the place where it was put down. Every thing of the story
    is in exactly one of the two. `where` and `feels` contain only what the story tells.
    """

    people: tuple[str, ...]
    colour: dict[str, str]
    holder: dict[str, str] = field(default_factory=dict)
    lies: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    feels: dict[str, str] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)

    @property
    def things(self) -> tuple[str, ...]:
        return tuple(self.colour)

    @property
    def text(self) -> str:
        return " ".join(self.sentences)

    def reserved_things(self) -> list[str]:
        """The things whose holder makes a reserved (name, thing) pair."""
        return [thing for thing, name in self.holder.items() if reserved("has", name, thing)]


class Teller:
    """Tells one story: each method changes the world and adds a sentence about it."""

    def __init__(self, rng: random.Random, people: list[str], things: list[str]):
        self.rng = rng
        self.people = people
        colours = rng.sample(COLOURS, len(things))
        self.story = Story(tuple(people), dict(zip(things, colours, strict=True)))
        self.places = rng.sample(PLACES, 4)
        self.feelings = rng.sample(FEELINGS, 4)
        self.used: set[str] = set()
        self.subject: str | None = None  # the person whom a pronoun would mean now

    def say(self, templates: tuple[str, ...], subject: str | None = None, **words: str) -> None:
        """Add one sentence; `subject` is its person, if there is exactly one."""
        template = self.rng.choice(templates)
        while template in self.used:  # a story does not repeat itself
            template = self.rng.choice(templates)
        self.used.add(template)
        sentence = template.format(**words)
        self.story.sentences.append(capitalise(sentence))
        self.subject = subject

    def new(self, thing: str) -> str:
        """The first mention: "a red ball", "a little red ball"."""
        adjective = self.rng.choice(_ADJECTIVES) + " " if self.rng.random() < 0.2 else ""
        return a_or_an(f"{adjective}{self.story.colour[thing]} {thing}")

    def it(self, thing: str) -> str:
        """A later mention: "the red ball" or "the ball"."""
        return f"the {self.story.colour[thing]} {thing}" if self.rng.random() < 0.65 else f"the {thing}"

    def together(self, people: list[str], place: str) -> None:
        self.say(_TOGETHER, who=join_and(people), place=place)
        self.story.where.update(dict.fromkeys(people, place))

    def alone(self, a: str, place: str) -> None:
        self.say(_ALONE, a, a=a, place=place)
        self.story.where[a] = place

    def has(self, a: str, thing: str) -> None:
        self.story.holder[thing] = a
        if self.rng.random() < 0.2:
            self.say(_HAS_PLAIN, a=a, thing=thing, new_plain=a_or_an(thing), colour=self.story.colour[thing])
        else:
            self.say(_HAS, a, a=a, new=self.new(thing))

    def have(self, a: str, thing: str, b: str, thing2: str) -> None:
        """Two things in one sentence, which belong to two people or to one."""
        self.story.holder.update({thing: a, thing2: b})
        if a == b:
            self.say(_HAS_TWO, a, a=a, new=self.new(thing), new2=self.new(thing2))
        else:
            self.say(_HAS_BOTH, a=a, b=b, new=self.new(thing), new2=self.new(thing2))

    def give(self, thing: str, b: str) -> None:
        a = self.story.holder[thing]
        self.story.holder[thing] = b
        self.say(_GIVE, a=a, b=b, it=self.it(thing))
        if self.rng.random() < 0.5:
            self.say(_GIVEN, a=a, b=b, it=self.it(thing))

    def swap(self, thing: str, thing2: str) -> None:
        holder = self.story.holder
        a, b = holder[thing], holder[thing2]
        self.say(_SWAP, a=a, b=b, it=self.it(thing), it2=self.it(thing2))
        holder[thing], holder[thing2] = b, a

    def move(self, a: str) -> None:
        place = self.places.pop()
        self.story.where[a] = place
        self.say(_MOVE, a, a=a, place=place)

    def put(self, thing: str) -> None:
        a = self.story.holder.pop(thing)
        place = self.story.where[a]
        self.story.lies[thing] = place
        self.say(_PUT, a=a, it=self.it(thing), place=place)

    def feel(self, a: str) -> None:
        changed = a in self.story.feels
        feeling = self.story.feels[a] = self.feelings.pop()
        she = "she" if is_girl(a) else "he"
        words = {
            "feeling": feeling,
            "she": she,
            "She": capitalise(she),
            "tail": self.rng.choice(_TAILS[feeling]),
        }
        if changed:
            self.say(_FEEL_CHANGE, a, a=a, **words)
        elif self.subject == a and self.rng.random() < 0.5:
            self.say(_FEEL_PRONOUN, a, **words)
        else:
            self.say(_FEEL, a, a=a, **words)

    def aside(self, sentences: tuple[str, ...] = _ASIDES) -> None:
        self.story.sentences.append(self.rng.choice(sentences))
        self.subject = None
