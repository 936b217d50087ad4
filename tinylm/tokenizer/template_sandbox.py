"""Chat templates of other makers, rendered safely: see `template_worker`, the process that does it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinylm.files.untrusted import shown

_WALL_SECONDS = 120.0
"""When a worker has not answered by then, it hangs. Its computing time has a much lower limit."""

_workers: dict[int, subprocess.Popen[bytes]] = {}
"""The worker of this process, by its id: a fork must not talk to its parent's."""
_asking = threading.Lock()
"""One at a time: of two threads, one could read the other's answer."""


def render_all(
    template: str, requests: Sequence[Mapping[str, Any]], marks: tuple[str, str] = ("", "")
) -> list[tuple[str | None, str]]:
    """(text, "") or (None, why not) for each of `requests`, the variables that the template sees.

    Args:
        marks: what to write before and after a `{% generation %}` block.

    Raises:
        ValueError: the template took too much time or memory.
    """
    lines = [{"template": template, "values": dict(values), "marks": marks} for values in requests]
    with _asking:
        answer = _ask(json.dumps(lines).encode("ascii") + b"\n")
    if not answer:
        raise ValueError("the chat template takes too much time or memory; expected one that renders a chat at once")
    replies = json.loads(answer)
    return [(reply.get("text"), shown(" ".join(reply.get("error", "").split()), 200)) for reply in replies]


def _ask(request: bytes) -> bytes:
    """One line to the worker, one line back; empty if the worker has died of it."""
    worker = _workers.get(os.getpid())
    if worker is None or worker.poll() is not None:
        worker = _workers[os.getpid()] = _start()
    assert worker.stdin is not None and worker.stdout is not None
    guard = threading.Timer(_WALL_SECONDS, worker.kill)
    guard.daemon = True
    guard.start()
    try:
        worker.stdin.write(request)
        worker.stdin.flush()
        answer = worker.stdout.readline()
    except BrokenPipeError:
        answer = b""
    finally:
        guard.cancel()
    if not answer.endswith(b"\n"):
        _stop(worker)
        return b""
    return answer


def _start() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "tinylm.tokenizer.template_worker"]
    worker = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )
    atexit.register(_stop, worker)
    return worker


def _stop(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]
    with contextlib.suppress(OSError):
        worker.wait()
