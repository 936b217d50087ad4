"""The engine: transformers' greedy answers, batches that change nothing, bounded prompts, seeds, streams."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_models import make_model, make_twin
from transformers import LlamaForCausalLM

from tinylm.generation.decoding import DecodingBatch, Row
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.model.model_tinylm import TinyLMForCausalLM

GREEDY = SamplingSettings(max_new_tokens=24, temperature=0.0)
DRAWN = SamplingSettings(max_new_tokens=24, temperature=1.0, top_p=0.95, seed=3)
FP32 = torch.float32


@pytest.fixture(scope="module")
def engine(model: TinyLMForCausalLM) -> Engine:
    return Engine(model, dtype=FP32)


def answer_of(twin: LlamaForCausalLM, prompt: list[int], **settings) -> list[int]:
    """transformers' answer, without its stop token."""
    ids = torch.tensor([prompt])
    out = twin.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=[0, 2], pad_token_id=0, **settings)[
        0, len(prompt) :
    ].tolist()
    return out[:-1] if out[-1] in (0, 2) else out


# ------------------------------------------------------------------------------------------------- transformers


def test_greedy_equals_transformers(engine: Engine, twin: LlamaForCausalLM, prompts) -> None:
    for prompt in prompts:
        expected = answer_of(twin, prompt, max_new_tokens=24, do_sample=False)
        assert list(engine.generate(prompt, GREEDY)) == expected


def test_repetition_penalty_equals_transformers(engine: Engine, twin: LlamaForCausalLM, prompts) -> None:
    settings = replace(GREEDY, repetition_penalty=1.5)
    answers = engine.generate_batch(prompts, settings)
    assert answers != engine.generate_batch(prompts, GREEDY)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = answer_of(twin, prompt, max_new_tokens=24, do_sample=False, repetition_penalty=1.5)
        assert answer == expected
        assert list(engine.generate(prompt, settings)) == expected


def test_some_answers_end_at_a_stop_token(engine: Engine, prompts) -> None:
    """The comparisons here would prove little if no answer ever stopped, or all did."""
    lengths = {len(answer) for answer in engine.generate_batch(prompts, GREEDY)}
    assert min(lengths) < 24 == max(lengths)


# ------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
@pytest.mark.parametrize("settings", [GREEDY, DRAWN, replace(DRAWN, repetition_penalty=1.2)])
def test_batch_size_changes_nothing(engine: Engine, prompts, settings, batch_size: int) -> None:
    assert engine.generate_batch(prompts, settings, batch_size=batch_size) == engine.generate_batch(
        prompts, settings, batch_size=3
    )


def test_greedy_batch_equals_greedy_single(engine: Engine, prompts) -> None:
    single = [list(engine.generate(prompt, GREEDY)) for prompt in prompts]
    assert engine.generate_batch(prompts, GREEDY) == single


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("batch_size", [7, 64])
def test_prompts_read_a_few_at_a_time_are_answered_together(engine: Engine, monkeypatch, rows, batch_size) -> None:
    """Answers, and how many rows each decoding step has: all of the batch, however many were read at a time."""
    monkeypatch.setattr("tinylm.generation.engine.PREFILL_ROWS", rows)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 60, (length % 19 + 1,), generator=generator).tolist() for length in range(0, 185, 5)]
    read, steps = [], []
    add, step = DecodingBatch.add, DecodingBatch.step
    monkeypatch.setattr(DecodingBatch, "add", lambda self, new: read.append(len(new)) or add(self, new))
    monkeypatch.setattr(DecodingBatch, "step", lambda self: steps.append(len(self.rows)) or step(self))
    answers = engine.generate_batch(prompts, GREEDY, batch_size=batch_size)
    assert max(read) == min(rows, batch_size) and sum(read) == len(prompts) == 37
    assert max(steps) == min(batch_size, 37)
    assert answers == [list(engine.generate(prompt, GREEDY)) for prompt in prompts]


def test_first_row_of_a_batch_equals_a_single_stream_when_sampling(engine: Engine, prompts) -> None:
    assert engine.generate_batch(prompts, DRAWN)[0] == list(engine.generate(prompts[0], DRAWN))


def test_same_prompt_in_one_batch_draws_different_answers(engine: Engine) -> None:
    answers = engine.generate_batch([[5, 6, 7]] * 8, DRAWN)
    assert len({tuple(answer) for answer in answers}) > 4


def test_seed_decides_the_answer(engine: Engine) -> None:
    first = list(engine.generate([5, 6, 7], DRAWN))
    assert first == list(engine.generate([5, 6, 7], DRAWN))
    assert first != list(engine.generate([5, 6, 7], replace(DRAWN, seed=4)))
    unseeded = replace(DRAWN, seed=None)
    assert list(engine.generate([5, 6, 7], unseeded)) != list(engine.generate([5, 6, 7], unseeded))


def rows_of(prompts, settings) -> list[Row]:
    return [Row(prompt, settings, 24, (0, 2), 3, number) for number, prompt in enumerate(prompts)]


def test_finished_rows_leave_the_batch(engine: Engine, model, prompts) -> None:
    """Never a row is computed whose answer has ended, and every row keeps its own keys and values."""
    answers = engine.generate_batch(prompts, GREEDY)
    batch, rows = DecodingBatch(model), rows_of(prompts, GREEDY)
    batch.add(rows)
    step = 0
    while batch.rows:
        assert len(batch.rows) == sum(len(answer) > step or len(answer) == step < 24 for answer in answers)
        taken = batch.step()
        assert {row.number for row, _ in taken} == {i for i, answer in enumerate(answers) if len(answer) > step}
        step += 1
    assert [row.answer for row in rows] == answers and step == 24 and all(row.is_done for row in rows)


