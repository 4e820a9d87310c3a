"""Drill 13: what goes wrong one by one in the other drills goes wrong at once, for long, with two workers."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

from tests.azure.blob_server import BlobServer
from tests.azure.faults import ambiguous, either, flaky
from tests.drills.conftest import Figure
from tests.drills.load import ProxyProcess, Traffic, post
from tests.drills.shipping import SOON_SECONDS, Shipping, blobs_of, compare
from tests.drills.sizes import SEED, SOAK_SECONDS, patiently
from tests.processes.admin import Samples, admin_port, check_identity, scrape, total, until_scraped
from tests.processes.workers import TWO, replaced, workers_of

MIB = 1024 * 1024
GROWTH_BYTES = 24 * MIB
STEP_SECONDS = 12.0  # one of each fault within it; who lives shorter is replaced later and later


@patiently
async def test_a_soak(model: str, tmp_path: Path, server: BlobServer, figure: Figure) -> None:
    chance = random.Random(SEED)
    shipping = Shipping(tmp_path, model, server.account_url)
    server.faults = either(flaky(SEED, 0.15), ambiguous(SEED + 1, 0.1))
    kills = outages = 0
    scrapes: list[Samples] = []
    async with shipping.process("hasty", storage__ship_interval="200ms", **TWO) as proxy:
        port = admin_port(proxy)
        began = time.monotonic()
        steps = max(3, round(SOAK_SECONDS / STEP_SECONDS))
        async with breaking_off(proxy, shipping.traffic, chance) as broken_off:
            for step in range(steps):
                async with shipping.load(proxy, f"load{step}", connections=12, per_second=150):
                    await for_a_while(began + (step + 0.3) * STEP_SECONDS)
                    await server.down()
                    outages += 1
                    workers_of(proxy)[1].kill()  # worker 0 is the one whose memory is looked at
                    kills += 1
                    await for_a_while(began + (step + 0.6) * STEP_SECONDS)
                    await server.up()
                    await replaced(proxy, kills)
                    samples = await scrape(port)
                    check_identity(samples)
                    scrapes.append(samples)
                    await for_a_while(began + (step + 1) * STEP_SECONDS)
        await shipping.all_is_at(server)
        last = await until_scraped(port, is_idle, SOON_SECONDS)
        accounts = await shipping.stop_all(proxy)
    kept = [of_worker_0(one, "process_resident_memory_bytes") for one in [*scrapes, last]]
    growth = max(kept[len(kept) // 3 :]) - kept[len(kept) // 3]
    figure(
        f"13, {SOAK_SECONDS} s of everything, two workers",
        f"{len(shipping.traffic.seen)} exchanges seen, {len(shipping.traffic.cut)} cut by {kills} SIGKILLs, "
        f"{len(broken_off)} broken off by clients, {outages} outages, {sum(server.happened.values())} faults of the "
        f"destination; memory of worker 0 {kept[0] / MIB:.0f} → {kept[-1] / MIB:.0f} MiB, "
        f"open files {of_worker_0(scrapes[0], 'process_open_fds'):.0f} → {of_worker_0(last, 'process_open_fds'):.0f}; "
        f"accounts at the end {accounts}",
    )
    assert all(received == delivered for received, delivered, *_ in accounts)
    assert kills == outages == steps
    assert broken_off
    assert sum(server.happened.values()) > steps
    compare(shipping, blobs_of(server)).check(shipping.traffic)
    assert growth <= GROWTH_BYTES
    assert total(last, "exchanges_in_flight") == total(last, "connections", side="downstream") == 0
    assert of_worker_0(last, "process_open_fds") <= of_worker_0(scrapes[0], "process_open_fds") + 8


def of_worker_0(samples: Samples, name: str) -> float:
    return next(value for labels, value in samples[name] if labels["worker"] == "0")


def is_idle(samples: Samples) -> bool:
    busy = ("events_pending", "exchanges_in_flight", "connections")
    return not any(total(samples, name) for name in busy)


async def for_a_while(until_time: float) -> None:
    """This is what a soak does: let time pass."""
    await asyncio.sleep(max(0.0, until_time - time.monotonic()))


@contextlib.asynccontextmanager
async def breaking_off(proxy: ProxyProcess, traffic: Traffic, chance: random.Random) -> AsyncIterator[list[str]]:
    """A client that goes at any byte of its request, or right behind it, again and again; the ids of its requests."""
    names: list[str] = []
    stop = asyncio.Event()

    async def client() -> None:
        while not stop.is_set():
            name = f"broken-off.{len(names)}"
            request = post("/echo", b"[%b]" % (b" " * 2000), name)
            traffic.sent.add(name)
            traffic.cut.add(name)
            names.append(name)
            with contextlib.suppress(ConnectionError):
                _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
                writer.write(request[: chance.randrange(len(request) + 1)])
                await writer.drain()
                writer.transport.abort()
            await asyncio.sleep(0.05)

    task = asyncio.create_task(client())
    try:
        yield names
    finally:
        stop.set()
        await task
