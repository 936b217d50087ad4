"""The page's third part: the tree of training runs and their curves, also of runs that are still training."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.server.conftest import make_model, tokenizer
from tests.server.run_files import row, trained_from, write_lineage, write_run
from tests.server.serving import running, settings_for
from tinylm.server import runs as module

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
__all__ = ["tokenizer"]
HOSTILE = "<img src=x onerror=alert(1)> größer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model; SFT of it, whose loss is not always a number; DPO of that; and a run that has its own."""
    folder = tmp_path_factory.mktemp("größe")
    base = [row(1, loss=6.25), row(60, loss=2.0), row(90, loss=1.125), '{"step": 91, "lo']
    base.insert(2, row(60, validation_loss=2.5, sample_0="Once a ship"))
    base.insert(4, row(90, validation_loss=1.5, sample_0=HOSTILE))
    facts = {"finished": True, "parent": None, "settings": {"learning_rate": 0.01, "epochs": 2, "seed": 1}}
    write_run(folder, "pretrain_32", base, facts)
    sft = [row(1, loss=5.5, learning_rate=0.002), row(20, loss=None), row(40, loss=2.25, learning_rate=0.006)]
    asked = {"sample_0": "Who -> ich", "sample_1": "Größe? -> -> ½"}
    sft += [
        row(40, validation_loss=2.5, **asked),
        row(80, validation_loss=2.0, **{**asked, "sample_0": "Who -> <b>I</b>"}),
    ]
    base_model = folder / "pretrain_32_epoch0"
    settings = {"learning_rate": 0.006, "epochs": 2, "seed": 1}
    write_run(folder / "sft", "full_sft_32", sft, trained_from(base_model, **settings))
    dpo = [row(step, loss=0.7 - step / 1000, reward_margin=step / 100 - 0.2, my_figure=3.0) for step in range(1, 121)]
    dpo.append(row(120, validation_reward_margin=1.5, sample_0="Who -> Tiny", sample_1=None))
    write_run(folder / "dpo", "dpo_32", dpo, trained_from(folder / "sft" / "full_sft_32_epoch0"))
    write_lineage(folder / "merged", {"stage": "merged", "parent": {"path": str(folder / "dpo" / "dpo_32_epoch0")}})
    write_run(folder / ("<b>other" + 50 * "_"), "lora_32", [row(5, loss=4.0)], trained_from("/gone/full_sft_32_epoch0"))
    return folder


@pytest.fixture(scope="module")
def server(folder, tokenizer, tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("served") / "tiny", tokenizer)
    with running(settings_for(model, runs_dir=str(folder))) as found:
        yield found


@pytest.fixture
def tab(open_page, server):
    return open_runs(open_page, server)


def open_runs(open_page, server, **options):
    tab = open_page(server.url, **options)
    tab.get_by_role("tab", name="Runs").click()
    tab.locator(".values li").first.wait_for()
    return tab


def choose(tab, *names: str) -> None:
    for box in tab.locator(".runs input").all():
        box.set_checked(box.input_value() in names)


def figure(tab, name: str) -> None:
    tab.get_by_role("combobox", name="Figure").select_option(name)


def chart_says(tab, words: str) -> None:
    """To those who see it, and to a screen reader."""
    chart = tab.get_by_role("slider", name=" by step")
    expect(chart).to_have_attribute("aria-valuetext", words)
    when, *values = words.split("; ")
    heading = "the last values" if when == "last values" else when
    expect(tab.locator("figcaption .hint")).to_have_text(re.compile(f": {heading}$"))
    expect(tab.locator(".values li")).to_have_text(values)


def test_the_runs_are_a_tree(tab):
    """Lists in lists, for the eye and for a screen reader, with a few facts of each run."""
    tab.locator(".runs").first.wait_for()
    tree = tab.get_by_role("list", name="Runs", exact=True)
    sft = tree.get_by_role("list", name="trained from pretrain_32")
    dpo = sft.get_by_role("list", name="trained from sft/full_sft_32")
    merged = dpo.get_by_role("list", name="trained from dpo/dpo_32").get_by_role("listitem")
    expect(merged).to_have_text("merged merged, without metrics")
    assert dpo.get_by_role("checkbox").count() == 1 and sft.get_by_role("checkbox").count() == 2
    box = sft.get_by_role("checkbox", name="sft/full_sft_32")
    expect(box).to_have_accessible_description(
        re.compile(r"^step 80 · held-out loss 2 · finished \d+ \w+ 20\d\d, \d\d:\d\d$")
    )
    lone = tree.get_by_role("checkbox", name="<b>other")
    expect(lone).to_have_accessible_description(
        re.compile("trained from /gone/full_sft_32_epoch0, which is not in this")
    )


