"""The harness through the server equals the harness through our adapter. It needs lm-eval, with 450 MB of packages:

pip install "lm-eval[api]" && python -m pytest -m long tests/server/test_lm_eval.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import make_model
from tests.server.serving import running, settings_for
from tinylm.evaluation.lm_eval_adapter import make_lm_eval_model

QUESTIONS = [
    ("Die Katze", [" schläft", " läuft weg", " 三"]), ("The dog ran", [" home", " über Stock und Stein", "!"]),
    ("Größe: 三 Äpfel", [" und", " 🐉", " oder nicht"]), ("Once upon a time", [" there was", ", long ago,", " nie"]),
    ("a", [" b", "-b", "\n"]), ("Ende.", [" Schluss.", " Anfang", " Mitte des Ganzen"]),
]  # fmt: skip
CHOICE = {
    "task": "choice", "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip
CONTINUE = {
    "task": "continue", "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "x",
    "generation_kwargs": {"until": ["zzz"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_local_completions_equals_the_adapter(tmp_path, tokenizer, monkeypatch):
    """On a model whose documents begin with nothing: the harness sends ids, and puts nothing before them."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval")
    folder = make_model(tmp_path / "m", tokenizer, lineage={"stage": "pretrain"})
    ours = evaluate(lm_eval, tmp_path, make_lm_eval_model(str(folder), device="cpu", dtype="float32"))
    with running(settings_for(folder)) as server:
        arguments = {
            "model": "m", "base_url": f"{server.url}/v1/completions", "tokenizer": str(folder),
            "num_concurrent": 4, "max_length": 255,
        }  # fmt: skip
        theirs = evaluate(lm_eval, tmp_path, "local-completions", arguments)
    for task in ("choice", "continue"):
        assert len(ours[task]) == len(theirs[task]) == len(QUESTIONS)
    for one, other in zip(ours["choice"], theirs["choice"], strict=True):
        for (value, greedy), (served, served_greedy) in zip(
            one["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert float(served) == pytest.approx(float(value), abs=1e-4)
            assert str(greedy) == str(served_greedy)
        assert one["acc"] == other["acc"]
    texts = [each["filtered_resps"] for each in ours["continue"]]
    assert texts == [each["filtered_resps"] for each in theirs["continue"]] and all(texts)


def evaluate(lm_eval: Any, folder: Path, model: Any, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the harness recorded for each question of both tasks."""
    from lm_eval.tasks import TaskManager

    data = folder / "questions.jsonl"
    rows = [{"text": text, "choices": choices, "label": n % 3} for n, (text, choices) in enumerate(QUESTIONS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    tasks = [{**task, **source} for task in (CHOICE, CONTINUE)]
    found = lm_eval.simple_evaluate(
        model, model_args=arguments, tasks=tasks, task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    return {name: sorted(samples, key=lambda each: each["doc_id"]) for name, samples in found["samples"].items()}
