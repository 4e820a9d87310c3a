"""One file and its blob: whatever goes wrong, the blobs of a file are the file, byte for byte, and nothing is counted twice."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import tracemalloc
from collections import deque
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.shipping import mirror as mirrors
from proxy.shipping.mirror import CHECKED_BYTES, BlobLostError, FileCutError, Mirror
from proxy.shipping.store import MAX_APPEND_BYTES, NotNow
from proxy.spool.files import LineFile
from proxy.spool.layout import instance_id
from tests.shipping.memory import FOREIGN, Fault, MemoryBlob, MemoryStore

_T = TypeVar("_T")

INSTANCE = "a" * 32 + "000001"
FOLDER = "prefix/request/2026/11/22/16/"
NAME = f"{FOLDER}{INSTANCE}.jsonl"
MIB = 1024 * 1024


def run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """``MemoryStore`` waits for nothing that needs a loop."""
    while True:
        try:
            coroutine.send(None)
        except StopIteration as stop:
            result: _T = stop.value
            return result


class Shipped:
    """A file that grows, its mirror in this process, and what Lane does with the two. ``delivered`` are the mirror's lines."""

    def __init__(self, folder: Path, store: MemoryStore) -> None:
        self.store = store
        self.file = LineFile(folder / f"{INSTANCE}.jsonl", "")
        self.content = b""
        self.delivered = 0
        self.delivered_by_the_dead = 0
        self.chain = [(NAME, 0)]  # the blobs, and where they begin in the file
        self.crashed = False
        self.done = False
        self.mirror = self._open(self.file.path, self.file)

    def _open(self, path: Path, file: LineFile | None) -> Mirror:
        def deliver(lines: int) -> None:
            assert lines >= 0
            self.delivered += lines

        return Mirror(self.store, FOLDER, path, deliver, file)

    def write(self, *lines: bytes) -> None:
        self.file.append(list(lines), sum(map(len, lines)))
        self.content += b"".join(lines)

    def crash(self) -> None:
        """The process dies; the next one takes over what it left."""
        self.mirror.close()
        if not self.file.closed:
            self.file.close()
        self.crashed = True
        self.delivered_by_the_dead += self.delivered
        self.delivered = 0
        self.mirror = self._open(self.mirror.path, None)

    def ship(self, until: int | None = None, appends: int = 100) -> str | None:
        """Until it is there, or fails: then the reason."""
        until = self.mirror.length if until is None else until
        failed = None
        try:
            while appends and self.mirror.roll_at is None and self.mirror.length - self.mirror.left_bytes < until:
                run(self.mirror.ship(until))
                appends -= 1
        except NotNow as error:
            failed = error.reason
        except BlobLostError as error:
            self.mirror.roll_at = error.at
            failed = str(error)
            if not self.file.closed:
                self.file.close()
        if self.mirror.is_done:
            self.done = True
        elif self.mirror.closed and self.mirror.roll_at is not None:
            at = self.mirror.roll_at
            self.mirror.roll()
            self.chain.append((self.mirror.name, at))
        return failed

    def finish(self) -> None:
        """Nothing goes wrong any more."""
        self.store.plan = None
        if not self.file.closed:
            self.file.close()
        for _ in range(50):
            if self.done:
                break
            self.ship()
        assert self.done, "it does not come to an end"

    def blobs(self) -> list[MemoryBlob]:
        return [self.store.blobs.get(name, MemoryBlob()) for name, _ in self.chain]

    def arrived(self) -> bytes:
        """What the blobs hold of the file."""
        return b"".join(blob.ours for blob in self.blobs() if blob.kind == "append")

    def close(self) -> None:
        self.mirror.close()
        if not self.file.closed:
            self.file.close()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def shipped(tmp_path: Path, store: MemoryStore) -> Iterator[Shipped]:
    shipped = Shipped(tmp_path, store)
    yield shipped
    shipped.close()


