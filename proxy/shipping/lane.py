"""A lane: one container, and the part of the spool that stands for it.

A turn first notes how long the files of lines are, then ships the bodies in sight, then the lines up to the noted
lengths. A body gets its name before its line is written, so that no line arrives before the body that it points to.
Bodies that fail are tried again before further ones are looked for, and then the lines go that waited for them: else,
with some of each look failing, there would never be a turn for the lines. What is wrong with one body only keeps the
lines waiting that may point to it: those below the root that it belongs to. What can't be shipped stays where it is, and
is tried again for as long as it takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections import Counter, deque
from collections.abc import Container, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from proxy.shipping import destination
from proxy.shipping.destination import Datastore
from proxy.shipping.mirror import FULL_BLOCKS, BlobLostError, FileCutError, Mirror
from proxy.shipping.store import NotNow, OtherBlobError, Store
from proxy.spool.files import LineFile
from proxy.spool.layout import LARGE, lines_process, shipped_body

if TYPE_CHECKING:
    from proxy.shipping.shipper import Shipper

logger = logging.getLogger("payload_logger.shipping")

FILES_AT_ONCE = 3  # appends in flight, of up to MAX_APPEND_BYTES each
BODIES_AT_ONCE = 8  # puts of small bodies in flight
SMALL_BYTES = 256 * 1024
MOST_LEFT = 1000  # bodies that failed and are tried again before anything else is looked at
MIRRORS = 64  # files of lines that a lane has open, beside one for each root
FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 30.0
LONGEST_RETRY_AFTER_SECONDS = 300.0
EMPTY_SECONDS = 3600.0  # a folder that was empty for so long is removed

PASSING = frozenset({"busy", "server", "timeout", "unreachable"})  # reasons that are news only when they last
EVERYWHERE = PASSING | {"identity", "container", "account"}  # reasons that nothing can be shipped for
TOLD_AFTER = 3  # failures in a row


@dataclass(slots=True)
class Backoff:
    """How long to wait after a failure: twice as long each time, up to half a minute, of that a random part."""

    failures: int = 0

    def seconds(self, retry_after_seconds: float = 0.0) -> float:
        """After one more failure. Never less than the destination asked for (within reason)."""
        limit: float = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** min(self.failures, 16))
        self.failures += 1
        jitter: float = random.uniform(0.5, 1)  # noqa: S311
        return min(retry_after_seconds, LONGEST_RETRY_AFTER_SECONDS) + limit * jitter


@dataclass(frozen=True, slots=True)
class LaneState:
    """A lane as it is. ``trouble`` is the reason of a failure that lasts.

    ``lag_seconds``: what was recorded before so long ago is in the destination. 0: so is everything that is known of.
    """

    url: str
    trouble: str | None
    words: str | None
    lag_seconds: float


class Lane:
    """One container, or one datastore that leads to a container, and the folder of the spool that stands for it."""

    def __init__(self, shipper: Shipper, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        self.files: deque[LineFile] = deque()  # of this process, not yet open here
        self.trouble: NotNow | None = None
        self._told: set[str] = set()  # the reasons that the log knows, since it last worked
        self._shipper = shipper
        self._destination = destination.parse(url)[0]
        self._mirrors: dict[Path, Mirror] = {}
        self._crowded = False  # whether files were seen that there was no room for
        self._noted: dict[Mirror, int] = {}  # how far lines may go when the bodies that are left are there
        self._left: dict[Path, NotNow] = {}  # bodies that failed
        self._failed_in_a_row: Counter[Path] = Counter()  # by their roots
        self._skipped: set[Path] = set()  # roots of bodies that were not tried any more
        self._arrived = 0  # puts and appends that worked
        self.backoff = Backoff()
        self._caught_up_at = time.monotonic()  # what was recorded until then has arrived
        self._appends = asyncio.Semaphore(FILES_AT_ONCE)
        self._puts = asyncio.Semaphore(BODIES_AT_ONCE)

    async def run(self) -> None:
        """Goes through the lane again and again, until the shipper stops."""
        pause = self._shipper.interval_seconds * random.random()  # noqa: S311 - so that replicas don't come all at once
        while not await self._shipper.stopped_within(pause):
            pause = await self.turn()
            if self.trouble is not None and self.trouble.reason == "busy":
                # Who is told that it is too much must not come sooner than otherwise (docs/scaling.md).
                pause = max(pause, self._shipper.interval_seconds * random.uniform(0.75, 1.25))  # noqa: S311

    async def turn(self) -> float:
        """Ships what is there; the seconds until the next turn."""
        began = time.monotonic()
        arrived = self._arrived
        try:
            adopted = await self._ship()
        except (NotNow, OSError) as error:
            if self._arrived > arrived:
                self.backoff.failures = 0
            trouble = _trouble(error)
            self.trouble = trouble.with_traceback(None)  # it stays for a while, and would keep all of this
            pause = self.backoff.seconds(trouble.retry_after_seconds)
            self._tell(trouble)
            return pause if trouble.reason in EVERYWHERE else max(pause, self._shipper.interval_seconds)
        except Exception:
            if "defect" not in self._told:
                logger.exception("%s: shipping failed by a defect of payload-logger; nothing is lost.", self.url)
            self._told.add("defect")
            self.trouble = NotNow("defect", "there is a defect of payload-logger, which its log tells of.")
            return self.backoff.seconds()
        if self._told:
            logger.warning("%s: shipping goes on.", self.url)
            self._told.clear()
        self.trouble = None
        self.backoff.failures = 0
        if not adopted and not self._crowded:
            self._caught_up_at = began
        return 0.0 if adopted or (self._crowded and self._has_room) else self._shipper.interval_seconds

    def close(self) -> None:
        for mirror in self._mirrors.values():
            mirror.close()
        self._mirrors.clear()

    @property
    def is_empty(self) -> bool:
        """Whether all that is known of is shipped."""
        return not self.files and not any(mirror.left_bytes for mirror in list(self._mirrors.values()))

    def state(self) -> LaneState:
        """May be called from any thread."""
        trouble = self.trouble
        if trouble is None and self.is_empty and not self._crowded:
            return LaneState(self.url, None, None, 0.0)
        lag_seconds = time.monotonic() - self._caught_up_at
        if trouble is None:
            return LaneState(self.url, None, None, lag_seconds)
        return LaneState(self.url, trouble.reason, trouble.words, lag_seconds)

    def _tell(self, error: NotNow) -> None:
        if error.reason not in self._told and (error.reason not in PASSING or self.backoff.failures >= TOLD_AFTER):
            self._told.add(error.reason)
            logger.error(
                "%s: shipping fails: %s What is recorded stays in %s; it is tried again and again.",
                self.url,
                error.words,
                self.folder,
            )

    async def _ship(self) -> bool:
        """Ships what is in sight; whether files of other processes were taken over, to be shipped the next time."""
        if self._left:
            await self._ship_bodies(tuple(self._left))
            self._raise_left(EVERYWHERE)
            await self._ship_noted()
        self._open_own()
        noted = {mirror: mirror.length for mirror in self._mirrors.values()}
        with contextlib.closing(self._walk(self.folder)) as paths:
            adopted = await self._ship_bodies(paths, self._left_roots())
        self._noted |= {mirror: until for mirror, until in noted.items() if not _below(mirror.path, self._skipped)}
        self._raise_left(EVERYWHERE)
        await self._ship_noted()
        self._raise_left()
        return adopted

    async def _ship_noted(self) -> None:
        """The lines that wait for no body."""
        left = self._left_roots()
        ready = {mirror: until for mirror, until in self._noted.items() if not _below(mirror.path, left)}
        self._noted = {mirror: until for mirror, until in self._noted.items() if mirror not in ready}
        await _all({asyncio.create_task(self._ship_lines(mirror, until)) for mirror, until in ready.items()})

    # --- lines ---

    @property
    def _has_room(self) -> bool:
        return len(self._mirrors) < MIRRORS + self._shipper.roots

    def _open_own(self) -> None:
        while self.files and self._has_room:
            file = self.files[0]
            store = self._store(file.path)
            try:
                self._mirrors[file.path] = Mirror(
                    store, self._blob_name(file.path.parent, "/"), file.path, self._shipper.ledger.ship, file
                )
            except FileNotFoundError:
                if not self._shipper.stopping:  # else another process may have adopted it
                    self._shipper.lose(file, file.lines, "deleted")
            except BlockingIOError:
                pass
            self.files.popleft()  # not before: after another error it is tried again
        self._crowded = bool(self.files)

    def _adopt(self, path: Path) -> bool:
        """Takes over a file of a process that has ended; whether it did."""
        process = lines_process(path.name)
        if path in self._mirrors or process == self._shipper.process_id:
            return False
        if (self._shipper.spool / f"{process}.journal").exists():
            return False  # it lives, or its files are not in order yet
        if not self._has_room:
            self._crowded = True
            return False
        store = self._store(path)
        try:
            mirror = Mirror(store, self._blob_name(path.parent, "/"), path, self._shipper.ledger.adopt)
        except (FileNotFoundError, BlockingIOError):
            return False
        self._mirrors[path] = mirror
        return True

    async def _ship_lines(self, mirror: Mirror, until: int) -> None:
        async with self._appends:
            try:
                if mirror.roll_at is None:
                    await self._append_all(mirror, until)
                    if mirror.is_done:
                        await mirror.confirm()
            except BlobLostError as error:
                mirror.roll_at = error.at
                logger.error(
                    "%s/%s: %s. It is left as it is; what follows goes to a new file.", self.url, mirror.name, error
                )
            except FileCutError:
                self._give_up(mirror)
                return
            if (
                mirror.file is not None
                and not mirror.closed
                and (mirror.roll_at is not None or mirror.blocks >= FULL_BLOCKS)
            ):
                self._shipper.retire(mirror.file)
            elif mirror.closed:
                self._close(mirror)

    async def _append_all(self, mirror: Mirror, until: int) -> None:
        left = mirror.left_bytes
        while left > 0 and mirror.length - left < until:
            sent_bytes = mirror.sent_bytes
            try:
                await mirror.ship(until)
            except NotNow as error:
                self._shipper.appends[error.reason] += 1
                raise
            if mirror.sent_bytes > sent_bytes:
                self._shipper.appends["ok"] += 1
                self._shipper.shipped_bytes += mirror.sent_bytes - sent_bytes
            self._arrived += mirror.left_bytes < left
            left = mirror.left_bytes

    def _close(self, mirror: Mirror) -> None:
        """Removes the file if it is shipped; begins the next blob if this one is lost."""
        if mirror.is_done:
            length = os.fstat(mirror.fileno()).st_size
            with contextlib.suppress(FileNotFoundError):
                mirror.path.unlink()
                self._shipper.budget.spend(-length)
            self._forget(mirror)
        elif mirror.roll_at is not None:
            mirror.roll()
            self._mirrors = {one.path: one for one in self._mirrors.values()}

    def _give_up(self, mirror: Mirror) -> None:
        """Somebody cut the file. What is left in it is for the next process, or the next turn if it is another one's."""
        if mirror.file is not None and not mirror.closed:
            self._shipper.retire(mirror.file)
            return
        if mirror.file is not None:
            self._shipper.lose(mirror.file, mirror.file.lines - mirror.delivered_lines, "cut")
        self._forget(mirror)

    def _forget(self, mirror: Mirror) -> None:
        mirror.close()
        self._mirrors = {path: one for path, one in self._mirrors.items() if one is not mirror}

    # --- bodies ---

    async def _ship_bodies(self, paths: Iterable[Path], without: Container[Path] = ()) -> bool:
        """Ships the bodies among ``paths``; those that failed are left, and the others not kept waiting by them.

        Passed over are those of the roots ``without``, and of roots of which many have failed in a row.
        Of the other files it takes over those that other processes left; whether there were any.
        """
        adopted = False
        tasks: set[asyncio.Task[None]] = set()
        self._failed_in_a_row.clear()
        self._skipped.clear()
        try:
            for path in paths:
                body = shipped_body(path.name)
                if body is not None:
                    root = self._root(path)
                    many = len(self._left) > MOST_LEFT and path not in self._left
                    if many or self._failed_in_a_row[root] >= BODIES_AT_ONCE or root in without:
                        self._raise_left(EVERYWHERE)
                        self._skipped.add(root)
                        continue
                    await self._puts.acquire()
                    task = asyncio.create_task(self._ship_body(path, *body))
                    tasks.add(task)
                    task.add_done_callback(lambda _: self._puts.release())
                    self._raise_failed(tasks)
                elif lines_process(path.name) is not None:
                    adopted |= self._adopt(path)
            await _all(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return adopted

    def _raise_left(self, reasons: Container[str] | None = None) -> None:
        """Raises what a body failed with, if any is left; only for one of ``reasons``, if there are any."""
        errors = [error for error in self._left.values() if reasons is None or error.reason in reasons]
        if errors:
            raise max(errors, key=lambda error: error.retry_after_seconds)

    def _left_roots(self) -> set[Path]:
        return {self._root(path) for path in self._left}

    def _root(self, body: Path) -> Path:
        """What may point to ``body`` is below this folder."""
        root = body.parent
        while root.name.isdigit() and root != self.folder:  # its partition
            root = root.parent
        return root if root == self.folder else root.with_name(root.name.removesuffix(LARGE) or root.name)

    def _raise_failed(self, tasks: set[asyncio.Task[None]]) -> None:
        """Raises what a finished task failed with; forgets the others that have finished."""
        for task in [task for task in tasks if task.done()]:
            tasks.discard(task)
            task.result()

    async def _ship_body(self, path: Path, name: str, content_type: str) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                size = os.stat(path).st_size  # noqa: PTH116 - short
                store = self._store(path)
                blob = self._blob_name(path.parent, "/") + name
                async with contextlib.nullcontext() if size <= SMALL_BYTES else self._appends:
                    try:
                        await store.put(blob, path, content_type)
                    except OtherBlobError:
                        raise NotNow(
                            "conflict", f"{blob} is a blob of another kind, which somebody else put there; remove it."
                        ) from None
                self._shipper.puts["ok"] += 1
                self._shipper.shipped_bytes += size
                os.unlink(path)  # noqa: PTH108
                self._shipper.budget.spend(-size)
        except (NotNow, OSError) as error:
            trouble = _trouble(error)
            if trouble.reason not in EVERYWHERE:
                words = f"{self._blob_name(path.parent, '/')}{name}: {trouble.words} Lines beside it wait for it."
                trouble = NotNow(trouble.reason, words, trouble.retry_after_seconds)
            self._left[path] = trouble
            self._failed_in_a_row[self._root(path)] += 1
            self._shipper.puts[trouble.reason] += 1
        else:
            self._left.pop(path, None)
            self._failed_in_a_row[self._root(path)] = 0
            self._arrived += 1

    # --- the folder ---

    def _walk(self, folder: Path) -> Generator[Path, None, None]:
        """The files below ``folder``; removes folders that have long been empty."""
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            empty = True
            for entry in entries:
                empty = False
                if entry.is_dir(follow_symlinks=False):
                    yield from self._walk(Path(entry.path))
                else:
                    yield Path(entry.path)
            if empty and time.time() - folder.stat().st_mtime > EMPTY_SECONDS:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _blob_name(self, folder: Path, end: str) -> str:
        """The name in the container of what stands for ``folder``."""
        parts = folder.relative_to(self.folder).parts
        if isinstance(self._destination, Datastore):
            parts = parts[1:]  # "paths"
        return unquote("/".join(parts)) + end if parts else ""

    def _store(self, path: Path) -> Store:
        return self._shipper.store(self._destination, path)


def _below(path: Path, roots: Iterable[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _trouble(error: NotNow | OSError) -> NotNow:
    return error if isinstance(error, NotNow) else NotNow("disk", f"the spool's disk has a fault: {error}.")


async def _all(tasks: set[asyncio.Task[None]]) -> None:
    """Waits for all, then raises what one failed with: of those that ask for a pause, what asks for the longest.

    They end with whoever waits for them: a lane that is closed must not go on.
    """
    try:
        if tasks:
            await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    errors = [result for result in results if isinstance(result, Exception)]
    if errors:
        raise max(errors, key=lambda error: error.retry_after_seconds if isinstance(error, NotNow) else 0.0)
