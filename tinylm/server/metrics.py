"""Counters of a server in Prometheus' format, under the names that vLLM gives them, so that its dashboards work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from tinylm.server.served_models import ServedModels

_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}
_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_LONG = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)


class Metrics:
    """What a server counts. Times are in seconds.

    Args:
        models: whose schedulers are asked how much they have to do, at each look.
    """

    def __init__(self, models: ServedModels) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Load(models))
        name = ["model_name"]
        self._read = Counter("vllm:prompt_tokens", "tokens of prompts", name, registry=registry)
        self._written = Counter("vllm:generation_tokens", "tokens of answers", name, registry=registry)
        by_reason = [*name, "finished_reason"]
        self._ended = Counter("vllm:request_success", "answers that ended", by_reason, registry=registry)
        self._first, self._next, self._whole = (
            Histogram(f"vllm:{figure}_seconds", text, name, buckets=buckets, registry=registry)
            for figure, text, buckets in (
                ("time_to_first_token", "from request to first token", _SHORT),
                ("inter_token_latency", "from token to token", _SHORT),
                ("e2e_request_latency", "from request to last token", _LONG),
            )
        )

    def wrote(self, model: str, num_tokens: int, seconds: float, is_first: bool) -> None:
        """A step brought tokens of an answer, so long after the step before it, or after the request."""
        self._written.labels(model).inc(num_tokens)
        (self._first if is_first else self._next).labels(model).observe(seconds)

    def ended(self, model: str, reason: str, prompt_tokens: int = 0, seconds: float | None = None) -> None:
        """An answer ended; without `seconds`, because nobody waits for it."""
        self._read.labels(model).inc(prompt_tokens)
        self._ended.labels(model, _REASONS[reason]).inc()
        if seconds is not None:
            self._whole.labels(model).observe(seconds)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)


class _Load:
    """What the schedulers have to do now."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    def collect(self) -> Iterator[GaugeMetricFamily]:
        gauges = {
            "num_requests_running": ("requests that are being answered", lambda s: s.num_running),
            "num_requests_waiting": ("requests that wait for a place", lambda s: s.num_waiting),
            "kv_cache_usage_perc": ("share of the places in use, from 0 to 1", lambda s: s.num_running / s.max_streams),
        }
        for name, (text, figure) in gauges.items():
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            for model in self._models:
                family.add_metric([model.name], figure(model.scheduler))
            yield family
