"""Asks the admin port, and reads what it says as Prometheus would."""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.drills.load import ProxyProcess
from tests.harness import exchange

Samples = dict[str, list[tuple[dict[str, str], float]]]

_ADMIN = re.compile(r"Probes and metrics on \S+:(\d+)\.")


def admin_port(running: ProxyProcess) -> int:
    found = _ADMIN.search(running.log())
    assert found, running.log()
    return int(found[1])


async def get(port: int, path: str, *headers: str, method: str = "GET") -> tuple[int, str]:
    """Status and body."""
    lines = [f"{method} {path} HTTP/1.1", "Host: h", "Connection: close", *headers]
    answer = (await exchange(port, ("\r\n".join(lines) + "\r\n\r\n").encode())).decode()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split(" ", 2)[1]), body


async def scrape(port: int) -> Samples:
    status, body = await get(port, "/metrics")
    assert status == 200, body
    found: Samples = defaultdict(list)
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            found[sample.name].append((sample.labels, sample.value))
    return found


async def status_of(port: int) -> dict[str, Any]:
    status, body = await get(port, "/status")
    assert status == 200, body
    found: dict[str, Any] = json.loads(body)
    return found


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum over all workers, and over the labels that are not given."""
    return sum(value for found, value in samples[f"payload_logger_{name}"] if labels.items() <= found.items())


def check_identity(samples: Samples) -> None:
    """received = delivered + discarded + pending, of each worker by itself."""
    workers = {labels["worker"] for labels, _ in samples["payload_logger_events_received_total"]}
    for worker in workers:
        received, delivered, discarded, pending = (
            total(samples, f"events_{name}", worker=worker)
            for name in ("received_total", "delivered_total", "discarded_total", "pending")
        )
        assert received == delivered + discarded + pending
        assert pending >= 0


async def until_scraped(port: int, condition: Any, timeout_seconds: float = 20) -> Samples:
    """Scrapes until ``condition`` of it is true; the last scrape. The identity must hold in each."""
    async with asyncio.timeout(timeout_seconds):
        while True:
            samples = await scrape(port)
            check_identity(samples)
            if condition(samples):
                return samples
            await asyncio.sleep(0.02)