def test_several_runs_in_one_chart(tab):
    choose(tab, "pretrain_32", "sft/full_sft_32")
    chart_says(tab, "last values; pretrain_32: 1.125 at step 90; sft/full_sft_32: 2.25 at step 40")
    strokes = [path.get_attribute("stroke") for path in tab.locator(".chart path").all()]
    assert len(set(strokes)) == 2
    assert strokes == [path.get_attribute("stroke") for path in tab.locator(".values path").all()]
    named = tab.locator(".runs li", has_text="sft/full_sft_32").last.locator("path").first
    assert named.get_attribute("stroke") == strokes[1]
    figure(tab, "learning rate")
    chart_says(tab, "last values; sft/full_sft_32: 0.006 at step 40")
    expect(tab.get_by_role("list", name="Notes")).to_have_text("pretrain_32: no learning rate recorded")


def test_values_under_the_pointer(tab):
    """Of the recorded step that is nearest, and of each run its nearest one; away from the chart, the last values."""
    choose(tab, "pretrain_32", "sft/full_sft_32")
    chart = tab.locator(".chart")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    at_60 = box["x"] + 56 + (60 - 1) / 89 * (box["width"] - 68)
    for x in (at_60 + 4, at_60 - 4):
        tab.mouse.move(x, box["y"] + 30)
        chart_says(tab, "step 60; pretrain_32: 2; sft/full_sft_32: 2.25 at step 40")
    (x1,) = {tab.locator(".cursor line").get_attribute(end) for end in ("x1", "x2")}
    assert abs(box["x"] + float(x1) - at_60) < 1 and tab.locator(".cursor circle").count() == 2
    tab.mouse.move(box["x"] + 200, box["y"] - 40)
    chart_says(tab, "last values; pretrain_32: 1.125 at step 90; sft/full_sft_32: 2.25 at step 40")
    assert tab.locator(".cursor line").count() == 0


def test_values_by_the_keyboard(tab):
    choose(tab, "pretrain_32")
    chart_says(tab, "last values; pretrain_32: 1.125 at step 90")
    chart = tab.get_by_role("slider", name="loss (nats) by step")
    tab.get_by_role("checkbox", name="smooth").focus()
    tab.keyboard.press("Tab")
    expect(chart).to_be_focused()
    for keys, step, value in (
        ("ArrowLeft", 60, "2"), ("ArrowLeft", 1, "6.25"), ("ArrowLeft", 1, "6.25"), ("ArrowRight", 60, "2"),
        ("End", 90, "1.125"), ("PageUp", 90, "1.125"), ("Home", 1, "6.25"), ("PageUp", 90, "1.125"),
        ("PageDown", 1, "6.25"),
    ):  # fmt: skip
        tab.keyboard.press(keys)
        chart_says(tab, f"step {step}; pretrain_32: {value}")
        expect(chart).to_have_attribute("aria-valuenow", str(step))
    tab.keyboard.press("Escape")
    chart_says(tab, "last values; pretrain_32: 1.125 at step 90")


def test_values_by_touch_on_a_phone(open_page, server):
    """The values stay when the finger is lifted. Nothing is wider than the screen."""
    tab = open_runs(open_page, server, viewport={"width": 360, "height": 740}, has_touch=True, color_scheme="dark")
    choose(tab, "pretrain_32", "sft/full_sft_32", "dpo/dpo_32", f"<b>other{50 * '_'}/lora_32")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    choose(tab, "pretrain_32")
    chart = tab.locator(".chart")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert (
        min(float(text.evaluate("e => e.getBoundingClientRect().height")) for text in chart.locator("text").all()) > 9
    )
    tab.touchscreen.tap(box["x"] + 60, box["y"] + 50)
    chart_says(tab, "step 1; pretrain_32: 6.25")


