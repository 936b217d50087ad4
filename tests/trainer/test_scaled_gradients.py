"""fp16 trains with a gradient scaler: what it scales up is scaled down again before anybody looks at it."""

from __future__ import annotations

import pytest
import torch
from trainer_parts import Rows, assert_same_bits, small_model, weights_of

from tinylm.dataset.batches import BatchSampler, step_batches
from tinylm.system.runtime import Runtime
from tinylm.trainer.core.loop import StepReport, fit
from tinylm.trainer.core.objectives import next_token_loss

SCALE = 2.0**12
"""A power of two changes no digit of a float32, so a scaled run must give the bits of an unscaled one."""


def train(scaler: torch.amp.GradScaler | None, grad_clip: float, objective=next_token_loss):
    """(weights, reports) after three steps of plain gradient descent on a CPU."""
    model, reports = small_model(), list[StepReport]()
    batches = step_batches(Rows(12), BatchSampler(12, 2, 4, seed=5))
    fit(
        model, objective, [torch.optim.SGD(model.parameters())], lambda _: 0.5, batches,
        Runtime(torch.device("cpu"), torch.float32), 3, grad_clip=grad_clip, on_step=(reports.append,), scaler=scaler,
    )  # fmt: skip
    return weights_of(model), reports


@pytest.mark.parametrize("grad_clip", [0.05, 0.0])
def test_gradients_are_unscaled_before_they_are_clipped(grad_clip):
    """Clipped first, a gradient of norm 4096 x 0.3 is cut to 0.05 and then divided by 4096: training stands still."""
    plain, expected = train(None, grad_clip)
    scaled, reports = train(torch.amp.GradScaler("cpu", init_scale=SCALE), grad_clip)
    assert_same_bits(scaled, plain)
    assert [report.grad_norm for report in reports] == [report.grad_norm for report in expected]
    assert all(report.grad_norm > 2 * 0.05 for report in reports), "clipping has something to clip"
    assert [report.loss for report in reports] == [report.loss for report in expected]


def test_a_step_that_overflows_changes_nothing_and_halves_the_scale():
    def overflows(model, batch):
        loss, metrics = next_token_loss(model, batch)
        return loss * torch.finfo(torch.float32).max, metrics

    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    weights, reports = train(scaler, 0.05, overflows)
    assert_same_bits(weights, weights_of(small_model()))
    assert scaler.get_scale() == SCALE / 2**3 and len(reports) == 3
