"""A tokenizer.json from what a GGUF says about its tokenizer: tokens, types, merges and the pre-tokenizer's name."""

from __future__ import annotations

from typing import Any

from tinylm.files.untrusted import shown
from tinylm.tokenizer.chat_template_jinja import CHAT_TEMPLATE
from tinylm.tokenizer.split_patterns import steps_from_llama_cpp
from tinylm.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer
from tinylm.tokenizer.tokenizer_json import added_token, byte_level_bpe
from tinylm.tokenizer.tokenizer_settings import MAX_TEMPLATE_CHARACTERS, ROLES, TokenizerSettings

_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_ROLES = ("bos", "eos", "eot", "eom", "padding", "unknown", "separator", "mask", "cls")
"""Tokens that are control tokens whatever type the file gives them, as in llama.cpp."""

_NEEDED_FALSE = ("add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces")
_USED = ("model", "pre", "tokens", "token_type", "merges", "add_bos_token")
_CHANGES_NOTHING = ("scores", "token_type_count")


def tokenizer_from_gguf(values: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF with these keys.

    Raises:
        ValueError: as for `definition_from_gguf`, or as for `Tokenizer`.
    """
    definition = definition_from_gguf(values)
    names = values[_KEY + "tokens"]
    template = values.get("tokenizer.chat_template", "")
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE_CHARACTERS:
        raise ValueError(
            f"tokenizer.chat_template is of type {type(template).__name__}; expected a text of up to "
            f"{MAX_TEMPLATE_CHARACTERS} characters"
        )
    if tuple(names[: len(SPECIAL_TOKENS)]) == SPECIAL_TOKENS and template in ("", CHAT_TEMPLATE):
        return Tokenizer({**definition, "post_processor": None})  # our own; the lineage says how documents begin
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, key in zip(ROLES, ("bos", "eos", "padding"), strict=True):
        token_id = values.get(f"{_KEY}{key}_token_id")
        is_known = type(token_id) is int and 0 <= token_id < len(names)
        config[role] = names[token_id] if is_known else None
    return Tokenizer(definition, TokenizerSettings(config, template or None))


def definition_from_gguf(values: dict[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer.json; `values` are the keys of a GGUF. Text is not normalised, as in llama.cpp.

    Raises:
        ValueError: it is not byte-level BPE, or its texts are split in a way that is not known here.
    """
    if values.get(_KEY + "model") != "gpt2":
        raise ValueError(
            f"{_KEY}model is {shown(values.get(_KEY + 'model'))}; expected gpt2, which is byte-level BPE: use the "
            "model folder of this model"
        )
    steps = steps_from_llama_cpp(values.get(_KEY + "pre"))
    _check_settings(values)
    names, types, merges = (_list_of(values, name, kind) for name, kind in _LISTS)
    if len(types) != len(names):
        raise ValueError(f"{_KEY}token_type has {len(types)} items; expected {len(names)}, one for each token")
    control = {values.get(f"{_KEY}{role}_token_id") for role in _ROLES}
    vocab: dict[str, int] = {}
    added: list[dict[str, Any]] = []
    last = max((number for number, kind in enumerate(types) if kind == _NORMAL), default=-1)
    for number, (name, kind) in enumerate(zip(names, types, strict=True)):
        if kind not in (_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED):
            raise ValueError(f"item {number} of {_KEY}token_type is {kind}; expected 1 to 5, as byte-level BPE has")
        if kind == _UNUSED and number not in control:
            continue
        is_added = kind != _NORMAL or number in control
        if is_added:
            added.append(added_token(number, name, is_special=kind != _USER_DEFINED or number in control))
        if not is_added or number < last:  # those behind the ordinary tokens were added to them later
            if name in vocab:
                raise ValueError(f"{_KEY}tokens has {shown(name)} twice, as {vocab[name]} and {number}; expected once")
            vocab[name] = number
    return byte_level_bpe(
        vocab,
        merges,
        added,
        pre_tokenizer=steps["pre_tokenizer"],
        normalizer=steps["normalizer"],
        post_processor=_post_processor(values, names),
        ignore_merges=steps["ignore_merges"],
    )


_LISTS: tuple[tuple[str, type], ...] = (("tokens", str), ("token_type", int), ("merges", str))


def _check_settings(values: dict[str, Any]) -> None:
    for key, value in values.items():
        name = key.removeprefix(_KEY)
        if name == key or name in _USED or name in _CHANGES_NOTHING or name.endswith("_token_id"):
            continue
        if name not in _NEEDED_FALSE or value is not False:
            expected = "false" if name in _NEEDED_FALSE else "a file without it"
            raise ValueError(f"{key} is {shown(value)}, which may change the tokens; expected {expected}")


def _list_of(values: dict[str, Any], name: str, kind: type) -> list[Any]:
    found = values.get(_KEY + name)
    if not isinstance(found, list) or not found or type(found[0]) is not kind:
        what = "missing" if found is None else f"of type {type(found).__name__}"
        raise ValueError(f"{_KEY}{name} is {what}; expected a list of one item or more: the tokens are not known")
    return found


def _post_processor(values: dict[str, Any], names: list[str]) -> dict[str, Any] | None:
    """What puts the begin token before a text. llama.cpp does that for `llama-bpe` unless the file says no."""
    adds_bos = values.get(_KEY + "add_bos_token", values.get(_KEY + "pre") == "llama-bpe")
    if not isinstance(adds_bos, bool):
        raise ValueError(f"{_KEY}add_bos_token is {shown(adds_bos)}; expected true or false")
    if not adds_bos:
        return None
    bos = values.get(_KEY + "bos_token_id")
    if type(bos) is not int or not 0 <= bos < len(names):
        raise ValueError(f"{_KEY}bos_token_id is {shown(bos)}, and a text begins with it; expected the id of a token")
    start, text = {"SpecialToken": {"id": names[bos], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    more = [{**start, "SpecialToken": {"id": names[bos], "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {names[bos]: {"id": names[bos], "ids": [bos], "tokens": [names[bos]]}}
    return {
        "type": "TemplateProcessing",
        "single": [start, text],
        "pair": [start, text, *more],
        "special_tokens": tokens,
    }