def test_every_figure_of_the_chosen_runs(tab):
    """With units; one that a run does not have comes back with the next run that has it."""
    options = tab.get_by_role("combobox", name="Figure").locator("option")
    choose(tab, "pretrain_32")
    expect(options).to_have_text(["loss (nats)", "held-out loss (nats)"])
    choose(tab, "dpo/dpo_32", "sft/full_sft_32")
    expect(options).to_have_text(
        ["loss (nats)", "held-out loss (nats)", "reward margin (nats)", "held-out reward margin (nats)",
         "learning rate", "my figure"]
    )  # fmt: skip
    figure(tab, "held-out reward margin (nats)")
    chart_says(tab, "last values; dpo/dpo_32: 1.5 at step 120")
    assert tab.locator(".chart circle").count() == 1, "a single value can be seen"
    choose(tab, "pretrain_32")
    chart_says(tab, "last values; pretrain_32: 1.125 at step 90")
    choose(tab, "dpo/dpo_32")
    chart_says(tab, "last values; dpo/dpo_32: 1.5 at step 120")
    choose(tab)
    tab.locator("text=Choose a run.").wait_for()
    assert tab.locator(".chart").is_hidden()


def test_a_log_scale(tab):
    """Halves are equally far apart; only for values above 0."""
    choose(tab, "pretrain_32")
    heights = lambda: [float(dot.get_attribute("cy")) for dot in tab.locator(".chart circle").all()]  # noqa: E731
    tab.get_by_role("checkbox", name="log scale").check()
    first, second, third = heights()
    assert abs((second - first) / (third - second) - 1.9799) < 0.01  # log(6.25 / 2) / log(2 / 1.125)
    expect(tab.locator(".chart text[text-anchor=end]")).to_have_text(["2", "4", "6", "step"])
    assert tab.evaluate("logTicks(0.04, 3)") == [0.05, 0.1, 0.2, 0.5, 1, 2]
    choose(tab, "dpo/dpo_32")
    figure(tab, "reward margin (nats)")
    expect(tab.get_by_role("checkbox", name="log scale")).to_be_disabled()
    chart_says(tab, "last values; dpo/dpo_32: 1 at step 120")


def test_a_smooth_line(tab):
    """The running median over the recorded values, which stay as a faint line."""
    choose(tab, "dpo/dpo_32")
    tab.get_by_role("checkbox", name="smooth").check()
    expect(tab.locator(".chart path")).to_have_count(2)
    assert tab.evaluate("smoothed([[1, 9], [2, 1], [3, 5], [4, 7]])") == [[1, 9], [2, 5], [3, 5], [4, 7]]


def test_what_is_no_number_is_said(tab, folder):
    choose(tab, "sft/full_sft_32")
    expect(tab.get_by_role("list", name="Notes")).to_have_text("sft/full_sft_32: 1 value is not a number")
    write_run(folder / "torn", "dpo_32", [row(2, loss=1.0), row(9, loss=9.0), row(2, loss=2.0), "x\n", "y\n"])
    try:
        choose(tab, "torn/dpo_32")
        tab.get_by_role("checkbox", name="torn/dpo_32").check()
        chart_says(tab, "last values; torn/dpo_32: 2 at step 2")
        expect(tab.get_by_role("list", name="Notes").get_by_role("listitem")).to_have_text(
            [
                "torn/dpo_32: 2 lines left out: not the metrics of a step",
                "torn/dpo_32: 2 steps of an earlier attempt left out",
            ]
        )
    finally:
        shutil.rmtree(folder / "torn")


def test_what_it_wrote(tab):
    """By prompt, the steps of each run in their order; as text."""
    choose(tab, "pretrain_32", "sft/full_sft_32", "dpo/dpo_32")
    written = tab.get_by_role("table", name="Who")
    expect(written.locator("tr")).to_have_text(
        ["sft/full_sft_32", "step 40ich", "step 80<b>I</b>", "dpo/dpo_32", "step 120Tiny"]
    )
    expect(tab.get_by_role("table", name="Größe?").locator(".text")).to_have_text(["-> ½", "-> ½"])
    expect(tab.get_by_role("table", name="Text 1").locator(".text")).to_have_text(["Once a ship", HOSTILE])
    assert tab.locator("#runs img, #runs td b").count() == 0
    assert tab.evaluate("spread([...Array(100).keys()], 4)") == [0, 33, 66, 99]


def test_settings_that_differ(tab):
    choose(tab, "pretrain_32", "sft/full_sft_32")
    table = tab.locator("#runs table", has_text="learning_rate")
    expect(table.locator("tr")).to_have_count(3)  # its head, and two settings that differ: one has an output_dir
    assert {"0.006", "0.01"} <= set(table.locator("td").all_inner_texts())
    choose(tab, "pretrain_32")
    tab.locator("text=Choose two runs or more").wait_for()


