"""A real browser, and pages with models inside."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.small_models import trained_model
from tests.tokenizer.conftest import tokenizer, torture, world_texts
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.page.card import page_card
from tinylm.page.packed_model import packed_model
from tinylm.page.page import Enclosed, page
from tinylm.tokenizer.tokenizer import Tokenizer

__all__ = ["tokenizer", "torture", "world_texts"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, for tests that have a page to look at.

    Its driver holds this thread's event loop, so it must not live on into tests that run one.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium is installed; on Debian or Ubuntu: apt install chromium")
    playwright.expect.set_options(timeout=20_000)
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        except playwright.Error as error:
            pytest.skip(f"{path} does not start here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """A function that opens an address. What the page's console says, and what it asks of other places, are errors."""
    contexts, said = [], []

    def open_address(address: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        tab = context.new_page()
        is_served = address.startswith("http")
        home = address if is_served else "file:"

        def hear(message: Any) -> None:
            if not (is_served and message.text.startswith("Failed to load resource")):  # the page says it in a sentence
                said.append(message.text)

        tab.on("console", hear)
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: None if request.url.startswith(home) else said.append(request.url))
        tab.goto(address)
        return tab

    yield open_address
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture
def visit(open_page: Callable[..., Any]) -> Callable[..., Any]:
    """A function that opens a file without a network."""
    return lambda path, **options: open_page(path.as_uri(), offline=True, **options)


def write_page(
    path: Path,
    model: TinyLMForCausalLM,
    tokenizer: Tokenizer,
    dtype: Any = "f32",
    name: str = "tiny",
    why_no_chats: str = "",
) -> Path:
    """A page with this model."""
    engine = Engine(model, tokenizer, model.dtype, tokenizer.document_start)
    card = page_card(name, model.num_parameters(), model.config.max_position_embeddings, why_no_chats, ())
    path.write_text(page(name, [Enclosed(card, packed_model(engine, dtype), {})]), encoding="utf-8")
    return path


def as_shown(text: str) -> str:
    """The text of a token as the page shows it: a sign for what cannot be seen."""
    signs = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "[CR]", "\u200c": "[ZWNJ]"}
    unseen = {each for each in text if unicodedata.category(each)[0] in "CZ"}
    return "".join(signs.get(each, f"[U+{ord(each):04X}]") if each in unseen else each for each in text)


def endless_model(tokenizer: Tokenizer) -> TinyLMForCausalLM:
    """A random model that, when greedy, continues "Größe" and does not end."""
    torch.manual_seed(1)
    model = trained_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=16_384)
    engine = Engine(model, tokenizer, document_start=tokenizer.document_start)
    settings = SamplingSettings(temperature=0, max_new_tokens=1500)
    assert len(list(engine.generate(engine.text_prompt("Größe"), settings, engine.stop_ids))) == 1500
    return model
