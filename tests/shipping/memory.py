"""A container in memory, with the semantics of append blobs, and with faults at any call.

It is a Store of ``proxy.shipping.store``; what Azure's SDK and HTTP add to that is for ``test_azure_blob.py``.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeVar

from proxy.shipping.store import (
    AbsentError,
    Blob,
    BlobFullError,
    NotNow,
    OtherBlobError,
    PositionTakenError,
)

_T = TypeVar("_T")

FOREIGN = b'{"written by": "somebody else"}\n'


class Fault(Enum):
    """What happens at a call. The first three say NotNow; the others happen before it, and are somebody else's doing."""

    REFUSED = "refused"
    LOST = "done, and the answer is lost"
    LATE = "done after the next call"
    FOREIGN = "somebody else appends"
    DELETED = "somebody deletes the blob"
    CUT = "the blob loses its last append"
    REPLACED = "somebody puts another kind of blob there"
    CONTAINER = "somebody deletes the container"


@dataclass
class MemoryBlob:
    """``blocks`` are the appends, or what was put; ``foreign`` says of which ones somebody else made."""

    kind: str = "append"
    content_type: str = ""
    blocks: list[bytes] = field(default_factory=list)
    foreign: list[bool] = field(default_factory=list)

    @property
    def data(self) -> bytes:
        return b"".join(self.blocks)

    @property
    def ours(self) -> bytes:
        return b"".join(block for block, foreign in zip(self.blocks, self.foreign, strict=True) if not foreign)


Plan = Callable[[str, str], "Fault | NotNow | None"]  # asked about each call: operation, blob


class MemoryStore:
    """``plan`` is asked about each call; ``calls`` are those there were, ``trace`` all of them by operation and blob."""

    def __init__(self, *, max_blocks: int = 50_000) -> None:
        self.blobs: dict[str, MemoryBlob] = {}
        self.max_blocks = max_blocks
        self.plan: Plan | None = None
        self.gate: asyncio.Event | None = None  # while it is there and not set, calls wait
        self.happened: Counter[Fault] = Counter()
        self.trace: list[tuple[str, str]] = []
        self.largest_block = 0
        self.read_bytes = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.closed = 0
        self._late: deque[Callable[[], object]] = deque()

    @property
    def calls(self) -> Counter[str]:
        return Counter(operation for operation, _ in self.trace)

    def lines(self) -> list[bytes]:
        """All lines of all append blobs that are not foreign."""
        blobs = [blob for blob in self.blobs.values() if blob.kind == "append"]
        return [line for blob in blobs for line in blob.ours.splitlines(keepends=True)]

    # --- the Store ---

    async def look(self, name: str) -> Blob | None:
        def look() -> Blob | None:
            blob = self.blobs.get(name)
            if blob is None:
                return None
            if blob.kind != "append":
                raise OtherBlobError(name)
            return Blob(len(blob.data), len(blob.blocks))

        return await self._call("look", name, look)

    async def create(self, name: str) -> None:
        def create() -> None:
            self.blobs.setdefault(name, MemoryBlob())

        await self._call("create", name, create)

    async def append(self, name: str, data: bytes, position: int) -> None:
        def append() -> None:
            blob = self._existing(name)
            if blob.kind != "append":
                raise OtherBlobError(name)
            if len(blob.blocks) >= self.max_blocks:
                raise BlobFullError(name)
            if len(blob.data) != position:
                raise PositionTakenError(name)
            blob.blocks.append(data)
            blob.foreign.append(False)
            self.largest_block = max(self.largest_block, len(data))

        await self._call("append", name, append)

    async def read(self, name: str, start: int, size: int) -> bytes:
        self.read_bytes += size
        return await self._call("read", name, lambda: self._existing(name).data[start : start + size])

    async def put(self, name: str, path: Path, content_type: str) -> None:
        data = path.read_bytes()

        def put() -> None:
            if name in self.blobs and self.blobs[name].kind == "append":
                raise OtherBlobError(name)
            self.blobs[name] = MemoryBlob("block", content_type, [data], [False])

        await self._call("put", name, put)

    async def close(self) -> None:
        self.closed += 1

    # --- what goes wrong ---

    async def _call(self, operation: str, name: str, act: Callable[[], _T]) -> _T:
        self.trace.append((operation, name))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0)  # as any call of a real one, it lets others go on
            if self.gate is not None:
                await self.gate.wait()
            return self._answer(operation, name, act)
        finally:
            self.in_flight -= 1

    def _answer(self, operation: str, name: str, act: Callable[[], _T]) -> _T:
        fault = self.plan(operation, name) if self.plan is not None else None
        if isinstance(fault, NotNow):
            raise fault
        if fault is not None and self.disturb(fault, name):
            self.happened[fault] += 1
        late, self._late = self._late, deque()
        try:
            if fault is Fault.REFUSED:
                raise NotNow("busy", "it was refused.")
            if fault is Fault.LATE:
                self._late.append(act)
                raise NotNow("timeout", "no answer.")
            answer = act()
        finally:
            for one in late:
                _try(one)
        if fault is Fault.LOST:
            raise NotNow("timeout", "no answer.")
        return answer

    def disturb(self, fault: Fault, name: str) -> bool:
        """What somebody else does to the blob; whether there was anything to do."""
        blob = self.blobs.get(name)
        if fault is Fault.FOREIGN and blob is not None and blob.kind == "append":
            blob.blocks.append(FOREIGN)
            blob.foreign.append(True)
        elif fault is Fault.DELETED and blob is not None:
            del self.blobs[name]
        elif fault is Fault.CUT and blob is not None and blob.blocks:
            blob.blocks.pop()
            blob.foreign.pop()
        elif fault is Fault.REPLACED:
            self.blobs[name] = MemoryBlob("block", "", [FOREIGN], [True])
        elif fault is Fault.CONTAINER:
            self.blobs.clear()
        else:
            return fault in (Fault.REFUSED, Fault.LOST, Fault.LATE)
        return True

    def settle(self) -> None:
        """Has what is late come."""
        late, self._late = self._late, deque()
        for one in late:
            _try(one)

    def _existing(self, name: str) -> MemoryBlob:
        if name not in self.blobs:
            raise AbsentError(name)
        return self.blobs[name]


def _try(act: Callable[[], object]) -> None:
    try:
        act()
    except (AbsentError, BlobFullError, OtherBlobError, PositionTakenError):
        return
