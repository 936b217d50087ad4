"""A corpus in an object store: moto's S3 server on this machine, no network. What is local and what is remote agree."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import parquet

from tinylm.dataset.pretrain_dataset import load_pretrain_data
from tinylm.dataset.shards.shard_cache import cached_token_shards
from tinylm.dataset.shards.shard_names import has_known_content, shard_names
from tinylm.dataset.sources import object_stores
from tinylm.dataset.sources.finding import Source, find_files, find_sources
from tinylm.dataset.sources.records import BadRows, iterate_texts, load_conversations, read_records

ROWS = [{"text": f"The little boat number {number} sailed over the quiet sea.\n"} for number in range(40)]
CHAT = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}


def corpus_files() -> dict[str, bytes]:
    """Name -> content: every kind of file, and some that are none."""
    lines = [json.dumps(row).encode() for row in ROWS]
    table = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS[30:]), table)
    return {
        "a.jsonl": b"\n".join(lines[:10]),
        "deep/b.jsonl.gz": gzip.compress(b"\n".join(lines[10:20])),
        "deep/c.txt": b"<|endoftext|>\n".join(row["text"].encode() for row in ROWS[20:30]),
        "deep/d.parquet": table.getvalue(),
        "README.md": b"not data",
        ".hidden/e.txt": b"not data",
        "notes.pdf": b"not data",
    }


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bytes], Any]]:
    """Puts objects into the bucket `corpus`, which holds `corpus_files` under books/; the environment names the server,
    with the variables that every S3 program reads."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # one made for another environment is none of ours
    client = boto3.client("s3")
    client.create_bucket(Bucket="corpus")

    def put(key: str, content: bytes) -> None:
        client.put_object(Bucket="corpus", Key=key, Body=content)

    for name, content in corpus_files().items():
        put(f"books/{name}", content)
    put("bookshelf.txt", b"not under books/")
    yield put
    for found in client.list_objects_v2(Bucket="corpus")["Contents"]:
        client.delete_object(Bucket="corpus", Key=found["Key"])
    client.delete_bucket(Bucket="corpus")
    client.close()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    for name, content in corpus_files().items():
        file = tmp_path / "local" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "local"


FILES = ["a.jsonl", "deep/b.jsonl.gz", "deep/c.txt", "deep/d.parquet"]


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("{}", FILES),
        ("{}/", FILES),
        ("{}/deep", FILES[1:]),
        ("{}/deep/c.txt", FILES[2:3]),
        ("{}/.hidden", [".hidden/e.txt"]),  # asked for by name
        ("{}/*.jsonl", FILES[:1]),
        ("{}/*/*.jsonl*", FILES[1:2]),
        ("{}/**/*.parquet", FILES[3:]),
        ("{0}/deep/c.txt, {0}/a.jsonl", [FILES[2], FILES[0]]),
    ],
)
def test_paths_mean_the_same_here_and_there(store, local: Path, path: str, names: list[str]) -> None:
    assert find_files(path.format("s3://corpus/books")) == [f"s3://corpus/books/{name}" for name in names]
    assert find_files(path.format(local)) == [str(local / name) for name in names]


def test_a_file_lists_paths_and_addresses(store, local: Path, tmp_path: Path) -> None:
    paths = [str(local / "a.jsonl"), "s3://corpus/books/deep/c.txt"]
    lines = ["# the corpus", paths[0], "", f"  {paths[1]}"]
    (tmp_path / "files.txt").write_text("\n".join(lines))
    assert find_files(f"@{tmp_path}/files.txt") == paths
    store("lists/files.txt", "\n".join(lines).encode())
    assert find_files(f"@s3://corpus/lists/files.txt,{local}/deep/c.txt") == [*paths, str(local / "deep" / "c.txt")]


