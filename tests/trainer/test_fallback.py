"""A step that cannot be computed as planned is computed in another way, and the run says so."""

from __future__ import annotations

import dataclasses
import itertools
import json
import weakref

import pytest
import torch
from run_parts import interrupt_at, make_run, records, said
from trainer_parts import Rows, assert_same_bits, small_model, weights_of

from tinylm.checkpoint.training_state import load_training_state
from tinylm.system.memory import is_out_of_memory
from tinylm.system.runtime import Runtime
from tinylm.trainer.core import gradients
from tinylm.trainer.core.failed_steps import StepFailed
from tinylm.trainer.core.loop import fit
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.core.optimizer import make_optimizers
from tinylm.trainer.run.run import Run

SIZES = {"batch_size": 6, "accumulation_steps": 2, "max_steps": 7, "save_interval": 1}
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


class FailInBackward(torch.autograd.Function):
    """The identity; its backward pass fails."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error


def run_with_room_for(rows: int, folder, after=0, error=OUT_OF_MEMORY[1], **changes) -> Run:
    """A run whose memory holds `rows` rows at a time in the backward pass, from step `after` + 1 on.

    The first micro-batch of that step still fits.
    """
    run = make_run(folder, **{"data": Rows(29), **SIZES, **changes})
    fitted = []

    def objective(model, batch):
        loss, metrics = next_token_loss(model, batch)
        if not model.training or run.steps_done < after or len(batch.input_ids) * run.plan.at_once <= rows:
            return loss, metrics
        fitted.append(batch)
        return loss if len(fitted) == 1 else FailInBackward.apply(loss, error), metrics

    run.learner.objective = objective
    return run


# --- out of memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dropout", "size", "parts"), [(0.0, 8, 2), (0.3, 6, 1)])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_out_of_memory_continues_as_one_of_half_the_batch_size(
    tmp_path, monkeypatch, optimizer, dropout, size, parts
):
    """From that step on, to the bit. Without dropout the batch is cut into parts for two cores, before and after.

    29 rows are two steps (16 and 13 rows) or three (12, 12 and 5).
    """
    monkeypatch.setattr(gradients, "num_cores", lambda device: 2)
    same = {**SIZES, "batch_size": size, "optimizer": optimizer, "dropout": dropout, "data": Rows(29)}
    run = run_with_room_for(size - 1, tmp_path / "run", after=4, **same)
    assert (run.plan.at_once, run.plan.source.sampler.batch_size) == (parts, size // parts)
    run.fit()
    line = f"warning: out of memory in step 5, which computes {size} rows at a time; {size // 2} at a time from now on"
    assert f"{line}; a step keeps its {2 * size} rows" in said(run).splitlines()
    assert said(run).count("out of memory") == 1 and run.plan.source.rows_per_step == 2 * size

    halves = {"batch_size": size // 2, "accumulation_steps": 4}
    interrupt_at(make_run(tmp_path / "planned", **same), 5)
    planned = make_run(tmp_path / "planned", resume=True, **{**same, **halves})
    planned.fit()
    assert planned.progress.step == 4
    assert_same_bits(weights_of(run.learner.model), weights_of(planned.learner.model))
    assert records(tmp_path / "run") == records(tmp_path / "planned")
    whole = make_run(tmp_path / "whole", **same)
    whole.fit()
    with pytest.raises(AssertionError):  # so the comparison above is sharp
        assert_same_bits(weights_of(run.learner.model), weights_of(whole.learner.model))


def test_it_is_halved_until_it_fits(tmp_path, monkeypatch):
    """On two cores 8 rows are 4 and 4, then 2 and 2; one more halving leaves 1 and 1."""
    monkeypatch.setattr(gradients, "num_cores", lambda device: 2)
    run = run_with_room_for(3, tmp_path, dropout=0.0, batch_size=8, max_steps=2)
    run.fit()
    cuts = [line.split("computes ")[1] for line in said(run).splitlines() if "out of memory in step 1" in line]
    rest = "at a time from now on; a step keeps its 16 rows"
    assert cuts == [f"8 rows at a time; 4 {rest}", f"4 rows at a time; 2 {rest}"]
    assert (run.plan.batch_size, run.plan.at_once, run.plan.source.sampler.batch_size) == (2, 2, 1)
    lineage = json.loads((run.checkpoints.last_folder / "lineage.json").read_text())
    assert lineage["lowered_batch_size"] == 2


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_failed_step_leaves_nothing_behind(error):
    """No gradient of the micro-batch before, no activation, no change of weights: memory is free for the next try."""
    model, rows, seen = small_model(), Rows(4), []
    before = weights_of(model)

    def objective(model, batch):
        loss, metrics = next_token_loss(model, batch)
        held = torch.ones(3, requires_grad=True) * loss
        seen.append(weakref.ref(held))
        if len(seen) == 2:
            raise error
        return held.mean(), metrics

    steps = [[rows.collate([rows.row(i)]) for i in (0, 1)]]
    cpu = Runtime(torch.device("cpu"), torch.float32)
    with pytest.raises(StepFailed) as failure:
        fit(model, objective, make_optimizers(model), lambda _: 1e-3, steps, cpu, 1)
    assert failure.value.is_out_of_memory and len(seen) == 2
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [held() for held in seen] == [None, None]
    assert_same_bits(before, weights_of(model))


def test_other_errors_are_not_taken_for_it(tmp_path):
    """A size that is wrong stays the error that it is, and is no reason to halve a batch."""
    run = run_with_room_for(2, tmp_path, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="^mat1 and mat2 shapes"):
        run.fit()
    assert not is_out_of_memory(ValueError("out of memory")) and not is_out_of_memory(KeyError("bad_alloc"))


def test_a_single_row_that_does_not_fit_is_an_error_that_says_what_to_lower(tmp_path):
    run = run_with_room_for(0, tmp_path, batch_size=2, max_seq_len=48)
    with pytest.raises(RuntimeError) as error:
        run.fit()
    assert str(error.value) == (
        "out of memory in step 1 with a single row; choose a smaller model, or a --max_seq_len below 48"
    )
    assert said(run).count("warning: out of memory in step 1, which computes 2 rows at a time; 1 at a time") == 1


def test_one_of_several_processes_does_not_halve_alone(tmp_path, monkeypatch):
    """The others wait for it in the middle of the step. The sizes that it advises keep the step's rows."""
    run = run_with_room_for(2, tmp_path, batch_size=7, accumulation_steps=4)
    failure = StepFailed(MemoryError())
    run.fallback.stage = dataclasses.replace(run.stage, runtime=dataclasses.replace(run.stage.runtime, world_size=2))
    with pytest.raises(RuntimeError) as error:
        run.fallback.after(failure, 1234)
    assert str(error.value) == (
        "out of memory in step 1,234, which computes 7 rows at a time; continue with --resume, --batch_size 2 and "
        "--accumulation_steps 14"
    )


