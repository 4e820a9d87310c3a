"""Drills 11 and 12: many at once, an orderly end, two processes on one storage folder, no file descriptors left."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
from pathlib import Path

import pytest

from tests.drills.load import (
    Dataset,
    PatientModel,
    Traffic,
    one_each,
    post,
    proxy_process,
    read_answer,
    stopped_account,
    until,
)
from tests.harness import proxy, until_refused


def check_complete(storage: Path, traffic: Traffic) -> None:
    """Every exchange that was seen has one request and one response; nothing else is there."""
    dataset = Dataset.read(storage)
    assert dataset.lost(traffic.seen) == dataset.doubled() == set()
    assert not dataset.invalid_lines
    assert not dataset.torn_files
    assert all(set(ids) <= traffic.sent for ids in dataset.ids.values())


async def test_300_at_once_give_600_lines(patient: PatientModel, tmp_path: Path) -> None:
    traffic = Traffic()
    async with proxy(patient.server.url, tmp_path / "data") as running:
        clients = one_each(traffic, running.port, 300)
        await until(lambda: patient.waiting == 300)
        assert running.account().received == 0
        patient.answer.set()
        await clients
        account = await running.recorded(600)
        requests, responses = running.lines("request"), running.lines("response")
    assert account.delivered == 600
    assert len(requests) == len(responses) == 300
    assert {event["xrequestid"] for event in requests} == {event["xrequestid"] for event in responses} == traffic.seen
    assert len({event["id"] for event in requests + responses}) == 600
    check_complete(tmp_path / "data", traffic)


@pytest.mark.promise("E18")
async def test_sigterm_lets_what_is_in_flight_finish(patient: PatientModel, tmp_path: Path) -> None:
    traffic, storage = Traffic(), tmp_path / "data"
    async with proxy_process(patient.server.url, storage, proxy__drain_seconds=3600) as running:
        clients = one_each(traffic, running.port, 50)
        await until(lambda: patient.waiting == 50)
        running.signal(signal.SIGTERM)
        await until(lambda: "Stopping" in running.log())
        await until_refused(running.port)
        assert running.process.poll() is None
        patient.answer.set()
        await clients
        assert await running.exit_status() == 0
        assert stopped_account(running) == (100, 100, 0, 0)
    assert len(traffic.seen) == 50
    assert not list(storage.rglob("*.journal"))
    check_complete(storage, traffic)


@pytest.mark.promise("E18")
async def test_sigterm_cuts_what_does_not_finish_within_the_grace_and_records_it(
    patient: PatientModel, tmp_path: Path
) -> None:
    traffic, storage = Traffic(), tmp_path / "data"
    async with proxy_process(patient.server.url, storage, proxy__drain_seconds=0.3) as running:
        clients = one_each(traffic, running.port, 20)
        await until(lambda: patient.waiting == 20)
        running.signal(signal.SIGTERM)
        assert await running.exit_status() == 0
        await clients
        assert "20 exchanges had not finished" in running.log()
        assert stopped_account(running) == (40, 40, 0, 0)
    assert len(traffic.cut) == 20
    assert not list(storage.rglob("*.journal"))
    check_complete(storage, traffic)


@pytest.mark.promise("E18")
async def test_a_second_sigterm_ends_at_once_and_loses_nothing_that_was_seen(
    patient: PatientModel, tmp_path: Path
) -> None:
    traffic, storage = Traffic(), tmp_path / "data"
    async with proxy_process(patient.server.url, storage, proxy__drain_seconds=3600) as running:
        patient.answer.set()
        await one_each(traffic, running.port, 20, "first")
        patient.answer.clear()
        clients = one_each(traffic, running.port, 20, "second")
        await until(lambda: patient.waiting == 20)
        running.signal(signal.SIGTERM)
        await until(lambda: "Stopping" in running.log())
        async with asyncio.timeout(30):
            while running.process.poll() is None:  # those that come at once are taken for the same signal
                running.signal(signal.SIGTERM)
                await asyncio.sleep(0.01)
        assert running.process.returncode == 1
        await clients
        assert stopped_account(running) == (80, 80, 0, 0)
    assert len(traffic.seen) == len(traffic.cut) == 20
    assert list(storage.rglob("*.journal")) == []
    check_complete(storage, traffic)


async def test_two_processes_share_a_storage_folder(model: str, tmp_path: Path) -> None:
    traffic, storage = Traffic(), tmp_path / "data"
    async with proxy_process(model, storage, log_name="first") as first:
        await traffic.send(first.port, "before", 10)
        async with proxy_process(model, storage, log_name="second") as second:
            assert "ended process" not in second.log(), "a living process was taken for a dead one"
            await asyncio.gather(
                *(traffic.send(one.port, f"{one.port}.{n}", 50) for one in (first, second) for n in range(4))
            )
            second.kill()
        await traffic.send(first.port, "after", 10)
        async with proxy_process(model, storage, log_name="third") as third:
            assert "what 1 ended process(es) left" in third.log()
            await asyncio.gather(*(traffic.send(one.port, f"last.{one.port}", 10) for one in (first, third)))
            for one in (first, third):
                one.signal(signal.SIGTERM)
                assert await one.exit_status() == 0
            assert stopped_account(first)[0] == 2 * (10 + 200 + 10 + 10)
    assert len(traffic.seen) == 440
    check_complete(storage, traffic)
    assert Dataset.read(storage).lines == 880
    assert not list(storage.rglob("*.journal"))


async def test_two_processes_that_start_at_once_do_not_take_each_other_for_dead(model: str, tmp_path: Path) -> None:
    traffic, storage = Traffic(), tmp_path / "data"
    async with contextlib.AsyncExitStack() as stack:
        starting = [proxy_process(model, storage, log_name=f"{number}") for number in range(4)]
        running = await asyncio.gather(*(stack.enter_async_context(one) for one in starting))
        assert len(list(storage.rglob("*.journal"))) == 4
        assert not any("ended process" in one.log() for one in running)
        await asyncio.gather(*(traffic.send(one.port, f"{one.port}", 20) for one in running))
    assert Dataset.read(storage).lines == 160
    check_complete(storage, traffic)


@pytest.mark.promise("G21b")
async def test_no_file_descriptors_left(model: str, tmp_path: Path) -> None:
    """More clients than descriptors: who is let in is served, the dataset is whole, and afterwards all is as before."""
    limit = 64
    traffic, storage = Traffic(), tmp_path / "data"

    def few_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    async with proxy_process(model, storage, before_start=few_descriptors) as running:
        before = running.open_files()
        crowd = []
        for _ in range(2 * limit):
            with contextlib.suppress(OSError):
                crowd.append(await asyncio.open_connection("127.0.0.1", running.port))
        await until(lambda: running.open_files() >= limit - 1)
        outcomes = await asyncio.gather(*(ask(traffic, n, *connection) for n, connection in enumerate(crowd)))
        refused = sum(outcome not in (200, 502) for outcome in outcomes)
        for _, writer in crowd:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        print(f"no descriptors: {outcomes.count(200)} x 200, {outcomes.count(502)} x 502, {refused} not let in")
        assert refused, "there were descriptors enough"

        await until(lambda: running.open_files() < limit // 2)
        afterwards = Traffic()
        await afterwards.send(running.port, "afterwards", 50)
        assert afterwards.statuses == {200: 50}
        await until(lambda: running.open_files() <= before + 5, 15)
        running.signal(signal.SIGTERM)
        assert await running.exit_status() == 0
        received, delivered, discarded, pending = stopped_account(running)
        assert pending == 0
        log = running.log()
        assert len(log.splitlines()) < 40, log
        assert "Too many open files" in log
    dataset = Dataset.read(storage)
    assert dataset.lines == delivered
    assert not dataset.invalid_lines
    assert not dataset.torn_files
    assert dataset.doubled() == set()
    assert dataset.lost(afterwards.seen) == set()
    assert len(dataset.lost(traffic.seen)) <= discarded
    assert received == 2 * (len(traffic.seen) + len(afterwards.seen))


async def ask(traffic: Traffic, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int | None:
    """The status, or None where the connection was not served."""
    name = f"crowd.{number}"
    traffic.sent.add(name)
    try:
        async with asyncio.timeout(3):
            writer.write(post("/score", b'{"data": [[6, 3, 5, 2]]}', name))
            status, _, _ = await read_answer(reader)
    except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
        traffic.cut.add(name)
        return None
    traffic.seen.add(name)
    return status
