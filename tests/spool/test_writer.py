"""The writer on a real folder. The disk that hangs is ``HungFiles``: real files behind a gate; the drills freeze a real one."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from proxy.capture.body import Tee, TeeLimits
from proxy.settings import Durability, WhenFull
from proxy.spool.files import Files, LineFile, SpoolFull
from proxy.spool.writer import ENTRY_BYTES, GROUP_JOBS, HANDOFF_BYTES, PROBE_SECONDS
from tests.spool.workbench import MIB, Exchange, Running, hung, spool

# --- writing ---


async def test_what_is_submitted_is_written_once_and_in_order(tmp_path: Path) -> None:
    async with spool(tmp_path, memory_bytes=16 * MIB) as s:
        for number in range(1000):
            s.spool.submit(Exchange(number))
            s.check_account()
        await s.settled()
        for collection in ("request", "response"):
            assert [b'"number": %d,' % n in line for n, line in enumerate(s.bench.content(collection))] == [True] * 1000
        assert s.ledger.account().delivered == 2000
        assert s.spool.memory.held_bytes == 0


async def test_a_response_is_held_until_its_lines_are_written(tmp_path: Path) -> None:
    async with spool(tmp_path, max_hold_seconds=30) as s:
        for number in range(50):
            held = s.spool.submit(Exchange(number))
            assert held is not None
            await held
            assert len(s.bench.content("response")) == number + 1
        assert s.ledger.account().unheld == 0


async def test_what_waits_is_written_in_groups(tmp_path: Path) -> None:
    files = hung()
    appended: list[int] = []

    class Counting(files):  # type: ignore[misc, valid-type]
        def append(self, collection: str, lines: list[bytes]) -> None:
            super().append(collection, lines)
            appended.append(len(lines))

    async with spool(tmp_path, max_hold_seconds=30, kind=Counting) as s:
        waiting = [s.spool.submit(Exchange(number)) for number in range(3 * GROUP_JOBS + 1)]
        await asyncio.to_thread(files.waiting.wait, 5)
        files.gate.set()
        await asyncio.gather(*(held for held in waiting if held is not None))
        assert sum(appended) == 2 * (3 * GROUP_JOBS + 1)
        assert max(appended) == GROUP_JOBS
        assert len(appended) <= 2 * 5


async def test_without_durability_nothing_is_held(tmp_path: Path) -> None:
    files = hung()
    async with spool(tmp_path, durability=Durability.NONE, kind=files) as s:
        assert s.spool.submit(Exchange(0)) is None
        assert s.ledger.account().pending == 2
        files.gate.set()
        await s.settled()
        assert len(s.bench.content()) == 1


async def test_an_entry_that_can_not_be_rendered_takes_no_other_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with spool(tmp_path) as s:
        waiting = [s.spool.submit(Exchange(number, fails=number == 1)) for number in range(3)]
        await asyncio.gather(*(held for held in waiting if held is not None))
        assert s.ledger.account().discarded == {"render_failed": 2}
        assert s.ledger.account().delivered == 4
        assert len(s.bench.content()) == 2
        s.check_account()
    assert "by a defect of payload-logger" in caplog.text


async def test_a_client_that_leaves_while_it_is_held_disturbs_nobody(tmp_path: Path) -> None:
    files = hung()
    async with spool(tmp_path, max_hold_seconds=30, kind=files) as s:
        held = [s.spool.submit(Exchange(number)) for number in range(3)]
        assert held[1] is not None
        held[1].cancel()
        files.gate.set()
        await s.settled()
        assert [future.done() for future in held if future is not None] == [True] * 3
        assert len(s.bench.content()) == 3


async def test_the_thread_outlives_a_file_that_can_not_be_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A network file system tells at the close what it could not write."""

    def fail(file: LineFile) -> None:
        real_close(file)
        raise OSError(5, "Input/output error")

    real_close = LineFile.close
    async with spool(tmp_path, max_hold_seconds=30) as s:
        await (s.spool.submit(Exchange(0)) or asyncio.sleep(0))
        with monkeypatch.context() as patch:
            patch.setattr(LineFile, "close", fail)
            shutil.rmtree(tmp_path / "data")
            async with asyncio.timeout(5):
                await (s.spool.submit(Exchange(1)) or asyncio.sleep(0))
        async with asyncio.timeout(5):
            await (s.spool.submit(Exchange(2)) or asyncio.sleep(0))
        await s.settled()
        assert s.ledger.account().delivered == 6
    assert "the last lines may be lost: [Errno 5] Input/output error" in caplog.text


