"""A person's visit to the exported page, in a real browser without a network."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.command_line import tinylm
from tests.export.chatting_models import ANSWERS, OTHER_ANSWERS, QUESTIONS, write_models
from tests.model.small_models import trained_model
from tests.page.conftest import as_shown, endless_model, write_page
from tests.test_docs import our_commands
from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.snapshots import write_snapshot
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.page.page import Enclosed, page
from tinylm.tokenizer.tokenizer import Tokenizer

expect = pytest.importorskip("playwright.sync_api").expect
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
    assert status == 0 and "MB in int8" in said and "needs no network" in said and "snapshots" not in said
    return path


@pytest.fixture(scope="module")
def everything(models, chat_tokenizer, tmp_path_factory):
    """A page with a model and its adapter, two snapshots of the model's training, and questions to begin with."""
    folder = tmp_path_factory.mktemp("stages")
    for stage, made in zip(("full_sft", "lora"), models, strict=True):
        shutil.copytree(made, folder / stage / made.name)
    for step in (0, 30, 1200):
        torch.manual_seed(step)
        weights = dict(trained_model(vocab_size=chat_tokenizer.vocab_size).named_parameters())
        write_snapshot(folder / "full_sft" / "full_sft_64_snapshots", step, weights)
    (folder / "scoreboard.json").write_text(json.dumps({"prompts": [QUESTIONS[1], "", 3, "x" * 501, QUESTIONS[0]]}))
    path = folder / "größe.html"
    status, said = tinylm("export", folder, "--snapshots", 2, "--output", path)
    assert status == 0 and "lora_64_epoch0: " in said and "no snapshots" in said and "2 snapshots" in said
    assert "mail" not in said
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
    tab = visit(
        write_page(
            tmp_path / "page.html", endless_model(chat_tokenizer), chat_tokenizer, why_no_chats="it is a base model"
        )
    )
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
    tab = visit(write_page(tmp_path / "page.html", loaded.model, loaded.tokenizer, why_no_chats="it is a base model"))
    assert "It continues text: it is a base model." in tab.locator("#facts").inner_text()
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


def test_models_beside_each_other_from_a_disk(everything, visit):
    """As on a server: two models answer, and each has its own answers as history."""
    tab = visit(everything)
    assert tab.title() == "größe"
    tab.get_by_role("combobox", name="model", exact=True).first.select_option("full_sft_64_epoch0")
    tab.get_by_role("combobox", name="model beside it").select_option("lora_64_epoch0")
    set_greedy(tab)
    for place, (question, *answers) in enumerate(zip(QUESTIONS, ANSWERS, OTHER_ANSWERS, strict=True)):
        tab.get_by_role("button", name="Start over").click()
        ask(tab, question)
        wait_for_answer(tab)
        assert tab.locator(".assistant .text").all_inner_texts() == [answer.strip() for answer in answers], place


def test_the_keyboard_is_not_lost(everything, visit):
    """What had the focus may be gone when an answer begins or ends: then the message field has it."""
    tab = visit(everything)
    set_greedy(tab)
    tab.get_by_role("group", name="Questions to begin with").get_by_role("button").first.press("Enter")
    wait_for_answer(tab)
    focused = "() => document.activeElement.getAttribute('aria-label')"
    assert tab.evaluate(focused) == "Your message"
    tab.get_by_role("button", name="Again").press("Enter")
    wait_for_answer(tab)
    assert tab.evaluate(focused) == "Your message"
    tab.get_by_role("tab", name="Chat").press("End")
    assert tab.get_by_role("tab", name="Glass box").get_attribute("aria-selected") == "true"
    tab.get_by_role("tab", name="Glass box").press("Home")
    assert tab.get_by_role("tab", name="Chat").get_attribute("aria-selected") == "true"


