"""The proxy as a process of its own, traffic through it, and what its dataset holds afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness import ModelServer, read_request

REPOSITORY = Path(__file__).parents[2]
COLLECTIONS = ("request", "response")
_LISTENING = re.compile(r"payload-logger \S+ on \S+:(\d+)(?: \(\d+ workers\))?,")
_STOPPED = re.compile(
    r"Stopped: received (\d+) events = delivered (\d+) \+ discarded (\d+)(?: \(.*\))? \+ pending (\d+)"
)


@dataclass
class ProxyProcess:
    """A proxy that runs as ``payload-logger run``."""

    process: subprocess.Popen[bytes]
    port: int
    log_path: Path

    def log(self) -> str:
        return self.log_path.read_text()

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self.process.kill()
        self.process.wait(timeout=30)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def exit_status(self, timeout_seconds: float = 30) -> int:
        return await asyncio.to_thread(self.process.wait, timeout_seconds)

    def peak_memory_bytes(self) -> int:
        """The most that was resident since the start, or since ``forget_peak_memory``."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:", 1)[1].split(maxsplit=1)[0]) * 1024

    def forget_peak_memory(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def open_files(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())


def stopped_accounts(running: ProxyProcess) -> list[tuple[int, ...]]:
    """Received, delivered, discarded, pending, as logged at the end by each worker."""
    accounts = [tuple(map(int, found.groups())) for found in _STOPPED.finditer(running.log())]
    assert accounts, running.log()
    assert all(account[0] == sum(account[1:]) for account in accounts)
    return accounts


def stopped_account(running: ProxyProcess) -> tuple[int, ...]:
    """That of the only one."""
    (account,) = stopped_accounts(running)
    return account


@contextlib.asynccontextmanager
async def proxy_process(
    upstream: str,
    storage: Path | str,
    *,
    log_name: str = "proxy",
    log_folder: Path | None = None,
    broken: str | None = None,
    environment: Mapping[str, str] | None = None,
    before_start: Callable[[], None] | None = None,
    config: Path | None = None,
    **settings: object,
) -> AsyncIterator[ProxyProcess]:
    """Runs the proxy on a free port until the block ends. Settings as ``section__key=value``.

    log_folder: by default the one that ``storage`` is in. broken: faults of ``tests.drills.broken`` to run it with.
    environment: further variables. before_start: called in the child, before the proxy. config: a file. The port is 0
    when the proxy was killed before it listened.
    """
    log_path = (log_folder or Path(storage).parent) / f"{log_name}.log"
    module = ["proxy"] if broken is None else ["tests.drills.broken", broken]
    arguments = ["run", "--upstream", upstream, "--listen", "127.0.0.1:0", "--storage", str(storage)]
    arguments += ["-c", str(config)] if config is not None else []
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PAYLOAD_LOGGER_")}
    variables |= environment or {}
    variables |= {f"PAYLOAD_LOGGER_{name.upper().replace('__', '_')}": str(value) for name, value in settings.items()}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *module, *arguments],
            cwd=REPOSITORY,
            env=variables,
            stderr=log,
            preexec_fn=before_start,
        )
    try:
        yield ProxyProcess(process, await _port(process, log_path), log_path)
    finally:
        process.kill()
        await asyncio.to_thread(process.wait, 30)


async def _port(process: subprocess.Popen[bytes], log_path: Path) -> int:
    async with asyncio.timeout(20):
        while (found := _LISTENING.search(log_path.read_text())) is None:
            if process.poll() == -signal.SIGKILL:
                return 0
            assert process.poll() is None, f"the proxy did not start:\n{log_path.read_text()}"
            await asyncio.sleep(0.005)
    return int(found[1])


async def until(condition: Callable[[], object], timeout_seconds: float = 10) -> None:
    """Waits for ``condition`` to become true; fails after ``timeout_seconds``."""
    try:
        async with asyncio.timeout(timeout_seconds):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"did not come true within {timeout_seconds:g} s") from None


# --- traffic ---


Request = tuple[str, bytes] | tuple[str, bytes, str]  # path, body, content type


