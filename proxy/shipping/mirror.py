"""One file of lines and the append blob that mirrors it. The length of the blob is the state; there is no other.

A block of whole lines is appended on the condition that the blob ends where the block begins in the file. When it is
not known whether that worked, the same is sent again: if the blob's length is another one by then, the blob is read,
and what is in it tells whether it is ours. A blob that is the beginning of the file is continued from where it ends,
even if it was longer before, or is gone: what it has lost is still here. A blob in which somebody else wrote is never
written again: the rest of the file goes on under a new name. The file is renamed for that, to
``{instance}@{bytes that are elsewhere}@{new instance}.jsonl``, so that it is done in one step, and known after a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path

from proxy.shipping.store import (
    BACKLOG_APPEND_BYTES,
    MAX_APPEND_BYTES,
    AbsentError,
    BlobFullError,
    NotNow,
    OtherBlobError,
    PositionTakenError,
    Store,
)
from proxy.spool.files import LineFile
from proxy.spool.layout import LINES_NAME, instance_id, new_process_id
from proxy.spool.recovery import last_line_end

logger = logging.getLogger("payload_logger.shipping")

FULL_BLOCKS = 40_000  # a blob takes 50,000; the file is to be closed by then
CHECKED_BYTES = 64 * 1024  # how much of a blob's end is compared before it is continued after a restart
_READ_BYTES = 1024 * 1024


class BlobLostError(Exception):
    """The blob can't be continued: the file's bytes from ``at`` on have to go to another one. The text says why."""

    def __init__(self, at: int, why: str) -> None:
        super().__init__(why)
        self.at = at


class FileCutError(Exception):
    """Somebody cut the file: what is in it does not belong behind what is in the blob."""


class Mirror:
    """``file`` is given while this process writes it; else nobody does.

    Opening it raises OSError; BlockingIOError: another process ships it; FileNotFoundError: it is not there any more.
    ``delivered`` is told of the number of lines that are known to be in the blob, those from before not counted.
    """

    def __init__(
        self, store: Store, folder: str, path: Path, delivered: Callable[[int], None], file: LineFile | None = None
    ) -> None:
        found = LINES_NAME.fullmatch(path.name)
        if found is None:
            raise ValueError(path.name)
        self._instance, _, base, renamed = found.groups()
        self.path = path
        self.file = file
        self.name = f"{folder}{renamed or self._instance}.jsonl"
        self.roll_at: int | None = None
        self.sent_bytes = 0  # in appends that were answered
        self.blocks = 0
        self.delivered_lines = 0
        self._base = int(base or 0)  # bytes of the file that are in other blobs
        self._position = self._base if file is not None else None  # the blob holds the file up to here; None: see there
        self._told = self._position  # up to here ``delivered`` knows of the lines
        self._found = False
        self._store = store
        self._folder = folder
        self._delivered = delivered
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = path.stat().st_size  # fails if it was renamed before it was locked: its name says more by now
            # Half a line at the end is cut off by recovery, unless the file has been renamed or its journal is gone.
            self._length = last_line_end(self._fd, size) if file is None else 0
        except OSError:
            os.close(self._fd)
            raise

    def close(self) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        return self._fd

    @property
    def length(self) -> int:
        """Bytes of whole lines in the file."""
        return self.file.length if self.file is not None else self._length

    @property
    def closed(self) -> bool:
        """Whether the file has its last line."""
        return self.file is None or self.file.closed

    @property
    def left_bytes(self) -> int:
        return max(0, self.length - (self._base if self._position is None else self._position))

    @property
    def is_done(self) -> bool:
        """Whether the blobs hold all that there will ever be."""
        return self.closed and not self.left_bytes

    async def ship(self, until: int) -> None:
        """Brings the blob nearer to the file's first ``until`` bytes, by one append at most.

        Raises NotNow, BlobLostError and FileCutError.
        """
        if self.length > os.fstat(self._fd).st_size:  # in this order: the file may grow meanwhile
            raise FileCutError(self.path.name)
        if not self._found:
            await self._find()
        position = self._position
        if position is None or position >= until:
            return
        block = self._block(position, until)
        try:
            await self._store.append(self.name, block, position - self._base)
        except PositionTakenError:
            await self._find()
            if self._position == position:
                raise NotNow("busy", f"{self.name}: the append was refused, and the blob has not changed.") from None
        except (AbsentError, OtherBlobError):
            raise self._changed() from None
        except BlobFullError:
            raise BlobLostError(position, "it has as many blocks as a blob can have") from None
        else:
            self.blocks += 1
            self.sent_bytes += len(block)
            self._advance(position + len(block), block)

    async def confirm(self) -> None:
        """Looks once more at a blob that held all, before the file goes: what it has lost since is left to be shipped.

        Raises NotNow and BlobLostError.
        """
        if self.length > self._base:
            await self._find()

    def roll(self) -> None:
        """Goes on in a new blob from ``roll_at``. The file must be closed. Raises OSError."""
        at = self._base if self.roll_at is None else self.roll_at
        instance = instance_id(new_process_id(), 1)
        path = self.path.with_name(f"{self._instance}@{at}@{instance}.jsonl")
        with contextlib.suppress(FileNotFoundError):  # somebody deleted it: what is in it can still be read here
            self.path.rename(path)
        self.path = path
        self.name = f"{self._folder}{instance}.jsonl"
        self._base = self._position = at
        self._told = at if self._told is None else max(self._told, at)
        self._found = False
        self.blocks = 0
        self.roll_at = None

    # --- where the blob ends ---

    async def _find(self) -> None:
        known = self._position
        try:
            blob = await self._store.look(self.name)
        except OtherBlobError:
            raise BlobLostError(self._base, "somebody put another kind of blob there") from None
        ends = self._base + (blob.length if blob is not None else 0)
        if known is not None and ends < known:
            logger.warning("%s has lost %d bytes; they are shipped again.", self.name, known - ends)
            known = None
        if blob is None:
            await self._store.create(self.name)
        shared = min(ends, self.length)
        if ends == known:
            start = shared
        elif known is None and ends > shared:  # somebody else wrote in it, too
            start = self._base
        else:
            start = max(self._base, (shared if known is None else known) - CHECKED_BYTES)
        same = await self._same(start, shared)
        if same < shared and start > self._base:
            same = await self._same(self._base, shared)
        if same < shared or (ends > shared and not self.closed):
            at = max(last_line_end(self._fd, same), self._base)
            self._advance(at)
            raise BlobLostError(at, "somebody else wrote in it")
        self.blocks = blob.blocks if blob is not None else 0
        self._advance(shared)
        self._found = True

    def _advance(self, position: int, block: bytes | None = None) -> None:
        """The blob is known to hold the file up to ``position``. ``block`` is what came to it last, if that is known."""
        if self._told is not None and position > self._told:
            whole = block is not None and self._told == position - len(block)
            lines = block.count(b"\n") if whole and block is not None else self._lines(self._told, position)
            self.delivered_lines += lines
            self._delivered(lines)
        self._told = position if self._told is None else max(self._told, position)
        self._position = position

    async def _same(self, start: int, end: int) -> int:
        """Up to where, between ``start`` and ``end``, the blob has what the file has."""
        while start < end:
            size = min(_READ_BYTES, end - start)
            ours = os.pread(self._fd, size, start)
            try:
                theirs = await self._store.read(self.name, start - self._base, size)
            except AbsentError:
                raise self._changed() from None
            if len(theirs) < size:
                raise self._changed()
            if ours != theirs:
                return start + next(
                    (index for index, (our, their) in enumerate(zip(ours, theirs, strict=False)) if our != their),
                    min(len(ours), len(theirs)),
                )
            start += size
        return start

    def _changed(self) -> NotNow:
        """It is not as it was found: it is to be looked at again."""
        self._found = False
        return NotNow(
            "busy", f"{self.name} is not as it was a moment ago: somebody deletes blobs, or puts other ones there."
        )

    # --- the file ---

    def _block(self, start: int, until: int) -> bytes:
        """The next whole lines: as many as fit in one append, at least one. Raises FileCutError."""
        end = until
        if until - start > MAX_APPEND_BYTES:
            end = last_line_end(self._fd, start + BACKLOG_APPEND_BYTES)
            if end <= start:  # one line is longer
                end = self._end_of_line(start + BACKLOG_APPEND_BYTES, until)
        block = os.pread(self._fd, end - start, start)
        if len(block) < end - start:
            raise FileCutError(self.path.name)
        return block

    def _end_of_line(self, start: int, until: int) -> int:
        while start < until:
            part = os.pread(self._fd, min(_READ_BYTES, until - start), start)
            if not part:
                break
            newline = part.find(b"\n")
            if newline >= 0:
                return start + newline + 1
            start += len(part)
        return until

    def _lines(self, start: int, end: int) -> int:
        lines = 0
        while start < end:
            part = os.pread(self._fd, min(_READ_BYTES, end - start), start)
            if not part:
                break
            lines += part.count(b"\n")
            start += len(part)
        return lines
