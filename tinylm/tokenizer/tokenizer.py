"""Tokenizer: the class that all other code uses. Text to ids and back, special tokens, files.

Training is our own code (`bpe.py`). Encoding here uses the `tokenizers` library, which is a hundred times faster than
Python and gives the same tokens as `BytePairEncoding.encode`; tests compare the two.

Text is always plain text. `encode("<|im_end|>")` gives the tokens of those ten characters and never the control token.
Control tokens are used only by id, and only the chat template and the data sets insert them. Otherwise the author of a
message could end it and write in another role.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from tinylm.files.atomic import atomic_write
from tinylm.files.untrusted import check_file, shown
from tinylm.tokenizer import sentencepiece, tokenizer_json
from tinylm.tokenizer.bpe import CHARACTER_TO_BYTE, count_pieces, train_bpe
from tinylm.tokenizer.chat_template_jinja import CHAT_TEMPLATE
from tinylm.tokenizer.own_tokens import check_own_tokens
from tinylm.tokenizer.split_patterns import Digits, safe_cuts
from tinylm.tokenizer.tokenizer_settings import ROLES, TokenizerSettings, names_before_text, read_settings

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>",  # 0: padding, and the end of a document
    "<|im_start|>",  # 1: opens a turn of a chat; other libraries call it "bos"
    "<|im_end|>",  # 2: closes a turn; other libraries call it "eos"
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    *(f"<|reserved_{number}|>" for number in range(7)),
)

SMALLEST_VOCAB = len(SPECIAL_TOKENS) + 256
"""A tokenizer without merges: the control tokens and one entry for each byte."""

# Other names of the three tokens we need, the preferred ones first. A tokenizer without the two of ChatML can still be
# used for text, but not for chats; see `has_chat_tokens`.
_ENDOFTEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
_START_NAMES = ("<|im_start|>", "<|begin_of_text|>", "<s>", "<bos>", *_ENDOFTEXT_NAMES)
_END_NAMES = ("<|im_end|>", "<|eot_id|>", *_ENDOFTEXT_NAMES)

_NOT_KEPT = ("auto_map", "name_or_path", "tokenizer_file", "chat_template")
"""Of a stranger's settings: what names code or places on the maker's machine, and what is written from elsewhere."""

_TO_BYTES = {code: "\uffff" for code in range(256)} | {ord(name): chr(byte) for name, byte in CHARACTER_TO_BYTE.items()}
"""Byte characters to the bytes as Latin-1, which has no U+FFFF."""

_DEFAULT_FOLDER = Path(__file__).parent / "default"


class Tokenizer:
    """A BPE tokenizer, byte-level or of SentencePiece's kind, made by `train`, `load` or `default`.

    Two tokenizers are equal when their fingerprints are. Pickling keeps the definition and rebuilds the rest.

    Args:
        definition: the content of a tokenizer.json. Raises ValueError where it is unusable.
        settings: what its folder says beside it; None for our own.

    Attributes:
        vocab_size: the largest id plus one; the number of rows a model's embedding needs.
        fingerprint: 16 hex digits that name the definition, for caches and lineage.
        endoftext_id, im_start_id, im_end_id: control tokens, in our own tokenizers 0, 1 and 2.
        pad_id, bos_id, eos_id: the tokens with these roles in other libraries; in our own tokenizers the same three.
        role_ids: the same under their names in a config.
        special_ids: ids that `decode` leaves out by default.
        added_ids: ids by name of the tokens that a template may write, control tokens and others; no text holds them.
        own_tokens: names of the special tokens that are not ours: the user's own, or another maker's.
        text_start: ids that the maker's library puts before a plain text; none in our own tokenizers.
        document_start: ids in front of a document in pretraining: `text_start`, or else <|endoftext|>.
        their_template: the chat template of another maker; None where it is ours, or there is none.
        safe_cuts: matches where a text may be cut without changing its tokens; None if that is not known.
        has_chat_tokens: whether <|im_start|> and <|im_end|> exist, which our own template needs.
        drops_first_blank: whether `decode` leaves out a blank at the start, which `encode` put there.
        can_chat: whether chats can be encoded, with our template or theirs.
    """

    def __init__(self, definition: dict[str, Any], settings: TokenizerSettings | None = None) -> None:
        tokenizer_json.check_definition(definition)
        definition = {"added_tokens": [], **definition}
        self.definition = definition
        self.fingerprint: str = tokenizer_json.fingerprint_of(definition)
        self.settings = settings
        added = {token["content"]: token["id"] for token in definition["added_tokens"]}
        names = {**definition["model"]["vocab"], **added}
        self.vocab_size: int = max(names.values()) + 1
        self._find_roles(names)
        controls = {token["content"] for token in definition["added_tokens"] if token.get("special")}
        controls |= {name for role in ROLES[:2] if settings and (name := settings.token(role))}
        self.special_ids: frozenset[int] = frozenset(names[name] for name in controls)
        self.own_tokens: tuple[str, ...] = tuple(sorted(controls.difference(SPECIAL_TOKENS), key=names.__getitem__))
        self.added_ids = added | {name: names[name] for name in controls}
        self._fast = self._fast_within = _build_fast(definition, controls)
        self.safe_cuts = safe_cuts(definition)
        self._bytes: list[bytes] = [b""] * self.vocab_size  # an id without a token decodes to nothing
        is_sentencepiece = sentencepiece.is_sentencepiece(definition)
        spell = sentencepiece.token_bytes if is_sentencepiece else _token_bytes
        for name, token_id in names.items():
            self._bytes[token_id] = name.encode("utf-8") if name in self.added_ids else spell(name)
        self.drops_first_blank = is_sentencepiece and sentencepiece.drops_first_blank(definition)
        if (within := sentencepiece.within_a_text(definition)) is not definition:
            self._fast_within = _build_fast(within, controls)

    def _find_roles(self, names: dict[str, int]) -> None:
        """Which token has which role: by the settings where they say so, else by the usual names."""
        stated = {role: self.settings.token(role) if self.settings else None for role in ROLES}
        found = {role: names[name] for role, name in stated.items() if name in names}
        for role in ROLES[:2]:  # transformers adds a pad_token that does not exist; without one, ours is another token
            if stated[role] is not None and role not in found:
                raise ValueError(f"{role} is {shown(stated[role])}; expected a token that tokenizer.json has")
        ends = (*_ENDOFTEXT_NAMES, *filter(None, (stated["eos_token"],)))
        self.endoftext_id = _find(names, ends)
        self.im_start_id = _find(names, (*_START_NAMES, *ends))
        self.im_end_id = _find(names, (*_END_NAMES, *ends))
        self.pad_id = found.get("pad_token", self.endoftext_id)
        self.bos_id = found.get("bos_token", self.im_start_id)
        self.eos_id = found.get("eos_token", self.im_end_id)
        self.role_ids = {"bos_token_id": self.bos_id, "eos_token_id": self.eos_id, "pad_token_id": self.pad_id}
        self.text_start = [names[name] for name in names_before_text(self.definition) if name in names]
        self.document_start = self.text_start or [self.endoftext_id]
        self.has_chat_tokens: bool = "<|im_start|>" in names and "<|im_end|>" in names
        template = self.settings.chat_template if self.settings else None
        self.their_template: str | None = None if template == CHAT_TEMPLATE else template
        self.can_chat: bool = self.has_chat_tokens or self.their_template is not None

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = 6400,
        progress: Callable[[int, int], None] | None = None,
        digits: Digits = "split",
        special_tokens: Sequence[str] = (),
    ) -> Tokenizer:
        """Train a tokenizer: 16 special tokens, 256 bytes, merges (fewer for tiny texts), and the user's own tokens.

        Args:
            texts: any iterable of strings. It is read once, and the texts are not kept in memory.
            vocab_size: the number of entries, all kinds together.
            progress: called as `progress(merges_learned, merges_wanted)`.
            digits: whether each digit is a token of its own, or up to three of them may be one.
            special_tokens: more special tokens, with the last ids.

        Raises ValueError for a vocab_size out of range, for texts that are empty or not valid Unicode, and for names
        that cannot be special tokens.
        """
        check_own_tokens(special_tokens, SPECIAL_TOKENS)
        smallest = SMALLEST_VOCAB + len(special_tokens)
        if not smallest <= vocab_size <= tokenizer_json.MAX_TRAINED_VOCAB:
            raise ValueError(
                f"vocab_size {vocab_size}; expected {smallest} (special tokens and bytes) "
                f"to {tokenizer_json.MAX_TRAINED_VOCAB}"
            )
        piece_counts = count_pieces(texts, digits)
        if not piece_counts:
            raise ValueError("no text to train a tokenizer on; expected at least one text that is not empty")
        num_special = len(SPECIAL_TOKENS) + len(special_tokens)
        bpe = train_bpe(piece_counts, vocab_size - num_special, progress, digits)
        return cls(tokenizer_json.definition_from_bpe(bpe, SPECIAL_TOKENS, tuple(special_tokens)))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a tokenizer.json, or a folder that contains one: ours, or any byte-level BPE (GPT-2, Qwen, Llama 3), or
        one of SentencePiece's kind (Llama 2, Mistral). A folder also says which token has which role.

        Raises FileNotFoundError or ValueError, with one line that names the file.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if path.is_dir() and file.exists():  # a link that the user names is trusted, a link inside a folder is not
            check_file(file, "a tokenizer.json is expected there")
        definition = tokenizer_json.read_definition(file)
        settings = read_settings(path) if path.is_dir() else None
        try:
            return cls(definition, settings)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def default(cls) -> Tokenizer:
        """The tokenizer that ships with the package: 6400 entries for English, code and some Chinese."""
        # Load the file, not the folder: some installers make every file of a package a link into their cache.
        return cls.load(_DEFAULT_FOLDER / "tokenizer.json")

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, each completely or not at all."""
        chat_template = self.their_template or (CHAT_TEMPLATE if self.has_chat_tokens else None)
        if self.settings:
            config = {key: value for key, value in self.settings.config.items() if key not in _NOT_KEPT}
            config |= {} if chat_template is None else {"chat_template": chat_template}
            config.setdefault("model_input_names", tokenizer_json.MODEL_INPUTS)
        else:
            config = tokenizer_json.config_for_transformers(
                endoftext=self.token_bytes(self.endoftext_id).decode(),
                im_start=self.token_bytes(self.im_start_id).decode(),
                im_end=self.token_bytes(self.im_end_id).decode(),
                chat_template=chat_template,
                own_tokens=self.own_tokens,
            )
        contents = {
            "tokenizer.json": tokenizer_json.to_json_text(self.definition),
            "tokenizer_config.json": tokenizer_json.to_json_text(config),
        }
        if chat_template is not None:
            contents["chat_template.jinja"] = chat_template
        folder = Path(folder)
        if folder.is_file():
            raise NotADirectoryError(f"{folder} is a file; expected a folder name; choose another path")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            with atomic_write(folder / name) as file:
                file.write(content.encode("utf-8"))

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, which never include a special token.

        Raises ValueError for a lone surrogate, which is not valid Unicode and has no UTF-8 form.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        try:
            encodings = self._fast.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            raise ValueError(_why_not_encodable(texts)) from None
        return [encoding.ids for encoding in encodings]

    def encode_within(self, texts: list[str]) -> list[list[int]]:
        """`encode_batch` for texts that follow a control token. A blank before the start of a text is not added."""
        if self._fast_within is self._fast:
            return self.encode_batch(texts)
        return [encoding.ids for encoding in self._fast_within.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Ids to text. Bytes that are not UTF-8 (half a character) become U+FFFD. ValueError for an unknown id."""
        ids = [int(token_id) for token_id in ids]
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in self.special_ids]
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.drops_first_blank else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; for a special token, its name. ValueError for an unknown id."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id}; this tokenizer has ids 0 to {self.vocab_size - 1}")
        return self._bytes[token_id]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, fingerprint={self.fingerprint!r})"

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[dict[str, Any], TokenizerSettings | None]]:
        return Tokenizer, (self.definition, self.settings)


class StreamDecoder:
    """Decode one id at a time, as a model produces them, and never return half a character.

    A token can end in the middle of a character's UTF-8 bytes, which are kept until the rest arrives. The strings that
    `feed` and `flush` return, joined, equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_first = True

    def feed(self, token_id: int) -> str:
        """Take the next id and return the text that is complete now (often empty)."""
        token_bytes = self._tokenizer.token_bytes(token_id)
        return "" if token_id in self._skipped else self._shown(self._decoder.decode(token_bytes))

    def _shown(self, text: str) -> str:
        """The text without a first blank that is not part of it."""
        if text and self._is_first:
            self._is_first = False
            text = text.removeprefix(" ") if self._tokenizer.drops_first_blank else text
        return text

    def flush(self) -> str:
        """End the stream: an incomplete character becomes U+FFFD. The decoder can be used again."""
        rest = self._shown(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        self._is_first = True
        return rest


def _build_fast(definition: dict[str, Any], controls: set[str]) -> tokenizers.Tokenizer:
    """The library's tokenizer, built only from the parts of the file that decide the ids of plain text.

    It leaves out the parts that would add tokens, search the text for special tokens or encode at random (dropout),
    and those that byte-level BPE does not need (prefixes, suffixes, a decoder with more regular expressions). It also
    leaves the control tokens out of the vocabulary, so that no text can reach them.
    """
    plain: dict[str, Any] = {"version": "1.0", "added_tokens": []}
    plain |= {key: definition.get(key) for key in ("normalizer", "pre_tokenizer")}
    model = definition["model"]
    vocab = {name: token_id for name, token_id in model["vocab"].items() if name not in controls}
    plain["model"] = {"type": "BPE", "vocab": vocab, "merges": model["merges"]}
    plain["model"]["ignore_merges"] = model.get("ignore_merges") is True
    plain["model"]["byte_fallback"] = sentencepiece.is_sentencepiece(definition)
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(plain))
    except BaseException as error:  # a "panic" of the library's Rust code is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = shown(" ".join(str(error).split()), 200)
        raise ValueError(f"the `tokenizers` library cannot use this tokenizer.json ({reason})") from None


def _token_bytes(name: str) -> bytes:
    """The name of an ordinary token of byte-level BPE spells its bytes in byte characters."""
    try:
        return name.translate(_TO_BYTES).encode("latin-1")
    except UnicodeEncodeError:  # a character that stands for no byte
        return name.encode("utf-8")


def _find(names: dict[str, int], candidates: tuple[str, ...]) -> int:
    for name in candidates:
        if name in names:
            return names[name]
    raise ValueError(f"no token marks the end of a text; expected one of {', '.join(_ENDOFTEXT_NAMES)}")


def _why_not_encodable(texts: list[str]) -> str:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            return f"text {number} is a {type(text).__name__}; expected a string"
        for position, character in enumerate(text):
            if "\ud800" <= character <= "\udfff":
                return (
                    f"lone surrogate U+{ord(character):04X} at character {position} of text {number}; "
                    "expected valid Unicode; clean the text with text.encode('utf-8', 'replace').decode()"
                )
    return f"got {type(texts).__name__}; expected a list of strings"
