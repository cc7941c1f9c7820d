"""What ``/metrics`` counts, in the text format of Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lowrank_cli.serving.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  #: buckets of times


class Metrics:
    """Counters and times of one server; those of its queue are read from the engine when somebody asks."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.answered = self.generated = 0  #: requests that were answered whole, and all tokens that were generated
        model = ["model"]

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(f"lrk_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"lrk_{name}", text, model, registry=self.registry, buckets=SECONDS)

        self.requests = counter("requests", "requests for answers, by how they ended", [*model, "outcome"])
        self.prompt_tokens = counter("prompt_tokens", "tokens of prompts", model)
        self.tokens = counter("generated_tokens", "tokens of answers", model)
        self.first_token = histogram("time_to_first_token_seconds", "from a request to its first token")
        self.each_token = histogram("time_per_token_seconds", "mean time of an answer's later tokens")
        self.whole = histogram("request_seconds", "from a request to its end")
        self.registry.register(_Queue(engine))

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self.registry)

    def forget(self, model: str) -> None:
        """Drop the figures of an unloaded model, so that names do not pile up."""
        for metric in (self.prompt_tokens, self.tokens, self.first_token, self.each_token, self.whole):
            metric.remove_by_labels({"model": model})
        self.requests.remove_by_labels({"model": model})


class Watch:
    """The times of one request; :meth:`end` has to be called in any case."""

    def __init__(self, metrics: Metrics, model: str, prompt_tokens: int):
        self.metrics, self.model = metrics, model
        self.started = time.monotonic()
        self.first: float | None = None  #: when its first token came, in s
        self.tokens = 0
        metrics.prompt_tokens.labels(model).inc(prompt_tokens)

    def token(self, count: int) -> None:
        """Count generated tokens."""
        now = time.monotonic()
        self.tokens += count
        if self.first is None:
            self.first = now
            self.metrics.first_token.labels(self.model).observe(now - self.started)

    def end(self, outcome: str, answers: int) -> None:
        """Record how the request ended: ``done``, ``failed`` or ``gone`` (the client)."""
        now = time.monotonic()
        self.metrics.answered += outcome == "done"
        self.metrics.generated += self.tokens
        self.metrics.requests.labels(self.model, outcome).inc()
        self.metrics.tokens.labels(self.model).inc(self.tokens)
        self.metrics.whole.labels(self.model).observe(now - self.started)
        if self.first is not None and self.tokens > answers:
            self.metrics.each_token.labels(self.model).observe((now - self.first) * answers / (self.tokens - answers))


class _Queue(Collector):
    """The engine's queue and batch, as they are."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterable[Metric]:
        engine = self.engine
        yield GaugeMetricFamily("lrk_running_answers", "answers being generated", engine.running)
        yield GaugeMetricFamily("lrk_waiting_answers", "answers waiting for that", engine.waiting)
        yield GaugeMetricFamily("lrk_models", "models that requests can ask for", len(engine.models))
