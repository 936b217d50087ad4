"""Control tokens that are spelt in a text: read as these tokens, if the user asks for it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from tinylm.tokenizer.tokenizer import Tokenizer


class ControlTokenReader:
    """Encodes like a tokenizer, but reads `<|im_start|>` and the other control tokens in a text as control tokens.

    It is for the pretraining text of a trusted author only. In a chat, anybody could end a turn with it.

    Attributes:
        fingerprint: another than the tokenizer's, because it gives other tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.special_ids = tokenizer.special_ids
        self.own_tokens = tokenizer.own_tokens
        self.endoftext_id = tokenizer.endoftext_id
        self.document_start = tokenizer.document_start
        self.pad_id = tokenizer.pad_id
        self.safe_cuts = tokenizer.safe_cuts
        self.fingerprint = hashlib.sha256(f"control tokens {tokenizer.fingerprint}".encode()).hexdigest()[:16]
        self._ids = {tokenizer.token_bytes(i).decode("utf-8", "replace"): i for i in sorted(tokenizer.special_ids)}
        names = sorted(self._ids, key=len, reverse=True)  # of two that begin alike, the longer one
        self._pattern = re.compile(f"({'|'.join(map(re.escape, names))})")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text. Control tokens are never joined with the text beside them."""
        parts = [self._pattern.split(text) for text in texts]  # text, token, text, token, text
        plain = iter(self.tokenizer.encode_batch([part for text in parts for part in text[::2]]))
        return [list(self._join(text, plain)) for text in parts]

    def _join(self, parts: list[str], plain: Iterator[list[int]]) -> Iterator[int]:
        for number, part in enumerate(parts):
            if number % 2:
                yield self._ids[part]
            else:
                yield from next(plain)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, as the tokenizer gives them."""
        return self.tokenizer.token_bytes(token_id)