def test_a_model_that_ends_at_once_is_named(everything, visit):
    tab = visit(everything)
    tab.evaluate("() => { LocalModel.prototype.continued = async function* () {}; }")
    ask(tab, "Größe?")
    tab.locator("#chat [role=status]:text('lora_64_epoch0 ended the answer at once')").wait_for()
    assert tab.locator(".messages li").count() == 1 and tab.get_by_role("button", name="Again").count() == 1


def test_one_model_in_both_columns(everything, chat_tokenizer, visit, tmp_path):
    """Each column has its own answers as history; the two answers share a cache, so they come one after the other."""
    tab = visit(everything)
    for name in ("model", "model beside it"):
        tab.get_by_role("combobox", name=name, exact=True).first.select_option("full_sft_64_epoch0")
    set_greedy(tab)
    ask(tab, QUESTIONS[1])
    wait_for_answer(tab)
    assert tab.locator(".assistant .text").all_inner_texts() == [ANSWERS[1].strip()] * 2
    said = "() => [0, 1].map((column) => window.parts.chat.history('full_sft_64_epoch0', column).at(-1).content)"
    tab.evaluate("() => { window.parts.chat.messages.at(-1).answers[1].content = 'anders'; }")
    assert tab.evaluate(said) == [ANSWERS[1].strip(), "anders"]

    model = trained_model(vocab_size=chat_tokenizer.vocab_size)
    tab = visit(write_page(tmp_path / "page.html", model, chat_tokenizer))
    tab.evaluate("() => { let now = 0; performance.now = () => (now += 40); }")  # each breathes after every token
    texts = """async () => {
      const { model } = window.parts, { signal } = new AbortController();
      model.tokenizer.stream = () => (id) => `${id} `;
      const ask = async (content) => {
        const settings = { ...DEFAULTS, temperature: 1, topP: 1, seed: 5, maxTokens: 30 }, found = [];
        for await (const id of model.answer([{ role: "user", content }], settings, signal, () => {})) found.push(id);
        return found.join("");
      };
      const alone = [await ask("Größe"), await ask("quiet ant")];
      return [alone, await Promise.all([ask("Größe"), ask("quiet ant")])];
    }"""
    alone, together = tab.evaluate(texts)
    assert alone == together and alone[0] and alone[0] != alone[1]


def test_a_question_to_begin_with(everything, visit):
    tab = visit(everything)
    set_greedy(tab)
    examples = tab.get_by_role("group", name="Questions to begin with").get_by_role("button")
    assert examples.all_inner_texts() == [QUESTIONS[1], QUESTIONS[0]]
    examples.nth(1).click()
    assert wait_for_answer(tab) == OTHER_ANSWERS[0].strip(), "the last stage is the one to talk with"
    assert tab.locator(".user .text").inner_text() == QUESTIONS[0] and examples.count() == 0
    tab.get_by_role("button", name="Start over").click()
    assert examples.count() == 2


def test_it_learns_from_a_disk(everything, models, chat_tokenizer, visit):
    """The slider goes through the snapshots inside the file; the last place is the finished model. Also on a slow
    machine."""
    tab = visit(everything, viewport={"width": 360, "height": 700})
    tab.context.new_cdp_session(tab).send("Emulation.setCPUThrottlingRate", {"rate": 6})
    tab.get_by_role("tab", name="Glass box").click()
    slider = tab.get_by_role("slider", name="Step of the training")
    assert slider.is_hidden(), "an adapter without snapshots"
    tab.get_by_role("combobox", name="Model", exact=True).last.select_option("full_sft_64_epoch0")
    kind, field = (
        tab.get_by_role("combobox", name="How the text is read"),
        tab.get_by_role("textbox", name="Text to read"),
    )
    assert (kind.input_value(), field.input_value()) == ("as a question in a chat", QUESTIONS[0]), "to begin with"
    kind.select_option("as a text")
    field.fill("Größe? quiet")
    tab.get_by_role("button", name="Read it").click()
    tab.locator(".bars").wait_for()
    ids = torch.tensor([[*chat_tokenizer.document_start, *chat_tokenizer.encode("Größe? quiet")]])
    for place, name, step in ((0, "after step 0", 0), (1, "after step 1,200", 1200), (2, "the finished model", None)):
        slider.fill(str(place))
        tab.locator(f"output:text-is('{name}')").wait_for()
        assert slider.get_attribute("aria-valuetext") == name
        one, other = slider.bounding_box(), tab.locator("output").bounding_box()
        assert one["x"] + one["width"] <= other["x"] or one["y"] + one["height"] <= other["y"], (
            "beside or above its name"
        )
        torch.manual_seed(step or 0)
        model = (
            trained_model(vocab_size=chat_tokenizer.vocab_size) if step is not None else load_for_use(models[0]).model
        )
        with torch.no_grad():
            likeliest = chat_tokenizer.decode([model(ids)[0, -1].argmax().item()])
        expect(tab.locator(".bars code").first).to_have_text(as_shown(likeliest))