@pytest.mark.parametrize("settings", [GREEDY, DRAWN, replace(DRAWN, repetition_penalty=1.2)])
def test_rows_may_join_between_steps(engine: Engine, model, prompts, settings) -> None:
    """A server adds prompts while others are being answered; no answer may depend on when it came."""
    expected = engine.generate_batch(prompts, settings)
    batch, rows = DecodingBatch(model), rows_of(prompts, settings)
    waiting = list(rows)
    while waiting or batch.rows:
        joining, waiting = waiting[:2], waiting[2:]
        if joining:
            batch.add(joining)
        for _ in range(3):
            if batch.rows:
                batch.step()
    assert [row.answer for row in rows] == expected


def test_every_row_has_its_own_settings(engine: Engine, prompts) -> None:
    choices = [
        GREEDY,
        DRAWN,
        replace(DRAWN, seed=9, temperature=2.0, top_p=1.0, max_new_tokens=31),
        replace(GREEDY, repetition_penalty=1.5, max_new_tokens=7),
        replace(DRAWN, top_k=5, min_p=0.1),
        replace(GREEDY, num_beams=3, max_new_tokens=9),
    ]
    settings = [choices[i % len(choices)] for i in range(len(prompts))]
    answers = engine.generate_batch(prompts, settings)
    for place, own in enumerate(settings):
        assert answers[place] == engine.generate_batch(prompts, own)[place], own


def test_no_prompts_no_answers(engine: Engine) -> None:
    assert engine.generate_batch([], GREEDY) == []


# ------------------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("length", [100, 126, 127, 128, 129, 500])
def test_any_prompt_length_is_answered_within_the_context(engine: Engine, length: int) -> None:
    prompt = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for max_new_tokens in (1, 24, 1000):
        settings = replace(GREEDY, max_new_tokens=max_new_tokens)
        single = list(engine.generate(prompt, settings, stop_ids=()))
        room = 128 - min(length, max(128 - max_new_tokens, 64))
        assert len(single) == min(max_new_tokens, room)
        assert engine.generate_batch([prompt, [5]], settings, stop_ids=())[0] == single


def test_a_long_neighbour_does_not_shorten_an_answer(engine: Engine) -> None:
    """Padding a short prompt up to a long one would take the room its answer needs."""
    settings = replace(GREEDY, max_new_tokens=60)
    long_prompt = [7] * 68
    answers = engine.generate_batch([long_prompt, [5, 6], [8] * 30], settings, stop_ids=())
    assert [len(answer) for answer in answers] == [60, 60, 60]
    assert answers[1] == list(engine.generate([5, 6], settings, stop_ids=()))


def test_long_prompt_keeps_its_tail(engine: Engine) -> None:
    tail = torch.randint(3, 300, (104,), generator=torch.Generator().manual_seed(1)).tolist()
    assert engine.bounded([9] * 50 + tail, GREEDY) == tail


def test_prompt_that_fits_exactly_is_kept_whole(engine: Engine, model) -> None:
    """104 tokens and an answer of 24 fill the context of 128 to its last position."""
    prompt = torch.randint(3, 300, (104,), generator=torch.Generator().manual_seed(2)).tolist()
    assert engine.bounded(prompt, GREEDY) == prompt
    answer = list(engine.generate(prompt, GREEDY, stop_ids=()))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]))[0]
    assert logits.shape[0] == 128 and answer == logits[103:127].argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_damaged_weights_are_an_error(dtype: torch.dtype) -> None:
    model = make_model()
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="its weights are damaged"):
        Engine(model, dtype=dtype).generate_batch([[5, 6], [7]], GREEDY)


def test_empty_prompt_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        list(engine.generate([], GREEDY))
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.generate_batch([[5], []], GREEDY)


# ---------------------------------------------------------------------------------------------- model's condition


def test_model_is_left_as_it_was() -> None:
    """Sampling in the middle of training: dropout off inside, on again afterwards; no gradient; same weights."""
    model = make_model(hidden_dropout=0.5, attention_dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answers = [list(Engine(model, dtype=FP32).generate([5, 6, 7], GREEDY)) for _ in range(2)]
    assert answers[0] == answers[1]
    assert model.training
    assert not torch.is_inference_mode_enabled()
    Engine(model, dtype=torch.bfloat16).generate_batch([[5, 6, 7]], GREEDY)
    assert model.dtype == FP32 and model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_inference_mode_does_not_leak_to_the_reader_of_the_stream(engine: Engine) -> None:
    stream = engine.generate([5, 6, 7], GREEDY)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()


def test_own_precision_shares_the_weights_and_follows_training() -> None:
    model = make_model()
    engine = Engine(model, dtype=FP32)
    assert engine.model is model
    half = Engine(model, dtype=torch.bfloat16)
    assert half.compute_model.dtype == torch.bfloat16 and half.dtype == torch.bfloat16


def test_bfloat16_answers_mostly_agree_with_transformers_in_bfloat16(prompts) -> None:
    model = make_model()
    twin = make_twin(model).to(torch.bfloat16)
    engine = Engine(model, dtype=torch.bfloat16)
    firsts = [next(iter(engine.generate(prompt, GREEDY, ())), None) for prompt in prompts]
    expected = [twin(torch.tensor([prompt])).logits[0, -1].argmax().item() for prompt in prompts]
    assert sum(a == b for a, b in zip(firsts, expected, strict=True)) >= len(prompts) - 2


def test_qk_norm_and_other_positions_are_served_too(prompts) -> None:
    for shape in ({"qk_norm": True}, {"position_embedding_type": "learned"}, {"pad_token_id": None}):
        engine = Engine(make_model(1, **shape), dtype=FP32)
        single = [list(engine.generate(prompt, GREEDY)) for prompt in prompts]
        assert engine.generate_batch(prompts, GREEDY) == single
