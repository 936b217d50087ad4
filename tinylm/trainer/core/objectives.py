"""Training objectives: pure functions of a model and a batch.

Every objective has one signature, `objective(model, batch) -> (loss_sum, metrics)`. `loss_sum` is a *sum* over
the batch's targets (or preference pairs), never a mean: the training loop divides by the global count, so a batch
of 8 rows, 8 batches of 1 and 2 ranks with 4 rows each give the same gradient, to rounding. `metrics` holds further
sums, divided by the same count when they are reported.

Shapes: B batch, T time, C width, V vocabulary, N positions with a target, P preference pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from tinylm.dataset.batches import IGNORE_INDEX, Batch
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.runtime import to_device

Objective = Callable[[TinyLMForCausalLM, Batch], tuple[Tensor, dict[str, Tensor]]]


class TargetScores(NamedTuple):
    """The result of `score_targets`.

    log_probs: [N] float32.
    positions: [N] flat positions (into B*T) of the targets, on the CPU.
    auxiliary_losses: scalars by name (see `BackboneOutput`).
    """

    log_probs: Tensor
    positions: Tensor
    auxiliary_losses: dict[str, Tensor]


def score_targets(model: TinyLMForCausalLM, batch: Batch) -> TargetScores:
    """Log-probability of every target token.

    Only positions that have a target go through the output head: in a chat most tokens are the user's, and the
    head is a large share of a tiny model's work.
    """
    hidden, auxiliary_losses = model.run_backbone(batch.input_ids, batch.position_ids, batch.document_ids)  # [B, T, C]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    targets = batch.targets.reshape(-1)
    positions = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    if len(positions) < len(targets):
        hidden = hidden[to_device(positions, hidden.device)]
        targets = targets[positions]
    log_probs = model.target_log_probs(hidden, to_device(targets, hidden.device))
    return TargetScores(log_probs, positions, auxiliary_losses)


def with_auxiliary_losses(
    loss_sum: Tensor, losses: dict[str, Tensor], count: int, is_training: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss_sum` with `count` times each auxiliary loss, and the same as metrics.

    The loop divides a loss sum by the global count, so the loss includes the mean of an auxiliary loss over the
    micro-batches. Outside training it is only reported: the loss on held-out data measures only the predictions.
    """
    sums = {name: count * loss for name, loss in losses.items()}
    for value in sums.values() if is_training else ():
        loss_sum = loss_sum + value
    return loss_sum, {name: value.detach() for name, value in sums.items()}


def next_token_loss(model: TinyLMForCausalLM, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the next token, in nats, summed over the targets: -sum_t log p(target_t | input_<=t).

    The shift by one is in the data set: `input_ids[b, t]` predicts `targets[b, t]`, -100 is ignored.
    """
    log_probs, _, auxiliary_losses = score_targets(model, batch)
    return with_auxiliary_losses(-log_probs.sum(), auxiliary_losses, batch.count, model.training)


def sequence_log_probs(model: TinyLMForCausalLM, batch: Batch, num_sequences: int) -> Tensor:
    """Summed log-probability of each packed document's targets, [num_sequences] float32.

    `batch.document_ids` numbers the documents of the batch from 0; the sum runs over a document's target tokens
    only (the answer), so a prompt costs nothing.
    """
    return sum_by_document(score_targets(model, batch), batch, num_sequences)


def sum_by_document(scores: TargetScores, batch: Batch, num_sequences: int) -> Tensor:
    """[num_sequences] the log-probabilities of `batch`'s targets, summed over each packed document."""
    documents = to_device(batch.document_ids.reshape(-1)[scores.positions], scores.log_probs.device)
    return scores.log_probs.new_zeros(num_sequences).index_add(0, documents, scores.log_probs)


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Direct Preference Optimization, the sigmoid loss of equation 7 (Rafailov et al. 2023, arXiv:2305.18290).

        loss = -log sigmoid(beta * [(log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))])

    Args:
        policy: [P, 2] summed log-probabilities of the chosen (column 0) and rejected (column 1) answers.
        reference: [P, 2] the same under the frozen reference model.
        beta: strength of the pull towards the reference; 0.1 to 0.5 are usual.

    Returns:
        losses [P], chosen rewards [P] and rejected rewards [P], where reward = beta * (log pi - log ref).
    """
    rewards = beta * (policy - reference)
    chosen, rejected = rewards.unbind(-1)
    return -F.logsigmoid(chosen - rejected), chosen, rejected


def make_dpo_objective(beta: float) -> Objective:
    """DPO as a training objective; needs the extra "reference_log_probs" [P, 2], computed once before training.

    Raises:
        ValueError: if beta is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}; expected a positive number such as 0.1; pass --beta 0.1")

    def objective(model: TinyLMForCausalLM, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        scores = score_targets(model, batch)
        policy = sum_by_document(scores, batch, 2 * batch.count).view(batch.count, 2)
        losses, chosen, rejected = dpo_loss(policy, batch.extras["reference_log_probs"].to(policy), beta)
        metrics = {
            "reward_margin": (chosen - rejected).detach().sum(),
            "preference_accuracy": (chosen > rejected).float().sum(),
            "log_prob_chosen": policy[:, 0].detach().sum(),
            "log_prob_rejected": policy[:, 1].detach().sum(),
        }
        loss_sum, auxiliary = with_auxiliary_losses(losses.sum(), scores.auxiliary_losses, batch.count, model.training)
        return loss_sum, {**metrics, **auxiliary}

    return objective
