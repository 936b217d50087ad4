"""The scheduler: who shares a step changes nobody's answer; places, memory, prefixes, streams, ends and errors."""

from __future__ import annotations

import random
import re
import threading
import time
from dataclasses import replace
from functools import cache

import pytest
import torch
from random_models import make_model

from tinylm.generation.engine import Engine
from tinylm.generation.request import (
    Event,
    PromptTooLong,
    QueueFull,
    Request,
    RequestError,
    SchedulerClosed,
    Ticket,
)
from tinylm.generation.sampling import SamplingSettings
from tinylm.generation.scheduler import Scheduler, SchedulerSettings
from tinylm.model.kv_cache import KVCache
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer

GREEDY = SamplingSettings(max_new_tokens=24, temperature=0.0)
DRAWN = SamplingSettings(max_new_tokens=24, temperature=1.0, top_p=0.95, seed=3)
STOPS = (0, 2)
CONTEXT = 128
SYSTEM = [random.Random(5).randrange(3, 300) for _ in range(50)]
"""What many prompts begin with."""


def slots_of(model: TinyLMForCausalLM, num_slots: int, **settings: int) -> SchedulerSettings:
    """Settings with memory for this many rows."""
    row_bytes = KVCache.bytes_per_token(model.config, model.dtype) * settings.get("context_length", CONTEXT)
    return SchedulerSettings(cache_bytes=num_slots * row_bytes + row_bytes // 2, **settings)


def scheduler_of(model: TinyLMForCausalLM, num_slots: int = 4, tokenizer: Tokenizer | None = None, **settings: int):
    return Scheduler(model, tokenizer, slots_of(model, num_slots, **settings))


def finish(scheduler: Scheduler, events: dict[Ticket, list[Event]] | None = None) -> dict[Ticket, list[Event]]:
    """Step until everything is done."""
    events = {} if events is None else events
    while scheduler.has_work:
        for event in scheduler.step():
            events.setdefault(event.ticket, []).append(event)
    return events


def ids_of(events: list[Event]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


def answer_of(scheduler: Scheduler, request: Request) -> list[int]:
    ticket = scheduler.submit(request)
    return ids_of(finish(scheduler)[ticket])


def random_prompt(random_numbers: random.Random) -> list[int]:
    """Of 1 to 100 tokens; some begin like others."""
    start = SYSTEM[: random_numbers.choice([0, 0, 7, 33, 50, 50])]
    return start + [random_numbers.randrange(3, 300) for _ in range(random_numbers.choice([1, 2, 5, 9, 20, 50]))]


# ------------------------------------------------------------------------------------------------ nobody's answer


@cache
def exact_model() -> TinyLMForCausalLM:
    """The model of these tests in float64."""
    return make_model().double()


def greedy_reference(prompt: list[int]) -> tuple[list[int], float]:
    """The greedy answer by whole passes in float64, without a cache, and the narrowest gap between first and second."""
    ids, gap = list(prompt), float("inf")
    while len(ids) < min(len(prompt) + GREEDY.max_new_tokens, CONTEXT):
        with torch.inference_mode():
            (first, second), best = exact_model()(torch.tensor([ids]))[0, -1].topk(2)
        gap = min(gap, (first - second).item())
        if int(best[0]) in STOPS:
            break
        ids.append(int(best[0]))
    return ids[len(prompt) :], gap


@cache
def known_requests() -> list[tuple[Request, list[int]]]:
    """Requests and their answers, computed by others: greedy ones without a scheduler, drawn ones by themselves.

    Greedy ones with a gap below 1e-3 are left out: float32 is off by about 1e-5 here, and may decide these otherwise.
    """
    numbers, known = random.Random(7), []
    for number in range(40):
        prompt = random_prompt(numbers)
        answer, gap = greedy_reference(prompt)
        if gap > 1e-3:
            known.append((Request(prompt, GREEDY, STOPS), answer))
        settings = replace(DRAWN, seed=number, repetition_penalty=1 + number % 3 / 5)
        request = Request(prompt, settings, STOPS, frequency_penalty=0.3 * (number % 4 == 0), logit_bias={9: 1.5})
        known.append((request, answer_of(scheduler_of(make_model(), 1), request)))
    assert sum(request.settings == GREEDY for request, _ in known) >= 30
    assert len({tuple(answer) for _, answer in known}) > 60
    return known


def run_schedule(model: TinyLMForCausalLM, seed: int) -> None:
    """Random requests come, and some leave early, at random steps; each answer must be the known one."""
    numbers = random.Random(seed)
    num_slots, prefill_tokens = numbers.choice([1, 2, 5, 16, 20]), numbers.choice([1, 7, 16, 64, 128])
    scheduler = scheduler_of(model, num_slots, max_streams=numbers.choice([1, 3, 16]), prefill_tokens=prefill_tokens)
    coming = [numbers.choice(known_requests()) for _ in range(numbers.choice([2, 17, 24]))]
    expected, answers, leaving = {}, {}, set()
    while coming or scheduler.has_work:
        for _ in range(min(len(coming), numbers.choice([0, 0, 1, 2, 16]))):
            request, answer = coming.pop()
            expected[ticket := scheduler.submit(request)] = answer
            answers[ticket] = []
            if numbers.random() < 0.15:
                leaving.add(ticket)
        for event in scheduler.step():
            answers[event.ticket] += event.token_ids
            assert event.finish_reason != "error"
        for ticket in [ticket for ticket in leaving if numbers.random() < 0.1]:
            scheduler.cancel(ticket)
    for ticket, answer in expected.items():
        own = answers[ticket]
        assert own == (answer if not ticket.is_cancelled else answer[: len(own)]), f"schedule {seed}"


@pytest.mark.parametrize("seed", range(40))
def test_an_answer_does_not_depend_on_who_shares_its_steps(model: TinyLMForCausalLM, seed: int) -> None:
    run_schedule(model, seed)


@pytest.mark.long
def test_a_thousand_schedules_change_no_answer(model: TinyLMForCausalLM) -> None:
    for seed in range(1000, 2000):
        run_schedule(model, seed)


def test_other_shapes_of_model(prompts: list[list[int]]) -> None:
    """Learned positions, norms of queries and keys, one key/value head: beside others, and by the engine alone."""
    for shape in ({"qk_norm": True}, {"position_embedding_type": "learned"}, {"num_key_value_heads": 1}):
        other = make_model(1, **shape)
        scheduler = scheduler_of(other, 5, prefill_tokens=10)
        tickets = [scheduler.submit(Request(prompt, GREEDY, STOPS)) for prompt in prompts]
        events = finish(scheduler)
        engine = Engine(other, dtype=torch.float32)
        assert [ids_of(events[t]) for t in tickets] == [list(engine.generate(p, GREEDY, STOPS)) for p in prompts]


# ----------------------------------------------------------------------------------------------- places and memory


def count_passes(model: TinyLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes [B, T] of all passes from now on."""
    shapes, plain = [], TinyLMForCausalLM.hidden_states

    def counted(self, input_ids, *args, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return plain(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(TinyLMForCausalLM, "hidden_states", counted)
    return shapes


def test_a_long_prompt_stalls_nobody(model: TinyLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is read, 16 tokens a step, the others get a token at every step."""
    scheduler = scheduler_of(model, 4, prefill_tokens=16)
    talker = scheduler.submit(Request([5, 6, 7], GREEDY))
    scheduler.step()
    shapes = count_passes(model, monkeypatch)
    scheduler.submit(Request(list(range(3, 103)), GREEDY))
    events = [scheduler.step() for _ in range(7)]
    assert all(step[0].ticket is talker and len(step[0].token_ids) == 1 for step in events)
    assert [len(step) for step in events] == [1] * 6 + [2]
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 16)] * 6 + [(1, 4)]


def test_short_prompts_are_read_together(model: TinyLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of similar length in one pass; one that would be mostly padding in a pass of its own."""
    scheduler = scheduler_of(model, 6, prefill_tokens=64)
    shapes = count_passes(model, monkeypatch)
    for start, length in enumerate((20, 18, 25, 3, 60)):
        scheduler.submit(Request(list(range(start + 3, start + 3 + length)), GREEDY))
    scheduler.step()
    assert shapes == [(4, 25), (1, 60)]


def test_memory_is_reserved_once(model: TinyLMForCausalLM) -> None:
    scheduler = scheduler_of(model, 3, max_waiting=100)
    held = scheduler._slots.cache
    storage = [layer.data_ptr() for layer in (*held.keys, *held.values)]
    size = sum(layer.nbytes for layer in (*held.keys, *held.values))
    assert size <= scheduler.settings.cache_bytes < size * 4 / 3
    numbers = random.Random(2)
    for _ in range(60):
        scheduler.submit(Request(random_prompt(numbers), GREEDY, STOPS))
    assert len(finish(scheduler)) == 60
    assert [layer.data_ptr() for layer in (*held.keys, *held.values)] == storage


def test_too_little_memory_is_refused(model: TinyLMForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"cache_bytes is 1000; a context of 128 tokens takes 49152; set at least"):
        Scheduler(model, settings=SchedulerSettings(cache_bytes=1000))
    assert len(Scheduler(model, settings=SchedulerSettings(cache_bytes=1000, context_length=2))._slots) == 1
    with pytest.raises(ValueError, match="context_length is 129; the model has 128 positions"):
        Scheduler(model, settings=SchedulerSettings(context_length=129))


@pytest.mark.parametrize("name", ["max_streams", "max_waiting", "cache_bytes", "prefill_tokens", "context_length"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; accepted is at least"):
        SchedulerSettings(**{name: 0})


# ---------------------------------------------------------------------------------------------------------- prefixes


def read_tokens(shapes: list[tuple[int, int]]) -> int:
    """Prompt tokens read in the passes that these shapes have; a pass of one token a row is decoding."""
    return sum(rows * time for rows, time in shapes if time > 1)


def test_the_next_turn_reads_only_what_is_new(model: TinyLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(model, 2)
    first = SYSTEM + [7, 8]
    answer = answer_of(scheduler, Request(first, replace(GREEDY, max_new_tokens=10)))
    turn = [*first, *answer, 11, 12, 13]
    shapes = count_passes(model, monkeypatch)
    second = answer_of(scheduler, Request(turn, GREEDY, STOPS))
    # The last token of the answer was never fed to the model, so it is read now.
    assert read_tokens(shapes) == 4
    assert second == greedy_reference(turn)[0]


def test_requests_with_one_system_message_read_it_once(
    model: TinyLMForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that come at the same time, and while the first is still being answered."""
    scheduler = scheduler_of(model, 8, prefill_tokens=20)
    shapes = count_passes(model, monkeypatch)
    prompts = [[*SYSTEM, 100 + i, 200 - i] for i in range(6)]
    tickets = [scheduler.submit(Request(prompt, GREEDY, STOPS)) for prompt in prompts]
    events = finish(scheduler)
    assert read_tokens(shapes) == 52 + 5 * 2
    assert [ids_of(events[ticket]) for ticket in tickets] == [greedy_reference(prompt)[0] for prompt in prompts]


def test_equal_prompts_compute_their_last_token_each(model: TinyLMForCausalLM) -> None:
    """`n` answers to one prompt, with one seed: they differ, and each is what it would be alone."""
    requests = [Request(SYSTEM, DRAWN, STOPS, number=number) for number in range(5)]
    scheduler = scheduler_of(model, 5)
    tickets = [scheduler.submit(request) for request in requests]
    events = finish(scheduler)
    answers = [ids_of(events[ticket]) for ticket in tickets]
    assert len({tuple(answer) for answer in answers}) == 5
    assert answers == [answer_of(scheduler_of(model, 1), request) for request in requests]
    assert answers == Engine(model, dtype=torch.float32).generate_batch([SYSTEM] * 5, DRAWN, STOPS)


def test_the_least_recently_used_prefix_is_dropped(model: TinyLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(model, 2)
    short = replace(GREEDY, max_new_tokens=1)
    one, two, three = ([start, *SYSTEM[:30]] for start in (10, 20, 30))
    for prompt in (one, two, one, three):  # of `one` and `two`, `two` was used longer ago
        answer_of(scheduler, Request(prompt, short))
    shapes = count_passes(model, monkeypatch)
    answer_of(scheduler, Request([*one, 5], short))
    # Of 32 tokens 31 are held: this one is a pass of a single token.
    assert read_tokens(shapes) == 0
    answer_of(scheduler, Request([*two, 5], short))
    assert read_tokens(shapes) == 32


# ---------------------------------------------------------------------------------------------- what a request asks


def test_text_comes_in_whole_characters_and_stops_before_a_stop_string(model: TinyLMForCausalLM) -> None:
    tokenizer = Tokenizer.default()
    scheduler = scheduler_of(model, 4, tokenizer)
    numbers = random.Random(3)
    for seed in range(8):
        prompt, settings = random_prompt(numbers)[:40], replace(DRAWN, seed=seed, max_new_tokens=60)
        ticket = scheduler.submit(Request(prompt, settings, STOPS))
        free = finish(scheduler)[ticket]
        text = "".join(event.text for event in free)
        assert text == tokenizer.decode(ids_of(free))
        middle = len(text) // 2
        stop = text[middle : middle + 3]
        ticket = scheduler.submit(Request(prompt, settings, STOPS, stop_strings=("\N{SNOWMAN}never", stop)))
        stopped = finish(scheduler)[ticket]
        assert "".join(event.text for event in stopped) == text[: text.index(stop)]
        assert stopped[-1].finish_reason == "stop" and ids_of(stopped) == ids_of(free)[: len(ids_of(stopped))]


def test_reasons_of_the_end(model: TinyLMForCausalLM) -> None:
    scheduler = scheduler_of(model)
    reasons = {}
    first = answer_of(scheduler, Request(SYSTEM, GREEDY))
    for name, request in {
        "stop": Request(SYSTEM, GREEDY, (first[4],)),
        "length": Request(SYSTEM, GREEDY),
        "context": Request(SYSTEM, replace(GREEDY, max_new_tokens=1000)),
    }.items():
        ticket = scheduler.submit(request)
        events = finish(scheduler)[ticket]
        assert all(event.finish_reason is None for event in events[:-1])
        reasons[name] = (events[-1].finish_reason, len(ids_of(events)))
    assert reasons == {"stop": ("stop", first.index(first[4])), "length": ("length", 24), "context": ("length", 78)}


def test_log_probabilities_are_the_models(model: TinyLMForCausalLM) -> None:
    """Of each token and of the likeliest ones, whatever settings choose from."""
    scheduler = scheduler_of(model)
    request = Request(SYSTEM, replace(DRAWN, temperature=3.0, top_p=1.0), num_logprobs=4, logit_bias={7: 5.0})
    ticket = scheduler.submit(request)
    events = finish(scheduler)[ticket]
    answer = ids_of(events)
    with torch.inference_mode():
        expected = exact_model()(torch.tensor([SYSTEM + answer]))[0, len(SYSTEM) - 1 : -1].log_softmax(-1)
    found = [logprob for event in events for logprob in event.logprobs]
    assert [logprob.token_id for logprob in found] == answer and len(answer) == 24
    for own, row in zip(found, expected, strict=True):
        values, ids = row.topk(4)
        assert own.logprob == pytest.approx(row[own.token_id].item(), abs=1e-4)
        assert [token_id for token_id, _ in own.top] == ids.tolist()
        assert [value for _, value in own.top] == pytest.approx(values.tolist(), abs=1e-4)
    ticket = scheduler.submit(replace(request, num_logprobs=0))
    assert all(len(event.logprobs) == 1 and event.logprobs[0].top == () for event in finish(scheduler)[ticket])
    ticket = scheduler.submit(replace(request, num_logprobs=None))
    assert all(event.logprobs == () for event in finish(scheduler)[ticket])


def test_bias_and_penalties_change_the_logits(model: TinyLMForCausalLM) -> None:
    """By their equations, from whole passes in float64. The prompt's tokens carry no penalty."""
    presence, frequency, bias = 1.5, 0.7, {162: -9.0, 245: 1.0}
    answer: list[int] = []
    for _ in range(24):
        with torch.no_grad():
            logits = exact_model()(torch.tensor([SYSTEM + answer]))[0, -1]
        for token_id, value in bias.items():
            logits[token_id] += value
        for token_id in set(answer):
            logits[token_id] -= presence + frequency * answer.count(token_id)
        answer.append(int(logits.argmax()))
    request = Request(SYSTEM, GREEDY, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias)
    assert answer_of(scheduler_of(model), request) == answer
    for change in ({"presence_penalty": 0.0}, {"frequency_penalty": -2.0}, {"logit_bias": {}}):
        assert answer_of(scheduler_of(model), replace(request, **change)) != answer


class EvenThenOdd:
    """A constraint and its states: ten tokens that take turns, then five free ones, and the answer is complete."""

    def start(self, stop_ids: tuple[int, ...]) -> EvenThenOdd:
        state = EvenThenOdd()
        state.stop_ids, state.taken = stop_ids, []
        return state

    def mask(self) -> torch.Tensor | None:
        if len(self.taken) >= 10:
            return torch.arange(300) > 2
        return (torch.arange(300) % 2 == len(self.taken) % 2) & (torch.arange(300) > 2)

    def take(self, token_id: int) -> bool:
        self.taken.append(token_id)
        return len(self.taken) == 15


def test_a_mask_leaves_only_what_it_allows(model: TinyLMForCausalLM) -> None:
    """Each answer has a state of its own, which hears of each token; a neighbour is not touched."""
    scheduler = scheduler_of(model)
    neighbour = scheduler.submit(Request(SYSTEM, GREEDY, STOPS))
    request = Request(SYSTEM, replace(DRAWN, top_k=50), STOPS, constraint=EvenThenOdd())
    tickets = [scheduler.submit(replace(request, number=number)) for number in (0, 1)]
    events = finish(scheduler)
    for ticket in tickets:
        answer = ids_of(events[ticket])
        assert [token_id % 2 for token_id in answer[:10]] == [0, 1] * 5 and len(answer) == 15
        assert events[ticket][-1].finish_reason == "stop" and ticket.answer_state.taken == answer
        assert ticket.answer_state.stop_ids == STOPS
    assert ids_of(events[tickets[0]]) != ids_of(events[tickets[1]])
    assert ids_of(events[neighbour]) == greedy_reference(SYSTEM)[0]


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (lambda: Request([], GREEDY), RequestError, "the prompt is empty; expected at least one token"),
        (lambda: Request([5] * 128, GREEDY), PromptTooLong, "the prompt has 128 tokens; expected at most 127"),
        (lambda: Request([5, 300], GREEDY), RequestError, "prompt has token 300; expected 0 to 299"),
        (lambda: Request([5, -1], GREEDY), RequestError, "prompt has token -1"),
        (lambda: Request([5], GREEDY, logit_bias={300: 1.0}), RequestError, "logit_bias has token 300"),
        (lambda: Request([5], GREEDY, logit_bias={3: float("nan")}), ValueError, "logit_bias of token 3 is nan"),
        (lambda: Request([5], GREEDY, stop_strings=("a", "")), RequestError, "a stop string is empty"),
        (lambda: Request([5], GREEDY, stop_strings=("a",)), RequestError, "stop strings need a tokenizer"),
        (lambda: Request([5], GREEDY, presence_penalty=2.1), ValueError, "presence_penalty is 2.1; accepted"),
        (lambda: Request([5], GREEDY, frequency_penalty=-3), ValueError, "frequency_penalty is -3; accepted"),
        (lambda: Request([5], GREEDY, num_logprobs=-1), ValueError, "num_logprobs is -1; accepted"),
        (lambda: Request([5], GREEDY, num_logprobs=301), RequestError, "num_logprobs is 301; the model has 300"),
        (lambda: Request([5], replace(GREEDY, num_beams=2)), RequestError, "num_beams is 2"),
        (lambda: Request([5], replace(GREEDY, max_new_tokens=0)), ValueError, "max_new_tokens is 0; accepted"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(model, request_, error, message) -> None:
    scheduler = scheduler_of(model)
    with pytest.raises(error, match=message) as raised:
        scheduler.submit(request_())
    assert "\n" not in str(raised.value) and not scheduler.has_work


def test_the_longest_prompt_gets_one_token(model: TinyLMForCausalLM) -> None:
    prompt = [5, 9] * 63 + [7]
    assert answer_of(scheduler_of(model, prefill_tokens=50), Request(prompt, GREEDY)) == greedy_reference(prompt)[0]


def test_a_full_queue_refuses_until_there_is_room(model: TinyLMForCausalLM) -> None:
    scheduler = scheduler_of(model, 1, max_waiting=2)
    running = scheduler.submit(Request([5], GREEDY))
    scheduler.step()
    waiting = [scheduler.submit(Request([6], GREEDY)) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait already"):
        scheduler.submit(Request([7], GREEDY))
    scheduler.cancel(waiting[0])
    waiting.append(scheduler.submit(Request([7], GREEDY)))
    events = finish(scheduler)
    assert {events[ticket][-1].finish_reason for ticket in (running, *waiting[1:])} <= {"stop", "length"}
    assert events[waiting[0]] == [Event(waiting[0], finish_reason="cancelled")]


def test_damaged_weights_end_only_the_requests_that_meet_them() -> None:
    """One row of the table is not a number; it is also that of padding."""
    model = make_model(tie_word_embeddings=False)
    expected = {length: answer_of(scheduler_of(model), Request(SYSTEM[:length], GREEDY)) for length in (5, 30)}
    torch.nn.init.constant_(model.model.embed_tokens.weight.data[0], torch.nan)
    torch.nn.init.constant_(model.model.embed_tokens.weight.data[299], torch.nan)
    assert not any({0, 299} & set(answer) for answer in expected.values())
    scheduler = scheduler_of(model, 4, prefill_tokens=20)
    for _ in range(3):
        damaged = [scheduler.submit(Request([*SYSTEM[:n], 299, *SYSTEM[:60]], GREEDY)) for n in (0, 20)]
        left = scheduler.submit(Request([299, *SYSTEM, *SYSTEM], GREEDY))
        sound = [scheduler.submit(Request(SYSTEM[:length], GREEDY)) for length in expected]
        events = {event.ticket: [event] for event in scheduler.step()}
        scheduler.cancel(left)
        finish(scheduler, events)
        for ticket in damaged:
            assert [event.finish_reason for event in events[ticket]] == ["error"]
            assert events[ticket][0].error.startswith("the model computes no numbers (NaN)")
        assert [ids_of(events[ticket]) for ticket in sound] == list(expected.values())
    # Within one step: the first is read, and found damaged; the second must not begin with its keys and values.
    fresh = scheduler_of(model, 4)
    tickets = [fresh.submit(Request(prompt, GREEDY)) for prompt in ([*SYSTEM[:40], 299], SYSTEM[:48])]
    events = finish(fresh)
    assert [events[ticket][-1].finish_reason for ticket in tickets] == ["error", "length"]


class Broken:
    """A constraint whose states have this mask, or that raises after two tokens."""

    def __init__(self, mask: torch.Tensor | None) -> None:
        self.mask = lambda: mask
        self.count = 0

    def start(self, stop_ids: tuple[int, ...]) -> Broken:
        return self

    def take(self, token_id: int) -> bool:
        self.count += 1
        if self.count > 2:
            raise KeyError("grammar")
        return False


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(300, dtype=torch.bool), "the token mask allows no token"),
        (torch.ones(299, dtype=torch.bool), r"the token mask is torch.bool \[299\]; expected"),
        (torch.ones(300), r"the token mask is torch.float32 \[300\]; expected"),
        (None, "grammar"),
    ],
)
def test_a_constraint_that_fails_ends_only_its_request(model: TinyLMForCausalLM, mask, message: str) -> None:
    scheduler = scheduler_of(model)
    constraints = (None, Broken(mask), None)
    tickets = [scheduler.submit(Request(SYSTEM, GREEDY, STOPS, constraint=own)) for own in constraints]
    events = finish(scheduler)
    *before, error = events[tickets[1]]
    assert error.finish_reason == "error" and len(before) == (2 if mask is None else 0)
    assert re.search(message, error.error)
    assert ids_of(events[tickets[0]]) == ids_of(events[tickets[2]]) == greedy_reference(SYSTEM)[0]


def test_a_failed_computation_ends_its_requests_and_the_next_are_served(
    model: TinyLMForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = scheduler_of(model, 2, max_streams=2)
    tickets = [scheduler.submit(Request([5, 6, i + 3], GREEDY, STOPS)) for i in range(3)]
    scheduler.step()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory\nand more lines")

    with monkeypatch.context() as patch:
        patch.setattr(TinyLMForCausalLM, "hidden_states", fail)
        events = scheduler.step()
    assert [event.error for event in events] == ["the computation failed: out of memory"] * 2
    assert ids_of(finish(scheduler)[tickets[2]]) == greedy_reference([5, 6, 5])[0]


# ------------------------------------------------------------------------------------------------------------ thread


@pytest.fixture
def running(model: TinyLMForCausalLM):
    scheduler = Scheduler(model, Tokenizer.default(), slots_of(model, 8, max_streams=4, max_waiting=100))
    scheduler.start()
    yield scheduler
    scheduler.close(drain=False, timeout=10)
    assert not scheduler.has_work


def test_many_threads_submit_read_and_leave(running: Scheduler) -> None:
    wrong, known = [], known_requests()

    def client(seed: int) -> None:
        numbers = random.Random(seed)
        for _ in range(5):
            request, answer = numbers.choice(known)
            ticket, own = running.submit(request), []
            leaves_after = numbers.choice([3, 1000, 1000])
            for event in ticket:
                own += event.token_ids
                if len(own) > leaves_after:
                    running.cancel(ticket)
            if own != (answer[: len(own)] if event.finish_reason == "cancelled" else answer):
                wrong.append((seed, own, answer))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong, wrong[0]
    assert not any(thread.is_alive() for thread in threads)


def test_close_drains(model: TinyLMForCausalLM) -> None:
    scheduler = scheduler_of(model, 2)
    tickets = [scheduler.submit(Request(SYSTEM[:n], GREEDY, STOPS)) for n in (3, 9, 20)]
    scheduler.start()
    scheduler.close(timeout=30)
    assert [ids_of(list(ticket)) for ticket in tickets] == [greedy_reference(SYSTEM[:n])[0] for n in (3, 9, 20)]
    with pytest.raises(SchedulerClosed, match="takes no more requests"):
        scheduler.submit(Request([5], GREEDY))


def test_close_without_draining_cancels(model: TinyLMForCausalLM) -> None:
    scheduler = scheduler_of(model, 1)
    tickets = [scheduler.submit(Request(SYSTEM[:n], GREEDY)) for n in (3, 9)]
    scheduler.step()
    scheduler.close(drain=False)
    scheduler.start()
    assert [list(ticket)[-1].finish_reason for ticket in tickets] == ["cancelled"] * 2


def test_an_idle_thread_uses_no_time(running: Scheduler) -> None:
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_a_listener_is_called_and_one_that_raises_is_left(running: Scheduler) -> None:
    heard, done = [], threading.Event()

    def listen(event: Event) -> None:
        heard.append(event)
        if event.finish_reason:
            done.set()

    def raise_error(event: Event) -> None:
        raise ConnectionError("the client is gone")

    gone = running.submit(Request(SYSTEM, replace(GREEDY, max_new_tokens=70)), raise_error)
    running.submit(Request(SYSTEM, GREEDY, STOPS), listen)
    assert done.wait(30)
    assert ids_of(heard) == greedy_reference(SYSTEM)[0]
    running.close(timeout=30)
    assert gone.is_done and gone.is_cancelled
