"""OpenAI's own package against a real socket. What it must get comes from the engine and from the model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
import torch

from tests.server.conftest import RECITED
from tests.server.serving import Server, running, settings_for
from tinylm.checkpoint.model_folder import load_model
from tinylm.generation.sampling import SamplingSettings

CHAT = [
    {"role": "system", "content": "Sei höflich."},
    {"role": "user", "content": "Wer bist du? 你是谁？ 🐉"},
]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def greedy(server: Server, messages: list, count: int) -> str:
    return server.engine.reply(messages, SamplingSettings(max_new_tokens=count, temperature=0))


def test_a_chat_is_the_engines_greedy_answer(server, client):
    answer = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_tokens=24)
    (choice,) = answer.choices
    assert choice.message.content == greedy(server, CHAT, 24) != greedy(server, CHAT[1:], 24)
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "length", 0)
    settings = SamplingSettings(max_new_tokens=24, temperature=0)
    prompt = server.engine.prompt(CHAT, settings).ids
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 24)
    assert answer.usage.total_tokens == len(prompt) + 24
    assert (answer.object, answer.model) == ("chat.completion", "tiny")


@pytest.mark.parametrize("limit", [{"max_completion_tokens": 5}, {"max_tokens": 5}])
def test_both_names_of_the_limit(client, limit):
    answer = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0, **limit)
    assert answer.usage.completion_tokens == 5


def test_without_a_limit_the_context_is_filled(server, client):
    answer = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0)
    assert answer.usage.total_tokens == 256 and answer.choices[0].finish_reason == "length"


def test_a_stream_has_the_same_text_and_usage(server, client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_tokens=24, **options)
    assert last.choices == [] and last.usage.completion_tokens == 24
    assert {len(chunk.choices) for chunk in chunks} == {1} and all(chunk.usage is None for chunk in chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == greedy(server, CHAT, 24)
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_no_usage_in_a_stream_that_did_not_ask(client):
    chunks = list(client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=3, stream=True))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)


def test_characters_are_never_broken(reciter):
    client = openai.OpenAI(base_url=f"{reciter.url}/v1", api_key="none", max_retries=0)
    with client:
        chunks = list(client.chat.completions.create(model="reciter", messages=CHAT, stream=True, temperature=0))
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == RECITED and "\ufffd" not in "".join(pieces)
        assert chunks[-1].choices[0].finish_reason == "stop"
        tokens = reciter.models.named(None).tokenizer.encode(RECITED)
        assert any(piece in "語🐉" for piece in pieces if piece) and len(pieces) < len(tokens)
        cut = client.chat.completions.create(model="reciter", messages=CHAT, stop=["x", "🐉, «o"], temperature=0)
        assert cut.choices[0].message.content == "Schön語" and cut.choices[0].finish_reason == "stop"


def test_seeds_and_n_are_the_engines(server, client):
    ask = {"model": "tiny", "messages": CHAT, "max_tokens": 12, "seed": 11}
    answers = [choice.message.content for choice in client.chat.completions.create(**ask, n=3).choices]
    again = [choice.message.content for choice in client.chat.completions.create(**ask, n=3).choices]
    settings = SamplingSettings(max_new_tokens=12, seed=11)
    prompt = server.engine.prompt(CHAT, settings).ids
    expected = server.engine.generate_batch([prompt] * 3, settings, server.engine.stop_ids)
    assert answers == again == [server.engine.text_of(ids) for ids in expected] and len(set(answers)) == 3
    other = client.chat.completions.create(**{**ask, "seed": 12}).choices[0].message.content
    assert other != answers[0]


def test_n_in_a_stream(client):
    ask = {"model": "tiny", "messages": CHAT, "max_tokens": 8, "seed": 5, "n": 3}
    whole = [choice.message.content for choice in client.chat.completions.create(**ask).choices]
    texts, reasons, roles = [""] * 3, [[], [], []], [0] * 3
    for chunk in client.chat.completions.create(**ask, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
        reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == whole and roles == [1, 1, 1] and reasons == [["length"]] * 3


def test_logprobs_are_those_of_the_model_in_float32(server, client, model_folder):
    ask = {"model": "tiny", "messages": CHAT, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 4}
    (choice,) = client.chat.completions.create(**ask).choices
    settings = SamplingSettings(max_new_tokens=6, temperature=0)
    prompt = server.engine.prompt(CHAT, settings).ids
    answer = list(server.engine.generate(prompt, settings))
    model, tokenizer, _ = load_model(model_folder)
    with torch.no_grad():
        rows = model(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    assert len(choice.logprobs.content) == 6
    for found, row, token_id in zip(choice.logprobs.content, rows, answer, strict=True):
        assert bytes(found.bytes) == tokenizer.token_bytes(token_id)
        assert found.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        values, ids = row.topk(4)
        assert [bytes(top.bytes) for top in found.top_logprobs] == [tokenizer.token_bytes(int(i)) for i in ids]
        assert [top.logprob for top in found.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
    streamed = client.chat.completions.create(**ask, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [each.logprob for part in parts for each in part.content] == pytest.approx(
        [each.logprob for each in choice.logprobs.content], abs=1e-4
    )


def test_logprobs_without_alternatives(client):
    (choice,) = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=2, logprobs=True).choices
    assert [each.top_logprobs for each in choice.logprobs.content] == [[], []]
    (choice,) = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=2).choices
    assert choice.logprobs is None


def test_completions_continue_a_text(server, client):
    settings = SamplingSettings(max_new_tokens=9, temperature=0)
    prompt = server.engine.text_prompt("Größe: 三")
    expected = "".join(server.engine.stream_text(prompt, settings))
    answer = client.completions.create(model="tiny", prompt="Größe: 三", max_tokens=9, temperature=0)
    assert answer.choices[0].text == expected and answer.usage.prompt_tokens == len(prompt)
    chunks = client.completions.create(model="tiny", prompt="Größe: 三", max_tokens=9, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert client.completions.create(model="tiny", prompt="Größe").usage.completion_tokens == 16


def test_responses(server, client):
    expected = greedy(server, CHAT, 10)
    ask = {"model": "tiny", "temperature": 0, "max_output_tokens": 10}
    response = client.responses.create(**ask, instructions=CHAT[0]["content"], input=CHAT[1]["content"])
    assert response.output_text == expected and response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 10 and response.usage.input_tokens > 20
    assert client.responses.create(**ask, input=CHAT).output_text == expected
    with client.responses.stream(**ask, input=CHAT) as stream:
        events = list(stream)
    final = events[-1].response
    assert final.output_text == expected == "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.incomplete",
    ]  # fmt: skip


def test_a_response_can_be_sent_back_as_input(reciter):
    with openai.OpenAI(base_url=f"{reciter.url}/v1", api_key="none", max_retries=0) as client:
        first = client.responses.create(model="reciter", input="Hallo", temperature=0)
        assert first.status == "completed" and first.output_text == RECITED and first.incomplete_details is None
        history = [{"role": "user", "content": "Hallo"}, *[item.model_dump() for item in first.output]]
        second = client.responses.create(model="reciter", input=[*history, CHAT[1]], temperature=0)
        assert second.output_text == RECITED and second.usage.input_tokens > first.usage.input_tokens
        with client.responses.stream(model="reciter", input="Hallo", temperature=0) as stream:
            assert stream.get_final_response().output_text == RECITED


def test_models(server, client):
    (card,) = client.models.list().data
    assert (card.id, card.object, card.owned_by) == ("tiny", "model", "tinylm")
    assert client.models.retrieve("tiny") == card
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("größe")


def test_async(server):
    async def ask() -> tuple[list[str], str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            create = client.chat.completions.create
            whole = await asyncio.gather(
                *(create(model="tiny", messages=CHAT[i % 2 :], temperature=0, max_tokens=10) for i in range(6))
            )
            stream = await create(model="tiny", messages=CHAT, temperature=0, max_tokens=10, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            async with client.responses.stream(model="tiny", input=CHAT, temperature=0, max_output_tokens=10) as events:
                last = [event async for event in events][-1]
            return [each.choices[0].message.content for each in whole], "".join(pieces), last.response.output_text

    whole, streamed, response = asyncio.run(ask())
    expected = [greedy(server, CHAT, 10), greedy(server, CHAT[1:], 10)]
    assert whole == expected * 3 and streamed == response == expected[0]


@pytest.mark.parametrize(
    ("wrong", "kind", "code"),
    [
        ({"model": "größer"}, openai.NotFoundError, "model_not_found"),
        ({"messages": []}, openai.BadRequestError, "invalid_value"),
        ({"temperature": -1}, openai.BadRequestError, "invalid_value"),
        ({"extra_body": {"mirostat": 2}}, openai.BadRequestError, "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "long " * 400}]}, openai.BadRequestError, "context_length_exceeded"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, openai.BadRequestError, None),
        ({"n": 65}, openai.BadRequestError, "too_many_answers"),
    ],
)  # fmt: skip
def test_errors_are_openais(client, wrong, kind, code):
    with pytest.raises(kind) as found:
        client.chat.completions.create(**{"model": "tiny", "messages": CHAT, **wrong})
    assert found.value.code == code and found.value.body["type"] and found.value.body["message"]


def test_a_key_and_a_full_queue(model_folder):
    settings = settings_for(model_folder, api_key="geheim", max_streams=1, max_waiting=2)
    with running(settings) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="falsch", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="geheim", max_retries=0) as client:
            assert client.models.list().data[0].id == "tiny"
            with pytest.raises(openai.BadRequestError, match="at most 2 answers in all"):
                client.chat.completions.create(model="tiny", messages=CHAT, n=3)
            answers = {"model": "tiny", "messages": CHAT, "max_tokens": 200, "n": 2}
            with client.chat.completions.create(**answers, stream=True) as stream:
                next(iter(stream))
                with pytest.raises(openai.RateLimitError) as found:
                    client.chat.completions.create(**answers)
            assert found.value.response.headers["retry-after"] == "1"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="geheim", max_retries=8) as client:
            answer = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=2)
            assert answer.usage.completion_tokens == 2