def faults(store: MemoryStore, *planned: Fault | None, operation: str | None = None) -> None:
    """They happen one after the other, with the next calls, or those of ``operation``."""
    waiting = deque(planned)

    def plan(asked: str, _name: str) -> Fault | None:
        return waiting.popleft() if waiting and operation in (None, asked) else None

    store.plan = plan


LINE = b'{"line": 1}\n'


# --- as it should be ---


def test_the_blob_is_the_file(shipped: Shipped, store: MemoryStore) -> None:
    for number in range(5):
        shipped.write(b"%d\n" % number)
        assert shipped.ship() is None
        assert store.blobs[NAME].data == shipped.content
    shipped.finish()
    assert store.calls == {"look": 1, "create": 1, "append": 5}
    assert shipped.delivered == 5


def test_all_that_fits_goes_in_one_append(shipped: Shipped, store: MemoryStore) -> None:
    line = b"x" * (MAX_APPEND_BYTES // 5) + b"\n"
    shipped.write(*[line] * 4)
    shipped.ship()
    shipped.write(*[line] * 6)
    shipped.finish()
    assert [len(block) // len(line) for block in store.blobs[NAME].blocks] == [4, 2, 4]  # several: of half the size


@pytest.mark.parametrize("size", [MAX_APPEND_BYTES - 1, MAX_APPEND_BYTES, MAX_APPEND_BYTES + 1, 11 * MIB])
def test_a_line_goes_in_one_append_however_long_it_is(shipped: Shipped, store: MemoryStore, size: int) -> None:
    shipped.write(LINE, b"x" * (size - 1) + b"\n", LINE)
    shipped.finish()
    assert store.blobs[NAME].data == shipped.content
    assert all(block.endswith(b"\n") for block in store.blobs[NAME].blocks)
    assert store.largest_block <= size + len(LINE)


def test_only_the_lines_up_to_the_noted_length_are_shipped(shipped: Shipped, store: MemoryStore) -> None:
    shipped.write(LINE)
    noted = shipped.mirror.length
    shipped.write(LINE)
    shipped.ship(noted)
    assert store.blobs[NAME].data == LINE


def test_an_empty_file_makes_no_blob(shipped: Shipped, store: MemoryStore) -> None:
    shipped.finish()
    assert store.blobs == {}


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    class Sink(MemoryStore):
        length = 0

        async def append(self, name: str, data: bytes, position: int) -> None:
            assert position == self.length
            self.length += len(data)

        async def read(self, name: str, start: int, size: int) -> bytes:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(size)

    path, store = tmp_path / f"{INSTANCE}.jsonl", Sink()
    line = b"x" * 1023 + b"\n"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(line * 1024)
    with contextlib.closing(Mirror(store, FOLDER, path, lambda _: None)) as mirror:
        tracemalloc.start()
        try:
            while mirror.left_bytes:
                run(mirror.ship(mirror.length))
            store.blobs[NAME] = MemoryBlob(blocks=[])
            mirror._found, mirror._position = False, None
            mirror._told = 0
            run(mirror._same(0, mirror.length))
            mirror._lines(0, mirror.length)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert store.length == 64 * MIB
    assert peak < 3 * MAX_APPEND_BYTES


# --- it is not known whether an append worked ---


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.LATE, Fault.REFUSED])
@pytest.mark.parametrize("operation", ["look", "create", "append"])
@pytest.mark.parametrize("crash", [False, True])
def test_what_is_doubtful_is_sent_again_and_there_once(
    shipped: Shipped, store: MemoryStore, fault: Fault, operation: str, crash: bool
) -> None:
    shipped.write(LINE)
    faults(store, fault, operation=operation)
    assert shipped.ship() in ("busy", "timeout")
    shipped.write(b"second\n")
    if crash:
        shipped.crash()
    shipped.finish()
    assert shipped.arrived() == shipped.content == LINE + b"second\n"
    assert shipped.chain == [(NAME, 0)]
    if not crash:
        assert shipped.delivered == 2


