"""`tinylm bench`: its settings, its table, its file."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path

import pytest

from tests.command_line import tinylm
from tinylm.benchmark import suite, text_and_start
from tinylm.benchmark.bench import start_bench
from tinylm.benchmark.figures import OURS, THEIRS, Bar, Figure, Work
from tinylm.benchmark.report import bar_lines, number, show_table, table_lines, words_of
from tinylm.benchmark.settings import PARTS, BenchSettings
from tinylm.commandline.terminal import make_console

QUICK = ["bench", "--quick", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that need no measuring: a ceiling of 200 GFLOP/s, and steps of one GFLOP."""

    def ceilings(bench):
        bench.ceilings.note_flops("float32", 2e11)
        yield Figure("ceilings", "", "matmul, float32", "GFLOP/s", {OURS: (190.0, 200.0)})

    def step(bench):
        samples = {OURS: (90.0, 100.0, 150.0), THEIRS: (100.0, 50.0, 100.0)}
        yield Figure("step", "tiny 32x1", "Muon", "tokens/s", samples, Work("float32", flops=1e9))

    monkeypatch.setitem(suite.MEASURES, "ceilings", ceilings)
    monkeypatch.setitem(suite.MEASURES, "step", step)
    monkeypatch.setattr(suite, "measure_matmul_again", lambda bench: None)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile hides it from users
@pytest.mark.slow
def test_every_part_runs_and_the_file_has_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_and_start, "COMMANDS", ("--version", "cache --help"))  # chat loads torch
    status, said = tinylm(*QUICK, "--compare", "0", "--rounds", "2", "--output", "Maß/alles.json")
    assert status == 0, said
    found = json.loads(Path("Maß/alles.json").read_text(encoding="utf-8"))
    assert [part for part in dict.fromkeys(figure["part"] for figure in found["figures"])] == list(PARTS)
    assert found["complete"] is True and found["command"] == "tinylm bench" and found["seconds"] > 0
    assert found["machine"]["cores"] >= 1 and found["versions"]["torch"] and found["settings"]["hidden_size"] == 32
    for figure in found["figures"]:
        ours = figure["contenders"][OURS]
        assert ours["median"] == statistics.median(ours["samples"])
        assert (ours["lowest"], ours["highest"]) == (min(ours["samples"]), max(ours["samples"]))
        assert figure["ratio"] is None and list(figure["contenders"]) == [OURS]
        assert ours["median"] > 0 or figure["name"] == "compiling, once"
        if work := figure["work_per_unit"]:
            bounds = [work["num_bytes"] / found["ceilings"]["memory_bytes_per_second"]]
            if limit := found["ceilings"]["flops"].get(work["precision"]):  # none of int8
                bounds.append(work["flops"] / limit)
            assert ours["share_of_ceiling"] == pytest.approx(ours["median"] * max(bounds))
    assert "every sample is in Maß/alles.json" in said


def test_one_part_with_its_ceilings(measured: None) -> None:
    """The last lines are the table; the lines before it came as the figures did."""
    status, said = tinylm(*QUICK, "--only", "step", "--precision", "float32")
    assert status == 0
    assert "step, Muon: 100 tokens/s · 1.50x transformers (100) · 50% of the ceiling" in said.splitlines()
    assert "  Muon                           100         90.0–150          100  1.50   50%" in said.splitlines()
    found = json.loads(Path("bench.json").read_text(encoding="utf-8"))
    assert [figure["name"] for figure in found["figures"]] == ["matmul, float32", "Muon"]
    step = found["figures"][1]
    assert step["ratio"] == 1.5 and step["contenders"][THEIRS]["share_of_ceiling"] == 0.5
    assert step["contenders"][OURS]["samples"] == [90.0, 100.0, 150.0]
    assert found["settings"]["only"] == "step" and found["ceilings"]["flops"] == {"float32": 2e11}


