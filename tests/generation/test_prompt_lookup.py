"""Guessing ahead: the answers stay the same, fewer passes make them, and text that repeats nothing pays nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from random_models import make_model
from test_scheduler import DRAWN, GREEDY, STOPS, SYSTEM, count_passes, finish, ids_of, random_prompt, slots_of

from tinylm.generation import prompt_lookup
from tinylm.generation.constraints import GrammarCompiler
from tinylm.generation.prompt_lookup import NGRAM, PromptLookup
from tinylm.generation.request import Event, Request
from tinylm.generation.sampling import SamplingSettings
from tinylm.generation.scheduler import Scheduler, SchedulerSettings
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer


@cache
def exact_model(number: int) -> TinyLMForCausalLM:
    """In float64, where the shape of a pass decides no close call; some of these repeat themselves a lot."""
    return make_model(number, initializer_range=(0.5, 0.05)[number % 2]).double()


def scheduler_of(model: TinyLMForCausalLM, draft_tokens: int, tokenizer: Tokenizer | None = None) -> Scheduler:
    return Scheduler(model, tokenizer, replace(slots_of(model, 3), draft_tokens=draft_tokens))


def random_request(numbers: random.Random) -> Request:
    prompt = random_prompt(numbers)[-60:]
    prompt = prompt * numbers.choice([1, 2]) if len(prompt) < 45 else prompt
    settings = SamplingSettings(
        max_new_tokens=numbers.choice([1, 2, 9, 30, 60]),
        temperature=numbers.choice([0.0, 0.0, 0.05, 0.3, 1.0]),
        top_p=numbers.choice([1.0, 0.8]),
        repetition_penalty=numbers.choice([1.0, 1.0, 1.2, 0.5]),
        seed=numbers.randrange(100),
    )
    return Request(
        prompt,
        settings,
        numbers.choice([STOPS, (), (0, 2, *range(50, 90))]),
        number=numbers.randrange(3),
        frequency_penalty=numbers.choice([0.0, 0.0, 0.3, -0.5]),
        logit_bias=numbers.choice([{}, {9: 3.0}]),
        num_logprobs=numbers.choice([None, 2]),
    )


def run_schedule(scheduler: Scheduler, seed: int) -> list[tuple[list[int], str | None, list[int]]]:
    """Requests that come one after the other, or before another has ended; some leave."""
    numbers = random.Random(seed)
    events: dict = {}
    tickets = []
    for _ in range(numbers.choice([1, 3, 5])):
        tickets.append(scheduler.submit(random_request(numbers)))
        wanted = numbers.choice([3, 20, 1000])  # tokens of this one, so that others come at the same place
        while scheduler.has_work and len(ids_of(events.get(tickets[-1], []))) < wanted and not tickets[-1].is_done:
            for event in scheduler.step():
                events.setdefault(event.ticket, []).append(event)
    finish(scheduler, events)
    return [
        (ids_of(own := events[t]), own[-1].finish_reason, [x.token_id for e in own for x in e.logprobs])
        for t in tickets
    ]


@pytest.mark.parametrize("seed", range(200))
def test_answers_with_and_without_guesses_are_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and drawn with a seed; with penalties, bias, end tokens, limits, log-probabilities, neighbours.

    Most of them guess whenever one token occurred before, worth it or not.
    """
    if seed % 5:
        monkeypatch.setattr(prompt_lookup, "WORTH", 0.0)
        monkeypatch.setattr(prompt_lookup, "NGRAM", 1)
    model = exact_model(seed % 6)
    plain = run_schedule(scheduler_of(model, 0), seed)
    assert run_schedule(scheduler_of(model, (7, 7, 1, 20)[seed % 4]), seed) == plain


