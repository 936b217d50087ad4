"""The engine: prompts in, answers out. Prefill once, then one token a step through the KV cache.

    engine = Engine(model, tokenizer)
    for piece in engine.chat([{"role": "user", "content": "Hello!"}], SamplingSettings()):
        print(piece, end="")

With a seed, an answer depends only on the seed and on the prompt's place in the list, not on the batch size or the
order of computation, because each row has its own random generator. Rounding can still differ between batch shapes: in
bfloat16 this may decide a close call, in float32 it hardly ever does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tinylm.generation.beam_search import beam_search
from tinylm.generation.decoding import DecodingBatch, Row
from tinylm.generation.history import FittedPrompt, fit_history, prompt_budget
from tinylm.generation.sampling import SamplingSettings
from tinylm.model.inference_copy import inference_copy
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.runtime import device_has_bf16
from tinylm.tokenizer.tokenizer import StreamDecoder, Tokenizer

__all__ = ["Engine", "SamplingSettings"]

PREFILL_ROWS = 16
"""Prompts that a CPU reads at a time: they stay in its cache, and less of each is padding. 100 questions of TinyWorld,
read so and then answered together, took 0.6 to 0.9 of the time of 100 read at once. A GPU reads all of a batch."""


class Engine:
    """Answers prompts with one model and its tokenizer.

    Args:
        model: a TinyLMForCausalLM. It is not changed: another precision is computed in a copy.
        tokenizer: may be None if only token ids are used.
        dtype: precision of the weights and of the computation. None takes bfloat16 for a float32 model where the
            hardware multiplies in it (twice the speed), else the model's own. With the model's own precision the
            engine shares its weights, so it follows a model that is still training.
        document_start: token ids that a document began with when the model was trained.
    """

    def __init__(
        self,
        model: TinyLMForCausalLM,
        tokenizer: Tokenizer | None = None,
        dtype: torch.dtype | None = None,
        document_start: Sequence[int] = (),
    ) -> None:
        self.dtype = dtype or _fastest_dtype(model)
        self.model = model
        self.compute_model = model if model.dtype == self.dtype else inference_copy(model, self.dtype)
        self._tokenizer = tokenizer
        self.document_start = list(document_start)
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

    def generate(
        self, prompt_ids: list[int], settings: SamplingSettings, stop_ids: tuple[int, ...] = (0, 2)
    ) -> Iterator[int]:
        """Continue one prompt, yielding each token id as soon as it is known; a stop token ends it unseen.

        A prompt too long for the context keeps its tail (see `bounded`). Beam search yields only at its end.

        Raises:
            ValueError: the prompt is empty, or the model's weights are damaged.
        """
        if settings.num_beams > 1:
            yield from self._beam_answer(prompt_ids, settings, stop_ids)
            return
        batch = DecodingBatch(self.compute_model)
        with _evaluating(self.compute_model):
            batch.add([self._row(prompt_ids, settings, stop_ids, _seed_of(settings), 0)])
            while batch.rows:
                for _, token_id in batch.step():
                    yield token_id

    def generate_batch(
        self,
        prompts: list[list[int]],
        settings: SamplingSettings | Sequence[SamplingSettings],
        stop_ids: tuple[int, ...] = (0, 2),
        batch_size: int = 64,
    ) -> list[list[int]]:
        """Continue many prompts; the answers come in the prompts' order, without their stop tokens.

        Prompts of similar length share a batch; rows that are done leave it.

        Args:
            settings: one for all prompts, or one for each.

        Raises:
            ValueError: a prompt is empty, or the model's weights are damaged.
        """
        each = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else settings
        seed = torch.Generator().seed()  # for prompts without a seed
        answers: list[list[int]] = [[] for _ in prompts]
        rows: list[tuple[int, Row]] = []
        for place, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            if own.num_beams > 1:
                answers[place] = list(self._beam_answer(prompt, own, stop_ids))
            else:
                own_seed = seed if own.seed is None else own.seed
                rows.append((place, self._row(prompt, own, stop_ids, own_seed, place)))
        rows.sort(key=lambda pair: -len(pair[1].prompt))
        with _evaluating(self.compute_model):
            for start in range(0, len(rows), batch_size):
                batch = DecodingBatch(self.compute_model)
                together = [row for _, row in rows[start : start + batch_size]]
                at_once = PREFILL_ROWS if self.compute_model.device.type == "cpu" else batch_size
                for first in range(0, len(together), at_once):
                    batch.add(together[first : first + at_once])
                while batch.rows:
                    batch.step()
        for place, row in rows:
            answers[place] = row.answer
        return answers

    def bounded(self, prompt_ids: list[int], settings: SamplingSettings) -> list[int]:
        """The prompt, or its tail if it leaves too little of the context for an answer."""
        if not prompt_ids:
            raise ValueError("the prompt is empty; expected at least one token; give some text to continue")
        if self.context_length < 2:
            raise ValueError(
                f"a context of {self.context_length} token has no room for an answer; expected 2 or more; raise "
                "max_seq_len, or use a model with a longer context"
            )
        return prompt_ids[-prompt_budget(self.context_length, settings.max_new_tokens) :]

    # --------------------------------------------------------------------------------------------------- text

    def text_prompt(self, text: str) -> list[int]:
        """The beginning of a document as a prompt, to be continued; "" begins one from nothing, if the model can."""
        return [*self.document_start, *self.tokenizer.encode(text)]

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
            piece = decoder.feed(token_id) if token_id < self.tokenizer.vocab_size else ""
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
        return [self.text_of(answer) for answer in answers]

    def text_of(self, ids: Sequence[int]) -> str:
        """An answer as text. A model may have more rows than its tokenizer has entries: other ids write nothing."""
        return self.tokenizer.decode(token_id for token_id in ids if token_id < self.tokenizer.vocab_size)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: end of document and end of message, by the tokenizer and by the model.

        A model may name several, or, trained with another maker's tokenizer, numbers that are ordinary tokens there.
        """
        tokenizer = self.tokenizer
        stated = [i for i in getattr(self.model.config, "eos_token_ids", ()) if i in tokenizer.special_ids]
        return tuple(dict.fromkeys((tokenizer.endoftext_id, tokenizer.im_end_id, tokenizer.eos_id, *stated)))

    # ----------------------------------------------------------------------------------------------- internals

    def _row(
        self, prompt_ids: list[int], settings: SamplingSettings, stop_ids: tuple[int, ...], seed: int, number: int
    ) -> Row:
        ids = self.bounded(prompt_ids, settings)
        return Row(ids, settings, self.limit(len(ids), settings), stop_ids, seed, number)

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


def _fastest_dtype(model: TinyLMForCausalLM) -> torch.dtype:
    """bfloat16 for a float32 model on hardware that multiplies in it; otherwise the model's own precision."""
    return torch.bfloat16 if model.dtype == torch.float32 and device_has_bf16(model.device) else model.dtype


def _seed_of(settings: SamplingSettings) -> int:
    """The seed, or a fresh one."""
    return settings.seed if settings.seed is not None else torch.Generator().seed()


@contextlib.contextmanager
def _evaluating(model: TinyLMForCausalLM) -> Iterator[None]:
    """Switch dropout off inside, and restore the model's mode afterwards."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
