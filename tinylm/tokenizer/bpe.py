"""Byte-level byte-pair encoding (BPE), from scratch: train, encode, decode.

The idea (Gage 1994; for language models Sennrich et al. 2016, arXiv:1508.07909; on bytes GPT-2, Radford et
al. 2019):

1. Cut text into *pieces* (words with their leading space, numbers, punctuation, blanks). No merge crosses the
   border of a piece.
2. Start from the 256 bytes, so that every text has an encoding and no "unknown" token is needed.
3. Train: find the adjacent pair of tokens that is most frequent in the training text, make it a new token,
   repeat.
4. Encode: apply the learned merges to each piece, the earliest learned first.

Ids here run from 0: first the 256 bytes in `BYTE_ALPHABET`'s order, then one id for each merge. The special
tokens (`<|endoftext|>` and so on) are not part of BPE: `tinylm.tokenizer.tokenizer` puts them before these
ids.

There are two trainers: `train_bpe_naive`, to read, and `train_bpe`, to use. Both learn exactly the merges that the
`tokenizers` library's BpeTrainer learns from the same text; tests compare all three. The pieces depend on which
characters the regular-expression engine treats as letters. `regex` and `tokenizers` contain different versions of the
Unicode tables, so pieces can differ around letters that were added after Unicode 16 (2024).
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import regex

from tinylm.tokenizer.split_patterns import DIGIT_PATTERNS, Digits, cut_text

_SPLIT = {digits: regex.compile(pattern) for digits, pattern in DIGIT_PATTERNS.items()}
_SECTION_CHARACTERS = 1 << 20  # the pieces of a section, as Python strings, take some 20 MB
_MAX_CACHED_PIECES = 1 << 16

Pair = tuple[int, int]


def _byte_characters() -> list[str]:
    """A printable character for each byte (GPT-2's table), so that tokens can be written in JSON.

    A byte that is a printable Latin-1 character stands for itself; the other 68 take the characters from
    U+0100 on.
    """
    printable = [range(ord(first), ord(last) + 1) for first, last in ("!~", "¡¬", "®ÿ")]
    substitutes = iter(range(256, 512))
    return [chr(byte if any(byte in span for span in printable) else next(substitutes)) for byte in range(256)]


BYTE_TO_CHARACTER: list[str] = _byte_characters()
CHARACTER_TO_BYTE: dict[str, int] = {character: byte for byte, character in enumerate(BYTE_TO_CHARACTER)}
BYTE_ALPHABET: list[int] = sorted(range(256), key=BYTE_TO_CHARACTER.__getitem__)
"""The bytes with ids 0, 1, ..., 255, in the order of their printable characters, as in `tokenizers`."""

_BYTE_TO_ID = bytes(BYTE_ALPHABET.index(byte) for byte in range(256))  # a table for bytes.translate


def split_pieces(text: str, digits: Digits = "split") -> list[str]:
    """Cut a text into the pieces that BPE works on. Joined, they give the text."""
    return _SPLIT[digits].findall(text)


def count_pieces(texts: Iterable[str], digits: Digits = "split") -> Counter[str]:
    """Count the pieces of many texts. Training needs nothing else from them.

    Raises ValueError, with the number of the text, for anything that is not a string.
    """
    if isinstance(texts, str):
        raise ValueError("got one string; expected an iterable of texts; pass [text]")
    counts: Counter[str] = Counter()
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {number} is a {type(text).__name__}; expected a string")
        for section in cut_text(text, _SECTION_CHARACTERS):
            counts.update(split_pieces(section, digits))
    return counts


def train_bpe_naive(piece_counts: Mapping[str, int], vocab_size: int, digits: Digits = "split") -> BytePairEncoding:
    """The textbook algorithm: count all pairs, merge the most frequent one everywhere, repeat.

    It is meant to be read, and tests use it as the reference for `train_bpe`, which has the same arguments and result.
    It takes O(merges x text).
    """
    words = {piece: list(_utf8(piece).translate(_BYTE_TO_ID)) for piece in piece_counts}
    bpe = BytePairEncoding([], digits)
    while len(bpe.tokens) < vocab_size:
        pair_counts: Counter[Pair] = Counter()
        for piece, ids in words.items():
            for pair in zip(ids, ids[1:], strict=False):
                pair_counts[pair] += piece_counts[piece]
        if not pair_counts:
            break
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
        new_id = bpe.add_merge(best)
        words = {piece: _merge(ids, best, new_id) for piece, ids in words.items()}
    return bpe


def _merge(ids: list[int], pair: Pair, new_id: int) -> list[int]:
    """Replace `pair` by `new_id`, from left to right."""
    merged: list[int] = []
    position = 0
    while position < len(ids):
        found = tuple(ids[position : position + 2]) == pair
        merged.append(new_id if found else ids[position])
        position += 2 if found else 1
    return merged


def train_bpe(
    piece_counts: Mapping[str, int],
    vocab_size: int,
    progress: Callable[[int, int], None] | None = None,
    digits: Digits = "split",
) -> BytePairEncoding:
    """Learn merges until there are `vocab_size` tokens (the 256 bytes included) or nothing is left to merge.

    Among equally frequent pairs, the one with the smaller ids wins. `tokenizers` has the same rule, and it makes
    training deterministic.

    The merges are those of `train_bpe_naive`, which recounts all pairs of all pieces for each of them. Here a merge
    touches only the pieces that contain the pair (an inverted index, pair -> pieces) and corrects the counts of the
    neighbouring pairs. A heap gives the most frequent pair. Its entries become outdated as counts fall, so an entry
    that is popped with an old count is pushed back with the present one. (The count of an *old* pair never rises, so
    the first entry found up to date is the maximum.)

    Args:
        piece_counts: how often each piece occurs, from `count_pieces`.
        vocab_size: the number of tokens wanted, at least 256.
        progress: called as `progress(tokens_learned, tokens_wanted)` after each merge.
        digits: as for `count_pieces`; the result cuts text in the same way.

    Raises ValueError for a vocab_size under 256 and for a piece with a lone surrogate.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size {vocab_size} leaves no room for the 256 bytes; expected at least 256")
    words = [list(_utf8(piece).translate(_BYTE_TO_ID)) for piece in piece_counts]
    counts = list(piece_counts.values())

    pair_counts: Counter[Pair] = Counter()
    index: defaultdict[Pair, list[int]] = defaultdict(list)  # pair -> the words that contain it
    for word_index, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            pair_counts[pair] += counts[word_index]
            _note(index[pair], word_index)
    heap = [(-pair_counts[pair], pair, where) for pair, where in index.items()]
    heapq.heapify(heap)

    bpe = BytePairEncoding([], digits)
    while len(bpe.tokens) < vocab_size and heap:
        count, pair, where = heapq.heappop(heap)
        if -count != pair_counts[pair]:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair, where))
            continue
        new_id = bpe.add_merge(pair)
        index = defaultdict(list)  # only the pairs that this merge creates
        for word_index in where:
            words[word_index], changes = _merge_word(words[word_index], pair, new_id)
            for changed_pair, change in changes:
                pair_counts[changed_pair] += change * counts[word_index]
                if change > 0:
                    _note(index[changed_pair], word_index)
        for new_pair, new_where in index.items():
            if pair_counts[new_pair] > 0:
                heapq.heappush(heap, (-pair_counts[new_pair], new_pair, new_where))
        if progress is not None:
            progress(len(bpe.tokens) - 256, vocab_size - 256)
    return bpe


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"lone surrogate U+{code:04X} at character {error.start}; expected valid Unicode; "
            "clean the text with text.encode('utf-8', 'replace').decode()"
        ) from None


