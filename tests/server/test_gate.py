"""Who may use a server: by host, by origin, by key. A page in a browser must not reach a server on the same machine."""

from __future__ import annotations

import base64
import contextlib
from typing import Any

import pytest

from tests.server.serving import Server, running, settings_for
from tinylm.commands.serve import listening
from tinylm.server import gate
from tinylm.server.settings import ServeSettings

KEY = "geheim-Schluessel"
CHAT = {"messages": [{"role": "user", "content": "Größe?"}], "max_tokens": 2}


def basic(name: str, password: str) -> str:
    """How a browser sends what a person typed."""
    return f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"


def status(server: Server, path: str = "/v1/models", **headers: str) -> tuple[int, str | None]:
    """Status and error code of a GET with these headers; a name's `_` stands for `-`."""
    answer = server.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    return answer.status_code, answer.json().get("error", {}).get("code")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "192.168.1.7", "10.0.0.1:80"]
)
def test_known_hosts(server, host):
    assert status(server, host=host) == (200, None)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1", "größe",
     "localhost@evil.example", "evil.example/localhost", "2130706433", "0x7f.1"],
)  # fmt: skip
def test_other_hosts_are_refused(server, host):
    """DNS rebinding: a page's own name leads to this machine, and its scripts call that name."""
    answer = server.get("/v1/models", headers={"host": host.encode()})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "unknown_host"
    answer = server.post("/v1/chat/completions", CHAT, headers={"host": host.encode()})
    assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"


def test_hosts_that_were_allowed(model_folder):
    with running(settings_for(model_folder, allowed_hosts="Meine.Maschine, other")) as server:
        assert status(server, host="meine.maschine:8000")[0] == status(server, host="OTHER")[0] == 200
        assert status(server, host="evil.example") == (403, "unknown_host")
    with running(settings_for(model_folder, allowed_hosts="*")) as server:
        assert status(server, host="evil.example")[0] == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1", "file://"]
)
def test_pages_of_other_origins_are_refused(server, origin):
    """Without CORS a browser hides the answer from the page; but the request would have been computed."""
    assert status(server, origin=origin) == (403, "unknown_origin")
    answer = server.post("/v1/chat/completions", CHAT, headers={"origin": origin})
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    preflight = server.client.options(
        f"{server.url}/v1/chat/completions", headers={"origin": origin, "access-control-request-method": "POST"}
    )
    assert preflight.status_code in (403, 405) and "access-control-allow-origin" not in preflight.headers


def test_the_servers_own_pages_may_use_it(server):
    assert status(server, origin=server.url)[0] == 200