def test_a_late_append_that_comes_when_nobody_expects_it_any_more_is_seen(shipped: Shipped, store: MemoryStore) -> None:
    shipped.write(LINE)
    faults(store, Fault.LATE, operation="append")
    assert shipped.ship() == "timeout"
    shipped.write(b"second\n")
    store.settle()
    shipped.finish()
    assert store.blobs[NAME].blocks == [LINE, b"second\n"]
    assert shipped.delivered == 2


def test_an_append_that_was_refused_for_what_is_gone_by_now_is_tried_again(
    shipped: Shipped, store: MemoryStore
) -> None:
    """Not in the same turn: it might go on like this."""
    shipped.write(LINE)
    faults(store, None, None, Fault.FOREIGN, Fault.CUT)
    assert shipped.ship() == "busy"
    assert store.trace[-2:] == [("append", NAME), ("look", NAME)]
    shipped.finish()
    assert store.blobs[NAME].blocks == [LINE]


# --- somebody else writes ---


def test_a_blob_that_somebody_else_writes_in_is_left(shipped: Shipped, store: MemoryStore) -> None:
    shipped.write(LINE)
    shipped.ship()
    store.disturb(Fault.FOREIGN, NAME)
    shipped.write(b"second\n", b"third\n")
    assert shipped.ship() == "somebody else wrote in it"
    shipped.finish()
    assert store.blobs[NAME].blocks == [LINE, FOREIGN]
    (_, (second, at)) = shipped.chain
    assert at == len(LINE)
    assert store.blobs[second].blocks == [b"second\n", b"third\n"] or store.blobs[second].data == b"second\nthird\n"
    assert shipped.delivered == 3
    assert shipped.mirror.path.name == f"{INSTANCE}@{at}@{Path(second).name}"
    assert not (shipped.mirror.path.parent / f"{INSTANCE}.jsonl").exists()


def test_a_foreign_line_is_noticed_when_a_doubtful_append_is_looked_for(shipped: Shipped, store: MemoryStore) -> None:
    shipped.write(LINE)
    faults(store, Fault.LOST, operation="append")
    shipped.ship()
    store.disturb(Fault.FOREIGN, NAME)
    assert shipped.ship() == "somebody else wrote in it"
    assert shipped.done
    assert shipped.delivered == 1


def test_a_foreign_line_after_the_last_one_changes_nothing(shipped: Shipped, store: MemoryStore) -> None:
    shipped.write(LINE)
    shipped.ship()
    shipped.crash()
    store.disturb(Fault.FOREIGN, NAME)
    assert shipped.ship() is None
    assert shipped.done
    assert store.blobs[NAME].blocks == [LINE, FOREIGN]


def test_a_file_that_lost_its_end_with_the_power_is_done(shipped: Shipped, store: MemoryStore) -> None:
    """With durability ``written`` the blob may have more of it than the disk."""
    shipped.write(LINE, LINE)
    shipped.ship()
    os.truncate(shipped.file.path, len(LINE))
    shipped.crash()
    assert shipped.ship() is None
    assert shipped.done
    assert store.blobs[NAME].data == LINE + LINE


def test_a_blob_that_was_there_before_is_not_touched(shipped: Shipped, store: MemoryStore) -> None:
    store.blobs[NAME] = MemoryBlob(blocks=[FOREIGN], foreign=[True])
    shipped.write(LINE)
    shipped.finish()
    assert store.blobs[NAME].blocks == [FOREIGN]
    assert shipped.arrived() == LINE
    assert [at for _, at in shipped.chain] == [0, 0]


