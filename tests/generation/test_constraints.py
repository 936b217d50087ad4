"""Constrained answers: whatever a model of random weights prefers, its answer has the form, and ends where it ends."""

from __future__ import annotations

import builtins
import json
import re
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch
from random_models import make_model
from test_scheduler import finish, ids_of, slots_of

from tests.tokenizer.other_tokenizers import write_tokenizer
from tinylm.generation import constraints
from tinylm.generation.constraints import Grammar, GrammarCompiler
from tinylm.generation.json_schema import ANNOTATIONS, KEYWORDS, MAX_OPTIONAL_PROPERTIES
from tinylm.generation.request import Event, Request, RequestError
from tinylm.generation.sampling import SamplingSettings
from tinylm.generation.scheduler import Scheduler
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer

CONTEXT = 1500
SETTINGS = SamplingSettings(max_new_tokens=1400, temperature=1.0, top_p=1.0, seed=0)
STOPS = (0, 2)
NAMES = [f"p{n}" for n in range(1000)]

TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "é": {"enum": ["größer", "小さい", 5, None, "<|im_end|>"]},
                "children": {"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["é", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: dict[str, Any] = {
    "person": {
        "type": "object",
        "title": "an annotation",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "height": {"type": "number", "exclusiveMinimum": 0.5, "maximum": 2.5},
            "tags": {"type": "array", "items": {"enum": ["ä", "b\n", 'c"\\']}, "minItems": 1, "maxItems": 4},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    "pairs": {"type": "array", "prefixItems": [{"type": "null"}, {"const": {"a": [1, "二"]}}], "items": False},
    "number": {"type": "integer", "minimum": -7, "maximum": 3000, "multipleOf": 7},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,5}-[0-9]+$", "maxLength": 9},
    "date": {"type": "string", "format": "date"},
    "either": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "integer", "minimum": 0, "maximum": 9}]},
    "tree": TREE,
}


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.default()


@cache
def random_model(seed: int = 0, vocab_size: int = 6410) -> TinyLMForCausalLM:
    """Ten tokens more than the tokenizer has: a model may have such rows."""
    return make_model(seed, vocab_size=vocab_size, max_position_embeddings=CONTEXT)


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer(), 6410)


def scheduler_of(model: TinyLMForCausalLM, own: Tokenizer | None = None, num_slots: int = 4) -> Scheduler:
    return Scheduler(model, own or tokenizer(), slots_of(model, num_slots, context_length=CONTEXT))


def answer(scheduler: Scheduler, request: Request) -> list[Event]:
    ticket = scheduler.submit(request)
    return finish(scheduler)[ticket]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


# ------------------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_is_json_that_the_schema_accepts(name: str) -> None:
    """Of untrained models, drawn and greedy."""
    grammar, accepts = compiler().json_schema(SCHEMAS[name]), jsonschema_rs.validator_for(SCHEMAS[name]).is_valid
    texts = set()
    for seed in range(30):
        settings = replace(SETTINGS, seed=seed, temperature=(0.0, 0.8, 3.0)[seed % 3])
        request = Request([5 + seed, 77], settings, STOPS, constraint=grammar)
        events = answer(scheduler_of(random_model(seed % 4)), request)
        assert events[-1].finish_reason == "stop", (events[-1], text_of(events))
        texts.add(text_of(events))
        assert accepts(json.loads(text_of(events))), text_of(events)
    assert len(texts) > 3


def test_a_json_object_may_be_any() -> None:
    """It ends where it is complete. If it is cut, it is the beginning of an object."""
    reasons = []
    for seed in range(12):
        request = Request(
            [9], replace(SETTINGS, seed=seed, max_new_tokens=60), STOPS, constraint=compiler().json_object()
        )
        events = answer(scheduler_of(random_model(seed % 4)), request)
        reasons.append(events[-1].finish_reason)
        if reasons[-1] == "stop":
            assert isinstance(json.loads(text_of(events)), dict)
        else:
            assert text_of(events).startswith("{") and len(ids_of(events)) == 60
    assert set(reasons) <= {"stop", "length"} and "length" in reasons


