"""Beam search, held to transformers' `generate(num_beams=...)`."""

from __future__ import annotations

import itertools

import pytest
import torch
from random_models import make_model, make_twin

from tinylm.generation.beam_search import beam_search
from tinylm.generation.engine import Engine, SamplingSettings

PROMPTS = ([5, 6, 7, 8], [250], [9, 40, 41, 42, 43, 44, 45])
STOP_IDS = (0, 2, 17, 33)  # more of them than usual, so that some answers end early


def theirs(twin, prompt: list[int], **settings) -> tuple[list[list[int]], list[float]]:
    """transformers' hypotheses, best first, with padding after the stop token removed."""
    ids = torch.tensor([prompt])
    out = twin.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=299,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        num_return_sequences=settings["num_beams"],
        **settings,
    )
    rows = [row[len(prompt) :].tolist() for row in out.sequences]
    stops = settings.get("eos_token_id", [])
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)], out.sequences_scores.tolist()


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.0, 2.0])
def test_equals_transformers(length_penalty: float) -> None:
    for seed in range(4):
        model = make_model(seed, initializer_range=0.25)
        twin = make_twin(model)
        for prompt in PROMPTS:
            ours = beam_search(
                model,
                prompt,
                num_beams=4,
                max_new_tokens=14,
                stop_ids=STOP_IDS,
                length_penalty=length_penalty,
            )
            sequences, scores = theirs(
                twin,
                prompt,
                num_beams=4,
                max_new_tokens=14,
                eos_token_id=list(STOP_IDS),
                length_penalty=length_penalty,
            )
            assert [hypothesis.ids for hypothesis in ours] == sequences
            torch.testing.assert_close([hypothesis.score for hypothesis in ours], scores, atol=1e-4, rtol=1e-4)


def test_one_beam_is_greedy_search() -> None:
    model = make_model(0, initializer_range=0.25)
    settings = SamplingSettings(max_new_tokens=14, temperature=0.0)
    for prompt in PROMPTS:
        (best,) = beam_search(model, prompt, num_beams=1, max_new_tokens=14)
        assert best.ids == list(Engine(model, dtype=torch.float32).generate(prompt, settings, stop_ids=()))


def test_repetition_penalty_equals_transformers() -> None:
    model = make_model(0)
    sequences, _ = theirs(
        make_twin(model), PROMPTS[0], num_beams=3, max_new_tokens=24, eos_token_id=[0, 2], repetition_penalty=1.6
    )
    ours = beam_search(model, PROMPTS[0], num_beams=3, max_new_tokens=24, stop_ids=(0, 2), penalty=1.6)
    assert [hypothesis.ids for hypothesis in ours] == sequences
    plain = beam_search(model, PROMPTS[0], num_beams=3, max_new_tokens=24, stop_ids=(0, 2))
    assert [hypothesis.ids for hypothesis in plain] != sequences


def test_enough_beams_find_the_best_of_all_answers() -> None:
    """With as many beams as prefixes nothing is pruned: exhaustive search must give the same answer."""
    model = make_model(2, vocab_size=12, initializer_range=0.25)
    best = max(
        itertools.product(range(12), repeat=3),
        key=lambda ids: float(
            torch.log_softmax(model(torch.tensor([[5, 6, *ids]])).detach()[0, 1:-1], -1)
            .gather(-1, torch.tensor(ids)[:, None])
            .sum()
        ),
    )
    ours = beam_search(model, [5, 6], num_beams=144, max_new_tokens=3)
    assert tuple(ours[0].ids) == best


def test_engine_answers_by_beam_search() -> None:
    model = make_model(0, initializer_range=0.25)
    engine = Engine(model, dtype=torch.float32)
    settings = SamplingSettings(max_new_tokens=14, temperature=0.0, num_beams=4)
    best = beam_search(model, [5, 6, 7, 8], num_beams=4, max_new_tokens=14, stop_ids=(0, 2))[0].ids
    expected = best[:-1] if best[-1] in (0, 2) else best
    assert list(engine.generate([5, 6, 7, 8], settings)) == expected
    assert engine.generate_batch([[250], [5, 6, 7, 8]], settings)[1] == expected
    assert list(engine.generate([7] * 300, settings, stop_ids=())), "an over-long prompt is bounded here as well"