def test_the_same_corpus_has_the_same_fingerprint(store, local: Path, tokenizer, tmp_path: Path) -> None:
    """All kinds of files, the rows held out too; and it is ROWS that is read."""
    there = load_pretrain_data("s3://corpus/books", tokenizer, 32, tmp_path / "s3", validation_fraction=0.2)
    here = load_pretrain_data(str(local), tokenizer, 32, tmp_path / "disk", validation_fraction=0.2)
    assert [part.fingerprint for part in there] == [part.fingerprint for part in here]
    assert list(iterate_texts("s3://corpus/books/")) == list(iterate_texts(str(local))) == [row["text"] for row in ROWS]


def test_records_name_their_address(store) -> None:
    store("chats/x.jsonl", json.dumps(CHAT).encode() + b"\n{")
    bad_rows = BadRows(limit=0.5)
    assert load_conversations("s3://corpus/chats/x.jsonl", bad_rows) == [CHAT["messages"]]
    assert "s3://corpus/chats/x.jsonl, line 2: not JSON" in bad_rows.report()


def test_only_a_new_or_changed_object_is_tokenised(store, tokenizer, tmp_path: Path, monkeypatch) -> None:
    """And none is read again to see that: its hash comes with the listing."""

    def tokenised() -> list[str]:
        before = set(tmp_path.glob("*/meta.json"))
        with monkeypatch.context() as patch:
            patch.setattr("tinylm.dataset.shards.shard_names.open_binary", None)  # would fail if it were called
            cached_token_shards("s3://corpus/books", tokenizer, tmp_path)
        new = {meta.parent.name for meta in set(tmp_path.glob("*/meta.json")) - before}
        sources = find_sources("s3://corpus/books")
        names = shard_names(sources, tokenizer)
        return [source.path for source, name in zip(sources, names, strict=True) if name in new]

    assert len(tokenised()) == 4
    assert tokenised() == []
    store("books/deep/c.txt", corpus_files()["deep/c.txt"].replace(b"quiet", b"qu1et"))
    store("books/z.txt", b"new")
    assert tokenised() == ["s3://corpus/books/deep/c.txt", "s3://corpus/books/z.txt"]


def test_an_object_without_a_version_is_not_known_before_it_is_read() -> None:
    """So its shard is never one of the cache of all runs, where it would stay the same for ever."""
    assert has_known_content(Source("s3://corpus/a.txt", 5, "ETag x"))
    assert not has_known_content(Source("https://example.org/a.txt", 5))
    assert not has_known_content(Source("hub:owner/name:train"))


def test_the_version_is_the_same_from_a_listing_and_alone(store) -> None:
    """Otherwise a file named alone would be tokenised again."""
    whole = {source.path: source for source in find_sources("s3://corpus/books/deep")}
    for path, source in whole.items():
        object_stores._file_system(path)[0].invalidate_cache()
        assert find_sources(path) == [source] and source.version.startswith("ETag ") and source.size > 0


def test_a_large_object_is_read_in_order(store, monkeypatch) -> None:
    """In many requests, and the parquet file from its end to its start."""
    monkeypatch.setattr(object_stores, "BUFFER_BYTES", 1000)
    text = "".join(f"{number} and so on\n" for number in range(20_000))
    store("large/a.txt", text.encode())
    table = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([{"text": text}] * 30), table, compression="none", use_dictionary=False)
    store("large/b.parquet", table.getvalue())
    assert list(iterate_texts("s3://corpus/large")) == [text] * 31


# --------------------------------------------------------------------------------------------------
# What can go wrong
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["s3://nobucket/a.txt", "s3://nobucket", "s3://corpus/books/b.txt", "s3://corpus/boo", "s3://corpus/x*.txt"],
)
def test_nothing_there(store, address: str) -> None:
    with pytest.raises(FileNotFoundError) as error:
        find_files(address)
    line = (
        "no such object, folder or bucket; expected data files; check the address, and the credentials if it is private"
    )
    assert str(error.value) == f"{address}: {line}"