@pytest.mark.parametrize(
    "pattern",
    [
        r"(ab|c\d{2,4})+é?",
        r"[a-z]{3}(, [a-z]{3}){0,5}\.",
        r"-?[0-9]{1,3}(\.[0-9]+)?",
        r"今天(天气|心情)(很好|不好)[!?]",
        r"(?s).{1,5}",
        r"<\|im_end\|>|</?b>",
        "a/b\\\\ \"c\"\n\t'd'",
    ],
)
def test_the_whole_answer_matches_a_regular_expression(pattern: str) -> None:
    grammar = compiler().regex(pattern)
    for seed in range(30):
        request = Request([5 + seed], replace(SETTINGS, seed=seed, max_new_tokens=40), STOPS, constraint=grammar)
        events = answer(scheduler_of(random_model(seed % 4)), request)
        assert events[-1].finish_reason in ("stop", "length")
        if events[-1].finish_reason == "stop":
            assert re.fullmatch(pattern, text_of(events)), text_of(events)


@pytest.mark.parametrize("stops", [STOPS, ()])
def test_an_answer_is_one_of_the_choices(stops: tuple[int, ...]) -> None:
    """Also without end tokens, where one choice begins like no other; special characters mean themselves."""
    choices = [
        "green (light)",
        "blue|.*",
        "<|im_end|>",
        "<|endoftext|>",
        "中文",
        " blank\n",
        "C:\\n",
        "a-b&&c~d#[e]{2}$^",
    ]
    found = set()
    for seed in range(60):
        settings = replace(SETTINGS, seed=seed, temperature=3.0)
        request = Request([5 + seed], settings, stops, constraint=compiler().choices(choices))
        events = answer(scheduler_of(random_model(seed % 4)), request)
        found.add(text_of(events))
        assert events[-1].finish_reason == "stop" and not set(ids_of(events)) & tokenizer().special_ids
    assert found <= set(choices) and len(found) > 5


def test_the_model_chooses_the_end_only_where_the_text_is_complete() -> None:
    """A choice that begins like another one: both are answered. The end token is wanted most of all."""
    grammar = compiler().choices(["an", "and", "andante"])
    found = set()
    for seed in range(40):
        bias = {2: 100.0} if seed % 2 else {2: -3.0}
        request = Request([5 + seed], replace(SETTINGS, seed=seed), STOPS, constraint=grammar, logit_bias=bias)
        events = answer(scheduler_of(random_model(seed % 4)), request)
        found.add(text_of(events))
        assert events[-1].finish_reason == "stop"
    assert found == {"an", "and", "andante"}


def test_every_token_across_borders_may_write_a_form() -> None:
    """However a text is cut into tokens, each of them is allowed."""
    text = '{"é": "größer", "children": []}'
    state = compiler().json_schema(TREE).start(STOPS)
    for token_id in tokenizer().encode(text)[:-1]:
        assert state.mask()[token_id] and not state.mask()[[0, 2]].any()
        assert not state.take(token_id)
    assert state.take(tokenizer().encode("}")[0]) and state.mask()[[0, 2]].all() and int(state.mask().sum()) == 2
    state = compiler().regex("(good morning )+").start(STOPS)
    for byte in b"good morning good":
        token_id = next(i for i in range(16, 6400) if tokenizer().token_bytes(i) == bytes([byte]))
        assert not state.take(token_id)
    # Where only one text may follow, it is the tokenizer's tokens that write it.
    assert state.mask().nonzero().tolist() == [tokenizer().encode(" morning ")[:1]]


