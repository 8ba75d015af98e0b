"""What the server counts, for Prometheus."""

from collections.abc import Callable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    Summary,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from fusion.deploy.serve.answers import Answer, labels_of

disable_created_metrics()  # a second series for each counter, with the time at which it was made
SECONDS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.35, 0.5, 0.75, 1, 2, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter("fusion_requests", "Requests by status; 499: the client left.", ["status", "version"], registry=registry)
        self.seconds = Histogram("fusion_request_seconds", "From a request's head to its answer.", registry=registry, buckets=SECONDS)
        self.batch_size = Histogram("fusion_batch_size", "Samples of each batch.", registry=registry, buckets=SIZES)
        self.batch_seconds = Histogram("fusion_batch_seconds", "Time of the model for a batch.", ["version"], registry=registry)
        self.queue_depth = Gauge("fusion_queue_depth", "Requests in progress.", registry=registry)
        self.connections = Gauge("fusion_connections", "Open connections.", registry=registry)
        self.rejections = Counter(
            "fusion_rejections", "Requests without an answer, by reason; shadow: copies that were shed.", ["reason"], registry=registry
        )
        self.missing = Counter("fusion_missing_inputs", "Answered requests without this input.", ["input"], registry=registry)
        self.confidence = Summary("fusion_confidence", "The probability of each answer.", registry=registry)
        self.answers = Counter("fusion_answers", "Answers by class; their shares show drift.", ["answer"], registry=registry)
        self.share = Gauge("fusion_version_share", "Share of the requests of each version.", ["version", "role"], registry=registry)
        self.comparisons = Counter("fusion_comparisons", "Answers compared with the main version's.", ["version"], registry=registry)
        self.disagreements = Counter("fusion_disagreements", "Answers that differ from the main version's.", ["version"], registry=registry)
        self.failures = Counter("fusion_failures", "Samples for which a version's model failed.", ["version"], registry=registry)
        self.rollbacks = Counter("fusion_rollbacks", "Versions rolled back automatically.", ["version", "reason"], registry=registry)
        self.children: dict[tuple[Any, ...], Any] = {}

    def count(self, counter: Counter, *labels: str) -> None:
        """Adds 1; the counter of these labels is looked up once."""
        key = (counter, *labels)
        child = self.children.get(key)
        if child is None:
            child = self.children[key] = counter.labels(*labels)
        child.inc()

    def answered(self, answer: Answer) -> None:
        """Counts what shows drift."""
        for name in answer.missing:
            self.count(self.missing, name)
        if answer.confidence is not None:
            self.confidence.observe(answer.confidence)
        for label in labels_of(answer.answer):
            self.count(self.answers, label)

    def watch(self, depth: Callable[[], float], connections: Callable[[], float]) -> None:
        """Gauges that are read whenever the metrics are."""
        self.queue_depth.set_function(depth)
        self.connections.set_function(connections)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
