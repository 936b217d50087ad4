"""A person's visit to the exported page, in a real browser without a network."""

from __future__ import annotations

import base64
import re

import pytest

from tests.command_line import tinylm
from tests.export.chatting_models import ANSWERS, QUESTIONS, write_models
from tests.model.small_models import trained_model
from tests.page.conftest import endless_model, write_page
from tinylm.checkpoint.loading import load_for_use
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.page.page import page
from tinylm.tokenizer.tokenizer import Tokenizer

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>{{model}}&amp;"


@pytest.fixture(scope="module")
def chat_tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join((*QUESTIONS, *ANSWERS)) * 3], 400)


@pytest.fixture(scope="module")
def models(chat_tokenizer, tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), chat_tokenizer)


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "größe.html"
    status, said = tinylm("export", "--model_path", models[0], "--output", path)
    assert status == 0 and "MB in int8" in said and "needs no network" in said
    return path


def ask(tab, question: str) -> None:
    tab.get_by_role("textbox", name="Your message").fill(question)
    tab.keyboard.press("Enter")


def wait_for_answer(tab) -> str:
    tab.locator(".assistant .text:not(:empty)").last.wait_for()
    tab.locator("button:text-is('Stop'):disabled").wait_for()
    return tab.locator(".assistant .text").last.inner_text()


def set_greedy(tab) -> None:
    tab.locator("#chat summary").click()
    tab.locator("#chat [name=temperature]").fill("0")


def test_it_chats_from_a_disk(exported, visit):
    """Ask, answer, a second question, edit, answer again, start over; greedy answers are the model's own."""
    tab = visit(exported)
    assert tab.title() == "full_sft_64_epoch0"
    assert re.search(r"[\d,]+ parameters, a context of 256 tokens", tab.locator("#facts").inner_text())
    set_greedy(tab)
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        tab.get_by_role("button", name="Start over").click()
        ask(tab, question)
        assert wait_for_answer(tab) == answer.strip()
    assert re.search(r"\d+ tokens/s", tab.get_by_role("status").first.inner_text())
    tab.get_by_role("button", name="Again").click()
    assert wait_for_answer(tab) == ANSWERS[-1]
    tab.get_by_role("button", name="Edit").click()
    assert tab.get_by_role("textbox", name="Your message").input_value() == QUESTIONS[-1]
    assert tab.locator(".messages li").count() == 0
    ask(tab, QUESTIONS[2])
    assert wait_for_answer(tab) == ANSWERS[2]
    assert tab.locator(".messages li").count() == 2


def test_an_answer_can_be_stopped(chat_tokenizer, visit, tmp_path):
    """What it said stays, and the page can be used."""
    tab = visit(write_page(tmp_path / "page.html", endless_model(chat_tokenizer), chat_tokenizer, isBase=True))
    set_greedy(tab)
    tab.locator("#chat [name=maxTokens]").fill("16000")
    ask(tab, "Größe")
    tab.locator(".assistant .text:not(:empty)").wait_for()
    tab.get_by_role("button", name="Stop").click()
    assert wait_for_answer(tab)
    assert tab.get_by_role("status").first.inner_text() == "stopped"
    said = tab.locator(".assistant .text").inner_text()
    tab.wait_for_timeout(200)
    assert tab.locator(".assistant .text").inner_text() == said


def test_the_glass_box_shows_what_is_computed(exported, models, visit):
    loaded = load_for_use(models[0])
    tab = visit(exported)
    tab.get_by_role("tab", name="Chat").press("ArrowRight")
    assert tab.get_by_role("tab", name="Glass box").get_attribute("aria-selected") == "true"
    tab.get_by_role("textbox", name="Text to read").fill("Größe? quiet")
    tab.get_by_role("button", name="Read it").click()
    ids = [0, *loaded.tokenizer.encode("Größe? quiet")]
    tokens = tab.locator(".token")
    tokens.nth(len(ids) - 1).wait_for()
    assert [int(each.locator("small").inner_text()) for each in tokens.all()] == ids
    last = tokens.last
    assert last.get_attribute("aria-pressed") == "true" and last.get_attribute("title").startswith("seen with")
    assert tab.locator(".heads canvas").count() == 8 and tab.locator("#glass table tr").count() == 3
    assert f"{len(ids)} tokens × 0.5 kB" in tab.locator("#glass").inner_text()
    tokens.nth(1).click()
    assert tokens.nth(2).get_attribute("title") == "comes later"
    assert tab.locator(".chosen").count() == 1, "the token that follows is marked"
    tab.get_by_role("button", name="layer 2, head 3").click()
    assert tab.get_by_role("button", name="layer 2, head 3").get_attribute("aria-pressed") == "true"
    tab.locator("#glass summary").click()
    tab.locator("#glass [name=topK]").fill("2")
    tab.locator("#glass [name=topP]").fill("1")
    tab.locator("#glass [name=topP]").blur()
    assert f"2 of {loaded.tokenizer.vocab_size} tokens are left" in tab.locator("#glass").inner_text()
    assert tab.locator(".bars .gone").first.get_attribute("title") == "removed by top-k"
    second = tab.locator(".bars button").nth(1)
    second.click()
    tab.locator("#glass [role=status]:text-is('3 tokens')").wait_for()