@pytest.mark.parametrize("name", ["llama2", "mistral", "always", "never_no_bos", "qwen", "llama3"])
def test_tokenizers_of_others(name: str, tmp_path: Path) -> None:
    """Decoding may drop a blank in front of the first token, two tokens may have the same bytes, and so on."""
    own = Tokenizer.load(write_tokenizer(name, tmp_path))
    model = random_model(0, own.vocab_size + 3)
    mine = GrammarCompiler(own, own.vocab_size + 3)
    choices = ["quick fox", " two blanks  here", "Äpfel", "中", "<s>", "</s>", "  "]
    schema = SCHEMAS["person"]
    found, scheduler, seed = set(), scheduler_of(model, own), 0
    while (seed < 60 or found < set(choices)) and seed < 1000:
        settings = replace(SETTINGS, seed=seed, temperature=30.0)  # each token that is allowed is about as likely
        events = answer(scheduler, Request([3 + seed % 60], settings, [own.eos_id], constraint=mine.choices(choices)))
        assert text_of(events) in choices and events[-1].finish_reason == "stop"
        assert own.decode(ids_of(events)) == text_of(events)
        found.add(text_of(events))
        if seed % 10 == 0 and seed < 60:
            settings = replace(settings, temperature=3.0)
            events = answer(scheduler, Request([3 + seed], settings, [own.eos_id], constraint=mine.json_schema(schema)))
            assert jsonschema_rs.is_valid(schema, json.loads(text_of(events)))
        seed += 1
    assert found == set(choices), "each can be written"


def test_a_dropped_blank_may_be_written_or_not(tmp_path: Path) -> None:
    own = Tokenizer.load(write_tokenizer("llama2", tmp_path))
    blank = next(i for i in range(own.vocab_size) if own.token_bytes(i) == b" " and i >= 259)
    with_blank, without = own.encode("quick")[0], own.encode_within(["quick"])[0][0]
    state = GrammarCompiler(own, own.vocab_size).choices(["quick", "brown"]).start([own.eos_id])
    assert own.token_bytes(with_blank).startswith(b" ") and own.drops_first_blank
    plain = [i for i in range(own.vocab_size) if own.token_bytes(i) == b"q"]
    assert state.mask()[[blank, with_blank, without, *plain]].all()
    assert not state.take(blank)
    assert not state.mask()[blank] and not state.mask()[with_blank] and state.mask()[plain].any()
    refused(lambda: GrammarCompiler(own, own.vocab_size).regex("[^\\s\\S]"), "accepts no text")


def test_tokens_beyond_the_tokenizer_and_control_tokens_are_never_allowed() -> None:
    state = compiler().regex("(?s).*").start(())
    allowed = state.mask()
    assert allowed.dtype == torch.bool and allowed.shape == (6410,)
    assert not allowed[6400:].any() and not allowed[:16].any() and allowed[16:6400].sum() > 6000
    assert GrammarCompiler(tokenizer(), 300).regex(".").start((0, 999)).mask().shape == (300,)


# ------------------------------------------------------------------------------------------- beside everything else


def test_many_streams_each_with_its_own_form() -> None:
    """Their answers are those they get alone; free answers beside them are not touched."""
    grammars: list[Grammar | None] = [None, compiler().regex("[a-z]{5,30}"), compiler().choices(["one", "two"])]
    grammars += [compiler().json_schema(schema) for schema in SCHEMAS.values()]
    requests = [
        Request(
            [5, 6, 7 + n % 3], replace(SETTINGS, seed=n, max_new_tokens=80), STOPS, number=n % 2, constraint=grammar
        )
        for n, grammar in enumerate(grammars * 2)
    ]
    alone = [ids_of(answer(scheduler_of(random_model()), request)) for request in requests]
    together = scheduler_of(random_model(), num_slots=9)
    tickets = [together.submit(request) for request in requests]
    events = finish(together)
    assert [ids_of(events[ticket]) for ticket in tickets] == alone
    assert len({tuple(ids) for ids in alone}) > 15


def test_penalties_stop_strings_and_limits_hold_too() -> None:
    grammar, model = compiler().json_schema(SCHEMAS["person"]), random_model()
    for seed in range(6):
        settings = replace(SETTINGS, seed=seed, top_p=0.5, min_p=0.05, top_k=40, repetition_penalty=1.3)
        request = Request([5], settings, STOPS, presence_penalty=1.0, frequency_penalty=0.5, constraint=grammar)
        events = answer(scheduler_of(model), replace(request, num_logprobs=2))
        assert jsonschema_rs.is_valid(SCHEMAS["person"], json.loads(text_of(events)))
        assert all(len(event.logprobs) == len(event.token_ids) for event in events)
        whole = text_of(events)
        events = answer(scheduler_of(model), replace(request, stop_strings=('"age"',)))
        assert events[-1].finish_reason == "stop" and text_of(events) == whole[: whole.index('"age"')]
        events = answer(scheduler_of(model), replace(request, settings=replace(settings, max_new_tokens=7)))
        assert events[-1].finish_reason == "length" and whole.startswith(text_of(events)[:-1])
    exact = replace(SETTINGS, max_new_tokens=len(ids_of(answer(scheduler_of(model), replace(request)))))
    events = answer(
        scheduler_of(model), replace(request, settings=replace(settings, max_new_tokens=exact.max_new_tokens))
    )
    assert events[-1].finish_reason == "stop"


