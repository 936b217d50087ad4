"""Records -> texts, chats and preference pairs: all data shapes that the project accepts, and one error for the rest.

Roles are system, user, assistant and tool; other names are mapped to them. A system prompt is kept. `tools`, in the row
or in the system message, become part of the system message, in the words of the chat template. A tool call (a
`tool_calls` or `function_call` field, or a `function_call` turn) becomes an assistant message that holds the call as a
JSON object. What every other field means is in `record_fields.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinylm.dataset.sources.record import BadRow as BadRow
from tinylm.dataset.sources.record import Record as Record
from tinylm.dataset.sources.record import (
    checked_text,
    fail,
    field_names,
    is_empty,
    json_in,
    json_of,
    printable,
    type_name,
)
from tinylm.dataset.sources.record_fields import (
    LEARN_FLAGS,
    NEVER_LEARNT,
    NOT_LEARNT,
    REFUSED_IN_CHAT,
    REFUSED_IN_MESSAGE,
    REFUSED_IN_PAIR,
    ROLE_ALIASES,
    UNUSED,
    check_fields,
    is_learnt,
)
from tinylm.tokenizer.chat_template import Message
from tinylm.tokenizer.chat_template_jinja import TOOLS_INTRODUCTION

PreferencePair = tuple[list[Message], list[Message], list[Message]]
"""(prompt, chosen answer, rejected answer)"""

CHAT_SHAPES = (
    '{"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]}, '
    '{"instruction", "input", "output"} or {"prompt", "completion"}'
)
PREFERENCE_SHAPES = (
    '{"prompt", "chosen", "rejected"} as strings or messages, {"chosen", "rejected"} as whole conversations, '
    'or {"conversations", "chosen", "rejected"}'
)

SYSTEM_FIELDS = ("system", "tools", "functions")
ALPACA_FIELDS = ("instruction", "input", "history")
RECORD_FIELDS = ("text", "messages", "conversations", "instruction", "prompt", "chosen")
"""Each record has at least one of these."""


def text_of(record: Record) -> str:
    """The text of a {"text"} record.

    Raises:
        BadRow: if it has no such field, or the text is empty or not a string.
    """
    if "text" not in record.data:
        fail(record, _other_shape(record, '{"text"}', "rename the column that holds the text"))
    check_fields(record, record.data, ("text",), {})
    text = checked_text(record, record.data["text"], "text")
    if not text:
        fail(record, "the text is empty")
    return text


def named_text_of(record: Record, name_field: str) -> tuple[str, str]:
    """The name in the field `name_field`, such as that of a language, or else the file; and the text of the record.

    Raises:
        BadRow: as for `text_of`.
    """
    text = text_of(record)
    name = record.data.get(name_field)
    if not isinstance(name, str) or not name.strip():
        return record.path, text
    del record.notes[UNUSED, name_field]
    return printable(name, 80), text


def messages_of(record: Record) -> list[Message]:
    """The chat of a record, as {"role", "content"} messages; at least one is the assistant's.

    Raises:
        BadRow: if the record has none of CHAT_SHAPES, or a message is unusable.
    """
    data = record.data
    if data.get("messages") is not None:
        read, messages = ["messages"], _messages(record, data["messages"], "messages")
    elif data.get("conversations") is not None:
        read, messages = ["conversations"], _messages(record, data["conversations"], "conversations")
    elif data.get("instruction") is not None and data.get("output") is not None:
        read, messages = [*ALPACA_FIELDS, "output"], _alpaca_prompt(record)
        messages.append(_message("assistant", checked_text(record, data["output"], "output")))
    elif data.get("prompt") is not None and data.get("completion") is not None:
        read, messages = ["prompt", "completion"], _messages_in_field(record, "prompt", "user")
        messages += _messages_in_field(record, "completion", "assistant")
    else:
        fail(record, _other_shape(record, CHAT_SHAPES))
    _check_row(record, read, REFUSED_IN_CHAT)
    messages = _with_system(record, messages)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        fail(record, "the chat has no assistant message; expected at least one")
    if not all(answer["content"].strip() for answer in answers):
        fail(record, "an assistant message is empty; expected an answer")
    if not any(answer.get("train", True) for answer in answers):
        fail(record, "every answer is marked as not to be learnt; expected one that is; remove the row")
    return messages


def preference_of(record: Record) -> PreferencePair:
    """A preference pair: (prompt, chosen, rejected). Both answers follow the same prompt.

    Two equal answers are accepted: real data contains them, and DPODataset drops and counts them.

    Raises:
        BadRow: if the record has none of PREFERENCE_SHAPES, or an answer is missing.
    """
    data = record.data
    if data.get("chosen") is None or data.get("rejected") is None:
        fail(record, _other_shape(record, PREFERENCE_SHAPES))
    chosen, rejected = (_messages_in_field(record, name, "assistant") for name in ("chosen", "rejected"))
    read, prompt = _given_prompt(record)
    if chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":  # whole conversations
        if read and read[0] in ("messages", "conversations"):  # the same conversation again
            read, prompt = [], []
        shared = _num_shared(chosen, rejected)
        prompt = _joined_prompt(record, prompt, chosen[:shared])
        chosen, rejected = chosen[shared:], rejected[shared:]
    elif not read:
        fail(record, f"{field_names(record)}: no prompt; expected {PREFERENCE_SHAPES}")
    else:
        chosen, rejected = (_answer(record, *side, prompt) for side in (("chosen", chosen), ("rejected", rejected)))
    _check_row(record, ["chosen", "rejected", *read], REFUSED_IN_PAIR)
    if not prompt or {chosen[0]["role"], rejected[0]["role"]} != {"assistant"}:
        fail(record, "chosen and rejected do not begin with the same prompt; expected one they share")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        spoken = [m for m in answer if m["role"] == "assistant" and m["content"].strip()]
        if not spoken:
            fail(record, f"{name} holds no answer of the assistant; expected at least one")
        if not any(message.get("train", True) for message in spoken):
            fail(record, f"{name} is marked as not to be learnt; expected an answer that is; remove the row")
    return _with_system(record, prompt), chosen, rejected


def _other_shape(record: Record, expected: str, advice: str = "") -> str:
    """The error for a record of another shape, with the command that it is for if its shape is known."""
    for names, command in (
        (("chosen", "rejected"), "preference pairs are for tinylm dpo"),
        (("messages", "conversations", "output", "completion"), "chats are for tinylm sft"),
        (("text",), "texts are for tinylm pretrain"),
    ):
        if any(record.data.get(name) is not None for name in names):
            advice = command
            break
    return "; ".join(filter(None, (f"{field_names(record)}; expected {expected}", advice)))


def _given_prompt(record: Record) -> tuple[list[str], list[Message]]:
    """(fields, messages) of the prompt that stands beside the two answers; empty if there is none."""
    data = record.data
    if data.get("prompt") is not None:
        return ["prompt"], _messages_in_field(record, "prompt", "user")
    for name in ("conversations", "messages"):
        if data.get(name) is not None:
            return [name], _messages(record, data[name], name)
    if data.get("instruction") is not None:
        return list(ALPACA_FIELDS), _alpaca_prompt(record)
    return [], []


def _num_shared(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages two conversations begin with alike; at least one of each is left."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return shared


def _joined_prompt(record: Record, prompt: list[Message], shared: list[Message]) -> list[Message]:
    """The prompt of two whole conversations: what they share. A prompt beside them must be the same, or a system's."""
    given, found = ([_plain(m) for m in part if m["role"] != "system"] for part in (prompt, shared))
    if given and given not in (found[: len(given)], found[-len(given) :]):
        fail(record, "the prompt is not in chosen and rejected, which are whole conversations; remove one of the two")
    extra = [message for message in prompt if message["role"] == "system" and message not in shared]
    return [*extra, *shared]