@pytest.mark.parametrize("again", [True, False])
def test_a_resumed_run_keeps_the_size_that_fitted(tmp_path, again):
    """So it equals the run that was not interrupted, to the bit. Other sizes that are asked for are obeyed."""
    whole = run_with_room_for(4, tmp_path / "whole", after=2)
    whole.fit()
    interrupt_at(run_with_room_for(4, tmp_path / "parts", after=2), 6)
    assert load_training_state(whole.checkpoints.state_folder).values["lowered_batch_size"] == 3
    sizes = {} if again else {"batch_size": 4, "accumulation_steps": 3}
    resumed = run_with_room_for(99, tmp_path / "parts", resume=True, **sizes)
    resumed.fit()
    assert resumed.progress.step == 5
    kept = "note: 3 rows at a time, because memory did not suffice for more before" in said(resumed)
    assert (kept, resumed.plan.batch_size) == ((True, 3) if again else (False, 4))
    if again:
        assert_same_bits(weights_of(resumed.learner.model), weights_of(whole.learner.model))


def test_a_validation_out_of_memory_uses_the_same_rows_fewer_at_a_time(tmp_path):
    """9 rows at a time are 3 and then 1: so many that the rows of all batches are the same."""
    found = {}
    for room in (99, 2):
        run = make_run(tmp_path / str(room), batch_size=9, eval_batches=1)

        def objective(model, batch, room=room):
            if len(batch.input_ids) > room:
                raise MemoryError
            return next_token_loss(model, batch)

        run.learner.objective = objective
        data = Rows(20, seed=3)
        found[room] = [run.validate(data)["validation_loss"] for _ in range(2)]
    assert found[99] == pytest.approx(found[2], rel=1e-6)
    lines = [line for line in said(run).splitlines() if "out of memory" in line]
    what = "warning: out of memory in a validation of"
    assert lines == [
        f"{what} 9 rows at a time; 3 at a time from now on",
        f"{what} 3 rows at a time; 1 at a time from now on",
    ]
    run.learner.objective = lambda model, batch: (_ for _ in ()).throw(MemoryError())
    with pytest.raises(MemoryError):
        run.validate(Rows(20, seed=3))


