"""The page's third part: curves of training runs, also of one that is still training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import make_model, tokenizer
from tests.server.serving import running, settings_for
from tinylm.commands.serve import with_models
from tinylm.server import runs as module
from tinylm.server.runs import rows_of, runs_in, settings_of

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
__all__ = ["tokenizer"]
HOSTILE = "<img src=x onerror=alert(1)> größer"


def row(step: int, **values: Any) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def write_run(folder: Path, name: str, lines: list[str], settings: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_metrics.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    if settings is not None:
        (folder / f"{name}_epoch0").mkdir(exist_ok=True)
        (folder / f"{name}_epoch0" / "lineage.json").write_text(json.dumps({"settings": settings}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("größe")
    write_run(
        folder / "sft",
        "full_sft_32",
        [row(1, loss=5.5, learning_rate=0.002), row(40, loss=2.25, learning_rate=0.006), row(40, validation_loss=2.5)],
        {"learning_rate": 0.006, "epochs": 2, "seed": 1},
    )
    write_run(
        folder,
        "pretrain_32",
        [row(1, loss=6.25), row(90, loss=1.125), row(90, validation_loss=1.5, sample_0=HOSTILE), '{"step": 91, "lo'],
        {"learning_rate": 0.01, "epochs": 2, "seed": 1},
    )
    return folder


@pytest.fixture(scope="module")
def server(folder, tokenizer, tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("served") / "tiny", tokenizer)
    with running(settings_for(model, runs_dir=str(folder))) as found:
        yield found


@pytest.fixture
def tab(browser, server):
    context = browser.new_context()
    context.set_default_timeout(20_000)
    tab = context.new_page()
    said: list[str] = []
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("console", lambda message: said.append(message.text))
    tab.goto(server.url)
    tab.get_by_role("tab", name="Runs").click()
    tab.locator(".chart").wait_for()
    yield tab
    context.close()
    assert said == []


def choose(tab, *names: str) -> None:
    for box in tab.get_by_role("checkbox").all():
        box.set_checked(box.input_value() in names)


def chart_says(tab, words: str) -> None:
    expect(tab.locator(".chart")).to_have_attribute("aria-label", words)
    assert words.partition(" by step; ")[2] in tab.locator("figcaption").inner_text()


def test_several_runs_in_one_chart(tab):
    choose(tab, "pretrain_32", "sft/full_sft_32")
    places = {box.input_value(): place for place, box in enumerate(tab.get_by_role("checkbox").all())}
    ends = {"pretrain_32": "pretrain_32: 1.125 at step 90", "sft/full_sft_32": "sft/full_sft_32: 2.25 at step 40"}
    chart_says(tab, "loss by step; " + "; ".join(ends[name] for name in sorted(places, key=places.__getitem__)))
    assert tab.locator(".chart path").count() == 2
    strokes = {path.get_attribute("stroke") for path in tab.locator(".chart path").all()}
    assert len(strokes) == 2 and strokes == {path.get_attribute("stroke") for path in tab.locator(".runs path").all()}
    tab.get_by_role("combobox", name="Figure").select_option("learning rate")
    chart_says(tab, "learning rate by step; sft/full_sft_32: 0.006 at step 40")
    tab.get_by_role("combobox", name="Figure").select_option("gradient norm")
    tab.locator("text=No run that is chosen has recorded the gradient norm.").wait_for()


def test_what_it_wrote_is_text(tab):
    choose(tab, "pretrain_32")
    row = tab.locator("#runs tr", has_text="pretrain_32, step 90")
    expect(row.locator("td")).to_have_text(HOSTILE)
    assert tab.locator("#runs img").count() == 0


def test_settings_that_differ(tab):
    choose(tab, "pretrain_32", "sft/full_sft_32")
    table = tab.locator("#runs table", has_text="learning_rate")
    expect(table.locator("tr")).to_have_count(2)  # its head, and the one setting that differs
    assert {"0.006", "0.01"} == set(table.locator("td").all_inner_texts()) - {""}
    choose(tab, "pretrain_32")
    tab.locator("text=Choose two runs or more").wait_for()


def test_a_run_that_goes_on(tab, folder):
    path = write_run(folder / "live", "dpo_32", [row(1, loss=0.6931)])
    tab.reload()
    tab.get_by_role("tab", name="Runs").click()
    choose(tab, "live/dpo_32")
    chart_says(tab, "loss by step; live/dpo_32: 0.6931 at step 1")
    with path.open("a") as file:
        file.write(row(2, loss=0.5) + row(3, loss=None) + row(4, loss=0.25))
    chart_says(tab, "loss by step; live/dpo_32: 0.25 at step 4")


def test_only_runs_of_the_folder_can_be_read(server, folder):
    (folder.parent / "secret_metrics.jsonl").write_text(row(1, loss=1.0))
    for name in ("../secret", "..%2Fsecret", "%2e%2e/secret", "sft", "nothing", "sft/full_sft_32_metrics.jsonl"):
        assert server.get(f"/page/runs/{name}").status_code == 404
    assert len(server.get("/page/runs/sft/full_sft_32").json()["rows"]) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_BYTES", 10)
        assert server.get("/page/runs/sft/full_sft_32").status_code == 400


def test_no_runs_no_tab(browser, tokenizer, tmp_path):
    with running(settings_for(make_model(tmp_path / "tiny", tokenizer))) as server:
        assert server.get("/page/runs").json() == {"runs": []}
        tab = browser.new_page()
        tab.goto(server.url)
        tab.locator("#facts:not(:empty)").wait_for()
        tab.get_by_role("tab", name="Chat").press("ArrowLeft")
        assert tab.get_by_role("tab", name="Glass box").get_attribute("aria-selected") == "true"
        assert tab.get_by_role("tab", name="Runs").is_hidden()
        tab.close()


def test_a_long_run_is_thinned_out(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 10)
    lines = [row(step, loss=1.0, **({"validation_loss": 2.0} if step == 8 else {})) for step in range(1, 36)]
    path = write_run(tmp_path, "pretrain_32", [*lines, "[1]\n", "nonsense\n", '{"step": NaN}\n', '{"loss": 1}\n'])
    assert [found["step"] for found in rows_of(path)] == [1, 5, 8, 9, 13, 17, 21, 25, 29, 33]
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="has more than 100 bytes"):
        rows_of(path)


def test_where_the_runs_are(tmp_path, tokenizer):
    make_model(tmp_path / "full_sft" / "full_sft_32_epoch0", tokenizer)
    metrics = write_run(tmp_path / "full_sft", "full_sft_32", [row(1, loss=2.0)])
    assert list(runs_in(tmp_path)) == ["full_sft/full_sft_32"] and settings_of(metrics) == {}
    for path, runs in (("", tmp_path), ("full_sft", tmp_path / "full_sft")):
        assert with_models(settings_for(tmp_path / path)).runs_dir == str(runs)
    model = tmp_path / "full_sft" / "full_sft_32_epoch0"
    assert with_models(settings_for(model)).runs_dir == str(tmp_path / "full_sft")
    assert with_models(settings_for(model, runs_dir="elsewhere")).runs_dir == "elsewhere"
    assert with_models(settings_for(f"a={model}")).runs_dir == ""