def _answer(record: Record, name: str, side: list[Message], prompt: list[Message]) -> list[Message]:
    """One side of a pair without the prompt, if it repeats it."""
    if side[0]["role"] == "assistant":
        return side
    if len(side) == len(prompt) or [_plain(m) for m in side[: len(prompt)]] != [_plain(m) for m in prompt]:
        fail(record, f"{name} begins with the turn of another role; expected an answer, or the prompt and an answer")
    return side[len(prompt) :]


def _plain(message: Message) -> tuple[str, str]:
    return message["role"], message["content"].strip()


def _check_row(record: Record, read: Sequence[str], refused: dict[str, str]) -> None:
    """Refuse or count the fields of a row beside those that were read."""
    check_fields(record, record.data, (*read, *SYSTEM_FIELDS, "weight"), refused)
    if is_learnt(record, record.data, ("weight",), "the row's ") is False:
        fail(record, "the row's weight is 0, so it is not to be learnt; remove it")


def _messages(record: Record, value: Any, field: str) -> list[Message]:
    """A list of messages in either spelling, checked and converted to ours."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        fail(record, f"{field} is {type_name(value)}; expected a list of messages")
    if not value:
        fail(record, f"{field} is empty; expected at least one message")
    messages = []
    for number, entry in enumerate(value):
        where = f"{field}[{number}]"
        if not isinstance(entry, dict):
            fail(record, f'{where} is {type_name(entry)}; expected {{"role", "content"}} or {{"from", "value"}}')
        messages.append(_checked_message(record, entry, where))
    return messages


def _checked_message(record: Record, entry: dict[str, Any], where: str) -> Message:
    role_key, content_key = ("from", "value") if entry.get("role") is None else ("role", "content")
    if entry.get(role_key) is None:
        found = ", ".join(sorted(map(str, entry))) or "none"
        fail(record, f'{where} has the fields {found}; expected {{"role", "content"}} or {{"from", "value"}}')
    name = entry[role_key]
    if not isinstance(name, str) or name not in ROLE_ALIASES:
        fail(record, f"{where} has the role {name!r:.40}; expected one of {', '.join(ROLE_ALIASES)}")
    read = (role_key, content_key, "tools", "tool_calls", "function_call", *LEARN_FLAGS)
    check_fields(record, entry, read, REFUSED_IN_MESSAGE, where)
    role, tools, calls = (
        ROLE_ALIASES[name],
        _tools_text(record, entry.get("tools"), where),
        _calls(record, entry, where),
    )
    if tools and role != "system":
        fail(record, f"{where} has tools, but is not the system's; expected them in the row or in the system message")
    may_be_missing = (tools or calls) and is_empty(entry.get(content_key))
    content = "" if may_be_missing else _content(record, entry.get(content_key), f"{where}.{content_key}")
    message = _message(role, "\n".join([*([content] if content else []), *calls]) if calls else content)
    if tools:
        message["content"] = _paragraphs(content, tools)
    learnt = is_learnt(record, entry, LEARN_FLAGS, f"{where}.")
    if learnt is False and role == "assistant":
        message["train"] = False
        record.notes[NOT_LEARNT, where.partition("[")[0]] += 1
    elif learnt and role != "assistant":
        record.notes[NEVER_LEARNT, f"turns of the {role}"] += 1
    return message


def _content(record: Record, content: Any, name: str) -> str:
    """The text of a message: a string, or a list of parts of text."""
    if not isinstance(content, list):
        return checked_text(record, content, name)
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            fail(record, f"{name} holds a part of type {kind!r:.40}; expected only parts of type 'text'")
    return "".join(checked_text(record, part.get("text"), f"{name}.text") for part in content)


def _calls(record: Record, entry: dict[str, Any], where: str) -> list[str]:
    """The tool calls of a message, each as the kind of JSON object that the system message asks for."""
    calls = []
    for name in ("tool_calls", "function_call"):
        value = entry.get(name)
        if is_empty(value):
            continue
        if isinstance(value, str):
            value = json_in(record, value, f"{where}.{name}")
        kind, expected = (list, "a list of calls") if name == "tool_calls" else (dict, "a call")
        if not isinstance(value, kind):
            fail(record, f"{where}.{name} is {type_name(value)}; expected {expected}")
        calls += [_call(record, call, f"{where}.{name}") for call in ([value] if kind is dict else value)]
    return calls


def _call(record: Record, call: Any, name: str) -> str:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        fail(record, f"{name} has no function name; expected {{'name', 'arguments'}}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = json_in(record, arguments, name)
    return json_of(record, {"name": function["name"], "arguments": arguments}, name)


def _messages_in_field(record: Record, field: str, role: str) -> list[Message]:
    """A field that is a string, one message or a list of messages. A string becomes a message of `role`."""
    value = record.data[field]
    if isinstance(value, str):
        return [_message(role, checked_text(record, value, field))]
    return _messages(record, [value] if isinstance(value, dict) else value, field)


def _alpaca_prompt(record: Record) -> list[Message]:
    """Alpaca's instruction and input as one question, after the turns of `history` if there are any."""
    earlier = record.data.get("history")
    earlier = [] if earlier is None else earlier
    if not isinstance(earlier, list) or not all(isinstance(t, list) and len(t) == 2 for t in earlier):
        fail(record, "history is not a list of [question, answer]")
    messages = [
        _message(role, checked_text(record, text, "history"))
        for turn in earlier
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    values = ((name, record.data.get(name)) for name in ("instruction", "input"))
    parts = [checked_text(record, value, name) for name, value in values if value is not None]
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        fail(record, "instruction and input are both empty; expected a question")
    return [*messages, _message("user", question)]


def _with_system(record: Record, messages: list[Message]) -> list[Message]:
    """Add the row's system prompt and tools to the chat's system message. What stands there already is not repeated."""
    system = record.data.get("system")
    given = "" if system is None else checked_text(record, system, "system").strip()
    tools = [_tools_text(record, record.data.get(name), name) for name in ("tools", "functions")]
    found, rest = "", messages
    if messages[0]["role"] == "system":
        found, rest = messages[0]["content"].strip(), messages[1:]
    if f"{found}\n\n".startswith(f"{given}\n\n"):
        given = ""
    text = _paragraphs(given, found, *(part for part in tools if part not in found))
    return [_message("system", text), *rest] if text else rest


def _tools_text(record: Record, tools: Any, where: str) -> str:
    """The paragraph of the system message that presents the tools; "" if there are none."""
    name = where if where in SYSTEM_FIELDS else f"{where}.tools"
    if isinstance(tools, str):
        tools = json_in(record, tools, name) if tools.strip() else None
    if is_empty(tools):
        return ""
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list):
        fail(record, f"{name} is {type_name(tools)}; expected a list of tools")
    return "\n".join([TOOLS_INTRODUCTION, *(json_of(record, tool, name) for tool in tools)])


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
