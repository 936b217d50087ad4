"""Optimizers and the learning-rate schedule: AdamW and Muon, each beside its equation.

Which parameter gets what, by the role that its module states (`tinylm/model/parameter_roles.py`):
- matrices, single or in a stack of experts: weight decay; Muon's orthogonalised update when `optimizer="muon"`;
- tables (embeddings, output head): AdamW, no decay (a rare token's row would only shrink between its visits);
- vectors (norms, biases): AdamW, no decay (decaying a scale towards zero silences its channel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tinylm.model.parameter_roles import parameter_roles
from tinylm.system.runtime import device_has_bf16
from tinylm.trainer.core.distributed import full_tensor, shard_like

OPTIMIZERS = ("adamw", "muon")


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as (those with the role of a matrix, everything else), each in the model's order."""
    roles = parameter_roles(model)
    trainable = [(roles[name], p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for role, p in trainable if role == "matrix"]
    others = [p for role, p in trainable if role != "matrix"]
    return matrices, others


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101), written to be read.

        m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g^2
        p = p - lr * wd * p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Equal to `torch.optim.AdamW` (a test compares them over 100 steps). `make_optimizers` takes torch's fused kernel
    instead, which reads memory once, while this class reads it ten times.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. `closure` is not used."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                t = state["step"].item()
                m, v = state["exp_avg"], state["exp_avg_sq"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
                p.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**t))


POLYNOMIALS = ((7.582, -20.645, 14.333), (3.407, -2.581, 0.531), (2.397, -1.720, 0.415))
"""(a, b, c) of each step of `orthogonalize`, fitted to bring singular values from 0.01 to 1 as near to 1 as three steps
can: into [0.58, 1.18], with a root mean square distance of 0.14 over log s. Values up to 1.03 stay in this range; from
1.05 on the steep first step would throw them out of it."""
MARGIN = 1.02
"""Singular values start this much lower than they need to, because rounding to bfloat16 changes them by up to 1%."""


