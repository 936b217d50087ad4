"""Our AdamW and Muon against torch's, which parameters decay, and the schedule."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from trainer_parts import batch_of, random_documents, small_model

from tinylm.model import model_tinylm
from tinylm.model.lora import LoRAConfig, apply_lora
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.core.optimizer import (
    POLYNOMIALS,
    AdamW,
    Muon,
    cosine_with_warmup,
    make_optimizers,
    newton_schulz,
    orthogonalize,
    split_parameters,
)
from tinylm.trainer.run.train_settings import TrainSettings


def train_side_by_side(ours, theirs, pairs, steps: int, model) -> None:
    """The same gradients, of a real loss, to both; then the weights must agree."""
    for step in range(steps):
        model.zero_grad(set_to_none=True)
        batch = batch_of(random_documents(4, seed=step))
        (next_token_loss(model, batch)[0] / batch.count).backward()
        for mine, other in pairs:
            other.grad = None if mine.grad is None else mine.grad.clone()
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 + step % 3)
            optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_our_adamw_is_torchs(weight_decay):
    model = small_model()
    mine = list(model.parameters())
    start = [p.detach().clone() for p in mine]
    others = [nn.Parameter(p.detach().clone()) for p in mine]
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    ours, theirs = AdamW(mine, **settings), torch.optim.AdamW(others, **settings)
    train_side_by_side(ours, theirs, list(zip(mine, others, strict=True)), 100, model)
    for p, other, before in zip(mine, others, start, strict=True):
        torch.testing.assert_close(p.detach(), other.detach(), atol=1e-6, rtol=1e-6)
        assert (p.detach() - before).abs().max() > 0.1


def ours_for_torch(gradient, coefficients, steps, eps):
    """Our `orthogonalize` in the form in which torch's Muon calls its own."""
    tall = gradient.shape[0] > gradient.shape[1]
    update = orthogonalize((gradient.mT if tall else gradient)[None])[0]
    return update.mT if tall else update


@pytest.mark.parametrize("same_iteration", [True, False])
def test_our_muon_is_torchs(same_iteration, monkeypatch):
    """Square, wide and tall matrices. With our iteration in torch's Muon, all the rest is the same but for the order of
    bfloat16 sums; with torch's own, which starts lower and takes a step more, the weights go nearly the same way."""
    if same_iteration:
        monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", ours_for_torch)
    model = small_model()
    mine, _ = split_parameters(model)
    assert len({tuple(p.shape) for p in mine}) >= 4
    start = [p.detach().clone() for p in mine]
    others = [nn.Parameter(p.detach().clone()) for p in mine]
    ours = Muon(mine, weight_decay=0.1)
    theirs = torch.optim.Muon(others, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    train_side_by_side(ours, theirs, list(zip(mine, others, strict=True)), 20, model)
    for p, other, before in zip(mine, others, start, strict=True):
        moved = (p.detach() - before).norm()
        assert moved > 0.5
        assert (p.detach() - other.detach()).norm() < (0.02 if same_iteration else 0.25) * moved


@pytest.mark.parametrize("shape", [(16, 24), (8, 24), (16, 40)])
def test_orthogonalised_singular_values_are_near_one(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, *shape)))
    assert values.shape == (3, min(shape)) and 0.6 < values.min() and values.max() < 1.25


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("columns", [96, 170])
def test_three_steps_get_as_far_as_torchs_five(decay, columns):
    """Distance to the nearest semi-orthogonal matrix U V^T, from spectra that fall as 1 / rank^decay."""
    random = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(random, full_matrices=False)
    matrix = u @ torch.diag(torch.arange(1, 65) ** -decay) @ v
    theirs = torch.optim._muon._zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    ours, nearest = orthogonalize(matrix[None])[0], u @ v
    assert (ours - nearest).norm() < 1.1 * (theirs - nearest).norm()
    assert orthogonalize(1e-20 * matrix[None]).isfinite().all() and not orthogonalize(torch.zeros(1, 8, 8)).any()


def test_the_polynomials_bring_singular_values_near_one():
    """What their docstring says."""

    def after(values):
        for a, b, c in POLYNOMIALS:
            values = a * values + b * values**3 + c * values**5
        return values

    values = after(torch.logspace(-2, 0, 2000, dtype=torch.float64))
    assert 0.58 < values.min() and values.max() < 1.18
    assert 0.13 < (values - 1).square().mean().sqrt() < 0.14
    assert after(torch.linspace(1, 1.03, 100)).max() < 1.18


