"""Training states: exact, verified, the newest whole one found, written beside training."""

from __future__ import annotations

import errno
import json
import threading

import pytest
import torch

from tests.checkpoint.saved_states import save_state
from tests.model.small_models import random_ids, small_model
from tinylm.checkpoint import training_state
from tinylm.checkpoint.training_state import (
    StateWriter,
    discard_latest_state,
    load_training_state,
    read_training_values,
)
from tinylm.files.atomic import write_manifest
from tinylm.model.weights import weights_fingerprint


def nested_state() -> dict:
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(4, 4)
    groups = [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0, 11], "foreach": None}]
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(3, 5)}, 11: {}}
    return {
        "optimizer": {"state": moments, "param_groups": groups},
        "rng": generator.get_state(),
        "python_rng": (3, (1, 2**40, 3), None),
        "half": torch.randn(3).to(torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "int": torch.tensor(2**40),
        "view": shared[:, 1],
        "transposed": shared.T,
        "again": shared,
        "empty": torch.zeros(0, 3),
        "step": 12,
        "loss": 0.1 + 0.2,
        "best": float("inf"),
        "done": False,
        "name": "naïve — 模型",
        "__odd__": {"__tensor__": "not a tensor"},
        "list": [1, [2.5, "x"], {}],
    }


def assert_same(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_training_state_comes_back_exactly(tmp_path):
    state = nested_state()
    place = save_state(tmp_path / "state", state)
    assert {path.name for path in place.iterdir()} == {"state.safetensors", "state.json", "manifest.json"}
    assert_same(load_training_state(tmp_path / "state").values, state)
    (place / "state.safetensors").unlink()
    assert_same(read_training_values(tmp_path / "state"), without_tensors(state))


def without_tensors(value):
    if isinstance(value, dict):
        return {key: without_tensors(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_tensors(item) for item in value)
    return None if isinstance(value, torch.Tensor) else value


def test_an_optimizer_resumes_bit_for_bit(tmp_path):
    def make():
        torch.manual_seed(0)
        model = small_model()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        model(random_ids(1, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    step(model, optimizer, 1)
    save_state(tmp_path / "s", {"step": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
    step(model, optimizer, 2)
    expected = weights_fingerprint(model)
    model, optimizer = make()
    state = load_training_state(tmp_path / "s").values
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    step(model, optimizer, 2)
    assert weights_fingerprint(model) == expected


def test_one_damaged_byte_in_any_file_is_found_and_the_state_before_is_taken(tmp_path):
    folder = tmp_path / "state"
    for step in (1, 2):
        save_state(folder, {**nested_state(), "step": step})
    newest = folder / "step_00000002"
    assert load_training_state(folder).folder == newest
    for name in ("state.safetensors", "state.json", "manifest.json"):
        good = (newest / name).read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1
        for bad in (bytes(flipped), good[:-9], b""):
            (newest / name).write_bytes(bad)
            found = load_training_state(folder)
            assert found.values["step"] == 1, name
            assert len(found.damaged) == 1 and str(newest) in found.damaged[0]
        (newest / name).unlink()
        assert load_training_state(folder).values["step"] == 1
        (newest / name).write_bytes(good)
    (folder / "step_00000001" / "state.json").unlink()
    assert load_training_state(folder).values["step"] == 2
    (newest / "state.json").unlink()
    with pytest.raises(ValueError, match=r"every state in .* is damaged: .*00000002.*; .*00000001"):
        load_training_state(folder)
    with pytest.raises(FileNotFoundError, match="no training state to resume from"):
        load_training_state(tmp_path / "none")


@pytest.mark.parametrize("latest", ["gone", "", "step_00000009", "../elsewhere", b"\xff"])
def test_a_lost_latest_costs_nothing(tmp_path, latest):
    for step in (1, 2):
        save_state(tmp_path, {"step": step})
    assert (tmp_path / "latest").read_text() == "step_00000002"
    (tmp_path / "latest").unlink()
    if latest != "gone":
        (tmp_path / "latest").write_bytes(latest if isinstance(latest, bytes) else latest.encode())
    assert load_training_state(tmp_path).values == {"step": 2}


def test_a_state_that_is_not_published_is_not_taken(tmp_path):
    """Its folder has its name already, and the writer was killed before `latest` moved."""
    save_state(tmp_path, {"step": 1})
    save_state(tmp_path, {"step": 2})
    (tmp_path / "latest").write_text("step_00000001")
    assert load_training_state(tmp_path).values == {"step": 1}


def test_two_states_stay_and_nothing_half_written(tmp_path):
    for step in (1, 2, 3):
        save_state(tmp_path, {"step": step})
    (tmp_path / ".step_00000004.abc.tmp").mkdir()
    (tmp_path / ".step_00000004.abc.tmp" / "state.safetensors").write_bytes(b"half")
    (tmp_path / ".latest.abc.tmp").write_bytes(b"half")  # each kill once left one of these for good
    save_state(tmp_path, {"step": 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003", "step_00000004"]
    save_state(tmp_path, {"step": 2})  # a run that was started over
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002"]


def test_a_state_that_turns_out_useless_is_discarded(tmp_path):
    """It gives way to the one before it, in favour of which the next save deletes it. The only one stays."""
    save_state(tmp_path, {"step": 1})
    discard_latest_state(tmp_path, 1)
    assert load_training_state(tmp_path).values == {"step": 1}
    save_state(tmp_path, {"step": 2})
    discard_latest_state(tmp_path, 3)  # there is none
    assert load_training_state(tmp_path).values == {"step": 2}
    (tmp_path / "latest").write_text("step_00000001")
    discard_latest_state(tmp_path, 3)
    assert load_training_state(tmp_path).values == {"step": 1}
    discard_latest_state(tmp_path, 2)
    assert load_training_state(tmp_path).values == {"step": 1}


def test_the_previous_state_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    save_state(tmp_path, {"step": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(
        "tinylm.checkpoint.training_state.write_manifest", lambda _: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        save_state(tmp_path, {"step": 2})
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_state_of_an_older_version_is_named(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="a training state of an older version; choose another --output_dir"):
        load_training_state(tmp_path)


def test_what_is_saved_beside_training_is_what_it_was_when_save_was_called(tmp_path, monkeypatch):
    """Training goes on while the thread copies and writes: the next update waits for the copy, and no longer."""
    copying, writing, order = threading.Event(), threading.Event(), []
    copy, write = training_state._copy, training_state.write_tensors

    def slow_copy(tensor, memory):
        assert copying.wait(300)
        order.append("copied")
        return copy(tensor, memory)

    def slow_write(path, tensors):
        assert writing.wait(300)
        order.append("written")
        write(path, tensors)

    monkeypatch.setattr(training_state, "_copy", slow_copy)
    monkeypatch.setattr(training_state, "write_tensors", slow_write)
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    writer = StateWriter(tmp_path, [optimizer], before=lambda: order.append("flushed"))
    for step in (1, 2):
        assert writer.save({"step": step, "weight": weight.detach()}) is None
        weight.grad = torch.ones(3)
        threading.Timer(0.2, copying.set).start()
        optimizer.step()
        order.append("updated")
        copying.clear()
        writing.set()
    assert writer.wait() is None
    assert weight.tolist() == [-2.0] * 3
    assert load_training_state(tmp_path).values["weight"].tolist() == [-1.0] * 3
    (tmp_path / "latest").write_text("step_00000001")
    assert load_training_state(tmp_path).values["weight"].tolist() == [0.0] * 3
    assert order.index("copied") < order.index("updated") < order.index("written")
    assert order.index("flushed") < order.index("written")
    assert 0 < writer.seconds < 30
    writer.close()
    assert not optimizer._optimizer_step_pre_hooks  # a model that is trained further waits for nobody


def test_the_memory_of_a_copy_is_used_again_only_for_its_like(tmp_path):
    """Fresh memory costs twice the copying; memory of another shape or type would change the numbers."""
    writer = StateWriter(tmp_path)
    first = {"same": torch.tensor([1.5, 2.5]), "wider": torch.ones(1), "finer": torch.tensor([1.1]).to(torch.bfloat16)}
    second = {"same": torch.tensor([3.5, -4.5]), "wider": torch.tensor([7.5, 8.5]), "finer": torch.tensor([1.1])}
    writer.save({"step": 1, **first})
    assert writer.wait() is None
    memory = writer._copies["same"].data_ptr()
    writer.save({"step": 2, **second})
    assert writer.wait() is None and writer._copies["same"].data_ptr() == memory
    assert_same(load_training_state(tmp_path).values, {"step": 2, **second})
    (tmp_path / "latest").write_text("step_00000001")
    assert_same(load_training_state(tmp_path).values, {"step": 1, **first})


def test_a_state_of_another_format_is_refused(tmp_path):
    place = save_state(tmp_path, {"step": 7})
    (place / "state.json").write_text(json.dumps({"format": 3, "state": {"step": 7}}))
    write_manifest(place)
    with pytest.raises(ValueError, match=r"state.json has format 3; expected 2: this version of tinylm cannot read it"):
        load_training_state(tmp_path)


def test_a_save_that_fails_is_told_once_and_the_next_one_counts(tmp_path, monkeypatch):
    fail = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(training_state, "write_tensors", lambda *_: (_ for _ in ()).throw(fail))
    writer = StateWriter(tmp_path)
    assert writer.save({"step": 1}) is None
    assert writer.save({"step": 2}) is fail
    assert writer.wait() is fail and writer.wait() is None
    monkeypatch.undo()
    assert writer.save({"step": 3}) is None and writer.wait() is None
    assert load_training_state(tmp_path).values == {"step": 3}


def test_values_that_could_not_come_back_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"data\[1\] is a set"):
        save_state(tmp_path / "s", {"step": 1, "data": [1, {2}]})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "record",
    [{"step": "7"}, {"step": 7, "a": {"__tuple__": 5}}, {"step": 7, "a": {"__items__": [[1]]}},
     {"step": 7, "a": {"__items__": [[{}, 1]]}}, {"step": 7, "a": {"__tensor__": "none"}}, []],
)  # fmt: skip
def test_a_record_that_nobody_here_wrote_is_refused_by_name(tmp_path, record):
    """Found by the fuzzer: a TypeError, or an error that named no file."""
    place = save_state(tmp_path, {"step": 7})
    (place / "state.json").write_text(json.dumps({"format": 2, "state": record}))
    write_manifest(place)
    with pytest.raises(ValueError, match=r"state.json (is not a training state|has format)"):
        load_training_state(tmp_path)
