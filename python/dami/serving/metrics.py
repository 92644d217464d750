"""The metrics that a server exports to Prometheus at `GET /metrics`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dami.serving.controller import IntensityController
from dami.serving.engine import Load

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
LAMBDAS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


class Metrics:
    """The metrics of one server.

    Args:
        load: returns the engine's current load.
        alive: returns whether the engine still generates.
        controller: the controller of λ, if there is one.
    """

    def __init__(
        self, load: Callable[[], Load], alive: Callable[[], bool], controller: IntensityController | None = None
    ) -> None:
        self.registry = CollectorRegistry()
        gauges: list[tuple[str, str, Callable[[], float]]] = [
            ("dami_requests_waiting", "Sequences that no step has taken up yet.", lambda: load().waiting),
            ("dami_requests_running", "Sequences that are being generated.", lambda: load().running),
            ("dami_kv_cache_usage_ratio", "Share of the KV cache in use.", lambda: load().kv),
            ("dami_engine_alive", "1 while the engine generates, 0 when it has died.", alive),
        ]
        if controller is not None:
            gauges += [
                ("dami_intensity_cap", "Highest λ that an adjustable request is granted now.", lambda: controller.cap),
                ("dami_pressure_ratio", "Expected latency as a share of the target.", lambda: controller.pressure),
            ]
        for name, text, value in gauges:
            Gauge(name, text, registry=self.registry).set_function(value)
        self.requests = Counter(
            "dami_http_requests", "Answered HTTP requests.", ["path", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("dami_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.cached_tokens = Counter(
            "dami_cached_prompt_tokens",
            "Tokens of prompts that were not read, because the KV cache had them.",
            registry=self.registry,
        )
        self.generated_tokens = Counter("dami_generated_tokens", "Tokens generated.", registry=self.registry)
        self.finished = Counter("dami_sequences", "Sequences by how they ended.", ["reason"], registry=self.registry)
        self.first_token = self._seconds("dami_time_to_first_token_seconds", "From arrival to the first token.")
        self.per_token = self._seconds("dami_time_per_output_token_seconds", "Per token after the first.")
        self.whole = self._seconds("dami_request_seconds", "From arrival to the last token.")
        self.intensity = Histogram("dami_intensity", "λ granted.", buckets=LAMBDAS, registry=self.registry)
        self.lowered = Counter(
            "dami_requests_lowered", "Requests granted less than they asked for.", registry=self.registry
        )

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=SECONDS, registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