def test_half_of_our_line_and_then_a_foreign_one(shipped: Shipped, store: MemoryStore) -> None:
    """Whoever copied that: the line that is not whole there goes to the next blob, whole."""
    shipped.write(b"first\n", b"second\n")
    store.blobs[NAME] = MemoryBlob(blocks=[b"first\nsec", FOREIGN], foreign=[False, True])
    shipped.finish()
    assert [at for _, at in shipped.chain] == [0, len(b"first\n")]
    assert store.blobs[shipped.chain[1][0]].data == b"second\n"
    assert shipped.delivered == 2


def test_a_foreign_write_deep_below_the_end_is_found_after_a_crash(shipped: Shipped, store: MemoryStore) -> None:
    """The last 64 KiB are compared, and all the rest only if they are not the same."""
    line = b"x" * 999 + b"\n"
    shipped.write(*[line] * 200)
    foreign = b"y" * 500 + b"\n" + line * 150
    store.blobs[NAME] = MemoryBlob(blocks=[line * 10, line[:500], foreign], foreign=[False, True, True])
    shipped.crash()
    shipped.finish()
    assert [at for _, at in shipped.chain] == [0, 10 * len(line)]
    assert store.blobs[shipped.chain[1][0]].data == line * 190


def test_what_a_crash_left_is_continued_without_reading_all_of_it(shipped: Shipped, store: MemoryStore) -> None:
    line = b"x" * 999 + b"\n"
    shipped.write(*[line] * 300)
    shipped.ship()
    shipped.write(LINE)
    shipped.crash()
    store.trace.clear()
    shipped.finish()
    assert shipped.arrived() == shipped.content
    assert store.calls == {"look": 1, "read": 1, "append": 1}
    assert store.read_bytes == mirrors.CHECKED_BYTES < len(shipped.content)
    assert shipped.delivered == 1


def test_another_kind_of_blob_is_left(shipped: Shipped, store: MemoryStore) -> None:
    shipped.write(LINE)
    shipped.ship()
    store.disturb(Fault.REPLACED, NAME)
    shipped.write(b"second\n")
    assert shipped.ship() == "busy"
    assert shipped.ship() == "somebody put another kind of blob there"
    shipped.finish()
    assert store.blobs[NAME].data == FOREIGN
    assert store.blobs[shipped.chain[1][0]].data == shipped.content
    assert shipped.delivered == 2


def test_a_full_blob_is_left(tmp_path: Path) -> None:
    store = MemoryStore(max_blocks=3)
    shipped = Shipped(tmp_path, store)
    for number in range(4):
        shipped.write(b"%d\n" % number)
        shipped.ship()
    shipped.finish()
    shipped.close()
    assert [blob.data for blob in shipped.blobs()] == [b"0\n1\n2\n", b"3\n"]
    assert shipped.delivered == 4


def test_a_blob_that_is_full_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "MAX_APPEND_BYTES", 4)
    monkeypatch.setattr(mirrors, "BACKLOG_APPEND_BYTES", 4)
    store = MemoryStore(max_blocks=3)
    shipped = Shipped(tmp_path, store)
    shipped.write(*[b"%d\n" % number for number in range(14)])
    shipped.crash()
    shipped.finish()
    shipped.close()
    assert b"".join(blob.data for blob in shipped.blobs()) == shipped.content
    assert len(shipped.chain) == 3
    assert shipped.delivered == 14
    assert shipped.mirror.path.name.startswith(f"{INSTANCE}@")


# --- somebody deletes ---


@pytest.mark.parametrize("crash", [False, True])
def test_a_blob_that_is_deleted_is_made_again_whole(shipped: Shipped, store: MemoryStore, crash: bool) -> None:
    shipped.write(LINE)
    shipped.ship()
    store.disturb(Fault.DELETED, NAME)
    shipped.write(b"second\n")
    if crash:
        shipped.crash()
    shipped.finish()
    assert store.blobs[NAME].data == shipped.content
    assert crash or shipped.delivered == 2