# --- a disk that hangs ---


async def test_a_response_leaves_after_max_hold_though_the_disk_hangs(tmp_path: Path) -> None:
    files = hung()
    async with spool(tmp_path, max_hold_seconds=0.05, kind=files) as s:
        began = time.monotonic()
        first, second = s.spool.submit(Exchange(0)), s.spool.submit(Exchange(1))
        assert first is not None
        assert second is not None
        async with asyncio.timeout(5):
            await first
            assert time.monotonic() - began > 0.045
            await second
        assert files.waiting.is_set()
        assert s.ledger.account().unheld == 2
        assert s.ledger.account().pending == 4
        files.gate.set()
        await s.settled()
        assert len(s.bench.content()) == 2
        held = s.spool.submit(Exchange(2))
        assert held is not None
        await held
        assert s.ledger.account().unheld == 2


async def test_memory_has_a_bound_and_every_event_beyond_it_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = hung()
    body = 64 * 1024
    async with spool(tmp_path, memory_bytes=MIB, kind=files) as s:
        entries = []
        for number in range(20_000):
            held_bytes = body if s.spool.memory.take(body) else 0
            entries.append(entry := Exchange(number, held_bytes=held_bytes))
            s.spool.submit(entry)
            assert s.spool.memory.held_bytes <= MIB + HANDOFF_BYTES
            s.check_account()
        bodies = sum(entry.held_bytes for entry in entries)
        assert MIB - 2 * body < bodies < MIB
        taken = (MIB + HANDOFF_BYTES - bodies) // ENTRY_BYTES
        refused = 20_000 - taken
        assert [entry.discarded for entry in entries] == [0] * taken + [1] * refused
        assert s.ledger.account().discarded == {"memory_full": 2 * refused}
        assert s.ledger.account().pending == 2 * taken

        files.gate.set()
        await s.settled(10)
        account = s.ledger.account()
        assert account.delivered == 2 * taken
        assert len(s.bench.content()) == taken
        await asyncio.sleep(0)
        assert s.spool.memory.held_bytes == 0
        held = s.spool.submit(Exchange(0))
        assert held is not None
        await held
        assert s.ledger.account().delivered == 2 * taken + 2
    assert caplog.text.count("Recording is behind") == 1


async def test_bodies_that_flow_to_a_disk_that_hangs_are_bounded(tmp_path: Path) -> None:
    """Each exchange hands over one piece before it can know; those that come later must not."""
    files = hung()
    piece = b"x" * 256 * 1024
    async with spool(tmp_path, memory_bytes=MIB, max_hold_seconds=0.01, kind=files) as s:

        def tee() -> Tee:
            return Tee(s.spool, "request", TeeLimits(0, 0))

        tees = [tee() for _ in range(400)]
        for one in tees:
            for _ in range(3):
                wait = one.add(piece)
                if wait is not None:
                    await wait
        # One piece is with the thread, and one more crossed the bound.
        assert s.spool._spilled_bytes <= HANDOFF_BYTES + 2 * len(piece)
        assert sum(one.file is not None and one.file.cut for one in tees) >= 400 - HANDOFF_BYTES // len(piece)
        for one in tees:
            one.discard()
        files.gate.set()
        for one in (tee(), tee()):
            async with asyncio.timeout(5):
                while s.spool.stalled or s.spool._spilled_bytes:
                    await asyncio.sleep(0.002)
            one.add(piece)
            assert one.kept_bytes == len(piece)
            assert one.file is not None
            assert not one.file.cut
            one.discard()


