"""The page that the server shows: the same page, with models that the server computes."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from dataclasses import replace

import pytest
import torch

from tests.export.chatting_models import ANSWERS, OTHER_ANSWERS, QUESTIONS, write_models
from tests.model.small_models import trained_model
from tests.page.conftest import as_shown, endless_model
from tests.page.test_visit import ask, chat_tokenizer, set_greedy, wait_for_answer
from tests.server.serving import running, settings_for
from tinylm.checkpoint.model_folder import save_model
from tinylm.checkpoint.snapshots import write_snapshot
from tinylm.commands.find_model import one_of_each_stage
from tinylm.commands.serve import with_models
from tinylm.server import served_models
from tinylm.server.settings import ServeSettings

playwright = pytest.importorskip("playwright.sync_api")
PlaywrightError, expect = playwright.Error, playwright.expect
__all__ = ["chat_tokenizer"]
KEY = "schluessel"


@pytest.fixture(scope="module")
def folder(chat_tokenizer, tmp_path_factory):
    """A folder with a folder for each stage, as the quickstart leaves it; greedy answers of `pretrain` never end."""
    folder = tmp_path_factory.mktemp("stages")
    model, adapter = write_models(folder / "made", chat_tokenizer)
    for stage, made in (("full_sft", model), ("lora", adapter)):
        (folder / stage).mkdir()
        made.rename(folder / stage / made.name)
    base = endless_model(chat_tokenizer)
    facts = {"stage": "pretrain", "tokenizer_fingerprint": chat_tokenizer.fingerprint, "document_start": True}
    save_model(folder / "pretrain" / "pretrain_64_epoch0", base, chat_tokenizer, facts)
    for step, seed in ((0, 7), (1200, 8)):
        write_snapshot(folder / "full_sft" / "full_sft_64_snapshots", step, early_weights(chat_tokenizer, seed))
    return folder


def early_weights(tokenizer, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(trained_model(vocab_size=tokenizer.vocab_size).named_parameters())


@pytest.fixture(scope="module")
def settings(folder) -> ServeSettings:
    return with_models(settings_for(folder, cache_bytes=256 * 2**20))


@pytest.fixture(scope="module")
def server(settings):
    with running(settings) as found:
        yield found


@pytest.fixture
def tab(open_page, server):
    tab = open_page(server.url)
    tab.locator("#facts:not(:empty)").wait_for()
    return tab


def choose(tab, name: str, second: str = "none") -> None:
    tab.get_by_role("combobox", name="model", exact=True).select_option(name)
    tab.get_by_role("combobox", name="model beside it").select_option(second)


def test_a_folder_of_stages_is_all_of_them(settings, folder):
    assert [part.partition("=")[0] for part in settings.model_path.split(",")] == [
        "full_sft_64_epoch0",
        "pretrain_64_epoch0",
    ]
    assert settings.adapter == f"lora_64_epoch0={folder / 'lora' / 'lora_64_epoch0'}"
    assert one_of_each_stage(folder.parent) == [], "those of several families would stand beside each other"
    one = with_models(settings_for(folder / "full_sft"))
    assert (one.model_path, one.adapter) == (str(folder / "full_sft" / "full_sft_64_epoch0"), "")


def test_the_adapter_finds_its_model(server):
    cards = {card["id"]: card for card in server.get("/v1/models").json()["data"]}
    assert cards["lora_64_epoch0"]["parent"] == "full_sft_64_epoch0"
    assert [card["chats"] for card in cards.values()] == [True, False, True]


def test_two_models_answer_beside_each_other(tab):
    """The same questions in two columns; each model has its own answers as history."""
    choose(tab, "full_sft_64_epoch0", "lora_64_epoch0")
    set_greedy(tab)
    for question, one, other in zip(QUESTIONS, ANSWERS, OTHER_ANSWERS, strict=True):
        tab.get_by_role("button", name="Start over").click()
        ask(tab, question)
        wait_for_answer(tab)
        texts = tab.locator(".assistant .text").all_inner_texts()
        assert [text.strip() for text in texts] == [one.strip(), other.strip()]
        assert tab.locator(".assistant strong").all_inner_texts() == ["full_sft_64_epoch0", "lora_64_epoch0"]


def test_a_base_model_continues(tab):
    choose(tab, "pretrain_64_epoch0")
    assert "base model" in tab.locator("#facts").inner_text()
    set_greedy(tab)  # a drawn token may end the answer at once
    tab.locator("#chat [name=maxTokens]").fill("5")
    ask(tab, "Größe")
    assert wait_for_answer(tab)


def test_the_glass_box_fetches_the_model(tab, server):
    tab.get_by_role("tab", name="Glass box").click()
    tab.get_by_role("combobox", name="Model", exact=True).last.select_option("lora_64_epoch0")
    tab.get_by_role("combobox", name="How the text is read").select_option("as a question in a chat")
    tab.get_by_role("textbox", name="Text to read").fill(QUESTIONS[0])
    tab.get_by_role("button", name="Read it").click()
    tab.locator(".bars").wait_for()
    first = server.engine.tokenizer.encode(OTHER_ANSWERS[0].strip())[0]
    likeliest = tab.locator(".bars code").first.inner_text()
    assert likeliest == server.engine.tokenizer.decode([first]).replace(" ", "␣"), "the adapter is part of it"


def test_the_slider_shows_it_learn(tab, server, chat_tokenizer):
    """Each place of the slider has its own model, which reads the same tokens; the last one is the finished model."""
    tab.get_by_role("tab", name="Glass box").click()
    tab.get_by_role("combobox", name="Model", exact=True).last.select_option("pretrain_64_epoch0")
    slider = tab.get_by_role("slider", name="Step of the training")
    assert slider.is_hidden(), "no snapshots"
    tab.get_by_role("combobox", name="Model", exact=True).last.select_option("full_sft_64_epoch0")
    tab.get_by_role("textbox", name="Text to read").fill("Größe? quiet")
    tab.get_by_role("button", name="Read it").click()
    tab.locator(".bars").wait_for()
    tab.locator(".token").nth(2).click()
    ids = [*chat_tokenizer.document_start, *chat_tokenizer.encode("Größe? quiet")]
    model = trained_model(vocab_size=chat_tokenizer.vocab_size)
    finished = server.engine.model
    for place, name, seed in ((0, "after step 0", 7), (1, "after step 1,200", 8), (2, "the finished model", None)):
        slider.fill(str(place))
        tab.locator(f"output:text-is('{name}')").wait_for()
        if seed is not None:
            model.load_state_dict(early_weights(chat_tokenizer, seed), strict=False)
            model.lm_head.weight = model.model.embed_tokens.weight
        with torch.no_grad():
            reader = model if seed is not None else finished
            hidden = reader.hidden_states(torch.tensor([ids]))
            best = as_shown(chat_tokenizer.decode([reader.lm_head(hidden)[0, 2].argmax().item()]))
        tab.locator(".token[aria-pressed=true]").nth(0).wait_for()
        expect(tab.locator(".bars code").first).to_have_text(best)
        assert tab.locator(".token").count() == len(ids)
    assert tab.locator("#trouble").is_hidden()
    assert server.get("/page/models/full_sft_64_epoch0?step=5").status_code == 404


def test_the_last_place_of_the_slider_wins(tab, server):
    """Also if a model that was chosen before comes later."""
    tab.route("**/page/models/*?step=0", lambda route: (tab.wait_for_timeout(700), route.continue_()))
    tab.get_by_role("tab", name="Glass box").click()
    tab.get_by_role("textbox", name="Text to read").fill("Größe? quiet")
    tab.get_by_role("button", name="Read it").click()
    tab.locator(".bars").wait_for()
    expected = tab.locator(".bars li").all_inner_texts()
    slider = tab.get_by_role("slider", name="Step of the training")
    slider.fill("0")
    slider.fill("2")
    tab.wait_for_timeout(1500)
    assert tab.locator(".bars li").all_inner_texts() == expected
    tab.get_by_role("combobox", name="Model", exact=True).last.select_option("pretrain_64_epoch0")
    assert tab.locator(".bars").is_hidden(), "what is shown is of the model that is chosen"


def test_a_model_whose_files_are_gone(server, folder):
    (made,) = (folder / "pretrain").glob("*_epoch0")
    made.rename(folder / "away")
    try:
        answer = server.get("/page/models/pretrain_64_epoch0")
        assert answer.status_code == 404 and "still answers" in answer.json()["error"]["message"]
    finally:
        (folder / "away").rename(made)


def test_stopping_frees_the_place(tab, server):
    choose(tab, "pretrain_64_epoch0")
    set_greedy(tab)
    tab.locator("#chat [name=maxTokens]").fill("16000")
    ask(tab, "Größe")
    tab.locator(".assistant .text:not(:empty)").wait_for()
    assert server.figure("vllm:num_requests_running") == 1
    tab.get_by_role("button", name="Stop").click()
    wait_for_answer(tab)
    deadline = time.monotonic() + 2
    while server.figure("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.figure("vllm:num_requests_running") == 0
    assert tab.locator("#trouble").is_hidden()


def test_what_is_too_long_is_said(tab):
    choose(tab, "full_sft_64_epoch0")
    ask(tab, "船" * 3000)
    tab.locator("#trouble:not([hidden])").wait_for()
    assert "shorten the message" in tab.locator("#trouble").inner_text()
    ask(tab, QUESTIONS[0])
    wait_for_answer(tab)


def test_a_server_that_goes_away(settings, browser):
    """In the middle of an answer, and before one: a sentence; what was written stays."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(replace(settings, drain_timeout=0.1)))
        tab = browser.new_page()
        tab.set_default_timeout(20_000)
        tab.goto(server.url)
        tab.locator("#facts:not(:empty)").wait_for()
        choose(tab, "pretrain_64_epoch0")
        set_greedy(tab)
        tab.locator("#chat [name=maxTokens]").fill("16000")
        ask(tab, "Größe")
        tab.locator(".assistant .text:not(:empty)").wait_for()
    tab.locator("#trouble:not([hidden])").wait_for()
    assert re.search("went away|shutting down", tab.locator("#trouble").inner_text())
    assert tab.locator(".assistant .text").inner_text()
    ask(tab, "Größe")
    tab.locator("#trouble:text('cannot be reached')").wait_for()
    tab.close()


