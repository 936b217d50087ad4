"""Our models in EleutherAI's lm-evaluation-harness, for published numbers on its hundreds of tasks.

    pip install "tinylm[eval]"
    python -c "
    import lm_eval
    from tinylm.evaluation.lm_eval_adapter import make_lm_eval_model
    print(lm_eval.simple_evaluate(make_lm_eval_model('out/full_sft_512_epoch0'),
    tasks=['arc_easy'])['results'])"

The harness gives texts and takes log-likelihoods or texts; its own tokenization customs (a trailing space
belongs to the continuation) are kept here, so that numbers compare with those of other models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinylm.evaluation.sequence_logprob import TOKENS_PER_BATCH, continuation_logprobs
from tinylm.generation.sampling import SamplingSettings

DEFAULT_MAX_NEW_TOKENS = 256
"""The harness's own default for tasks that do not say."""


class LMEvalRequests:
    """The harness's three kinds of request, answered by one of our models. Needs no harness itself.

    A text follows what documents began with when the model was trained (`engine.document_start`). Without a context,
    it follows <|endoftext|> in any case.

    Each request has `.args`: (context, continuation), (text,) or (context, generation settings).
    """

    def __init__(self, engine: Any, model: Any = None, tokens_per_batch: int = TOKENS_PER_BATCH) -> None:
        self.engine = engine
        self.model = engine.model if model is None else model
        self.tokenizer = engine.tokenizer
        self.tokens_per_batch = tokens_per_batch

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log P(continuation | context) in nats, would greedy decoding give it) for each request."""
        pairs = [self.encode_pair(*request.args) for request in requests]
        scores = continuation_logprobs(self.model, pairs, tokens_per_batch=self.tokens_per_batch)
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log P(text) in nats for each request, in sliding windows where a text is long."""
        texts = [request.args[0] for request in requests]
        pairs = [(self._begun([]), ids) for ids in self.tokenizer.encode_batch(texts)]
        scores = continuation_logprobs(self.model, pairs, tokens_per_batch=self.tokens_per_batch)
        return [score.logprob for score in scores]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text generated for each request, cut before the first of its stop strings."""
        groups: dict[SamplingSettings, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(sampling_settings(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        for settings, indices in groups.items():
            prompts = [self._begun(self.tokenizer.encode(requests[index].args[0])) for index in indices]
            answers = self.engine.generate_batch(prompts, settings)
            for index, ids in zip(indices, answers, strict=True):
                texts[index] = cut_at(self.engine.text_of(ids), stop_strings(requests[index].args[1]))
        return texts

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both sides, encoded as one text and cut at the context's length, as in the harness.

        Spaces at the end of the context move to the continuation. Where both sides meet inside a token, that token
        counts as the context's, but the continuation keeps at least the last token.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        whole = self.tokenizer.encode(stripped + continuation)
        split = min(len(self.tokenizer.encode(stripped)), len(whole) - 1)
        return self._begun(whole[:split]), whole[split:]

    def _begun(self, ids: list[int]) -> list[int]:
        return [*self.engine.document_start, *ids] or [self.tokenizer.endoftext_id]


def sampling_settings(options: dict[str, Any]) -> SamplingSettings:
    """The harness's generation options as our settings; greedy unless `do_sample` is true."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens")
    longest = next((int(options[name]) for name in names if options.get(name)), DEFAULT_MAX_NEW_TOKENS)
    if not options.get("do_sample", False):
        return SamplingSettings(max_new_tokens=longest, temperature=0.0)
    return SamplingSettings(
        max_new_tokens=longest,
        temperature=float(options.get("temperature", 1.0)),
        top_k=int(options.get("top_k", 0)),
        top_p=float(options.get("top_p", 1.0)),
    )


def stop_strings(options: dict[str, Any]) -> list[str]:
    """The strings that end a generation, from the `until` option (one string or several)."""
    until = options.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


def make_lm_eval_model(
    model_path: str, device: str = "auto", dtype: str = "auto", tokens_per_batch: int = TOKENS_PER_BATCH
) -> Any:
    """An `lm_eval.api.model.LM` around a model folder.

    Raises:
        ValueError: the lm-eval package is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise ValueError('the package lm-eval is not installed; install it with pip install "tinylm[eval]"') from None
    import torch

    from tinylm.checkpoint.loading import load_for_use
    from tinylm.generation.engine import Engine
    from tinylm.system.runtime import setup_runtime
    from tinylm.tokenizer.chat_template import CHAT_TEMPLATE, render_chat

    runtime = setup_runtime(device, dtype, only_uses=True)
    loaded = load_for_use(model_path, device=runtime.device)
    engine = Engine(loaded.model, loaded.tokenizer, runtime.compute_dtype, loaded.document_start)
    model = engine.compute_model if runtime.compute_dtype == torch.int8 else loaded.model

    class TinyLMForLMEval(LMEvalRequests, LM):
        """Requests answered by ours, everything else inherited from the harness."""

        def __init__(self) -> None:
            LM.__init__(self)
            LMEvalRequests.__init__(self, engine, model, tokens_per_batch)
            self._device = runtime.device

        @property
        def tokenizer_name(self) -> str:
            return f"tinylm-{engine.tokenizer.fingerprint}"

        def chat_template(self, chat_template: bool | str = False) -> str:
            return engine.tokenizer.their_template or CHAT_TEMPLATE

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return render_chat(chat_history, add_generation_prompt, tokenizer=engine.tokenizer)

    return TinyLMForLMEval()
