"""What the glass box shows is what the model computes, and it can be read by everybody."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.model.small_models import reference_of, trained_model
from tests.page.conftest import as_shown, write_page
from tinylm.generation import sampling
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer

expect = pytest.importorskip("playwright.sync_api").expect
WORDS = ["Größe?", "naïve", "quiet", "שלום", "می\u200cخواهم", "12", "船"]
TEXT = "Größe? naïve שלום می\u200cخواهم 12 quiet"
SEEN = {
    " a\tb\n": "␣a⇥b⏎", "\r": "[CR]", "\u00a0": "[NBSP]", "\ufeff": "[BOM]", "x\u200dy": "x[ZWJ]y", "\u200f": "[RLM]",
    "\u0301": "◌\u0301", "a\u0301": "a\u0301", " \u0301": "␣◌\u0301", "\x07": "[U+0007]", "\x9f": "[U+009F]",
    "\u2028": "[LS]", "\ufe0f": "[VS16]", "\u3164": "[U+3164]", "\ue000": "[U+E000]", "船": "船", "שלום": "שלום",
}  # fmt: skip
"""Texts, and how they are shown."""


@dataclass
class Computed:
    """What transformers computes of TEXT."""

    path: Path
    model: TinyLMForCausalLM
    tokenizer: Tokenizer
    ids: list[int]
    logits: Tensor  # [T, V]
    attention: list[Tensor]  # of each layer: [H, T, T]
    stream: list[Tensor]  # of each layer and before the first: [T, C]

    def shown(self, token_id: int) -> str:
        """A token as the page shows it."""
        if token_id in (names := {place: name for name, place in self.tokenizer.added_ids.items()}):
            return names[token_id]
        return as_shown(self.tokenizer.decode([token_id]))


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> Computed:
    torch.manual_seed(5)
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 9, 330)
    model = trained_model(vocab_size=tokenizer.vocab_size)
    path = write_page(tmp_path_factory.mktemp("glass") / "größe.html", model, tokenizer)
    ids = [*tokenizer.document_start, *tokenizer.encode(TEXT)]
    reference, kept = reference_of(model), []
    for layer in reference.model.layers:
        layer.register_forward_pre_hook(lambda _, given: kept.append(given[0][0]))
    reference.model.norm.register_forward_pre_hook(lambda _, given: kept.append(given[0][0]))
    with torch.no_grad():
        out = reference(torch.tensor([ids]), output_attentions=True)
    attention = [weights[0] for weights in out.attentions]
    return Computed(path, model, tokenizer, ids, out.logits[0], attention, kept)


def read(tab, text: str = TEXT):
    tab.get_by_role("tab", name="Glass box").click()
    tab.get_by_role("textbox", name="Text to read").fill(text)
    tab.get_by_role("button", name="Read it").click()
    tab.locator(".bars li").first.wait_for()
    return tab


def percents(text: str) -> list[float]:
    """The percentages in a sentence, as shares."""
    return [float(number) / 100 for number in re.findall(r"([\d.]+)%", text)]


def close(share: float):
    """To the digits that the page shows."""
    return pytest.approx(share, abs=0.0051 if share >= 0.0995 else 0.00051)


def share_of(element) -> float:
    """How strong its colour is."""
    return float(element.evaluate("each => each.style.getPropertyValue('--share')"))


def attention_said(tab) -> str:
    return tab.locator(".side .readout").inner_text()


def test_the_text_the_ids_and_the_cache(computed, visit):
    tab = read(visit(computed.path))
    tokens = tab.locator(".token")
    assert [int(each.locator("small").inner_text()) for each in tokens.all()] == computed.ids
    assert tab.locator(".token > bdi").all_inner_texts() == [computed.shown(each) for each in computed.ids]
    assert f"{len(computed.ids)} tokens × 0.5 kB" in tab.locator("#glass").inner_text()
    assert tab.locator(".heads canvas").count() == 8
    assert tab.evaluate("window.parts.model.known.length") == 0, "the chat's cache is left alone"
    engine = Engine(computed.model, computed.tokenizer, document_start=computed.tokenizer.document_start)
    settings = SamplingSettings(temperature=0, max_new_tokens=32)
    expected = "".join(engine.stream_text(engine.text_prompt(TEXT), settings))
    expect(tab.locator("#glass .text")).to_have_text(expected, use_inner_text=False)


def test_each_cell_of_attention_is_said(computed, visit):
    """By keyboard: the arrows go from cell to cell, Enter chooses the token of the row."""
    tab = read(visit(computed.path))
    tab.get_by_role("button", name="layer 2, head 3").click()
    assert "head 3 uses key/value head 2, as heads 3 to 4 do" in tab.locator(".side").inner_text()
    weights, last = computed.attention[1][2], len(computed.ids) - 1
    tab.locator(".large").focus()
    assert re.search(f"place {last + 1}. looks at itself", attention_said(tab))
    tab.keyboard.press("Home")
    assert percents(attention_said(tab)) == [close(weights[last, 0].item())]
    for _ in range(3):
        tab.keyboard.press("ArrowUp")
    for column in range(1, last - 2):
        tab.keyboard.press("ArrowRight")
        row = last - 3
        names = [computed.shown(computed.ids[place]) for place in (row, column)]
        said = attention_said(tab)
        assert said.startswith(f"“{names[0]}” (place {row + 1}) looks at ")
        assert column == row or f"“{names[1]}” (place {column + 1}) with" in said
        assert percents(said) == [close(weights[row, column].item())]
    tab.keyboard.press("ArrowRight")
    assert "cannot look at" in attention_said(tab) and "comes later" in attention_said(tab)
    tab.keyboard.press("Enter")
    assert tab.locator(".token").nth(last - 3).get_attribute("aria-pressed") == "true"
    assert tab.locator(".large").evaluate("each => each === document.activeElement")
    names = tab.locator(".row-name:visible, .column-name:visible")
    assert names.count() == 2 * len(computed.ids), "every row and column has its token beside it"


def test_attention_by_pointer(computed, visit):
    tab = read(visit(computed.path))
    weights, count = computed.attention[1][0], len(computed.ids)
    box = tab.locator(".large canvas").bounding_box()
    for row, column in ((count - 2, 1), (4, 3)):
        cell = {"x": (column + 0.5) * box["width"] / count, "y": (row + 0.5) * box["height"] / count}
        tab.locator(".large canvas").hover(position=cell)
        assert f"(place {row + 1})" in attention_said(tab)
        assert percents(attention_said(tab)) == [close(weights[row, column].item())]
    tab.locator(".large canvas").click(position=cell)
    assert tab.locator(".token").nth(4).get_attribute("aria-pressed") == "true"
    for place, token in enumerate(tab.locator(".token").all()):
        words = token.get_attribute("aria-label")
        if place > 4:
            assert "comes after the chosen token" in words
        else:
            assert percents(words)[-1] == close(weights[4, place].item())
            assert share_of(token) == pytest.approx(weights[4, place].item(), abs=6e-4)


def test_the_first_picture_is_sharp_and_a_window_may_change(computed, visit):
    """The large picture was measured before it had its place, and a browser's complaint about sizes was shown."""
    tab = read(visit(computed.path))
    assert tab.locator(".large canvas.shrunk").count() == 0
    wide = tab.locator(".large canvas").bounding_box()["width"]
    for width in (400, 1000, 360):
        tab.set_viewport_size({"width": width, "height": 700})
        tab.wait_for_timeout(150)
    assert tab.locator("#trouble").is_hidden() and tab.locator(".large canvas").bounding_box()["width"] < wide
    tab.get_by_role("textbox", name="Text to read").type("船")
    tab.locator("#glass [role=status]", has_text="The text is another one now").wait_for()


