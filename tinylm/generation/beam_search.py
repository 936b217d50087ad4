"""Beam search: the most probable answer found by following several hypotheses at once.

Shapes: n beams (at most num_beams), V vocabulary.

    score(y) = log P(y | prompt) / |y| ^ length_penalty              (Wu et al. 2016, section 7, in its simple form)

The search equals transformers' `generate(num_beams=...)` with its default stopping rule: same candidates, same scores,
same order. |y| counts the generated tokens, the stop token among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.generation.sampling import repetition_penalty, seen_tokens
from tinylm.model.model_tinylm import TinyLMForCausalLM


@dataclass(frozen=True)
class Hypothesis:
    """One answer found: its tokens (the stop token included, if it ended with one) and its score."""

    ids: list[int]
    score: float


@dataclass
class _Beams:
    """The hypotheses still growing: tokens [n][t] and summed log-probabilities [n], best first."""

    ids: list[list[int]]
    scores: Tensor


@torch.inference_mode()
def beam_search(
    model: TinyLMForCausalLM,
    prompt_ids: list[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    length_penalty: float = 1.0,
    penalty: float = 1.0,
) -> list[Hypothesis]:
    """The `num_beams` best answers to one prompt, best first.

    Args:
        model: in evaluation mode; the prompt and the answer must fit its context.
        length_penalty: above 0 favours longer answers, below 0 shorter ones.
        penalty: repetition penalty on the log-probabilities, as transformers applies it; 1 is off.
    """
    cache = model.new_cache(1, len(prompt_ids) + max_new_tokens)
    beams = _Beams([[]], torch.zeros(1, device=model.device))
    finished: list[Hypothesis] = []
    inputs = torch.tensor([prompt_ids], device=model.device)
    for length in range(1, max_new_tokens + 1):
        logits = model.lm_head(model.hidden_states(inputs, cache=cache)[:, -1])
        log_probs = torch.log_softmax(logits.float(), dim=-1)  # [n, V]
        if penalty != 1.0:
            rows = [prompt_ids + ids for ids in beams.ids]
            log_probs = repetition_penalty(log_probs, seen_tokens(rows, log_probs.shape[-1], log_probs.device), penalty)
        ended, beams, parents = _extend(beams, log_probs, num_beams, stop_ids, length == max_new_tokens)
        finished += [Hypothesis(ids, score / length**length_penalty) for ids, score in ended]
        finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[:num_beams]
        if length == max_new_tokens or _cannot_improve(finished, beams, length, length_penalty, num_beams):
            break
        cache.select_rows(parents)
        inputs = torch.tensor([[ids[-1]] for ids in beams.ids], device=model.device)
    return finished


def _extend(
    beams: _Beams, log_probs: Tensor, num_beams: int, stop_ids: tuple[int, ...], is_last: bool
) -> tuple[list[tuple[list[int], float]], _Beams, list[int]]:
    """Grow every beam by every token and keep the best.

    There are enough candidates to keep `num_beams` growing even if every stop token of every beam ranks first.
    Answers that end here count only if they are among the `num_beams` best candidates: a worse candidate would not
    have been continued either.

    Returns:
        (ids, summed log-probability) of answers that ended; the beams still growing; the row each of them grew from.
    """
    vocab_size = log_probs.shape[-1]
    totals = (beams.scores[:, None] + log_probs).flatten()  # [n * V]
    num_candidates = min(max(2, 1 + len(stop_ids)) * num_beams, len(totals))
    scores, places = totals.topk(num_candidates)
    ended: list[tuple[list[int], float]] = []
    grown: list[list[int]] = []
    parents: list[int] = []
    kept: list[int] = []
    for rank, (score, place) in enumerate(zip(scores.tolist(), places.tolist(), strict=True)):
        parent, token = divmod(place, vocab_size)
        ids = [*beams.ids[parent], token]
        if token in stop_ids or is_last:
            if rank < num_beams:
                ended.append((ids, score))
        elif len(grown) < num_beams:
            grown.append(ids)
            parents.append(parent)
            kept.append(rank)
    return ended, _Beams(grown, scores[kept]), parents


def _cannot_improve(
    finished: list[Hypothesis], beams: _Beams, length: int, length_penalty: float, num_beams: int
) -> bool:
    """True when no beam could still beat the worst finished answer, judged at the present length.

    With a positive length penalty this is a rule of thumb (a longer answer is divided by more); it is the one that
    transformers uses by default.
    """
    if not beams.ids:
        return True
    if len(finished) < num_beams:
        return False
    return beams.scores[0].item() / length**length_penalty <= finished[-1].score
