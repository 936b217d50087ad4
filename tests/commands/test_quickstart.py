"""The whole quickstart in miniature: every stage runs, learns something, and a second call skips what is done."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinylm import cli
from tinylm.checkpoint.model_folder import load_model
from tinylm.commandline.exit_status import Stopped
from tinylm.commandline.terminal import make_console
from tinylm.commands import quickstart, quickstart_scores
from tinylm.commands.quickstart import Plan, QuickstartSettings, claim_folder, main, make_plan
from tinylm.commands.quickstart_scores import COLUMNS, activation, kept_scores, score_key, working_prompts
from tinylm.dataset import tinyworld
from tinylm.generation.sampling import SamplingSettings
from tinylm.system.runtime import setup_runtime
from tinylm.trainer import train_full_sft
from tinylm.trainer.core import loop

WIDTH, SCALE = 128, "0.1"
INTERRUPTED_AT = 12


@dataclass
class Miniature:
    """A quickstart of which somebody has thought better in fine-tuning, and which was then called again."""

    folder: Path
    said: list[str] = field(default_factory=list)
    """What each call printed."""
    statuses: list[int] = field(default_factory=list)

    def call(self, *words: str) -> None:
        heard = io.StringIO()
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            self.statuses.append(cli.main(["quickstart", "--output_dir", str(self.folder), "--chat", "false", *words]))
        self.said.append(heard.getvalue())

    def weights(self) -> dict[Path, int]:
        """When each file of weights was written."""
        return {path: path.stat().st_mtime_ns for path in self.folder.rglob("*.safetensors")}

    def last_value(self, stage: str, name: str) -> float:
        lines = (self.folder / stage / f"{stage}_{WIDTH}_metrics.jsonl").read_text().splitlines()
        return [json.loads(line)[name] for line in lines if name in json.loads(line)][-1]


def narrow_plan(settings: QuickstartSettings) -> Plan:
    """The quickstart's plan for a model of a quarter of the size."""
    plan = make_plan(settings)
    return replace(plan, pretrain=replace(plan.pretrain, hidden_size=WIDTH, num_hidden_layers=3))


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Iterator[Miniature]:
    """All that the tests below look at comes from one run, with one interruption."""
    miniature, accumulate = Miniature(tmp_path_factory.mktemp("quickstart")), loop.accumulate_gradients
    fine_tune, steps = train_full_sft.train, itertools.count(1)

    def accumulate_and_interrupt(*arguments, **options):
        if next(steps) == INTERRUPTED_AT:
            os.kill(os.getpid(), signal.SIGINT)
        return accumulate(*arguments, **options)

    def fine_tune_and_interrupt(settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "accumulate_gradients", accumulate_and_interrupt)
            return fine_tune(settings)

    with pytest.MonkeyPatch.context() as always:
        always.setattr(quickstart, "make_plan", narrow_plan)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_full_sft, "train", fine_tune_and_interrupt)
            miniature.call("--scale", SCALE, "--num_items", "8")
        miniature.call("--scale", SCALE, "--num_items", "8")
        yield miniature


def test_an_interrupted_stage_continues_and_what_is_done_stays(miniature):
    first, second = miniature.said
    assert miniature.statuses == [130, 0]
    assert "nothing to resume" not in first + second
    assert f"stopped after step {INTERRUPTED_AT}, which is saved; run the same command again" in first
    assert first.count("already done") == 0 and second.count("already done") == 2, "tokenizer and pretraining"
    assert second.count(f"from step {INTERRUPTED_AT}") == 1


def test_losses_fall_to_what_a_miniature_reaches(miniature):
    # untrained, the loss is ln 1024 = 6.9; measured here: 1.44, 1.41, from 5.6 to 0.88 with the adapter, and 0.88
    assert miniature.last_value("pretrain", "validation_loss") < 1.65
    assert miniature.last_value("full_sft", "validation_loss") < 1.65
    assert miniature.last_value("lora", "validation_loss") < 1.1
    assert miniature.last_value("dpo", "validation_preference_accuracy") > 0.75


def test_skills_and_style_move_as_they_should(miniature):
    report = json.loads((miniature.folder / "scoreboard.json").read_text())
    columns = report["scoreboard"]
    assert list(columns) == ["base", "SFT", "LoRA", "DPO"]
    assert columns["base"]["summary"]["mean of skills"] == 0.0, "a base model continues text, it does not answer"
    assert columns["SFT"]["summary"]["mean of skills"] >= 0.05, "0.06, and one stock reply gives 1/19"
    assert columns["LoRA"]["summary"]["in persona"] >= 0.6, "0.87 here"
    assert columns["DPO"]["summary"]["warm replies"] >= columns["SFT"]["summary"]["warm replies"] + 0.2, "0.75, 0.13"
    goals = {goal["what"]: goal for goal in report["goals"]}
    assert goals["LoRA: base weights bit-identical without it"]["met"]