def test_a_blob_that_lost_its_last_append_is_made_whole(shipped: Shipped, store: MemoryStore) -> None:
    for line in (b"first\n", b"second\n"):
        shipped.write(line)
        shipped.ship()
    store.disturb(Fault.CUT, NAME)
    shipped.write(b"third\n")
    shipped.finish()
    assert store.blobs[NAME].data == shipped.content
    assert shipped.delivered == 3


@pytest.mark.parametrize("fault", [Fault.DELETED, Fault.CUT])
def test_a_blob_that_is_deleted_while_it_is_compared_is_made_again_whole(
    shipped: Shipped, store: MemoryStore, fault: Fault
) -> None:
    """What was in it is not in any other blob."""
    shipped.write(b"first\n")
    shipped.ship()
    shipped.write(b"second\n")
    faults(store, Fault.LOST, operation="append")
    assert shipped.ship() == "timeout"
    shipped.write(b"third\n")
    faults(store, fault, operation="read")
    shipped.ship()
    assert store.happened[fault] == 1
    shipped.finish()
    assert shipped.chain == [(NAME, 0)]
    assert shipped.arrived() == shipped.content
    assert shipped.delivered == 3


# --- the file ---


def test_half_a_line_at_the_end_of_a_dead_process_s_file_is_not_shipped(shipped: Shipped, store: MemoryStore) -> None:
    """Recovery cuts it off; but a journal can be deleted, and a file renamed."""
    shipped.write(LINE)
    shipped.ship()
    with shipped.file.path.open("ab") as file:
        file.write(b'{"ha')
    shipped.crash()
    shipped.finish()
    assert store.blobs[NAME].data == LINE


@pytest.mark.parametrize("foreign_bytes", [10, CHECKED_BYTES - 1, CHECKED_BYTES, 3 * CHECKED_BYTES])
@pytest.mark.parametrize("ours", [0, 1, 2])
def test_a_dead_process_s_blob_that_has_become_longer_than_its_file(
    shipped: Shipped, store: MemoryStore, ours: int, foreign_bytes: int
) -> None:
    """By somebody else's bytes: what is missing before them goes to another blob."""
    lines = [b"%d\n" % number for number in range(3)]
    shipped.write(*lines[:ours])
    shipped.ship()
    if not ours:
        run(store.create(NAME))
    shipped.write(*lines[ours:])
    store.blobs[NAME].blocks.append(b"f" * foreign_bytes)
    store.blobs[NAME].foreign.append(True)
    shipped.crash()
    shipped.finish()
    assert shipped.arrived() == shipped.content
    assert store.blobs[NAME].data.endswith(b"f" * foreign_bytes)


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.DELETED])
def test_what_a_blob_loses_before_the_file_goes_is_shipped_again(
    shipped: Shipped, store: MemoryStore, fault: Fault
) -> None:
    shipped.write(b"first\n")
    shipped.ship()
    shipped.write(b"second\n")
    shipped.ship()
    shipped.file.close()
    assert shipped.mirror.is_done
    store.disturb(fault, NAME)
    run(shipped.mirror.confirm())
    assert not shipped.mirror.is_done
    shipped.ship()
    run(shipped.mirror.confirm())
    assert shipped.mirror.is_done
    assert store.blobs[NAME].data == shipped.content
    assert shipped.delivered == 2


def test_a_file_that_became_shorter_than_what_is_elsewhere_is_done(tmp_path: Path, store: MemoryStore) -> None:
    path = tmp_path / f"{INSTANCE}@1000@{'b' * 32}000001.jsonl"
    path.write_bytes(LINE)
    with contextlib.closing(Mirror(store, FOLDER, path, lambda _: None)) as mirror:
        assert mirror.left_bytes == 0
        assert mirror.is_done


def test_a_file_that_somebody_cuts_does_not_hang(shipped: Shipped, store: MemoryStore) -> None:
    shipped.write(LINE, LINE)
    os.truncate(shipped.file.path, 0)
    with pytest.raises(FileCutError):
        run(shipped.mirror.ship(shipped.mirror.length))
    assert not store.blobs or store.blobs[NAME].data == b""


