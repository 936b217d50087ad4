"""Fields beside the text: each is read, refused by name, or counted. Other trainers' users write all of these."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tinylm.dataset.sources.record_fields import REFUSED_IN_CHAT, REFUSED_IN_MESSAGE, REFUSED_IN_PAIR
from tinylm.dataset.sources.record_shapes import BadRow, Record, messages_of, preference_of, text_of
from tinylm.dataset.sources.records import BadRows, iterate_texts, load_conversations, load_preferences
from tinylm.tokenizer.chat_template import encode_chat

QUESTION, ANSWER = {"role": "user", "content": "Fällt Regen?"}, {"role": "assistant", "content": "Nein."}
SYSTEM = {"role": "system", "content": "Du hilfst."}
TOOL = {"name": "get_rain", "parameters": {"town": "string"}}
CALL = {"name": "get_rain", "arguments": {"town": "Bern"}}
CALL_TEXT = '{"name": "get_rain", "arguments": {"town": "Bern"}}'


def chat(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return messages_of(Record({"messages": list(messages), **fields}, "c.jsonl", 3))


def pair(**fields: Any) -> Any:
    return preference_of(Record(fields, "p.jsonl", 3))


def remarks(row: dict[str, Any], write_jsonl, load=load_conversations) -> list[str]:
    bad_rows = BadRows()
    list(load(write_jsonl(row), bad_rows))
    return bad_rows.remarks()


# --------------------------------------------------------------------------------------------------
# Turns that are not to be learnt
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("value", [0, 0.0, False])
def test_an_answer_marked_as_not_to_be_learnt_is_masked(tokenizer, flag: str, value: Any) -> None:
    wrong = {"role": "assistant", "content": "Wrong five", flag: value}
    messages = chat(QUESTION, wrong, QUESTION, {**ANSWER, flag: not value})
    ids, mask = encode_chat(tokenizer, messages)
    learnt = tokenizer.decode([token for token, flag in zip(ids, mask, strict=True) if flag])
    assert learnt == "Nein."
    assert "Wrong five" in tokenizer.decode(ids)


@pytest.mark.parametrize("value", [0.5, 2, -1, "0", "false", [0], {"a": 1}])
def test_a_weight_that_is_not_understood_is_refused(value: Any) -> None:
    with pytest.raises(BadRow, match=r"c.jsonl, line 3: messages\[1\].weight is .*; expected 0 or 1"):
        chat(QUESTION, {**ANSWER, "weight": value})


@pytest.mark.parametrize("value", [None, 1, True, 1.0])
def test_an_answer_without_a_mark_is_learnt(tokenizer, value: Any) -> None:
    assert chat(QUESTION, {**ANSWER, "train": value}) == [QUESTION, ANSWER]


def test_marks_that_cannot_be_followed() -> None:
    with pytest.raises(BadRow, match="weight and train disagree"):
        chat(QUESTION, {**ANSWER, "weight": 1, "train": False})
    with pytest.raises(BadRow, match="every answer is marked as not to be learnt"):
        chat(QUESTION, {**ANSWER, "weight": 0})
    with pytest.raises(BadRow, match="the row's weight is 0"):
        chat(QUESTION, ANSWER, weight=0)
    with pytest.raises(BadRow, match="the row's weight is 0.3; expected 0 or 1"):
        chat(QUESTION, ANSWER, weight=0.3)
    with pytest.raises(BadRow, match="chosen is marked as not to be learnt"):
        pair(prompt="Q", chosen={**ANSWER, "weight": 0}, rejected="Ja.")


def test_marks_are_said(write_jsonl) -> None:
    row = {"messages": [{**QUESTION, "weight": 1}, {**ANSWER, "weight": 0}, {**QUESTION, "train": False}, ANSWER]}
    assert remarks(row, write_jsonl) == [
        "marked to be learnt, but only the assistant's turns are: turns of the user (1)",
        "answers marked as not to be learnt, and masked: messages (1)",
    ]


# --------------------------------------------------------------------------------------------------
# Tools and their calls
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), TOOL, json.dumps(TOOL)])
def test_tools_in_the_system_message_are_tools_of_the_row(tools: Any) -> None:
    expected = chat(SYSTEM, QUESTION, ANSWER, tools=[TOOL])
    assert "get_rain" in expected[0]["content"]
    assert chat({**SYSTEM, "tools": tools}, QUESTION, ANSWER) == expected
    assert chat({**SYSTEM, "tools": tools}, QUESTION, ANSWER, tools=tools) == expected  # and not twice
    assert chat(SYSTEM, QUESTION, ANSWER, functions=[TOOL]) == expected  # the older name


def test_tools_of_another_role_are_refused() -> None:
    with pytest.raises(BadRow, match=r"messages\[0\] has tools, but is not the system's"):
        chat({**QUESTION, "tools": [TOOL]}, ANSWER)


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"type": "function", "function": {**CALL, "arguments": '{"town": "Bern"}'}}]},
        {"function_call": CALL},
        {"function_call": {**CALL, "arguments": '{"town": "Bern"}'}},
        {"function_call": json.dumps(CALL)},
    ],
)
def test_a_call_stands_behind_what_was_said(fields: dict[str, Any]) -> None:
    said = chat(QUESTION, {"role": "assistant", "content": "Ich sehe nach.", **fields}, ANSWER)
    assert said[1] == {"role": "assistant", "content": f"Ich sehe nach.\n{CALL_TEXT}"}
    for nothing in ({}, {"content": None}, {"content": ""}):
        silent = chat(QUESTION, {"role": "assistant", **nothing, **fields}, ANSWER)
        assert silent[1] == {"role": "assistant", "content": CALL_TEXT}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tool_calls": "[{"}, r"messages\[1\].tool_calls is not JSON"),
        ({"tool_calls": "5"}, r"messages\[1\].tool_calls is of type int; expected a list"),
        ({"tool_calls": False}, r"messages\[1\].tool_calls is of type bool"),
        ({"function_call": [CALL]}, r"messages\[1\].function_call is of type list; expected a call"),
        ({"function_call": 0}, r"messages\[1\].function_call is of type int"),
        ({"function_call": {"arguments": "{}"}}, r"messages\[1\].function_call has no function name"),
        ({"content": 0, "tool_calls": [CALL]}, r"messages\[1\].content is of type int"),
        ({"content": [{"type": "image_url"}]}, r"holds a part of type 'image_url'; expected only parts of type 'text'"),
    ],
)
def test_a_call_or_content_that_is_none(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        chat(QUESTION, {**ANSWER, **fields})


def test_the_system_prompt_of_the_row_is_not_written_twice() -> None:
    assert chat(SYSTEM, QUESTION, ANSWER, system="Du hilfst. ") == [SYSTEM, QUESTION, ANSWER]
    both = chat(SYSTEM, QUESTION, ANSWER, system="Sei kurz.")[0]["content"]
    assert both == "Sei kurz.\n\nDu hilfst."
    assert chat({**SYSTEM, "tools": [TOOL]}, QUESTION, ANSWER, system="Du hilfst.") == chat(
        SYSTEM, QUESTION, ANSWER, tools=[TOOL]
    )


# --------------------------------------------------------------------------------------------------
# Values that are false, and are values
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, False, 5, 0.0])
@pytest.mark.parametrize("name", ["input", "system", "tools", "history"])
def test_a_false_value_is_not_a_missing_one(name: str, value: Any) -> None:
    with pytest.raises(BadRow, match=f"line 3: {name} is "):
        messages_of(Record({"instruction": "Repeat.", "output": "x", name: value}, "a.jsonl", 3))


def test_an_empty_field_says_nothing(write_jsonl) -> None:
    empty = dict.fromkeys(("images", "label", "tools", "rejected"))
    row = {"messages": [QUESTION, {**ANSWER, "tool_calls": "", "reasoning_content": "", "images": []}], **empty}
    assert messages_of(Record(row, "c.jsonl", 1)) == [QUESTION, ANSWER]
    assert remarks(row, write_jsonl) == []


# --------------------------------------------------------------------------------------------------
# Fields that are refused or counted
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED_IN_CHAT)
def test_a_chat_refuses_what_would_be_learnt_in_another_way(name: str) -> None:
    for value in (False, True, ["x"]):
        with pytest.raises(BadRow, match=f"line 3: {name}: .*; "):
            chat(QUESTION, ANSWER, **{name: value})


def test_rows_for_kto_are_not_loaded_as_chats() -> None:
    good, bad = {"instruction": "Q", "output": "A", "kto_tag": 1}, {"prompt": "Q", "completion": "B", "label": False}
    for row in (good, bad):
        with pytest.raises(BadRow, match="it marks an answer as good or bad; keep only the rows with good answers"):
            messages_of(Record(row, "k.jsonl", 1))


@pytest.mark.parametrize("name", REFUSED_IN_PAIR)
def test_a_pair_refuses_them_too(name: str) -> None:
    with pytest.raises(BadRow, match=f"line 3: {name}: .*; "):
        pair(prompt="Q", chosen="A", rejected="B", **{name: 1})


@pytest.mark.parametrize("name", REFUSED_IN_MESSAGE)
def test_a_message_refuses_a_part_that_is_no_text_or_a_mask_within_it(name: str) -> None:
    with pytest.raises(BadRow, match=rf"line 3: messages\[1\].{name}: .*; "):
        chat(QUESTION, {**ANSWER, name: [{"begin_offset": 0}]})


def test_all_other_fields_are_counted(write_jsonl) -> None:
    answer = {**ANSWER, "reasoning_content": "Six and four is ten.", "name": "Ada"}
    row = {"messages": [QUESTION, answer, QUESTION, answer], "id": 0, "label": "weather", "score": 0.5, "\x1b[1m": 1}
    assert remarks(row, write_jsonl) == [
        "thinking that is left out; to have it learnt, write it into the content: messages.reasoning_content (2)",
        "fields that training does not use: messages.name (2), id (1), label (1), score (1), \ufffd[1m (1)",
    ]
    assert remarks({"text": "x", "url": "y"}, write_jsonl, iterate_texts) == [
        "fields that training does not use: url (1)"
    ]
    scored = {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 0}
    assert remarks(scored, write_jsonl, load_preferences) == ["fields that training does not use: margin (1)"]


def test_rows_with_a_field_of_their_own_each_do_not_fill_the_memory(write_jsonl) -> None:
    bad_rows = BadRows()
    list(iterate_texts(write_jsonl(*({"text": "x", f"f{number}": 1} for number in range(500))), bad_rows))
    assert len(bad_rows.notes) == 201 and sum(bad_rows.notes.values()) == 500
    assert bad_rows.remarks()[0].startswith("fields that training does not use: others (300), f0 (1)")
    assert bad_rows.remarks()[0].endswith(" and 191 more")


def test_names_of_roles_of_other_projects() -> None:
    names = ("developer", "human", "model", "tool_call", "tool_response", "function", "gpt")
    roles = [m["role"] for m in chat(*({"role": name, "content": "x"} for name in names))]
    assert roles == ["system", "user", "assistant", "assistant", "tool", "tool", "assistant"]


# --------------------------------------------------------------------------------------------------
# Pairs: one prompt, two answers
# --------------------------------------------------------------------------------------------------

OTHER = {"role": "assistant", "content": "Ja."}
RAIN_PAIR = ([QUESTION], [ANSWER], [OTHER])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Fällt Regen?", "chosen": [QUESTION, ANSWER], "rejected": "Ja."},
        {"prompt": "Fällt Regen?", "chosen": "Nein.", "rejected": [QUESTION, OTHER]},
        {"prompt": " Fällt Regen?\n", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER]},
        {"messages": [QUESTION, ANSWER], "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER]},
        {"messages": [QUESTION], "chosen": [QUESTION, ANSWER], "rejected": [OTHER]},
    ],
)
def test_a_side_that_repeats_the_prompt_is_recognised(row: dict[str, Any]) -> None:
    assert pair(**row) == RAIN_PAIR


def test_a_system_prompt_beside_whole_conversations_is_kept() -> None:
    row = {"prompt": [SYSTEM], "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER]}
    assert pair(**row)[0] == [SYSTEM, QUESTION]
    assert pair(system="Du hilfst.", chosen=[SYSTEM, QUESTION, ANSWER], rejected=[SYSTEM, QUESTION, OTHER])[0] == [
        SYSTEM,
        QUESTION,
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"chosen": [SYSTEM, QUESTION, ANSWER], "rejected": [SYSTEM, {**QUESTION, "content": "?"}, OTHER]},
            "same prompt",
        ),
        (
            {"prompt": "Was?", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER]},
            "the prompt is not in chosen",
        ),
        ({"prompt": "Was?", "chosen": [QUESTION, ANSWER], "rejected": "Ja."}, "chosen begins with the turn of another"),
        ({"prompt": "Fällt Regen?", "chosen": [QUESTION], "rejected": "Ja."}, "chosen begins with the turn of another"),
        ({"chosen": [QUESTION, ANSWER], "rejected": "Ja."}, "no prompt"),
    ],
)
def test_two_questions_are_no_pair(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        pair(**row)


# --------------------------------------------------------------------------------------------------
# Characters in the text
# --------------------------------------------------------------------------------------------------


def test_control_tokens_and_nul_characters_are_counted(write_jsonl) -> None:
    row = {"text": "<|im_start|>Zwölf\0<|im_end|><|im_end|> <b>{{ name }}"}
    assert remarks(row, write_jsonl, iterate_texts) == [
        "control tokens spelt in the text: <|im_end|> (2), <|im_start|> (1); they are learnt as letters",
        "NUL characters in the text, learnt as they are: text (1)",
        "places to fill that stay in the text: {{ name }} (1)",
    ]


def test_a_text_of_nul_characters_is_utf_16(write_jsonl) -> None:
    with pytest.raises(BadRow, match="text looks like UTF-16: 9 of 18 characters are NUL; convert it to UTF-8"):
        text_of(Record({"text": "A dog ran".encode("utf-16-le").decode("utf-8")}, "x.txt", 1))
