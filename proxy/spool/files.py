"""The files that the writer thread has open. Everything here runs on that thread, and may block or raise OSError.

On disk: JSON lines, UTF-8, each ending in one LF. A file has one writer ever; it only grows, by whole lines; when a
write fails half-way the file is cut back to its last whole line before anything else is written. It is closed, for
good, when its partition's time is over or at ``roll_bytes``.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from proxy.ledger import Ledger
from proxy.settings import RollingRate
from proxy.spool.budget import Budget
from proxy.spool.layout import Place, instance_id, partition
from proxy.spool.recovery import Journal

logger = logging.getLogger("payload_logger.spool")

_T = TypeVar("_T")

LEAST_FILE_BYTES = 64 * 1024  # a smaller file is not worth closing for the room that it takes
_FILE_MODE = 0o640
_FOLDER_MODE = 0o750


class SpoolFull(Exception):
    """The disk budget allows no more."""


class LineFile:
    """One file of lines, from its creation to its last line."""

    def __init__(self, path: Path, partition_name: str) -> None:
        self.path = path
        self.partition = partition_name
        self.length = 0  # whole lines, for good; may be read from other threads
        self.lines = 0
        self.torn = False
        self.closed = False  # for good
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, _FILE_MODE)

    def append(self, lines: list[bytes], size: int) -> None:
        """Appends all of ``lines`` (``size`` bytes together) or nothing. Raises OSError."""
        try:
            written = os.writev(self._fd, lines)
            if written < size:
                rest = memoryview(b"".join(lines))[written:]
                while rest:
                    written = os.write(self._fd, rest)
                    rest = rest[written:]
        except OSError:
            try:
                os.ftruncate(self._fd, self.length)
            except OSError:
                self.torn = True  # nothing may follow half a line
            raise
        self.lines += len(lines)
        self.length += size

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def is_lost(self) -> bool:
        """Whether somebody has deleted the file: what is written to it would be lost."""
        try:
            return os.fstat(self._fd).st_nlink == 0
        except OSError:  # ESTALE of a network file system
            return True

    def close(self) -> None:
        try:
            os.close(self._fd)
        finally:
            self.closed = True


class BodyPart:
    """A body that is being written to a file of its own; it gets its name when its line is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            written = os.write(self._fd, rest)  # on a line of its own: mypyc evaluates the bounds of a slice twice
            rest = rest[written:]
        self.length += len(data)

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        """Does nothing the second time: the number may be another file's by then."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class Files:
    """Appends lines to the current file of each collection, and keeps bodies in files of their own."""

    def __init__(
        self,
        places: Mapping[str, Place],
        *,
        rate: RollingRate,
        roll_bytes: int,
        sync: bool,
        process_id: str,
        journal: Journal,
        budget: Budget,
        ledger: Ledger,
        opened: Callable[[LineFile], None] | None = None,  # told of each file of a remote place
    ) -> None:
        self._places = places
        self._opened = opened
        self._rate = rate
        self._roll_bytes = roll_bytes
        self._sync = sync
        self._process_id = process_id
        self._journal = journal
        self._budget = budget
        self._ledger = ledger
        self._number = 1
        self._current: dict[str, LineFile] = {}
        self._unsynced: set[LineFile] = set()
        self._torn = False
        self._bodies: dict[str, list[tuple[Path, int]]] = {}  # path, length: finished, and their lines not yet written
        self._noted: dict[str, Path] = {}
        self._noted_bodies: set[str] = set()
        self._partition = ""
        self._minute = -1

    def begin(self, epoch_seconds: float) -> None:
        """Begins a group of writes: lines and bodies of one group share a partition."""
        minute = int(epoch_seconds // 60)
        if minute != self._minute:
            self._partition = partition(self._rate, epoch_seconds)
            for collection, file in list(self._current.items()):
                if file.partition != self._partition:
                    self._close(collection)
            self._minute = minute

    def retire(self, file: LineFile) -> None:
        """Closes ``file``: what follows goes to another one."""
        for collection, current in list(self._current.items()):
            if current is file:
                self._close(collection)

    def is_remote(self, collection: str) -> bool:
        """Whether a line of ``collection`` is delivered only when it is shipped."""
        return self._places[collection].remote

    def append(self, collection: str, lines: list[bytes]) -> None:
        """Appends lines, all or none; a group has far fewer than IOV_MAX (1024). Raises SpoolFull or OSError.

        The bodies that were finished before belong to these lines: they go when the lines are not written.
        """
        bodies = self._bodies.pop(collection, ())
        try:
            self._append(collection, lines)
        except (SpoolFull, OSError):
            for path, length in bodies:
                self._remove_body(path, length)
            raise

    def _append(self, collection: str, lines: list[bytes]) -> None:
        size = sum(map(len, lines))
        self._need_room(size)
        file = self._current.get(collection)
        if file is not None and (file.is_lost() or (file.length and file.length + size > self._roll_bytes)):
            self._close(collection)
            file = None
        if file is None:
            file = self._open(collection)
        try:
            file.append(lines, size)
        except OSError:
            if file.torn:
                self._torn = True
                self._close(collection)
            raise
        self._budget.spend(size)
        if self._sync:
            self._unsynced.add(file)

    def _need_room(self, size: int) -> None:
        """Raises SpoolFull if the budget has no room for ``size`` bytes.

        What is shipped already is removed only with its file: so files that are worth it are closed then.
        """
        if self._budget.allows(size):
            return
        for collection, file in list(self._current.items()):
            if self.is_remote(collection) and file.length >= LEAST_FILE_BYTES:
                self._close(collection)
        raise SpoolFull

    def end(self) -> None:
        """Ends a group: with durability ``synced`` its lines are on the disk after this. Raises OSError."""
        failed: OSError | None = None
        while self._unsynced:
            try:
                self._unsynced.pop().sync()
            except OSError as error:
                failed = error
        if failed is not None:
            raise failed

    # --- bodies ---

    def open_body(self, collection: str, event_id: str) -> BodyPart:
        place = self._places[collection]
        path = place.unfinished(self._process_id, event_id)
        if collection not in self._noted_bodies:
            self._journal.note(place.unfinished(self._process_id, "*"))
            self._noted_bodies.add(collection)
        return _in_folder(path.parent, lambda: BodyPart(path), sync=self._sync)

    def write_body(self, part: BodyPart, data: bytes) -> None:
        """Raises SpoolFull or OSError."""
        self._need_room(len(data))
        part.write(data)
        self._budget.spend(len(data))

    def finish_body(self, part: BodyPart, collection: str, event_id: str, content_type: str, *, large: bool) -> str:
        """Gives the body its name; the URL that its line points to."""
        path, url = self._places[collection].body(self._partition, event_id, content_type, large=large)
        if self._sync:
            part.sync()
        part.close()
        _in_folder(path.parent, lambda: part.path.rename(path), sync=self._sync)
        part.path = path
        if self._sync:
            _sync_folder(path.parent)
        self._bodies.setdefault(collection, []).append((path, part.length))
        return url

    def drop_body(self, part: BodyPart) -> None:
        """Removes a body that no line will point to."""
        with contextlib.suppress(OSError):
            part.close()
        self._remove_body(part.path, part.length)

    def keep_body(
        self, collection: str, event_id: str, content_type: str, pieces: Iterable[bytes], *, large: bool
    ) -> str | None:
        """Writes a body that is at hand to a file of its own: its URL, or None when the disk does not take it."""
        part = None
        try:
            part = self.open_body(collection, event_id)
            for piece in pieces:
                self.write_body(part, piece)
            return self.finish_body(part, collection, event_id, content_type, large=large)
        except BaseException as error:
            if part is not None:
                self.drop_body(part)
            if not isinstance(error, SpoolFull | OSError):
                raise
            self._ledger.cut_body()
            return None

    def _remove_body(self, path: Path, length: int) -> None:
        with contextlib.suppress(OSError):
            path.unlink()
            self._budget.spend(-length)

    # --- files ---

    def close(self) -> None:
        """Closes every file. Nothing of this process can be torn afterwards, or its journal stays."""
        for collection in list(self._current):
            self._close(collection)
        if self._torn:
            self._journal.leave()
        else:
            self._journal.remove()

    def _open(self, collection: str) -> LineFile:
        path = self._places[collection].lines(self._partition, instance_id(self._process_id, self._number))
        if path != self._noted.get(collection):  # a disk that fails is tried again and again, under the same name
            self._journal.note(path)
            self._noted[collection] = path
        try:
            file = _in_folder(path.parent, lambda: LineFile(path, self._partition), sync=self._sync)
        except FileExistsError as error:
            if error.filename == str(path):
                self._number += 1  # not ours: never under this name again
            raise
        self._current[collection] = file
        self._number += 1
        if self._opened is not None and self.is_remote(collection):
            self._opened(file)
        if self._sync:
            _sync_folder(path.parent)
        return file

    def _close(self, collection: str) -> None:
        file = self._current.pop(collection)
        try:
            if file in self._unsynced:
                self._unsynced.discard(file)
                file.sync()
        except OSError as error:
            logger.error("%s: the last lines could not be synced to the disk: %s.", file.path, error)
        try:
            file.close()
        except OSError as error:
            logger.error("%s: the last lines may be lost: %s.", file.path, error)


def _in_folder(folder: Path, act: Callable[[], _T], *, sync: bool) -> _T:
    """``act`` in ``folder``, which is made if need be; empty ones are removed now and then."""
    try:
        return act()
    except (FileNotFoundError, NotADirectoryError):
        make_folders(folder, sync=sync)
        return act()


def make_folders(folder: Path, *, sync: bool) -> None:
    """Makes ``folder`` and those above it that are missing; with ``sync`` their names survive a loss of power."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for made in reversed(missing):
        made.mkdir(mode=_FOLDER_MODE, exist_ok=True)
        if sync:
            _sync_folder(made.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