def test_memory_may_run_out_in_other_places_too(tmp_path):
    """Nothing can be halved there: one line says what to do. A sample is left out."""
    run = make_run(tmp_path / "a", max_steps=2)
    run.learner.sample = lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to"))
    run.fit()
    assert "warning: no sample (CUDA out of memory. Tried to)" in said(run)
    run = make_run(tmp_path / "b", max_steps=5, max_seq_len=40)
    run.learner.optimizers[0].step = lambda: (_ for _ in ()).throw(OUT_OF_MEMORY[1])
    with pytest.raises(
        RuntimeError, match=r"^out of memory after 0 steps \(.*\); continue with --resume and a smaller"
    ):
        run.fit()
    run = make_run(tmp_path / "c", max_steps=5, max_seq_len=40)
    run.learner.objective = lambda model, batch: (_ for _ in ()).throw(MemoryError())
    with pytest.raises(
        RuntimeError, match="^out of memory with a single row; choose a .*, or a --max_seq_len below 40$"
    ):
        run.fit()


# --- torch.compile ---------------------------------------------------------------------------------------------------

QUIET = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def compile_with(run: Run, backend) -> None:
    """Let the run compile with a backend of ours, batches of all shapes."""
    compile_model = type(run.learner.model).compile_for_training
    run.learner.model.compile_for_training = lambda *_: compile_model(run.learner.model, False, backend=backend)


@QUIET
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("good_graphs", [0, 1])
def test_a_model_that_cannot_be_compiled_trains_eagerly_to_the_same_bits(tmp_path, monkeypatch, dropout, good_graphs):
    """In the first step, or where an epoch's last step has another shape: no step is left out or done twice.

    An eager run cuts a batch into parts for two cores, which changes the order of its sums; so must this one.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(gradients, "num_cores", lambda device: 2)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        if len(graphs) > good_graphs:
            raise OSError(28, "No space left on device", "größe")
        return graph.forward

    same = {"dropout": dropout, "max_steps": 7, "batch_size": 4}
    run, eager = (make_run(tmp_path / name, use_compile=name == "run", **same) for name in ("run", "eager"))
    compile_with(run, backend)
    run.fit()
    lines = [line for line in said(run).splitlines() if "compile" in line and " device " not in line]
    line = "warning: torch.compile failed (OSError: [Errno 28] No space left on device: 'größe'); the run continues"
    assert lines[-1] == f"{line} eagerly" and len(lines) == 1 + good_graphs, lines
    assert len(graphs) == 1 + good_graphs and not run.learner.model.is_compiled
    eager.fit()
    assert [record["step"] for record in records(tmp_path / "run")] == [
        record["step"] for record in records(tmp_path / "eager")
    ]
    if not good_graphs:
        assert eager.plan.at_once == run.plan.at_once == (1 if dropout else 2)
        assert records(tmp_path / "run") == records(tmp_path / "eager")
        assert_same_bits(weights_of(run.learner.model), weights_of(eager.learner.model))
    for name, weight in weights_of(run.learner.model).items():
        torch.testing.assert_close(weight, weights_of(eager.learner.model)[name], atol=1e-4, rtol=1e-3)


def test_a_torch_that_cannot_compile_at_all_trains_eagerly(tmp_path):
    run = make_run(tmp_path, use_compile=True, max_steps=2)

    def fail(*_):
        raise ModuleNotFoundError("No module named 'torch._inductor'")

    run.learner.model.compile_for_training = fail
    run.fit()
    line = "warning: torch.compile failed (ModuleNotFoundError: No module named 'torch._inductor'); the run continues"
    assert f"{line} eagerly" in said(run).splitlines() and "compiled in" not in said(run)


@QUIET
def test_only_whole_micro_batches_run_compiled(tmp_path, monkeypatch):
    """An epoch's last step has a row less; to compile it took as long as hundreds of its steps."""
    run = make_run(tmp_path, use_compile=True, max_steps=9, dropout=0.0, batch_size=2)
    model, shapes = run.learner.model, []
    monkeypatch.setattr(model.model, "compile", lambda **_: setattr(model.model, "_compiled_call_impl", compiled))

    def compiled(input_ids, *others):
        shapes.append(tuple(input_ids.shape))
        return model.model._call_impl(input_ids, *others)

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    run.fit()
    batches = [tuple(b.input_ids.shape) for step in itertools.islice(run.plan.batches(0), 9) for b in step]
    whole = batches[0]
    assert set(shapes) == {whole} and len(shapes) == batches.count(whole) == 14 and len(set(batches)) == 2