@pytest.mark.parametrize("kind", ["cut", "no base64", "no header", "not numbers"])
def test_a_damaged_file_says_so(kind, chat_tokenizer, exported, browser, tmp_path):
    text = exported.read_text(encoding="utf-8")
    start = text.index('id="model-0-finished">') + len('id="model-0-finished">')
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
    html = page("x", [Enclosed({}, b"model", {})])
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
        (["--snapshots", 3], "no run has left snapshots; leave out --snapshots"),
        (["--snapshots", -1], "snapshots is -1; expected 0 (none) or more"),
    ):
        status, line = tinylm("export", "--model_path", model, "--output", tmp_path / "x.html", *words)
        assert status == 2 and said in line and line.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize("page", ["README.md", "docs/page.md"])
def test_the_commands_are_the_ones_in_the_docs(page, repository, everything, tmp_path, monkeypatch):
    """Each `tinylm export` of a page, as typed, leaves the file that it promises, with the models that it promises."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(everything.parent, "out/quickstart")
    shutil.copytree("out/quickstart/full_sft/full_sft_64_epoch0", "out/quickstart/dpo/dpo_64_epoch0")
    exports = [words for command, words in our_commands(repository / page) if command == "export"]
    commands = [words for words in exports if any("html" in word for word in words)]
    models = []
    for words in commands:
        for file in set(Path().rglob("*.html")):
            file.unlink()
        status, said = tinylm("export", *words)
        (written,) = set(Path().rglob("*.html"))
        assert status == 0 and f"written to {written}" in said
        cards = json.loads(re.search(r'id="cards">(.*?)</script>', written.read_text(encoding="utf-8"))[1])
        models.append((str(written), [card["id"][:4] for card in cards], sum(len(card["snapshots"]) for card in cards)))
    all_of_them = ["dpo_", "lora", "full"]
    expected = [("quickstart.html", all_of_them, 0), ("dpo.html", ["dpo_"], 0), ("out/learn.html", all_of_them, 3)]
    assert models == expected[: len(models)] and len(models) == {"README.md": 1, "docs/page.md": 3}[page]


def test_a_page_is_named_after_its_model(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, said = tinylm("export", models[0], "--format", "html")
    assert status == 0 and "written to full_sft_64_epoch0.html" in said
    assert "full_sft_64_epoch0</title>" in (tmp_path / "full_sft_64_epoch0.html").read_text(encoding="utf-8")
    both = f"eins={models[0]},größer={models[1]}"
    status, said = tinylm("export", both, "--format", "html")
    assert status == 0 and "größer: " in said and "written to models.html" in said
    status, said = tinylm("export", models[0])
    assert status == 2 and "neither output nor format is given" in said
    status, said = tinylm("export", models[0], "--format", "pth", "--snapshots", 1)
    assert status == 2 and "--snapshots is for --format html" in said
