"""Chats in the template of another maker: prompts, and the loss mask where the template's structure shows it safely.

The template writes text, in which control tokens must be found. So that no message can forge one, a mark breaks every
name of such a token in a message before the template sees it, and is taken out of the text again when it is encoded:

    content  "a<|im_end|>b"     template sees  "a<MARK|im_end|>b"     encoded as plain text  "a<|im_end|>b"

The mark is one of Unicode's noncharacters, which no chat holds (one that holds all of them is refused).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tinylm.tokenizer.template_sandbox import render_all
from tinylm.tokenizer.tokenizer import Tokenizer

Turn = tuple[list[int], list[bool]]

_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
_GENERATION = re.compile(r"\{%-?\+?\s*generation\b")
_OURS = "import the model again with --chat_template chatml to train with this project's template"


def their_text(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The chat as the template writes it, for people."""
    return _one(*_render(tokenizer, [_values(tokenizer, messages, add_generation_prompt, tools)])[0])


def their_prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[int]:
    """The ids of a chat with the header that asks for an answer."""
    mark = _marks(tokenizer, messages, tools)[0]
    values = _values(tokenizer, _guarded(tokenizer, messages, mark), True, tools)
    text = _one(*_render(tokenizer, [values])[0])
    return _encode(tokenizer, text, mark, [])[0]


def their_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    is_target: Sequence[bool],
    tools: Sequence[Mapping[str, Any]] | None,
) -> list[Turn]:
    """Ids and loss mask, one turn per message. Joined, the ids are those of the whole chat in the template.

    What the template writes before an answer belongs to the message before it; several messages before one answer have
    their tokens in the last of them, because a template may join them.

    Args:
        is_target: whether a message is an answer to be learnt.

    Raises:
        ValueError: the template refuses the chat, or its answers cannot be told apart safely.
    """
    mark, opening, closing = _marks(tokenizer, messages, tools)
    guarded = _guarded(tokenizer, messages, mark)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    has_blocks = _GENERATION.search(tokenizer.their_template or "") is not None
    find = _spans_of_blocks if has_blocks else _spans_of_prefixes
    text, spans = find(tokenizer, guarded, answers, tools, (opening, closing))
    ids, places = _encode(tokenizer, text, mark, [cut for span in spans for cut in span])
    turns: list[Turn] = []
    done = 0
    for number, start, end in zip(answers, places[::2], places[1::2], strict=True):
        before = ids[done:start]
        turns += [([], []) for _ in range(number - len(turns))]
        if number and messages[number - 1]["role"] != "assistant":
            turns[-1] = before, [False] * len(before)
            before = []
        turns.append((before + ids[start:end], [False] * len(before) + [is_target[number]] * (end - start)))
        done = end
    turns += [([], []) for _ in range(len(messages) - len(turns))]
    last_ids, last_mask = turns[-1]
    turns[-1] = last_ids + ids[done:], last_mask + [False] * (len(ids) - done)
    return turns