def test_cors(model_folder):
    origin = "http://localhost:3000"
    with running(settings_for(model_folder, cors_origins=f"{origin}/, https://a.example", api_key=KEY)) as server:
        ask = {"origin": origin, "access-control-request-method": "POST"}
        ask["access-control-request-headers"] = "authorization,content-type"
        preflight = server.client.options(f"{server.url}/v1/chat/completions", headers=ask)
        assert preflight.status_code == 200  # without a key, which browsers do not send here
        assert preflight.headers["access-control-allow-origin"] == origin
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        bearer = {"authorization": f"Bearer {KEY}"}
        answer = server.post("/v1/chat/completions", CHAT, headers={"origin": origin, **bearer})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
        refused = server.post("/v1/chat/completions", CHAT, headers={"origin": origin})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == origin
        assert status(server, origin="https://b.example", **bearer) == (403, "unknown_origin")
    with running(settings_for(model_folder, cors_origins="*")) as server:
        answer = server.get("/v1/models", headers={"origin": "https://any.example"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "*"


@pytest.fixture(scope="module")
def locked(model_folder):
    with running(settings_for(model_folder, api_key=KEY)) as found:
        yield found


def test_a_browser_may_send_the_key_as_a_password(locked):
    for name in ("", "x", "wer auch immer: ü"):
        is_right = ":" not in name  # the password begins behind the first colon
        expected = (200, None) if is_right else (401, "invalid_api_key")
        assert status(locked, authorization=basic(name, KEY)) == expected
    assert locked.get("/", headers={"authorization": basic("x", KEY)}).text.startswith("<!doctype html>")


ROUTES = [
    ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"),
    ("POST", "/v1/responses"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/metrics"), ("GET", "/docs"),
    ("GET", "/openapi.json"), ("GET", "/nothing"), ("DELETE", "/v1/models"), ("GET", "/health/"), ("GET", "//health"),
    ("GET", "/docs/oauth2-redirect"), ("HEAD", "/v1/models"), ("TRACE", "/v1/models"),
]  # fmt: skip
WRONG: list[dict[str, Any]] = [
    {}, {"authorization": "Bearer"}, {"authorization": f"Basic {KEY}"}, {"authorization": basic("x", f"{KEY}x")},
    {"authorization": basic(KEY, "")},
    {"authorization": f"Bearer {KEY}x"}, {"authorization": f"Bearer {KEY[:-1]}"}, {"authorization": KEY},
    {"authorization": "Bearer größe".encode()}, {"authorization": "Bearer größe".encode("latin-1")},
    {"authorization": f"Bearer  {KEY}"}, {"x-api-key": KEY},
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_the_key(locked, method, path):
    for headers in WRONG:
        answer = locked.client.request(method, locked.url + path, headers=headers)
        assert answer.status_code == 401, headers
        assert answer.headers["www-authenticate"].endswith(", Bearer")
        if method != "HEAD":
            error = answer.json()["error"]
            assert error["code"] == "invalid_api_key" and KEY not in answer.text
    answer = locked.client.request(method, locked.url + path, headers={"authorization": f"Bearer {KEY}"})
    assert answer.status_code != 401


def test_health_needs_no_key(locked):
    assert locked.get("/health").json() == {"status": "ok"}
    assert locked.client.options(f"{locked.url}/v1/models").status_code == 405  # and tells nothing


def test_the_scheme_is_case_insensitive(locked):
    assert locked.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200


def test_keys_are_compared_in_constant_time(locked, monkeypatch):
    compared = []
    original = gate.secrets.compare_digest
    monkeypatch.setattr(gate.secrets, "compare_digest", lambda a, b: compared.append((a, b)) or original(a, b))
    assert locked.get("/v1/models", headers={"authorization": "Bearer falsch"}).status_code == 401
    assert compared == [(b"falsch", KEY.encode())]


def test_the_key_may_be_in_the_environment(model_folder, monkeypatch):
    monkeypatch.setenv("TINYLM_API_KEY", "aus-der-Umgebung")
    with running(settings_for(model_folder)) as server:
        assert status(server) == (401, "invalid_api_key")
        assert status(server, authorization="Bearer aus-der-Umgebung") == (200, None)
    assert ServeSettings(model_path="m", api_key="flag").key == "flag"


@pytest.mark.parametrize("key", ["größe", "zwei Wörter", "a\nb", "🐉"])
def test_keys_that_no_header_can_carry_are_refused(key, monkeypatch):
    with pytest.raises(ValueError, match="API key") as found:
        ServeSettings(model_path="m", api_key=key)
    assert key not in str(found.value)
    monkeypatch.setenv("TINYLM_API_KEY", key)
    with pytest.raises(ValueError, match="API key"):
        ServeSettings(model_path="m")


def test_it_listens_to_this_machine_alone_unless_told():
    settings = ServeSettings(model_path="m", port=0)
    assert settings.is_local
    with contextlib.closing(listening(settings)) as at:
        assert at.getsockname()[0] == "127.0.0.1"
    assert not ServeSettings(model_path="m", host="0.0.0.0").is_local


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", -1), ("port", 65536), ("max_body_bytes", 0), ("max_answers", 0), ("max_stops", 0), ("max_messages", -3),
     ("max_connections", 0), ("receive_timeout", 0.0), ("request_timeout", float("nan")), ("drain_timeout", -1.0),
     ("request_timeout", float("inf"))],
)  # fmt: skip
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        ServeSettings(model_path="m", **{name: value})