def test_batches_that_all_differ_are_not_compiled(tmp_path):
    """Preference pairs: each batch was a compilation of its own, until torch gave up."""
    run = make_run(tmp_path, use_compile=True, max_steps=2, dropout=0.0)
    run.learner.model.compile_for_training = lambda *_: pytest.fail("compiled")
    plain, lengths = run.plan.batches, itertools.count(10)
    run.plan.batches = lambda start: (
        [
            dataclasses.replace(b, **{name: getattr(b, name)[:, :length] for name in WIDE})
            for b, length in zip(step, lengths, strict=False)
        ]
        for step in plain(start)
    )
    run.fit()
    lines = [line for line in said(run).splitlines() if "compile" in line and " device " not in line]
    assert lines == [
        "note: every batch has another shape, which torch.compile would compile each; the run is eager"
    ] and not run.plan.compiled  # fmt: skip


WIDE = ("input_ids", "targets", "position_ids", "document_ids")


def test_auto_does_not_speak_of_batches_that_all_differ(tmp_path, monkeypatch):
    run = long_run(tmp_path, monkeypatch, max_steps=2)
    shapes = iter([None])
    run.fallback._shape = lambda: next(shapes)
    run.learner.model.compile_for_training = lambda *_: pytest.fail("compiled")
    run.fit()
    assert "compile" not in said(run) and not run.plan.compiled


def long_run(folder, monkeypatch, seconds=3600.0, compiler="/usr/bin/größe++", **changes) -> Run:
    """A run that is expected to take so long; to compile it does nothing."""
    monkeypatch.setattr("tinylm.trainer.run.run.expected_seconds", lambda *_: seconds)
    monkeypatch.setattr("tinylm.trainer.run.fallback.cpp_compiler", lambda: compiler)
    run = make_run(folder, **{"dropout": 0.0, "max_steps": 5, **changes})
    run.learner.model.compile_for_training = lambda *_: None
    return run


def test_auto_compiles_a_long_run_and_a_resumed_run_computes_as_before(tmp_path, monkeypatch):
    """The two ways to compute differ in the last bits, so the state keeps which one it was."""
    interrupt_at(long_run(tmp_path / "long", monkeypatch), 4)
    interrupt_at(long_run(tmp_path / "short", monkeypatch, seconds=60.0), 4)
    for name, seconds, compiled in (("long", 60.0, True), ("short", 3600.0, False)):
        run = long_run(tmp_path / name, monkeypatch, seconds, resume=True)
        run.fit()
        assert run.progress.step == 3 and run.plan.compiled is compiled
        assert ("cpu, float32, compiled" in said(run)) is ("compiled in the first step" in said(run)) is compiled
        lineage = json.loads((tmp_path / name / "pretrain_16_epoch1" / "lineage.json").read_text())
        assert lineage.get("compiled", False) is compiled


