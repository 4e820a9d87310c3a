"""Drill 7: the disk is full, read-only, over its budget, or hangs; then it is well again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from proxy.ledger import Account
from proxy.spool.files import LineFile
from tests.drills.load import Dataset, Traffic, until
from tests.harness import Proxy, proxy

RESUMES_SECONDS = 5


class Load:
    """Requests to a proxy, all of which must be served, and what of them is on the disk."""

    def __init__(self, running: Proxy, storage: Path) -> None:
        self.running = running
        self.storage = storage
        self.traffic = Traffic()
        self.deleted_lines = 0
        self._connections = 0

    async def send(self, count: int, body: bytes | None = None, connections: int = 4) -> None:
        self._connections += 1
        await asyncio.gather(
            *(
                self.traffic.send(self.running.port, f"{self._connections}.{number}", count // connections, body)
                for number in range(connections)
            )
        )

    async def settled(self) -> Account:
        return await self.running.recorded(2 * len(self.traffic.sent))

    async def until_recorded(self) -> float:
        """Sends one request after the other until one is recorded; how long that took, in seconds."""
        began = time.monotonic()
        before = (await self.settled()).delivered
        while (await self.settled()).delivered < before + 2:
            await self.send(1, connections=1)
            await asyncio.sleep(0.02)
            assert time.monotonic() - began < 2 * RESUMES_SECONDS, "recording does not resume"
        return time.monotonic() - began

    async def check(self, reason: str) -> Account:
        """All served; what is on the disk is whole, and what is not there is counted under ``reason``."""
        account = await self.settled()
        dataset = Dataset.read(self.storage)
        assert set(self.traffic.statuses) == {200}
        assert account.received == 2 * len(self.traffic.sent)
        assert account.delivered == dataset.lines + self.deleted_lines
        assert account.discarded == {reason: account.received - account.delivered}
        assert dataset.invalid_lines == []
        assert dataset.torn_files == []
        assert dataset.doubled() == set()
        return account


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """Takes all the room on ``disk``."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass
    assert shutil.disk_usage(disk).free == 0
    yield
    ballast.unlink()


