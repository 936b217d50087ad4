"""What a page meets that it cannot use: one sentence, nothing is executed, and the page can still be used."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.model.small_models import trained_model
from tests.page.conftest import endless_model, write_page
from tests.page.test_visit import ask, chat_tokenizer, set_greedy, wait_for_answer
from tests.server.serving import running, settings_for
from tinylm.checkpoint.model_folder import save_model
from tinylm.page import page as module
from tinylm.page.page import SCRIPTS, page
from tinylm.tokenizer.tokenizer import Tokenizer

__all__ = ["chat_tokenizer"]
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "javascript:alert(2)",
    "${alert(3)}{{model}}",
    "\u202etxet live",
    "Größe" * 80,
)
BROWSERS = "use Chrome or Edge 93, Firefox 92, Safari 15.4, or a newer one."


@pytest.fixture(scope="module")
def model(chat_tokenizer):
    return trained_model(vocab_size=chat_tokenizer.vocab_size, qk_norm=True, qkv_bias=True)


@pytest.fixture(scope="module")
def path(model, chat_tokenizer, tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("pages") / "größe.html", model, chat_tokenizer, "int8")


def trouble_of(tab) -> str:
    tab.locator("#trouble:not([hidden])").wait_for()
    said = tab.locator("#trouble").inner_text()
    assert said and "\n" not in said
    return said


# Texts


PIECES = [
    "a" * 40_000,
    "船" * 9_000,
    "אבגד" * 5_000,
    "🦜👩‍👧" * 3_000,
    " " * 30_000,
    "\n" * 30_000,
    "x" + " " * 30_000 + "x",
]


def test_long_pieces_are_encoded_at_once(chat_tokenizer, path, visit):
    numbers = random.Random(5)
    letters = "".join(numbers.choice("abeghinorstuwöß") for _ in range(30_000))
    texts = [*PIECES, letters]
    tab = visit(path)
    script = """texts => texts.map(text => {
      const begun = performance.now(), { tokenizer } = window.parts.model;
      const ids = tokenizer.chat([{ role: "user", content: text }]);
      return [performance.now() - begun, ids.length - tokenizer.chat([{ role: "user", content: "" }]).length,
        tokenizer.encode(text)];
    })"""
    for text, (milliseconds, in_chat, ids) in zip(texts, tab.evaluate(script, texts), strict=True):
        assert ids == chat_tokenizer.encode(text)
        assert in_chat == len(chat_tokenizer.encode(text.strip())) and milliseconds < 1000


def test_merges_of_another_order(visit, tmp_path):
    """A merge may come before the one that makes its parts, and equal pairs overlap: the leftmost is joined."""
    tokenizer = Tokenizer.train(["aaa aaaa abab größer größe " * 5], 300, digits="grouped")
    tab = visit(write_page(tmp_path / "page.html", trained_model(vocab_size=tokenizer.vocab_size), tokenizer))
    numbers = random.Random(6)
    texts = ["".join(numbers.choices("abgröße ", k=numbers.randrange(90))) for _ in range(200)]
    found = tab.evaluate("texts => texts.map(text => window.parts.model.tokenizer.encode(text))", texts)
    assert found == tokenizer.encode_batch(texts)


COPY = """unit => document.addEventListener("copy", event => {
  event.clipboardData.setData("text/plain", unit.repeat(1e7 / unit.length));
  event.preventDefault();
}, { once: true })"""


@pytest.mark.parametrize("place", ["Your message", "Text to read"])
def test_pasted_megabytes_are_refused(place, path, visit):
    """A browser would need minutes to lay some of them out."""
    tab = visit(path)
    if place == "Text to read":
        tab.get_by_role("tab", name="Glass box").click()
    field = tab.get_by_role("textbox", name=place)
    field.fill("Größe?")
    for unit in ("the quick fox ", "a", "👨‍👩‍👧", "שלום مرحبا ", "\u202e", "\n"):
        tab.evaluate(COPY, unit)
        field.press("Control+c")
        begun = time.monotonic()
        field.press("Control+v")
        assert re.search(r"this text has [\d,]{9,10} characters; at most [\d,]+ fit: shorten it", trouble_of(tab))
        assert field.input_value() == "Größe?" and time.monotonic() - begun < 2
        tab.evaluate("() => trouble('')")
    if place == "Your message":
        tab.keyboard.press("Enter")
        assert wait_for_answer(tab)
    else:
        tab.get_by_role("button", name="Read it").click()
        tab.locator(".token").nth(2).wait_for()
    assert tab.locator("#trouble").is_hidden()


def test_a_text_that_is_there_already(path, visit):
    """Nobody pasted it, so the field could not refuse it: it is not sent, and stays to be shortened."""
    tab = visit(path)
    tab.evaluate("() => { parts.chat.input.value = 'ö'.repeat(90000); parts.glass.input.value = 'ö'.repeat(90000); }")
    tab.get_by_role("textbox", name="Your message").press("Enter")
    assert "has 90,000 characters" in trouble_of(tab) and tab.locator(".messages li").count() == 0
    tab.get_by_role("textbox", name="Your message").fill("ö")
    tab.get_by_role("tab", name="Glass box").click()
    tab.get_by_role("button", name="Read it").click()
    tab.locator("#trouble:has-text('90,000')").wait_for()


# A slow machine


def test_a_slow_machine_reacts(chat_tokenizer, visit, tmp_path):
    """It says how far it has read, stops at once, and keeps what is typed meanwhile."""
    model = endless_model(chat_tokenizer)
    tab = visit(write_page(tmp_path / "page.html", model, chat_tokenizer, why_no_chats="it is a base model"))
    tab.context.new_cdp_session(tab).send("Emulation.setCPUThrottlingRate", {"rate": 8})
    set_greedy(tab)
    tab.locator("#chat [name=maxTokens]").fill("9000")
    ask(tab, "quiet ant " * 600)
    status = tab.get_by_role("status").first
    tab.locator("#chat [role=status]:has-text('reading')").wait_for()
    assert re.fullmatch(r"reading: \d+ of \d+ tokens", status.inner_text())
    field = tab.get_by_role("textbox", name="Your message")
    field.type("Größe")
    stop(tab)
    assert tab.locator(".assistant").count() == 0 and field.input_value() == "Größe"
    assert "reading" not in status.inner_text()
    tab.get_by_role("button", name="Start over").click()
    field.press("Enter")
    tab.locator(".assistant .text:not(:empty)").wait_for()
    stop(tab)
    assert tab.locator(".assistant .text").inner_text() and tab.locator("#trouble").is_hidden()


def stop(tab) -> None:
    """Presses Stop; within a second of the page's own time the page can be used."""
    script = """async () => {
      const { stop } = window.parts.chat, begun = performance.now();
      stop.click();
      while (!stop.disabled) await new Promise(resolve => setTimeout(resolve));
      return performance.now() - begun;
    }"""
    assert tab.evaluate(script) < 1000