# ------------------------------------------------------------------------------------------------------------ errors


def nested(depth: int, form: str = '{"type":"object","properties":{"a":') -> Any:
    """Text, as Python's own JSON writer gives up on deep values."""
    value: Any = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}} if form.startswith('{"type"') else {"anyOf": [value]}
    return value


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, r"at \$ has 'uniqueItems', which is not supported; leave it out"),
        ({"properties": {"a": {"nullable": True}}}, r"at \$.properties.a has 'nullable'"),
        ({"anyOf": [{}, {"not": {}}]}, r"at \$.anyOf\[1\] has 'not'"),
        ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "has 'x-guidance'"),
        ({"type": "object", "minProperties": 2}, "has minProperties 2; expected at most 1"),
        ({"type": "string", "format": "banana"}, "cannot be used: .*banana"),
        ({"type": "string", "pattern": "(?=a)b"}, "cannot be used: look-around"),
        ({"type": "string", "pattern": "((a{1000}){1000}){1000}"}, "1000000000 characters with its repetitions"),
        ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "oneOf constraints are not supported"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum .5. is greater than maximum"),
        ({"type": "integer", "multipleOf": 10**9 + 7}, "cannot be used: .*exhausted"),
        (False, "is false, which accepts nothing"),
        ({"enum": []}, "Unsatisfiable"),
        ({"$ref": "#"}, "accepts no text"),
        ({"$ref": "#/$defs/nothing"}, "does not exist"),
        ({"$ref": "https://example.com/schema.json"}, "does not fetch"),
        ({"const": float("nan")}, "cannot be written as JSON"),
        ({"const": "\ud800"}, "cannot be used"),
        ({"const": {1, 2}}, "cannot be written as JSON"),
        ([1], r"at \$ is \[1\]; expected an object, true or false"),
        ({"properties": [1]}, r"at \$.properties is \[1\]; expected an object"),
        ({"items": "a"}, r"at \$.items is 'a'; expected an object, true or false"),
        ({"description": "a" * 2**20}, "has 1048595 characters; expected at most 65536"),
        (nested(40), "nested deeper than 32 schemas"),
        (nested(40, "anyOf"), "nested deeper than 32 schemas"),
        (nested(20_000), "its brackets are too deep"),
        ({"properties": {f"p{n}": {} for n in range(500)}}, "has 500 properties that are not required; expected"),
        ({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(4)]} for i in range(8)]}, "too large"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_held_is_refused(schema: Any, message: str) -> None:
    refused(lambda: compiler().json_schema(schema), message)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a(", "unclosed group"),
        ("(?=a)b", "look-around.* is not supported"),
        (r"(a)\1", "backreferences are not supported"),
        (r"\bword", "lookarounds not supported"),
        ("(" * 2000 + "a" + ")" * 2000, "number of nested parentheses"),
        ("[^\\s\\S]", "accepts no text"),
        ("", "accepts only the empty text"),
        ("a" * 5000, "has 5000 characters; expected at most 4096"),
        ("(a{1000}){1000}", "has 1000000 characters with its repetitions written out; expected at most 20000"),
        ("((((a{1,999}){1,999}){1,999}){1,999}){1,999}", "repetitions written out"),
        ("a{99999999999999999999}", "repetitions written out"),
        (r"(?-u:\xff)", "invalid UTF-8"),
        ("\ud800", "not valid Unicode"),
        (5, "not valid Unicode"),
    ],
)
def test_a_regular_expression_that_cannot_be_held_is_refused(pattern: Any, message: str) -> None:
    refused(lambda: compiler().regex(pattern), message)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], r"the choices are \[\]; expected a list of one text or more"),
        ([""], "accepts only the empty text"),
        (["a", 5], "expected a list of one text or more"),
        ("abc", "expected a list"),
        (["\ud800"], "expected a list"),
        (["é" * 40_000], "have 80000 bytes together; expected at most 32768"),
    ],
)
def test_choices_that_cannot_be_held_are_refused(choices: Any, message: str) -> None:
    refused(lambda: compiler().choices(choices), message)


