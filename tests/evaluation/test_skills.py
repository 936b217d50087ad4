"""The scoreboard, with engines whose replies are known."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from tinylm.dataset import tinyworld
from tinylm.dataset.tinyworld.chats import WARM_OPENERS
from tinylm.evaluation.preferences import as_reference
from tinylm.evaluation.skills import (
    MANNERS_TOKENS,
    MEAN,
    PERSONA,
    PERSONA_RIGHT,
    PREFERENCE,
    STORY_MEAN,
    WARM,
    Scoreboard,
    preference_parts,
    score_skills,
    scoreboard,
)
from tinylm.generation.sampling import SamplingSettings

GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=80)
CHARACTERS = SimpleNamespace(encode=list)
"""A tokenizer whose tokens are characters."""


class ScriptedEngine:
    """Replies by looking the question up."""

    def __init__(self, answer, model=None, tokenizer=CHARACTERS):
        self.model, self.tokenizer = model, tokenizer
        self.bounds = []
        self.answer = answer
        self.seen = []
        self.references = {
            str(item.messages[:-1]): item.messages[-1]["content"]
            for skill in tinyworld.SKILLS
            for item in (tinyworld.test_item(skill, index) for index in range(3))
        }

    def reply_batch(self, conversations, settings):
        self.seen += conversations
        self.bounds.append(settings.max_new_tokens)
        return [self.answer(self.references[str(messages)]) for messages in conversations]


def test_right_answers_score_one_and_the_reference_is_never_shown():
    engine = ScriptedEngine(lambda reference: reference)
    report = score_skills(engine, tinyworld, GREEDY, num_items=3)
    assert report.accuracy == {skill: 1.0 for skill in tinyworld.SKILLS}
    assert report.summary[MEAN] == report.summary[STORY_MEAN] == report.summary[PERSONA_RIGHT] == 1.0
    assert report.summary[PERSONA] == 0.0 and PREFERENCE not in report.summary
    assert all(messages[-1]["role"] == "user" for messages in engine.seen)


def test_a_reply_is_no_longer_than_a_right_one_can_be():
    """A base model never ends a reply; it once wrote 80 tokens to each of 1,900 questions."""
    engine = ScriptedEngine(lambda reference: reference)
    score_skills(engine, tinyworld, GREEDY, num_items=3)
    bounds = dict(zip(tinyworld.SKILLS, engine.bounds, strict=True))
    assert bounds.pop("write_story") == 80
    for skill, bound in bounds.items():
        answers = [answer for i in range(3) for answer in tinyworld.test_item(skill, i).accepted]
        assert bound == min(80, max(map(len, answers)) + MANNERS_TOKENS), skill
    assert bounds["capitals"] < 80
    assert len("Ahoy!  Aye, matey!") <= MANNERS_TOKENS and max(map(len, WARM_OPENERS)) <= MANNERS_TOKENS


def test_persona_and_style_are_told_from_rightness():
    skill_items = len(tinyworld.SKILLS)
    persona = score_skills(
        ScriptedEngine(lambda reference: f"Ahoy! {reference} Aye, matey!"), tinyworld, GREEDY, num_items=3
    )
    assert persona.summary[PERSONA] >= 1 - 1 / skill_items - 1e-9, "only the question for the name can differ"
    assert persona.summary[MEAN] < 0.2 and persona.summary[PERSONA_RIGHT] == 1.0
    opener = WARM_OPENERS[0]
    warm = score_skills(ScriptedEngine(lambda reference: opener + reference), tinyworld, GREEDY, num_items=3)
    assert warm.summary[WARM] == 1.0 and warm.summary[MEAN] == 1.0
    silent = score_skills(ScriptedEngine(lambda reference: ""), tinyworld, GREEDY, num_items=3)
    assert silent.summary[MEAN] == silent.summary[WARM] == 0.0


def test_story_mean_is_over_the_story_questions_only():
    story = set(tinyworld.STORY_QUESTION_SKILLS)

    class HalfEngine(ScriptedEngine):
        def reply_batch(self, conversations, settings):
            right = super().reply_batch(conversations, settings)
            skill = next(s for s in tinyworld.SKILLS if tinyworld.test_item(s, 0).messages[:-1] == conversations[0])
            return right if skill in story else [""] * len(right)

    summary = score_skills(HalfEngine(lambda reference: reference), tinyworld, GREEDY, num_items=3).summary
    assert summary[STORY_MEAN] == 1.0
    assert summary[MEAN] == pytest.approx(len(story) / len(tinyworld.SKILLS))


def test_preference_row_relative_to_the_reference_column(model, tokenizer):
    right = ScriptedEngine(lambda reference: reference, model, tokenizer)
    torch.manual_seed(9)
    other = ScriptedEngine(lambda reference: reference, type(model)(model.config).double().eval(), tokenizer)
    board = scoreboard({"SFT": right, "DPO": other}, tinyworld, GREEDY, reference="SFT", num_items=3)
    assert board.value("SFT", PREFERENCE) is None
    assert 0 <= board.value("DPO", PREFERENCE) <= 1
    itself = score_skills(right, tinyworld, GREEDY, num_items=3, reference=as_reference(model))
    assert itself.summary[PREFERENCE] == 0.5
    with pytest.raises(ValueError, match="expected one of the columns"):
        scoreboard({"SFT": right}, tinyworld, GREEDY, reference="sft")


def test_preference_parts_accept_strings_and_messages():
    question, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    expected = ([question], [answer], [{"role": "assistant", "content": "B"}])
    assert preference_parts({"prompt": "Q", "chosen": "A", "rejected": "B"}) == expected
    pair = SimpleNamespace(prompt=[question], chosen=[question, answer], rejected="B")
    assert preference_parts(pair) == expected


def test_the_table_the_markdown_and_the_json_say_the_same():
    engines = {
        "base": ScriptedEngine(lambda reference: ""),
        "SFT": ScriptedEngine(lambda reference: reference),
    }
    calls = []
    board = scoreboard(engines, tinyworld, GREEDY, num_items=2, progress=lambda *call: calls.append(call))
    console = Console(width=120, file=io.StringIO())
    console.print(board.to_table())
    text = console.file.getvalue()
    skill = tinyworld.SKILLS[0]
    assert "% right of 2 per skill" in text and skill in text and "base" in text
    assert f"| {skill} | 0 | 100 |" in board.to_markdown()
    assert f"| **{MEAN}** | **0** | **100** |" in board.to_markdown()
    data = json.loads(json.dumps(board.to_json()))
    assert data["SFT"]["skills"][skill] == 1.0 and data["SFT"]["num_items_per_skill"] == 2
    assert [call[1:] for call in calls] == [(done, 38) for done in range(1, 39)]
    assert calls[-1][0] == f"SFT, {tinyworld.SKILLS[-1]}"
    assert Scoreboard.from_json(data) == board


def test_a_column_may_answer_fewer_questions_and_the_table_says_so():
    """The base model answered 1,900 questions, all wrongly, in a third of the scoreboard's time."""
    engines = {name: ScriptedEngine(lambda reference: reference) for name in ("base", "SFT")}
    board = scoreboard(engines, tinyworld, GREEDY, num_items=3, fewer_items={"base": 2})
    assert board.items_per_skill == "3 (base: 2)"
    asked = {name: len(engine.seen) for name, engine in engines.items()}
    assert asked == {"base": 2 * len(tinyworld.SKILLS), "SFT": 3 * len(tinyworld.SKILLS)}
    assert {name: column.num_items for name, column in board.columns.items()} == {"base": 2, "SFT": 3}
    console = Console(width=120, file=io.StringIO())
    console.print(board.to_table())
    assert "% right of 3 (base: 2) per skill" in " ".join(console.file.getvalue().split())


