"""Objectives against their equations in float64, computed one token at a time."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from trainer_parts import batch_of, num_targets, pairs_batch, random_documents, reference_log_prob, small_model

from tinylm.model.model_tinylm import Block
from tinylm.trainer.core.objectives import dpo_loss, make_dpo_objective, next_token_loss, sequence_log_probs


def test_next_token_loss_is_the_sum_over_the_targets():
    """Packed two to a row: equal to each document alone, each target from the tokens before it."""
    model, documents = small_model(), random_documents(6)
    batch = batch_of(documents)
    loss, metrics = next_token_loss(model, batch)
    expected = -sum(reference_log_prob(model, *document) for document in documents)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert batch.count == num_targets(batch) == sum(int(mask.sum()) for _, mask in documents)
    assert metrics == {}


def test_log_probs_are_those_of_the_next_token():
    """The original project shifted twice, so DPO scored the token two ahead.

    Every document is scored at one place only; the reference never sees the token it scores, nor any after it.
    """
    model, documents = small_model(), random_documents(8)
    for ids, mask in documents:
        mask[:] = False
        mask[len(ids) // 2] = True
    found = sequence_log_probs(model, pairs_batch(documents), 8)
    expected = [reference_log_prob(model, *document) for document in documents]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=1e-5)


def test_only_the_answer_is_scored():
    """What stands in the prompt changes the condition, never the number of terms."""
    model, documents = small_model(), random_documents(4)
    for _, mask in documents:
        mask[:] = False
        mask[-2:] = True
    found = sequence_log_probs(model, pairs_batch(documents), 4)
    for (ids, mask), value in zip(documents, found.tolist(), strict=True):
        assert value == pytest.approx(reference_log_prob(model, ids, mask), rel=1e-5)
        mask[:] = True  # the same sum over everything is another number
        assert value != pytest.approx(reference_log_prob(model, ids, mask), rel=1e-2)


def test_dpo_loss_is_equation_7():
    """Two pairs by hand: -log(1 / (1 + exp(-beta * ((w - w_ref) - (l - l_ref)))))."""
    policy, reference = [(-10.0, -12.0), (-7.5, -3.25)], [(-11.0, -11.5), (-7.0, -4.0)]
    losses, chosen, rejected = dpo_loss(
        torch.tensor(policy, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64), beta=0.3
    )
    for i, ((w, lose), (w_ref, lose_ref)) in enumerate(zip(policy, reference, strict=True)):
        inner = 0.3 * ((w - w_ref) - (lose - lose_ref))
        assert losses[i].item() == pytest.approx(-math.log(1 / (1 + math.exp(-inner))), rel=1e-12)
        assert chosen[i].item() == pytest.approx(0.3 * (w - w_ref), rel=1e-12)
        assert rejected[i].item() == pytest.approx(0.3 * (lose - lose_ref), rel=1e-12)


def test_dpo_objective_is_the_equation_on_whole_documents():
    model, documents = small_model(), random_documents(6)
    log_probs = torch.tensor([reference_log_prob(model, *d) for d in documents], dtype=torch.float64).view(3, 2)
    reference = log_probs + torch.tensor([[0.5, -1.0], [2.0, 0.25], [-1.5, 3.0]], dtype=torch.float64)
    loss, metrics = make_dpo_objective(0.2)(model, pairs_batch(documents, reference.float()))
    inner = 0.2 * ((log_probs - reference)[:, 0] - (log_probs - reference)[:, 1])
    assert loss.item() == pytest.approx(float(torch.log1p(torch.exp(-inner)).sum()), rel=1e-5)
    assert metrics["reward_margin"].item() == pytest.approx(float(inner.sum()), rel=1e-4)
    assert metrics["preference_accuracy"].item() == float((inner > 0).sum())
    assert metrics["log_prob_chosen"].item() == pytest.approx(float(log_probs[:, 0].sum()), rel=1e-5)
    assert metrics["log_prob_rejected"].item() == pytest.approx(float(log_probs[:, 1].sum()), rel=1e-5)


def test_dpo_raises_the_chosen_and_lowers_the_rejected():
    """At the start the policy is the reference: the loss is log 2 a pair, and a step pulls the two apart."""
    model, documents = small_model(), random_documents(8)
    with torch.no_grad():
        before = sequence_log_probs(model, pairs_batch(documents), 8).view(4, 2)
    loss, metrics = make_dpo_objective(0.1)(model, pairs_batch(documents, before))
    assert loss.item() == pytest.approx(4 * math.log(2), rel=1e-6)
    assert metrics["preference_accuracy"].item() == 0.0  # equal is not preferred
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
        moved = sequence_log_probs(model, pairs_batch(documents), 8).view(4, 2).sum(0) - before.sum(0)
    assert moved[0] > 0 > moved[1]


@pytest.mark.parametrize("name", ["next_token", "dpo"])
def test_a_batch_without_targets_adds_exactly_nothing(name):
    """In the original project a batch with every target masked gave a loss of 0 / 0, and NaN weights."""
    model, documents = small_model(), random_documents(4)
    batch = batch_of(documents) if name == "next_token" else pairs_batch(documents, torch.zeros(2, 2))
    objective = next_token_loss if name == "next_token" else make_dpo_objective(0.1)
    loss, metrics = objective(model, batch.without_targets())
    loss.backward()
    assert loss.item() == 0.0 and all(value.item() == 0.0 for value in metrics.values())
    for parameter in model.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("beta", [0.0, -0.1])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match=r"beta is .*; expected a positive number.*--beta 0.1"):
        make_dpo_objective(beta)


class LoadBalancedBlock(Block):
    """A block with an auxiliary loss: a twentieth of the mean square of what comes in."""

    def forward(self, x, context):
        context.add_auxiliary_loss("activity_loss", x.square().mean() / 20)
        return super().forward(x, context)


def model_with_auxiliary_loss():
    """Two such blocks, and what their losses should add up to: computed from the blocks' inputs."""
    model = small_model(num_hidden_layers=2)
    seen = []
    for layer in model.model.layers:
        layer.__class__ = LoadBalancedBlock
        layer.register_forward_pre_hook(
            lambda module, arguments: seen.append(arguments[0].detach().square().mean() / 20)
        )
    return model, seen


