"""Chats: from messages to text, token ids and the loss mask, with the ChatML template.

    <|im_start|>user
    What is the sky?<|im_end|>
    <|im_start|>assistant
    Blue.<|im_end|>

The same template exists twice. `CHAT_TEMPLATE` (chat_template_jinja.py) goes into every model folder, for
transformers, vLLM and llama.cpp. Our own code uses the functions below. They place the control tokens by id, from
the structure of the chat, so no text in a message can forge a control token or move the loss mask. For chats that
do not contain control tokens as text, both give the same ids; tests compare them.

A model of another maker brings a template of its own, which `their_template` renders; the functions here take either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tinylm.tokenizer.chat_template_jinja import CHAT_TEMPLATE as CHAT_TEMPLATE
from tinylm.tokenizer.chat_template_jinja import TOOLS_INTRODUCTION
from tinylm.tokenizer.their_template import their_prompt, their_text, their_turns
from tinylm.tokenizer.tokenizer import Tokenizer

Message = dict[str, Any]
"""{"role": one of ROLES, "content": the text}, and "train": False on an answer that is not to be learnt."""

ROLES = ("system", "user", "assistant", "tool")


def render_chat(
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tokenizer: Tokenizer | None = None,
) -> str:
    """The chat as text, exactly as `CHAT_TEMPLATE` renders it, or the template of `tokenizer`, if that has its own.

    For people and tests only: do not encode this text.
    """
    if tokenizer is not None and tokenizer.their_template:
        _checked_turns(messages, tools)
        return their_text(tokenizer, messages, add_generation_prompt, tools)
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content, _ in _checked_turns(messages, tools))
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def chat_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[tuple[list[int], list[bool]]]:
    """Ids and loss mask of each turn, so that a chat that is too long for a model can be cut between two turns.

    There is one turn per message, in order. With `tools` but no system message, a turn that presents the tools comes
    first. The mask is True on the tokens that the assistant has to write: its content and the <|im_end|> after it. The
    header before them and the newline after them come from the template, so they are not scored. An answer with
    "train": False is not scored at all.

    Header and content are encoded separately, so the start of the content is known and need not be searched for. This
    changes no id: the content is stripped, and the split pattern always cuts between a newline and a visible
    character (see `cut_text`).

    Raises ValueError also where the answers cannot be told apart safely in the template of another maker.
    """
    if tokenizer.their_template:
        turns_to_learn = [is_target for _, _, is_target in _checked_turns(messages, None)]
        return their_turns(tokenizer, messages, turns_to_learn, tools)
    if not tokenizer.has_chat_tokens:
        raise ValueError("this tokenizer has no <|im_start|> and <|im_end|>; a chat needs them; use another tokenizer")
    newline = tokenizer.encode("\n")
    turns = []
    for role, content, is_target in _checked_turns(messages, tools):
        header = [tokenizer.im_start_id, *tokenizer.encode(role + "\n")]
        body = [*tokenizer.encode(content), tokenizer.im_end_id]
        mask = [False] * len(header) + [is_target] * len(body) + [False] * len(newline)
        turns.append((header + body + newline, mask))
    return turns


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[list[int], list[bool]]:
    """Ids and loss mask of a chat: its `chat_turns` joined, and on request the header that asks for an answer.

    In the template of another maker, a prompt may be written otherwise than a finished chat; its mask is all False.

    Raises ValueError for an unknown role, a content that is not a string (both with the message's number), or an empty
    chat.
    """
    if tokenizer.their_template and add_generation_prompt:
        _checked_turns(messages, None)
        prompt = their_prompt(tokenizer, messages, tools)
        return prompt, [False] * len(prompt)
    ids: list[int] = []
    mask: list[bool] = []
    for turn_ids, turn_mask in chat_turns(tokenizer, messages, tools):
        ids += turn_ids
        mask += turn_mask
    if add_generation_prompt:
        prompt = [tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
        ids += prompt
        mask += [False] * len(prompt)
    return ids, mask


def chat_fault(tokenizer: Tokenizer) -> str:
    """Why no answer can be asked for; empty if one can. It is tried, since a template may fail or never end."""
    if not tokenizer.can_chat:
        return "it has no chat template"
    try:
        encode_chat(tokenizer, [{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    except ValueError as error:
        return str(error)
    return ""


def _checked_turns(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> list[tuple[str, str, bool]]:
    """(role, stripped content, is to be learnt) of each turn, with the tools written into the system turn."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError("no messages; expected a list of {'role': ..., 'content': ...} with at least one message")
    turns = [_checked_turn(number, message) for number, message in enumerate(messages)]
    if tools:
        lines = [TOOLS_INTRODUCTION, *(json.dumps(tool, ensure_ascii=False) for tool in tools)]
        system = turns.pop(0)[1] if turns[0][0] == "system" else ""
        turns.insert(0, ("system", (system + "\n\n" if system else "") + "\n".join(lines), False))
    return turns


def _checked_turn(number: int, message: Message) -> tuple[str, str, bool]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is a {type(message).__name__}; expected {{'role': ..., 'content': ...}}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {role!r:.60}; expected one of {', '.join(ROLES)}")
    if message.get("tool_calls"):
        raise ValueError(f"message {number} has `tool_calls`; expected the call written out as text in `content`")
    if not isinstance(content, str):
        raise ValueError(f"message {number} ({role}) has a content of type {type(content).__name__}; expected a string")
    return role, content.strip(), role == "assistant" and message.get("train") is not False
