"""Text as it comes: whole characters only, and stop strings that no piece shows, wherever the tokens' borders are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.generation.text_stream import TextStream
from tinylm.tokenizer.tokenizer import Tokenizer

TOKENIZER = Tokenizer.default()


def pieces_of(ids: list[int], stops: tuple[str, ...]) -> list[str]:
    stream = TextStream(TOKENIZER, stops)
    pieces = []
    for token_id in ids:
        pieces.append(stream.feed(token_id))
        if stream.is_stopped:
            return pieces
    return [*pieces, stream.finish()]


def one_character_at_a_time(text: str, stops: tuple[str, ...]) -> str:
    """The definition: the text up to the stop string that is complete first; the longest, if several are at once."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def byte_tokens(text: str) -> list[int]:
    """The text with a token for each byte: every border inside of characters is a token's border."""
    single = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size) if len(TOKENIZER.token_bytes(i)) == 1}
    return [single[bytes([byte])] for byte in text.encode()]


@given(
    text=st.text(alphabet="ab\nñ漢🙂", max_size=30),
    stops=st.lists(st.text(alphabet="ab\nñ漢🙂", min_size=1, max_size=5), max_size=4).map(tuple),
    by_bytes=st.booleans(),
)
def test_pieces_are_the_text_up_to_the_first_stop_string(text: str, stops: tuple[str, ...], by_bytes: bool) -> None:
    ids = byte_tokens(text) if by_bytes else TOKENIZER.encode(text)
    pieces = pieces_of(ids, stops)
    assert "".join(pieces) == one_character_at_a_time(text, stops)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_text_is_held_back_only_while_a_stop_string_may_begin_in_it() -> None:
    assert pieces_of(byte_tokens("xEñDEND"), ("END",)) == ["x", "", "", "Eñ", "D", "", "", ""]
    assert pieces_of(byte_tokens("xEN"), ("END",)) == ["x", "", "", "EN"]
    assert pieces_of(byte_tokens("xEN"), ()) == ["x", "E", "N", ""]


def test_stop_string_in_the_middle_of_a_token() -> None:
    whole = next(i for i in range(260, TOKENIZER.vocab_size) if TOKENIZER.token_bytes(i) == b" the")
    assert pieces_of([whole], ("h",)) == [" t"]


@pytest.mark.parametrize(("stops", "text"), [((), "né\ufffd"), (("\ufffd",), "né")])
def test_half_a_character_at_the_end(stops: tuple[str, ...], text: str) -> None:
    assert "".join(pieces_of(byte_tokens("né漢")[:-1], stops)) == text


def test_tokens_beyond_the_tokenizer_write_nothing() -> None:
    assert pieces_of([*byte_tokens("a"), TOKENIZER.vocab_size + 7, *byte_tokens("b")], ()) == ["a", "", "b", ""]