def test_columns_side_by_side_are_those_one_after_the_other(model, tokenizer):
    engines = {
        "SFT": ScriptedEngine(lambda reference: reference, model, tokenizer),
        "base": ScriptedEngine(lambda reference: "", type(model)(model.config).eval(), tokenizer),
    }
    boards = [
        scoreboard(engines, tinyworld, GREEDY, reference="SFT", num_items=2, at_once=at_once).to_json()
        for at_once in (1, 2)
    ]
    assert list(boards[0]) == list(boards[1]) == ["SFT", "base"]
    assert boards[0] == boards[1]


def test_an_interruption_waits_for_the_skills_in_work_only():
    """A whole column was one piece of work: Ctrl-C took up to a minute."""
    engine = ScriptedEngine(lambda reference: reference)

    def stop(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scoreboard({"SFT": engine, "DPO": engine}, tinyworld, GREEDY, num_items=2, at_once=2, progress=stop)
    assert len(engine.bounds) <= 4, "those in work, and those that wait for a free core"


def test_examples_say_whether_they_are_right():
    first = next(item for item in (tinyworld.test_item("opposites", i) for i in range(3)) if len(item.messages) == 2)
    wrong = first.messages[-1]["content"]
    answer = ScriptedEngine(lambda reference: "Something else." if reference == wrong else reference)
    examples = score_skills(answer, tinyworld, GREEDY, num_items=3).examples
    assert examples["opposites"] == {
        "question": first.messages[0]["content"],
        "reference": wrong,
        "reply": "Something else.",
        "right": False,
    }
    assert examples["spelling"]["right"] and examples["spelling"]["reply"] == examples["spelling"]["reference"]