def test_a_page_that_is_opened_too_early(settings, browser, monkeypatch):
    """It says what it waits for, and begins as soon as the models are there."""
    go_on, load = threading.Event(), served_models.load_for_use
    monkeypatch.setattr(served_models, "load_for_use", lambda *a, **k: go_on.wait(60) and load(*a, **k))
    with running(settings, is_ready=False) as server:
        tab = browser.new_page()
        tab.set_default_timeout(20_000)
        tab.goto(server.url)
        tab.locator("#trouble:text('the server is loading its models')").wait_for()
        go_on.set()
        tab.locator("#facts:not(:empty)").wait_for()
        assert tab.locator("#trouble").is_hidden()
        ask(tab, QUESTIONS[0])
        assert wait_for_answer(tab)
        tab.close()


def test_the_key_is_asked_by_the_browser(settings, browser):
    with running(replace(settings, api_key=KEY)) as server:
        for given in (None, {"username": "wer auch immer", "password": "falsch"}):
            context = browser.new_context(http_credentials=given)
            try:  # it shows the answer, or an error of its own
                assert context.new_page().goto(server.url).status == 401
            except PlaywrightError as error:
                assert "INVALID_AUTH_CREDENTIALS" in str(error)
            context.close()
        context = browser.new_context(http_credentials={"username": "wer auch immer", "password": KEY})
        tab = context.new_page()
        tab.goto(server.url)
        tab.locator("#facts:not(:empty)").wait_for()
        ask(tab, QUESTIONS[0])
        wait_for_answer(tab)
        context.close()


def test_no_other_page_may_frame_it(server):
    answer = server.get("/")
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert "connect-src 'self'" in answer.text and answer.headers["x-content-type-options"] == "nosniff"