def newton_schulz(matrices: Tensor) -> Tensor:
    """`orthogonalize` as it is defined, in the dtype of `matrices` [N, rows, columns]; to read, and to test against.

    X <- X / (MARGIN ||X X^T||_F^(1/2));   for each (a, b, c):   X <- a X + b A X + c A A X,  A = X X^T
    """
    x = matrices / (MARGIN * (matrices @ matrices.mT).norm(dim=(1, 2), keepdim=True).sqrt() + 1e-30)
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices U V^T, roughly: `newton_schulz` in fewer operations.

    A polynomial in X X^T applied to X changes its singular values s and nothing else, to p(s) = a s + b s^3 + c s^5
    (Jordan 2024, "Muon: an optimizer for hidden layers"). A few steps bring most of them near 1, close enough for an
    update direction. Jordan takes five equal steps from X / ||X||_F. Two changes save two of them:
    - s must start at 1 or below. The Gram matrix, which the first step needs anyway, gives (sum s^4)^(1/4), a bound
      several times closer to the largest s than the Frobenius norm (sum s^2)^(1/2).
    - Each step has its own polynomial, steep first and flat last (Amsel et al. 2025, "The Polar Express",
      arXiv:2505.16932).

    Wide matrices are multiplied only twice, because the Gram matrix can take the steps alone:
        P = a I + b A + c A A,   A <- P A P,   Q <- P Q,   at the end X <- Q X

    Products are in bfloat16 where the hardware has it; a CPU that must emulate it takes 25 times as long as in float32.

    Args:
        matrices: [N, rows, columns] with rows <= columns, so that A is the smaller of the two Gram matrices.
    """
    x = matrices.to(torch.bfloat16 if device_has_bf16(matrices.device) else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # so that no product over- or underflows
    gram = torch.bmm(x, x.mT)
    scale = MARGIN**2 * gram.norm(dim=(1, 2), keepdim=True) + 1e-7
    x, gram = x / scale.sqrt(), gram / scale
    rows, columns = x.shape[1:]
    steps = _steps_on_gram if 2 * columns > 3 * rows else _steps_on_matrix
    return steps(x, gram).to(matrices.dtype)


def _steps_on_matrix(x: Tensor, gram: Tensor) -> Tensor:
    for step, (a, b, c) in enumerate(POLYNOMIALS):
        if step:
            gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _steps_on_gram(x: Tensor, gram: Tensor) -> Tensor:
    product: Tensor | None = None
    for step, (a, b, c) in enumerate(POLYNOMIALS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else torch.bmm(polynomial, product)
        if step + 1 < len(POLYNOMIALS):
            gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
    assert product is not None
    return torch.bmm(product, x)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a matrix learns at the same rate (Jordan 2024).

        m = mu m + (1 - mu) g;   u = orthogonalize((1 - mu) g + mu m);   p = p - lr * wd * p - lr * scale * u

    `scale` = 0.2 sqrt(max(rows, columns)) gives the update AdamW's usual root mean square (Liu et al. 2025,
    arXiv:2502.16982), so both optimizers take the same learning rate. Its oracle in the tests is
    `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`.

    Matrices of one shape, transposed or not, are orthogonalised together: a tiny model has many small ones, and one
    batched product of twelve costs little more than half of twelve products. In a stack [E, out, in], each of the E
    matrices is orthogonalised separately.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient. `closure` is not used."""
        # `foreach` functions treat all matrices in one call: a GPU would wait for hundreds of small ones to be started.
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            same_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
            for p, direction in zip(trained, self._directions(trained, group["momentum"]), strict=True):
                same_shape.setdefault(tuple(sorted(p.shape[-2:])), []).append((p, direction))
            if trained:
                torch._foreach_mul_(trained, 1 - group["lr"] * group["weight_decay"])
            for (rows, columns), members in same_shape.items():
                stacks = [direction.reshape(-1, rows, columns) for _, direction in members]
                updates = orthogonalize(torch.cat(stacks)).split([len(stack) for stack in stacks])
                changes = [
                    shard_like(p, _wide(p, update.view_as(direction)))
                    for (p, direction), update in zip(members, updates, strict=True)
                ]
                torch._foreach_add_([p for p, _ in members], changes, alpha=-group["lr"] * 0.2 * math.sqrt(columns))

    def _directions(self, trained: list[Tensor], mu: float) -> list[Tensor]:
        """Nesterov's look one step ahead, transposed if necessary: [..., rows, columns] with rows <= columns."""
        for p in trained:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in trained]
        gradients = [p.grad for p in trained if p.grad is not None]
        if not trained:
            return []
        torch._foreach_lerp_(momenta, gradients, 1 - mu)
        ahead = torch._foreach_lerp(gradients, momenta, mu)
        # The full matrices: a shard cannot be orthogonalised alone.
        return [_wide(p, full_tensor(direction)) for p, direction in zip(trained, ahead, strict=True)]


def _wide(p: Tensor, matrix: Tensor) -> Tensor:
    """`matrix` transposed if `p` is taller than wide; twice gives the matrix back."""
    return matrix.mT if p.shape[-2] > p.shape[-1] else matrix


def make_optimizers(
    model: nn.Module,
    name: str = "adamw",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
) -> list[torch.optim.Optimizer]:
    """The optimizers of a run, over the model's trainable parameters, stepped together: one AdamW, or Muon and AdamW.

    Raises:
        ValueError: unknown name, or nothing to train.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is {name!r}; expected one of {', '.join(OPTIMIZERS)}")
    matrices, others = split_parameters(model)
    if not matrices:
        raise ValueError("the model has no trainable matrices; unfreeze some or apply an adapter first")
    no_decay = [{"params": others, "weight_decay": 0.0}] if others else []
    if name == "adamw":
        groups = [{"params": matrices, "weight_decay": weight_decay}, *no_decay]
        return [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    muon = Muon(matrices, lr=learning_rate, weight_decay=weight_decay)
    adamw = [torch.optim.AdamW(no_decay, lr=learning_rate, betas=betas, fused=True)] if no_decay else []
    return [muon, *adamw]


def cosine_with_warmup(
    step: int, num_steps: int, warmup_steps: int, peak: float = 1.0, final_fraction: float = 0.1
) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then a cosine down to a tenth.

        lr = peak * (step + 1) / warmup                                       while step < warmup
        lr = peak * (f + (1 - f) * (1 + cos(pi * progress)) / 2)              after, f = final_fraction

    Steps are *optimizer* steps; counting micro-batches here would run past the schedule's end.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
