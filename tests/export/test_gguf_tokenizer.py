"""llama.cpp reads a text, and a chat through the template in the file, as the same tokens as we do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from tests.export.conftest import Loaded
from tests.export.llama_cpp import LlamaCpp
from tests.model.small_models import trained_model
from tinylm.export.gguf import export_gguf
from tinylm.export.gguf_metadata import token_list
from tinylm.tokenizer.chat_template import encode_chat
from tinylm.tokenizer.split_patterns import KNOWN_PATTERNS, llama_cpp_name
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.tokenizer.tokenizer_settings import TokenizerSettings

PATTERNS = list(KNOWN_PATTERNS)
CHAT = [
    {"role": "system", "content": "  Be short: größe. \n"},
    {"role": "user", "content": "你好, it's\n\n  me\t"},
    {"role": "assistant", "content": "Hi!\nTwo lines."},
    {"role": "user", "content": "¿Qué? 12345 \U0001f44d\U0001f3fd"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "größe <a> & 'b'",
            "parameters": {"type": "object", "properties": {"x": {"type": "number", "enum": [1, 2.5]}}},
        },
    }
]


def with_steps(tokenizer: Tokenizer, *steps: dict[str, Any], **model: Any) -> Tokenizer:
    """The same merges behind another pre-tokenizer."""
    definition = copy.deepcopy(tokenizer.definition)
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(steps)}
    definition["model"] |= model
    return Tokenizer(definition)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.fixture(scope="module")
def in_llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tokenizer], LlamaCpp]:
    """A small model with this tokenizer, loaded by llama.cpp."""

    def load(tokenizer: Tokenizer, lineage: dict[str, Any] | None = None, **changes: Any) -> LlamaCpp:
        model = trained_model(**{"vocab_size": tokenizer.vocab_size, "hidden_size": 32, **changes})
        path = tmp_path_factory.mktemp("tokenizer") / "a.gguf"
        export_gguf(model, tokenizer, lineage or {}, path)
        return LlamaCpp(path, num_positions=model.config.max_position_embeddings)

    return load


def differing(tokenizer: Tokenizer, llama_cpp: LlamaCpp, texts: list[str]) -> list[str]:
    return [text[:40] for text in texts if llama_cpp.tokens(text) != tokenizer.encode(text)]


def test_texts_have_the_same_tokens(in_llama_cpp: Callable[..., LlamaCpp], torture: list[str]) -> None:
    tokenizer = Tokenizer.default()
    assert differing(tokenizer, in_llama_cpp(tokenizer), torture) == []


@pytest.mark.slow
def test_texts_of_the_world_have_the_same_tokens(
    in_llama_cpp: Callable[..., LlamaCpp], world_texts: list[str], small_tokenizer: Tokenizer
) -> None:
    """Naughty strings, the UTF-8 stress test, 65 languages."""
    for tokenizer in (Tokenizer.default(), small_tokenizer):
        assert differing(tokenizer, in_llama_cpp(tokenizer), world_texts) == []


@pytest.mark.parametrize(
    ("name", "steps", "model"),
    [
        ("qwen2", [split(PATTERNS[0]), byte_level(False)], {}),
        ("llama-bpe", [split(PATTERNS[1]), byte_level(False)], {"ignore_merges": True}),
        ("gpt-2", [byte_level(True)], {}),
        ("smollm", [DIGITS, byte_level(True)], {}),
    ],
)
def test_other_pre_tokenizers(
    in_llama_cpp: Callable[..., LlamaCpp], torture: list[str], name: str, steps: list[dict], model: dict
) -> None:
    tokenizer = with_steps(Tokenizer.default(), *steps, **model)
    assert llama_cpp_name(tokenizer.definition) == name
    assert differing(tokenizer, in_llama_cpp(tokenizer), torture) == []


@pytest.mark.parametrize(
    ("steps", "model"),
    [
        ([split(PATTERNS[0]), byte_level(False)], {"ignore_merges": True}),
        ([split(PATTERNS[1]), byte_level(False)], {}),
        ([split(r"\p{N}"), byte_level(True)], {}),
        ([DIGITS, split(PATTERNS[0]), byte_level(False)], {}),
        ([{**split(PATTERNS[0]), "behavior": "MergedWithNext"}, byte_level(False)], {}),
        ([{**byte_level(True), "add_prefix_space": True}], {}),
    ],
)
def test_an_unknown_pre_tokenizer_is_refused(tmp_path: Path, steps: list[dict], model: dict) -> None:
    tokenizer = with_steps(Tokenizer.default(), *steps, **model)
    with pytest.raises(
        ValueError, match="llama.cpp has no pre-tokenizer that splits as .*; expected .* qwen2, llama-bpe"
    ):
        export_gguf(trained_model(vocab_size=6400), tokenizer, {}, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_normalisers() -> None:
    """Qwen's NFC is not computed by llama.cpp, whose users know it so; NFKC changes ordinary text."""
    definition = Tokenizer.default().definition
    assert llama_cpp_name({**definition, "normalizer": {"type": "NFC"}}) == "qwen2"
    with pytest.raises(ValueError, match="llama.cpp has no pre-tokenizer"):
        llama_cpp_name({**definition, "normalizer": {"type": "NFKC"}})


