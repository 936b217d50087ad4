"""Training objectives: pure functions of a model and a batch.

Every objective has one signature, `objective(model, batch) -> (loss_sum, metrics)`. `loss_sum` is a *sum* over
the batch's targets (or preference pairs), never a mean: the training loop divides by the global count, so a batch
of 8 rows, 8 batches of 1 and 2 ranks with 4 rows each give the same gradient, to rounding. `metrics` holds further
sums, divided by the same count when they are reported.

Shapes: B batch, T time, C width, V vocabulary, N positions with a target, P preference pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tinylm.dataset.batches import IGNORE_INDEX, Batch
from tinylm.model.model_tinylm import TinyLMForCausalLM

Objective = Callable[[TinyLMForCausalLM, Batch], tuple[Tensor, dict[str, Tensor]]]


def target_log_probs(model: TinyLMForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of every target token.

    Only positions that have a target go through the output head: in a chat most tokens are the user's, and the
    head is a large share of a tiny model's work.

    Returns:
        log_probs [N] float32, and the flat positions [N] (into B*T) they belong to.
    """
    hidden = model.hidden_states(batch.input_ids, batch.position_ids, batch.document_ids)  # [B, T, C]
    targets = batch.targets.reshape(-1)
    positions = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[positions])  # [N, V]
    log_probs = -F.cross_entropy(logits.float(), targets[positions], reduction="none")
    return log_probs, positions


def next_token_loss(model: TinyLMForCausalLM, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the next token, in nats, summed over the targets: -sum_t log p(target_t | input_<=t).

    The shift by one is in the data set: `input_ids[b, t]` predicts `targets[b, t]`, -100 is ignored.
    """
    log_probs, _ = target_log_probs(model, batch)
    return -log_probs.sum(), {}


def sequence_log_probs(model: TinyLMForCausalLM, batch: Batch, num_sequences: int) -> Tensor:
    """Summed log-probability of each packed document's targets, [num_sequences] float32.

    `batch.document_ids` numbers the documents of the batch from 0; the sum runs over a document's target tokens
    only (the answer), so a prompt costs nothing.
    """
    log_probs, positions = target_log_probs(model, batch)
    documents = batch.document_ids.reshape(-1)[positions]
    return log_probs.new_zeros(num_sequences).index_add(0, documents, log_probs)


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
        reference = batch.extras["reference_log_probs"]
        policy = sequence_log_probs(model, batch, 2 * batch.count).view(batch.count, 2)
        losses, chosen, rejected = dpo_loss(policy, reference.to(policy), beta)
        metrics = {
            "reward_margin": (chosen - rejected).detach().sum(),
            "preference_accuracy": (chosen > rejected).float().sum(),
            "log_prob_chosen": policy[:, 0].detach().sum(),
            "log_prob_rejected": policy[:, 1].detach().sum(),
        }
        return losses.sum(), metrics

    return objective
