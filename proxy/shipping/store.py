"""What shipping asks of a destination, in its own words; ``azure_blob.py`` and ``azure_errors.py`` say it in Azure's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

MAX_APPEND_BYTES = 4 * 1024 * 1024  # of one append that takes all that is there
BACKLOG_APPEND_BYTES = 2 * 1024 * 1024  # of one of several, unless one line is longer: less memory
MAX_LINE_BYTES = 100 * 1024 * 1024  # the most that an append blob takes at once (API 2022-11-02)


class NotNow(Exception):
    """It did not work, or nobody knows whether it did; it may later, and nothing is lost by trying again.

    ``reason`` is one word of a closed list, ``words`` tell the owner what is wrong and what to do.
    """

    def __init__(self, reason: str, words: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(words)
        self.reason = reason
        self.words = words
        self.retry_after_seconds = retry_after_seconds


class PositionTakenError(Exception):
    """The blob's length is not the position that was to be appended at."""


class AbsentError(Exception):
    """There is no such blob."""


class BlobFullError(Exception):
    """The blob has as many blocks as a blob can have."""


class OtherBlobError(Exception):
    """There is a blob of this name, and it is no append blob."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A blob as it is found: its length in bytes, and the appends that made it."""

    length: int
    blocks: int


class Store(Protocol):
    """One container. Names are blob names, without the container. Every call may raise NotNow."""

    async def look(self, name: str) -> Blob | None:
        """The append blob ``name``, None if there is none. Raises OtherBlobError."""

    async def create(self, name: str) -> None:
        """Makes an empty append blob unless there is a blob of that name already; makes the container if need be."""

    async def append(self, name: str, data: bytes, position: int) -> None:
        """Appends if the blob's length is ``position``. Raises PositionTakenError, AbsentError, BlobFullError, OtherBlobError."""

    async def read(self, name: str, start: int, size: int) -> bytes:
        """``size`` bytes from ``start`` on, fewer at the end. Raises AbsentError."""

    async def put(self, name: str, path: Path, content_type: str) -> None:
        """Makes or replaces the blob ``name`` with what is in the file ``path``. Raises OSError for the file."""

    async def close(self) -> None: ...
