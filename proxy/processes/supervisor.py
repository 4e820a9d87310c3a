"""Several workers: starts them, replaces those that end, speaks for all of them on the admin port.

Each worker has listening sockets of its own (SO_REUSEPORT), which stay open here: what comes while a worker is replaced
waits for the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from proxy import listeners, logs
from proxy.admin.metrics import Snapshot
from proxy.app import StartError, listening
from proxy.processes import serve, worker
from proxy.processes.channel import Channel
from proxy.processes.signals import Signals
from proxy.settings import Settings

if TYPE_CHECKING:
    from proxy.admin.server import AdminServer

logger = logging.getLogger("payload_logger")

ASK_EVERY_SECONDS = 5.0
HUNG_SECONDS = 30.0  # a worker that does not answer for so long is ended, and replaced
SCRAPE_SECONDS = 3.0  # for the answer to a scrape
RELOAD_SECONDS = 10.0  # for a worker to take over other settings
SHORT_LIFE_SECONDS = 10.0  # who lived no longer is not replaced at once
LONGEST_PAUSE_SECONDS = 30.0
FLUSH_SECONDS = 20.0  # what a worker may take to end, after drain_seconds


async def supervise(settings: Settings, read: serve.Read, signals: Signals, admin: AdminServer | None) -> int:
    """The exit status. Raises StartError."""
    with tempfile.TemporaryFile() as spent, contextlib.ExitStack() as stack:
        spent.truncate(8 * settings.proxy.workers)
        supervisor = Supervisor(settings, spent.fileno())
        stack.callback(supervisor.close_sockets)
        supervisor.open_sockets()
        if admin is not None:
            admin.source = supervisor
        try:
            if not await _stopped_before(supervisor.start(), signals):
                while await signals.next():
                    await supervisor.reload(read)
            logger.info(
                "Stopping: no new connections; exchanges in flight have %g s to finish.", settings.proxy.drain_seconds
            )
        finally:
            cut = await supervisor.stop(signals.stop_now)
    logger.info("Stopped: all workers have ended.")
    return 1 if cut else 0


async def _stopped_before(start: Coroutine[Any, Any, None], signals: Signals) -> bool:
    """Whether a signal came before the start was over. Raises what ``start`` raises."""
    starting, stop = asyncio.ensure_future(start), asyncio.ensure_future(signals.stop.wait())
    await asyncio.wait({starting, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if starting.done():
        starting.result()
        return False
    starting.cancel()
    await asyncio.wait({starting})
    return True


class _Worker:
    """One process, from its start to its end."""

    def __init__(self, number: int, process: asyncio.subprocess.Process, channel: Channel) -> None:
        self.number = number
        self.process = process
        self.started_at = time.monotonic()
        self.address: str | None = None
        self.frames: str | None = None
        self.failure: str | None = None
        self.known = asyncio.Event()  # whether it has started
        self.ended = asyncio.create_task(process.wait())
        self._channel = channel
        self._asked: deque[asyncio.Future[dict[str, Any]]] = deque()
        self._listener = asyncio.create_task(self._listen())

    @property
    def is_ready(self) -> bool:
        return self.address is not None and not self.ended.done()

    async def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer. Raises ConnectionError when the worker is gone."""
        if self._listener.done():
            raise ConnectionError
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        self._channel.send(message)
        return await answer

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def end(self) -> int:
        """Waits for its end; its status."""
        status = await asyncio.shield(self.ended)
        await self._listener
        self._channel.close()
        return status

    async def _listen(self) -> None:
        while (message := await self._channel.receive()) is not None:
            if "ready" in message:
                self.address, self.frames = message["ready"], message["frames"]
                self.known.set()
            elif "failed" in message:
                self.failure = message["failed"]
            elif self._asked and not (asked := self._asked.popleft()).done():
                asked.set_result(message)
        self.known.set()
        while self._asked:
            if not (asked := self._asked.popleft()).done():
                asked.set_exception(ConnectionError())


