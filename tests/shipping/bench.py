"""A process without its proxy: the files that it writes, and its shipper, with containers in memory behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from proxy.ledger import Ledger
from proxy.settings import RollingRate
from proxy.shipping import destination
from proxy.shipping.destination import Destination
from proxy.shipping.lane import Lane
from proxy.shipping.shipper import Chore, Shipper
from proxy.spool.budget import Budget
from proxy.spool.files import Files, LineFile
from proxy.spool.layout import LARGE, Place, new_process_id
from proxy.spool.recovery import Journal
from tests.shipping.memory import MemoryStore

URL = "https://account.blob.core.windows.net/container/pre%20fix"
OTHER_URL = "https://other.blob.core.windows.net/container"
NOON = 1_795_348_800.0  # 2026-11-22, 12:00 UTC


class Account(MemoryStore):
    """It refuses a line whose body is not there yet: ``early`` are those that came."""

    def __init__(self) -> None:
        super().__init__()
        self.early: list[bytes] = []

    async def append(self, name: str, data: bytes, position: int) -> None:
        for line in data.splitlines():
            body = json.loads(line).get("body")
            if body is not None and body not in self.blobs:
                self.early.append(line)
        await super().append(name, data, position)


class Cloud:
    """The containers, by what leads there; ``opened`` are the stores that were asked for, with their client ids."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.opened: list[tuple[str, str | None]] = []

    def account(self, url: str = URL) -> Account:
        return self.accounts.setdefault(destination.parse(url)[0].url, Account())

    def open(self, place: Destination, client_id: str | None) -> Account:
        self.opened.append((place.url, client_id))
        return self.accounts.setdefault(place.url, Account())

    def numbers(self) -> list[int]:
        """Of the lines that came, in no order."""
        return sorted(json.loads(line)["n"] for account in self.accounts.values() for line in account.lines())


class Process:
    """One process on a spool. ``urls`` are the roots of its collections, which are called by their numbers."""

    def __init__(
        self,
        spool: Path,
        cloud: Cloud,
        *urls: str,
        client_ids: Iterable[str | None] = (),
        chores: Iterable[Chore] = (),
        interval_seconds: float = 0.01,
        rate: RollingRate = RollingRate.HOUR,
        roll_bytes: int = 1024 * 1024,
    ) -> None:
        self.spool = spool
        self.cloud = cloud
        self.ledger = Ledger()
        self.budget = Budget([spool / scheme for scheme in destination.SCHEMES], 0)
        self.process_id = new_process_id()
        self.journal = Journal(spool, self.process_id)
        self.retired: list[LineFile] = []
        self.seconds = NOON
        self.content: dict[Path, bytes] = {}
        self.places = {str(number): _place(spool, url) for number, url in enumerate(urls or (f"{URL}/e/d/request",))}
        roots = [place.root_url for place in self.places.values()]
        ids = dict(zip(roots, [*client_ids, *[None] * len(roots)], strict=False))
        self.shipper = Shipper(
            spool,
            process_id=self.process_id,
            urls=ids,
            open_store=cloud.open,
            close=self._closed,
            chores=tuple(chores),
            retire=self._retire,
            ledger=self.ledger,
            budget=self.budget,
            interval_seconds=interval_seconds,
        )
        self.files = Files(
            self.places,
            rate=rate,
            roll_bytes=roll_bytes,
            sync=False,
            process_id=self.process_id,
            journal=self.journal,
            budget=self.budget,
            ledger=self.ledger,
            opened=self.shipper.track,
        )
        self.is_alive = True
        self.is_closed = False

    async def _closed(self) -> None:
        self.is_closed = True

    def _retire(self, file: LineFile) -> None:
        self.retired.append(file)
        self.files.retire(file)

    # --- what the writer does ---

    def write(self, *numbers: int, collection: str = "0", **more: Any) -> None:
        """A line for each number."""
        self.files.begin(self.seconds)
        lines = [json.dumps({"n": number, **more}).encode() + b"\n" for number in numbers]
        self.ledger.receive(len(lines))
        self.files.append(collection, lines)
        self.ledger.keep(len(lines))
        path = self.files._current[collection].path
        self.content[path] = self.content.get(path, b"") + b"".join(lines)

    def body(
        self, data: bytes = b"body", *, collection: str = "0", content_type: str = "image/png", large: bool = False
    ) -> str:
        """A body in a file of its own: the blob that it is to be."""
        self.files.begin(self.seconds)
        url = self.files.keep_body(collection, str(uuid.uuid4()), content_type, [data], large=large)
        assert url is not None
        return destination.parse(url)[1]

    def close_files(self) -> None:
        """The process stops writing."""
        self.files.close()
        self.is_alive = False

    # --- the shipper without its thread ---

    def lanes(self) -> list[Lane]:
        self.shipper._new_lanes()
        return list(self.shipper._lanes.values())

    async def turn(self, turns: int = 1) -> list[float]:
        """So many turns of every lane: the pauses."""
        return [await lane.turn() for _ in range(turns) for lane in self.lanes()]

    def die(self) -> None:
        """As with SIGKILL: files, locks and journal are let go as they are."""
        for lane in self.shipper._lanes.values():
            lane.close()
        if self.is_alive:
            self.is_alive = False
            for file in self.files._current.values():
                file.close()
            self.journal.leave()

    def left(self) -> list[Path]:
        """What is in the spool, beside journals."""
        return sorted(path for path in self.spool.rglob("*") if path.is_file() and path.suffix != ".journal")

    def pending(self) -> int:
        account = self.ledger.account()
        assert account.pending >= 0, account
        assert account.received == account.delivered + sum(account.discarded.values()) + account.pending
        return account.pending


def _place(spool: Path, url: str) -> Place:
    large = f"{url}{LARGE}"
    return Place(destination.folder(spool, url), url, destination.folder(spool, large), large, remote=True)


@contextlib.asynccontextmanager
async def running(process: Process) -> AsyncIterator[Process]:
    """With the thread. It is told to stop at the end, if it was not before."""
    process.shipper.start()
    try:
        yield process
    finally:
        if process.shipper._worker.is_alive():
            await process.shipper.finish(0)
        await asyncio.to_thread(process.shipper._worker.join, 10)
        assert not process.shipper._worker.is_alive()