@pytest.mark.parametrize("shape", [(32, 32), (64, 100), (256, 256), (8, 700)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_orthogonalize_keeps_low_ranks_in_bounds(shape, rank, monkeypatch):
    """The largest singular value is then the whole norm; rounded to bfloat16 it may come to lie above the bound."""
    monkeypatch.setattr("tinylm.trainer.core.optimizer.device_has_bf16", lambda device: True)
    rows, columns = shape
    generator = torch.Generator().manual_seed(rank)
    for _ in range(5):
        left = torch.randn(8, rows, rank, generator=generator) * (0.3 + torch.rand(rank, generator=generator))
        right = torch.randn(8, rank, columns, generator=generator)
        values = torch.linalg.svdvals(orthogonalize(left @ right))
        assert 0.6 < values[:, rank - 1].min() and values.max() < 1.5  # 1.18 without rounding


@pytest.mark.parametrize("shape", [(16, 16), (16, 24), (16, 25), (16, 60)], ids=str)
@pytest.mark.parametrize("has_bf16", [True, False])
def test_orthogonalize_is_newton_schulz(shape, has_bf16, monkeypatch):
    """On the matrix and on its Gram matrix; a tenth of the directions are a thousand times smaller than the others.

    It always computed in bfloat16, which took 25 times as long as float32 on a CPU that has none.
    """
    monkeypatch.setattr("tinylm.trainer.core.optimizer.device_has_bf16", lambda device: has_bf16)
    matrices = 7.0 * torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    matrices[:, :2] *= 1e-3
    exact = newton_schulz(matrices.double())
    error = (orthogonalize(matrices) - exact).norm() / exact.norm()
    assert (1e-3 < error < 0.1) if has_bf16 else error < 1e-5


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_inside_the_blocks_decay(tied, name, positions):
    """The original project decayed everything. Norms, biases, tables and the head must be left alone."""
    shape = {"attention_bias": True, "mlp_bias": True, "qk_norm": True, "position_embedding_type": positions}
    model = small_model(tie_word_embeddings=tied, **shape)
    optimizers = make_optimizers(model, name, weight_decay=0.1)
    decay = {id(p): g["weight_decay"] for o in optimizers for g in o.param_groups for p in g["params"]}
    names = {id(p): n for n, p in model.named_parameters()}
    assert decay.keys() == names.keys()
    decayed = {names[key] for key, value in decay.items() if value}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert decayed == {n for n in names.values() if n.endswith(".weight") and n.split(".")[-2] in projections}
    kept = set(names.values()) - decayed
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= kept
    assert ("lm_head.weight" in kept) == (not tied) and any(n.endswith(".bias") for n in kept)
    with_muon = {names[id(p)] for o in optimizers if isinstance(o, Muon) for g in o.param_groups for p in g["params"]}
    assert with_muon == (decayed if name == "muon" else set())


class Experts(nn.Module):
    """Two stacks of three matrices [out, in], and a scale for each expert."""

    parameter_roles: ClassVar = {"up_proj": "matrix", "down_proj": "matrix", "gain": "vector"}

    def __init__(self, width: int):
        super().__init__()
        self.up_proj = nn.Parameter(torch.full((3, 2 * width, width), torch.nan))
        self.down_proj = nn.Parameter(torch.full((3, width, 2 * width), torch.nan))
        self.gain = nn.Parameter(torch.tensor([1.0, 0.5, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("btc,eoc->beto", x, self.up_proj).relu()
        return torch.einsum("beto,eco,e->btc", hidden, self.down_proj, self.gain)


@pytest.fixture
def expert_model(monkeypatch):
    monkeypatch.setattr(model_tinylm, "SwiGLU", lambda config: Experts(config.hidden_size))
    return small_model(num_hidden_layers=2)


def test_expert_stacks_are_initialised(expert_model):
    """They were left as they came from memory, since they are not two-dimensional."""
    experts = expert_model.model.layers[1].mlp
    assert experts.up_proj.std().item() == pytest.approx(0.3, rel=0.1)
    assert experts.down_proj.std().item() == pytest.approx(0.3 / 2, rel=0.1)  # written into the residual stream
    assert experts.gain.tolist() == [1.0, 0.5, 2.0]


def test_each_expert_learns_as_a_matrix_of_its_own(expert_model):
    """Muon and decay on a stack [3, out, in] are those on three matrices."""
    muon, _ = make_optimizers(expert_model, "muon", learning_rate=0.02, weight_decay=0.3)
    names = {id(p): name for name, p in expert_model.named_parameters()}
    with_muon = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert {f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("up", "down")} <= with_muon
    assert not any("gain" in name for name in with_muon)
    stacks = [p for p in muon.param_groups[0]["params"] if p.ndim == 3]
    single = [[nn.Parameter(matrix.detach().clone()) for matrix in stack] for stack in stacks]
    alone = Muon([p for matrices in single for p in matrices], lr=0.02, weight_decay=0.3)
    before = [stack.detach().clone() for stack in stacks]
    for step in range(3):
        expert_model.zero_grad()
        batch = batch_of(random_documents(4, seed=step))
        (next_token_loss(expert_model, batch)[0] / batch.count).backward()
        for stack, matrices in zip(stacks, single, strict=True):
            for place, matrix in enumerate(matrices):
                matrix.grad = stack.grad[place].clone()
        muon.step()
        alone.step()
    for stack, matrices, start in zip(stacks, single, before, strict=True):
        torch.testing.assert_close(stack.detach(), torch.stack([m.detach() for m in matrices]), atol=1e-4, rtol=1e-3)
        assert (stack.detach() - start).abs().max() > 1e-2


def test_a_parameter_without_a_role_is_named():
    model = small_model()
    model.model.layers[0].mlp.router = nn.Bilinear(2, 2, 2)
    message = "the parameter model.layers.0.mlp.router.weight has no role; state matrix, table or vector for 'weight'"
    with pytest.raises(ValueError, match=f"{message} in Bilinear.parameter_roles"):
        make_optimizers(model)


def test_weights_without_decay_stay_when_nothing_pulls_at_them():
    """The same by its effect: with zero gradients a decayed matrix shrinks, a norm and an embedding do not."""
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in make_optimizers(model, "adamw", learning_rate=0.1, weight_decay=0.5):
        optimizer.step()
    for name, parameter in model.named_parameters():
        share = 0.95 if "_proj" in name else 1.0
        torch.testing.assert_close(parameter.detach(), share * before[name], msg=name)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_under_lora_only_the_adapter_is_trained(name):
    model = apply_lora(small_model(), LoRAConfig(rank=2))
    optimizers = make_optimizers(model, name)
    held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    assert held == {id(p) for n, p in model.named_parameters() if "lora_" in n} and held


def test_optimizer_errors():
    model = small_model()
    with pytest.raises(ValueError, match="optimizer is 'sgd'; expected one of adamw, muon"):
        make_optimizers(model, "sgd")
    with pytest.raises(ValueError, match="no trainable matrices"):
        make_optimizers(model.requires_grad_(False))


def test_schedule_by_its_equation():
    """Up from a small rate, a peak where the warm-up ends, a cosine, and a tenth of the peak at the end."""
    rates = [cosine_with_warmup(step, 1000, 50, peak=2e-3) for step in range(1001)]
    assert rates[0] == pytest.approx(2e-3 / 50)
    assert rates[:50] == pytest.approx([2e-3 * (i + 1) / 50 for i in range(50)])
    assert rates[49] == rates[50] == max(rates) == pytest.approx(2e-3)
    assert all(a > b for a, b in zip(rates[50:], rates[51:], strict=False))
    for step in (50, 287, 525, 999):
        turn = math.pi * (step - 50) / 950
        assert rates[step] == pytest.approx(2e-3 * (0.1 + 0.9 * (1 + math.cos(turn)) / 2), rel=1e-12)
    assert rates[1000] == pytest.approx(2e-4) and rates[999] == pytest.approx(2e-4, rel=1e-4)
    assert cosine_with_warmup(5000, 1000, 50, peak=2e-3) == pytest.approx(2e-4)  # never past its end
    assert cosine_with_warmup(0, 1, 0) == 1.0  # a run of one step is at the peak


def test_settings_reach_the_schedule():
    settings = TrainSettings(learning_rate=1e-2, warmup_fraction=0.1, final_lr_fraction=0.25)
    assert settings.learning_rate_at(0, 100) == pytest.approx(1e-3)
    assert settings.learning_rate_at(10, 100) == pytest.approx(1e-2)
    assert settings.learning_rate_at(100, 100) == pytest.approx(2.5e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"accumulation_steps": 0}, "accumulation_steps is 0; expected at least 1"),
        ({"max_steps": -1}, "max_steps is -1; expected at least 0"),
        ({"warmup_fraction": 1.0}, "warmup_fraction is 1.0; expected a share"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**change)


def test_every_setting_of_an_optimizer_reaches_it():
    """All stages make theirs by this one call, so a flag that is parsed and dropped would be dropped everywhere."""
    for name in ("adamw", "muon"):
        settings = TrainSettings(optimizer=name, learning_rate=0.03, weight_decay=0.4, beta1=0.7, beta2=0.8)
        optimizers = settings.make_optimizers(small_model())
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        assert [group["lr"] for group in groups] == [0.03, 0.03]
        assert [group["weight_decay"] for group in groups] == [0.4, 0.0]
        assert [group["betas"] for group in groups if "betas" in group] == [(0.7, 0.8)] * (2 if name == "adamw" else 1)
        assert isinstance(optimizers[0], Muon) == (name == "muon")
