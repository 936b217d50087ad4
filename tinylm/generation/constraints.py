"""Answers that have a given form: JSON after a schema, a regular expression, or one of several texts.

    compiler = GrammarCompiler(tokenizer, model.config.vocab_size)
    grammar = compiler.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}})
    scheduler.submit(Request(prompt, settings, stop_ids, constraint=grammar))

The library `llguidance` reads the form as a grammar over bytes and tells, after each token, which tokens may follow
(Willard & Louf 2023, arXiv:2307.09702, tell the idea). The others get minus infinity before a token is chosen. So every
model answers in the form, one without training too. The end is part of the form: an end token is allowed where the text
is complete, and the answer ends by itself where nothing else may follow.

The grammar is over the bytes that an answer shows. A control token is none of its texts, however it is spelt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinylm.files.untrusted import is_unicode, shown
from tinylm.generation.json_schema import patterns, schema_text
from tinylm.generation.request import RequestError
from tinylm.tokenizer.tokenizer import Tokenizer

MAX_REGEX_CHARACTERS = 4096
MAX_REGEX_SIZE = 20_000
"""Characters and classes of a regular expression with its repetitions written out."""
MAX_CHOICES_BYTES = 2**15

WHITESPACE = r"\x20?"
"""Between the parts of JSON: a blank or nothing. Endless blanks, which JSON allows as well, are what a small model
otherwise answers."""

# What one grammar may cost. With these, none took more than 0.1 s to prepare, 10 ms a token, or 20 MB.
_LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 20_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}

_COUNT = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_ESCAPE = re.compile(r"\\[pPxuU]\{[^}]*\}|\\(?s:.)")


class GrammarCompiler:
    """Makes grammars for one tokenizer and one model. It is made once, in a few milliseconds, and shared.

    Args:
        vocab_size: of the model; it may be larger than the tokenizer's, and such tokens are never allowed.

    Raises:
        ValueError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._vocabulary = _Vocabulary(tokenizer, vocab_size)

    def json_schema(self, schema: dict[str, Any] | bool) -> Grammar:
        """JSON that the schema accepts. See `json_schema.KEYWORDS` for what a schema may use.

        Raises:
            RequestError: the schema is invalid, too large, accepts nothing, or has a keyword that is not supported.
        """
        text = schema_text(schema)
        for pattern in patterns(schema):
            _check_size(pattern, f"the pattern {shown(pattern)} of the JSON schema")
        try:
            source = _llguidance().LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_pattern": WHITESPACE}
            )
        except ValueError as error:  # it is JSON, but not Unicode
            raise RequestError(f"the JSON schema cannot be used: {error}; change it") from None
        return Grammar(self._vocabulary, source, "the JSON schema")

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Grammar:
        """The texts that the whole of a regular expression matches, in the syntax of Rust's `regex` crate.

        Raises:
            RequestError: the expression is invalid, too large, matches no text, or looks around or back.
        """
        name = f"the regular expression {shown(pattern)}"
        if not isinstance(pattern, str) or not is_unicode(pattern):
            raise RequestError(f"{name} is not valid Unicode text; expected a string")
        if len(pattern) > MAX_REGEX_CHARACTERS:
            raise RequestError(f"{name} has {len(pattern)} characters; expected at most {MAX_REGEX_CHARACTERS}")
        _check_size(pattern, name)
        return Grammar(self._vocabulary, _llguidance().LLMatcher.grammar_from_regex(pattern), name)

    def choices(self, texts: Sequence[str]) -> Grammar:
        """One of these texts.

        Raises:
            RequestError: there are none, or they are too long, or not all are valid Unicode text.
        """
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and is_unicode(text) for text in texts):
            raise RequestError(f"the choices are {shown(texts)}; expected a list of one text or more")
        if (size := sum(len(text.encode()) for text in texts)) > MAX_CHOICES_BYTES:
            raise RequestError(f"the choices have {size} bytes together; expected at most {MAX_CHOICES_BYTES}")
        pattern = "|".join(re.sub(r"[\\.+*?()|\[\]{}^$#&~-]", r"\\\g<0>", text) for text in texts)
        return Grammar(self._vocabulary, _llguidance().LLMatcher.grammar_from_regex(pattern), "the list of choices")


