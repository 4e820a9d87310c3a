"""A spool on a real folder, without the proxy around it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from proxy.ledger import Ledger
from proxy.settings import Durability, RollingRate, WhenFull
from proxy.spool.budget import Budget
from proxy.spool.files import Files
from proxy.spool.layout import Place
from proxy.spool.recovery import Journal
from proxy.spool.writer import Spool, Store

PROCESS_ID = "a" * 32
MIB = 1024 * 1024


class Bench:
    """The parts of a spool. Collections are ``request`` and ``response``."""

    def __init__(
        self,
        root: Path,
        *,
        rate: RollingRate = RollingRate.HOUR,
        roll_bytes: int = 256 * MIB,
        sync: bool = False,
        max_bytes: int = 0,
        kind: type[Files] = Files,
    ) -> None:
        self.root = root
        self.ledger = Ledger()
        self.budget = Budget([root / "data"], max_bytes)
        (root / "locks").mkdir(parents=True, exist_ok=True)
        self.journal = Journal(root / "locks", PROCESS_ID)
        self.places = {name: place(root / "data", name) for name in ("request", "response")}
        self.files = kind(
            self.places,
            rate=rate,
            roll_bytes=roll_bytes,
            sync=sync,
            process_id=PROCESS_ID,
            journal=self.journal,
            budget=self.budget,
            ledger=self.ledger,
        )

    def paths(self, collection: str = "request", pattern: str = "*.jsonl") -> list[Path]:
        return sorted(path for path in self.places[collection].root.rglob(pattern) if path.is_file())

    def content(self, collection: str = "request") -> list[bytes]:
        """Every line of the collection."""
        return [line for path in self.paths(collection) for line in path.read_bytes().splitlines(keepends=True)]


def place(data: Path, collection: str) -> Place:
    root = data / "e" / "n" / collection
    return Place(root, root.as_uri(), root.parent, root.parent.as_uri())


class HungFiles(Files):
    """A disk that hangs whenever ``gate`` is shut: appends neither fail nor return."""

    gate: threading.Event
    waiting: threading.Event

    def append(self, collection: str, lines: list[bytes]) -> None:
        if not self.gate.is_set():
            self.waiting.set()
            assert self.gate.wait(30)
        super().append(collection, lines)

    def write_body(self, *arguments: object) -> None:
        if not self.gate.is_set():
            self.waiting.set()
            assert self.gate.wait(30)
        super().write_body(*arguments)  # type: ignore[arg-type]


@dataclass
class Exchange:
    """An entry with one line in each collection."""

    number: int
    held_bytes: int = 0
    padding: int = 0
    events: int = 2
    fails: bool = False
    discarded: int = 0
    not_written_for: list[tuple[str, str]] = field(default_factory=list)

    def render(self, store: Store) -> list[tuple[str, bytes]]:
        if self.fails:
            raise ValueError("a defect")
        line = json.dumps({"number": self.number, "padding": "x" * self.padding}).encode() + b"\n"
        return [("request", line), ("response", line)]

    def discard(self) -> None:
        self.discarded += 1

    def not_written(self, collection: str, reason: str) -> None:
        self.not_written_for.append((collection, reason))


@dataclass
class Running:
    bench: Bench
    spool: Spool

    @property
    def ledger(self) -> Ledger:
        return self.bench.ledger

    def check_account(self) -> None:
        """The identity: nothing is counted twice, nothing vanishes."""
        account = self.ledger.account()
        assert account.pending >= 0, account
        assert account.received == account.delivered + sum(account.discarded.values()) + account.pending, account

    async def settled(self, timeout_seconds: float = 5) -> None:
        """Waits until nothing is pending."""
        async with asyncio.timeout(timeout_seconds):
            while self.ledger.account().pending:
                self.check_account()
                await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def spool(
    root: Path,
    *,
    durability: Durability = Durability.WRITTEN,
    when_full: WhenFull = WhenFull.DROP,
    max_hold_seconds: float = 0.05,
    memory_bytes: int = MIB,
    max_bytes: int = 0,
    kind: type[Files] = Files,
) -> AsyncIterator[Running]:
    bench = Bench(root, sync=durability is Durability.SYNCED, max_bytes=max_bytes, kind=kind)
    bench.budget.start()
    running = Running(
        bench,
        Spool(
            bench.files,
            bench.ledger,
            asyncio.get_running_loop(),
            durability=durability,
            when_full=when_full,
            max_hold_seconds=max_hold_seconds,
            memory_bytes=memory_bytes,
        ),
    )
    running.spool.start()
    try:
        yield running
    finally:
        if isinstance(bench.files, HungFiles):
            bench.files.gate.set()
        if not running.spool._closed.done():
            await running.spool.close()
        await asyncio.to_thread(running.spool._worker.join, 10)
        bench.budget.stop()


def hung(*, open_: bool = False) -> type[HungFiles]:
    """``HungFiles`` with a gate of their own."""

    class Hung(HungFiles):
        gate = threading.Event()
        waiting = threading.Event()

    if open_:
        Hung.gate.set()
    return Hung