def test_all_text_is_text(chat_tokenizer, visit, tmp_path):
    """A model's name, a question and an answer that are HTML are shown letter by letter; no script runs."""
    model = trained_model(vocab_size=chat_tokenizer.vocab_size)
    tab = visit(write_page(tmp_path / "page.html", model, chat_tokenizer, name=HOSTILE))
    dialogs = []
    tab.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    assert tab.title() == HOSTILE and tab.locator("h1").inner_text() == HOSTILE
    ask(tab, HOSTILE)
    wait_for_answer(tab)
    assert tab.locator(".user .text").inner_text() == HOSTILE
    assert HOSTILE in tab.locator(".assistant").inner_text()
    assert tab.locator("img, .messages script").count() == 0 and dialogs == []


def test_what_does_not_fit_is_said(exported, visit):
    tab = visit(exported)
    ask(tab, "船 " * 400)
    tab.locator("#trouble:not([hidden])").wait_for()
    assert "shorten the message" in tab.locator("#trouble").inner_text()
    ask(tab, QUESTIONS[0])
    wait_for_answer(tab)
    assert tab.locator("#trouble").is_hidden()
    tab.get_by_role("tab", name="Glass box").click()
    tab.get_by_role("textbox", name="Text to read").fill("x " * 300)
    tab.get_by_role("button", name="Read it").click()
    assert re.search(r"the text has \d+ tokens.*shorten it", tab.locator("#trouble").inner_text())


def test_a_base_model_continues_text(models, visit, tmp_path):
    loaded = load_for_use(models[0])
    tab = visit(write_page(tmp_path / "page.html", loaded.model, loaded.tokenizer, isBase=True))
    assert "It is a base model: here it continues text." in tab.locator("#facts").inner_text()
    set_greedy(tab)
    ask(tab, ANSWERS[0][:5])
    engine = Engine(loaded.model, loaded.tokenizer, loaded.model.dtype, loaded.document_start)
    prompt = engine.text_prompt(ANSWERS[0][:5])
    expected = "".join(engine.stream_text(prompt, SamplingSettings(temperature=0, max_new_tokens=256)))
    assert wait_for_answer(tab) == expected


@pytest.mark.parametrize("size", [(1100, 800), (360, 740)])
def test_the_last_answer_can_be_seen(size, exported, visit):
    """However long the conversation is: it scrolls, and what is below it stays in its place."""
    tab = visit(exported, viewport={"width": size[0], "height": size[1]})
    set_greedy(tab)
    tab.locator("#chat summary").click()
    field = tab.get_by_role("textbox", name="Your message")
    before = field.bounding_box()
    for question in QUESTIONS * 2:
        ask(tab, question)
        wait_for_answer(tab)
    last = tab.locator(".messages li").last.bounding_box()
    assert field.bounding_box() == before and before["y"] + before["height"] <= size[1]
    assert 0 < last["y"] and last["y"] + last["height"] <= before["y"]
    log = tab.get_by_role("log", name="Conversation")
    assert log.get_attribute("aria-busy") == "false"


def test_a_long_chat_forgets_its_beginning(exported, visit):
    tab = visit(exported)
    tab.locator("#chat summary").click()
    tab.locator("#chat [name=maxTokens]").fill("10")
    for _ in range(12):
        ask(tab, "How is the sea? " * 2)
        wait_for_answer(tab)
    assert re.search(r"left out to fit the context: \d+ of the oldest", tab.get_by_role("status").first.inner_text())


@pytest.mark.parametrize("kind", ["cut", "no base64", "no header", "not numbers"])
def test_a_damaged_file_says_so(kind, chat_tokenizer, exported, browser, tmp_path):
    text = exported.read_text(encoding="utf-8")
    start = text.index('id="model">') + len('id="model">')
    end = text.index("</script>", start)
    data = bytearray(base64.b64decode(text[start:end]))
    if kind == "cut":
        data = data[: len(data) // 2]
    elif kind == "no header":
        data[10:30] = b"x" * 20
    elif kind == "not numbers":
        data[-4:] = b"\xff" * 4
    encoded = base64.b64encode(data).decode() if kind != "no base64" else "*" * 100
    path = tmp_path / "page.html"
    path.write_text(text[:start] + encoded + text[end:], encoding="utf-8")
    tab = browser.new_context(offline=True).new_page()
    tab.goto(path.as_uri())
    said = tab.locator("#trouble").inner_text()
    assert re.search("damaged|cut short|not a number", said) and "\n" not in said
    tab.context.close()


def test_it_fits_a_phone_in_the_dark(exported, visit):
    tab = visit(exported, viewport={"width": 360, "height": 700}, color_scheme="dark")
    ask(tab, QUESTIONS[3])
    wait_for_answer(tab)
    tab.get_by_role("tab", name="Glass box").click()
    tab.get_by_role("button", name="Read it").click()
    tab.locator(".bars").wait_for()
    for name in ("Chat", "Glass box"):
        tab.get_by_role("tab", name=name).click()
        assert tab.evaluate("() => document.documentElement.scrollWidth") <= 360
    dark = tab.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 150


def test_nothing_of_the_page_comes_from_elsewhere(exported):
    html = page("x", b"model")
    assert not re.search(r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}", re.sub(r"//.*", "", html))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "connect-src" not in policy
    assert page("x").count("; connect-src 'self'\">") == 1, "a server's page may ask that server, and no other"


def test_what_cannot_be_a_page_is_refused(models, tmp_path):
    model, _ = models
    for words, said in (
        (["--dtype", "q8_0"], "--dtype q8_0 is not for a page"),
        (["--license", "mit"], "--license mit is not for a page"),
        (["--format", "gguf"], "expected a file name such as model.gguf"),
    ):
        status, line = tinylm("export", "--model_path", model, "--output", tmp_path / "x.html", *words)
        assert status == 2 and said in line and line.count("\n") == 1
    assert not (tmp_path / "x.html").exists()
