"""Steps that cannot be computed. Such a step leaves no trace, so that it can be computed again in another way."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable, Iterator

from torch import Tensor

from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.memory import errors_behind, is_out_of_memory


class StepFailed(RuntimeError):
    """A step's gradients could not be computed: memory ran out, or the compiled model failed.

    Weights and optimizers are as they were before the step, and gradients are cleared.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(first_line(error))
        self.is_out_of_memory = is_out_of_memory(error)


@contextlib.contextmanager
def whole_or_undone(model: TinyLMForCausalLM, trained: Iterable[Tensor]) -> Iterator[None]:
    """Surrounds the computation of a step's gradients.

    Raises:
        StepFailed: in place of any error if memory ran out or the model is compiled. All other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if not (model.is_compiled or is_out_of_memory(error)):
            raise
        for each in errors_behind(error):
            traceback.clear_frames(each.__traceback__)  # their variables hold the activations
        for parameter in trained:
            parameter.grad = None
        raise StepFailed(error) from error


def first_line(error: BaseException) -> str:
    """What happened, in a line. torch.compile wraps the error that knows the reason."""
    while inner := getattr(error, "inner_exception", None):
        error = inner
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
