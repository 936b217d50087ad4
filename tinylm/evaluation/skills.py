"""The TinyWorld scoreboard: what a model can do, skill by skill, on stories and questions it never saw.

TinyWorld knows the right answers, so each reply is checked by program. Replies are greedy, hence repeatable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rich.table import Table

from tinylm.dataset.sources.record_shapes import PreferencePair
from tinylm.evaluation.preferences import ReferenceModel, as_reference, preference_accuracy
from tinylm.evaluation.results import mean_and_error
from tinylm.system.cpu_parallel import map_on_cores
from tinylm.tokenizer.chat_template import Message, encode_chat

MEAN, STORY_MEAN, WARM, PERSONA, PERSONA_RIGHT, PREFERENCE = (
    "mean of skills",
    "mean of story questions",
    "warm replies",
    "in persona",
    "right, persona aside",
    "prefers the chosen answer",
)


MANNERS_TOKENS = 24
"""Room for words around an answer: the longest, "Ahoy! " and " Aye, matey!", have 18 characters together."""


class Replier(Protocol):
    """What the scoreboard needs of a generation engine."""

    @property
    def model(self) -> Any:
        """The model that answers."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        ...

    def reply_batch(self, conversations: list[list[Message]], settings: Any, /) -> list[str]:
        """One reply for each conversation."""
        ...


@dataclass(frozen=True)
class SkillReport:
    """One model's column. Shares are from 0 to 1."""

    accuracy: dict[str, float]
    """By skill, in TinyWorld's order."""
    summary: dict[str, float]
    """The footer rows."""
    num_items: int
    """Held-out items per skill."""
    examples: dict[str, dict[str, str]]
    """For each skill one question, the reference and the reply, to show what the numbers stand for."""


