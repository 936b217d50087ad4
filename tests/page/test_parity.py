"""What the page computes is what the model computes: logits, tokens, text, filters."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tests.export.conftest import SHAPES
from tests.model.small_models import random_ids, trained_model
from tests.page.conftest import write_page
from tinylm.generation.sampling import BatchSampling, SamplingSettings, filter_logits
from tinylm.tokenizer.chat_template import encode_chat
from tinylm.tokenizer.tokenizer import SMALLEST_VOCAB, Tokenizer

OTHERS = {"learned": {"position_embedding_type": "learned"}, "sinusoidal": {"position_embedding_type": "sinusoidal"}}
READ = """ids => {
  const { transformer } = window.parts.model, cache = transformer.newCache();
  return ids.map(id => Array.from(transformer.read(id, cache)));
}"""


@pytest.fixture(scope="module")
def plain_tokenizer() -> Tokenizer:
    return Tokenizer.train(["größer 船"], SMALLEST_VOCAB + 2)


def dequantised(model):
    """The model with the weights that int8 leaves of its matrices."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed_positions" not in name:
            scales = weight.detach().abs().amax(1, keepdim=True) / 127
            weight.data = (weight / scales).round() * scales
    return model


@pytest.mark.parametrize("shape", [*SHAPES, *OTHERS])
def test_logits_are_the_models(shape, plain_tokenizer, visit, tmp_path):
    model = trained_model(**{"vocab_size": 300, **(SHAPES | OTHERS)[shape]})
    ids = random_ids(1, 70)
    tab = visit(write_page(tmp_path / "größe.html", model, plain_tokenizer))
    with torch.no_grad():
        expected = model(ids)[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(torch.tensor(tab.evaluate(READ, ids[0].tolist())), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", ["grouped", "wide heads", "learned"])
def test_int8_has_the_logits_of_rounded_weights(shape, plain_tokenizer, visit, tmp_path):
    model = trained_model(**(SHAPES | OTHERS)[shape])
    ids = random_ids(1, 40)
    path = write_page(tmp_path / "page.html", model, plain_tokenizer, "int8")
    with torch.no_grad():
        exact, expected = model(ids)[0], dequantised(model)(ids)[0]
    assert (exact - expected).abs().max() > 2e-3
    atol = 0.05 if shape == "learned" else 1e-3  # its table of positions is rounded, too
    torch.testing.assert_close(torch.tensor(visit(path).evaluate(READ, ids[0].tolist())), expected, rtol=0, atol=atol)


def test_the_cache_is_cut_where_texts_part(plain_tokenizer, visit, tmp_path):
    model = trained_model()
    one, other = [5, 6, 7, 8, 9], [5, 6, 7, 20, 21, 22]
    tab = visit(write_page(tmp_path / "page.html", model, plain_tokenizer))
    read = "async ids => Array.from(await window.parts.model.read(ids, new AbortController().signal))"
    for ids in (one, other, one, other[:3]):
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0, -1]
        torch.testing.assert_close(torch.tensor(tab.evaluate(read, ids)), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("digits", ["split", "grouped"])
def test_tokens_are_the_tokenizers(digits, tokenizer, torture, visit, tmp_path):
    if digits == "grouped":
        words = ["12345 größer 船 don't the thing 1,000,000 " * 9, *torture]
        tokenizer = Tokenizer.train(words, 600, digits="grouped", special_tokens=["<|größe|>"])
        torture = [*torture, "<|größe|> 1234567"]
    tab = visit(write_page(tmp_path / "page.html", trained_model(vocab_size=tokenizer.vocab_size), tokenizer))
    check_tokens(tab, tokenizer, torture)


def test_tokens_of_the_world(tokenizer, world_texts, visit, tmp_path):
    tab = visit(write_page(tmp_path / "page.html", trained_model(vocab_size=tokenizer.vocab_size), tokenizer))
    check_tokens(tab, tokenizer, [text[:3000] for text in world_texts])


def check_tokens(tab, tokenizer, texts):
    ids = tab.evaluate("texts => texts.map(text => window.parts.model.tokenizer.encode(text))", texts)
    assert ids == tokenizer.encode_batch(texts)
    cut = [each[: len(each) - 1] for each in ids]  # some end within a character
    assert tab.evaluate("all => all.map(ids => window.parts.model.tokenizer.decode(ids))", cut) == [
        tokenizer.decode(each) for each in cut
    ]


def test_chats_are_the_templates(tokenizer, torture, visit, tmp_path):
    tab = visit(write_page(tmp_path / "page.html", trained_model(vocab_size=tokenizer.vocab_size), tokenizer))
    numbers = random.Random(4)
    roles = ("system", "user", "assistant")
    for _ in range(20):
        chat = [{"role": role, "content": numbers.choice(torture[:30])} for role in numbers.choices(roles, k=4)]
        expected = encode_chat(tokenizer, chat, add_generation_prompt=True)[0]
        assert tab.evaluate("chat => window.parts.model.tokenizer.chat(chat)", chat) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.7},
        {"temperature": 0.6, "top_k": 7, "top_p": 1.0},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.1, "top_p": 0.0},
        {"temperature": 0.9, "min_p": 0.07, "top_p": 1.0},
        {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4},
    ],
)
def test_filters_keep_the_same_tokens(settings, plain_tokenizer, visit, tmp_path):
    tab = visit(write_page(tmp_path / "page.html", trained_model(), plain_tokenizer))
    torch.manual_seed(8)
    logits, seen_ids = torch.randn(5, 60) * 2, [3, 3, 9, 40]
    seen = torch.zeros(5, 60, dtype=torch.bool)
    seen[:, seen_ids] = True
    ours = SamplingSettings(**settings)
    kept = filter_logits(logits, BatchSampling.of([ours] * 5), seen) > -math.inf
    theirs = {
        "temperature": ours.temperature, "topK": ours.top_k, "topP": ours.top_p, "minP": ours.min_p,
        "repetitionPenalty": ours.repetition_penalty,
    }  # fmt: skip
    script = "([rows, settings, seen]) => rows.map(row => candidates(row, settings, seen))"
    for row, found in enumerate(tab.evaluate(script, [logits.tolist(), theirs, seen_ids])):
        assert {each["id"] for each in found if not each["removedBy"]} == set(kept[row].nonzero().flatten().tolist())
        assert sum(each["probability"] for each in found) == pytest.approx(1, abs=1e-5)
        shares = [each["probability"] for each in found]
        assert shares == sorted(shares, reverse=True) and len(found) == 60


def test_draws_follow_the_probabilities(plain_tokenizer, visit, tmp_path):
    tab = visit(write_page(tmp_path / "page.html", trained_model(), plain_tokenizer))
    script = """() => {
      const found = candidates([0, Math.log(3), Math.log(6), -50], { ...DEFAULTS, temperature: 1, topP: 1 }, []);
      const random = randomNumbers(7), counts = [0, 0, 0, 0];
      for (let i = 0; i < 10000; i++) counts[draw(found, random())]++;
      return counts;
    }"""
    counts = tab.evaluate(script)
    assert counts == pytest.approx([1000, 3000, 6000, 0], abs=200) and counts == tab.evaluate(script)