async def test_who_does_not_wait_for_room_leaves_no_coroutine_behind(tmp_path: Path) -> None:
    files = hung()
    async with spool(tmp_path, kind=files) as s:
        tee = Tee(s.spool, "request", TeeLimits(0, 0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert tee.add(b"x" * (HANDOFF_BYTES + 1)) is not None
            gc.collect()
        assert caught == []
        files.gate.set()
        tee.discard()


async def test_a_body_waits_for_a_disk_that_is_slow_and_loses_nothing(tmp_path: Path) -> None:
    class Slow(Files):
        waited = 0

        def write_body(self, *arguments: object) -> None:
            time.sleep(0.002)
            super().write_body(*arguments)  # type: ignore[arg-type]

    piece = b"x" * MIB
    async with spool(tmp_path, max_hold_seconds=5, kind=Slow) as s:
        tee = Tee(s.spool, "request", TeeLimits(0, 0))
        waits = 0
        for _ in range(64):
            if (wait := tee.add(piece)) is not None:
                waits += 1
                await wait
            assert s.spool._spilled_bytes <= HANDOFF_BYTES + len(piece)
        assert waits
        assert tee.kept_bytes == 64 * MIB
        assert tee.file is not None
        assert not tee.file.cut
        tee.discard()


# --- what an entry is told ---


class FailingFor(Files):
    """A disk that takes no lines of ``response``."""

    error: Exception = OSError(28, "No space left on device")

    def append(self, collection: str, lines: list[bytes]) -> None:
        if collection == "response":
            raise self.error
        super().append(collection, lines)


async def told(s: Running, *entries: Exchange) -> list[bool | None]:
    """What submitting them comes to. They are written together."""
    futures = [s.spool.submit(entry) for entry in entries]
    async with asyncio.timeout(5):
        return [None if future is None else await future for future in futures]


async def test_an_entry_that_is_written_is_told_nothing(tmp_path: Path) -> None:
    async with spool(tmp_path, max_hold_seconds=30) as s:
        entry = Exchange(0)
        assert await told(s, entry) == [True]
        assert (entry.not_written_for, entry.discarded) == ([], 0)
        assert not s.spool.is_late


@pytest.mark.parametrize(
    ("error", "reason", "counted"),
    [
        (OSError(28, "No space left on device"), "No space left on device: spool file", "write_failed"),
        (OSError(30, "Read-only file system", "/data/x"), "Read-only file system: /data/x", "write_failed"),
        (SpoolFull(), "the disk budget (spool.max_bytes) is used up", "spool_full"),
        (ZeroDivisionError(), "a defect of payload-logger", "render_failed"),
    ],
)
async def test_entries_are_told_which_of_their_lines_are_not_written(
    tmp_path: Path, error: Exception, reason: str, counted: str
) -> None:
    class Failing(FailingFor):
        pass

    Failing.error = error
    async with spool(tmp_path, max_hold_seconds=30, kind=Failing) as s:
        entries = [Exchange(number) for number in range(3)]
        assert await told(s, *entries) == [True] * 3
        assert [entry.not_written_for for entry in entries] == [[("response", reason)]] * 3
        assert s.ledger.account().discarded == {counted: 3}
        assert s.ledger.account().delivered == 3
        assert [entry.discarded for entry in entries] == [0] * 3


async def test_an_entry_is_told_before_its_future_is_done(tmp_path: Path) -> None:
    class Late(FailingFor):
        def end(self) -> None:
            go_on.wait(30)
            super().end()

    go_on = threading.Event()
    async with spool(tmp_path, max_hold_seconds=30, kind=Late) as s:
        entry = Exchange(0)
        future = s.spool.submit(entry)
        assert future is not None
        while not entry.not_written_for:
            assert not future.done()
            await asyncio.sleep(0.002)
        go_on.set()
        assert await future is True


async def test_only_the_entry_that_can_not_be_rendered_is_told_so(tmp_path: Path) -> None:
    async with spool(tmp_path, max_hold_seconds=30) as s:
        entries = [Exchange(number, fails=number == 1) for number in range(3)]
        assert await told(s, *entries) == [True] * 3
        assert [entry.not_written_for for entry in entries] == [[], [("", "a defect of payload-logger")], []]


async def test_what_is_written_later_is_not_told_of_an_earlier_failure(tmp_path: Path) -> None:
    class Once(FailingFor):
        def append(self, collection: str, lines: list[bytes]) -> None:
            if b'"number": 0,' in lines[0]:
                super().append(collection, lines)
            else:
                Files.append(self, collection, lines)

    async with spool(tmp_path, max_hold_seconds=30, kind=Once) as s:
        first, second = Exchange(0), Exchange(1)
        assert await told(s, first) == [True]
        assert await told(s, second) == [True]
        assert [len(entry.not_written_for) for entry in (first, second)] == [1, 0]


async def test_what_was_let_go_is_late_until_something_is_written(tmp_path: Path) -> None:
    files = hung()
    async with spool(tmp_path, max_hold_seconds=0.01, kind=files) as s:
        first = s.spool.submit(Exchange(0))
        assert first is not None
        assert not s.spool.is_late
        async with asyncio.timeout(5):
            assert await first is False
        assert s.spool.is_late
        s.spool._max_hold_seconds = 1000.0
        second = s.spool.submit(Exchange(1))
        assert second is not None
        files.gate.set()
        async with asyncio.timeout(5):
            assert await second is True
        assert not s.spool.is_late
        assert await told(s, Exchange(2)) == [True]


async def test_a_refused_entry_is_discarded_and_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    files = hung()
    async with spool(tmp_path, memory_bytes=0, max_hold_seconds=1000, kind=files) as s:
        first = s.spool.submit(Exchange(0))
        assert first is not None
        while not s.spool.is_full:
            s.spool.submit(Exchange(1))
        entry = Exchange(-1)
        assert await told(s, entry) == [None]
        assert (entry.discarded, entry.not_written_for) == (1, [])
        files.gate.set()
        async with asyncio.timeout(10):
            assert await first is True


async def test_what_waits_when_a_disk_that_hangs_is_left_was_not_written(tmp_path: Path) -> None:
    files = hung()
    async with spool(tmp_path, max_hold_seconds=1000, kind=files) as s:
        future = s.spool.submit(Exchange(0))
        assert future is not None
        assert await asyncio.to_thread(files.waiting.wait, 5)
        await s.spool.close(timeout_seconds=0.05)
        assert future.result() is False


# --- the end ---


@pytest.mark.promise("E18")
async def test_close_writes_what_waits(tmp_path: Path) -> None:
    async with spool(tmp_path, memory_bytes=16 * MIB) as s:
        for number in range(500):
            s.spool.submit(Exchange(number))
        await s.spool.close()
        assert s.ledger.account().delivered == 1000
        assert len(s.bench.content()) == 500
        assert not s.bench.journal.path.exists()


async def test_close_leaves_a_disk_that_hangs_in_time_and_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = hung(open_=True)
    async with spool(tmp_path, max_hold_seconds=30, kind=files) as s:
        await (s.spool.submit(Exchange(0)) or asyncio.sleep(0))
        files.gate.clear()
        held = s.spool.submit(Exchange(1))
        assert held is not None
        began = time.monotonic()
        async with asyncio.timeout(20):
            await s.spool.close(timeout_seconds=0.2)
        assert time.monotonic() - began > 0.15
        assert held.done(), "nobody waits for a spool that is closed"
        account = s.ledger.account()
        assert (account.delivered, account.discarded, account.pending) == (2, {"stopped": 2}, 0)
        s.check_account()
        assert "The disk did not answer within 0.2 s; 2 events were not recorded." in caplog.text

        files.gate.set()  # too late
        await asyncio.to_thread(s.spool._worker.join, 5)
        assert s.ledger.account() == account
        s.check_account()


async def test_what_comes_after_the_close_is_counted(tmp_path: Path) -> None:
    async with spool(tmp_path) as s:
        await (s.spool.submit(Exchange(0)) or asyncio.sleep(0))
        await s.spool.close()
        assert s.spool.submit(Exchange(1)) is None
        account = s.ledger.account()
        assert (account.received, account.delivered, account.discarded) == (4, 2, {"stopped": 2})


async def test_a_close_that_is_cancelled_leaves_nothing_open(tmp_path: Path) -> None:
    files = hung(open_=True)
    async with spool(tmp_path, kind=files) as s:
        await (s.spool.submit(Exchange(0)) or asyncio.sleep(0))
        files.gate.clear()
        held = s.spool.submit(Exchange(1))
        assert held is not None
        closing = asyncio.create_task(s.spool.close())
        await asyncio.to_thread(files.waiting.wait, 5)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        assert held.done()
        files.gate.set()
        await asyncio.to_thread(s.spool._worker.join, 5)
        await asyncio.sleep(0)


# --- a disk that fails ---


async def test_when_the_budget_is_used_up_what_is_not_recorded_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with spool(tmp_path, max_bytes=10_000) as s:
        for number in range(300):
            await (s.spool.submit(Exchange(number, padding=100)) or asyncio.sleep(0))
            s.check_account()
        await s.settled()
        account = s.ledger.account()
        lines = len(s.bench.content("request")) + len(s.bench.content("response"))
        assert account.delivered == lines > 0
        assert account.discarded == {"spool_full": 600 - lines}
        assert sum(path.stat().st_size for path in (tmp_path / "data").rglob("*.jsonl")) <= 10_000
    assert caplog.text.count("Recording stopped: the disk budget (spool.max_bytes) is used up") == 1


async def test_lines_that_fit_now_and_then_do_not_flood_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is nearly full takes the small lines and refuses the large ones."""
    caplog.set_level("WARNING")
    async with spool(tmp_path, max_bytes=200_000) as s:
        for number in range(100):
            await (s.spool.submit(Exchange(number, padding=300_000)) or asyncio.sleep(0))
            await (s.spool.submit(Exchange(number)) or asyncio.sleep(0))
        await s.settled()
        assert s.ledger.account().discarded == {"spool_full": 200}
        assert s.ledger.account().delivered == 200
    assert len(caplog.records) <= 3, caplog.text


async def test_with_reject_nothing_passes_unrecorded_but_a_probe_and_it_recovers_by_itself(tmp_path: Path) -> None:
    async with spool(tmp_path, when_full=WhenFull.REJECT) as s:
        root = s.bench.places["request"].root
        root.parent.mkdir(parents=True)
        assert s.spool.admits()
        root.write_bytes(b"in the way")
        await (s.spool.submit(Exchange(0)) or asyncio.sleep(0))
        await s.settled()
        assert s.ledger.account().discarded == {"write_failed": 1}

        began = time.monotonic()
        probes = 0
        async with asyncio.timeout(10):
            while probes < 4:
                if s.spool.admits():
                    probes += 1
                    await (s.spool.submit(Exchange(probes)) or asyncio.sleep(0))
                await asyncio.sleep(0.01)
        assert time.monotonic() - began > 2 * PROBE_SECONDS

        root.unlink()
        async with asyncio.timeout(5):
            while not (s.spool.admits() and s.spool.admits() and s.spool.admits()):
                await (s.spool.submit(Exchange(99)) or asyncio.sleep(0))
                await asyncio.sleep(0.01)
        await s.settled()
        s.check_account()
        assert s.bench.content()


async def test_with_reject_a_disk_that_hangs_rejects_once_the_memory_is_full(tmp_path: Path) -> None:
    files = hung()
    async with spool(tmp_path, when_full=WhenFull.REJECT, memory_bytes=MIB, kind=files) as s:
        admitted = 0
        while s.spool.admits():
            s.spool.submit(Exchange(admitted))
            admitted += 1
            assert admitted < 20_000
        assert s.ledger.account().discarded == {"memory_full": 4}  # what found the memory full, and the first probe
        files.gate.set()
        await s.settled(10)
        await asyncio.sleep(0)
        assert s.spool.admits()
        assert s.spool.admits()


async def test_with_drop_everything_passes(tmp_path: Path) -> None:
    async with spool(tmp_path, max_bytes=1) as s:
        for number in range(10):
            assert s.spool.admits()
            await (s.spool.submit(Exchange(number)) or asyncio.sleep(0))
        assert s.ledger.account().discarded == {"spool_full": 20}


# --- durability ---

SYNCED = """
import asyncio, os, sys
from pathlib import Path
from proxy.settings import Durability
from tests.spool.workbench import Exchange, spool

async def main():
    async with spool(Path(sys.argv[1]), durability=Durability(sys.argv[2]), max_hold_seconds=30) as s:
        for number in range(3):
            await s.spool.submit(Exchange(number))
            os.write(1, b"released\\n")

asyncio.run(main())
"""


@pytest.mark.skipif(shutil.which("strace") is None and not os.environ.get("CI"), reason="strace is not installed")
def test_with_synced_the_kernel_has_put_it_on_the_disk_before_the_response_is_released(tmp_path: Path) -> None:
    calls = traced(tmp_path, Durability.SYNCED)
    groups = "".join(calls).split("R")
    assert len(groups) == 4
    for group in groups[:3]:
        writes, syncs = group.count("W"), group.count("S")
        assert writes == syncs == 2, calls
        assert group.rindex("W") < group.index("S"), calls
    # The new folders and files: their names, too, are on the disk before the first release.
    # In each collection: the four folders of the partition, each within the one above it, and the file within the last.
    assert groups[0].count("F") >= 2 * 5


@pytest.mark.skipif(shutil.which("strace") is None and not os.environ.get("CI"), reason="strace is not installed")
def test_with_written_nothing_is_synced(tmp_path: Path) -> None:
    calls = "".join(traced(tmp_path, Durability.WRITTEN))
    assert re.fullmatch("(WWR){3}", calls)


def traced(folder: Path, durability: Durability) -> list[str]:
    """In order: W a write of lines, S a sync of a file's data, F a sync of a folder, R a release."""
    trace = folder / "trace"
    subprocess.run(
        [
            *f"strace -f -y -e trace=writev,write,fdatasync,fsync -o {trace}".split(),
            *(sys.executable, "-c", SYNCED, str(folder / "spool"), durability.value),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    calls = []
    for line in trace.read_text().splitlines():
        if re.search(r"writev\(\d+<\S+\.jsonl>", line):
            calls.append("W")
        elif re.search(r"fdatasync\(\d+<\S+\.jsonl>", line):
            calls.append("S")
        elif re.search(r"fsync\(\d+</", line):
            calls.append("F")
        elif '"released\\n"' in line:
            calls.append("R")
    return calls


@pytest.mark.parametrize("durability", list(Durability))
async def test_a_body_in_a_file_of_its_own_is_there_before_the_release(tmp_path: Path, durability: Durability) -> None:
    class WithBody(Exchange):
        def render(self, store: object) -> list[tuple[str, bytes]]:
            assert isinstance(store, Files)
            url = store.keep_body("request", f"{self.number}", "a/b", [b"x" * 1000], large=False)
            return [("request", f'"{url}"\n'.encode())]

    async with spool(tmp_path, durability=durability, max_hold_seconds=30) as s:
        held = s.spool.submit(WithBody(1, events=1))
        if held is not None:
            await held
        await s.settled()
        [line] = s.bench.content()
        assert Path(line.decode().strip().strip('"').removeprefix("file://")).read_bytes() == b"x" * 1000


async def test_no_thread_is_left(tmp_path: Path) -> None:
    async with spool(tmp_path) as s:
        await (s.spool.submit(Exchange(0)) or asyncio.sleep(0))
        assert "spool-writer" in {thread.name for thread in threading.enumerate()}
    assert "spool-writer" not in {thread.name for thread in threading.enumerate()}
