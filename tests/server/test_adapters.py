"""Several models and adapters from one server: each answers as it does alone, and an adapter costs no second model."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.command_line import tinylm
from tests.server.conftest import make_adapter, make_model
from tests.server.serving import Server, running, settings_for

QUESTION = "Größe der 三 Äpfel?"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(root / name, model_folder, seed) for seed, name in enumerate(("eins", "zwei"), 1)}


@pytest.fixture(scope="module")
def adapted(model_folder: Path, adapters: dict[str, Path]) -> Iterator[Server]:
    listed = ",".join(f"{name}={path}" for name, path in adapters.items())
    with running(settings_for(model_folder, adapter=listed)) as found:
        yield found


def ask(server: Server, model: str | None) -> str:
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 20, "model": model}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == (model or "tiny")
    return answer.json()["choices"][0]["message"]["content"]


def chat(model: Path, *words: str | Path) -> str:
    flags = ["--dtype", "float32", "--device", "cpu", "--temperature", "0", "--max_new_tokens", "20"]
    status, said = tinylm("chat", "--model_path", model, "--prompt", QUESTION, *flags, *words)
    assert status == 0, said
    return " ".join(said.split())


def test_each_answers_as_the_terminal_chat_does(adapted, adapters, model_folder):
    alone = {"tiny": chat(model_folder), **{name: chat(model_folder, "--adapter", adapters[name]) for name in adapters}}
    assert len(set(alone.values())) == 3
    served = {name: " ".join(ask(adapted, name).split()) for name in alone}
    for name, text in served.items():
        assert text and text in alone[name], name
    with ThreadPoolExecutor(9) as pool:  # at the same time, which they are not in a terminal
        mixed = list(pool.map(lambda name: ask(adapted, name), [*alone] * 3))
    assert [" ".join(text.split()) for text in mixed] == [*served.values()] * 3
    assert ask(adapted, None) == ask(adapted, "tiny")


def test_they_are_listed_with_their_base(adapted):
    cards = {card["id"]: card for card in adapted.get("/v1/models").json()["data"]}
    assert list(cards) == ["tiny", "eins", "zwei"]
    assert [card["parent"] for card in cards.values()] == [None, "tiny", "tiny"]
    assert adapted.get("/v1/models/zwei").json()["root"] == "tiny"


def test_an_unknown_name_lists_the_known_ones(adapted):
    answer = adapted.post("/v1/completions", {"prompt": "x", "model": "drei🐉"})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "model_not_found" and error["param"] == "model"
    assert "tiny, eins, zwei" in error["message"] and "\n" not in error["message"]


def test_weights_exist_once(adapted):
    base, *others = (model.engine.compute_model for model in adapted.models)
    weights = {id(tensor): tensor.numel() for tensor in base.parameters()}
    assert weights
    for other in others:
        own = {id(tensor): tensor.numel() for tensor in other.parameters()}
        assert set(own) <= set(weights)
        assert other.model.embed_tokens.weight is base.model.embed_tokens.weight


def test_the_memory_for_keys_and_values_is_shared_out(adapted):
    sizes = [model.scheduler.settings.cache_bytes for model in adapted.models]
    assert sum(sizes) <= adapted.settings.cache_bytes and len(set(sizes)) == 1


def test_two_models_with_names(model_folder, reciter_folder):
    with running(settings_for(f"klein={model_folder},echo={reciter_folder}")) as server:
        assert [card["id"] for card in server.get("/v1/models").json()["data"]] == ["klein", "echo"]
        assert ask(server, "echo").startswith("Schön") and ask(server, "klein") != ask(server, "echo")
        assert server.figure('vllm:generation_tokens_total{model_name="echo"}') > 0


@pytest.mark.parametrize(
    ("model", "adapter", "words"),
    [
        ("{model}", "fremd={foreign}", "was trained on"),
        ("{model}", "weg={model}-nicht-da", "nicht-da"),
        ("{model}", "{one},{two}", "name"),
        ("{model}", "eins={one},eins={two}", "twice"),
        ("tiny={model}", "tiny={one}", "tiny"),
        ("a={model},a={model}", "", "twice"),
        ("{model}-nicht-da", "", "nicht-da"),
    ],
)
def test_what_cannot_be_served_is_one_line(model, adapter, words, model_folder, adapters, tmp_path, tokenizer):
    foreign = tmp_path / "foreign"
    if "{foreign}" in adapter:
        make_adapter(foreign, make_model(tmp_path / "other", tokenizer, seed=7), 3)
    names = {"model": model_folder, "one": adapters["eins"], "two": adapters["zwei"], "foreign": foreign}
    flags = ["--adapter", adapter.format(**names)] if adapter else []
    status, said = tinylm("serve", model.format(**names), *flags, "--port", "0", "--dtype", "float32")
    assert status == 2, said
    lines = [line for line in said.splitlines() if "error:" in line]
    assert len(lines) == 1 and words in lines[0], said
    assert "Traceback" not in said and "ready" not in said
