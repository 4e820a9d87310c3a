"""The metrics: their names, what they mean, and their exposition for Prometheus.

Each process gives a snapshot of its own, and its samples a label of its own (``worker``): a process that ends and is
replaced begins at 0 again, which Prometheus can tell only if its samples are not added to those of others before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from proxy.ledger import Discard, Refusal
from proxy.relay.traffic import ADDED_BOUNDS, DELAY_BOUNDS, UPSTREAM_BOUNDS

# By the names of metrics without PREFIX: a number; numbers by the value of the metric's label; or, of a histogram,
# {"counts": one for each bound and one for what is above, "seconds": their sum}.
Snapshot: TypeAlias = Mapping[str, Any]

PREFIX = "payload_logger_"


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. ``label`` has a bounded number of values; ``known`` are those that are there from the beginning."""

    name: str
    kind: Kind
    words: str
    label: str | None = None
    known: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        prefix = "" if self.name.startswith("process_") else PREFIX
        return f"{prefix}{self.name}{'_total' if self.kind is Kind.COUNTER else ''}"


def _counter(name: str, words: str, label: str | None = None, known: tuple[str, ...] = ()) -> Metric:
    return Metric(name, Kind.COUNTER, words, label, known)


def _gauge(name: str, words: str, label: str | None = None) -> Metric:
    return Metric(name, Kind.GAUGE, words, label)


def _histogram(name: str, words: str, bounds: tuple[float, ...]) -> Metric:
    return Metric(name, Kind.HISTOGRAM, words, bounds=bounds)


# Of each worker.
METRICS = (
    _gauge("ready", "1 while it takes traffic; 0 once it stops."),
    _counter("upstream_responses", "Answers of the model server that were passed on, by class of status.", "code"),
    _counter("own_answers", "Requests answered or cut off by the proxy itself, by reason.", "reason"),
    _histogram(
        "upstream_duration_seconds",
        "From when a request's head was written to the model server until the head of its answer came; with a large "
        "upload, the client's time for it is part of that.",
        UPSTREAM_BOUNDS,
    ),
    _histogram(
        "added_duration_seconds",
        "What the proxy added to an exchange: from the request's head until it was written to the model server "
        "(connecting included), and from the end of the answer until it was recorded and could leave.",
        ADDED_BOUNDS,
    ),
    _histogram("event_loop_delay_seconds", "How late the event loop was, asked 20 times a second.", DELAY_BOUNDS),
    _gauge("connections", "Open connections, by side: downstream (clients) and upstream (the model server).", "side"),
    _gauge("exchanges_in_flight", "Exchanges that have begun and not ended."),
    _counter("defects", "Defects of payload-logger that were caught; its log tells of each kind once."),
    _counter("events_received", "Events (lines) to be recorded. received = delivered + discarded + pending, always."),
    _counter("events_delivered", "Events that are in the destination, once each."),
    _counter("events_discarded", "Events that are lost, by reason.", "reason", tuple(one.value for one in Discard)),
    _gauge("events_pending", "Events that are neither delivered nor discarded yet."),
    _gauge("events_spooled", "Of the pending: events on the local disk, to be shipped."),
    _counter("events_adopted", "Of the received: events that ended processes had recorded, shipped by this one."),
    _counter("bodies_cut", "Bodies that were not recorded whole, for want of memory or disk."),
    _counter("unheld_responses", "Responses whose end left after spool.max_hold, before their lines were written."),
    _counter("torn_lines", "Half lines of processes that died, cut off at start."),
    _counter("orphaned_bodies", "Files of bodies without a line, left by processes that died and removed at start."),
    _counter(
        "frames_refused",
        "Frames of custom logging that were not taken, by reason; their senders were told.",
        "reason",
        tuple(one.value for one in Refusal),
    ),
    _gauge("capture_memory_bytes", "Memory held by bodies and lines on their way to the disk."),
    _gauge(
        "spool_bytes", "Bytes on disk that count against spool.max_bytes, those of all workers. Absent without a limit."
    ),
    _gauge("spool_limit_bytes", "spool.max_bytes. Absent without a limit."),
    _gauge(
        "shipping_lag_seconds",
        "Age of the oldest thing that is recorded and not in the destination, at most; 0 when all is there. What ended "
        "processes left counts from the start of this one.",
        "destination",
    ),
    _gauge("shipping_up", "1 while shipping to the destination works, 0 while it fails.", "destination"),
    _counter("appends", "Appends to blobs, by outcome: ok, or why not (each is tried again).", "outcome", ("ok",)),
    _counter("puts", "Uploads of bodies that are blobs of their own, by outcome.", "outcome", ("ok",)),
    _counter("shipped_bytes", "Bytes of lines and bodies that are in the destination."),
    _gauge("process_resident_memory_bytes", "Resident memory. Linux only."),
    _gauge("process_open_fds", "Open file descriptors. Linux only."),
    _gauge("process_max_fds", "Most file descriptors that it may open."),
    _counter("process_cpu_seconds", "User and system CPU time."),
    _gauge("process_start_time_seconds", "When it started, in seconds since 1970."),
)
# Of all workers together.
COMMON = (
    _gauge("workers", "Processes that take traffic."),
    _counter("worker_restarts", "Workers that ended by themselves and were replaced."),
    _counter(
        "reloads", "Reloads of the configuration (SIGHUP), by outcome.", "outcome", ("applied", "partly", "refused")
    ),
)


