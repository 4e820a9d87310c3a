"""The way from the event loop to the disk: a bounded hand-off, one writer thread, group writes.

The loop hands over whole exchanges (``Spool.submit``) and pieces of large bodies (``BodyFile.write``), and wakes the
thread once per turn. The thread takes all that waits, renders it, appends it with one ``writev`` per file, and tells
the loop once per group. A disk that hangs stops the thread only: the loop lets responses go after ``max_hold`` and
discards what exceeds the memory.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from proxy.ledger import Discard, Ledger
from proxy.settings import Durability, WhenFull
from proxy.spool.bell import Bell
from proxy.spool.files import Files, LineFile, SpoolFull

logger = logging.getLogger("payload_logger.spool")

# One group: small enough that rendering it holds the GIL for well under a millisecond or two of small exchanges.
GROUP_JOBS = 64
GROUP_BYTES = 1024 * 1024
# Pieces of large bodies that may wait for the disk, all together; also what waits above memory_bytes at most.
HANDOFF_BYTES = 16 * 1024 * 1024
ENTRY_BYTES = 2 * 1024  # what an exchange takes in memory beside its bodies
PROBE_SECONDS = 1.0  # while the disk fails, and traffic is rejected for it, one exchange in this time tries again
BODY_WAIT_SECONDS = 1.0  # longest that a piece of a large body waits; a disk that hangs costs it once, not each body
QUIET_SECONDS = 60.0  # after this long without a refusal, the next one is news again
CALM_SECONDS = 0.5  # without a failure, before a disk counts as mended: one nearly full takes some lines and not others
_DEFECT = "a defect of payload-logger"


class Store(Protocol):
    """Where rendering puts bodies that don't fit in a line. ``Files`` is one."""

    def keep_body(
        self, collection: str, event_id: str, content_type: str, pieces: Iterable[bytes], *, large: bool
    ) -> str | None: ...


class Entry(Protocol):
    """What is recorded of one exchange, or of one frame: its lines, rendered on the writer thread."""

    events: int
    held_bytes: int  # of ``Spool.memory``, released once the entry is written

    def render(self, store: Store) -> list[tuple[str, bytes]]:
        """(collection, line) for each event, each line with its LF. Raises SpoolFull or OSError: there is none."""

    def discard(self) -> None:
        """The entry is not going to be rendered. Called on the loop."""

    def not_written(self, collection: str, reason: str) -> None:
        """The entry's lines of ``collection`` are discarded, and counted. Called on the writer thread."""


class Flow(Protocol):
    """A body that flows to the disk."""

    def give_up(self) -> None:
        """The disk makes no progress: nothing more of this body is to be handed over."""


