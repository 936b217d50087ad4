"""What the routes of a server share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

from tinylm.server.errors import ApiError
from tinylm.server.metrics import Metrics
from tinylm.server.settings import ServeSettings

if TYPE_CHECKING:
    from tinylm.server.served_models import ServedModels


@dataclass
class ServerState:
    """The settings, and the models once they are loaded."""

    settings: ServeSettings
    loaded: ServedModels | None = None
    counted: Metrics | None = None

    @property
    def models(self) -> ServedModels:
        """The models; ApiError while they are being loaded."""
        if self.loaded is None:
            raise ApiError(503, "the models are being loaded; try again in a moment", code="loading")
        return self.loaded

    @property
    def metrics(self) -> Metrics:
        """The counters; ApiError while the models are being loaded."""
        assert self.models and self.counted is not None
        return self.counted

    def use(self, models: ServedModels) -> None:
        """Serve these models from now on."""
        self.counted = Metrics(models)
        self.loaded = models


def state_of(request: Request) -> ServerState:
    """The state of the server that a request came to."""
    return request.app.state.server
