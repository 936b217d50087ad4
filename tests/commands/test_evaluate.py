"""`tinylm eval` from a model folder and files to the table and the JSON report."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.commands.evaluate import EvalSettings, main, plan_tasks
from tinylm.evaluation.tasks import recognise_task
from tinylm.generation.engine import Engine
from tinylm.model.lora import LoRAConfig, apply_lora, lora_parameters

ROWS = {
    "bits_per_byte": [{"text": "The cat sat."}, {"text": "A dog ran away."}],
    "blimp": [{"set": "s", "good": "The cat sits.", "bad": "The cat sit."}] * 3,
    "multiple_choice": [{"query": "Question: 1+1?", "choices": ["2", "3"], "gold": 0}],
    "lambada": [
        {"context": "He saw his", "continuation": "dog"},
        {"context": "I like", "continuation": "it"},
    ],
    "chat": [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}],
    "preferences": [{"prompt": "Hi", "chosen": "Hello!", "rejected": "Go!"}],
    "generate": [{"question": "2 and 2?", "answer": "4"}],
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder, type(model)(model.config).eval(), tokenizer, {"stage": "pretrain"})
    return str(folder)


def run(*arguments):
    return main([*arguments, "--device", "cpu", "--dtype", "float32", "--max_new_tokens", "4"])


@pytest.mark.parametrize("task", ROWS)
def test_a_task_is_recognised_by_its_fields_and_measured(task, model_folder, tmp_path, capsys):
    data = write_rows(tmp_path / "things.jsonl", ROWS[task])
    output = tmp_path / "report.json"
    assert recognise_task(ROWS[task][0], "here") == task
    assert run("--model_path", model_folder, "--data_path", data, "--output", str(output)) == 0
    report = json.loads(output.read_text())
    assert report["measures"] and report["dtype"] == "float32"
    assert all(measure["task"].startswith("things") for measure in report["measures"])
    assert "things" in capsys.readouterr().out


def test_int8_weights_are_measured_themselves(model_folder, tmp_path):
    data, output = write_rows(tmp_path / "things.jsonl", ROWS["bits_per_byte"]), tmp_path / "report.json"
    found = {}
    for dtype in ("float32", "int8"):
        flags = ("--data_path", data, "--output", str(output), "--device", "cpu", "--dtype", dtype)
        assert main(["--model_path", model_folder, *flags]) == 0
        report = json.loads(output.read_text())
        assert report["dtype"] == dtype
        found[dtype] = report["measures"][0]["value"]
        output.unlink()
    assert 0 < abs(found["int8"] - found["float32"]) < 0.01 * found["float32"]


def test_a_folder_is_a_task_per_file(model_folder, tmp_path, capsys):
    for task in ("blimp", "lambada"):
        write_rows(tmp_path / f"{task}.jsonl", ROWS[task])
    zipped = tmp_path / "more.jsonl.gz"
    zipped.write_bytes(gzip.compress(json.dumps(ROWS["bits_per_byte"][0]).encode()))
    settings = EvalSettings(model_path=model_folder, data_path=str(tmp_path))
    assert [task for task, _ in plan_tasks(settings)] == ["blimp", "lambada", "bits_per_byte"]
    only = EvalSettings(model_path=model_folder, data_path=str(tmp_path), tasks="lambada")
    assert [task for task, _ in plan_tasks(only)] == ["lambada"]
    with pytest.raises(ValueError, match="no data for preferences"):
        plan_tasks(EvalSettings(model_path=model_folder, data_path=str(tmp_path), tasks="preferences"))


def test_limit_takes_the_first_records(model_folder, tmp_path):
    data, output = write_rows(tmp_path / "t.jsonl", ROWS["bits_per_byte"]), tmp_path / "r.json"
    run("--model_path", model_folder, "--data_path", data, "--limit", "1", "--output", str(output))
    assert {measure["count"] for measure in json.loads(output.read_text())["measures"]} == {1}


def test_chat_loss_counts_assistant_tokens_only(model_folder, model, tokenizer, tmp_path, reference_logprobs):
    from tinylm.tokenizer.chat_template import encode_chat

    chats = ROWS["chat"] + [
        {"messages": [{"role": "user", "content": "日本"}, {"role": "assistant", "content": "Zürich"}]}
    ]
    data, output = write_rows(tmp_path / "c.jsonl", chats), tmp_path / "r.json"
    run("--model_path", model_folder, "--data_path", data, "--output", str(output))
    loaded = load_model(model_folder)[0].double()
    nats, counts = [], []
    for chat in chats:
        ids, mask = encode_chat(tokenizer, chat["messages"])
        plain = reference_logprobs(loaded, ids)
        scored = [-value for value, marked in zip(plain, mask[1:], strict=True) if marked]
        nats.append(sum(scored))
        counts.append(len(scored))
    [loss, _] = json.loads(output.read_text())["measures"]
    mean = sum(nats) / sum(counts)
    assert loss["value"] == pytest.approx(mean, rel=1e-4)
    # Of two conversations the residuals are equal and opposite: their sample deviation is sqrt(2) times one of them.
    assert loss["standard_error"] == pytest.approx(2 * abs(nats[0] - mean * counts[0]) / sum(counts), rel=1e-3)


def test_generated_answers_have_errors_of_their_own(model_folder, tmp_path, monkeypatch):
    """One right, one half right, one wrong."""
    replies = iter(["Zürich", "Ja Zürich", "nein"])
    monkeypatch.setattr(Engine, "reply_batch", lambda self, chats, settings: [next(replies) for _ in chats])
    rows = [{"question": "Wo?", "answer": "Zürich"}] * 3
    data, output = write_rows(tmp_path / "g.jsonl", rows), tmp_path / "r.json"
    run("--model_path", model_folder, "--data_path", data, "--output", str(output))
    exact, overlap = json.loads(output.read_text())["measures"]
    for measure, values in ((exact, [1, 0, 0]), (overlap, [1, 2 / 3, 0])):
        assert measure["value"] == pytest.approx(np.mean(values))
        assert measure["standard_error"] == pytest.approx(np.std(values, ddof=1) / 3**0.5)


def test_wrong_answers_score_nothing_and_a_number_needs_no_quotes(model_folder, tmp_path, monkeypatch):
    """The wrong answers differ from the right ones in a sign, a point and an article; they scored 1.0."""
    rows = [
        {"question": "7 / 2?", "answer": 3.5},
        {"question": "3 - 8?", "answer": -5},
        {"question": "?", "answer": "A"},
    ]
    rows.append({"question": "Plan?", "answer": "#### Plan\nSchlaf gut."})
    data, output = write_rows(tmp_path / "g.jsonl", rows), tmp_path / "r.json"
    for replies, share in (["35", "5", "The", "Nein."], 0.0), (["3.5", "-5.0", "A.", "#### plan\nschlaf gut"], 1.0):
        monkeypatch.setattr(Engine, "reply_batch", lambda self, chats, settings, said=replies: said)
        run("--model_path", model_folder, "--data_path", data, "--output", str(output))
        assert json.loads(output.read_text())["measures"][0]["value"] == share
    write_rows(tmp_path / "g.jsonl", [{"question": "Was?", "answer": True}])
    with pytest.raises(ValueError, match="line 1: answer is True; expected text or a whole number or a number"):
        run("--model_path", model_folder, "--data_path", data)


def test_conversations_can_be_generated(model_folder, tmp_path):
    data, output = write_rows(tmp_path / "c.jsonl", ROWS["chat"]), tmp_path / "r.json"
    arguments = ["--model_path", model_folder, "--data_path", data, "--output", str(output)]
    run(*arguments, "--tasks", "generate")
    metrics = [measure["metric"] for measure in json.loads(output.read_text())["measures"]]
    assert metrics == ["exact match", "token F1"]


def test_without_data_the_skills_are_measured_and_it_says_so(model_folder, tmp_path, capsys):
    output = tmp_path / "r.json"
    run("--model_path", model_folder, "--limit", "1", "--output", str(output))
    assert "TinyWorld" in capsys.readouterr().out
    [column] = json.loads(output.read_text())["skills"].values()
    assert column["num_items_per_skill"] == 1


@pytest.fixture(scope="module")
def adapter_folder(model_folder, tmp_path_factory):
    adapted = apply_lora(load_model(model_folder)[0], LoRAConfig(rank=2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in lora_parameters(adapted):
            parameter.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    save_adapter(adapted, folder, model_folder)
    return str(folder)


def margin_of(tmp_path, *arguments):
    """(name of the metric, margin) of the preference pair."""
    data, output = write_rows(tmp_path / "p.jsonl", ROWS["preferences"]), tmp_path / "r.json"
    run(*arguments, "--data_path", data, "--output", str(output))
    accuracy, margin = json.loads(output.read_text())["measures"]
    return accuracy["metric"], margin["value"]


def test_an_adapter_is_measured_against_the_model_without_it(model_folder, adapter_folder, tmp_path):
    for arguments in (["--model_path", model_folder, "--adapter", adapter_folder], ["--model_path", adapter_folder]):
        metric, margin = margin_of(tmp_path, *arguments)
        assert "relative to the reference" in metric
        assert margin != 0


def test_a_reference_that_is_given_goes_before_the_model_without_the_adapter(model_folder, adapter_folder, tmp_path):
    """Against itself, adapter and all, a model leans nowhere."""
    metric, margin = margin_of(
        tmp_path, "--model_path", model_folder, "--adapter", adapter_folder, "--reference_path", adapter_folder
    )
    assert "relative to the reference" in metric
    assert margin == pytest.approx(0, abs=1e-4)
    assert abs(margin_of(tmp_path, "--model_path", adapter_folder)[1]) > 0.1
    base = margin_of(tmp_path, "--model_path", adapter_folder, "--reference_path", model_folder)
    assert base == margin_of(tmp_path, "--model_path", adapter_folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": "blmp"}, "unknown task 'blmp'; expected skills"),
        ({"tasks": "blimp"}, "without data"),
        ({"limit": 0}, "at least 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        EvalSettings(model_path="m", **settings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": "x"}, "fields words; expected one of"),
        ({"query": "Q", "choices": ["a", "b"], "gold": 7}, "line 1: gold 7"),
        ({"good": "G", "bad": 3}, "line 1: bad is 3; expected text"),
    ],
)
def test_bad_data_names_file_and_line(row, message, model_folder, tmp_path):
    data = write_rows(tmp_path / "bad.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        run("--model_path", model_folder, "--data_path", data)


def test_a_report_is_written_before_it_is_shown(model_folder, tmp_path, monkeypatch):
    """Printing failed, on "[/b]" in a path or a closed pipe, and an hour of measuring was lost."""
    folder = tmp_path / "a[/b] [red]"
    folder.mkdir(parents=True)
    data = write_rows(folder / "x.jsonl", ROWS["bits_per_byte"])
    assert run("--model_path", model_folder, "--data_path", data, "--output", str(folder / "r.json")) == 0
    (folder / "r.json").unlink()

    def closed(console, *texts, **options):
        raise BrokenPipeError

    monkeypatch.setattr(Console, "print", closed)
    with pytest.raises(BrokenPipeError):
        run("--model_path", model_folder, "--data_path", data, "--output", str(folder / "r.json"))
    assert (folder / "r.json").is_file()


def test_an_output_that_cannot_be_written_is_told_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path, "", tmp_path / "file" / "r.json"):
        with pytest.raises(ValueError, match="^output is .*(a folder; expected a file name|cannot be written to)"):
            EvalSettings(model_path="m", output=str(output))
    for output in (tmp_path / "new" / "r.json", tmp_path / "file", "größe.json"):
        EvalSettings(model_path="m", output=str(output))


def test_a_missing_file_is_told_before_the_model_is_loaded(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        run("--model_path", str(tmp_path / "no-model"), "--data_path", str(tmp_path / "nowhere.jsonl"))