def test_a_file_is_never_overwritten_in_silence(measured: None) -> None:
    for name in ("bench.json", "bench-2.json", "bench-3.json"):
        status, said = tinylm(*QUICK, "--only", "step")
        assert status == 0 and f"go to {name}" in said and said.rstrip().endswith(f"every sample is in {name}")
    Path("mine.json").write_text("mine")
    status, said = tinylm(*QUICK, "--only", "step", "--output", "mine.json")
    wanted = "mine.json exists already; pass --overwrite to replace it, or choose another --output"
    assert (status, said) == (2, f"tinylm: error: {wanted}\n") and Path("mine.json").read_text() == "mine"
    assert tinylm(*QUICK, "--only", "step", "--output", "mine.json", "--overwrite")[0] == 0
    assert json.loads(Path("mine.json").read_text())["complete"] is True


def test_a_stopped_run_keeps_what_it_measured(measured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(bench):
        raise KeyboardInterrupt
        yield

    monkeypatch.setitem(suite.MEASURES, "memory", stopped)
    status, said = tinylm(*QUICK, "--only", "step,memory,start")
    assert status == 130
    assert said.splitlines()[-1] == "tinylm: stopped after 2 figures, which are in bench.json"
    assert "  Muon                           100" in said
    found = json.loads(Path("bench.json").read_text(encoding="utf-8"))
    assert found["complete"] is False and [figure["part"] for figure in found["figures"]] == ["ceilings", "step"]
    monkeypatch.setitem(suite.MEASURES, "start", stopped)
    status, said = tinylm(*QUICK, "--only", "start")
    assert status == 130 and said.splitlines()[-1] == "tinylm: stopped" and not Path("bench-2.json").exists()


def test_a_failing_part_keeps_what_came_before(measured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(bench):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setitem(suite.MEASURES, "memory", failing)
    status, said = tinylm(*QUICK, "--only", "step,memory")
    assert status == 1 and said.splitlines()[-1] == "tinylm: error: out of memory"
    assert len(json.loads(Path("bench.json").read_text(encoding="utf-8"))["figures"]) == 2


def test_without_transformers_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    status, said = tinylm(*QUICK, "--only", "step", "--precision", "float32")
    line = "transformers is not installed, so it is not measured; pip install transformers"
    assert status == 0 and said.splitlines().count(line) == 2  # at once, and below the table
    found = json.loads(Path("bench.json").read_text(encoding="utf-8"))
    assert found["remarks"][0] == line and all(figure["ratio"] is None for figure in found["figures"])
    status, said = tinylm(*QUICK, "--only", "step", "--compare", "0")
    assert status == 0 and "transformers is" not in said


@pytest.mark.parametrize("columns", ["80", "30"])
def test_the_table_fits_80_columns_and_cuts_no_word(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a narrow terminal its lines wrap; no column becomes "t…"."""
    monkeypatch.setenv("COLUMNS", columns)
    bench = start_bench(BenchSettings(quick=True, device="cpu"), lambda line: None)
    bench.ceilings.note_flops("bfloat16", 7.9e14)
    group = "large 1024x128, V=128,000, T=131,072, B=1,024, bfloat16, with more words than fit into a line"
    samples = {OURS: (1_275_000.0, 998_000.0, 999_999.0), THEIRS: (999_999.4, 999_998.0, 1e6)}
    figure = Figure("compiled", group, "AdamW, 1,000 texts a row", "tokens/s", samples, Work("bfloat16", 1e9))
    lines = [text.plain for text in table_lines([figure, figure], bench)]
    assert max(map(len, lines)) <= 80
    assert " ".join(line.strip() for line in lines[1:-2]) == f"compiled: {group} (tokens/s)"
    cells = ["AdamW, 1,000 texts a row", "999,999", "998,000–1.27M", "999,999", "1.00", "127%"]
    assert lines[-1].split(maxsplit=5)[-1].split() == cells[1:]
    show_table(make_console(), [figure, figure], bench)
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 80 and set(lines) <= set(printed)
    assert lines[-1] == lines[-2] and lines[-1].startswith(f"  {cells[0]} ")


def test_the_others_have_rows_and_the_bars_lines() -> None:
    """Our 120 tokens/s are 1.5 times transformers' 80, 0.8 times llama.cpp's 150; 0.1234 s is within a bar of 0.2 s."""
    bench = start_bench(BenchSettings(quick=True, device="cpu", compare=False), lambda line: None)
    samples = {OURS: (120.0,), THEIRS: (80.0,), "llama.cpp Q8_0": (150.0,)}
    bars = (Bar(0.9, "llama.cpp Q8_0"), Bar(1.5, THEIRS))
    speed = Figure("serve", "small", "16 streams, bfloat16", "tokens/s", samples, bars=bars)
    first = Figure("serve", "small", "first token", "s", {OURS: (0.1234,)}, bars=(Bar(0.2),))
    assert [text.plain.split() for text in table_lines([speed, first], bench)][2:4] == [
        ["16", "streams,", "bfloat16", "120", "120–120", "80.0", "1.50"],
        ["llama.cpp", "Q8_0", "150", "150–150", "0.80"],
    ]
    assert words_of(speed, bench)[1:] == ["1.50x transformers (80.0)", "0.80x llama.cpp Q8_0 (150)"]
    assert bar_lines([speed, first]) == [
        "not met: 16 streams, bfloat16: 0.80x llama.cpp Q8_0; the bar is at least 0.9x",
        "met: 16 streams, bfloat16: 1.50x transformers; the bar is at least 1.5x",
        "met: first token: 0.123 s; the bar is at most 0.2 s",
    ]


def test_numbers_have_three_digits() -> None:
    shown = [number(value) for value in (0.0386, 2.857, 31.67, 415.4, 9866.2, 1_275_000)]
    assert shown == ["0.039", "2.86", "31.7", "415", "9,866", "1.27M"]
    bench = start_bench(BenchSettings(quick=True, device="cpu"), lambda line: None)
    assert words_of(Figure("start", "", "tinylm --version", "s", {OURS: (0.04,)}), bench) == [
        "start, tinylm --version: 0.040 s"
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--only", "step,training"], f"only has 'training'; expected all, {', '.join(PARTS)}; correct --only"),
        (["--preset", "huge"], "preset has 'huge'; expected auto, tiny, small, large; correct --preset"),
        (["--optimizer", "sgd"], "optimizer has 'sgd'; expected auto, adamw, muon; correct --optimizer"),
        (["--precision", "float16"], "precision has 'float16'; expected auto, float32, bfloat16; correct --precision"),
        (["--streams", "1,-2"], "streams has '-2'; expected positive numbers, such as --streams 1,16"),
        (["--rounds", "-1"], "rounds is -1; expected a positive number; pass --rounds 1"),
        (["--batch_size", "-3"], "batch_size is -3; expected a positive number; pass --batch_size 1"),
        (["--overwrite"], "--overwrite without --output; expected the file to replace; add --output bench.json"),
        (["--output", "."], "output is '.', a folder; expected a file name, such as --output report.json"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_measured(words: list[str], line: str) -> None:
    assert tinylm("bench", *words) == (2, f"tinylm: error: {line}\n")


def test_parts_keep_their_order_and_given_sizes_win_over_quick_ones() -> None:
    settings = BenchSettings(only=" start, step", quick=True, hidden_size=64).filled()
    assert settings.parts == ("step", "start") and BenchSettings().parts == PARTS
    assert (settings.hidden_size, settings.num_hidden_layers, settings.rounds) == (64, 1, 1)
    assert BenchSettings(rounds=5).filled().rounds == 5 and BenchSettings().filled().rounds == 3
    assert BenchSettings(rounds=3, optimizer="adamw,muon", quick=True).filled().optimizer == "adamw,muon"
    assert BenchSettings().presets("step") == ["tiny", "small"] and BenchSettings().presets("decode") == ["small"]
    assert BenchSettings(preset="large").presets("run") == ["large"]
    assert (BenchSettings().documents_in("step"), BenchSettings().documents_in("compiled")) == (8, 1)
    assert BenchSettings(documents=3).documents_in("compiled") == 3
    assert BenchSettings().config("tiny", 4000).max_position_embeddings == 4000