def exposition(
    workers: Sequence[tuple[str, Snapshot]], common: Snapshot, build: Mapping[str, str], accept: str
) -> tuple[bytes, str]:
    """The body and its content type: OpenMetrics where ``accept`` asks for it, else Prometheus' text format.

    ``workers`` are the names of the workers and their snapshots.
    """
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(workers, common, build))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Collected:
    """Snapshots as prometheus_client's collectors are."""

    def __init__(self, workers: Sequence[tuple[str, Snapshot]], common: Snapshot, build: Mapping[str, str]) -> None:
        self._workers = workers
        self._common = common
        self._build = build

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import InfoMetricFamily

        info = InfoMetricFamily(f"{PREFIX}build", "What runs.")
        info.add_metric((), dict(self._build))
        yield info
        for metric in COMMON:
            yield _family(metric, [((), self._common)])
        for metric in METRICS:
            yield _family(metric, [((name,), snapshot) for name, snapshot in self._workers])


def _family(metric: Metric, snapshots: Sequence[tuple[tuple[str, ...], Snapshot]]) -> Any:
    from prometheus_client import core

    labels = ["worker"] if metric in METRICS else []
    if metric.label is not None:
        labels.append(metric.label)
    kinds: dict[Kind, Any] = {
        Kind.COUNTER: core.CounterMetricFamily,
        Kind.GAUGE: core.GaugeMetricFamily,
        Kind.HISTOGRAM: core.HistogramMetricFamily,
    }
    family = kinds[metric.kind](metric.full_name.removesuffix("_total"), metric.words, labels=labels)
    for worker, snapshot in snapshots:
        value = snapshot.get(metric.name)
        if metric.label is not None:
            for label, count in (dict.fromkeys(metric.known, 0) | (value or {})).items():
                family.add_metric((*worker, label), count)
        elif value is None:
            continue
        elif metric.kind is Kind.HISTOGRAM:
            family.add_metric(worker, _buckets(metric.bounds, value["counts"]), value["seconds"])
        else:
            family.add_metric(worker, value)
    return family


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, int]]:
    """Cumulative, as Prometheus has them."""
    total = 0
    buckets = []
    for bound, count in zip([*(f"{bound:g}" for bound in bounds), "+Inf"], counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets


def reference_markdown() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "`GET /metrics` on the admin port, in Prometheus' text format or OpenMetrics. Generated by `make docs`.",
        "",
        "Every metric but the first four has the label `worker`, the number of the process (`0` if there is but one); a scrape",
        "has all of them. A worker that was replaced begins at 0 again. At every scrape, for each worker and for their sum:",
        "",
        "    events_received_total = events_delivered_total + events_discarded_total (all reasons) + events_pending",
        "",
        "Alert rules: [alerts.yaml](../helm/payload-logger/files/alerts.yaml). Grafana dashboard:",
        "[dashboard.json](../helm/payload-logger/files/dashboard.json). What to do when a rule fires:",
        "[operations.md](operations.md).",
        "",
        "| metric | kind | further label | meaning |",
        "|---|---|---|---|",
        f"| `{PREFIX}build_info` | gauge | `version`, `python`, `compiled` | Always 1: what runs. |",
    ]
    for metric in (*COMMON, *METRICS):
        label = f"`{metric.label}`" if metric.label else ""
        if metric.known and len(metric.known) > 1:
            label += ": " + ", ".join(f"`{value}`" for value in metric.known)
        lines.append(f"| `{metric.full_name}` | {metric.kind.value} | {label} | {metric.words} |")
    return "\n".join(lines) + "\n"