def test_special_tokens(in_llama_cpp: Callable[..., LlamaCpp], shape: Callable[[str], Loaded]) -> None:
    """Ours are control tokens, and none of them comes out of plain text."""
    fields = gguf.GGUFReader(shape("grouped").path).fields
    found = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.ggml.")}
    types = found.pop("tokenizer.ggml.token_type")
    assert types == [3] * 16 + [1] * 357
    assert {name[15:]: value for name, value in found.items() if not isinstance(value, list)} == {
        "model": "gpt2", "pre": "qwen2", "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0, "eot_token_id": 2,
        "add_bos_token": False, "add_eos_token": False,
    }  # fmt: skip
    llama_cpp = shape("grouped").llama_cpp
    assert llama_cpp.tokens("<|im_start|>a<|im_end|><think>", parse_special=True) == [1, *llama_cpp.tokens("a"), 2, 7]


def test_ids_of_the_config_come_first(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = trained_model(vocab_size=373, bos_token_id=5, eos_token_id=None, pad_token_id=9)
    export_gguf(model, small_tokenizer, {}, tmp_path / "a.gguf")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    ids = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "padding")]
    assert ids == [5, 2, 9]


def test_entries_without_a_token_are_unused(small_tokenizer: Tokenizer) -> None:
    """Their names differ from all others: llama.cpp refuses a file in which two tokens are spelt alike."""
    definition = copy.deepcopy(small_tokenizer.definition)
    token = {**definition["added_tokens"][0], "content": "[PAD375]", "id": 374, "special": False}
    definition["added_tokens"].append(token)
    names, types = token_list(Tokenizer(definition), 377)
    assert names[372:] == [names[372], "[PAD373]", "[PAD375]", "[[PAD375]]", "[PAD376]"]
    assert types[372:] == [1, 5, 4, 5, 5] and len(set(names)) == 377


def test_a_chat_has_the_same_tokens(shape: Callable[[str], Loaded], small_tokenizer: Tokenizer) -> None:
    """Through the template in the file, as llama.cpp's server and its command line read a chat."""
    llama_cpp = shape("qk_norm").llama_cpp
    for chat in (CHAT, CHAT[1:], CHAT[-1:], [{"role": "user", "content": "a"}]):
        assert llama_cpp.chat_tokens(chat) == encode_chat(small_tokenizer, chat, add_generation_prompt=True)[0]
    answer = llama_cpp.server.handle_chat_completions({"messages": CHAT, "max_tokens": 1, "temperature": 0})
    assert answer["usage"]["prompt_tokens"] == len(encode_chat(small_tokenizer, CHAT, add_generation_prompt=True)[0])


def test_tools_are_presented_in_the_same_way(shape: Callable[[str], Loaded], small_tokenizer: Tokenizer) -> None:
    """llama.cpp's server gives a tool without a description an empty one, so these have one."""
    llama_cpp = shape("qk_norm").llama_cpp
    for chat in (CHAT, CHAT[1:]):
        ours = encode_chat(small_tokenizer, chat, add_generation_prompt=True, tools=TOOLS)[0]
        assert llama_cpp.chat_tokens(chat, tools=TOOLS) == ours


def test_a_base_models_documents_begin_as_in_training(
    in_llama_cpp: Callable[..., LlamaCpp], small_tokenizer: Tokenizer
) -> None:
    """<|endoftext|> stood before every document. A chat, and a model from before that, begin with their own tokens."""
    text = small_tokenizer.encode("Ein größeres")
    for lineage, start in [
        ({"stage": "pretrain", "document_start": True}, [0]),
        ({"stage": "pretrain", "document_start": False}, []),
        ({"stage": "pretrain"}, []),
        ({"stage": "full_sft", "document_start": True}, []),
        ({"stage": "merged", "document_start": True}, []),
    ]:
        llama_cpp = in_llama_cpp(small_tokenizer, lineage)
        assert llama_cpp.tokens("Ein größeres", add_special=True, parse_special=True) == start + text


def test_another_makers_template_and_first_token(
    in_llama_cpp: Callable[..., LlamaCpp], small_tokenizer: Tokenizer
) -> None:
    """Both go into the file as they are: the template, and the token that their library puts before a text."""
    piece = [{"SpecialToken": {"id": "<think>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    definition = {**small_tokenizer.definition, "post_processor": {"type": "TemplateProcessing", "single": piece}}
    template = "{% for m in messages %}<think>{{ m.role }}: {{ m.content }}</think>\n{% endfor %}"
    tokenizer = Tokenizer(definition, TokenizerSettings({"eos_token": "</think>"}, template))
    llama_cpp = in_llama_cpp(tokenizer, eos_token_id=[8, 9])
    text = tokenizer.encode("größe")
    assert llama_cpp.tokens("größe", add_special=True) == [7, *text]
    # The template writes the first token itself, so it is not put there twice.
    assert llama_cpp.chat_tokens([{"role": "user", "content": "größe"}]) == [
        7, *tokenizer.encode("user: größe"), 8, *tokenizer.encode("\n")
    ]  # fmt: skip