def test_attention_without_the_first_token(computed, visit):
    """The rest is shown as shares of what the first token leaves, and both numbers are said."""
    tab = read(visit(computed.path))
    weights, last = computed.attention[1][0], len(computed.ids) - 1
    first = weights[1:, 0].mean().item()
    assert percents(tab.locator(".side .hint").inner_text()) == [close(first)]
    tab.get_by_role("checkbox", name="without the first token").check()
    rest = weights[:, 1:] / weights[:, 1:].sum(1, keepdim=True).clamp(min=1e-30)
    assert percents(attention_said(tab)) == [close(weights[last, last].item()), close(rest[last, last - 1].item())]
    pixels = tab.locator(".large canvas").evaluate(
        "each => [...each.getContext('2d').getImageData(0, 0, each.width, each.height).data]"
    )
    shown = torch.tensor(pixels).view(last + 1, last + 1, 4)[..., 3] / 255
    assert (shown[1:, 1:] - rest[1:]).abs().max() < 0.003 and not shown[:, 0].any() and not shown[0].any()
    tab.locator(".large").focus()
    tab.keyboard.press("Home")
    assert "left out of the picture" in attention_said(tab)


def removed(computed: Computed, at: int, changes: dict[str, float]) -> dict[str, int]:
    """How many tokens each filter takes away, by the filters of tinylm."""
    settings = {"temperature": 0.7, "topK": 0, "topP": 0.9, "minP": 0.0, "repetitionPenalty": 1.0, **changes}
    seen = sampling.seen_tokens([computed.ids[: at + 1]], computed.tokenizer.vocab_size)
    logits = sampling.repetition_penalty(computed.logits[at : at + 1], seen, settings["repetitionPenalty"])
    logits, counts, before = sampling.temperature(logits, settings["temperature"]), {}, 0
    steps = (("top-k", sampling.top_k, "topK"), ("top-p", sampling.top_p, "topP"), ("min-p", sampling.min_p, "minP"))
    for name, apply, key in steps:
        logits = apply(logits, settings[key])
        gone = int(logits.isinf().sum())
        if gone > before:
            counts[name] = gone - before
        before = gone
    return counts