@pytest.mark.parametrize("name", ["next_token", "dpo"])
def test_auxiliary_losses_are_trained_and_reported(name):
    """In training they are added, weighted as the targets are; on held-out data they are reported only."""
    documents = random_documents(6)
    batch = batch_of(documents) if name == "next_token" else pairs_batch(documents, torch.zeros(3, 2))
    objective = next_token_loss if name == "next_token" else make_dpo_objective(0.2)
    plain, _ = objective(small_model(num_hidden_layers=2), batch)
    model, seen = model_with_auxiliary_loss()
    loss, metrics = objective(model, batch)
    expected = batch.count * sum(seen)
    assert torch.equal(loss, plain) and expected > 0.01
    torch.testing.assert_close(metrics["activity_loss"], expected)
    loss, metrics = objective(model.train(), batch)
    torch.testing.assert_close(loss.detach(), plain.detach() + expected)
    assert not metrics["activity_loss"].requires_grad
    with_auxiliary = torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]
    without = torch.autograd.grad(objective(model.eval(), batch)[0], model.model.embed_tokens.weight)[0]
    assert (with_auxiliary - without).abs().max() > 1e-4


def test_auxiliary_losses_of_passes_side_by_side_do_not_mix():
    """Micro-batches run in threads on one model."""
    model, _ = model_with_auxiliary_loss()
    batches = [batch_of(random_documents(6, seed)) for seed in range(8)]
    alone = [next_token_loss(model, batch)[1]["activity_loss"] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: next_token_loss(model, batch)[1]["activity_loss"], batches))
    assert together == alone and len(set(map(float, alone))) == 8
