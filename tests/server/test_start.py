"""How a server starts, or says in one line why it does not."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.command_line import tinylm
from tests.server.conftest import LINEAGE, make_model
from tests.server.serving import Server, running, settings_for
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.server.served_models import ServedModels

CHAT = {"messages": [{"role": "user", "content": "Größe?"}], "max_tokens": 2}


def test_damaged_weights_are_found_at_the_start(tmp_path, tokenizer, model_folder):
    model = load_model(model_folder)[0]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = math.nan
    save_model(tmp_path / "m", model, tokenizer, LINEAGE)
    with pytest.raises(ValueError, match="^m: .*damaged"), running(settings_for(tmp_path / "m")):
        pass


def assert_one_line(result: tuple[int, str], words: str) -> None:
    status, said = result
    assert status == 2 and "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if "error:" in line]
    assert words in " ".join(said.split())


def test_a_port_in_use_is_one_line(server, model_folder):
    assert_one_line(tinylm("serve", model_folder, "--port", server.port), "choose another --port")
    assert_one_line(tinylm("serve", model_folder, "--host", "no.such.host.invalid"), "no.such.host.invalid")
    assert_one_line(tinylm("serve", model_folder, "--host", "192.0.2.1", "--port", "0"), "192.0.2.1")


def test_a_model_that_nothing_fits_is_one_line(model_folder):
    assert_one_line(tinylm("serve", model_folder, "--port", "0", "--cache_bytes", "100"), "cache_bytes")


HOSTILE = {
    "code": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "files": "{% include '/etc/passwd' %}",
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{{ a }}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "refusal": "{{ raise_exception('böse\nZeile') }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_tries_to_run_code(tmp_path, tokenizer, name):
    """It is tried once, at the start: an endless one would take seconds of every request."""
    folder = make_model(tmp_path / "m", tokenizer)
    (folder / "chat_template.jinja").write_text(HOSTILE[name], encoding="utf-8")
    with running(settings_for(folder)) as server:
        assert any("chats are refused" in line and "\n" not in line for line in server.said)
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/responses", {"input": "Größe?"}), ("/tokenize", CHAT)):
            body = {key: value for key, value in body.items() if path != "/tokenize" or key == "messages"}
            begun = time.perf_counter()
            answer = server.post(path, body)
            assert time.perf_counter() - begun < 0.5
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "no_chat_template"
        assert server.post("/v1/completions", {"prompt": "Größe", "max_tokens": 2}).status_code == 200


def test_a_template_of_another_maker(tmp_path, tokenizer):
    folder = make_model(tmp_path / "m", tokenizer)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with running(settings_for(folder)) as server:
        contents = [f"Größe {number}" for number in range(12)]
        with ThreadPoolExecutor(6) as pool:  # one process renders for all: nobody gets another's prompt
            answers = list(pool.map(lambda text: tokens_of(server, text), contents))
        for content, ids in zip(contents, answers, strict=True):
            assert tokenizer.decode(ids) == f"[user] {content}\n[assistant]"


def tokens_of(server: Server, content: str) -> list[int]:
    return server.post("/tokenize", {"messages": [{"role": "user", "content": content}]}).json()["tokens"]


def test_what_cannot_be_kept_is_refused(model_folder):
    """A cache larger than the memory, a context longer than the only model's, an origin that no browser sends."""
    for changes, said in (
        ({"cache_bytes": 10**15}, "cache_bytes is 1,000,000,000,000,000; the device has"),
        ({"context_length": 257}, "context_length is 257; the model has 256 positions"),
        ({"cors_origins": "localhost:3000"}, "cors_origins has localhost:3000; expected \\* or an origin"),
        ({"cors_origins": "https://a.example/path"}, "cors_origins has https://a.example/path"),
    ):
        with pytest.raises(ValueError, match=said):
            ServedModels(settings_for(model_folder, **changes))