def test_which_filter_removed_what(computed, visit):
    """A field redraws while it is typed in; the counts are those of tinylm's filters."""
    tab = read(visit(computed.path))
    tab.locator("#glass summary").click()
    vocabulary, at = computed.tokenizer.vocab_size, 3
    tab.locator(".token").nth(at).click()
    fields = {"repetitionPenalty": 1.5, "temperature": 1.4, "topK": 40, "topP": 0.8, "minP": 0.5}
    changes: dict[str, float] = {}
    for key, value in fields.items():
        tab.locator(f"#glass [name={key}]").fill(str(value))  # no blur
        changes[key] = value
        counts = removed(computed, at, changes)
        said = tab.locator("#glass .hint[role=status]").last.inner_text()
        left = vocabulary - sum(counts.values())
        words = ", ".join(
            f"{name}{'' if place else ' removed'} {count}" for place, (name, count) in enumerate(counts.items())
        )
        assert said.startswith(f"{left} of {vocabulary} tokens are left to draw from: {words}.")
        assert f"changed {len(set(computed.ids[: at + 1]))} tokens that occurred" in said
    assert len(counts) == 3, "each filter removes some"
    notes = tab.locator(".bars .note").all_inner_texts()
    assert sum(note.startswith("drawn with") for note in notes) == left
    assert notes[left].startswith("removed by min-p"), "the last filter"
    assert sum(percents(" ".join(notes))) == pytest.approx(1, abs=0.03)
    tab.locator("#glass [name=topP]").fill("7")
    field = tab.get_by_role("spinbutton", name="top-p").last
    assert field.get_attribute("aria-invalid") == "true" and "above" not in field.input_value()
    hint = tab.locator(f"#{field.get_attribute('aria-describedby')}")
    assert "Accepted is 0 to 1; 0.9 is used." in hint.inner_text() and "Draw only from the fewest" in hint.inner_text()
    tab.locator("#glass [name=temperature]").fill("0")
    assert f"greedy: the likeliest of {vocabulary} tokens" in tab.locator("#glass").inner_text()


def test_the_lens_of_every_layer_and_token(computed, visit):
    tab = read(visit(computed.path))
    expect(tab.locator(".lens button", has_text="…")).to_have_count(0)
    rows = tab.locator(".lens tr").all()[1:-1]
    assert len(rows) == len(computed.stream) == 3
    for row, stream in zip(rows, computed.stream, strict=True):
        with torch.no_grad():
            best = computed.model.lm_head(computed.model.model.norm(stream)).softmax(-1).topk(3)
        cells = row.locator("button").all()
        assert len(cells) == len(computed.ids)
        for place, cell in enumerate(cells):
            assert share_of(cell) == close(best.values[place, 0].item())
            assert percents(cell.get_attribute("aria-label")) == [close(each) for each in best.values[place].tolist()]
            if "\ufffd" not in (expected := computed.shown(best.indices[place, 0].item())):
                assert cell.inner_text() == expected
    cell = rows[1].locator("button").nth(2)
    cell.hover()
    assert "after layer 1" in tab.locator(".lens >> xpath=../..").locator(".readout").inner_text()
    cell.click()
    assert tab.locator(".token").nth(2).get_attribute("aria-pressed") == "true"
    table = tab.locator("#glass table:not(.lens) tr")
    assert table.count() == 4 and percents(table.last.inner_text()) == [close(each) for each in best.values[2].tolist()]


