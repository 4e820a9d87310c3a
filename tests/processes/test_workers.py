"""Several workers under a supervisor: each can go, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from azure.storage.blob import ContainerClient

from tests.azure.azurite import Azurite, azurite
from tests.drills.load import Dataset, PatientModel, ProxyProcess, Traffic, one_each, proxy_process, until
from tests.harness import model_server
from tests.processes.admin import admin_port, check_identity, get, scrape, status_of, total, until_scraped
from tests.processes.workers import TWO, replaced, workers_of


def check(storage: Path, traffic: Traffic) -> Dataset:
    dataset = Dataset.read(storage)
    assert dataset.lost(traffic.seen) == dataset.doubled() == set()
    assert dataset.torn_files == dataset.invalid_lines == []
    return dataset


@contextlib.asynccontextmanager
async def load(running: ProxyProcess, traffic: Traffic, clients: int) -> AsyncIterator[None]:
    """Clients that send one request after the other for as long as the block runs, a new connection for every tenth."""
    stop = asyncio.Event()

    async def client(name: str) -> None:
        number = 0
        while not stop.is_set():
            await traffic.client(running.port, f"{name}.{number}", iter([("/score", b'{"data": [[6, 3, 5, 2]]}')] * 10))
            number += 1

    tasks = [asyncio.create_task(client(f"c{n}")) for n in range(clients)]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)


async def test_both_take_traffic_and_each_has_files_of_its_own(model: str, tmp_path: Path) -> None:
    traffic, storage = Traffic(), tmp_path / "data"
    async with proxy_process(model, storage, **TWO) as running:
        port = admin_port(running)
        assert set(workers_of(running)) == {0, 1}
        async with load(running, traffic, 8):
            samples = await until_scraped(
                port,
                lambda found: all(total(found, "events_received_total", worker=n) > 100 for n in ("0", "1")),
            )
        assert total(samples, "workers") == 2
        running.signal(signal.SIGTERM)
        assert await running.exit_status() == 0
        assert running.log().count("Stopped: received") == 2
    dataset = check(storage, traffic)
    assert set(dataset.ids["request"]) == traffic.seen
    processes = {path.name[:32] for path in storage.rglob("*.jsonl")}
    assert len(processes) == 2
    assert not list(storage.rglob("*.journal"))


async def test_rolling_restart_under_load(model: str, tmp_path: Path) -> None:
    """Each worker is told to end, one after the other: no request fails, no line is lost or there twice."""
    traffic, storage = Traffic(), tmp_path / "data"
    async with proxy_process(model, storage, broken="polite", **TWO) as running:
        port = admin_port(running)
        async with load(running, traffic, 8):
            for n in range(4):
                seen = len(traffic.seen)
                await until(lambda seen=seen: len(traffic.seen) > seen + 100)  # type: ignore[misc]
                workers_of(running)[n % 2].terminate()
                await replaced(running, n + 1)
                check_identity(await scrape(port))
        assert traffic.cut == set()
        assert traffic.statuses == {200: len(traffic.sent)}
        running.signal(signal.SIGTERM)
        assert await running.exit_status() == 0
    dataset = check(storage, traffic)
    assert set(dataset.ids["response"]) == traffic.seen
    assert len({path.name[:32] for path in storage.rglob("*.jsonl")}) == 6


async def test_sigkill_of_one_of_two(model: str, tmp_path: Path) -> None:
    """Only what it had in flight is cut; its place is taken by another, which puts its files in order."""
    traffic, storage = Traffic(), tmp_path / "data"
    async with proxy_process(model, storage, **TWO) as running:
        async with load(running, traffic, 8):
            for n in range(4):
                seen = len(traffic.seen)
                await until(lambda seen=seen: len(traffic.seen) > seen + 100)  # type: ignore[misc]
                workers_of(running)[n % 2].kill()
                await replaced(running, n + 1)
        assert len(traffic.cut) <= 4 * 8
        assert "ended by itself (SIGKILL); it is replaced" in running.log()
        assert "what 1 ended process(es) left" in running.log()
        running.signal(signal.SIGTERM)
        assert await running.exit_status() == 0
    dataset = check(storage, traffic)
    assert set(dataset.ids["request"]) <= traffic.sent
    assert not list(storage.rglob("*.journal"))


async def test_what_a_worker_leaves_is_shipped_by_others(model: str, tmp_path: Path) -> None:
    traffic, spool = Traffic(), tmp_path / "spool"
    settings = {**TWO, "spool__path": spool, "storage__ship_interval": 0.2}
    with azurite(tmp_path / "azurite", in_memory=True) as server:
        environment = {"AZURE_STORAGE_CONNECTION_STRING": server.connection_string}
        url = f"{server.account_url}/workers"
        async with proxy_process(model, url, log_folder=tmp_path, environment=environment, **settings) as running:
            port = admin_port(running)
            async with load(running, traffic, 4):
                await until(lambda: len(traffic.seen) > 200)
                workers_of(running)[0].kill()
                await replaced(running, 1)
            samples = await until_scraped(
                port, lambda found: total(found, "events_adopted_total") > 0 and total(found, "events_pending") == 0
            )
            assert total(samples, "appends_total", outcome="ok") > 0
            assert total(samples, "shipped_bytes_total") > 0
            assert total(samples, "shipping_up", destination=url) == 2
            (destination,) = (await status_of(port))["destinations"]
            assert (destination["url"], destination["trouble"]) == (url, None)
            running.signal(signal.SIGTERM)
            assert await running.exit_status() == 0
        counts = await asyncio.to_thread(lines_of_each, server, "workers")
    assert counts.keys() >= traffic.seen
    assert set(counts.values()) == {2}  # the request's and the response's
    assert not list(spool.rglob("*.jsonl"))


def lines_of_each(server: Azurite, name: str) -> Counter[str]:
    """How often each request id is in the container."""
    counts: Counter[str] = Counter()
    with ContainerClient.from_connection_string(server.connection_string, name) as container:
        for blob in container.list_blobs():
            content = container.download_blob(blob.name).readall()
            counts.update(json.loads(line)["xrequestid"] for line in content.splitlines())
    return counts


async def test_the_supervisor_is_killed_and_the_workers_end_in_order(tmp_path: Path) -> None:
    patient, traffic, storage = PatientModel(), Traffic(), tmp_path / "data"
    async with (
        model_server(patient.handle) as server,
        proxy_process(server.url, storage, **TWO) as running,
    ):
        workers = workers_of(running)
        clients = one_each(traffic, running.port, 20)
        await until(lambda: patient.waiting == 20)
        running.kill()
        await until(lambda: running.log().count("The supervisor has ended; this worker stops, too.") == 2)
        patient.answer.set()
        await clients
        await asyncio.to_thread(psutil.wait_procs, workers.values(), 20)
        assert not any(one.is_running() for one in workers.values())
    assert len(traffic.seen) == 20
    check(storage, traffic)
    assert not list(storage.rglob("*.journal"))


async def test_a_worker_that_hangs_is_replaced(model: str, tmp_path: Path) -> None:
    traffic, storage = Traffic(), tmp_path / "data"
    async with proxy_process(model, storage, broken="impatient", **TWO) as running:
        await traffic.send(running.port, "a", 20)
        workers_of(running)[0].suspend()
        await replaced(running, 1)
        assert "Worker 0 has not answered for 2 s; it is ended." in running.log()
        await traffic.send(running.port, "b", 20)
    check(storage, traffic)


async def test_one_that_can_not_start_again_leaves_the_traffic_to_the_other(model: str, tmp_path: Path) -> None:
    """Its connections are not kept waiting: its sockets are closed after the second time."""
    traffic, storage = Traffic(), tmp_path / "data"
    async with proxy_process(model, storage, broken="worker-1-ends", **TWO) as running:
        workers_of(running)[1].kill()
        await until(lambda: running.log().count("Worker 1 (process") >= 3)
        assert "it is replaced in 1 s" in running.log()
        await asyncio.gather(*(traffic.send(running.port, f"c{n}", 5) for n in range(20)))
        assert (await get(admin_port(running), "/readyz"))[0] == 200
    assert len(traffic.seen) == 100
    check(storage, traffic)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"proxy__upstream_ca": __file__, "proxy__upstream": "https://h"}, "proxy.upstream_ca: "),
        ({"spool__path": "/proc/none"}, "storage.url: can't write to /proc/none"),
    ],
)
async def test_what_keeps_them_from_starting_is_told_once(
    model: str, tmp_path: Path, overrides: dict[str, Any], words: str
) -> None:
    with pytest.raises(AssertionError, match="did not start"):
        async with proxy_process(overrides.pop("proxy__upstream", model), tmp_path / "data", **TWO, **overrides):
            pass
    log = (tmp_path / "proxy.log").read_text()
    assert log.count(words) == 1
    assert "Traceback" not in log


async def test_a_port_that_is_taken_is_told_though_it_could_be_shared(model: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PAYLOAD_LOGGER_")}
        words = [sys.executable, "-m", "proxy", "run", "--upstream", model, "--listen", address]
        process = await asyncio.to_thread(
            subprocess.run,
            [*words, "--storage", str(tmp_path / "data")],
            env=variables | {"PAYLOAD_LOGGER_PROXY_WORKERS": "2"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert process.returncode == 1
    assert f"proxy.listen: can't listen on {address}: the address is in use by another process" in process.stderr


async def test_the_disk_budget_is_one_for_all(model: str, tmp_path: Path) -> None:
    """Two workers together write no more than it allows, but for what is under way."""
    traffic, storage = Traffic(), tmp_path / "data"
    limit = 400_000
    async with proxy_process(model, storage, spool__max_bytes=limit, **TWO) as running:
        async with load(running, traffic, 8):
            samples = await until_scraped(
                admin_port(running),
                lambda found: all(
                    total(found, "events_discarded_total", reason="spool_full", worker=n) > 0 for n in ("0", "1")
                ),
            )
        assert all(total(samples, "events_delivered_total", worker=n) > 0 for n in ("0", "1"))
    written = sum(path.stat().st_size for path in storage.rglob("*.jsonl"))
    assert limit * 0.9 < written < limit * 1.1