def test_wrong_kinds_of_objects(store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="notes.pdf: unknown kind of file; expected .txt"):
        find_files("s3://corpus/books/notes.pdf")
    with pytest.raises(FileNotFoundError, match="s3://corpus/books/.hidden/x: no such object"):
        find_files("s3://corpus/books/.hidden/x")
    store("pictures/a.png", b"x")
    with pytest.raises(FileNotFoundError, match="s3://corpus/pictures: no data file in this folder; expected .txt"):
        find_files("s3://corpus/pictures")
    store("broken/a.jsonl.gz", b"plain")
    with pytest.raises(ValueError, match="s3://corpus/broken/a.jsonl.gz: cannot be read .*damaged"):
        list(iterate_texts("s3://corpus/broken/a.jsonl.gz"))
    store("broken/a.parquet", b"PAR1")
    with pytest.raises(ValueError, match="s3://corpus/broken/a.parquet: cannot be read as parquet"):
        list(iterate_texts("s3://corpus/broken/a.parquet"))


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (ConnectionError("reset"), "cannot be read (ConnectionError: reset); check the network"),
        (RuntimeError("its own\nin two lines"), "cannot be read (RuntimeError: its own); check the network"),
        (PermissionError("Forbidden"), "cannot be read (PermissionError: Forbidden); check the address, and whether"),
        (FileNotFoundError("gone"), "no such object, folder or bucket; expected data files; check the address"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "deep/b.jsonl.gz", "deep/c.txt", "deep/d.parquet"])
def test_a_failure_while_an_object_is_read(store, monkeypatch, failure: Exception, line: str, name: str) -> None:
    """It is the store's, and not that the file is damaged."""

    def fail(handle: object, size: int = -1) -> bytes:
        raise failure

    address = f"s3://corpus/books/{name}"
    monkeypatch.setattr("s3fs.core.S3File.read", fail)
    with pytest.raises(ValueError, match="^" + re.escape(f"{address}: {line}")):
        list(iterate_texts(address))


def test_no_credentials(store, monkeypatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ValueError, match="^s3://corpus/books: cannot be read .NoCredentialsError.*; set the credent"):
        find_files("s3://corpus/books")


@pytest.mark.slow
def test_no_server(store, monkeypatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ValueError, match="^s3://corpus/books: cannot be read .*connect.*; check the network$"):
        find_files("s3://corpus/books")


@pytest.mark.parametrize("missing", ["fsspec", "s3fs"])
def test_without_the_libraries(monkeypatch, local: Path, missing: str) -> None:
    """Local files need none of them; an address says which extra to install."""
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "s3fs":  # fsspec keeps the classes it has imported
        monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    assert len(list(iterate_texts(str(local)))) == 40
    with pytest.raises(ValueError, match=r"s3://corpus/books: .* is not installed; .*; pip install 'tinylm\[cloud\]'$"):
        find_files("s3://corpus/books")


def test_unknown_addresses_and_empty_lists(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="s4://x/y.txt: unknown kind of address; expected s3://, gs:// or hf://"):
        find_files("s4://x/y.txt")
    (tmp_path / "files.txt").write_text("\n# nothing\n")
    with pytest.raises(ValueError, match="files.txt: the list is empty; expected a path or an address a line"):
        find_files(f"@{tmp_path}/files.txt")
    (tmp_path / "files.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="files.txt: not UTF-8"):
        find_files(f"@{tmp_path}/files.txt")
    with pytest.raises(FileNotFoundError, match="nowhere.txt: no such file; expected a list of paths"):
        find_files(f"@{tmp_path}/nowhere.txt")
    with pytest.raises(ValueError, match="data path ''"):
        find_files(f"{tmp_path}/files.txt,")


def test_a_comma_in_a_name_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "a,b.txt").write_text("x")
    assert [record.data["text"] for record in read_records(f"{tmp_path}/a,b.txt")] == ["x"]


def test_other_stores_come_with_fsspec(tmp_path: Path) -> None:
    """Its memory:// stands for those that no test can reach."""
    with fsspec.open("memory://corpus/a.txt", "w") as file:
        file.write("One")
    assert find_files("memory://corpus") == ["memory:///corpus/a.txt"]
    assert list(iterate_texts("memory://corpus")) == ["One"]