def test_the_picture_shows_the_last_losses_of_a_resumed_run(miniature):
    picture = (miniature.folder / "report.svg").read_text(encoding="utf-8")
    for stage in COLUMNS.values():
        assert f">training {miniature.last_value(stage, 'loss'):.3f}<" in picture
        assert f">held out {miniature.last_value(stage, 'validation_loss'):.3f}<" in picture
    assert " in all" not in picture, "two calls made it, of which the second does not know the first's time"
    assert (
        f">cpu, {json.loads((miniature.folder / 'scoreboard.json').read_text())['key']['dtype']} · seed 42 · 10% of"
        in picture
    )


def test_every_folder_loads_and_names_its_parent(miniature):
    parents = {"pretrain": None, "full_sft": "pretrain", "lora": "full_sft", "dpo": "full_sft"}
    for stage, parent in parents.items():
        _, tokenizer, lineage = load_model(miniature.folder / stage)
        assert lineage["stage"] == stage and lineage["finished"] and tokenizer.vocab_size == 1024
        assert (lineage["parent"] or {}).get("stage") == parent
        for role in ("user", "assistant"):  # they stand in every turn
            assert len(tokenizer.encode(role)) == 1


def test_it_says_how_far_the_whole_is_and_what_to_type_next(miniature):
    first, second = miniature.said[:2]
    lines = first.splitlines()
    assert re.fullmatch(r"tokenizer, pretrain, full_sft, lora, dpo, scoreboard in .*: about \S+ \(cpu, \w+\)", lines[0])
    assert "the same command continues" in lines[1] and "asks 8 held-out items per skill, not 100" in first
    assert "2/6 pretrain · 1% of the whole is done, about" in first
    assert "6/6 scoreboard · 93% of the whole is done, about" in second
    assert f"all of it as a picture: {miniature.folder}/report.svg" in second
    assert "goals of this run" in second and "of the 8 questions of this skill are right" in second
    items = [tinyworld.test_item("addition", index).messages for index in range(8)]
    question = next(messages[0]["content"] for messages in items if len(messages) == 2)
    assert f"  you: {question}\n  model: " in second, "the closing chats are held-out questions"
    commands = [line.strip() for line in second[second.index("to type next:") :].splitlines()[1:]]
    if activate := activation():
        assert commands.pop(0) == f"{activate}    # so that the shell knows tinylm"
    report = json.loads((miniature.folder / "scoreboard.json").read_text())
    expected = [f"tinylm chat --model_path {miniature.folder}/dpo --prompt {shlex.quote(p)}" for p in report["prompts"]]
    expected.append(f"tinylm chat --model_path {miniature.folder}/dpo")
    expected.append(f"tinylm chat --model_path {miniature.folder}/lora    # Captain Pip")
    expected.append(f"tinylm serve {miniature.folder}    # all of them on a page in your browser")
    expected.append(f"tinylm export {miniature.folder} --format html    # the same page as one file, for a friend")
    assert commands == expected