class Memory:
    """The bytes of bodies in flight. Loop only."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0

    def take(self, size: int) -> bool:
        if self.held_bytes + size > self.limit_bytes:
            return False
        self.held_bytes += size
        return True

    def release(self, size: int) -> None:
        self.held_bytes -= size


@dataclass(frozen=True, slots=True)
class _Room:
    """Room for further pieces of bodies, to be awaited, or not."""

    spool: Spool
    body: Flow

    def __await__(self) -> Generator[Any, None, None]:
        return self.spool.wait_for_room(self.body).__await__()


_Submitted = tuple[Entry, "asyncio.Future[bool] | None"]
_Group = tuple[list[_Submitted], int, bool]
_Job = _Submitted | Callable[[], int] | None


class Spool:
    """Takes what is to be recorded. Use: ``start``, ``submit`` …, ``await close``; all on the event loop."""

    def __init__(
        self,
        files: Files,
        ledger: Ledger,
        loop: asyncio.AbstractEventLoop,
        *,
        durability: Durability,
        when_full: WhenFull,
        max_hold_seconds: float,
        memory_bytes: int,
    ) -> None:
        self.memory = Memory(memory_bytes)
        self.ledger = ledger
        self.files = files
        self._loop = loop
        self._holds = durability is not Durability.NONE
        self._rejects = when_full is WhenFull.REJECT
        self._max_hold_seconds = max_hold_seconds
        self._jobs: deque[_Job] = deque()
        self._for_thread = Bell()
        self._for_loop = Bell(blocking=False)
        self._groups: deque[_Group] = deque()  # written, and not yet told of
        self._waking = False
        self._thread_done = False
        self._is_closed = False
        self._worker = threading.Thread(target=self._run, name="spool-writer", daemon=True)
        self._closed: asyncio.Future[None] = loop.create_future()
        self._held: deque[tuple[float, asyncio.Future[bool]]] = deque()
        self._hold_timer: asyncio.TimerHandle | None = None
        self._spilled_bytes = 0
        self._progress: asyncio.Event = asyncio.Event()
        self.stalled = False  # pieces of bodies have waited in vain: none is to be handed over
        self._troubles: set[str] = set()  # what the log was told since recording stopped; the thread's
        self._lost_in_trouble = 0
        self._failed_at = 0.0
        self._probe_at = 0.0
        self._refused_at = -QUIET_SECONDS
        self._behind = False
        self.is_late = False  # what was submitted was let go after max_hold, and nothing was written since

    def start(self) -> None:
        self._loop.add_reader(self._for_loop.fileno(), self._collect)
        self._worker.start()

    async def close(self, timeout_seconds: float = 10.0) -> None:
        """Writes what waits, closes the files. A disk that hangs is left after ``timeout_seconds``."""
        self._put(None)
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._closed
        except TimeoutError:
            if not self._thread_done:
                pending = self.ledger.settle()
                logger.error(
                    "The disk did not answer within %g s; %d events were not recorded.", timeout_seconds, pending
                )
        finally:
            self._loop.remove_reader(self._for_loop.fileno())
            self._take_groups()
            self._is_closed = True
            if self._thread_done:
                self._close_bells()
            if self._hold_timer is not None:
                self._hold_timer.cancel()
            while self._held:
                _set_result(self._held.popleft()[1], False)

    # --- called by capture, on the loop ---

    @property
    def is_full(self) -> bool:
        """Whether what is submitted now would be refused."""
        return self.memory.held_bytes + ENTRY_BYTES > self.memory.limit_bytes + HANDOFF_BYTES

    def admits(self) -> bool:
        """Whether an exchange may pass. False only with ``when_full: reject``, while nothing can be recorded."""
        if not self._rejects or not (self._troubles or self._behind):
            return True
        now = self._loop.time()
        if now < self._probe_at:
            return False
        self._probe_at = now + PROBE_SECONDS
        return True

    def submit(self, entry: Entry, *, received: bool = False) -> asyncio.Future[bool] | None:
        """Records ``entry``. What is returned is done when it need not be waited for any longer; None: now.

        Its result is whether the writer thread has dealt with ``entry`` by then, as durably as it should; False: max_hold
        has gone by, or the disk did not sync. received: its events are counted as such already.
        """
        if not received:
            self.ledger.receive(entry.events)
        if self._is_closed:
            self.ledger.settle()
            entry.discard()
            return None
        if self.is_full:
            self._refuse(entry)
            return None
        self.memory.held_bytes += ENTRY_BYTES
        if not self._holds:
            self._put((entry, None))
            return None
        future = self._loop.create_future()
        self._held.append((self._loop.time(), future))
        if self._hold_timer is None:
            self._hold_timer = self._loop.call_later(self._max_hold_seconds, self._let_go)
        self._put((entry, future))
        return future

    def hand_over(self, body: Flow, job: Callable[[], int], size: int) -> Awaitable[None] | None:
        """Has the thread do ``job``, which holds ``size`` bytes of ``body`` and returns as many.

        What is returned, if anything, is to be awaited before the next one.
        """
        self._spilled_bytes += size
        self._put(job)
        return _Room(self, body) if self._spilled_bytes > HANDOFF_BYTES else None

    def retire(self, file: LineFile) -> None:
        """Has the thread close ``file``."""

        def job() -> int:
            self.files.retire(file)
            return 0

        self._put(job)

    async def wait_for_room(self, body: Flow) -> None:
        """Waits until pieces of bodies may be handed over again; gives the body up when the disk makes no progress."""
        while self._spilled_bytes > HANDOFF_BYTES:
            self._progress.clear()
            try:
                async with asyncio.timeout(BODY_WAIT_SECONDS):
                    await self._progress.wait()
            except TimeoutError:
                self.stalled = True
                body.give_up()
                return

    # --- on the loop ---

    def _put(self, job: _Job) -> None:
        """Hands a job over. The thread is woken once for all that one turn of the loop has for it."""
        self._jobs.append(job)
        if not self._waking:
            self._waking = True
            self._loop.call_soon(self._wake_thread)

    def _wake_thread(self) -> None:
        self._waking = False
        self._for_thread.ring()

    def _refuse(self, entry: Entry) -> None:
        self.ledger.discard(Discard.MEMORY_FULL, entry.events)
        self.memory.release(entry.held_bytes)
        entry.discard()
        self._behind = True
        now = self._loop.time()
        if now - self._refused_at > QUIET_SECONDS:
            logger.error(
                "Recording is behind: the disk is slower than the traffic, or hangs. Events are discarded and counted."
            )
        self._refused_at = now

    def _let_go(self) -> None:
        """Releases responses that have waited for max_hold."""
        self._hold_timer = None
        now = self._loop.time()
        released = 0
        while self._held:
            since, future = self._held[0]
            if not future.done():
                left = since + self._max_hold_seconds - now
                if left > 0:
                    self._hold_timer = self._loop.call_later(left, self._let_go)
                    break
                future.set_result(False)
                released += 1
            self._held.popleft()
        if released:
            self.is_late = True
            self.ledger.release_unheld(released)

    def _ended(self) -> None:
        self._thread_done = True
        if not self._closed.done():
            self._closed.set_result(None)
        if self._is_closed:  # without waiting for the thread
            self._close_bells()

    def _close_bells(self) -> None:
        self._for_thread.close()
        self._for_loop.close()

    def _collect(self) -> None:
        self._for_loop.sleep()
        self._take_groups()

    def _take_groups(self) -> None:
        while self._groups:
            self._written(*self._groups.popleft())

    def _written(self, group: list[_Submitted], spilled_bytes: int, confirmed: bool) -> None:
        """A group is written, or discarded and counted."""
        for entry, future in group:
            self.memory.held_bytes -= entry.held_bytes + ENTRY_BYTES
            if future is not None:
                _set_result(future, confirmed)
        held = self._held
        while held and held[0][1].done():
            held.popleft()
        self._behind = False
        self.is_late = False
        if spilled_bytes:
            self._spilled_bytes -= spilled_bytes
            self.stalled = False
            self._progress.set()

    # --- on the writer thread ---

    def _run(self) -> None:
        stopping = False
        while not stopping:
            self._for_thread.sleep()
            while self._jobs and not stopping:
                stopping = self._write_group()
        try:
            self.files.close()
        except OSError as error:
            logger.error("The spool's files could not be closed: %s.", error)
        try:
            self._loop.call_soon_threadsafe(self._ended)
        except RuntimeError:  # the loop was closed without waiting for a disk that hung
            self._close_bells()

    def _write_group(self) -> bool:
        """Takes what waits, up to a limit; whether the thread is to end."""
        group: list[_Submitted] = []
        lines: dict[str, list[bytes]] = {}
        spilled = size = 0
        stopping = confirmed = False
        try:
            self.files.begin(time.time())
            while self._jobs and not stopping and len(group) < GROUP_JOBS and size + spilled <= GROUP_BYTES:
                job = self._jobs.popleft()
                if job is None:
                    stopping = True
                elif isinstance(job, tuple):
                    group.append(job)
                    size += self._render(job[0], lines)
                else:
                    spilled += self._do(job)
            confirmed = self._append(lines, group)
        except Exception:
            logger.exception("A group could not be written whole, by a defect of payload-logger; the thread goes on.")
        self._groups.append((group, spilled, confirmed))
        self._for_loop.ring()
        return stopping

    def _do(self, job: Callable[[], int]) -> int:
        try:
            return job()
        except Exception:
            logger.exception("A piece of a body could not be kept, by a defect of payload-logger.")
            return 0

    def _render(self, entry: Entry, lines: dict[str, list[bytes]]) -> int:
        size = 0
        try:
            for collection, line in entry.render(self.files):
                lines.setdefault(collection, []).append(line)
                size += len(line)
        except (SpoolFull, OSError) as error:
            entry.not_written("", self._fail(error, entry.events))
        except Exception:
            self.ledger.discard(Discard.RENDER_FAILED, entry.events)
            entry.not_written("", _DEFECT)
            logger.exception(
                "An event could not be rendered, by a defect of payload-logger; it is discarded and counted."
            )
        return size

    def _append(self, lines: dict[str, list[bytes]], group: list[_Submitted]) -> bool:
        """Whether what could be written is as safe as it should be."""
        for collection, written in lines.items():
            failure = self._append_to(collection, written)
            if failure is not None:
                for entry, _ in group:
                    entry.not_written(collection, failure)
        try:
            self.files.end()
        except OSError as error:
            logger.error("Lines are written, but could not be synced to the disk: %s.", error)
            return False
        return True

    def _append_to(self, collection: str, lines: list[bytes]) -> str | None:
        """Why the lines were not written; None: they were."""
        try:
            self.files.append(collection, lines)
        except (SpoolFull, OSError) as error:
            return self._fail(error, len(lines))
        except Exception:
            logger.exception("Events could not be written, by a defect of payload-logger; they are discarded.")
            self.ledger.discard(Discard.RENDER_FAILED, len(lines))
            return _DEFECT
        if self.files.is_remote(collection):
            self.ledger.keep(len(lines))
        else:
            self.ledger.deliver(len(lines))
        if self._troubles and time.monotonic() - self._failed_at > CALM_SECONDS:
            logger.warning("Recording goes on; %d events were discarded since it stopped.", self._lost_in_trouble)
            self._troubles.clear()
            self._lost_in_trouble = 0
        return None

    def _fail(self, error: SpoolFull | OSError, events: int) -> str:
        """Counts what was not written, and tells it where it is news; why it was not."""
        if isinstance(error, OSError):
            reason, words = Discard.WRITE_FAILED, f"{error.strerror}: {error.filename or 'spool file'}"
        else:
            reason, words = Discard.SPOOL_FULL, "the disk budget (spool.max_bytes) is used up"
        self.ledger.discard(reason, events)
        self._lost_in_trouble += events
        self._failed_at = time.monotonic()
        if words not in self._troubles:
            self._troubles.add(words)
            traffic = "Requests get 503" if self._rejects else "Traffic goes on, events are discarded and counted,"
            logger.error("Recording stopped: %s. %s until there is room again.", words, traffic)
        return words


def _set_result(future: asyncio.Future[bool], written: bool) -> None:
    if not future.done():
        future.set_result(written)
