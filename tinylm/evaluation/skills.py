"""The TinyWorld scoreboard: what a model can do, skill by skill, on stories and questions it never saw.

TinyWorld knows the right answers, so each reply is checked by program. Replies are greedy, hence repeatable.
"""

from __future__ import annotations

import contextlib
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
    examples: dict[str, dict[str, Any]]
    """For each skill one question, the reference, the reply, and whether it is right, to show what the numbers stand
    for."""


@dataclass(frozen=True)
class _SkillScores:
    """What one model's replies to one skill's questions are, item by item: 1 or 0."""

    right: list[float]
    warm: list[float]
    persona: list[float]
    right_aside: list[float]
    example: dict[str, Any]


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
    scores: dict[str, _SkillScores] = {}
    for skill in world.SKILLS:
        scores[skill] = _score_skill(replier, world, settings, skill, num_items, split, seed)
        if progress is not None:
            progress(len(scores), len(world.SKILLS))
    preferred = None if reference is None else _preference_share(replier, world, num_items, split, reference)
    return _report(scores, preferred, world)


def _score_skill(
    replier: Replier, world: Any, settings: Any, skill: str, num_items: int, split: str, seed: int
) -> _SkillScores:
    items = [world.test_item(skill, index, split=split, seed=seed) for index in range(num_items)]
    bounded = replace(settings, max_new_tokens=_longest_right(replier.tokenizer, items, settings.max_new_tokens))
    replies = replier.reply_batch([question_of(item.messages) for item in items], bounded)
    pairs = list(zip(items, replies, strict=True))
    right = [float(world.check(item, reply)) for item, reply in pairs]
    shown = next((index for index, item in enumerate(items) if len(item.messages) == 2), 0)  # it needs no earlier turn
    return _SkillScores(
        right,
        [float(world.is_warm(reply)) for reply in replies],
        [float(world.in_persona(item, reply)) for item, reply in pairs],
        [float(world.check(item, world.strip_persona(reply))) for item, reply in pairs],
        {
            "question": items[shown].messages[-2]["content"],
            "reference": items[shown].messages[-1]["content"],
            "reply": replies[shown],
            "right": bool(right[shown]),
        },
    )


def _report(scores: Mapping[str, _SkillScores], preferred: float | None, world: Any) -> SkillReport:
    accuracy = {skill: mean_and_error(score.right)[0] for skill, score in scores.items()}
    parts = list(scores.values())
    summary = {
        MEAN: mean_and_error(list(accuracy.values()))[0],
        STORY_MEAN: mean_and_error([accuracy[skill] for skill in world.STORY_QUESTION_SKILLS])[0],
        WARM: mean_and_error([value for part in parts for value in part.warm])[0],
        PERSONA: mean_and_error([value for part in parts for value in part.persona])[0],
        PERSONA_RIGHT: mean_and_error([value for part in parts for value in part.right_aside])[0],
    }
    if preferred is not None:
        summary[PREFERENCE] = preferred
    examples = {skill: score.example for skill, score in scores.items()}
    return SkillReport(accuracy, summary, len(parts[0].right), examples)


def _longest_right(tokenizer: Any, items: list[Any], most: int) -> int:
    """Tokens that a right reply to one of `items` can have, with opener or persona; `most` if replies are free.

    A base model does not end its replies: it would otherwise write `most` tokens each time.
    """
    if any(item.skill == "write_story" for item in items):  # a story is right at any length
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

    @property
    def items_per_skill(self) -> str:
        """How many questions of a skill the models answered: "100", or "100 (base: 20)" where one answered fewer."""
        counts = {name: report.num_items for name, report in self.columns.items()}
        most = max(counts.values())
        fewer = ", ".join(f"{name}: {count}" for name, count in counts.items() if count != most)
        return f"{most} ({fewer})" if fewer else str(most)

    def to_table(self, title: str | None = None) -> Table:
        """A rich table; shares as percentages."""
        title = title or f"TinyWorld, % right of {self.items_per_skill} per skill"
        table = Table(title=title, title_justify="left")
        table.add_column("skill")
        for column in self.columns:
            table.add_column(column, justify="right")
        skills, footer = self.rows()
        for row in skills:
            table.add_row(row, *self.cells(row), end_section=row == skills[-1])
        for row in footer:
            table.add_row(row, *self.cells(row))
        return table

    def to_markdown(self) -> str:
        """The same table for a README."""
        skills, footer = self.rows()
        lines = ["| skill | " + " | ".join(self.columns) + " |", "|---|" + "---:|" * len(self.columns)]
        lines += [f"| {row} | " + " | ".join(self.cells(row)) + " |" for row in skills]
        lines += [f"| **{row}** | " + " | ".join(f"**{cell}**" for cell in self.cells(row)) + " |" for row in footer]
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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scoreboard:
        """The scoreboard that `to_json` wrote."""
        return cls(
            {
                name: SkillReport(
                    column["skills"], column["summary"], column["num_items_per_skill"], column["examples"]
                )
                for name, column in data.items()
            }
        )

    def cells(self, row: str) -> list[str]:
        """A row's shares as whole percentages, one for each column; a dash where a column does not have the row."""
        values = [self.value(column, row) for column in self.columns]
        return ["–" if value is None else f"{100 * value:.0f}" for value in values]


def scoreboard(
    models: Mapping[str, Replier],
    world: Any,
    settings: Any,
    *,
    reference: str | None = None,
    num_items: int = 100,
    fewer_items: Mapping[str, int] | None = None,
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
        num_items: questions per skill, and preference pairs.
        fewer_items: column name -> questions per skill, where a model need not answer all to show what it can do.
        at_once: skills in work at a time, each on CPU cores of its own; more than 1 asks for greedy replies. An
            interruption waits for these only.
        progress: called with (what was scored, pieces of work done, all of them). An exception that it raises ends the
            scoring.
    """
    if reference is not None and reference not in models:
        raise ValueError(f"reference {reference!r}; expected one of the columns: {', '.join(models)}")
    base = None if reference is None else as_reference(models[reference].model)
    asked = fewer_items or {}

    def score(piece: tuple[str, str]) -> Any:
        name, row = piece
        if row == PREFERENCE and base is not None:
            return _preference_share(models[name], world, num_items, split, base)
        return _score_skill(models[name], world, settings, row, asked.get(name, num_items), split, seed)

    rows = {
        name: (*world.SKILLS, *((PREFERENCE,) if base is not None and name != reference else ())) for name in models
    }
    pieces = [(name, row) for name in models for row in rows[name]]
    results: dict[tuple[str, str], Any] = {}
    with contextlib.closing(map_on_cores(score, pieces, at_once)) as scored:
        for piece, result in zip(pieces, scored, strict=True):
            results[piece] = result
            if progress is not None:
                progress(", ".join(piece), len(results), len(pieces))
    columns = {}
    for name in models:
        scores = {skill: results[name, skill] for skill in world.SKILLS}
        columns[name] = _report(scores, results.get((name, PREFERENCE)), world)
    return Scoreboard(columns)