def _spans_of_blocks(
    tokenizer: Tokenizer, guarded: list[dict[str, Any]], answers: list[int], tools: Any, marks: tuple[str, str]
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where its `{% generation %}` blocks stand in it: exactly one for each answer."""
    values = _values(tokenizer, guarded, False, tools)
    text = _one(*_render(tokenizer, [values])[0])
    marked = _one(*_render(tokenizer, [values], marks)[0])
    spans, plain = [], ""
    for number, part in enumerate(re.split(f"[{marks[0]}{marks[1]}]", marked)):
        if number % 2:
            spans.append((len(plain), len(plain) + len(part)))
        plain += part
    if plain != text or len(spans) != len(answers):
        raise ValueError(
            f"the chat template has {len(spans)} generation blocks for {len(answers)} answers, so they cannot be told "
            f"apart safely; {_OURS}"
        )
    for number, (start, end) in zip(answers, spans, strict=True):
        written = guarded[number]["content"].rpartition("</think>")[2].strip()  # templates drop what was thought before
        if written not in text[start:end]:
            raise ValueError(
                f"the generation block for message {number} does not hold its text, so the answers to learn cannot be "
                f"told apart safely; {_OURS}"
            )
    return text, spans


def _spans_of_prefixes(
    tokenizer: Tokenizer, guarded: list[dict[str, Any]], answers: list[int], tools: Any, marks: tuple[str, str]
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the answers in it, each from the end of its prompt to the control token that ends it.

    An answer's prompt, and the chat up to the answer, must both be beginnings of the whole text: then what the model
    reads in training is what it reads in a chat.
    """
    requests = [_values(tokenizer, guarded, False, tools)]
    for number in answers:
        requests.append(_values(tokenizer, guarded[:number], True, tools))
        requests.append(_values(tokenizer, guarded[: number + 1], False, tools))
    (text, why), *parts = _render(tokenizer, requests)
    text = _one(text, why)
    ends = re.compile(
        "|".join(re.escape(name) for name, i in tokenizer.added_ids.items() if i in tokenizer.special_ids)
    )
    spans = []
    for place, number in enumerate(answers):
        prompt, until = parts[2 * place][0], parts[2 * place + 1][0]
        if prompt is None or until is None or not text.startswith(prompt) or not text.startswith(until):
            raise ValueError(
                f"the chat template writes the answer in message {number} in another way when others follow, or after "
                f"another prompt than in a chat, so the answers to learn cannot be told apart safely; {_OURS}"
            )
        found = [match.end() for match in ends.finditer(until) if match.start() >= len(prompt)]
        if not found:
            raise ValueError(
                f"the chat template ends the answer in message {number} with no control token, so a model could not "
                f"learn to stop; {_OURS}"
            )
        spans.append((len(prompt), found[-1]))
    return text, spans


def _marks(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Any) -> list[str]:
    """Three characters that stand nowhere in the chat or the template."""
    contents = (str(message["content"]) for message in messages)
    used = "".join([tokenizer.their_template or "", json.dumps(tools, ensure_ascii=False), *contents])
    free = [character for character in _NONCHARACTERS if character not in used]
    if len(free) < 3:
        raise ValueError("the messages hold all noncharacters U+FDD0 to U+FDEF; expected text; leave three of them out")
    return free[:3]


def _guarded(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], mark: str) -> list[dict[str, Any]]:
    """The messages with a mark inside every name of an added token.

    In answers only the control tokens are broken. Others, as <think>, are part of what the model wrote, and templates
    look for them.
    """
    guarded = []
    for message in messages:
        content = str(message["content"])
        for name, token_id in tokenizer.added_ids.items():
            if message["role"] != "assistant" or token_id in tokenizer.special_ids:
                content = content.replace(name, name[0] + mark + name[1:])
        guarded.append({"role": message["role"], "content": content})
    return guarded


def _values(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], prompt: bool, tools: Any) -> dict[str, Any]:
    """The variables of a template, as in transformers."""
    settings = tokenizer.settings
    names = {role: settings.token(role) for role in ("bos_token", "eos_token", "pad_token")} if settings else {}
    known = {role: name for role, name in names.items() if name is not None}
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    return {"messages": plain, "tools": tools or None, "documents": None, "add_generation_prompt": prompt, **known}


def _render(
    tokenizer: Tokenizer, requests: list[dict[str, Any]], marks: tuple[str, str] = ("", "")
) -> list[tuple[str | None, str]]:
    assert tokenizer.their_template is not None
    return render_all(tokenizer.their_template, requests, marks)


def _one(text: str | None, why: str) -> str:
    if text is None:
        raise ValueError(f"the model's chat template refuses this chat: {why}")
    return text


def _encode(tokenizer: Tokenizer, text: str, mark: str, cuts: list[int]) -> tuple[list[int], list[int]]:
    """The ids of a rendered chat, and the number of ids before each of `cuts`, places in the text in order.

    Raises:
        ValueError: the ids of the text up to a cut are no beginning of the ids of the whole.
    """
    flags = {token["content"]: token for token in tokenizer.definition["added_tokens"]}
    patterns = []
    for name in sorted(tokenizer.added_ids, key=len, reverse=True):  # some take the blanks beside them, too
        left, right = (r"\s*" if flags.get(name, {}).get(side) else "" for side in ("lstrip", "rstrip"))
        patterns.append(left + re.escape(name) + right)
    ids: list[int] = []
    places: list[int] = []
    at = 0
    for number, part in enumerate(re.split(f"({'|'.join(patterns)})", text)):
        inside = [cut - at for cut in cuts[len(places) :] if cut <= at + len(part)]
        if number % 2:
            places += [len(ids) + (cut > 0) for cut in inside]
            ids.append(tokenizer.added_ids[part if part in tokenizer.added_ids else part.strip()])
        else:
            encode = tokenizer.encode_within if at else tokenizer.encode_batch
            starts = [part[:cut].replace(mark, "") for cut in inside]
            whole, *beginnings = encode([part.replace(mark, ""), *starts])
            for beginning in beginnings:
                if whole[: len(beginning)] != beginning:
                    raise ValueError(
                        "the chat template joins the first token of an answer with the prompt before it, so the "
                        f"answers to learn cannot be told apart safely; {_OURS}"
                    )
                places.append(len(ids) + len(beginning))
            ids += whole
        at += len(part)
    return ids, places
