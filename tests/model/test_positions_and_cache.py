"""Positions against transformers and their equations; the cache's storage."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.model.small_models import LLAMA3, YARN, random_ids, small_config, small_model
from tinylm.model.hf_config import config_to_hf
from tinylm.model.kv_cache import KVCache
from tinylm.model.positions import RotaryEmbedding, apply_rotary, sinusoidal_table


@pytest.mark.parametrize(
    "scaling", [None, YARN, {"rope_type": "yarn", "factor": 2.5}, LLAMA3, {"rope_type": "linear", "factor": 3.0}]
)
def test_rotary_equals_transformers(scaling):
    config = small_config(rope_scaling=scaling)
    reference = LlamaRotaryEmbedding(LlamaConfig(**config_to_hf(config)))
    x = torch.randn(2, 100, 4, 16)
    positions = torch.randint(0, 256, (2, 100))
    cos, sin = reference(x, positions)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(apply_rotary(x, *RotaryEmbedding(config)(positions, x.dtype)), expected)


def test_rotary_turns_by_the_position_so_scores_depend_on_distance_only():
    """The defining equation (arXiv:2104.09864, eq. 11), in complex numbers and float64."""
    config = small_config()
    x = torch.randn(1, 9, 1, 16, dtype=torch.float64)
    turned = apply_rotary(x, *RotaryEmbedding(config)(slice(0, 9), torch.float64))
    pairs = torch.complex(x[..., :8], x[..., 8:])
    angle = torch.arange(9.0)[:, None] * 1e6 ** (-torch.arange(8.0, dtype=torch.float64) / 8)
    expected = pairs * torch.polar(torch.ones_like(angle), angle)[None, :, None]
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_rope_never_promotes_queries_and_keys(qk_norm, monkeypatch):
    """In the original, float32 tables made q and k float32: half the speed and a mixed-dtype attention."""
    from tinylm.model import model_tinylm

    seen = []
    plain = model_tinylm.attention
    monkeypatch.setattr(
        model_tinylm,
        "attention",
        lambda q, k, v, *rest: seen.append({q.dtype, k.dtype, v.dtype}) or plain(q, k, v, *rest),
    )
    with torch.autocast("cpu", torch.bfloat16):
        small_model(qk_norm=qk_norm)(random_ids(1, 8))
    small_model(qk_norm=qk_norm).to(torch.bfloat16)(random_ids(1, 8))
    assert seen == [{torch.bfloat16}] * 4


def test_tables_stay_float32_when_the_model_is_halved():
    model = small_model()
    exact = model.model.rotary_emb.cos.clone()
    model.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(model.model.rotary_emb.cos, exact)
    assert not any("rotary" in name for name in model.state_dict())


def test_sinusoids_follow_their_equation():
    table = sinusoidal_table(50, 16)
    for position in (0, 1, 49):
        for i in range(8):
            angle = position / 10_000 ** (2 * i / 16)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_cache_storage_never_moves():
    """The original's cache grew by concatenation: every token copied all tokens before it."""
    model = small_model()
    cache = model.new_cache(1, 40)
    before = [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)]
    with torch.no_grad():
        for step in range(40):
            model(random_ids(1, 1), cache=cache)
            assert cache.lengths == [step + 1]
            view, _ = cache.update(0, torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16), slice(0, 0))
            assert view.data_ptr() == before[0] and view.shape == (1, 2, step + 1, 16)
    assert [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)] == before


def filled_cache(lengths: list[int], seed: int):
    """A cache in which all numbers differ."""
    cache = KVCache(small_config(), len(lengths), max(lengths) + 2)
    torch.manual_seed(seed)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    cache.lengths = list(lengths)
    return cache


def held(cache: KVCache, row: int) -> torch.Tensor:
    """Everything a row contains, [2L, K, length, D]."""
    return torch.stack([tensor[row, :, : cache.lengths[row]] for tensor in (*cache.keys, *cache.values)])


