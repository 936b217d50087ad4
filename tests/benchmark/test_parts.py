"""The parts of the suite at miniature shape: equal work for both contenders, and figures that mean what they say."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch

from tinylm.benchmark import bench as suite_bench
from tinylm.benchmark import machine, serving, text_and_start, training, transformers_peer, using, whole_run
from tinylm.benchmark.bench import Bench, start_bench
from tinylm.benchmark.figures import OURS, THEIRS, Turns
from tinylm.benchmark.settings import BenchSettings
from tinylm.benchmark.step_memory import peak_memory
from tinylm.generation.engine import Engine
from tinylm.generation.scheduler import Scheduler
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.system.runtime import Runtime
from tinylm.trainer.core.optimizer import make_optimizers

CPU = Runtime(torch.device("cpu"), torch.float32)


def quick(**changes: object) -> Bench:
    options = {"quick": True, "device": "cpu", "precision": "float32", **changes}
    return start_bench(BenchSettings(**options), lambda line: None)


@pytest.fixture
def models():
    torch.manual_seed(0)
    config = TinyLMConfig.preset("tiny", hidden_size=32, num_hidden_layers=2)
    ours = TinyLMForCausalLM(config)
    return ours, transformers_peer.same_weights(ours)


# --- equal work -------------------------------------------------------------------------------------------------------


def test_both_contenders_compute_the_same(models):
    ours, theirs = models
    ids = torch.randint(3, ours.config.vocab_size, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("streams", [1, 2])
def test_both_contenders_generate_the_same(models, streams):
    ours, theirs = (model.eval() for model in models)
    prompts = torch.randint(3, ours.config.vocab_size, (streams, 9)).tolist()
    assert using.generation_turn(Engine(ours, dtype=torch.float32), prompts, 5)() == 5 * streams
    assert transformers_peer.generation_turn(theirs, prompts, 5)() == 5 * streams


def test_both_contenders_train_on_the_same_tokens(models):
    """As many tokens in a turn, and weights that move: neither skips its optimizer."""
    ours, theirs = models
    batch = training.make_batch(ours.config, 2, 12)
    before = [parameter.detach().clone() for parameter in (ours.lm_head.weight, theirs.lm_head.weight)]
    turns = [
        training.training_turn(ours, make_optimizers(ours), [batch], CPU, 3),
        transformers_peer.training_turn(theirs, batch, CPU, 3),
    ]
    assert [turn() for turn in turns] == [72, 72]
    for old, new in zip(before, (ours.lm_head.weight, theirs.lm_head.weight), strict=True):
        assert not torch.equal(old, new)


def test_packed_rows_hold_documents_of_equal_length():
    batch = training.make_batch(TinyLMConfig(vocab_size=9), 2, 8, documents=4)
    assert batch.document_ids.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6, 7, 7]]
    assert batch.position_ids.tolist() == [[0, 1] * 4] * 2
    assert batch.count == 16 and int(batch.input_ids.min()) >= 3
    assert torch.equal(batch.input_ids[:, 1:], batch.targets[:, :-1])


# --- the parts --------------------------------------------------------------------------------------------------------


def test_step_has_a_figure_for_each_optimizer_and_one_for_packed_rows():
    bench = quick(only="step", optimizer="adamw,muon", documents=3)
    bench.ceilings.note_flops("float32", 1e9)
    found = list(training.measure_step(bench))
    assert [figure.name for figure in found] == ["AdamW", "Muon", "Muon, 3 texts a row"]
    config, length = bench.settings.config("tiny", 16), 16
    flops = 6 * config.num_parameters() + 6 * config.num_hidden_layers * config.hidden_size * length
    for figure in found:
        assert figure.samples.keys() == {OURS, THEIRS} and figure.unit == "tokens/s"
        assert figure.share(bench.ceilings) == pytest.approx(figure.median() * flops / 1e9)
    assert found[0].samples[THEIRS] == found[2].samples[THEIRS]
    alone = list(training.measure_step(quick(only="step", documents=1, compare=False)))
    assert [(figure.name, list(figure.samples)) for figure in alone] == [("Muon", [OURS])]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile hides it from users
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch 2.11 warns of itself
@pytest.mark.slow
def test_compiled_step_tells_the_time_of_compiling(monkeypatch):
    compiled = []
    compile_ours = TinyLMForCausalLM.compile_for_training
    monkeypatch.setattr(
        TinyLMForCausalLM,
        "compile_for_training",
        lambda model, **options: compiled.append(options) or compile_ours(model, **options),
    )
    bench = quick(only="compiled")
    bench.remarks.clear()
    found = list(training.measure_compiled(bench))
    assert bench.remarks == []
    assert compiled == [{"backend": "eager"}]
    assert [(figure.name, figure.unit) for figure in found] == [
        ("Muon", "tokens/s"), ("Muon, 2 texts a row", "tokens/s"), ("compiling, once", "s"),
    ]  # fmt: skip
    assert all(seconds > 0 for values in found[-1].samples.values() for seconds in values)
    assert training._seconds_to_compile(Turns(1.0, (2.0, 3.0), 10.0)) == 8.0


def test_a_machine_that_cannot_compile_says_so(monkeypatch):
    def fail(model, **options):
        raise RuntimeError("\nno C++ compiler „g++“\n" + "and more " * 99)

    monkeypatch.setattr(TinyLMForCausalLM, "compile_for_training", fail)
    bench = quick(only="compiled")
    assert list(training.measure_compiled(bench)) == []
    expected = "compiled, tiny: left out, because torch.compile failed (no C++ compiler „g++“ and more and more"
    assert bench.remarks[-1].startswith(expected) and bench.remarks[-1].endswith(" and...)")
    assert len(bench.remarks[-1]) < 200


@pytest.mark.slow
def test_memory_is_of_each_contenders_own_process():
    """And grows with the model: AdamW keeps 16 bytes a weight (weight, gradient, two moments)."""
    (small,) = training.measure_memory(quick(only="memory", compare=False))
    (large,) = training.measure_memory(quick(only="memory", compare=False, hidden_size=512, num_hidden_layers=4))
    assert small.unit == "GB" and 0.1 < small.median() < large.median()
    parameters = BenchSettings(hidden_size=512, num_hidden_layers=4, vocab_size=320).config("tiny", 16).num_parameters()
    assert 12e-9 * parameters < large.median() - small.median() < 60e-9 * parameters


def test_peak_memory_is_not_that_of_the_process_that_started_it():
    """getrusage remembers the parent's; a process that starts from one of 1 GB must not tell 1 GB."""
    ballast = torch.ones(250_000_000)
    code = (
        "import torch; from tinylm.benchmark.step_memory import *; print(peak_memory(Runtime(torch.device('cpu'), 0)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert peak_memory(CPU) > ballast.nbytes + int(done.stdout) / 2
    assert 5e7 < int(done.stdout) < ballast.nbytes


def test_a_memory_process_that_fails_is_named(monkeypatch):
    with pytest.raises(RuntimeError, match="memory, transformers: the process failed: .*'nein'"):
        task = {"config": {"vocab_size": 9}, "length": 4, "rows": 1, "dtype": "nein", "device": "cpu"}
        training.peak_of(THEIRS, task)


@pytest.mark.slow
def test_run_is_compared_with_the_bare_step(tmp_path, monkeypatch, capsys):
    """Validated, saved, and silent; its two percentages are those of its three speeds, round by round."""
    saved = []
    real = whole_run.Run.fit
    monkeypatch.setattr(whole_run.Run, "fit", lambda run: saved.append(real(run)) or saved[-1])
    monkeypatch.setattr(whole_run.tempfile, "TemporaryDirectory", lambda prefix: _Kept(tmp_path))
    found = {figure.name: figure for figure in whole_run.measure_run(quick(only="run", rounds=2))}
    bare, run, whole = (found[name] for name in ("bare step, Muon", "whole run", "whole run and its data"))
    assert bare.unit == "tokens/s" and run.median() > whole.median()
    for shares, speeds in (("whole run / bare step", run), ("the same with its data", whole)):
        expected = [100 * a / b for a, b in zip(speeds.samples[OURS], bare.samples[OURS], strict=True)]
        assert found[shares].unit == "%" and list(found[shares].samples[OURS]) == pytest.approx(expected)
    assert len(saved) == 2 and all((folder / "model.safetensors").exists() for folder in saved)
    metrics = (saved[0].parent / "pretrain_32_metrics.jsonl").read_text(encoding="utf-8")
    assert any("validation_loss" in json.loads(line) for line in metrics.splitlines())
    assert capsys.readouterr().out == ""


class _Kept:
    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        return str(self.folder)

    def __exit__(self, *error):
        pass


def test_decode_counts_generated_tokens_and_prefill_those_of_the_prompt(monkeypatch):
    """On a clock that moves one second at each look: a turn takes a second."""
    clock = itertools.count()
    monkeypatch.setattr("tinylm.benchmark.figures.time.perf_counter", lambda: float(next(clock)))
    bench = quick(only="decode,prefill", max_new_tokens=5, prefill_tokens=16)
    one, two = using.measure_decode(bench)
    assert (one.name, dict(one.samples)) == ("1 stream", {OURS: (5.0,), THEIRS: (5.0,)})
    assert (two.name, dict(two.samples)) == ("2 streams", {OURS: (10.0,), THEIRS: (10.0,)})
    (prefill,) = using.measure_prefill(bench)
    assert dict(prefill.samples) == {OURS: (16.0,), THEIRS: (16.0,)}


def test_serve_counts_the_same_tokens_for_all_contenders(monkeypatch):
    """On a clock that moves one second at each look: a turn takes a second. Each contender has its bars."""
    clock = itertools.count()
    monkeypatch.setattr("tinylm.benchmark.figures.time.perf_counter", lambda: float(next(clock)))
    bench = quick(only="serve", precision="auto", max_new_tokens=5, prefill_tokens=30)
    *answering, reading, first, cached = serving.measure_serve(bench)
    half = bench.name_of(bench.runtimes[-1])
    peers = {"float32": "llama.cpp F32", "bfloat16": "llama.cpp BF16", "int8": "llama.cpp Q8_0"}
    assert [figure.name for figure in answering] == [*(f"1 stream, {name}" for name in peers), f"2 streams, {half}"]
    for figure, count, name in zip(answering, (5.0, 5.0, 5.0, 10.0), (*peers, half), strict=True):
        assert set(figure.samples.values()) == {(count,)}
        transformers_has_it = name == "float32" or (name == "bfloat16" and half == "bfloat16")
        assert set(figure.samples) == {OURS, peers[name]} | ({THEIRS} if transformers_has_it else set())
    one_stream = [(peer, bound) for peer, bound in zip(peers.values(), (1.0, 1.0, 0.9), strict=True)]
    bars = [[(bar.contender, bar.bound) for bar in figure.bars] for figure in answering]
    assert bars == [*([pair] for pair in one_stream), [(peers[half], 1.0), (THEIRS, 2.0)]]
    everyone = {OURS, THEIRS, *peers.values()}
    assert dict(reading.samples) == dict.fromkeys(everyone, (30.0,)) and len(reading.bars) == 3
    assert dict(first.samples) == dict.fromkeys(everyone, (1.0,)) and first.unit == "s"
    assert dict(cached.samples) == dict.fromkeys(everyone - {THEIRS}, (1.0,))


def test_serve_alone_says_what_is_missing(monkeypatch):
    find = suite_bench.importlib.util.find_spec
    monkeypatch.setattr(
        suite_bench.importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else find(name)
    )
    line = "xllamacpp is not installed, so llama.cpp is not measured; pip install xllamacpp"
    bench = quick(only="serve", streams="2")
    assert bench.remarks.count(line) == 1
    many, reading, _, _ = serving.measure_serve(bench)
    assert set(many.samples) == set(reading.samples) == {OURS, THEIRS} and not reading.bars
    assert line not in quick(only="decode").remarks and line not in quick(only="serve", compare=False).remarks


def test_no_turn_finds_its_prompt_in_the_cache_except_the_last_figure(monkeypatch):
    """Tokens that the scheduler reads: all of each prompt, and behind a cached prefix only the new ones."""
    read = []
    real = Scheduler._read
    monkeypatch.setattr(
        Scheduler, "_read", lambda self, first, chunks: read.append(sum(chunks)) or real(self, first, chunks)
    )
    list(serving.measure_serve(quick(only="serve", compare=False, streams="2", rounds=2, prefill_tokens=30)))
    assert read == [8] * 3 + [30] * 3 + [30] + [serving.NEW_TOKENS] * 2


def test_a_measured_step_brings_one_token_to_a_text(monkeypatch):
    """Random weights repeat themselves: a scheduler that guesses ahead would be measured at a speed of no real text."""
    sizes = []
    real = Scheduler.step
    monkeypatch.setattr(
        Scheduler,
        "step",
        lambda self: [sizes.append(len(event.token_ids)) or event for event in real(self)],
    )
    list(serving.measure_serve(quick(only="serve", compare=False, streams="1", max_new_tokens=32)))
    assert set(sizes) == {1}


def test_streams_share_the_reading_of_the_weights():
    config = TinyLMConfig.preset("small")
    one, sixteen = (using.decoding_work(config, torch.float32, streams) for streams in (1, 16))
    assert one.num_bytes == 4 * 25_829_888 and sixteen.num_bytes == one.num_bytes / 16
    assert one.flops == sixteen.flops == 2 * 25_829_888


def test_prefill_costs_a_third_of_training_without_the_head():
    config = TinyLMConfig.preset("small")
    table = config.vocab_size * config.hidden_size
    training_flops = TinyLMForCausalLM(config).training_flops_per_token(400)
    assert using.prefill_flops(config, 400) == pytest.approx(training_flops / 3 - 2 * table + 2 * table / 400)


def test_evaluate_scores_each_token_of_the_texts(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("tinylm.benchmark.figures.time.perf_counter", lambda: float(next(clock)))
    (figure,) = using.measure_evaluate(quick(only="evaluate", text_kb=40))
    texts = using.held_out_texts(2000)
    assert 2000 <= sum(len(text.encode()) for text in texts) < 6000
    assert figure.samples[OURS] == (sum(len(ids) for ids in using.Tokenizer.default().encode_batch(texts)),)


def test_tokenize_counts_megabytes(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("tinylm.benchmark.figures.time.perf_counter", lambda: float(next(clock)))
    found = list(text_and_start.measure_tokenize(quick(text_kb=20)))
    size = sum(len(text.encode()) for text in using.held_out_texts(20_000)) / 1e6
    assert [(figure.name, figure.unit, figure.median()) for figure in found] == [
        ("text to tokens", "MB/s", size), ("training, 1,024 entries", "MB/s", size),
    ]  # fmt: skip


def test_start_runs_the_commands(monkeypatch):
    ran = []
    monkeypatch.setattr(text_and_start.subprocess, "run", lambda words, **options: ran.append(words[1:]))
    found = list(text_and_start.measure_start(quick(rounds=2)))
    assert [(figure.name, figure.unit, len(figure.samples[OURS])) for figure in found] == [
        ("tinylm --version", "s", 2), ("tinylm chat --help", "s", 2),
    ]  # fmt: skip
    assert ran == [["-m", "tinylm", "--version"]] * 3 + [["-m", "tinylm", "chat", "--help"]] * 3


def test_ceilings_are_in_billions_and_kept(monkeypatch):
    rates = iter([2e9, 5e9, 3e9, 7e9, 6e9, 8e9])
    monkeypatch.setattr(machine, "measured_matmul_flops", lambda runtime: next(rates))
    monkeypatch.setattr(machine, "device_has_bf16", lambda device: True)
    monkeypatch.setattr(machine, "read_speed", lambda runtime, megabytes: 1e9 * megabytes)
    bench = quick(rounds=3)
    found = list(machine.measure_ceilings(bench))
    assert [(figure.name, figure.unit, figure.samples[OURS]) for figure in found] == [
        ("matmul, float32", "GFLOP/s", (2.0, 5.0, 3.0)),
        ("matmul, bfloat16", "GFLOP/s", (7.0, 6.0, 8.0)),
        ("memory, reading", "GB/s", (4.0, 4.0, 4.0)),
    ]
    assert bench.ceilings.flops == {"float32": 5e9, "bfloat16": 8e9} and bench.ceilings.bytes_per_second == 4e9
    monkeypatch.setattr(machine, "measured_matmul_flops", lambda runtime: 9e9)
    machine.measure_matmul_again(bench)
    assert bench.ceilings.flops == {"float32": 9e9, "bfloat16": 8e9}


def test_memory_is_read_at_a_plausible_speed(monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr("tinylm.benchmark.machine.time.perf_counter", lambda: next(clock))
    assert machine.read_speed(CPU, 3, num_reads=3) == 3_000_000 / 2


def test_machine_is_named():
    facts = machine.machine_facts(CPU)
    assert facts["threads"] == torch.get_num_threads() and facts["gpu"] is None and facts["memory_gb"] > 0.5
    line = machine.machine_line({**facts, "cpu": "Ein Prozessor", "cores": 3, "memory_gb": 7.6, "bfloat16": False})
    threads = torch.get_num_threads()
    assert line == f"Ein Prozessor, 3 cores, {threads} threads, 8 GB, no bfloat16 in hardware"
    assert machine.machine_line({**facts, "gpu": "NVIDIA X"}).startswith("NVIDIA X, ")
    assert machine.versions()["torch"] == torch.__version__.partition("+")[0] or torch.__version__