def test_surprise_is_the_log_probability(computed, visit):
    tab = read(visit(computed.path))
    scores = computed.logits[:-1].log_softmax(-1)
    bits = -scores.gather(1, torch.tensor(computed.ids)[1:, None])[:, 0] / math.log(2)
    whole = tab.locator("#glass p", has_text="bits per token, perplexity").inner_text()
    count, total, mean, perplexity = (float(each) for each in re.findall(r"\d+(?:\.\d+)?", whole))
    assert count == len(bits) and total == pytest.approx(bits.sum().item(), abs=0.06)
    assert mean == pytest.approx(bits.mean().item(), abs=0.006)
    assert perplexity == pytest.approx(2 ** bits.mean().item(), rel=1e-3)
    labels = [each.get_attribute("aria-label") for each in tab.locator(".token").all()]
    assert "nothing comes before it" in labels[0]
    said = [float(re.search(r"([\d.]+) bits of surprise", each)[1]) for each in labels[1:]]
    assert said == pytest.approx(bits.tolist(), abs=0.006)
    tab.get_by_role("combobox", name="colour by").select_option("surprise")
    shares = [share_of(each) for each in tab.locator(".token").all()]
    most = math.log2(computed.tokenizer.vocab_size)
    assert shares == pytest.approx([0.0, *(min(1.0, each / most) for each in bits.tolist())], abs=6e-4)
    tab.locator(".token").nth(2).click()
    assert f"{bits[2].item():.2f} bits of surprise. Choose another" in tab.locator("#glass").inner_text()
    assert tab.locator(".bars .chosen .note").inner_text().endswith("follows in the text")


def test_what_cannot_be_seen_has_a_sign(computed, visit):
    """Text in any direction stays in its place: a token's direction is its own, and a sign has none."""
    tab = read(visit(computed.path))
    show = "texts => texts.map((text) => make('p', {}, ...visible(text)).textContent)"
    assert dict(zip(SEEN, tab.evaluate(show, list(SEEN)), strict=True)) == SEEN
    tokens = tab.locator(".token")
    boxes = [each.bounding_box() for each in tokens.all()]
    assert [each["x"] for each in boxes] == sorted(each["x"] for each in boxes), "one row, in the order of reading"
    directions = tab.locator(".token > bdi").evaluate_all("all => all.map(each => getComputedStyle(each).direction)")
    for token_id, direction in zip(computed.ids, directions, strict=True):
        expected = "rtl" if re.search("[\u0590-\u06ff]", computed.shown(token_id)) else "ltr"
        assert direction == expected, computed.shown(token_id)
    assert {"rtl", "ltr"} == set(directions) and "[ZWNJ]" in "".join(map(computed.shown, computed.ids))
    words = tokens.nth(3).get_attribute("aria-label")
    assert words.startswith("\u2068") and "\u2069, place 4, id " in words
    tab = read(tab, "a船👩\u200d👧")
    assert [each for each in tab.locator(".token > bdi").all_inner_texts() if each.startswith("\\x")]
    tokens.nth(tokens.count() - 1).hover()
    assert "a part of “👧”" in tab.locator(".tokens + .readout").inner_text()


def test_one_tab_stop_for_each_row_of_buttons(computed, visit):
    """After a token is chosen with the keyboard, the list keeps the focus, and the arrow keys still work."""
    tab = read(visit(computed.path))
    for box in (".tokens", ".heads", ".lens", ".bars"):
        assert tab.locator(f"{box} button").count() > 3
        assert tab.locator(f"{box} button[tabindex='0']").count() == 1, box
    focused = "document.activeElement.getAttribute('aria-label')"
    tab.locator(".token[tabindex='0']").focus()
    for key, place in (("Home", 1), ("ArrowRight", 2), ("ArrowDown", 3), ("ArrowLeft", 2), ("End", len(computed.ids))):
        tab.keyboard.press(key)
        assert f", place {place}, " in tab.evaluate(focused), key
    assert tab.locator(".token[aria-pressed=true]").count() == 1
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("Enter")
    assert tab.locator(".token").nth(len(computed.ids) - 2).get_attribute("aria-pressed") == "true"
    tab.locator(".heads [tabindex='0']").focus()
    moves = {"ArrowDown": "layer 2, head 1", "ArrowRight": "layer 2, head 2", "ArrowUp": "layer 1, head 2"}
    for key, name in moves.items():
        tab.keyboard.press(key)
        assert tab.evaluate(focused) == name
    tab.keyboard.press("Enter")
    assert tab.locator(".heads [aria-pressed=true]").get_attribute("aria-label") == "layer 1, head 2"
    assert tab.evaluate(focused) == "layer 1, head 2", "the focus stays"
    tab.locator(".bars [tabindex='0']").focus()
    for count in range(3):
        tab.keyboard.press("ArrowDown")
        tab.keyboard.press("Enter")
        tab.locator(f"#glass [role=status]:text-is('{len(computed.ids) + count} tokens')").wait_for()
        expect(tab.locator(".bars button").first).to_be_focused()