def refused(make: Any, message: str) -> None:
    compiler()
    start = time.process_time()
    with pytest.raises(RequestError, match=message) as raised:
        make()
    assert time.process_time() - start < 0.1
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700


@pytest.mark.parametrize(
    "make",
    [
        lambda: compiler().json_schema({"enum": [f"value {n}" for n in range(4000)]}),
        lambda: compiler().json_schema({"properties": {f"p{n}": {} for n in range(MAX_OPTIONAL_PROPERTIES)}}),
        lambda: compiler().json_schema({"properties": {name: {} for name in NAMES}, "required": NAMES}),
        lambda: compiler().json_schema({"type": "array", "minItems": 10**9, "items": {"maxLength": 10**9}}),
        lambda: compiler().choices(["a" * 2**15]),
        lambda: compiler().choices([f"choice {n}" for n in range(2500)]),
        lambda: compiler().regex("(a{140}){140}"),
        lambda: compiler().regex("(.*a.{300}|(b|c)*b(b|c){300})"),
    ],
)  # fmt: skip
def test_the_largest_forms_cost_little(make: Any) -> None:
    """0.1 s to prepare, and 20 ms a token on the worst step of 100."""
    compiler()
    start = time.process_time()
    state = make().start(STOPS)
    assert time.process_time() - start < 0.1
    numbers = torch.Generator().manual_seed(0)
    for _ in range(100):
        allowed = state.mask().nonzero().flatten()
        allowed = allowed[allowed > 15]
        start = time.process_time()
        if state.take(int(allowed[torch.randint(len(allowed), (1,), generator=numbers)])):
            break
        assert time.process_time() - start < 0.02


def test_a_form_that_grows_too_complex_ends_its_own_request_only() -> None:
    """Its states double with each character; every answer has limits of its own."""
    grammar = compiler().regex("(?s)(x?.*a.{30}b?){5}z{300}")
    scheduler = scheduler_of(random_model())
    request = Request([5], SETTINGS, STOPS, constraint=grammar)
    neighbour = scheduler.submit(replace(request, constraint=compiler().json_schema(TREE)))
    tickets = [scheduler.submit(replace(request, number=number)) for number in range(2)]
    events = finish(scheduler)
    for ticket in tickets:
        assert events[ticket][-1].finish_reason == "error", events[ticket][-1]
        assert "too complex: " in events[ticket][-1].error and "\n" not in events[ticket][-1].error
    assert json.loads(text_of(events[neighbour]))


def test_every_keyword_of_the_list_is_enforced() -> None:
    """The library refuses what it knows and cannot enforce; it must not refuse what the list promises."""
    import llguidance

    own = {"additionalItems", "prefixItems", "items"}
    for keyword in KEYWORDS:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps({keyword: None}))
        assert "Unimplemented" not in llguidance.LLMatcher.validate_grammar(grammar), keyword
    assert own <= set(KEYWORDS) and set(KEYWORDS).isdisjoint(ANNOTATIONS)
    compiler().json_schema({keyword: "https://example.com/a" for keyword in ANNOTATIONS} | {"type": "null"})


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return plain(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ValueError, match=r"llguidance is not installed; install it with: pip install 'tinylm\[serve\]'"
    ):
        GrammarCompiler(tokenizer(), 6400)


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("abc", 3),
        (r"a{3}\.{2}", 5),
        ("(ab){1,10}c", 21),
        ("(a{10}|[^]b{9}]{2}){3}", 39),
        (r"\p{Greek}{4}[a[b]c]{5,}x", 10),
        ("(" * 5 + "a", 1),
        (")){3}", 4),
        ("a{0}", 1),
    ],
)
def test_the_size_of_a_regular_expression_counts_its_repetitions(pattern: str, size: int) -> None:
    assert constraints._written_out(pattern) == size