# A browser, or a file, that is not whole


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens a page of this HTML, whose console may say what it likes; first runs a script in it."""
    context = browser.new_context(offline=True)
    context.set_default_timeout(20_000)

    def open_html(html: str, script: str = "") -> Any:
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        tab = context.new_page()
        if script:
            tab.add_init_script(script)
        tab.goto((tmp_path / "page.html").as_uri())
        return tab

    yield open_html
    context.close()


def test_a_script_that_the_browser_cannot_read(path, opened):
    html = path.read_text(encoding="utf-8")
    script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)[-1]
    for broken in (f"{script}; let of old = #x;", f"throw new Error('größe'); {script}"):
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, broken)]
        tab = opened(html.replace(script, broken).replace(*hashes))
        assert trouble_of(tab) == f"This browser is too old for this page: {BROWSERS}"


def test_a_feature_that_is_missing(path, opened):
    html = path.read_text(encoding="utf-8")
    for name in (
        "TextDecoder",
        "TextEncoder",
        "ReadableStream",
        "AbortController",
        "crypto.getRandomValues",
        "Promise.allSettled",
        "Object.fromEntries",
        "Object.hasOwn",
        "Array.prototype.at",
        "String.prototype.replaceAll",
        "Element.prototype.replaceChildren",
    ):
        holder, _, feature = f"window.{name}".rpartition(".")
        script = f"Object.defineProperty({holder}, '{feature}', {{ value: undefined }})"
        tab = opened(html, script)
        assert trouble_of(tab) == f"This browser is too old for this page (it has no {name}): {BROWSERS}"
    script = r"const old = RegExp; RegExp = function (pattern, flags) {"
    script += r" if (`${pattern}`.includes('\\p')) throw new SyntaxError('größe'); return new old(pattern, flags); }"
    tab = opened(html, script)
    assert r"(it has no \p in regular expressions)" in trouble_of(tab)


def test_no_script_needs_a_newer_browser():
    """What Chrome 93, Firefox 92 or Safari 15.4 lack, of what one might use; guard.js itself is for any browser."""
    newer = (
        r"structuredClone|findLast|\bto(Sorted|Reversed|Spliced)\b|Segmenter|groupBy|withResolvers|fromBase64|\.with\("
    )
    newer += r"|\bstatic \{|AbortSignal\.|/v[;,.)]|\(\?<[=!]|TextDecoderStream|light-dark|color-mix|@container"
    for name in (*SCRIPTS, "page.css"):
        found = re.search(newer, (Path(module.__file__).parent / name).read_text(encoding="utf-8"))
        assert found is None, f"{name} uses {found[0]}"
    guard = (Path(module.__file__).parent / "guard.js").read_text(encoding="utf-8")
    assert not re.search(r"=>|`|\b(let|const|class|async)\b|\?\.|\?\?", guard)


@pytest.mark.parametrize("cards", ["[", "{}", "[null]", '[{"id": "x"}]', '[{"id": 5, "parameters": "<b>"}]'])
def test_cards_that_are_damaged(cards, path, opened):
    html = path.read_text(encoding="utf-8")
    tab = opened(re.sub(r'(id="cards">).*?(</script>)', lambda found: found[1] + cards + found[2], html))
    assert trouble_of(tab) == "this page is cut short or damaged; make it again"


def test_a_file_that_is_cut_short(path, opened):
    html = path.read_text(encoding="utf-8")
    begins = ("<style>", "</style>", '<p id="trouble"', 'id="model-0-finished">', "</script>\n<script>")
    marks = [html.index(begin) for begin in begins]
    script, end = html.rindex("<script>"), html.index('<p id="end"')
    inside = (marks[3] + marks[4]) // 2
    places = [marks[0] + 300, marks[1] + 3, marks[2] + 8, marks[3] + 50, inside, marks[4] - 3, marks[4] + 12]
    for place in (*places, script + 40, (script + end) // 2, end - 3):
        tab = opened(html[:place])
        assert trouble_of(tab) == "This file is cut short: fetch it again, or make it again with tinylm export."
    tab = opened(html[: end + 15])
    ask(tab, "Größe?")
    assert wait_for_answer(tab)


def test_a_page_that_was_saved(path, opened, visit, tmp_path):
    """A browser saves what the page has become, with its elements: opened again, it begins from the start."""
    tab = opened(path.read_text(encoding="utf-8"))
    ask(tab, "Größe?")
    wait_for_answer(tab)
    tab.get_by_role("tab", name="Glass box").click()
    (tmp_path / "saved.html").write_text(tab.content(), encoding="utf-8")
    tab = visit(tmp_path / "saved.html")
    assert tab.get_by_role("textbox", name="Text to read").count() == 1 and tab.locator(".messages li").count() == 0
    tab.get_by_role("tab", name="Chat").click()
    ask(tab, "Größe?")
    assert wait_for_answer(tab)
    (tmp_path / "server.html").write_text(page("größe"), encoding="utf-8")
    assert "this file holds no model; make one that does with tinylm export" in trouble_of(
        visit(tmp_path / "server.html")
    )


# Text that is HTML, code, turned around, or very long


def fits_a_phone(tab) -> bool:
    return tab.evaluate("() => document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("text", HOSTILE)
def test_a_model_and_a_prompt_that_are_hostile(text, model, chat_tokenizer, visit, tmp_path):
    path = write_page(tmp_path / "page.html", model, chat_tokenizer, "int8", name=text, why_no_chats=text)
    tab = visit(path, viewport={"width": 360, "height": 700})
    ask(tab, text)
    wait_for_answer(tab)
    assert tab.title() == tab.locator("h1").inner_text() == text
    assert tab.locator(".user .text").inner_text() == text and tab.locator(".assistant strong").inner_text() == text
    assert fits_a_phone(tab)
    tab.get_by_role("tab", name="Glass box").click()
    tab.get_by_role("textbox", name="Text to read").fill(text[:80])
    tab.get_by_role("button", name="Read it").click()
    tab.locator(".token").last.wait_for()
    assert fits_a_phone(tab) and tab.locator("img").count() == 0


class Elsewhere:
    """A server that says whatever the test wants: answers by path, and the status of a chat."""

    def __init__(self, browser: Any, answers: dict[str, Any], status: int = 200, **options: Any) -> None:
        self.answers, self.status = answers, status
        self.context = browser.new_context(viewport={"width": 360, "height": 700}, **options)
        self.context.set_default_timeout(20_000)
        self.tab = self.context.new_page()
        self.said: list[str] = []
        self.tab.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.route("**/*", self.answer)
        self.tab.goto("http://tiny.test/")

    def answer(self, route: Any) -> None:
        name = unquote(urlsplit(route.request.url).path.strip("/"))
        found = page("tinylm") if name == "" else self.answers.get(name, {})
        status = self.status if name.startswith("v1/chat") else 200
        body = found if isinstance(found, str) else json.dumps(found)
        route.fulfill(status=status, body=body, content_type="text/html" if name == "" else "application/json")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_server_that_is_hostile(text, browser):
    card = {"id": text, "parameters": 12, "chats": True, "max_model_len": 256, "snapshots": []}
    card |= {"why_no_chats": "", "prompts": [text]}
    run = {"name": text, "stage": text, "settings": {text: text}, "parent": None, "note": text, "changed": 1.0}
    run |= {"step": 2, "seconds_ago": 3.0, "num_steps": text, "is_finished": False, "validation_loss": text}
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "sample_0": text}]
    answers = {
        "v1/models": {"data": [card, {**card, "id": "größe"}]},
        "tokenize": {"count": 3},
        "v1/chat/completions": {"error": {"message": text}},
        "page/runs": {"runs": [run], "left_out": 0},
        f"page/runs/{text}": {"rows": rows, "not_numbers": {text: 2}, "notes": [text]},
    }
    there = Elsewhere(browser, answers, status=400)
    tab = there.tab
    ask(tab, "Größe?")
    assert trouble_of(tab) == text.replace("\u202e", "\ufffd")
    assert fits_a_phone(tab)
    events = [{"choices": [{"delta": {"content": part}}]} for part in (text[:5], text[5:])]
    answers["v1/chat/completions"] = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    there.status = 200
    ask(tab, text)
    assert wait_for_answer(tab) == text and fits_a_phone(tab)
    tab.get_by_role("tab", name="Runs").click()
    tab.locator("#runs td", has_text=text).first.wait_for()
    assert tab.locator("img").count() == 0 and there.said == []
    there.context.close()


def test_a_body_that_the_server_refuses(model, chat_tokenizer, browser, tmp_path):
    """The server reads no more of it: a browser may learn nothing but that the connection broke."""
    facts = {"stage": "full_sft", "tokenizer_fingerprint": chat_tokenizer.fingerprint, "document_start": True}
    save_model(tmp_path / "full_sft_64_epoch0", model, chat_tokenizer, {**facts, "parent": None, "seed": 3})
    with running(settings_for(tmp_path / "full_sft_64_epoch0", max_body_bytes=30_000)) as server:
        tab = browser.new_page()
        tab.set_default_timeout(20_000)
        tab.goto(server.url)
        tab.locator("#facts:not(:empty)").wait_for()
        for text in ("ö" * 150_000, "שלום 😀 " * 3_000):
            ask(tab, text)
            assert "shorten the message" in trouble_of(tab)
            field = tab.get_by_role("textbox", name="Your message")
            assert field.input_value() == text and tab.locator(".messages li").count() == (2 if "😀" in text else 0)
            tab.evaluate(COPY, "אa")
            field.press("Control+c")
            field.press("Control+v")
            assert re.search(r"this text has [\d,]{9,10} characters; at most 200,000 fit", trouble_of(tab))
            ask(tab, "Größe?")
            assert wait_for_answer(tab)
        tab.close()