CONTRASTS = """() => {
  const numbers = (colour) => [...colour.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const over = ([r, g, b, a], under) => [r, g, b].map((value, i) => a * value + (1 - a) * under[i]);
  const ground = (element) => !element ? [255, 255, 255]
    : over(numbers(getComputedStyle(element).backgroundColor), ground(element.parentElement));
  const light = (colour) => colour.map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, i) => sum + [0.2126, 0.7152, 0.0722][i] * value, 0);
  const opacity = (element) => !element ? 1 : getComputedStyle(element).opacity * opacity(element.parentElement);
  const walker = document.createTreeWalker(document.getElementById("glass"), NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, under = ground(element);
    const colour = numbers(getComputedStyle(element).color);
    if (!element.getClientRects().length || !walker.currentNode.data.trim()) continue;
    const [a, b] = [light(over([...colour.slice(0, 3), colour[3] * opacity(element)], under)), light(under)];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.data]);
  }
  return found;
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_can_be_read(theme, computed, visit):
    """Contrast of 4.5 or more (WCAG 1.4.3), also on the strongest colours, and crossed out."""
    tab = read(visit(computed.path, color_scheme=theme))
    tab.locator("#glass summary").click()
    tab.locator("#glass [name=topK]").fill("5")
    tab.locator("#glass [name=minP]").fill("-1")
    assert tab.locator(".bars .gone").count() > 1
    expect(tab.locator(".lens button", has_text="…")).to_have_count(0)
    tab.evaluate("document.querySelectorAll('.heat').forEach(each => each.style.setProperty('--share', 1))")
    found = tab.evaluate(CONTRASTS)
    assert len(found) > 100 and min(found)[0] >= 4.5, min(found)


def test_a_long_text_on_a_phone(computed, visit):
    """Names that do not fit are shown for one row and column; what is wide scrolls in its place."""
    tab = read(visit(computed.path, viewport={"width": 360, "height": 740}), "12 naïve " * 30)
    count = tab.locator(".token").count()
    assert count > 60 and tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert tab.locator(".row-name:visible").count() == tab.locator(".column-name:visible").count() == 1
    box = tab.locator(".heads canvas").first.bounding_box()
    assert box["width"] == pytest.approx(box["height"], abs=1), "square, also where it is smaller than its tokens"
    tab.locator(".large").focus()
    tab.keyboard.press("ArrowLeft")
    assert f"(place {count - 1})" in attention_said(tab)
    last = tab.locator(".lens tr").last.locator("td").last.bounding_box()
    assert 0 <= last["x"] and last["x"] + last["width"] <= 360, "the chosen token is in sight"
    strip, last = tab.locator(".tokens").bounding_box(), tab.locator(".token").last.bounding_box()
    assert strip["y"] <= last["y"] and last["y"] + last["height"] <= strip["y"] + strip["height"]


def test_what_is_no_number_is_said(computed, visit, tmp_path):
    model = trained_model(vocab_size=computed.tokenizer.vocab_size)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    tab = visit(write_page(tmp_path / "page.html", model, computed.tokenizer))
    tab.get_by_role("tab", name="Glass box").click()
    tab.get_by_role("button", name="Read it").click()
    expect(tab.locator("#trouble")).to_have_text(re.compile("something that is not a number"))


def test_a_chat_says_why_it_surprises(computed, visit):
    tab = visit(computed.path)
    tab.get_by_role("tab", name="Glass box").click()
    tab.get_by_role("combobox", name="How the text is read").select_option("as a question in a chat")
    read(tab)
    assert "A chat model learns answers only" in tab.locator("#glass").inner_text()
    assert tab.locator(".token bdi.control").all_inner_texts() == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