class Supervisor:
    """See ``proxy.admin.server.Source``. Use: ``open_sockets``, ``await start()``, ``await stop()``, ``close_sockets``."""

    def __init__(self, settings: Settings, spent_fd: int) -> None:
        self.settings = settings
        self.restarts = 0
        self.reloads: Counter[str] = Counter()
        self._spent_fd = spent_fd
        self._count = settings.proxy.workers
        self._sockets: list[dict[str, list[socket.socket]]] = [{} for _ in range(self._count)]
        self._addresses: dict[str, str] = {}
        self._workers: dict[int, _Worker] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._started = False
        self._stopping = False

    # --- for the admin port ---

    def not_ready(self) -> str | None:
        if self._stopping:
            return "stopping"
        if not self._started:
            return "starting"
        return None if any(one.is_ready for one in self._workers.values()) else "no worker is running"

    def not_healthy(self) -> str | None:
        return None  # a worker that hangs is replaced

    async def snapshots(self) -> Sequence[tuple[str, Snapshot]]:
        workers = [one for _, one in sorted(self._workers.items()) if one.address is not None]
        answers = await asyncio.gather(
            *(asyncio.wait_for(one.ask({}), SCRAPE_SECONDS) for one in workers), return_exceptions=True
        )
        return [
            (str(one.number), answer["snapshot"])
            for one, answer in zip(workers, answers, strict=True)
            if not isinstance(answer, BaseException)
        ]

    def common(self) -> Snapshot:
        running = sum(one.is_ready for one in self._workers.values())
        return {
            "workers": 0 if self._stopping else running,
            "worker_restarts": self.restarts,
            "reloads": self.reloads,
        }

    # --- the sockets ---

    def open_sockets(self) -> None:
        """Raises StartError."""
        wanted = {"proxy.listen": self.settings.proxy.listen}
        if self.settings.sdk_endpoint is not None:
            wanted["custom_logging.listen"] = self.settings.sdk_endpoint.listen
        for key, address in wanted.items():
            with listening(key, address):
                # Not shared, this finds out whether somebody else listens there; the kernel chooses a port, if it is to.
                probes = listeners.open_listeners(address)
                self._addresses[key] = address if len(probes) > 1 else listeners.shown(probes[0])
                for probe in probes:
                    probe.close()
                for number in range(self._count):
                    self._open(key, number)

    def _open(self, key: str, number: int) -> None:
        self._sockets[number][key] = listeners.open_listeners(self._addresses[key], shared=True)

    def close_sockets(self) -> None:
        for number in range(self._count):
            self._close(number)

    def _close(self, number: int) -> None:
        for one in (one for sockets in self._sockets[number].values() for one in sockets):
            one.close()
        self._sockets[number].clear()

    # --- the workers ---

    async def start(self) -> None:
        """Returns when all take traffic. Raises StartError."""
        for number in range(self._count):  # the first by itself: what is wrong is told once
            first = await self._spawn(number)
            if number == 0:
                await self._until_ready(first)
        for one in self._workers.values():
            await self._until_ready(one)
        self._started = True
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._always(work, number))
            for number in range(self._count)
            for work in (self._keep, self._watch)
        ]
        one = self._workers[0]
        logger.info("%s", serve.describe(self.settings, one.address or "", one.frames))

    async def _until_ready(self, one: _Worker) -> None:
        await one.known.wait()
        if one.address is None:
            status = await one.end()
            raise StartError(one.failure or f"worker {one.number} ended with status {status} before it took traffic")

    async def _spawn(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair()
        sockets = {key: [one.fileno() for one in some] for key, some in self._sockets[number].items()}
        words, environment = worker.command(theirs.fileno(), f"payload-logger-worker-{number}")
        try:
            process = await asyncio.create_subprocess_exec(
                *words,
                env=environment,
                start_new_session=True,  # what is sent to the whole group reaches them through the supervisor
                pass_fds=(theirs.fileno(), self._spent_fd, *(fd for some in sockets.values() for fd in some)),
            )
        finally:
            theirs.close()
        channel = await Channel.over(ours)
        channel.send(
            {
                "worker": number,
                "workers": self._count,
                "settings": msgspec.to_builtins(self.settings),
                "sockets": sockets,
                "spent": self._spent_fd,
            }
        )
        self._workers[number] = one = _Worker(number, process, channel)
        return one

    async def _always(self, work: Callable[[int], Coroutine[Any, Any, None]], number: int) -> None:
        while True:
            try:
                await work(number)
            except Exception:
                logger.exception("The supervisor has met a defect of payload-logger; it goes on.")
                await asyncio.sleep(1)

    async def _keep(self, number: int) -> None:
        """Replaces the worker whenever it ends."""
        short_lives = 0
        while True:
            one = self._workers[number]
            status = await one.end()
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            is_short = status != 0 and time.monotonic() - one.started_at < SHORT_LIFE_SECONDS
            short_lives = short_lives + 1 if is_short else 0
            pause = min(LONGEST_PAUSE_SECONDS, 2.0 ** (short_lives - 2)) if short_lives > 1 else 0.0
            self.restarts += 1
            logger.error(
                "Worker %d (process %d) ended by itself (%s)%s; it is replaced%s.",
                number,
                one.process.pid,
                how,
                f": {one.failure}" if one.failure else "",
                f" in {pause:g} s" if pause else "",
            )
            if pause:
                self._close(number)  # the others take the connections meanwhile
                await asyncio.sleep(pause)
            while True:
                try:
                    for key in self._addresses:
                        if key not in self._sockets[number]:
                            self._open(key, number)
                    await self._spawn(number)
                    break
                except OSError as error:
                    logger.error("Worker %d could not be started: %s; it is tried again.", number, error)
                    await asyncio.sleep(LONGEST_PAUSE_SECONDS)

    async def _watch(self, number: int) -> None:
        """Ends the worker if it hangs."""
        while True:
            await asyncio.sleep(ASK_EVERY_SECONDS)
            one = self._workers[number]
            if one.address is None:
                continue
            # Twice: after a pause of the machine both clocks have run on.
            for seconds in (HUNG_SECONDS, ASK_EVERY_SECONDS):
                try:
                    await asyncio.wait_for(one.ask({}), seconds)
                    break
                except TimeoutError:
                    continue
                except ConnectionError:
                    break
            else:
                logger.error("Worker %d has not answered for %g s; it is ended.", number, HUNG_SECONDS)
                one.signal(signal.SIGKILL)

    async def stop(self, at_once: asyncio.Event) -> bool:
        """Ends all workers; whether any had to be cut off."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.close_sockets()
        workers = list(self._workers.values())
        for one in workers:
            one.signal(signal.SIGTERM)
        ends = asyncio.create_task(_ends(workers))
        hurry = asyncio.create_task(at_once.wait())
        grace = self.settings.proxy.drain_seconds + FLUSH_SECONDS
        await asyncio.wait({hurry, ends}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        if hurry.done():
            for one in workers:
                one.signal(signal.SIGTERM)
            await asyncio.wait({ends}, timeout=FLUSH_SECONDS)
        hurry.cancel()
        if not ends.done():
            logger.error("Workers have not ended in time; they are killed. What is recorded is on disk.")
            for one in workers:
                one.signal(signal.SIGKILL)
        return await ends

    async def reload(self, read: serve.Read) -> None:
        found = await serve.read_again(self.settings, read, self.reloads)
        if found is None:
            return
        before, self.settings = self.settings, found.settings  # which a worker that is started meanwhile gets
        trouble: str | None = None
        for one in list(self._workers.values()):
            trouble = await self._apply(one)
            if trouble is not None:
                self.settings = before
                break
        else:
            logs.configure(self.settings.logs)
        serve.tell_reloaded(found, trouble, self.reloads)

    async def _apply(self, one: _Worker) -> str | None:
        """Has a worker take over the settings; why it does not."""
        try:
            async with asyncio.timeout(RELOAD_SECONDS):
                await one.known.wait()
                if one.address is None:
                    return None  # it has ended; its successor gets them
                answer = await one.ask({"apply": msgspec.to_builtins(self.settings), "worker": one.number})
        except ConnectionError:
            return None
        except TimeoutError:
            return f"worker {one.number} does not answer"
        refused: str | None = answer["refused"]
        return refused


async def _ends(workers: Sequence[_Worker]) -> bool:
    """Waits for all; whether any did not end well."""
    return any([await one.end() for one in workers])