@pytest.mark.parametrize(("asked", "compiled"), [(True, True), (False, False)])
def test_a_resumed_run_obeys_a_flag_that_is_given(tmp_path, monkeypatch, asked, compiled):
    interrupt_at(long_run(tmp_path, monkeypatch, seconds=60.0 if asked else 3600.0), 4)
    run = long_run(tmp_path, monkeypatch, resume=True, use_compile=asked)
    run.fit()
    assert run.progress.step == 3 and run.plan.compiled is compiled


def test_auto_does_not_compile_in_several_processes(tmp_path, monkeypatch):
    """One in which it fails in the middle of a step leaves the others waiting."""
    for ranks, compiled in (((0, 1), True), ((0, 2), False)):
        run = long_run(tmp_path, monkeypatch, ranks=ranks)
        run.fallback.decide_to_compile(3600.0)
        assert run.plan.compiled is compiled


def test_auto_without_a_compiler_says_what_one_would_gain(tmp_path, monkeypatch):
    run = long_run(tmp_path, monkeypatch, compiler=None)
    run.learner.model.compile_for_training = lambda *_: pytest.fail("compiled")
    run.fit()
    lines = [line for line in said(run).splitlines() if "note" in line]
    assert lines == ["note: a C++ compiler, such as g++, would make this run faster, but there is none"]
    assert not run.plan.compiled


@QUIET
def test_what_fails_eagerly_too_is_the_error_that_it_is(tmp_path):
    """The first line blames the compiler; the error that ends the run is then the model's own."""
    run = make_run(tmp_path, use_compile=True, max_steps=2, dropout=0.0)
    compile_with(run, lambda graph, inputs: graph.forward)
    objective = run.learner.objective

    def broken(model, batch):
        if model.is_compiled or run.steps_done or not run.plan.compiled:
            raise ValueError("position_ids reach 77")
        return objective(model, batch)

    run.learner.objective = broken
    with pytest.raises(ValueError, match="position_ids reach 77"):
        run.fit()


@QUIET
def test_a_compiled_run_out_of_memory_stays_compiled(tmp_path):
    torch._dynamo.reset()
    run = run_with_room_for(3, tmp_path, use_compile=True, dropout=0.0, max_steps=2)
    compile_with(run, lambda graph, inputs: graph.forward)
    run.fit()
    assert "6 rows at a time; 3 at a time" in said(run) and run.learner.model.is_compiled
    assert (run.plan.at_once, run.plan.source.sampler.batch_size) == (1, 3)


@QUIET
def test_several_processes_change_to_eager_together_before_the_first_step(tmp_path, monkeypatch):
    """One that fails alone would leave the others waiting. The pass that tries it leaves no trace."""
    torch._dynamo.reset()
    for fails_here in (True, False):
        run = make_run(tmp_path, ranks=(1, 2), use_compile=True)
        asked = []
        monkeypatch.setattr(Runtime, "any_rank", lambda self, flag, asked=asked: asked.append(flag) or True)

        def backend(graph, inputs, fails_here=fails_here):
            if fails_here:
                raise RuntimeError("no compiler")
            return graph.forward

        compile_with(run, backend)
        state = torch.get_rng_state()
        run.fallback.compile()
        reason = "RuntimeError: no compiler" if fails_here else "in another process"
        assert said(run) == f"warning: torch.compile failed ({reason}); the run continues eagerly\n"
        assert asked == [fails_here] and not run.learner.model.is_compiled and run.plan.at_once == 1
        assert all(p.grad is None for p in run.learner.model.parameters())
        assert torch.equal(state, torch.get_rng_state())
    failure = StepFailed(RuntimeError("disk full"))
    with pytest.raises(RuntimeError) as error:
        run.fallback.after(failure, 7)
    assert str(error.value) == (
        "step 7: torch.compile failed (RuntimeError: disk full); continue with --resume and --use_compile 0"
    )
