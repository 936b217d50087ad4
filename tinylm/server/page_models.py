"""What the page gets from the server: the models, packed for a browser when they are first asked for."""

from __future__ import annotations

from functools import lru_cache

import anyio.to_thread

from tinylm.page.packed_model import packed_at
from tinylm.server.errors import ApiError, refused
from tinylm.server.served_models import ServedModel

LARGEST = 100_000_000
"""Parameters: a browser takes a second for each token of such a model."""
PAGE_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def packed_for_page(model: ServedModel, step: int | None = None) -> bytes:
    """The model in int8, its adapter merged; with a step, as it was then.

    Raises:
        ApiError: it is too large for a browser, its tokenizer is not one that the page knows, or there is no snapshot
            of that step.
    """
    if step is not None and step not in (steps := model.snapshots):
        known = ", ".join(map(str, steps)) or "none"
        message = f"{model.name} has no snapshot of step {step}; there are those of {known}"
        raise ApiError(404, message, "step", "snapshot_not_found")
    if model.num_parameters > LARGEST:
        message = f"{model.name} has {model.num_parameters:,} parameters; a browser computes at most {LARGEST:,}"
        raise ApiError(400, message, "model", "too_large_for_a_browser")
    try:
        return await anyio.to_thread.run_sync(_packed, model, step)
    except OSError as error:
        message = f"the files of {model.name} cannot be read any more ({error.strerror or error}); it still answers"
        raise ApiError(404, message, "model", "model_files_gone") from None
    except ValueError as error:
        raise refused(error, "model") from None


@lru_cache(maxsize=4)
def _packed(model: ServedModel, step: int | None) -> bytes:
    return packed_at(model.path, model.adapter, None if step is None else model.snapshots[step], "int8")
