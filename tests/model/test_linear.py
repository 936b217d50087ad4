"""The linear layer: nn.Linear's numbers, whichever product is taken, and when that is."""

from __future__ import annotations

import pytest
import torch

from tests.model.small_models import small_model
from tinylm.model import linear as module
from tinylm.model.linear import FEW_TOKENS, Linear


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """Of each product, whether it was oneDNN's."""
    if not module.HAS_ONEDNN:
        pytest.skip("this build of torch has no oneDNN")
    seen: list[bool] = []
    real = module._are_few
    monkeypatch.setattr(module, "_are_few", lambda x, weight: seen.append(real(x, weight)) or seen[-1])
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 17), (2, 16), (33, 1), (2, 40)])
@pytest.mark.parametrize("size", [(1, 5), (72, 100), (512, 301)])
def test_every_product_is_exact(size, shape, bias, taken):
    torch.manual_seed(0)
    layer = Linear(*size, bias=bias)
    x = torch.randn(shape[1], shape[0], size[0]).transpose(0, 1)  # not contiguous, as a head's input
    with torch.no_grad():
        y = layer(x)
    assert taken == [shape[0] * shape[1] <= FEW_TOKENS]
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert y.shape == (*shape, size[1]) and y.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


def test_gradients_other_precisions_and_no_tokens_take_the_usual_product(taken):
    layer, x = Linear(8, 4), torch.ones(1, 8)
    layer(x).sum().backward()
    assert taken == [] and layer.weight.grad.eq(1).all()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert Linear(8, 4).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        assert layer(torch.ones(0, 8)).shape == (0, 4)
        assert layer.to("meta")(x.to("meta")).shape == (1, 4)
    assert taken == [False] * 4


def test_damage_shows_and_a_weight_that_changes_is_followed(taken):
    """A model that is being trained is sampled between its steps: nothing of the old weights may be kept."""
    layer, x = Linear(64, 32, bias=False), torch.ones(1, 64)
    with torch.no_grad():
        for value in (0.5, -2.0):
            layer.weight.fill_(value)
            assert layer(x).eq(64 * value).all()
        layer.weight[3, 5] = torch.nan
        assert layer(x).isnan().sum() == 1
    assert taken == [True] * 3


def test_the_model_decodes_with_it(taken):
    model = small_model().eval()
    cache = model.new_cache(1, 4)
    with torch.inference_mode():
        model.lm_head(model.hidden_states(torch.tensor([[5]]), cache=cache))
    assert taken == [True] * (7 * model.config.num_hidden_layers + 1)
