"""Brings what is in the spool to its destinations, and removes it there. Runs in a thread with an event loop of its own.

Each container has a lane (``lane.py``), which goes through its part of the spool every ``interval``; a lane that fails
keeps no other one waiting. What processes left that have died is put in order, and found by its lane.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from proxy.ledger import Discard, Ledger
from proxy.shipping import destination
from proxy.shipping.destination import Destination
from proxy.shipping.lane import TOLD_AFTER, Backoff, Lane, LaneState
from proxy.shipping.store import NotNow, Store
from proxy.spool import recovery
from proxy.spool.budget import Budget
from proxy.spool.files import LineFile

logger = logging.getLogger("payload_logger.shipping")

ADOPT_SECONDS = 5.0  # how often it is looked for what other processes left
END_SECONDS = 2.0  # for what is cancelled to end

OpenStore = Callable[[Destination, str | None], Store]
Chore = Callable[[], Awaitable[None]]


class Shipper:
    """``start`` and ``finish`` are for the proxy's event loop, ``track`` is for the writer thread."""

    def __init__(
        self,
        spool: Path,
        *,
        process_id: str,
        urls: Mapping[str, str | None],
        open_store: OpenStore,
        close: Callable[[], Awaitable[None]],
        chores: Sequence[Chore] = (),
        retire: Callable[[LineFile], None],
        ledger: Ledger,
        budget: Budget,
        interval_seconds: float,
    ) -> None:
        """``urls`` are the roots that this process writes to, and the client id of the identity for each.

        ``open_store``, ``close`` and ``chores`` (each done once, as soon as it works) are called in the shipper's thread.
        """
        self.spool = spool
        self.process_id = process_id
        self.ledger = ledger
        self.budget = budget
        self.retire = retire
        self.interval_seconds = interval_seconds
        self.stopping = False
        self.appends: Counter[str] = Counter()  # by outcome: "ok" or the reason why not; so puts of bodies
        self.puts: Counter[str] = Counter()
        self.shipped_bytes = 0
        self._roots = {
            destination.folder(spool, url): (destination.parse(url)[0], client_id) for url, client_id in urls.items()
        }
        self._open_store = open_store
        self._close = close
        self._chores = chores
        self._doing: list[asyncio.Task[None]] = []
        self._stores: dict[tuple[Destination, str | None], Store] = {}
        self._lanes: dict[Path, Lane] = {}
        self._opened: deque[LineFile] = deque()
        self._is_blind = False  # the spool can't be looked through
        self._is_defective = False  # for a defect of ours: the log has told of it
        self._disordered: set[Path] = set()  # what dead processes left and can't be put in order: there was a warning
        self._worker = threading.Thread(target=self._run, name="shipper", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._finishing: asyncio.Future[list[None]] | None = None
        self._finish_by = 0.0
        self._started = threading.Event()

    def track(self, file: LineFile) -> None:
        """``file`` was begun."""
        self._opened.append(file)

    def start(self) -> None:
        self._worker.start()

    def add_root(self, url: str, client_id: str | None, chores: Sequence[Chore] = ()) -> None:
        """One more root that this process writes to, and what is to be done once for it. May be called from any thread."""
        self._call(partial(self._begin, chores))
        self._roots = self._roots | {destination.folder(self.spool, url): (destination.parse(url)[0], client_id)}

    async def finish(self, timeout_seconds: float, at_once: asyncio.Event | None = None) -> None:
        """Ships what is left, for ``timeout_seconds`` at most, or until ``at_once`` is set, and ends.

        The rest stays for the next process.
        """
        self._finish_by = time.monotonic() + timeout_seconds
        self.stopping = True
        await asyncio.to_thread(self._started.wait)
        self._call(self._stop_working)
        end = asyncio.ensure_future(asyncio.to_thread(self._worker.join, timeout_seconds + END_SECONDS))
        hurry = asyncio.ensure_future((at_once or asyncio.Event()).wait())
        await asyncio.wait({end, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if hurry.done():
            self._finish_by = 0.0
            self._call(self._stop_finishing)
            await asyncio.wait({end}, timeout=END_SECONDS)
        hurry.cancel()

    def _call(self, what: Callable[[], None]) -> None:
        """Has the thread do it."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(what)

    @property
    def roots(self) -> int:
        """How many roots this process writes to."""
        return len(self._roots)

    def _stop_working(self) -> None:
        assert self._stop is not None  # noqa: S101
        self._stop.set()

    def _stop_finishing(self) -> None:
        self._stop_working()
        if self._finishing is not None:
            self._finishing.cancel()

    def states(self) -> list[LaneState]:
        """May be called from any thread."""
        return [lane.state() for lane in list(self._lanes.values())]

    # --- in the thread ---

    def _run(self) -> None:
        try:
            asyncio.run(self._work())
        except Exception:
            logger.exception(
                "Shipping has ended, by a defect of payload-logger; what is recorded stays in %s.", self.spool
            )
            for lane in list(self._lanes.values()):
                lane.trouble = NotNow("defect", "shipping has ended, by a defect of payload-logger; restart it.")
        finally:
            self._started.set()

    async def _work(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._started.set()
        self._begin(self._chores)
        runs: dict[Lane, asyncio.Task[None]] = {}
        try:
            while True:
                runs |= {lane: asyncio.create_task(lane.run()) for lane in self._look()}
                if await self.stopped_within(min(ADOPT_SECONDS, self.interval_seconds)):
                    break
            runs |= {lane: asyncio.create_task(lane.run()) for lane in self._look()}
            self._finishing = asyncio.gather(*self._doing, *(self._finish(lane, run) for lane, run in runs.items()))
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(self._finishing, max(0.0, self._finish_by - time.monotonic()))
        finally:
            for task in (*self._doing, *runs.values()):
                task.cancel()
            await asyncio.gather(*self._doing, *runs.values(), return_exceptions=True)
            for lane in self._lanes.values():
                lane.close()
            for store in self._stores.values():
                await store.close()
            await self._close()

    async def _finish(self, lane: Lane, run: asyncio.Task[None]) -> None:
        """When its last turn is over, further ones, until all is shipped, or it has failed some times in a row."""
        await asyncio.wait([run])
        lane.backoff.failures = 0
        pause = await lane.turn()
        while lane.backoff.failures < TOLD_AFTER and (lane.backoff.failures or not lane.is_empty):
            pause = pause if lane.backoff.failures else 0.01
            if time.monotonic() + pause > self._finish_by:
                break
            await asyncio.sleep(pause)
            pause = await lane.turn()

    async def stopped_within(self, seconds: float) -> bool:
        """Waits for ``seconds``, or until the shipper is to stop; whether it is."""
        assert self._stop is not None  # noqa: S101
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        return self._stop.is_set()

    def _look(self) -> list[Lane]:
        """The lanes that are new; a defect of ours must not end those that are under way."""
        try:
            return self._new_lanes()
        except Exception:
            if not self._is_defective:
                logger.exception(
                    "%s could not be looked through, by a defect of payload-logger; it is tried again.", self.spool
                )
            self._is_defective = True
            return []

    def _new_lanes(self) -> list[Lane]:
        """Puts in order what processes left that have died; hands the new files to their lanes; the lanes that are new."""
        try:
            recovered = recovery.recover(self.spool, self._disordered)
            opened = len(self._opened)  # not those that come meanwhile: their folders may not be among the found ones
            found = list(destination.destinations(self.spool))
        except OSError as error:
            if not self._is_blind:
                logger.warning("%s could not be looked through: %s; it is tried again and again.", self.spool, error)
            self._is_blind = True
            return []
        self._is_blind = False
        if recovered.processes:
            self.ledger.recover(torn=recovered.torn, orphans=recovered.orphans)
        new = []
        for folder, url in found:
            if folder not in self._lanes:
                self._lanes[folder] = lane = Lane(self, folder, url)
                new.append(lane)
        for _ in range(opened):
            file = self._opened.popleft()
            lanes = [lane for folder, lane in self._lanes.items() if file.path.is_relative_to(folder)]
            if lanes:
                lanes[0].files.append(file)
            else:  # its folder was deleted at once
                self.lose(file, file.lines, "deleted")
        return new

    def lose(self, file: LineFile, lines: int, how: str) -> None:
        """``lines`` of ``file`` are gone, and were not shipped."""
        self.ledger.lose(Discard.SPOOL_DELETED, lines)
        logger.error("%s was %s before it was shipped; %d lines are lost, and counted.", file.path, how, lines)

    def store(self, place: Destination, path: Path) -> Store:
        """The store of ``place``, with the identity that the settings have for ``path``."""
        client_id = self._client_id(place, path)
        key = (place, client_id)
        if key not in self._stores:
            self._stores[key] = self._open_store(place, client_id)
        return self._stores[key]

    def _client_id(self, place: Destination, path: Path) -> str | None:
        """That of the root which has the most in common with ``path``: large bodies are beside it, not below."""
        roots = [root for root, (of, _) in self._roots.items() if of == place]
        if not roots:
            return None
        nearest = max(roots, key=lambda root: len(os.path.commonpath((root, path))))
        return self._roots[nearest][1]

    def _begin(self, chores: Sequence[Chore]) -> None:
        self._doing += [asyncio.create_task(self._do(chore)) for chore in chores]

    async def _do(self, chore: Chore) -> None:
        """Until it works, or the shipper stops."""
        backoff = Backoff()
        told = None
        pause = 0.0
        while not await self.stopped_within(pause):
            try:
                await chore()
                return
            except NotNow as error:
                if error.reason != told:
                    logger.warning("%s It is tried again and again; nothing waits for it.", error.words)
                told = error.reason
                pause = backoff.seconds(error.retry_after_seconds)
            except Exception:
                logger.exception(
                    "A chore failed by a defect of payload-logger; it is not tried again, and nothing waits for it."
                )
                return
