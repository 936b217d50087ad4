"""The decoding loop: prompts answered together, one token a step, through the KV cache.

Shapes: B rows, T tokens of the longest prompt, C width, V vocabulary.

    batch = DecodingBatch(model)
    batch.add(rows)
    while batch.rows:
        for row, token_id in batch.step():
            ...

Rows may be added between steps, and leave as soon as they are done. A single prompt is a batch of one.

Where all prompts are there at the start, this is faster than `Scheduler`, which answers some while it reads others: 100
questions of TinyWorld took 0.82 to 0.94 of its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinylm.generation.sampling import BatchChoice, SamplingSettings, numbers_to_draw_with
from tinylm.model.kv_cache import KVCache
from tinylm.model.model_tinylm import TinyLMForCausalLM

DAMAGED = "the model computes no numbers (NaN): its weights are damaged; use another checkpoint"


@dataclass(eq=False)
class Row:
    """One prompt and its answer so far.

    Args:
        prompt: token ids, at least one.
        settings: how this row's tokens are chosen.
        limit: most tokens of the answer; prompt and answer together must fit the model's context.
        stop_ids: tokens that end the answer without being part of it.
        seed, number: they determine the row's random numbers (see `uniform_numbers`).
    """

    prompt: list[int]
    settings: SamplingSettings
    limit: int
    stop_ids: Sequence[int] = ()
    seed: int = 0
    number: int = 0
    answer: list[int] = field(default_factory=list)
    is_done: bool = False
    uniforms: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.uniforms = numbers_to_draw_with(self.settings, self.seed, self.number, self.limit)

    def take(self, token_id: int) -> bool:
        """Append the token to the answer, or end the answer; returns whether the token belongs to it."""
        if token_id in self.stop_ids:
            self.is_done = True
            return False
        self.answer.append(token_id)
        self.is_done = len(self.answer) == self.limit
        return True


class DecodingBatch:
    """The rows being answered, their cache, and what their next tokens are chosen from.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: TinyLMForCausalLM) -> None:
        self.model = model
        self.rows: list[Row] = []
        self._cache: KVCache | None = None
        self._tokens = torch.empty(0, dtype=torch.int64, device=model.device)  # [B] each row's last token
        self._logits: Tensor | None = None  # [B, V] after those; None until they have been computed

    @torch.inference_mode()
    def add(self, rows: Sequence[Row]) -> None:
        """Read the prompts of `rows` and let the rows join.

        Raises:
            ValueError: the model's weights are damaged.
        """
        cache = self.model.new_cache(len(rows), max(len(row.prompt) + row.limit for row in rows))
        logits = self._prefill(rows, cache)
        if self._cache is None or not self.rows:
            self._cache, self._logits, self.rows = cache, logits, list(rows)
        else:
            self._logits = torch.cat((self._current_logits(), logits))
            self._cache.append(cache)
            self.rows = [*self.rows, *rows]
        self._rows_changed()

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, int]]:
        """Choose the next token of every row; returns those that belong to answers. Rows that are done leave."""
        tokens = self._choice(self._current_logits(), [row.uniforms[len(row.answer)] for row in self.rows])
        self._tokens, self._logits = tokens, None
        chosen = zip(self.rows, tokens.tolist(), strict=True)
        taken = [(row, token_id) for row, token_id in chosen if row.take(token_id)]
        if any(row.is_done for row in self.rows):
            self._remove_done()
        return taken

    def _prefill(self, rows: Sequence[Row], cache: KVCache) -> Tensor:
        """Logits [B, V] after each prompt. Shorter prompts are padded on the right, where no token sees the padding."""
        lengths = [len(row.prompt) for row in rows]
        longest = max(lengths)
        padded = [row.prompt + [0] * (longest - len(row.prompt)) for row in rows]
        hidden = self.model.hidden_states(torch.tensor(padded, device=self.model.device), cache=cache)  # [B, T, C]
        cache.rewind(lengths)
        last = torch.tensor(lengths, device=hidden.device) - 1
        logits = self.model.lm_head(hidden[torch.arange(len(rows), device=hidden.device), last])
        if logits.isnan().any():
            raise ValueError(DAMAGED)
        return logits

    def _current_logits(self) -> Tensor:
        """Logits [B, V] after each row's last token, computed now unless they are known."""
        if self._logits is None:
            hidden = self.model.hidden_states(self._tokens[:, None], cache=self._cache)
            self._logits = self.model.lm_head(hidden[:, -1])
        return self._logits

    def _remove_done(self) -> None:
        """Take out the rows that are done: the last rows move to their places, so that little is copied."""
        assert self._cache is not None
        if all(row.is_done for row in self.rows):
            self.rows = []
            return
        kept = [place for place, row in enumerate(self.rows) if not row.is_done]
        holes = [place for place, row in enumerate(self.rows[: len(kept)]) if row.is_done]
        order = list(range(len(kept)))
        for hole, mover in zip(holes, kept[::-1], strict=False):
            order[hole] = mover
        self._cache.select_rows(order)
        self.rows = [self.rows[place] for place in order]
        self._tokens = self._tokens[torch.tensor(order, dtype=torch.int64, device=self._tokens.device)]
        self._rows_changed()

    def _rows_changed(self) -> None:
        """Gather the rows' settings, and the tokens that occurred in them where a penalty needs those."""
        settings, tokens = [row.settings for row in self.rows], [row.prompt + row.answer for row in self.rows]
        self._choice = BatchChoice(settings, tokens, self.model.config.vocab_size, self.model.device)
