"""Metrics for Prometheus, counted as things happen.

If PROMETHEUS_MULTIPROC_DIR is in the environment before prometheus_client is imported (gunicorn.conf.py), the workers of a host share
their figures through memory-mapped files in that folder. Several receivers of one process share these, too. The label `folder` tells
them apart.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

REASON_CLASSES = (
    "token", "forbidden", "headers", "agent", "query", "not_found", "method", "encoding", "length_required", "empty",
    "malformed_form", "truncated", "too_large", "sha256", "invalid_root_file", "no_room", "unavailable", "fault", "client_gone",
    "request",
)  # fmt: skip
OTHER = "other"

_MAX_AGENTS = 200  # agents with series of their own; a sender can invent agents
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_NAME = "dqm_receiver_"

_registry = CollectorRegistry()
_uploads = Counter(_NAME + "uploads", "Uploads by outcome", ("folder", "agent", "outcome"), registry=_registry)
_bytes = Counter(_NAME + "accepted_bytes", "Bytes of files stored or replaced", ("folder", "agent"), registry=_registry)
_rejections = Counter(
    _NAME + "rejections", "Refused requests by class of reason", ("folder", "reason"), registry=_registry
)
_checks = Counter(_NAME + "checks", "Uploads that were only checked", ("folder", "result"), registry=_registry)
_upload_seconds = Histogram(
    _NAME + "upload_seconds", "Seconds to receive and commit a file", ("folder",), buckets=_SECONDS, registry=_registry
)
_validation_seconds = Histogram(
    _NAME + "validation_seconds", "Seconds to validate a file", ("folder",), buckets=_SECONDS, registry=_registry
)
_last_accepted = Gauge(
    _NAME + "last_accepted_timestamp_seconds",
    "Time of the last accepted file",
    ("folder", "agent"),
    multiprocess_mode="max",
    registry=_registry,
)
_in_progress = Gauge(
    _NAME + "uploads_in_progress", "Uploads under way", ("folder",), multiprocess_mode="livesum", registry=_registry
)
_free = Gauge(
    _NAME + "free_bytes", "Free bytes on the disk", ("folder",), multiprocess_mode="mostrecent", registry=_registry
)


class Metrics:
    """The metrics of one receiver."""

    def __init__(self, folder: str) -> None:
        self._agents: set[str] = set()
        # Cached, because labels() costs ten times as much.
        self._child: Callable[..., Any] = cache(lambda metric, *labels: metric.labels(folder, *labels))

    def count_upload(self, agent: str, outcome: str, size: int, seconds: float) -> None:
        """Count an upload that has a receipt."""
        agent = self._label(agent)
        self._child(_uploads, agent, outcome).inc()
        if outcome == "rejected":
            return
        if outcome != "duplicate":
            self._child(_bytes, agent).inc(size)
        self._child(_last_accepted, agent).set(time.time())
        self._child(_upload_seconds).observe(seconds)

    def count_rejection(self, reason_class: str) -> None:
        self._child(_rejections, reason_class).inc()

    def count_check(self, result: str) -> None:
        self._child(_checks, result).inc()

    def observe_validation(self, seconds: float) -> None:
        self._child(_validation_seconds).observe(seconds)

    @contextlib.contextmanager
    def upload_in_progress(self) -> Iterator[None]:
        with self._child(_in_progress).track_inprogress():
            yield

    def render(self, free_bytes: float) -> bytes:
        """Return all metrics as text. The cost does not grow with the number of uploads."""
        self._child(_free).set(free_bytes)
        for reason_class in REASON_CLASSES:  # Prometheus computes rates only for series that exist
            self._child(_rejections, reason_class)
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(_registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def _label(self, agent: str) -> str:
        if agent not in self._agents:
            if len(self._agents) >= _MAX_AGENTS:
                return OTHER
            self._agents.add(agent)
        return agent