def test_a_run_that_trains(tab, folder):
    """It appears without a reload, and its new values too; the chosen step and the focus stay. It goes when removed."""
    choose(tab, "dpo/dpo_32")
    chart_says(tab, "last values; dpo/dpo_32: 0.58 at step 120")
    chart, focused = tab.locator(".chart"), tab.get_by_role("checkbox", name="dpo/dpo_32", exact=True)
    chart.press("Home")
    focused.focus()
    path = write_run(folder / "live", "dpo_32", [row(1, loss=0.6931)])
    try:
        box = tab.get_by_role("checkbox", name="live/dpo_32")
        expect(box).to_have_accessible_description(re.compile(r"^step 1 · training, last line \d+ s ago$"))
        expect(focused).to_be_focused()
        chart_says(tab, "step 1; dpo/dpo_32: 0.699")
        choose(tab, "live/dpo_32")
        chart_says(tab, "step 1; live/dpo_32: 0.6931")
        chart.scroll_into_view_if_needed()
        place = chart.bounding_box()
        tab.mouse.move(place["x"] + place["width"] - 3, place["y"] + 30)
        chart_says(tab, "step 1; live/dpo_32: 0.6931")
        with path.open("a") as file:
            file.write(row(2, loss=0.5) + row(3, loss=None) + row(4, loss=0.25))
        expect(tab.get_by_role("list", name="Notes")).to_have_text("live/dpo_32: 1 value is not a number")
        chart_says(tab, "step 1; live/dpo_32: 0.6931")
        chart.press("Escape")
        chart_says(tab, "last values; live/dpo_32: 0.25 at step 4")
    finally:
        shutil.rmtree(folder / "live")
    tab.get_by_role("tab", name="Runs").focus()  # it looks at once
    expect(box).to_have_count(0)
    tab.locator("text=Choose a run.").wait_for()
    assert tab.locator("#trouble").is_hidden()


def test_a_server_that_goes_away_and_comes_back(tab, server):
    """It is said, and what is drawn stays."""
    choose(tab, "pretrain_32")
    chart_says(tab, "last values; pretrain_32: 1.125 at step 90")
    tab.route("**/page/runs", lambda route: route.abort("connectionrefused"))
    tab.get_by_role("tab", name="Runs").focus()
    expect(tab.locator("#trouble")).to_have_text("the server cannot be reached; start it again with: tinylm serve")
    chart_says(tab, "last values; pretrain_32: 1.125 at step 90")
    tab.unroute("**/page/runs")
    expect(tab.locator("#trouble")).to_be_hidden()


def test_only_runs_of_the_folder_can_be_read(server, folder):
    (folder.parent / "secret_metrics.jsonl").write_text(row(1, loss=1.0))
    for name in ("../secret", "..%2Fsecret", "%2e%2e/secret", "sft", "nothing", "sft/full_sft_32_metrics.jsonl"):
        assert server.get(f"/page/runs/{name}").status_code == 404
    assert len(server.get("/page/runs/sft/full_sft_32").json()["rows"]) == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_BYTES", 10)
        assert server.get("/page/runs/sft/full_sft_32").status_code == 400


def test_no_runs_no_tab(browser, tokenizer, tmp_path):
    """Until the first one begins. A run whose metrics cannot be shown says why."""
    runs = tmp_path / "runs"
    model = make_model(tmp_path / "tiny", tokenizer)
    with running(settings_for(model)) as server:
        assert server.get("/page/runs").json() == {"runs": None}
    with running(settings_for(model, runs_dir=str(runs))) as server:
        assert server.get("/page/runs").json() == {"runs": [], "left_out": 0}
        tab = browser.new_page()
        tab.goto(server.url)
        tab.locator("#facts:not(:empty)").wait_for()
        tab.get_by_role("tab", name="Chat").press("ArrowLeft")
        assert tab.get_by_role("tab", name="Glass box").get_attribute("aria-selected") == "true"
        assert tab.get_by_role("tab", name="Runs").is_hidden()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "MOST_BYTES", 10)
            write_run(runs, "pretrain_32", [row(1, loss=6.0)])
            tab.get_by_role("tab", name="Runs").click()
            tab.locator("li:has-text('pretrain_32_metrics.jsonl has more than 10 bytes')").wait_for()
        tab.close()
