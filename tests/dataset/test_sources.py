"""Every accepted file and shape, and every way a file can be wrong: named with file and line."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tinylm.dataset.sources.finding import SUFFIXES, find_files
from tinylm.dataset.sources.record_shapes import BadRow
from tinylm.dataset.sources.records import (
    READERS,
    BadRows,
    iterate_texts,
    load_conversations,
    load_preferences,
    read_records,
)

QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
OTHER = {"role": "assistant", "content": "B"}
SYSTEM = {"role": "system", "content": "S"}
TOOL = {"name": "add", "parameters": {}}

CHATS = {
    "messages": {"messages": [SYSTEM, QUESTION, ANSWER]},
    "conversations": {"conversations": [SYSTEM, QUESTION, ANSWER]},
    "from/value": {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "Q"},
            {"from": "gpt", "value": "A"},
        ]
    },
    "system field": {"conversations": [QUESTION, ANSWER], "system": "S"},
    "alpaca": {"instruction": "Q", "input": "", "output": "A", "system": "S"},
    "prompt and completion": {"prompt": "Q", "completion": "A", "system": "S"},
    "prompt and completion as messages": {"prompt": [SYSTEM, QUESTION], "completion": [ANSWER]},
    "text parts": {"messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "Q"}]}, ANSWER]},
}


@pytest.mark.parametrize("row", CHATS.values(), ids=CHATS.keys())
def test_shapes_of_chats(row, write_jsonl) -> None:
    assert load_conversations(write_jsonl(row)) == [[SYSTEM, QUESTION, ANSWER]]


def test_alpaca_input_and_history(write_jsonl) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Ho"]]}
    contents = [message["content"] for message in load_conversations(write_jsonl(row))[0]]
    assert contents == ["Hi", "Ho", "Add.\n\n1 2", "3"]


def test_tools_and_their_calls_are_kept(write_jsonl) -> None:
    call = '{"name": "add", "arguments": {"a": 1}}'
    share_gpt = {
        "conversations": [
            {"from": "human", "value": "1+1"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two"},
        ],
        "tools": json.dumps([TOOL]),
    }
    open_ai = {
        "messages": [
            {"role": "user", "content": "1+1"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "Two"},
        ],
        "tools": [TOOL],
    }
    first, second = load_conversations(write_jsonl(share_gpt, open_ai))
    assert first == second
    assert [message["role"] for message in first] == ["system", "user", "assistant", "tool", "assistant"]
    assert first[2]["content"] == call


def test_the_tools_read_as_the_chat_template_writes_them(tokenizer, write_jsonl) -> None:
    from tinylm.tokenizer.chat_template import render_chat

    row = {"messages": [SYSTEM, QUESTION, ANSWER], "tools": [TOOL]}
    messages = load_conversations(write_jsonl(row))[0]
    assert render_chat(messages) == render_chat([SYSTEM, QUESTION, ANSWER], tools=[TOOL])


PREFERENCES = {
    "strings": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "messages": {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [OTHER]},
    "prompt as a string, answers as messages": {"prompt": "Q", "chosen": [ANSWER], "rejected": [OTHER]},
    "whole conversations": {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER]},
    "prompt and whole conversations": {
        "prompt": "Q",
        "chosen": [QUESTION, ANSWER],
        "rejected": [QUESTION, OTHER],
    },
    "conversations and one message": {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "A"},
        "rejected": {"from": "gpt", "value": "B"},
    },
    "instruction": {"instruction": "Q", "input": "", "chosen": "A", "rejected": "B"},
}


@pytest.mark.parametrize("row", PREFERENCES.values(), ids=PREFERENCES.keys())
def test_shapes_of_preferences(row, write_jsonl) -> None:
    assert load_preferences(write_jsonl(row)) == [([QUESTION], [ANSWER], [OTHER])]


BAD_CHATS = {
    b'{"messages": [{"ro': "not JSON",
    b'{"text": "\xff\xfe"}': "not UTF-8 .byte 0xff",
    b'["a list"]': "a list; expected a JSON object",
    b'{"question": "x", "reply": "y"}': 'the fields question, reply; expected {"messages"',
    b'{"messages": "hello"}': "messages is of type str; expected a list",
    b'{"messages": []}': "messages is empty",
    b'{"messages": [7]}': r"messages\[0\] is of type int",
    b'{"messages": [{"speaker": "x"}]}': r"messages\[0\] has the fields speaker",
    b'{"messages": [{"role": "wizard", "content": "x"}]}': "role 'wizard'; expected one of system, user",
    b'{"messages": [{"role": "user", "content": 5}]}': r"messages\[0\].content is of type int",
    b'{"messages": [{"role": "user", "content": "x"}]}': "no assistant message",
    b'{"messages": [{"role": "assistant", "content": " "}]}': "an assistant message is empty",
    b'{"prompt": "\\ud800", "completion": "y"}': "half a surrogate pair",
    b'{"instruction": "", "output": "y"}': "instruction and input are both empty",
    b'{"prompt": "x", "completion": "y", "tools": "{["}': "tools is not JSON",
    b'{"prompt": "x", "completion": "y", "prompt": "z"}': "not JSON .the key 'prompt' appears twice",
}


@pytest.mark.parametrize(("line", "reason"), BAD_CHATS.items(), ids=range(len(BAD_CHATS)))
def test_bad_rows_are_named_with_file_and_line(line: bytes, reason: str, write_jsonl) -> None:
    path = write_jsonl(CHATS["messages"], line)
    with pytest.raises(ValueError, match=f"1 of 2 rows are bad: .*data.jsonl, line 2: .*{reason}"):
        load_conversations(path)
    bad_rows = BadRows(limit=0.5)
    assert len(load_conversations(path, bad_rows)) == 1
    assert bad_rows.num_bad == 1 and "line 2" in bad_rows.report()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "chosen": "A"}, "the fields chosen, prompt; expected"),
        ({"chosen": "A", "rejected": "B"}, "no prompt"),
        ({"prompt": "Q", "chosen": "A", "rejected": " "}, "rejected holds no answer"),
        ({"chosen": [QUESTION, ANSWER], "rejected": [SYSTEM, OTHER]}, "do not begin with the same prompt"),
    ],
)
def test_bad_preferences(row, reason: str, write_jsonl) -> None:
    with pytest.raises(ValueError, match=reason):
        load_preferences(write_jsonl(row))


def test_the_limit_of_bad_rows_is_exact(write_jsonl) -> None:
    good = {"text": "x"}
    assert len(list(iterate_texts(write_jsonl(*[good] * 999, b"{")))) == 999
    with pytest.raises(ValueError, match="1 of 999 rows are bad.*--max_bad_rows 0.01$"):
        list(iterate_texts(write_jsonl(*[good] * 998, b"{")))


def test_an_error_lists_ten_rows_and_counts_the_rest(write_jsonl) -> None:
    path = write_jsonl(*[{"texts": "x"}] * 25, {"text": "y"})
    with pytest.raises(ValueError, match=r"line 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\. 15 more: the fields texts"):
        list(iterate_texts(path))


def test_text_files_split_at_their_end_marks(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_bytes("\ufeffOne\r\ntwo\n<|endoftext|>\n\n<|endoftext|>\nThree <|endoftext|> x".encode())
    records = list(read_records(str(path)))
    assert [(r.data["text"], r.line) for r in records] == [("One\ntwo\n", 1), ("Three <|endoftext|> x", 6)]


def test_kinds_of_files_agree(tmp_path: Path) -> None:
    rows = [{"text": "One"}, {"text": "Zwölf\n"}]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.txt").write_text("not data")
    (tmp_path / "notes.pdf").write_text("not data")
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet"):
        assert list(iterate_texts(str(tmp_path / name))) == ["One", "Zwölf\n"]
    assert len(list(iterate_texts(str(tmp_path)))) == 8
    assert len(list(iterate_texts(str(tmp_path / "*.jsonl*")))) == 4
    assert [r.line for r in read_records(str(tmp_path / "d.parquet"))] == [1, 2]


def test_chats_in_parquet(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist([CHATS["messages"]]), tmp_path / "a.parquet")
    assert load_conversations(str(tmp_path / "a.parquet")) == [[SYSTEM, QUESTION, ANSWER]]


def test_a_missing_column_lists_those_found(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist([{"id": 1, "body": "x"}]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match='a.parquet, line 1: the fields body, id; expected {"text"}'):
        list(iterate_texts(str(tmp_path / "a.parquet")))


def test_placeholders_are_filled(write_jsonl) -> None:
    answer = {"role": "assistant", "content": "I am {{name}} by {{ author }}."}
    path = write_jsonl({"messages": [QUESTION, answer]})
    chats = load_conversations(path, replacements={"name": "Ada", "author": "{{name}}"})
    assert chats[0][1]["content"] == "I am Ada by {{name}}."
    for given in ({"name": "Ada"}, {}):
        with pytest.raises(ValueError, match=r"line 1: no text for {{ author }}; pass --author|{{name}}; pass --name"):
            load_conversations(path, replacements=given)
    bad_rows = BadRows()
    load_conversations(path, bad_rows)
    assert bad_rows.remarks() == ["places to fill that stay in the text: {{name}} (1), {{ author }} (1)"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "a.jsonl.gz"])
def test_an_empty_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name}: .*expected|{name}: cannot be read"):
        list(iterate_texts(str(tmp_path / name)))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        find_files(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no data file in this folder"):
        find_files(str(tmp_path))
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(ValueError, match="a.pdf: unknown kind of file"):
        find_files(str(tmp_path / "a.pdf"))
    whole = gzip.compress(os.urandom(5000))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:2000])
    (tmp_path / "plain.jsonl.gz").write_bytes(b"{}")
    for name in ("cut", "plain"):
        with pytest.raises(ValueError, match=f"{name}.jsonl.gz: cannot be read"):
            list(iterate_texts(str(tmp_path / f"{name}.jsonl.gz"), BadRows(limit=1)))
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(ValueError, match="latin.txt, line 2: not UTF-8"):
        list(iterate_texts(str(tmp_path / "latin.txt")))


@pytest.mark.parametrize(
    "content",
    ['[{"text": "Zwölf"}]', '\ufeff[{"text": "Zwölf"}]', '{"text": "Zwölf"}', '{"data": [{"text": "Zwölf"}]}'],
)
def test_json_files_of_several_forms(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_bytes(content.encode())
    assert list(iterate_texts(str(tmp_path / "a.json"))) == ["Zwölf"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            '{"version": 1, "data": [{"text": "x"}]}',
            "holds an object with the fields version, data; expected a list of",
        ),
        ("{}", r"holds an object with the fields \(none\)"),
        ('"text"', "holds a str; expected a list of objects; leave only the list of records in the file"),
        ("[" * 70 + "]" * 70, "not JSON .brackets nested deeper than 64"),
        ('{"text": "x"}\n{"text": "y"}', "not JSON .*; for one a line, use .jsonl"),
        ('[{"text": "x", "text": "y"}]', "not JSON .the key 'text' appears twice in one object"),
    ],
)
def test_json_files_of_other_forms(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"a.json: {reason}"):
        list(iterate_texts(str(tmp_path / "a.json")))


def test_a_list_in_a_file_of_lines_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('[\n{"text": "é"}\n]\n')
    with pytest.raises(ValueError, match="line 1: not JSON .*; expected one object a line; .*, name the file .json"):
        list(iterate_texts(str(tmp_path / "a.jsonl")))


def test_a_chat_in_a_json_file_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(CHATS["messages"]))
    assert load_conversations(str(tmp_path / "a.json")) == [[SYSTEM, QUESTION, ANSWER]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", 'Ein Text "ohne" Ende\n'),
        ("a.jsonl", '{"text": "Zw"}\n'),
        ("a.json", '[{"text": "Zw"}]'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path: Path, name: str, content: str, encoding: str) -> None:
    (tmp_path / name).write_bytes((content * 3 if name != "a.json" else content).encode(encoding))
    with pytest.raises(ValueError, match=f"{name}.*looks like UTF-16.*convert"):
        list(iterate_texts(str(tmp_path / name)))


def test_a_folder_says_what_it_leaves_out(tmp_path: Path) -> None:
    for name in ("a.txt", "b.csv", "c.CSV", "d.text", "e", "README.md", ".hidden.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress("Zwölf".encode()))
    bad_rows = BadRows()
    assert list(iterate_texts(str(tmp_path), bad_rows)) == ["x", "Zwölf"]
    assert bad_rows.remarks() == ["files of the folder that are left out: .csv (2), README.md (1), .text (1), e (1)"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep file names in Unicode")
def test_a_file_name_in_another_encoding_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
        file.write("x")
    with pytest.raises(ValueError, match=r"caf\\udce9.txt': the file's name is not UTF-8; .*; rename the file"):
        find_files(str(tmp_path))


def test_a_tilde_is_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "list.txt").write_text("~/a.txt\n")
    found = [str(tmp_path / "a.txt")]
    assert find_files("~/a.txt") == find_files("@~/list.txt") == find_files("~/a*.txt") == found
    assert find_files("~/a.txt,~/a.txt") == found * 2


def test_without_a_counter_the_first_bad_row_is_raised(write_jsonl) -> None:
    with pytest.raises(BadRow, match="line 1"):
        list(read_records(write_jsonl(b"{")))


def test_the_hub_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="`datasets` library is not installed"):
        list(read_records("hub:somebody/something"))
    with pytest.raises(ValueError, match="no data set named"):
        list(read_records("hub:"))


def test_the_hub_streams_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def load_dataset(name: str, split: str, streaming: bool):
            assert (name, split, streaming) == ("somebody/something", "test", True)
            return iter([{"text": "x"}])

    monkeypatch.setitem(sys.modules, "datasets", Library)
    assert list(iterate_texts("hub:somebody/something:test")) == ["x"]


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path: Path, monkeypatch) -> None:
    """64 KB of gzip held 64 MB of one line, which was read whole, then decoded, then parsed."""
    monkeypatch.setattr("tinylm.dataset.sources.records.MAX_ROW_BYTES", 1 << 20)
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "good"}\n{"text": "' + b"a" * (8 << 20))
    with pytest.raises(ValueError, match=r"bomb.jsonl.gz, line 2: over 1 MB without an end; expected one"):
        list(read_records(str(path)))


def test_every_kind_of_file_that_is_found_can_be_read() -> None:
    assert tuple(READERS) == SUFFIXES


def test_rows_for_another_command_name_it(write_jsonl) -> None:
    pairs, chats, texts = (
        write_jsonl(row, name=f"{number}.jsonl")
        for number, row in enumerate((PREFERENCES["strings"], CHATS["alpaca"], {"text": "é"}))
    )
    for load, path, command in (
        (load_conversations, pairs, "dpo"),
        (load_conversations, texts, "pretrain"),
        (load_preferences, chats, "sft"),
        (load_preferences, texts, "pretrain"),
        (lambda path: list(iterate_texts(path)), chats, "sft"),
        (lambda path: list(iterate_texts(path)), pairs, "dpo"),
    ):
        with pytest.raises(ValueError, match=f"; expected {{.*are for tinylm {command}; expected at most"):
            load(path)