@pytest.mark.parametrize("rows", [[2, 1], [1, 2, 0], [0, 0, 2, 2, 1, 2], [2], [0, 1, 2]])
def test_selected_rows_are_copies_of_what_they_were(rows):
    """Fewer rows, another order, more rows than were reserved."""
    cache = filled_cache([4, 9, 6], seed=1)
    before = [held(cache, row).clone() for row in range(3)]
    cache.select_rows(rows)
    assert cache.lengths == [[4, 9, 6][row] for row in rows]
    for row, source in enumerate(rows):
        assert torch.equal(held(cache, row), before[source])


def test_appended_rows_follow_the_rows_of_the_cache():
    cache, other = filled_cache([4, 9], seed=1), filled_cache([15, 3], seed=2)
    cache.select_rows([1])  # free storage is used again
    before = [held(cache, 0).clone(), held(other, 0).clone(), held(other, 1).clone()]
    cache.append(other)
    assert cache.lengths == [9, 15, 3] and cache.max_length == 17
    assert all(torch.equal(held(cache, row), before[row]) for row in range(3))
    k = torch.randn(3, 2, 1, 16)
    keys, values = cache.update(1, k, -k, cache.next_positions(1))
    cache.advance(1)
    assert keys.shape == (3, 2, 16, 16)
    for row, place in enumerate((9, 15, 3)):
        assert torch.equal(keys[row, :, place], k[row, :, 0]) and torch.equal(values[row, :, place], -k[row, :, 0])
        assert torch.equal(held(cache, row)[..., :place, :][0], before[row][0])


def test_rows_change_places():
    cache = filled_cache([4, 9, 0], seed=1)
    before = [held(cache, row).clone() for row in range(3)]
    cache.swap_rows(0, 1)
    cache.swap_rows(2, 0)
    cache.swap_rows(1, 1)
    assert cache.lengths == [0, 4, 9]
    assert torch.equal(held(cache, 1), before[0]) and torch.equal(held(cache, 2), before[1])


def test_a_row_begins_as_another_one():
    cache = filled_cache([4, 9, 6], seed=1)
    before = [held(cache, row).clone() for row in range(3)]
    cache.copy_start(1, 0, 7)
    cache.copy_start(2, 2, 5)
    assert cache.lengths == [7, 9, 5]
    assert torch.equal(held(cache, 0), before[1][..., :7, :]) and torch.equal(held(cache, 1), before[1])
    assert torch.equal(held(cache, 2), before[2][..., :5, :])
    with pytest.raises(ValueError, match="cannot copy 10 tokens; row 1 holds 9"):
        cache.copy_start(1, 0, 10)


def test_rows_as_a_cache_write_into_the_same_storage():
    cache = filled_cache([4, 9, 6, 2], seed=1)
    before = [held(cache, row).clone() for row in range(4)]
    part = cache.rows(1, 3)
    k = torch.randn(2, 2, 1, 16)
    part.update(1, k, -k, part.next_positions(1))
    part.advance(1)
    assert part.lengths == [10, 7] and cache.lengths == [4, 9, 6, 2]
    assert torch.equal(cache.keys[1][1, :, 9], k[0, :, 0]) and torch.equal(cache.values[1][2, :, 6], -k[1, :, 0])
    assert all(torch.equal(held(cache, row), before[row]) for row in range(4))


def test_a_wiped_row_holds_nothing():
    cache = filled_cache([4, 9], seed=1)
    before = held(cache, 0).clone()
    cache.wipe_row(1)
    assert cache.lengths == [4, 0] and not any(layer[1].any() for layer in (*cache.keys, *cache.values))
    assert torch.equal(held(cache, 0), before)


def test_bytes_of_a_token_are_those_reserved():
    cache = KVCache(small_config(), 3, 17, dtype=torch.bfloat16)
    size = sum(layer.nbytes for layer in (*cache.keys, *cache.values))
    assert size == 3 * 17 * KVCache.bytes_per_token(small_config(), torch.bfloat16)


def test_cache_errors():
    config = small_config()
    with pytest.raises(ValueError, match="257 tokens was asked for; the model has max_position_embeddings 256"):
        KVCache(config, 1, 257)
    with pytest.raises(ValueError, match="batch_size 0"):
        KVCache(config, 0, 8)
    with pytest.raises(ValueError, match="cannot rewind to 1 tokens; the cache holds 0"):
        KVCache(config, 2, 8).rewind([0, 1])
