"""The output head in blocks of rows, against the equation."""

from __future__ import annotations

import pytest
import torch

from tests.model.small_models import small_model
from tinylm.model import log_probs, model_tinylm
from tinylm.model.log_probs import blocked_head_log_probs, head_log_probs


def inputs(dtype: torch.dtype, rows: int = 37, width: int = 24, vocabulary: int = 301) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = 2.0 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = 0.5 * torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator, dtype=torch.float64)  # of DPO each target has its own
    return [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, upstream]


@pytest.mark.parametrize("rows_in_cache", [1, 5, 37, 1000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 8e-3)], ids=str
)
def test_values_and_gradients_are_those_of_the_equation(rows_in_cache, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(log_probs, "_rows_in_cache", lambda logits: rows_in_cache)
    hidden, weight, targets, upstream = inputs(dtype)
    ours = blocked_head_log_probs(hidden, weight, targets)
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    found = [ours, *torch.autograd.grad(ours, (hidden, weight), upstream.to(ours.dtype))]
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = head_log_probs(*exact, targets)
    for mine, reference in zip(found, [expected, *torch.autograd.grad(expected, exact, upstream)], strict=True):
        assert (mine.double() - reference).norm() <= tolerance * reference.norm()


def test_the_head_of_an_adapter_run_is_frozen_and_a_second_backward_pass_is_refused():
    hidden, weight, targets, upstream = inputs(torch.float32)
    ours = blocked_head_log_probs(hidden, weight.detach(), targets)
    ours.backward(upstream.float(), retain_graph=True)
    assert hidden.grad is not None and weight.grad is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours.backward(upstream.float())


def test_gradients_do_not_change_the_values():
    """DPO compares a policy with the same weights without gradients: equal must be equal to the bit."""
    model = small_model()
    hidden, targets = torch.randn(7, model.config.hidden_size), torch.randint(model.config.vocab_size, (7,))
    with torch.no_grad():
        quiet = model.target_log_probs(hidden, targets)
    trained = model.target_log_probs(hidden, targets)
    assert torch.equal(trained, quiet) and trained.requires_grad and not quiet.requires_grad
    torch.testing.assert_close(quiet, head_log_probs(hidden, model.lm_head.weight, targets))


@pytest.mark.parametrize(("device", "blocks"), [("cpu", 1), ("meta", 0)])
def test_only_a_cpu_takes_blocks(device, blocks, monkeypatch):
    calls = []
    monkeypatch.setattr(
        model_tinylm, "blocked_head_log_probs", lambda *given: calls.append(1) or blocked_head_log_probs(*given)
    )
    model = small_model().to(device)
    hidden = torch.randn(7, model.config.hidden_size, device=device)
    model.target_log_probs(hidden, torch.zeros(7, dtype=torch.int64, device=device))
    assert len(calls) == blocks


@pytest.mark.parametrize("vocabulary", [64, 6400, 2**18, 2**20])
def test_a_block_takes_a_megabyte_and_has_a_row_at_least(vocabulary):
    rows = log_probs._rows_in_cache(torch.empty(3, vocabulary, device="meta"))
    assert rows == 1 or 2**18 - vocabulary < rows * vocabulary <= 2**18