@pytest.mark.parametrize("length", [0, 2, len(LINE), MAX_APPEND_BYTES + 100])
def test_a_file_that_somebody_cuts_while_its_blob_is_made_is_not_shipped_in_part(
    shipped: Shipped, store: MemoryStore, length: int
) -> None:
    shipped.write(LINE, b"x" * (MAX_APPEND_BYTES + 1000) + b"\n")

    def cut(operation: str, _name: str) -> None:
        if operation == "create":
            os.truncate(shipped.file.path, length)

    store.plan = cut
    with pytest.raises(FileCutError):
        shipped.ship()
    assert store.blobs[NAME].data == (LINE if length >= len(LINE) else b"")


def test_a_file_that_is_cut_and_written_again_is_not_mixed_up(shipped: Shipped, store: MemoryStore) -> None:
    shipped.write(b"first\n")
    shipped.ship()
    os.truncate(shipped.file.path, 0)
    shipped.write(b"a longer second line\n")
    with pytest.raises(FileCutError):
        run(shipped.mirror.ship(shipped.mirror.length))
    assert store.blobs[NAME].data == b"first\n"


def test_a_file_that_somebody_deletes_is_shipped_all_the_same(shipped: Shipped, store: MemoryStore) -> None:
    """It is open: what was in it is still there."""
    shipped.write(LINE)
    shipped.ship()
    shipped.file.path.unlink()
    shipped.write(b"second\n")
    store.disturb(Fault.FOREIGN, NAME)
    shipped.ship()
    shipped.finish()
    assert shipped.arrived() == shipped.content


def test_one_process_at_a_time(shipped: Shipped, store: MemoryStore) -> None:
    with pytest.raises(BlockingIOError):
        Mirror(store, FOLDER, shipped.file.path, lambda _: None)
    shipped.mirror.close()
    Mirror(store, FOLDER, shipped.file.path, lambda _: None).close()
    shipped.mirror = Mirror(store, FOLDER, shipped.file.path, lambda _: None)


