"""Records -> texts, chats and preference pairs: all data shapes that the project accepts, and one error for the rest.

Roles are system, user, assistant and tool; ShareGPT's names are mapped to them. A system prompt is kept. A `tools`
field becomes part of the system message, in the words of the chat template. A tool call (an OpenAI `tool_calls` entry
or a `function_call` turn) becomes an assistant message that holds the call as a JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tinylm.files.untrusted import parse_json
from tinylm.tokenizer.chat_template import Message
from tinylm.tokenizer.chat_template_jinja import TOOLS_INTRODUCTION

PreferencePair = tuple[list[Message], list[Message], list[Message]]
"""(prompt, chosen answer, rejected answer)"""

_MAX_REASON = 600  # characters; our own longest reasons have 400

ROLE_ALIASES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Accepted name of a role -> our name."""

CHAT_SHAPES = (
    '{"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]}, '
    '{"instruction", "input", "output"} or {"prompt", "completion"}'
)
PREFERENCE_SHAPES = (
    '{"prompt", "chosen", "rejected"} as strings or messages, {"chosen", "rejected"} as whole conversations, '
    'or {"conversations", "chosen", "rejected"}'
)


@dataclass(frozen=True)
class Record:
    """One row of data and its place: `line` counts from 1 (lines of a text, rows of a parquet file)."""

    data: dict[str, Any]
    path: str
    line: int


class BadRow(ValueError):
    """A row that cannot be used; the message names file and line.

    The reason may quote the row (its field names), so control characters are replaced and long reasons are cut.
    """

    def __init__(self, path: str, line: int, reason: str) -> None:
        reason = "".join(character if character.isprintable() else "\ufffd" for character in reason[:_MAX_REASON])
        super().__init__(f"{path}, line {line}: {reason}")
        self.path = path
        self.line = line
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, int, str]]:
        return BadRow, (self.path, self.line, self.reason)


def text_of(record: Record) -> str:
    """The text of a {"text"} record.

    Raises:
        BadRow: if it has no such field, or the text is empty or not a string.
    """
    if "text" not in record.data:
        _fail(record, f'{_field_names(record)}; expected {{"text"}}; rename the column that holds the text')
    text = _string(record, record.data["text"], "text")
    if not text:
        _fail(record, "the text is empty")
    return text