def _note(where: list[int], word_index: int) -> None:
    """Append unless it is there: words are visited in order, so only the last entry can be the same."""
    if not where or where[-1] != word_index:
        where.append(word_index)


def _merge_word(word: list[int], pair: Pair, new_id: int) -> tuple[list[int], list[tuple[Pair, int]]]:
    """Replace `pair` by `new_id` from left to right; also return which neighbouring pairs disappeared (-1) and
    appeared (+1)."""
    left, right = pair
    merged: list[int] = []
    changes: list[tuple[Pair, int]] = []
    position, last = 0, len(word) - 1
    while position <= last:
        token = word[position]
        if token != left or position == last or word[position + 1] != right:
            merged.append(token)
            position += 1
            continue
        if merged:
            changes += (((merged[-1], left), -1), ((merged[-1], new_id), 1))
        position += 2
        if position <= last:
            changes += (((right, word[position]), -1), ((new_id, word[position]), 1))
        merged.append(new_id)
    return merged, changes


class BytePairEncoding:
    """A list of merges, and what follows from it: the bytes of each token, encoding and decoding.

    Args:
        merges: pairs of token ids in the order learned. Merge number i makes token 256 + i (unless those
            bytes already were a token: two different merges can spell the same bytes, and then share one
            id).
        digits: how text is cut into pieces. With `grouped`, a piece that is a token becomes that token, whatever its
            merges give: so do Llama 3's tokenizer and llama.cpp, whose pattern it is. Merges from training give that
            token anyway. Others may not: with "ab" before "bc" and "a" + "bc", the piece "abc" is "ab" + "c".
    """

    def __init__(self, merges: Sequence[Pair], digits: Digits = "split") -> None:
        self.digits = digits
        self.tokens: list[bytes] = [bytes([byte]) for byte in BYTE_ALPHABET]
        self._ids: dict[bytes, int] = {token: token_id for token_id, token in enumerate(self.tokens)}
        self._merged: dict[Pair, tuple[int, int]] = {}  # pair -> (rank, new id)
        self._num_merges = 0
        self._cache: dict[str, list[int]] = {}
        for pair in merges:
            self.add_merge(pair)

    @property
    def merges(self) -> list[Pair]:
        """The pairs in the order of their ranks."""
        return sorted(self._merged, key=lambda pair: self._merged[pair][0])

    def add_merge(self, pair: Pair) -> int:
        """Append a merge and return the id of its token. A pair that is learned again moves to the last rank."""
        left, right = pair
        token = self.tokens[left] + self.tokens[right]
        new_id = self._ids.setdefault(token, len(self.tokens))
        if new_id == len(self.tokens):
            self.tokens.append(token)
        self._merged[pair] = (self._num_merges, new_id)
        self._num_merges += 1
        self._cache.clear()
        return new_id

    def encode(self, text: str) -> list[int]:
        """Text to ids. Raises ValueError for a lone surrogate, which has no UTF-8 form."""
        ids: list[int] = []
        for piece in split_pieces(text, self.digits):
            piece_ids = self._cache.get(piece)
            if piece_ids is None:
                piece_ids = self._encode_piece(_utf8(piece))
                if len(self._cache) < _MAX_CACHED_PIECES:
                    self._cache[piece] = piece_ids
            ids += piece_ids
        return ids

    def _encode_piece(self, piece: bytes) -> list[int]:
        """Merge the bytes of one piece: the pair that was learned first comes first, and of equal pairs the leftmost.

        A heap of candidate merges over a doubly linked list of tokens takes O(n log n) for n bytes. A search for the
        best pair after each merge would take O(n^2), which is too slow for a long run of one letter.
        """
        if self.digits == "grouped" and piece in self._ids:
            return [self._ids[piece]]
        ids = list(piece.translate(_BYTE_TO_ID))
        end, gone = len(ids), -1
        before, after = list(range(-1, end - 1)), list(range(1, end + 1))
        candidates: list[tuple[int, int, Pair]] = []  # (rank, position of the left token, pair)

        def propose(position: int) -> None:
            if position >= 0 and after[position] < end:
                pair = (ids[position], ids[after[position]])
                if pair in self._merged:
                    heapq.heappush(candidates, (self._merged[pair][0], position, pair))

        for position in range(end):
            propose(position)
        while candidates:
            _, position, pair = heapq.heappop(candidates)
            right = after[position]
            if right == end or (ids[position], ids[right]) != pair:
                continue  # an earlier merge used one of the two
            ids[position], ids[right] = self._merged[pair][1], gone
            after[position] = after[right]
            if after[right] < end:
                before[after[right]] = position
            propose(before[position])
            propose(position)
        return [token_id for token_id in ids if token_id != gone]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text. Bytes that are not UTF-8 (half a character) become U+FFFD."""
        return b"".join(self.tokens[token_id] for token_id in ids).decode("utf-8", errors="replace")