def test_a_file_that_was_renamed_while_it_was_opened_is_left(
    tmp_path: Path, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name would say too little: it goes on in another blob by now. The process that renamed it has died since."""
    path = tmp_path / f"{INSTANCE}.jsonl"
    path.write_bytes(LINE)
    lock = fcntl.flock

    def lock_late(fd: int, how: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.rename(tmp_path / f"{INSTANCE}@{len(LINE)}@{'b' * 38}.jsonl")
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with pytest.raises(FileNotFoundError):
        Mirror(store, FOLDER, path, lambda _: None)


def test_the_millionth_file_of_a_process(tmp_path: Path, store: MemoryStore) -> None:
    path = tmp_path / f"{instance_id('a' * 32, 1_000_000)}.jsonl"
    path.write_bytes(LINE)
    with contextlib.closing(Mirror(store, FOLDER, path, lambda _: None)) as mirror:
        run(mirror.ship(mirror.length))
    assert store.blobs[f"{FOLDER}{path.name}"].data == LINE


def test_a_name_that_is_none_of_ours(tmp_path: Path, store: MemoryStore) -> None:
    for name in ("x.jsonl", f"{INSTANCE}.jsonl.tmp", f"{INSTANCE}@1.jsonl", f".{INSTANCE}.jsonl"):
        path = tmp_path / name
        path.touch()
        with pytest.raises(ValueError):
            Mirror(store, FOLDER, path, lambda _: None)


# --- anything, in any order ---

PIECE = st.binary(min_size=0, max_size=60).map(lambda text: text.replace(b"\n", b" ") + b"\n")
LONG = st.integers(100, 400).map(lambda size: b"x" * size + b"\n")
FAULTS = st.lists(st.none() | st.sampled_from(Fault), max_size=6)


class AnyOrder(RuleBasedStateMachine):
    """A process writes, ships, dies; everything goes wrong at every call, and others meddle.

    Sizes are small: a block has up to 100 bytes, a blob up to 8 blocks, and 64 bytes are compared in reads of 32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        for name, value in {
            "MAX_APPEND_BYTES": 100,
            "BACKLOG_APPEND_BYTES": 70,
            "CHECKED_BYTES": 64,
            "_READ_BYTES": 32,
        }.items():
            self.patch.setattr(mirrors, name, value)
        self.store = MemoryStore(max_blocks=8)
        self.shipped = Shipped(Path(self.folder.name), self.store)
        self.number = 0
        self.meddled = False

    @precondition(lambda self: not self.shipped.file.closed)
    @rule(pieces=st.lists(PIECE | LONG, min_size=1, max_size=4))
    def write(self, pieces: list[bytes]) -> None:
        numbered = []
        for piece in pieces:
            self.number += 1
            numbered.append(b"%d " % self.number + piece)
        self.shipped.write(*numbered)

    @precondition(lambda self: not self.shipped.done)
    @rule(planned=FAULTS, part=st.floats(0, 1), appends=st.integers(1, 5))
    def ship(self, planned: list[Fault | None], part: float, appends: int) -> None:
        waiting = deque(planned)

        def plan(operation: str, _name: str) -> Fault | None:
            fault = waiting.popleft() if waiting else None
            if fault is Fault.CONTAINER and len(self.shipped.chain) > 1:
                return None  # what is in blobs that were left before can't be shipped again
            if fault is Fault.REPLACED and operation == "read":
                return None  # nor can be noticed what happens between two looks
            self.meddled |= fault not in (None, Fault.REFUSED, Fault.LOST, Fault.LATE)
            return fault

        self.store.plan = plan
        self.shipped.ship(self._noted(part), appends)

    def _noted(self, part: float) -> int:
        """The end of some line."""
        content = self.shipped.content[: int(part * len(self.shipped.content))]
        return content.rfind(b"\n") + 1 if part < 1 else len(self.shipped.content)

    @precondition(lambda self: not self.shipped.file.closed)
    @rule()
    def close_file(self) -> None:
        self.shipped.file.close()

    @precondition(lambda self: not self.shipped.done)
    @rule()
    def crash(self) -> None:
        self.shipped.crash()

    @rule()
    def settle(self) -> None:
        self.store.settle()

    @invariant()
    def lines_are_counted_once(self) -> None:
        shipped = self.shipped
        assert 0 <= shipped.delivered <= shipped.content.count(b"\n")
        if not self.meddled:  # else some are shipped again, and counted by the process that does so
            assert shipped.delivered + shipped.delivered_by_the_dead <= shipped.content.count(b"\n")

    @invariant()
    def blobs_are_as_they_should_be(self) -> None:
        for name, blob in self.store.blobs.items():
            foreign = False
            for block, theirs in zip(blob.blocks, blob.foreign, strict=True):
                foreign |= theirs
                assert theirs or not foreign, f"{name} was continued"
                assert theirs or block.endswith(b"\n")
                assert len(block) <= 100 or block.count(b"\n") == 1, "more than fits in a block"
                assert blob.kind == "append" or theirs
        assert set(self.store.blobs) <= {name for name, _ in self.shipped.chain}

    def teardown(self) -> None:
        try:
            self.shipped.finish()
            self.store.settle()
            self.blobs_are_as_they_should_be()
            self.lines_are_counted_once()
            assert self.shipped.arrived() == self.shipped.content
            bases = [at for _, at in self.shipped.chain]
            assert bases == sorted(bases)
            if not self.shipped.crashed:
                assert self.shipped.delivered == self.shipped.content.count(b"\n")
        finally:
            self.shipped.close()
            self.patch.undo()
            self.folder.cleanup()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=250, stateful_step_count=20, deadline=None, derandomize=True, database=None
)