def post(path: str, body: bytes, request_id: str, content_type: str = "application/json") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: model\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"x-request-id: {request_id}\r\n\r\n"
    ).encode() + body


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """Status and body of one response, and whether it is the last one. Raises IncompleteReadError when it is cut off."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status, last = int(head[9:12]), b"\r\nconnection: close\r\n" in head
    if b"\r\ntransfer-encoding: chunked" in head:
        body = b""
        while size := int(await reader.readline() or _cut(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
        return status, body, last
    length = int(head.split(b"\r\ncontent-length:", 1)[1].split(b"\r\n", 1)[0])
    return status, await reader.readexactly(length), last


def _cut() -> bytes:
    raise asyncio.IncompleteReadError(b"", None)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@dataclass
class Traffic:
    """What clients sent and saw: request ids."""

    sent: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)  # the response came whole
    cut: set[str] = field(default_factory=set)  # the connection ended before
    changed: set[str] = field(default_factory=set)  # the echo was not what was sent
    seconds: array[float] = field(default_factory=lambda: array("d"))  # that each exchange took
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def in_flight(self) -> int:
        return len(self.sent) - len(self.seen) - len(self.cut)

    async def client(
        self, port: int, name: str, requests: Iterable[Request], *, seconds_between: float | None = None
    ) -> None:
        """Sends one request after the other, until there are no more or the proxy goes.

        seconds_between: from the beginning of one exchange to that of the next, if the proxy is as fast.
        """
        connection = None
        began = time.monotonic()
        try:
            for number, (path, body, *content_type) in enumerate(requests):
                if seconds_between is not None and number:
                    await asyncio.sleep(began + seconds_between - time.monotonic())
                try:
                    connection = connection or await asyncio.open_connection("127.0.0.1", port, limit=2**24)
                except ConnectionError:
                    return
                reader, writer = connection
                request_id = f"{name}.{number}"
                self.sent.add(request_id)
                began = time.monotonic()
                try:
                    writer.write(post(path, body, request_id, *content_type))
                    status, answer, last = await read_answer(reader)
                except (ConnectionError, asyncio.IncompleteReadError):
                    self.cut.add(request_id)
                    return
                self.seen.add(request_id)
                self.seconds.append(time.monotonic() - began)
                self.statuses[status] += 1
                if path == "/echo" and answer != body:
                    self.changed.add(request_id)
                if last:
                    await _close(writer)
                    connection = None
        finally:
            if connection is not None:
                await _close(connection[1])

    async def send(self, port: int, name: str, count: int, body: bytes | None = None) -> None:
        """``count`` requests on one connection, for a score or to have ``body`` echoed; each must be answered."""
        request = ("/score", b'{"data": [[6, 3, 5, 2]]}') if body is None else ("/echo", body)
        await self.client(port, name, iter([request] * count))
        assert not self.cut, f"{len(self.cut)} exchanges were cut off"


class PatientModel:
    """A model server that answers nobody before it is told to."""

    def __init__(self) -> None:
        self.waiting = 0
        self.answer = asyncio.Event()
        self.server: ModelServer

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            self.waiting += 1
            await self.answer.wait()
            self.waiting -= 1
            writer.write(
                b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n{"answer": 42}'
            )


def one_each(traffic: Traffic, port: int, count: int, name: str = "c") -> asyncio.Future[list[None]]:
    """``count`` exchanges at once, one on each connection."""
    return asyncio.gather(*(traffic.client(port, f"{name}{n}", iter([("/score", b"[1]")])) for n in range(count)))


# --- the dataset ---


@dataclass
class Dataset:
    """The lines below a storage folder: how often each request id stands in each collection, and what is no line."""

    ids: dict[str, Counter[str]]
    torn_files: list[Path]
    invalid_lines: list[bytes]

    @classmethod
    def read(cls, storage: Path) -> Dataset:
        found = cls({name: Counter() for name in COLLECTIONS}, [], [])
        for path in (path for name in COLLECTIONS for path in storage.glob(f"*/*/{name}/**/*.jsonl")):
            content = path.read_bytes()
            if content and not content.endswith(b"\n"):
                found.torn_files.append(path)
            for line in content.splitlines(keepends=True):
                try:
                    event = json.loads(line)
                    found.ids[event["type"].rpartition(".")[2]][event["xrequestid"]] += 1
                except ValueError:
                    found.invalid_lines.append(line)
        return found

    @property
    def lines(self) -> int:
        return sum(counter.total() for counter in self.ids.values())

    def lost(self, seen: set[str]) -> set[str]:
        """Exchanges of ``seen`` that miss a line in some collection."""
        return {one for one in seen if not all(counter[one] for counter in self.ids.values())}

    def doubled(self) -> set[str]:
        return {one for counter in self.ids.values() for one, count in counter.items() if count > 1}