def messages_of(record: Record) -> list[Message]:
    """The chat of a record, as {"role", "content"} messages; at least one is the assistant's.

    Raises:
        BadRow: if the record has none of CHAT_SHAPES, or a message is unusable.
    """
    data = record.data
    if data.get("messages") is not None:
        messages = _messages(record, data["messages"], "messages")
    elif data.get("conversations") is not None:
        messages = _messages(record, data["conversations"], "conversations")
    elif data.get("instruction") is not None and data.get("output") is not None:
        messages = _alpaca_prompt(record) + [_message("assistant", _string(record, data["output"], "output"))]
    elif data.get("prompt") is not None and data.get("completion") is not None:
        messages = _messages_in_field(record, "prompt", "user") + _messages_in_field(record, "completion", "assistant")
    else:
        _fail(record, f"{_field_names(record)}; expected {CHAT_SHAPES}")
    messages = _with_system(record, messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        _fail(record, "the chat has no assistant message; expected at least one")
    if not all(answer.strip() for answer in answers):
        _fail(record, "an assistant message is empty; expected an answer")
    return messages


def preference_of(record: Record) -> PreferencePair:
    """A preference pair: (prompt, chosen, rejected). Both answers follow the same prompt.

    Two equal answers are accepted: real data contains them, and DPODataset drops and counts them.

    Raises:
        BadRow: if the record has none of PREFERENCE_SHAPES, or an answer is missing.
    """
    data = record.data
    if data.get("chosen") is None or data.get("rejected") is None:
        _fail(record, f"{_field_names(record)}; expected {PREFERENCE_SHAPES}")
    chosen, rejected = (
        _messages_in_field(record, "chosen", "assistant"),
        _messages_in_field(record, "rejected", "assistant"),
    )
    if chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":  # whole conversations
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    elif data.get("conversations") is not None:
        prompt = _messages(record, data["conversations"], "conversations")
    elif data.get("messages") is not None:
        prompt = _messages(record, data["messages"], "messages")
    elif data.get("prompt") is not None:
        prompt = _messages_in_field(record, "prompt", "user")
    elif data.get("instruction") is not None:
        prompt = _alpaca_prompt(record)
    else:
        _fail(record, f"{_field_names(record)}: no prompt; expected {PREFERENCE_SHAPES}")
    prompt = _with_system(record, prompt)
    if not prompt:
        _fail(record, "chosen and rejected do not begin with the same prompt; expected one they share")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not any(message["role"] == "assistant" and message["content"].strip() for message in answer):
            _fail(record, f"{name} holds no answer of the assistant; expected at least one")
    return prompt, chosen, rejected


def _messages(record: Record, value: Any, field: str) -> list[Message]:
    """A list of messages in either spelling, checked and converted to ours."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        _fail(record, f"{field} is {_type_name(value)}; expected a list of messages")
    if not value:
        _fail(record, f"{field} is empty; expected at least one message")
    messages = []
    for number, entry in enumerate(value):
        where = f"{field}[{number}]"
        if not isinstance(entry, dict):
            _fail(record, f'{where} is {_type_name(entry)}; expected {{"role", "content"}} or {{"from", "value"}}')
        messages.append(_checked_message(record, entry, where))
    return messages


def _checked_message(record: Record, entry: dict[str, Any], where: str) -> Message:
    role_key, content_key = ("from", "value") if entry.get("role") is None else ("role", "content")
    if entry.get(role_key) is None:
        found = ", ".join(sorted(map(str, entry))) or "none"
        _fail(record, f'{where} has the fields {found}; expected {{"role", "content"}} or {{"from", "value"}}')
    role = entry[role_key]
    if not isinstance(role, str) or role not in ROLE_ALIASES:
        _fail(record, f"{where} has the role {role!r:.40}; expected one of {', '.join(ROLE_ALIASES)}")
    content = entry.get(content_key)
    calls = entry.get("tool_calls") or []
    if not isinstance(calls, list):
        _fail(record, f"{where}.tool_calls is {_type_name(calls)}; expected a list of calls")
    if calls:
        spoken = [_string(record, content, f"{where}.{content_key}")] if content else []
        content = "\n".join([*spoken, *(_tool_call(record, call, where) for call in calls)])
    elif isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(_string(record, part.get("text"), f"{where}.text") for part in content)
    return _message(ROLE_ALIASES[role], _string(record, content, f"{where}.{content_key}"))


def _tool_call(record: Record, call: Any, where: str) -> str:
    """An OpenAI tool call as the kind of JSON object that the system message asks for."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        _fail(record, f"{where}.tool_calls has no function name; expected {{'name', 'arguments'}}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(record, arguments, f"{where}.tool_calls")
    return _json_text(record, {"name": function["name"], "arguments": arguments}, f"{where}.tool_calls")


def _messages_in_field(record: Record, field: str, role: str) -> list[Message]:
    """A field that is a string, one message or a list of messages. A string becomes a message of `role`."""
    value = record.data[field]
    if isinstance(value, str):
        return [_message(role, _string(record, value, field))]
    return _messages(record, [value] if isinstance(value, dict) else value, field)


def _alpaca_prompt(record: Record) -> list[Message]:
    """Alpaca's instruction and input as one question, after the turns of `history` if there are any."""
    earlier = record.data.get("history") or []
    if not isinstance(earlier, list) or not all(isinstance(t, list) and len(t) == 2 for t in earlier):
        _fail(record, "history is not a list of [question, answer]")
    messages = [
        _message(role, _string(record, text, "history"))
        for turn in earlier
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    fields = ("instruction", "input")
    parts = [_string(record, record.data.get(field) or "", field) for field in fields]
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        _fail(record, "instruction and input are both empty; expected a question")
    return [*messages, _message("user", question)]


def _with_system(record: Record, messages: list[Message]) -> list[Message]:
    """Add the row's `system` and `tools` fields to the chat's system message."""
    system, tools = record.data.get("system"), record.data.get("tools")
    if isinstance(tools, str):
        tools = _json(record, tools, "tools") if tools.strip() else []
    if isinstance(tools, dict):
        tools = [tools]
    if tools and not isinstance(tools, list):
        _fail(record, f"tools is {_type_name(tools)}; expected a list of tools")
    parts = [_string(record, system, "system")] if system else []
    rest = messages
    if messages and messages[0]["role"] == "system":
        parts.append(messages[0]["content"])
        rest = messages[1:]
    if tools:
        parts.append("\n".join([TOOLS_INTRODUCTION, *(_json_text(record, tool, "tools") for tool in tools)]))
    text = "\n\n".join(part.strip() for part in parts if part.strip())
    return [_message("system", text), *rest] if text else rest


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _json(record: Record, text: str, field: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        _fail(record, f"{field} is not JSON ({error}); expected JSON")


def _json_text(record: Record, value: Any, field: str) -> str:
    """A part of a record as JSON. It can be invalid: parquet files hold dates and bytes, any file half a character."""
    try:
        return _string(record, json.dumps(value, ensure_ascii=False), field)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, BadRow):
            raise
        _fail(record, f"{field} cannot be written as JSON ({error}); expected texts, numbers, lists and objects")


def _string(record: Record, value: Any, field: str) -> str:
    if not isinstance(value, str):
        _fail(record, f"{field} is {_type_name(value)}; expected a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            _fail(record, f"{field} holds half a surrogate pair; expected valid Unicode")
    return value


def _type_name(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def _field_names(record: Record) -> str:
    return f"the fields {', '.join(sorted(record.data)) or '(none)'}"


def _fail(record: Record, reason: str) -> NoReturn:
    raise BadRow(record.path, record.line, reason)
