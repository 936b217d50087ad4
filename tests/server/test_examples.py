"""The examples of README and docs/serving.md, as they are typed, against a server."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import make_model
from tests.server.serving import running, settings_for
from tests.test_docs import ROOT, blocks
from tinylm.generation.sampling import SamplingSettings

NAME = "dpo_256_epoch0"
GREEDY = SamplingSettings(temperature=0, max_new_tokens=300)


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    with running(settings_for(make_model(tmp_path_factory.mktemp("models") / NAME, tokenizer))) as found:
        yield found


def answer_of(server, question: str) -> str:
    return server.engine.reply([{"role": "user", "content": question}], GREEDY)


def run_python(server, page: Path) -> tuple[str, dict[str, Any]]:
    """(what was printed, the names that are left) of the blocks that talk to the server, one after the other."""
    codes = [code for code in blocks(page, "python") if "client" in code]
    assert codes
    heard, names = io.StringIO(), dict[str, Any]()
    with contextlib.redirect_stdout(heard):
        for code in codes:
            exec(compile(code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}"), page.name, "exec"), names)
    return heard.getvalue(), names


def test_the_readmes_client(server):
    pytest.importorskip("openai")
    printed, names = run_python(server, ROOT / "README.md")
    assert printed and names["question"][0]["content"] == "Who are you?"
    assert names["chunk"].choices[0].finish_reason in ("stop", "length") and names["chunk"].model == NAME


def test_the_readmes_curl(server):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (block,) = [code for code in blocks(ROOT / "README.md", "sh") if code.startswith("curl")]
    words = shlex.split(block.replace("\\\n", " ").replace("127.0.0.1:8000", f"127.0.0.1:{server.port}"))
    done = subprocess.run([*words, "--silent"], capture_output=True, text=True, timeout=60)
    reply = json.loads(done.stdout)
    assert reply["choices"][0]["message"]["content"] == answer_of(server, "What is the opposite of big?")


def test_the_pages_clients(server):
    """Greedy answers are the model's own; the person has the fields that the schema wants; the choice is one of two."""
    pytest.importorskip("openai")
    printed, names = run_python(server, ROOT / "docs" / "serving.md")
    expected = answer_of(server, "Who are you?")
    assert printed.startswith(expected)
    assert names["response"].output_text == expected and re.search(r" \d+\n", printed)
    assert set(names["person"]) == {"name", "is_friendly"} and isinstance(names["person"]["is_friendly"], bool)
    assert len(names["person"]["name"]) <= 30
    assert names["answer"].choices[0].text in ("small", "red")