class Grammar:
    """A form that answers can be held to; a `Constraint`. A `GrammarCompiler` makes it.

    Raises:
        RequestError: llguidance cannot use it, or it accepts no text.
    """

    def __init__(self, vocabulary: _Vocabulary, source: str, name: str) -> None:
        self._vocabulary, self._source, self._name = vocabulary, source, name
        # The first answer takes the one that the check made. Copies would share memory and limits with each other.
        self._prepared = [self._new_answer(())]
        if self._prepared[0].is_complete:
            raise RequestError(f"{name} accepts only the empty text; expected a form with something to write")

    def start(self, stop_ids: Sequence[int]) -> ConstrainedAnswer:
        """The state of a new answer; these tokens end it.

        It may be called from any thread.
        """
        try:
            answer = self._prepared.pop()
        except IndexError:
            return self._new_answer(stop_ids)
        answer.set_stop_ids(stop_ids)
        return answer

    def _new_answer(self, stop_ids: Sequence[int]) -> ConstrainedAnswer:
        try:
            return ConstrainedAnswer(self._vocabulary, self._source, stop_ids)
        except ValueError as error:
            raise RequestError(f"{self._name} cannot be used: {error}; change it") from None


class ConstrainedAnswer:
    """What may follow in one answer.

    Attributes:
        is_complete: whether the text is complete and nothing can follow.

    Raises:
        ValueError: the grammar is invalid, or too complex.
    """

    def __init__(self, vocabulary: _Vocabulary, source: str, stop_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._matcher = vocabulary.matcher(source)
        # The first token of an answer, for tokenizers whose decoding drops a blank in front of it.
        self._first = vocabulary.first_matcher(source)
        self._look()
        self.set_stop_ids(stop_ids)

    def set_stop_ids(self, stop_ids: Sequence[int]) -> None:
        """Tokens that end the answer: allowed where the text is complete, even if they are part of text, else not."""
        size = len(self._allowed)
        self._stop_ids = [token_id for token_id in stop_ids if token_id < size]
        self._allowed[self._stop_ids] = self._may_end

    def mask(self) -> Tensor:
        """bool [V], true where a token may come next."""
        return torch.from_numpy(self._allowed)

    def take(self, token_id: int) -> bool:
        """Go on behind a token, which must be allowed and not an end token; returns `is_complete`.

        Raises:
            ValueError: the grammar has become too complex, or the token is not allowed.
        """
        ids = [token_id]
        if self._first is not None:
            ids, self._first = self._vocabulary.without_first_blank(token_id), None
        self._matcher.consume_tokens(ids)  # after an error nothing may follow, and `_look` raises it
        try:
            self._look()
        except ValueError as error:
            raise ValueError(f"the form of the answer became too complex: {error}") from None
        self._allowed[self._stop_ids] = self._may_end
        return self.is_complete

    def _look(self) -> None:
        """Find out what may follow."""
        self._allowed, follows = self._vocabulary.allowed_by(self._matcher, self._first)
        self._may_end = self._matcher.is_accepting()
        if not follows and not self._may_end:
            raise ValueError(_reason(self._first or self._matcher))
        self.is_complete = not follows


class _Vocabulary:
    """The tokens of a model, as llguidance reads them."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        library = _llguidance()
        self._new_matcher = library.LLMatcher
        self._limits = library.LLParserLimits(**_LIMITS)
        self._vocab_size = vocab_size
        tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        controls = frozenset(tokenizer.added_ids.values())
        text = [bool(token) and token_id not in controls for token_id, token in enumerate(tokens)][:vocab_size]
        self._text_bits = _packed(np.array(text), vocab_size)  # neither control tokens, nor others of a chat template
        self._plain = _Tokens(tokens, controls, tokenizer.eos_id, lambda text: tokenizer.encode_within([text])[0])
        self._library_tokenizer = library.LLTokenizer(self._plain)
        self._first: _Tokens | None = None
        if tokenizer.drops_first_blank:
            stripped = [token if i in controls else token.removeprefix(b" ") for i, token in enumerate(tokens)]
            self._first = _Tokens(stripped, controls, tokenizer.eos_id, tokenizer.encode)
            self._first_library_tokenizer = library.LLTokenizer(self._first)
            numbers: dict[bytes, int] = {}
            groups = [numbers.setdefault(token, len(numbers)) for token in stripped]
            self._groups: NDArray[np.int64] = np.array(groups)
            self._only_blank = [i for i, token in enumerate(tokens) if token == b" " and i not in controls]

    def matcher(self, source: str) -> Any:
        """A new state, in front of all text."""
        return self._new_matcher(self._library_tokenizer, source, log_level=0, limits=self._limits)

    def first_matcher(self, source: str) -> Any:
        """The same over tokens without a first blank; None where the tokenizer's decoding drops none."""
        if self._first is None:
            return None
        return self._new_matcher(self._first_library_tokenizer, source, log_level=0, limits=self._limits)

    def without_first_blank(self, token_id: int) -> list[int]:
        """Tokens that together have the bytes of a token but for a blank in front."""
        assert self._first is not None
        return self._plain.spell(self._first.tokens[token_id])

    def allowed_by(self, matcher: Any, first: Any = None) -> tuple[NDArray[np.bool_], bool]:
        """bool [V]: the tokens of text that may come next; and whether there is one."""
        packed = np.frombuffer((matcher if first is None else first).compute_bitmask(), dtype=np.uint8)
        if first is not None:
            # A text may be spelt with and without the blank: what one token may do, may all with its bytes.
            weights = np.unpackbits(packed, count=len(self._groups), bitorder="little")
            is_allowed = np.bincount(self._groups, weights)[self._groups] > 0
            is_allowed[self._only_blank] = not first.is_error()
            packed = _packed(is_allowed, self._vocab_size)
        size = min(len(packed), len(self._text_bits))
        allowed = np.zeros_like(self._text_bits)
        np.bitwise_and(packed[:size], self._text_bits[:size], out=allowed[:size])
        bits = np.unpackbits(allowed, count=self._vocab_size, bitorder="little")
        return bits.view(np.bool_), bool(allowed.any())


class _Tokens:
    """A list of tokens in llguidance's form. It calls this object where a grammar leaves one text only: the model then
    gets the tokens that the tokenizer gives for it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self,
        tokens: list[bytes],
        controls: frozenset[int],
        end_id: int,
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, sorted(controls), end_id
        self._encode = encode
        ids = {token: i for i, token in reversed([*enumerate(tokens)]) if token and i not in controls}
        self._ids, self._longest = ids, max(map(len, ids))

    def __call__(self, text: str) -> list[int]:
        ids = self._encode(text)
        return ids if b"".join(map(self.tokens.__getitem__, ids)) == text.encode() else self.spell(text.encode())

    def spell(self, text: bytes) -> list[int]:
        """The longest tokens, one after the other."""
        ids, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next(end for end in ends if text[start:end] in self._ids)
            ids.append(self._ids[text[start:end]])
            start = end
        return ids


def _packed(bits: NDArray[np.bool_], count: int) -> NDArray[np.uint8]:
    """The first `count` of these bits, eight in a byte, the first the lowest; more of them are 0."""
    return np.packbits(np.pad(bits[:count], (0, max(0, count - len(bits)))), bitorder="little")


def _reason(matcher: Any) -> str:
    """llguidance's error in one line; of an error of several lines, the one that says what is wrong."""
    lines = matcher.get_error().splitlines() or ["NoExtension"]
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    line = "it accepts no text" if line.startswith("NoExtension") else line
    return line if len(line) <= 200 else f"{line[:200]}..."


def _check_size(pattern: str, name: str) -> None:
    """Raise RequestError if a regular expression would be too long without its repetitions: `(a{1000}){1000}`."""
    if (size := _written_out(pattern)) > MAX_REGEX_SIZE:
        raise RequestError(
            f"{name} has {size} characters with its repetitions written out; expected at most {MAX_REGEX_SIZE}; "
            "repeat less"
        )


def _written_out(pattern: str) -> int:
    """About how many characters and classes a regular expression has when each repetition is written out."""
    totals, last, place = [0], 0, 0
    while place < len(pattern):
        start = pattern[place]
        if count := _COUNT.match(pattern, place):
            times = max(int((count[2] or count[1])[:9]), 1)
            repeated = min(last * times, 10**12)
            totals[-1] += repeated - last
            last, place = repeated, count.end()
            continue
        if start == "(":
            totals.append(0)
        elif start == ")" and len(totals) > 1:
            last = totals.pop()
            totals[-1] += last
        else:
            last = 1
            totals[-1] += last
        escape = _ESCAPE.match(pattern, place)
        place = escape.end() if escape else _class_end(pattern, place) if start == "[" else place + 1
    return sum(totals)


def _class_end(pattern: str, start: int) -> int:
    """Where the character class that begins at `start` ends; classes may lie within it."""
    depth, place = 0, start
    while place < len(pattern):
        if escape := _ESCAPE.match(pattern, place):
            place = escape.end()
            continue
        is_literal = pattern[place] == "]" and pattern[place - 1 : place] in ("[", "^") and place <= start + 2
        depth += (pattern[place] == "[") - (pattern[place] == "]" and not is_literal)
        place += 1
        if depth == 0:
            break
    return place


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ValueError(
            "the package llguidance is not installed; install it with: pip install 'tinylm[serve]'"
        ) from None
    return llguidance