async def test_a_full_disk(model: str, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = small_disk / "data"
    async with proxy(model, storage) as running:
        load = Load(running, storage)
        await load.send(20)
        assert (await load.settled()).delivered == 40
        with full(small_disk):
            await load.send(400)
            account = await load.check("write_failed")
            assert account.discarded["write_failed"] > 700, "the disk was not full"
        took = await load.until_recorded()
        before = await load.settled()
        await load.send(200)
        account = await load.check("write_failed")
        assert account.discarded == before.discarded, "nothing is lost any more"
        async with asyncio.timeout(5):
            while f"Recording goes on; {account.discarded['write_failed']} events were discarded" not in caplog.text:
                await load.send(1, connections=1)
                await asyncio.sleep(0.02)  # or a fast machine fills the disk again before it counts as mended
    print(f"full disk: resumed after {took:.2f} s; {account}")
    assert took <= RESUMES_SECONDS
    assert caplog.text.count("Recording stopped: No space left on device") in (1, 2)


async def test_a_disk_that_fills_up_with_bodies(model: str, small_disk: Path) -> None:
    """Bodies in files of their own: no file is left that no line points to, and no line points to a file that is not there."""
    storage = small_disk / "data"
    async with proxy(model, storage) as running:
        load = Load(running, storage)
        for _ in range(10):
            await load.send(12, body=b"\xff" * 15_000)
        account = await load.check("write_failed")
    assert account.bodies_cut > 10
    events = [json.loads(line) for path in storage.rglob("*.jsonl") for line in path.read_bytes().splitlines()]
    bodies = {path for path in storage.rglob("*") if path.is_file() and path.suffix != ".jsonl"}
    pointed_to = {Path(unquote(event["data"].removeprefix("file://"))) for event in events if "datainblob" in event}
    assert len(bodies) > 10
    assert bodies == pointed_to
    assert {path.stat().st_size for path in bodies} == {15_000}


async def test_a_read_only_disk(model: str, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = small_disk / "data"
    async with proxy(model, storage, spool__path=str(small_disk.parent / "locks")) as running:
        load = Load(running, storage)
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        await load.send(200)
        account = await load.check("write_failed")
        assert account.delivered == 0
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        took = await load.until_recorded()
        await load.send(200)
        account = await load.check("write_failed")
        assert account.delivered >= 400
    print(f"read-only disk: resumed after {took:.2f} s; {account}")
    assert took <= RESUMES_SECONDS
    assert caplog.text.count("Recording stopped: Read-only file system") == 2  # one for each collection


async def test_a_budget_that_is_used_up(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = tmp_path / "data"
    async with proxy(model, storage, spool__max_bytes="100KiB") as running:
        load = Load(running, storage)
        await load.send(600)
        account = await load.check("spool_full")
        assert account.discarded["spool_full"] > 600
        assert sum(path.stat().st_size for path in storage.rglob("*.jsonl")) <= 100 * 1024
        load.deleted_lines = Dataset.read(storage).lines
        for path in storage.rglob("*.jsonl"):
            path.unlink()
        took = await load.until_recorded()
        await load.check("spool_full")
    print(f"budget: resumed after {took:.2f} s; {account}")
    assert took <= RESUMES_SECONDS
    assert caplog.text.count("the disk budget (spool.max_bytes) is used up") == 1


async def hang(load: Load) -> float:
    """Traffic while the disk hangs: served as ever, but for max_hold. The longest round of it, in seconds."""
    before = (await load.settled()).unheld
    longest = 0.0
    for _ in range(5):
        began = time.monotonic()
        await load.send(40, connections=40)
        longest = max(longest, time.monotonic() - began)
    await load.send(8, body=b"\xff" * 3_000_000)
    account = load.running.account()
    assert account.unheld - before >= 190, "the disk did not hang"
    assert account.pending > 380
    return longest


async def test_a_disk_that_hangs(model: str, freezable_disk: Path) -> None:
    storage = freezable_disk / "data"
    async with proxy(model, storage) as running:
        load = Load(running, storage)
        await load.send(20)
        await load.settled()
        subprocess.run(["fsfreeze", "--freeze", str(freezable_disk)], check=True)
        try:
            longest = await hang(load)
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", str(freezable_disk)], check=True)
        await until(lambda: not running.account().pending)
        account = running.account()
        dataset = Dataset.read(storage)
    print(f"disk that hangs: longest round {longest * 1000:.0f} ms; {account}")
    assert longest < 5, "the disk was waited for"
    assert account.discarded == {}
    assert account.delivered == dataset.lines == 2 * len(load.traffic.sent)
    assert dataset.lost(load.traffic.seen) == dataset.doubled() == set()


async def test_a_disk_that_hangs_and_the_memory_is_used_up(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a double, as root is not always at hand: appends that do not return."""
    gate = threading.Event()
    append = LineFile.append

    def append_when_open(file: LineFile, lines: list[bytes], size: int) -> None:
        assert gate.wait(60)
        append(file, lines, size)

    monkeypatch.setattr(LineFile, "append", append_when_open)
    monkeypatch.setattr("proxy.spool.writer.HANDOFF_BYTES", 256 * 1024)
    storage = tmp_path / "data"
    async with proxy(model, storage, capture__memory_bytes="256KiB") as running:
        load = Load(running, storage)
        try:
            await load.send(1000, connections=50)
            account = running.account()
            assert account.discarded["memory_full"] > 1000
        finally:
            gate.set()
        await load.check("memory_full")
        held = await load.until_recorded()
        account = await load.check("memory_full")
    assert held <= RESUMES_SECONDS
    print(f"disk that hangs, memory used up: {account}")


@pytest.mark.parametrize("fault", ["budget", "disk"])
async def test_with_reject_clients_are_told_and_it_recovers_by_itself(model: str, tmp_path: Path, fault: str) -> None:
    storage = tmp_path / "data"
    collection = storage / "local-endpoint/default/request"
    max_bytes = "20KiB" if fault == "budget" else 0
    async with proxy(model, storage, spool__when_full="reject", spool__max_bytes=max_bytes) as running:
        traffic = Traffic()
        number = 0

        async def one() -> int:
            nonlocal number
            number += 1
            before = traffic.statuses.copy()
            await traffic.client(running.port, f"{number}", iter([("/score", b'{"data": [[6, 3, 5, 2]]}')]))
            [status] = traffic.statuses - before
            return status

        assert await one() == 200
        if fault == "disk":
            shutil.rmtree(collection)
            collection.write_bytes(b"in the way")
        rejected = 0
        async with asyncio.timeout(20):
            while rejected < 50:
                rejected += await one() == 503
        await running.recorded(0)
        served_unrecorded = sum(running.account().discarded.values())
        assert served_unrecorded <= 20, "more than what was on its way, and the probes"
        if fault == "disk":
            collection.unlink()
        else:
            for path in storage.rglob("*.jsonl"):
                path.unlink()
        began = time.monotonic()
        async with asyncio.timeout(10):
            in_a_row = 0
            while in_a_row < 20:
                in_a_row = in_a_row + 1 if await one() == 200 else 0
                await asyncio.sleep(0.01)
        took = time.monotonic() - began
    print(f"reject, {fault}: recovered after {took:.2f} s; {running.account()}")
    assert took <= RESUMES_SECONDS
