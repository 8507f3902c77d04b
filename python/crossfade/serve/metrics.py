"""What Prometheus reads at /metrics."""

from __future__ import annotations

import dataclasses
import numbers
import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from .calls import Calls
from .contract import Session

SHORT = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LONG = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The figures of one server. Those of the session are read when they are asked for."""

    def __init__(self, session: Session, calls: Calls) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "crossfade_http_requests",
            "Requests, by what they asked for and how they were answered",
            ["path", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "crossfade_http_seconds",
            "How long requests took",
            ["path"],
            buckets=LONG,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "crossfade_prompt_tokens", "Tokens of prompts", registry=self.registry
        )
        self.new_tokens = Counter(
            "crossfade_generated_tokens", "Tokens that were written", registry=self.registry
        )
        self.first = Histogram(
            "crossfade_time_to_first_token_seconds",
            "From the request to the first token of a text",
            buckets=LONG,
            registry=self.registry,
        )
        self.between = Histogram(
            "crossfade_time_per_token_seconds",
            "Between tokens of a text, after the first one",
            buckets=SHORT,
            registry=self.registry,
        )
        self.registry.register(_OfSession(session, calls))

    def clock(self) -> Clock:
        """What measures one text, from now on."""
        return Clock(self)

    def read(self, tokens: int) -> None:
        """Count the tokens of prompts."""
        self.prompt_tokens.inc(tokens)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request. `path` is that of the route, of which there are few."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Clock:
    """The times of the tokens of one text."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.last, self.begun = metrics, time.monotonic(), False

    def wrote(self, tokens: int) -> None:
        """Count tokens that have just come."""
        if not tokens:
            return
        now = time.monotonic()
        passed, self.last = now - self.last, now
        self.metrics.new_tokens.inc(tokens)
        if self.begun:
            self.metrics.between.observe(passed / tokens)
        else:
            self.metrics.first.observe(passed)
        self.begun = True


class _OfSession:
    """Figures that the session keeps itself."""

    def __init__(self, session: Session, calls: Calls) -> None:
        self.session, self.calls = session, calls

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        session = self.session
        for name, what, value in (
            ("alive", "Whether the engine serves requests", session.alive),
            ("running", "Texts that are being written", session.running),
            ("waiting", "Texts that wait for a free row", session.waiting),
            ("load", "Rows times terms of all requests", self.calls.load),
        ):
            yield GaugeMetricFamily(f"crossfade_{name}", what, float(value))
        stats = session.stats()
        for field in dataclasses.fields(stats):
            value = getattr(stats, field.name)
            name = f"crossfade_session_{field.name}"
            what = f"SessionStats.{field.name} of crossfade.Session"
            if isinstance(value, numbers.Real):
                yield GaugeMetricFamily(name, what, float(value))
            elif isinstance(value, Mapping):
                family = GaugeMetricFamily(name, what, labels=["reason"])
                for reason, count in value.items():
                    family.add_metric([reason], float(count))
                yield family
