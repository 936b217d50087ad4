"""Texts -> chunks -> token ids, in this process or spread over several.

The `tokenizers` library uses all cores by itself, but reading texts and making arrays of the results is Python code,
which runs on one core at a time. So large corpora are tokenised by worker processes. They are spawned, not forked,
because a fork of a process that runs torch's threads or uses a GPU can hang. The functions that they run are in
modules that do not import torch, so a worker starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tinylm.system.ordered_map import ordered_map
from tinylm.tokenizer.split_patterns import cut_text

CHUNK_CHARACTERS = 1 << 20
"""Text sent to a worker process at a time: about half a second of work."""

SECTION_CHARACTERS = 1 << 13
"""Long documents are tokenised in sections of about this size, which is a fifth faster and uses all cores."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Section(NamedTuple):
    """A document, or part of a long one."""

    text: str
    ends_document: bool


class EncodedChunk(NamedTuple):
    """The tokens of a chunk, [N] uint16 or uint32, and the positions after its documents' ends, [D] int64."""

    tokens: np.ndarray
    ends: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every token id."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


def chunks_of(texts: Iterable[str], tokenizer: Any) -> Iterator[list[Section]]:
    """Lists of sections, with about CHUNK_CHARACTERS in each list."""
    chunk: list[Section] = []
    size = 0
    for text in texts:
        for section in sections_of(text, tokenizer):
            chunk.append(section)
            size += len(section.text)
            if size >= CHUNK_CHARACTERS:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def sections_of(document: str, tokenizer: Any) -> Iterator[Section]:
    """Cut a document into sections of about SECTION_CHARACTERS; its tokens stay the same.

    A tokenizer that does not say where it always cuts gets the document as it is.
    """
    remaining = len(document)
    for text in cut_text(document, SECTION_CHARACTERS, getattr(tokenizer, "safe_cuts", None)):
        remaining -= len(text)
        yield Section(text, ends_document=remaining == 0)


def encode_chunk(tokenizer: Any, chunk: list[Section]) -> EncodedChunk:
    """Tokenise a chunk; <|endoftext|> follows each document that ends in it.

    A `ControlTokenReader` may find <|endoftext|> in the text too, which ends a document there.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    encoded: list[np.ndarray] = []
    for ids, section in zip(tokenizer.encode_batch([section.text for section in chunk]), chunk, strict=True):
        if section.ends_document and ids[-1:] != [tokenizer.endoftext_id]:
            ids.append(tokenizer.endoftext_id)
        encoded.append(np.array(ids, dtype=dtype))
    tokens = np.concatenate(encoded)
    return EncodedChunk(tokens, np.flatnonzero(tokens == tokenizer.endoftext_id).astype(np.int64) + 1)


def available_cores(num_tasks: int | None = None) -> int:
    """Processor cores for this process. A container or `taskset` may allow fewer than the machine has.

    The LOCAL_WORLD_SIZE processes that torchrun starts on a machine share its cores. If there are fewer tasks than
    processes, only as many processes as tasks share them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    sharers = int(text) if text.isdigit() else 1
    return max(1, cores // max(1, sharers if num_tasks is None else min(sharers, num_tasks)))


def chunked(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items; the last one may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


@contextlib.contextmanager
def process_map(
    function: Callable[..., Result], shared: Sequence[Any], num_processes: int
) -> Iterator[Callable[[Iterable[Any]], Iterator[Result]]]:
    """A `map` to use inside the block: it yields `function(*shared, item)` for each item, in the order of the items.

    It can be called several times and keeps its processes. At most two items per process are in memory.

    Args:
        function: defined at the top level of a module that does not import torch.
        shared: the first arguments, sent once to each process, for example the tokenizer.
        num_processes: how many; 1 is this process on one core, 0 is this process on all cores that it uses.
    """
    if num_processes <= 1 or not _can_spawn():
        with _one_core() if num_processes == 1 else contextlib.nullcontext():
            yield lambda items: (function(*shared, item) for item in items)
        return
    executor = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_set_shared,
        initargs=(function, tuple(shared)),
    )
    try:
        yield lambda items: ordered_map(executor, _call, items, ahead=2 * num_processes)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _can_spawn() -> bool:
    """Whether processes can be spawned. They import the main program again, so it must be a file or a module."""
    if multiprocessing.current_process().daemon:
        return False
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:
        return True
    path = getattr(main, "__file__", None)
    return path is not None and os.path.exists(path)


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Keep `tokenizers` from starting one thread per core, because other processes use the other cores."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


_shared: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
"""In a worker process: the function, and its first arguments."""


def _set_shared(function: Callable[..., Any], shared: tuple[Any, ...]) -> None:
    global _shared
    _shared = (function, shared)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process already


def _call(item: Any) -> Any:
    assert _shared is not None
    function, shared = _shared
    return function(*shared, item)