def test_the_way_into_the_environment(monkeypatch, tmp_path):
    """`make quickstart` runs in an environment that the user's shell does not know yet."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "größe x"))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.chdir(tmp_path)
    assert activation() == "source 'größe x'/bin/activate"
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "größe x"))
    assert activation() == ""
    monkeypatch.delenv("VIRTUAL_ENV")
    monkeypatch.setattr(sys, "prefix", "/usr")
    assert activation() == ""


def test_another_call_neither_trains_nor_scores(miniature, monkeypatch):
    """The scoreboard took a minute each time. This test comes last: it writes a scoreboard of one item a skill."""
    before = miniature.weights()
    assert len(before) >= 8  # a model and a training state for each stage
    written = (miniature.folder / "scoreboard.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "measure", lambda *arguments: pytest.fail("scored again"))
        miniature.call("--scale", SCALE, "--num_items", "8")
    assert miniature.statuses[-1] == 0 and miniature.weights() == before
    assert miniature.said[-1].count("already done") == 6 and ": nothing is left to do (" in miniature.said[-1]
    assert (miniature.folder / "scoreboard.json").read_bytes() == written
    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "measure", lambda *arguments: pytest.fail("scored again"))
        patch.setattr(quickstart, "expected_seconds", lambda *arguments: pytest.fail("nothing is left to estimate"))
        (miniature.folder / "report.svg").unlink()
        miniature.call("--scale", SCALE, "--num_items", "8")
    assert (miniature.folder / "report.svg").exists(), "a folder of an earlier version gets its picture"
    ending = miniature.said[1][miniature.said[1].index("the first held-out question") :]
    assert miniature.said[-1].endswith(ending)
    miniature.call("--scale", SCALE, "--num_items", "1")
    assert miniature.statuses[-1] == 0 and miniature.weights() == before
    assert miniature.said[-1].count("already done") == 5


@pytest.mark.long
def test_a_miniature_of_the_whole_width_learns_skills(tmp_path):
    """Which skill is learnt first is luck, the mean is not: 0.14 to 0.17 in three runs; one stock reply gives 1/19."""
    assert main(["--scale", "0.12", "--num_items", "12", "--output_dir", str(tmp_path), "--chat", "false"]) == 0
    columns = json.loads((tmp_path / "scoreboard.json").read_text())["scoreboard"]
    assert columns["SFT"]["summary"]["mean of skills"] >= 0.10
    assert columns["LoRA"]["summary"]["in persona"] >= 0.6, "0.89 here"
    assert columns["DPO"]["summary"]["warm replies"] >= columns["SFT"]["summary"]["warm replies"] + 0.2, "0.68, 0.11"


def test_a_folder_of_another_quickstart_is_refused_in_its_own_words(tmp_path):
    """A rehearsal, then the whole: the refusal came from pretraining and spoke of a data fingerprint."""
    folder = str(tmp_path / "out")
    claim_folder(QuickstartSettings(output_dir=folder, scale=0.1))
    claim_folder(QuickstartSettings(output_dir=folder, scale=0.1, num_items=3))
    with pytest.raises(ValueError, match=r"holds a quickstart made with --scale 0.1 --seed 42; pass these"):
        main(["--output_dir", folder])


@pytest.mark.parametrize(
    ("words", "complaint"), [(["--scale", "0"], "scale is 0"), (["--num_items", "0"], "num_items is 0")]
)
def test_bad_settings_are_told(words, complaint):
    with pytest.raises(ValueError, match=complaint):
        main(words)


def test_the_scoreboard_shrinks_with_the_scale():
    sizes = {scale: QuickstartSettings(scale=scale).items_per_skill for scale in (4, 1, 0.5, 0.1, 0.01)}
    assert sizes == {4: 100, 1: 100, 0.5: 50, 0.1: 10, 0.01: 10}
    assert QuickstartSettings(scale=0.5, num_items=100).items_per_skill == 100


def test_ctrl_c_on_the_scoreboard_is_acknowledged_and_ends_it(monkeypatch, capsys):
    def interrupted(engines, world, settings, progress, **options):
        os.kill(os.getpid(), signal.SIGINT)
        heard, deadline = "", time.monotonic() + 10
        while "stopping after the questions in work" not in heard:
            assert time.monotonic() < deadline, heard
            heard += capsys.readouterr().out
        progress("SFT, who_has", 3, 79)

    monkeypatch.setattr(
        quickstart_scores, "load_for_use", lambda *words, **options: SimpleNamespace(model=0, tokenizer=0)
    )
    monkeypatch.setattr(quickstart_scores, "Engine", lambda *words: None)
    monkeypatch.setattr(quickstart_scores, "scoreboard", interrupted)
    folders = dict.fromkeys(COLUMNS.values(), Path("none"))
    with pytest.raises(Stopped, match="at 3 of 79 of the scoreboard"):
        quickstart_scores.measure(folders, 1, setup_runtime("cpu"), make_console())


def test_scores_are_kept_for_the_same_models_and_settings_only(tmp_path):
    folders = {stage: tmp_path / stage for stage in COLUMNS.values()}
    for folder in folders.values():
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
    runtime, report = setup_runtime("cpu"), tmp_path / "scoreboard.json"
    key = score_key(folders, 8, runtime)
    assert kept_scores(report, key) is None
    scores = {"scoreboard": {}, "untouched": True, "prompts": ["Tell me a story."]}
    report.write_text(json.dumps({"key": key, **scores}))
    assert kept_scores(report, key).prompts == ("Tell me a story.",)
    (folders["lora"] / "adapter.safetensors").write_bytes(b"more")
    assert kept_scores(report, score_key(folders, 8, runtime)) is None
    assert score_key(folders, 8, runtime) != score_key(folders, 9, runtime)
    for broken in ("", "[]", "{}", json.dumps({"key": key}), json.dumps({"key": key, **scores, "scoreboard": []})):
        report.write_text(broken)
        assert kept_scores(report, key) is None, broken


class Answering:
    """An engine that answers held-out questions of some skills rightly: always, the first time, or unless greedy."""

    def __init__(self, skills, when="always", story="Anna and Ben were in Rome. Anna had a kite. Ben felt sad."):
        items = [tinyworld.test_item(skill, index) for skill in skills for index in range(20)]
        self.answers = {item.messages[0]["content"]: item.accepted[0] for item in items if len(item.messages) == 2}
        self.answers["Tell me a story."] = story
        self.when = when

    def reply_batch(self, conversations, settings):
        assert settings.temperature in (0.0, SamplingSettings().temperature)
        is_greedy = settings.temperature == 0.0
        is_right = {"always": True, "first": is_greedy or settings.seed == 0, "drawn": not is_greedy}[self.when]
        return [self.answers.get(messages[-1]["content"], "") if is_right else "" for messages in conversations]


def test_prompts_to_type_are_answered_rightly_in_each_try():
    prompts = working_prompts(Answering(("sorting", "spelling", "opposites")))
    assert prompts[0] == "Tell me a story." and len(prompts) == 3
    sorting = [tinyworld.test_item("sorting", index).messages[-2]["content"] for index in range(20)]
    assert prompts[1] in sorting and all("\n" not in prompt for prompt in prompts)
    assert len(working_prompts(Answering(("spelling",), story="Anna and Anna were in Rome. It was red. It was."))) == 1
    for when in ("first", "drawn"):
        assert working_prompts(Answering(("sorting", "spelling"), when)) == ()
