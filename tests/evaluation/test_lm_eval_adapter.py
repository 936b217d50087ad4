"""The harness adapter, held to the harness's interface without the harness."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from tinylm.checkpoint.model_folder import save_model
from tinylm.evaluation.lm_eval_adapter import (
    LMEvalRequests,
    cut_at,
    make_lm_eval_model,
    sampling_settings,
    stop_strings,
)
from tinylm.generation.engine import Engine


def request(*args):
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def requests_of(model, tokenizer):
    return LMEvalRequests(Engine(model, tokenizer, dtype=model.dtype, document_start=[tokenizer.endoftext_id]))


def test_an_older_model_reads_a_context_as_it_is(model, tokenizer, reference_logprobs):
    old = LMEvalRequests(Engine(model, tokenizer, dtype=model.dtype))
    (value, _), (bare, _) = old.loglikelihood([request("The dog", " ran home"), request("", "The dog")])
    ids, split = tokenizer.encode("The dog ran home"), len(tokenizer.encode("The dog"))
    assert value == pytest.approx(sum(reference_logprobs(model, ids)[split - 1 :]), abs=1e-8)
    assert bare == pytest.approx(sum(reference_logprobs(model, [0, *tokenizer.encode("The dog")])), abs=1e-8)


def test_loglikelihood_splits_as_the_harness_does(requests_of, model, tokenizer, reference_logprobs):
    [(value, greedy), (same, _), (bare, _)] = requests_of.loglikelihood(
        [request("The dog", " ran home"), request("The dog ", "ran home"), request("", "The dog")]
    )
    ids = [0, *tokenizer.encode("The dog ran home")]
    split = len(tokenizer.encode("The dog"))
    assert value == pytest.approx(sum(reference_logprobs(model, ids)[split:]), abs=1e-8)
    assert same == value and greedy is False
    assert bare == pytest.approx(sum(reference_logprobs(model, [0, *tokenizer.encode("The dog")])), abs=1e-8)


@pytest.mark.parametrize(("context", "continuation"), [("The do", "gs ran home"), ("Grüße: hel", "lo there")])
def test_a_continuation_that_merges_with_its_context(
    context, continuation, requests_of, model, tokenizer, reference_logprobs
):
    """Both sides are encoded as one text, and cut where the context's own encoding ends."""
    whole, split = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    assert [*tokenizer.encode(context), *tokenizer.encode(continuation)] != whole
    [(value, _)] = requests_of.loglikelihood([request(context, continuation)])
    assert value == pytest.approx(sum(reference_logprobs(model, [0, *whole])[split:]), abs=1e-8)


def test_a_continuation_swallowed_by_its_context_is_scored_all_the_same(
    requests_of, model, tokenizer, reference_logprobs
):
    """`d` + `og` is one token, as long as the context alone: nothing was left to score, and that was certain."""
    assert len(tokenizer.encode("The d")) == len(tokenizer.encode("The dog"))
    [(value, _)] = requests_of.loglikelihood([request("The d", "og")])
    assert value == pytest.approx(reference_logprobs(model, [0, *tokenizer.encode("The dog")])[-1], abs=1e-8)


def test_rolling_is_the_whole_text(requests_of, model, tokenizer, reference_logprobs):
    [value] = requests_of.loglikelihood_rolling([request("Once upon a time")])
    assert value == pytest.approx(sum(reference_logprobs(model, [0, *tokenizer.encode("Once upon a time")])))


def test_generate_until_stops_and_keeps_the_order(requests_of):
    free = {"until": [], "max_gen_toks": 6}
    whole, short = requests_of.generate_until([request("The dog", free), request("A", {"max_gen_toks": 2})])
    assert whole and len(short) < len(whole) * 3
    stop = whole[2]
    [cut] = requests_of.generate_until([request("The dog", {"until": stop, "max_gen_toks": 6})])
    assert cut == whole[: whole.index(stop)]


def test_options():
    assert sampling_settings({"until": ["\n"], "temperature": 0.7}).temperature == 0
    drawn = sampling_settings({"do_sample": True, "temperature": 0.7, "top_p": 0.5, "max_tokens": 9})
    assert (drawn.temperature, drawn.top_p, drawn.max_new_tokens) == (0.7, 0.5, 9)
    assert stop_strings({"until": "\n"}) == ["\n"] and stop_strings({}) == []
    assert cut_at("one. two\nthree", ["\n", "."]) == "one"
    assert cut_at("one", ["", "x"]) == "one"


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install \"tinylm\[eval\]\""):
        make_lm_eval_model("anywhere")


def test_the_model_is_an_lm_of_the_harness(monkeypatch, tmp_path, model, tokenizer):
    """A stand-in for lm_eval.api.model.LM with the abstract methods of lm-eval 0.4."""
    import abc

    class LM(abc.ABC):
        def __init__(self):
            self._rank, self._device = 0, None

        @abc.abstractmethod
        def loglikelihood(self, requests): ...

        @abc.abstractmethod
        def loglikelihood_rolling(self, requests): ...

        @abc.abstractmethod
        def generate_until(self, requests): ...

    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["lm_eval.api.model"], "LM", LM, raising=False)
    save_model(tmp_path / "m", type(model)(model.config).eval(), tokenizer, {"stage": "pretrain"})
    lm = make_lm_eval_model(str(tmp_path / "m"), device="cpu", dtype="float32")
    assert isinstance(lm, LM) and lm._rank == 0
    assert len(lm.loglikelihood([request("A", " dog")])) == 1
    chat = [{"role": "user", "content": "Hi"}]
    assert lm.apply_chat_template(chat).endswith("<|im_start|>assistant\n")
    assert lm.tokenizer_name.endswith(tokenizer.fingerprint)
