"""The scheduler says how likely a prompt is, what it knew of it, and several schedulers share a thread."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from random_models import make_model
from test_scheduler import GREEDY, answer_of, finish, ids_of, scheduler_of, slots_of

from tinylm.generation import scheduler as module
from tinylm.generation.request import Event, Request, RequestError
from tinylm.generation.scheduler import Scheduler, run_together
from tinylm.model.model_tinylm import TinyLMForCausalLM


def true_logprobs(model: TinyLMForCausalLM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].double().log_softmax(-1)


def test_a_prompt_is_scored(model, prompts, monkeypatch):
    """In parts of 7 tokens, 3 positions at a time, beside other requests and after one that left its tokens."""
    monkeypatch.setattr(module, "SCORED_AT_ONCE", 3)
    scheduler = scheduler_of(model, 5, prefill_tokens=7)
    long = [*prompts[3], *prompts[6]]
    answer_of(scheduler, Request(long, GREEDY))
    asked = [Request(prompt, GREEDY, num_prompt_logprobs=2) for prompt in (long, prompts[2], prompts[8])]
    tickets = [scheduler.submit(request) for request in asked]
    other = scheduler.submit(Request(prompts[1], GREEDY))
    events = finish(scheduler)
    assert other.prompt_logprobs == []
    for ticket in tickets:
        prompt = list(ticket.request.prompt)
        truth = true_logprobs(model, prompt)
        assert [found.token_id for found in ticket.prompt_logprobs] == prompt[1:] and ticket.num_cached == 0
        for position, found in enumerate(ticket.prompt_logprobs):
            assert found.logprob == pytest.approx(truth[position, prompt[position + 1]].item(), abs=1e-4)
            values, ids = truth[position].topk(2)
            assert [token_id for token_id, _ in found.top] == ids.tolist()
            assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert ids_of(events[ticket]) == answer_of(scheduler_of(model, 1), replace(ticket.request))


def test_more_than_there_are_is_refused(model):
    with pytest.raises(RequestError, match="num_prompt_logprobs is 301; the model has 300"):
        scheduler_of(model).submit(Request([5], GREEDY, num_prompt_logprobs=301))
    with pytest.raises(ValueError, match="num_prompt_logprobs is -1"):
        Request([5], GREEDY, num_prompt_logprobs=-1)


def test_what_was_known_of_a_prompt_is_said(model, prompts):
    scheduler = scheduler_of(model, 3)
    first = scheduler.submit(Request(prompts[3], GREEDY))
    finish(scheduler)
    again = scheduler.submit(Request([*prompts[3][:20], 7, 8], GREEDY))
    finish(scheduler)
    assert (first.num_cached, again.num_cached) == (0, 20)


def test_schedulers_share_a_thread(model, prompts):
    """Two models, one thread: each request has its own model's answer, and the thread ends when both are closed."""
    models = [model, make_model(seed=5)]
    changed = threading.Condition()
    schedulers = [Scheduler(each, None, slots_of(each, 3), changed) for each in models]
    thread = threading.Thread(target=run_together, args=(schedulers,), daemon=True)
    thread.start()
    threads_seen: set[int] = set()
    got: list[list[list[int]]] = [[[] for _ in prompts] for _ in models]
    done = threading.Semaphore(0)
    for number, prompt in enumerate(prompts):
        for place, scheduler in enumerate(schedulers):

            def listen(event: Event, answer: list[int] = got[place][number]) -> None:
                threads_seen.add(threading.get_ident())
                answer.extend(event.token_ids)
                if event.finish_reason:
                    done.release()

            scheduler.submit(Request(prompt, GREEDY), listen)
    for _ in range(2 * len(prompts)):
        assert done.acquire(timeout=60)
    assert threads_seen == {thread.ident}
    for each, answers in zip(models, got, strict=True):
        assert answers == [answer_of(scheduler_of(each, 1), Request(prompt, GREEDY)) for prompt in prompts]
    assert got[0] != got[1]
    schedulers[0].close()
    thread.join(0.2)
    assert thread.is_alive()
    schedulers[1].close()
    thread.join(10)
    assert not thread.is_alive()
