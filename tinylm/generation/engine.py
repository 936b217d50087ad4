"""The engine: prompts in, answers out. Prefill once, then one token a step through the KV cache.

Shapes: B rows (prompts answered together), T time, C width, V vocabulary.

    engine = Engine(model, tokenizer)
    for piece in engine.chat([{"role": "user", "content": "Hello!"}], SamplingSettings()):
        print(piece, end="")

With a seed, an answer depends on the seed and on the prompt's place in the list only; batch size and order of
computation do not enter (each row draws from a generator of its own). Rounding can still differ between batch shapes,
which in bfloat16 may turn a close call; in float32 it hardly ever does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tinylm.generation.beam_search import beam_search
from tinylm.generation.cache_rows import select_rows
from tinylm.generation.history import FittedPrompt, fit_history, prompt_budget
from tinylm.generation.sampling import SamplingSettings, next_tokens, seen_tokens, uniform_numbers
from tinylm.model.inference_copy import inference_copy
from tinylm.model.kv_cache import KVCache
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.runtime import device_has_bf16
from tinylm.tokenizer.tokenizer import StreamDecoder, Tokenizer

__all__ = ["Engine", "SamplingSettings"]

# Rows that have finished are taken out of the batch once they are this share of it: taking them out copies the cache
# of the others, leaving them in computes tokens nobody reads.
FINISHED_SHARE = 0.125


class Engine:
    """Answers prompts with one model and its tokenizer.

    Args:
        model: a TinyLMForCausalLM. It is not changed: another precision is computed in a copy.
        tokenizer: may be None when only token ids go in and out.
        dtype: precision of the weights and of the computation. None takes bfloat16 for a float32 model where the
            hardware multiplies in it (twice the speed), else the model's own. With the model's own precision the
            engine shares its weights, so it follows a model that is still training.
    """

    def __init__(
        self, model: TinyLMForCausalLM, tokenizer: Tokenizer | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.dtype = dtype or _fastest_dtype(model)
        self.model = model
        self.compute_model = model if model.dtype == self.dtype else inference_copy(model, self.dtype)
        self._tokenizer = tokenizer
        self.context_length: int = model.config.max_position_embeddings

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; a ValueError when the engine was made without one."""
        if self._tokenizer is None:
            raise ValueError("this engine has no tokenizer; expected one for text; use Engine(model, tokenizer)")
        return self._tokenizer

    # ----------------------------------------------------------------------------------------------- token ids

    def limit(self, prompt_length: int, settings: SamplingSettings) -> int:
        """Most tokens an answer to a prompt of this length can have: the setting's, or the room that is left."""
        return min(settings.max_new_tokens, self.context_length - prompt_length)

    @torch.inference_mode()
    def generate(
        self, prompt_ids: list[int], settings: SamplingSettings, stop_ids: tuple[int, ...] = (0, 2)
    ) -> Iterator[int]:
        """Continue one prompt, yielding each token id as soon as it is known; a stop token ends it unseen.

        A prompt too long for the context keeps its tail (see `bounded`). Beam search yields only at its end.

        Raises:
            ValueError: the prompt is empty.
        """
        if settings.num_beams > 1:
            yield from self._beam_answer(prompt_ids, settings, stop_ids)
            return
        ids = self.bounded(prompt_ids, settings)
        limit = self.limit(len(ids), settings)
        uniforms = _uniforms(settings, [0], [limit]).to(self.compute_model.device)
        seen = self._seen([ids], settings)
        with _evaluating(self.compute_model):
            cache = self._new_cache(1, len(ids) + limit)
            logits = self._forward(torch.tensor([ids], device=self.compute_model.device), cache)
            if logits.isnan().any():
                raise ValueError("the model computes no numbers (NaN): its weights are damaged; use another checkpoint")
            for step in range(limit):
                token = next_tokens(logits, settings, uniforms[:, step], seen)
                token_id = int(token)
                if token_id in stop_ids:
                    return
                yield token_id
                if step + 1 < limit:
                    if seen is not None:
                        seen[0, token_id] = True
                    logits = self._forward(token[:, None], cache)

    @torch.inference_mode()
    def generate_batch(
        self,
        prompts: list[list[int]],
        settings: SamplingSettings,
        stop_ids: tuple[int, ...] = (0, 2),
        batch_size: int = 64,
    ) -> list[list[int]]:
        """Continue many prompts; the answers come in the prompts' order, without their stop tokens.

        Prompts of similar length share a batch, padded on the left; rows that have finished leave it.
        """
        if settings.num_beams > 1:
            return [list(self._beam_answer(prompt, settings, stop_ids)) for prompt in prompts]
        bounded = [self.bounded(prompt, settings) for prompt in prompts]
        seed = _seed_of(settings)
        answers: list[list[int]] = [[] for _ in prompts]
        with _evaluating(self.compute_model):
            for places in self._batches(bounded, settings, batch_size):
                rows = [bounded[place] for place in places]
                limits = [self.limit(len(row), settings) for row in rows]
                uniforms = _uniforms(settings, places, limits, seed)
                found = self._answer_rows(rows, limits, uniforms, settings, stop_ids)
                for place, answer in zip(places, found, strict=True):
                    answers[place] = answer
        return answers

    def bounded(self, prompt_ids: list[int], settings: SamplingSettings) -> list[int]:
        """The prompt, or its tail if it leaves too little of the context for an answer."""
        if not prompt_ids:
            raise ValueError("the prompt is empty; expected at least one token; give some text to continue")
        if self.context_length < 2:
            raise ValueError(f"a context of {self.context_length} token has no room for an answer; expected 2 or more")
        if len(prompt_ids) < self.context_length and len(prompt_ids) + settings.max_new_tokens <= self.context_length:
            return prompt_ids
        return prompt_ids[-prompt_budget(self.context_length, settings.max_new_tokens) :]

    # --------------------------------------------------------------------------------------------------- text

    def prompt(self, messages: list[dict[str, Any]], settings: SamplingSettings) -> FittedPrompt:
        """The conversation as a prompt within the context; its `notice` says what was left out, if anything."""
        return fit_history(self.tokenizer, messages, prompt_budget(self.context_length, settings.max_new_tokens))

    def chat(self, messages: list[dict[str, Any]], settings: SamplingSettings) -> Iterator[str]:
        """Answer a conversation in pieces of text, never breaking a character."""
        return self.stream_text(self.prompt(messages, settings).ids, settings)

    def stream_text(self, prompt_ids: list[int], settings: SamplingSettings) -> Iterator[str]:
        """Continue token ids in pieces of text; empty pieces (half a character so far) are left out."""
        decoder = StreamDecoder(self.tokenizer)
        for token_id in self.generate(prompt_ids, settings, self.stop_ids):
            piece = decoder.feed(token_id)
            if piece:
                yield piece
        rest = decoder.flush()
        if rest:
            yield rest

    def reply(self, messages: list[dict[str, Any]], settings: SamplingSettings) -> str:
        """Answer a conversation with one string."""
        return "".join(self.chat(messages, settings))

    def reply_batch(
        self, conversations: list[list[dict[str, Any]]], settings: SamplingSettings, batch_size: int = 128
    ) -> list[str]:
        """Answer many conversations, in their order."""
        prompts = [self.prompt(messages, settings).ids for messages in conversations]
        answers = self.generate_batch(prompts, settings, self.stop_ids, batch_size)
        return [self.tokenizer.decode(answer) for answer in answers]

    @property
    def stop_ids(self) -> tuple[int, int]:
        """The tokens that end an answer: end of document and end of message."""
        return (self.tokenizer.endoftext_id, self.tokenizer.im_end_id)

    # ----------------------------------------------------------------------------------------------- internals

    def _new_cache(self, batch_size: int, max_length: int) -> KVCache:
        return KVCache(self.compute_model.config, batch_size, max_length, self.compute_model.device, self.dtype)

    def _forward(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Logits [B, V] after the last token of input_ids [B, T]; no other position pays for the vocabulary."""
        return self.compute_model.lm_head(self.compute_model.hidden_states(input_ids, cache=cache)[:, -1])

    def _batches(self, prompts: list[list[int]], settings: SamplingSettings, batch_size: int) -> Iterator[list[int]]:
        """Places of prompts that are answered together: of similar length, and short enough to be padded.

        Padding takes room in the cache, which holds no more than the context. So where the longest prompt leaves a
        row less room than it may use, the row waits for the next batch: its answer must not depend on its company.
        """
        places: list[int] = []
        for place in sorted(range(len(prompts)), key=lambda place: -len(prompts[place])):
            room = self.context_length - len(prompts[places[0]]) if places else self.context_length
            if places and (len(places) == batch_size or self.limit(len(prompts[place]), settings) > room):
                yield places
                places = []
            places.append(place)
        if places:
            yield places

    def _seen(self, rows: list[list[int]], settings: SamplingSettings) -> Tensor | None:
        """bool [B, V] for the repetition penalty; None when it is off."""
        if settings.repetition_penalty == 1.0:
            return None
        return seen_tokens(rows, self.compute_model.config.vocab_size, self.compute_model.device)

    def _beam_answer(
        self, prompt_ids: list[int], settings: SamplingSettings, stop_ids: tuple[int, ...]
    ) -> Iterator[int]:
        ids = self.bounded(prompt_ids, settings)
        with _evaluating(self.compute_model):
            best = beam_search(
                self.compute_model,
                ids,
                num_beams=settings.num_beams,
                max_new_tokens=self.limit(len(ids), settings),
                stop_ids=stop_ids,
                length_penalty=settings.length_penalty,
                penalty=settings.repetition_penalty,
            )[0]
        yield from best.ids[:-1] if best.ids[-1] in stop_ids else best.ids

    def _answer_rows(
        self,
        prompts: list[list[int]],
        limits: list[int],
        uniforms: Tensor,
        settings: SamplingSettings,
        stop_ids: tuple[int, ...],
    ) -> list[list[int]]:
        """Answer one batch: prefill with left padding, then a token a step for the rows that go on."""
        device = self.compute_model.device
        width = max(len(prompt) for prompt in prompts)
        cache = self._new_cache(len(prompts), width + max(limits))
        batch = _Batch(prompts, limits, uniforms.to(device), self._seen(prompts, settings), stop_ids)
        padding = [width - len(prompt) for prompt in prompts]
        if any(padding):
            cache.pad_lengths = torch.tensor(padding, device=device)
        pad_id = self.compute_model.config.pad_token_id or 0
        padded = [[pad_id] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
        logits = self._forward(torch.tensor(padded, device=device), cache)
        for step in range(max(limits)):
            tokens = next_tokens(logits, settings, batch.uniforms[:, step], batch.seen)
            kept = batch.record(tokens)
            if not batch.rows:
                break
            if kept is not None:
                cache, tokens = select_rows(cache, kept), tokens[kept]
            if batch.seen is not None:
                batch.seen[torch.arange(len(tokens), device=device), tokens] = True
            logits = self._forward(tokens[:, None], cache)
        return batch.answers


class _Batch:
    """Which prompts the rows of a batch belong to, and the answers so far."""

    def __init__(
        self,
        prompts: list[list[int]],
        limits: list[int],
        uniforms: Tensor,
        seen: Tensor | None,
        stop_ids: tuple[int, ...],
    ) -> None:
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.rows = list(range(len(prompts)))  # row of the batch -> place of its prompt
        self.is_done = [False] * len(prompts)
        self.limits = limits
        self.uniforms = uniforms
        self.seen = seen
        self.stop_ids = frozenset(stop_ids)

    def record(self, tokens: Tensor) -> Tensor | None:
        """Append each row's token to its answer, or end it; returns the rows to keep once enough have finished.

        None means: keep all rows as they are.
        """
        for place, token in zip(self.rows, tokens.tolist(), strict=True):
            if self.is_done[place]:
                continue
            if token in self.stop_ids:
                self.is_done[place] = True
                continue
            self.answers[place].append(token)
            if len(self.answers[place]) == self.limits[place]:
                self.is_done[place] = True
        kept = [row for row, place in enumerate(self.rows) if not self.is_done[place]]
        num_finished = len(self.rows) - len(kept)
        if kept and num_finished < max(1, FINISHED_SHARE * len(self.rows)):
            return None
        self.rows = [self.rows[row] for row in kept]
        selected = torch.tensor(kept, device=tokens.device, dtype=torch.long)
        self.uniforms = self.uniforms[selected]
        self.seen = None if self.seen is None else self.seen[selected]
        return selected


def _fastest_dtype(model: TinyLMForCausalLM) -> torch.dtype:
    """bfloat16 for a float32 model on hardware that multiplies in it; otherwise the model's own precision."""
    return torch.bfloat16 if model.dtype == torch.float32 and device_has_bf16(model.device) else model.dtype


def _seed_of(settings: SamplingSettings) -> int:
    """The seed, or a fresh one."""
    return settings.seed if settings.seed is not None else torch.Generator().seed()


def _uniforms(settings: SamplingSettings, rows: list[int], limits: list[int], seed: int | None = None) -> Tensor:
    """Uniform numbers [B, longest limit], row by row from (seed, row); without columns' worth of work when greedy."""
    count = max(limits)
    if settings.temperature == 0:
        return torch.zeros(1, 1).expand(len(rows), count)
    seed = _seed_of(settings) if seed is None else seed
    return torch.stack([uniform_numbers(seed, row, count) for row in rows])


@contextlib.contextmanager
def _evaluating(model: TinyLMForCausalLM) -> Iterator[None]:
    """Switch dropout off inside, and leave the model in the mode it was found in."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
