"""What a process that died left behind, and how it is put in order.

Each process keeps one journal, ``{spool}/{process_id}.journal``: it holds a lock on it (the kernel drops the lock
with the process) and adds a line, the path, for every file that it opens. A process that ends well removes its
journal. So a journal that can be locked belongs to the dead, and names the only files that can be torn.
"""

from __future__ import annotations

import fcntl
import logging
import os
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("payload_logger.spool")

_BLOCK_BYTES = 64 * 1024


class Journal:
    """This process's journal. Opening it raises OSError."""

    def __init__(self, folder: Path, process_id: str) -> None:
        self.path = folder / f"{process_id}.journal"
        self._fd = self._create()
        self._length = 0

    def _create(self) -> int:
        # It gets its name when it is locked: a process that starts meanwhile would take it for a dead one's.
        unnamed = self.path.with_suffix(".new")
        fd = os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unnamed.rename(self.path)
        except OSError:
            os.close(fd)
            raise
        return fd

    def note(self, path: Path) -> None:
        """To be called before ``path`` is created; its name may be a pattern. Raises OSError, and has noted nothing then."""
        if not os.fstat(self._fd).st_nlink:  # deleted, maybe with the whole dataset
            self.path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            fd = self._create()
            os.close(self._fd)
            self._fd, self._length = fd, 0
        line = os.fsencode(path) + b"\n"
        written = 0
        try:
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError:
            os.ftruncate(self._fd, self._length)  # the next path must not follow half of this one
            raise
        self._length += written

    def remove(self) -> None:
        """The process ends well: no file is torn."""
        self.path.unlink(missing_ok=True)
        os.close(self._fd)

    def leave(self) -> None:
        """The process ends, and the next one is to put its files in order."""
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was found: processes that died, half lines cut off, bodies without a line removed."""

    processes: int = 0
    torn: int = 0
    orphans: int = 0


def recover(folder: Path, told: set[Path] | None = None) -> Recovered:
    """Puts the files of dead processes in order. A file that can't be put in order is left, with a warning.

    ``told``: the files of which there was a warning already.
    """
    told = set() if told is None else told
    processes = torn = orphans = 0
    for journal in sorted(folder.glob("*.journal")):
        try:
            fd = os.open(journal, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its process is alive
            if not os.fstat(fd).st_nlink:
                continue  # another process was faster
            processes += 1
            in_order = True
            for path in _noted(fd):
                try:
                    if path.suffix == ".part":
                        orphans += sum(map(_remove, path.parent.glob(path.name)))
                    else:
                        torn += cut_torn_line(path)
                except OSError as error:
                    in_order = False
                    if path not in told:
                        logger.warning(
                            "Could not put %s in order: %s; what its process left waits for it.", path, error
                        )
                    told.add(path)
            if in_order:
                journal.unlink(missing_ok=True)
        finally:
            os.close(fd)
    return Recovered(processes, torn, orphans)


def _noted(fd: int) -> list[Path]:
    with open(fd, "rb", closefd=False) as file:
        # The last line may be torn as well; then its file was not created yet.
        lines = [line[:-1] for line in file if line.endswith(b"\n")]
    # After a loss of power NULs may stand where something was written last.
    return [Path(os.fsdecode(path)) for line in lines if (path := line.rpartition(b"\0")[2])]


def _remove(path: Path) -> int:
    try:
        path.unlink()
    except FileNotFoundError:
        return 0
    return 1


def cut_torn_line(path: Path) -> int:
    """Cuts off what follows the last line end of ``path``: 1 if there was something, else 0. Raises OSError.

    A file without a whole line is removed.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        size = os.fstat(fd).st_size
        whole = last_line_end(fd, size)
        if whole < size:
            os.ftruncate(fd, whole)
        if whole == 0:
            path.unlink(missing_ok=True)
        return int(whole < size)
    finally:
        os.close(fd)


def last_line_end(fd: int, size: int) -> int:
    """Where the last whole line in the first ``size`` bytes ends; 0: there is none."""
    end = size
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
