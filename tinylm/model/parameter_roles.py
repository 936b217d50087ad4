"""What each parameter is for. Initialisation and optimizers go by this, never by a parameter's shape.

A module class of ours states the roles of its own parameters:

    class Experts(nn.Module):
        parameter_roles = {"up_proj": "matrix"}     # [E, out, in]: a stack of E matrices
"""

from __future__ import annotations

from typing import Literal

from torch import nn

Role = Literal["matrix", "table", "vector"]
"""matrix: a linear map between hidden states, [out, in], or a stack of such, [E, out, in].
table: a row for each token or position, as in an embedding or the output head.
vector: a scale or a bias."""

_KNOWN: dict[type[nn.Module], dict[str, Role]] = {
    nn.Linear: {"weight": "matrix", "bias": "vector"},
    nn.Embedding: {"weight": "table"},
}


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter by its name, in the order of `model.named_parameters()`.

    Raises:
        ValueError: a module does not state the role of one of its parameters.
    """
    stated: dict[int, Role] = {}
    for prefix, module in model.named_modules():
        roles = _roles_of(module)
        for name, parameter in module.named_parameters(recurse=False):
            if name not in roles:
                full_name = f"{prefix}.{name}".lstrip(".")
                raise ValueError(
                    f"the parameter {full_name} has no role; state matrix, table or vector for {name!r} in "
                    f"{type(module).__name__}.parameter_roles"
                )
            stated[id(parameter)] = roles[name]
    return {name: stated[id(parameter)] for name, parameter in model.named_parameters()}


def _roles_of(module: nn.Module) -> dict[str, Role]:
    own = getattr(type(module), "parameter_roles", None)
    if own is not None:
        return own
    return next((roles for known, roles in _KNOWN.items() if isinstance(module, known)), {})
