"""What a running proxy counts, at one moment. Taken on its event loop, in well under a millisecond."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from typing import Any

from proxy.app import App
from proxy.relay.traffic import Histogram

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_STARTED = time.time()


def snapshot(app: App, *, ready: bool) -> dict[str, Any]:
    """By the names of ``proxy.admin.metrics``; ``destinations`` and ``upstream_trouble`` are for the status only."""
    relay = app.relay
    traffic = relay.traffic
    account = app.ledger.account()
    lanes = app.shipper.states() if app.shipper is not None else []
    found: dict[str, Any] = {
        "ready": int(ready),
        "upstream_responses": {f"{n}xx": count for n, count in enumerate(traffic.classes) if n == 2 or count},
        "own_answers": dict(relay.faults),
        "upstream_duration_seconds": _histogram(traffic.upstream),
        "added_duration_seconds": _histogram(traffic.added),
        "event_loop_delay_seconds": _histogram(app.loop_delay.histogram),
        "connections": {"downstream": len(relay.connections), "upstream": relay.pool.open_connections},
        "exchanges_in_flight": sum(connection.busy for connection in relay.connections),
        "defects": relay.defects,
        "events_received": account.received,
        "events_delivered": account.delivered,
        "events_discarded": account.discarded,
        "events_pending": account.pending,
        "events_spooled": max(0, account.spooled),
        "events_adopted": account.adopted,
        "bodies_cut": account.bodies_cut,
        "unheld_responses": account.unheld,
        "torn_lines": account.torn,
        "orphaned_bodies": account.orphans,
        "frames_refused": account.refused,
        "capture_memory_bytes": app.spool.memory.held_bytes,
        "shipping_lag_seconds": {lane.url: round(lane.lag_seconds, 3) for lane in lanes},
        "shipping_up": {lane.url: int(lane.trouble is None) for lane in lanes},
        "process_cpu_seconds": time.process_time(),
        "process_max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "process_start_time_seconds": _STARTED,
        "destinations": [
            {"url": lane.url, "trouble": lane.trouble, "words": lane.words, "lag_seconds": round(lane.lag_seconds, 3)}
            for lane in lanes
        ],
        "upstream_trouble": relay.upstream_trouble,
    }
    if app.shipper is not None:
        found["appends"] = dict(app.shipper.appends)
        found["puts"] = dict(app.shipper.puts)
        found["shipped_bytes"] = app.shipper.shipped_bytes
    if app.budget.max_bytes:
        found["spool_bytes"] = max(0, app.budget.used_bytes)
        found["spool_limit_bytes"] = app.budget.max_bytes
    with contextlib.suppress(OSError):  # where there is no /proc
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
            found["process_resident_memory_bytes"] = int(file.read().split()[1]) * _PAGE_BYTES
        found["process_open_fds"] = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    return found


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {"counts": list(histogram.counts), "seconds": histogram.seconds}