def test_a_repeating_answer_takes_fewer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every step but those brings one token; text, log-probabilities and the end are those of single steps."""
    tokenizer = Tokenizer.default()
    settings = replace(GREEDY, max_new_tokens=100)
    results = []
    for draft_tokens in (0, 7):
        shapes = count_passes(exact_model(1), monkeypatch)
        scheduler = scheduler_of(exact_model(1), draft_tokens, tokenizer)
        ticket = scheduler.submit(Request(SYSTEM[:20], settings, num_logprobs=1))
        events = finish(scheduler)[ticket]
        monkeypatch.undo()
        results.append((len(shapes), joined_text(events), ids_of(events), events[-1].finish_reason))
        found = [(x.token_id, round(x.logprob, 4)) for event in events for x in event.logprobs]
        results[-1] += (found,)
    plain, guessed = results
    assert guessed[1:] == plain[1:] and plain[0] == 100
    assert guessed[0] < 50
    assert [token_id for token_id, _ in plain[4]] == plain[2]


def joined_text(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def test_a_stop_string_within_a_right_guess_ends_the_answer_there() -> None:
    tokenizer = Tokenizer.default()
    texts, ids = [], []
    for stops in ((), ("\N{SNOWMAN}",)):
        for draft_tokens in (0, 7):
            scheduler = scheduler_of(exact_model(1), draft_tokens, tokenizer)
            if stops:
                stops = (texts[0][40:43],)
            ticket = scheduler.submit(Request(SYSTEM[:20], replace(GREEDY, max_new_tokens=100), stop_strings=stops))
            events = finish(scheduler)[ticket]
            texts.append(joined_text(events))
            ids.append(ids_of(events))
    assert texts[0] == texts[1] and ids[0] == ids[1] and ids[2] == ids[3]
    assert texts[2] == texts[3] == texts[0][: texts[0].index(texts[0][40:43])]


def test_the_next_turn_finds_only_what_was_kept() -> None:
    """Keys and values of wrong guesses must not be reused: the turn after equals that of a fresh scheduler."""
    for number in (0, 1, 3):
        scheduler = scheduler_of(exact_model(number), 7)
        turn = SYSTEM[:10]
        for _ in range(4):
            request = Request(turn, replace(DRAWN, temperature=0.2, max_new_tokens=20))
            answers = []
            for own in (scheduler, scheduler_of(exact_model(number), 0)):
                ticket = own.submit(request)
                answers.append(ids_of(finish(own)[ticket]))
            assert answers[0] == answers[1]
            turn = [*turn, *answers[0], 7, 8]


def test_a_form_and_guesses_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that must copy its prompt: about one pass for each eight tokens."""
    tokenizer = Tokenizer.default()
    model = make_model(0, vocab_size=6400, max_position_embeddings=256)
    text = "Der Leuchtturmwärter, Herr Abernathy, stieg jeden Abend die einhundertzwölf Stufen hinauf, 每天都一样."
    grammar = GrammarCompiler(tokenizer, 6400).choices([text])
    shapes = count_passes(model, monkeypatch)
    scheduler = Scheduler(model, tokenizer, SchedulerSettings(cache_bytes=2**26))
    prompt = [5, *tokenizer.encode(text), 6]
    ticket = scheduler.submit(Request(prompt, replace(DRAWN, max_new_tokens=200), STOPS, constraint=grammar))
    events = finish(scheduler)[ticket]
    assert joined_text(events) == text and events[-1].finish_reason == "stop"
    assert len(shapes) < len(prompt) / 2 and max(time for _, time in shapes[1:]) == 8


def test_beside_others_nothing_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = count_passes(exact_model(1), monkeypatch)
    scheduler = scheduler_of(exact_model(1), 7)
    for start in (0, 1):
        scheduler.submit(Request(SYSTEM[start : start + 20], replace(GREEDY, max_new_tokens=60)))
    scheduler.step()
    shapes.clear()
    finish(scheduler)
    assert set(shapes) == {(2, 1)}


# ------------------------------------------------------------------------------------------------------ the guesses


def judged(lookup: PromptLookup, tokens: list[int], answer: list[int]) -> list[list[int]]:
    """The guesses while an answer comes token by token."""
    guesses = []
    for token in answer:
        guesses.append(lookup.guess(tokens, 4))
        tokens = [*tokens, token]
    return guesses


def test_a_guess_is_what_followed_the_last_time() -> None:
    assert NGRAM == 3
    lookup = PromptLookup()
    lookup._num_right = 4.0
    assert lookup.guess([1, 2, 3, 4, 1, 2, 3, 5, 6, 7, 8, 9, 1, 2, 3], 4) == [5, 6, 7, 8]
    lookup = PromptLookup()
    lookup._num_right = 4.0
    assert lookup.guess([1, 2, 3, 4, 9, 2, 3], 4) == [] == PromptLookup().guess([1, 2], 4)
    # It may run into itself.
    assert lookup.guess([1, 2, 3, 4, 9, 2, 3, 5, 6, 5, 6, 5, 6], 4) == [5, 6, 5, 6]


def test_wrong_guesses_end_the_trust_and_right_ones_begin_it_again() -> None:
    tokens = [*range(40), 99]
    lookup = PromptLookup()
    found = []
    for last in (60, 61, 62):  # the same three tokens, followed by something else each time
        tokens += [4, 5, 6]
        found.append(lookup.guess(tokens, 4))
        tokens.append(last)
        lookup.guess(tokens, 4)
    # The second guess is not made, but it is compared with what came.
    assert found == [[7, 8, 9, 10], [], []] and lookup._num_right < 1
    assert judged(lookup, [*tokens, 20, 21, 22], list(range(23, 39)))[:9] == [[]] * 8 + [[31, 32, 33, 34]]


def test_a_negative_number_of_guesses_is_refused() -> None:
    with pytest.raises(ValueError, match="draft_tokens is -1; accepted is 0"):
        SchedulerSettings(draft_tokens=-1)
    assert torch.float64 == exact_model(0).dtype