def score_skills(
    replier: Replier,
    world: Any,
    settings: Any,
    *,
    num_items: int = 100,
    split: str = "test",
    seed: int = 0,
    reference: ReferenceModel | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SkillReport:
    """Ask every skill's held-out questions and check the replies.

    Args:
        world: the `tinylm.dataset.tinyworld.world` module.
        settings: `SamplingSettings`; greedy (temperature 0) for repeatable numbers.
        num_items: questions per skill; 100 gives a standard error of at most 0.05.
        reference: the model that preference training started from; adds the preference row.
    """
    accuracy: dict[str, float] = {}
    examples: dict[str, dict[str, str]] = {}
    warm: list[float] = []
    persona: list[float] = []
    right_aside: list[float] = []
    skills = list(world.SKILLS)
    for done, skill in enumerate(skills):
        items = [world.test_item(skill, index, split=split, seed=seed) for index in range(num_items)]
        bounded = replace(settings, max_new_tokens=_longest_right(replier.tokenizer, items, settings.max_new_tokens))
        replies = replier.reply_batch([question_of(item.messages) for item in items], bounded)
        right = [float(world.check(item, reply)) for item, reply in zip(items, replies, strict=True)]
        accuracy[skill] = mean_and_error(right)[0]
        warm += [float(world.is_warm(reply)) for reply in replies]
        persona += [float(world.in_persona(item, reply)) for item, reply in zip(items, replies, strict=True)]
        right_aside += [
            float(world.check(item, world.strip_persona(reply))) for item, reply in zip(items, replies, strict=True)
        ]
        examples[skill] = {
            "question": items[0].messages[-2]["content"],
            "reference": items[0].messages[-1]["content"],
            "reply": replies[0],
        }
        if progress is not None:
            progress(done + 1, len(skills))
    summary = {
        MEAN: mean_and_error(list(accuracy.values()))[0],
        STORY_MEAN: mean_and_error([accuracy[skill] for skill in world.STORY_QUESTION_SKILLS])[0],
        WARM: mean_and_error(warm)[0],
        PERSONA: mean_and_error(persona)[0],
        PERSONA_RIGHT: mean_and_error(right_aside)[0],
    }
    if reference is not None:
        summary[PREFERENCE] = _preference_share(replier, world, num_items, split, reference)
    return SkillReport(accuracy, summary, num_items, examples)


def _longest_right(tokenizer: Any, items: list[Any], most: int) -> int:
    """Tokens that a right reply to one of `items` can have, with opener or persona; `most` if replies are free.

    A base model does not end its replies: it would otherwise write `most` tokens each time.
    """
    if any(item.words for item in items):  # a story is right at any length
        return most
    answers = [tokenizer.encode(answer) for item in items for answer in item.accepted]
    return min(most, max(map(len, answers)) + MANNERS_TOKENS)


def question_of(messages: list[Message]) -> list[Message]:
    """An item's messages without the final reference answer."""
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("a test item without a final assistant message; expected its reference answer there")
    return messages[:-1]


def _preference_share(replier: Replier, world: Any, num_items: int, split: str, reference: ReferenceModel) -> float:
    pairs = [preference_parts(world.preference_pair(index, split)) for index in range(num_items)]
    report = preference_accuracy(
        replier.model,
        lambda messages: encode_chat(replier.tokenizer, messages),
        pairs,
        reference=reference,
    )
    return mean_and_error(report.points)[0]


def preference_parts(pair: Any) -> PreferencePair:
    """A preference pair as (prompt, chosen, rejected) lists of messages, from a row of strings or
    messages."""
    data = pair if isinstance(pair, Mapping) else vars(pair)
    prompt = data["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    answers = []
    for name in ("chosen", "rejected"):
        answer = data[name]
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        same_start = answer[: len(prompt)] == prompt
        answers.append(list(answer[len(prompt) :] if same_start else answer))
    return list(prompt), answers[0], answers[1]


@dataclass(frozen=True)
class Scoreboard:
    """Columns (models) by rows (skills, then the summary)."""

    columns: dict[str, SkillReport]

    def rows(self) -> tuple[list[str], list[str]]:
        """Names of the skill rows and of the footer rows."""
        first = next(iter(self.columns.values()))
        footer: dict[str, None] = {}
        for report in self.columns.values():
            footer.update(dict.fromkeys(report.summary))
        return list(first.accuracy), list(footer)

    def value(self, column: str, row: str) -> float | None:
        """A share, or None where that column does not have the row."""
        report = self.columns[column]
        return report.accuracy.get(row, report.summary.get(row))

    def to_table(self, title: str | None = None) -> Table:
        """A rich table; shares as percentages."""
        num_items = next(iter(self.columns.values())).num_items
        table = Table(title=title or f"TinyWorld, {num_items} held-out items per skill, % right", title_justify="left")
        table.add_column("skill")
        for column in self.columns:
            table.add_column(column, justify="right")
        skills, footer = self.rows()
        for row in skills:
            table.add_row(row, *self._cells(row), end_section=row == skills[-1])
        for row in footer:
            table.add_row(row, *self._cells(row))
        return table

    def to_markdown(self) -> str:
        """The same table for a README."""
        skills, footer = self.rows()
        lines = ["| skill | " + " | ".join(self.columns) + " |", "|---|" + "---:|" * len(self.columns)]
        lines += [f"| {row} | " + " | ".join(self._cells(row)) + " |" for row in skills]
        lines += [f"| **{row}** | " + " | ".join(f"**{cell}**" for cell in self._cells(row)) + " |" for row in footer]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, by column."""
        return {
            name: {
                "num_items_per_skill": report.num_items,
                "skills": report.accuracy,
                "summary": report.summary,
                "examples": report.examples,
            }
            for name, report in self.columns.items()
        }

    def _cells(self, row: str) -> list[str]:
        values = [self.value(column, row) for column in self.columns]
        return ["–" if value is None else f"{100 * value:.0f}" for value in values]


def scoreboard(
    models: Mapping[str, Replier],
    world: Any,
    settings: Any,
    *,
    reference: str | None = None,
    num_items: int = 100,
    split: str = "test",
    seed: int = 0,
    at_once: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Scoreboard:
    """Score several models, a column each (such as base, SFT, LoRA, DPO).

    Args:
        models: column name -> engine, in the order of the columns.
        reference: the column that preference training started from (such as `SFT`); every other column then
            gets the row on preferences, relative to it.
        at_once: columns in work at a time, each on CPU cores of its own; more than 1 asks for greedy replies.
        progress: called with (column name, skills done, skills).
    """
    if reference is not None and reference not in models:
        raise ValueError(f"reference {reference!r}; expected one of the columns: {', '.join(models)}")

    def column(name: str) -> SkillReport:
        base = as_reference(models[reference].model) if reference is not None and name != reference else None
        return score_skills(
            models[name],
            world,
            settings,
            num_items=num_items,
            split=split,
            seed=seed,
            reference=base,
            progress=None if progress is None else _for_column(progress, name),
        )

    return Scoreboard(dict(zip(models, map_on_cores(column, models, at_once), strict=True)))


def _for_column(progress: Callable[[str, int, int], None], name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)
