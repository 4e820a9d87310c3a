"""The proxy before a storage account: traffic that can be told apart, and whether all of it came there, once, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import unquote

import orjson

from tests.azure.blob_server import APPEND_BLOB, BlobServer
from tests.azure.faults import Fault, Plan
from tests.drills.load import COLLECTIONS, ProxyProcess, Request, Traffic, proxy_process, stopped_accounts, until

EMULATOR = {"AZURE_STORAGE_CONNECTION_STRING": "UseDevelopmentStorage=true"}
CONTAINER = "drill"
FOREIGN = b'{"written by": "somebody else"}\n'
SOON_SECONDS = 60.0  # what surely comes: the limit is for machines that are busy with other things
FAILS = "shipping fails"  # in the log
GOES_ON = "shipping goes on"
_ADOPTED = re.compile(r"; (\d+) shipped for processes that have ended")

Blobs = Mapping[str, tuple[str, bytes | bytearray]]  # container/name → kind, content


# --- traffic ---


def request_of(request_id: str) -> Request:
    """What is sent under this id: small JSON for the most part, some larger, some bodies for files of their own, some streams."""
    chance = zlib.crc32(request_id.encode())
    kind, length = chance % 100, chance // 100
    if kind < 80:
        return "/echo", b'{"id": "%b"}' % request_id.encode()
    if kind < 85:
        return "/echo", b'{"id": "%b", "text": "%b"}' % (request_id.encode(), b"x" * (length % 30_000))
    if kind < 90:
        return "/echo", b"\xff\x00" * (length % 3000) + b"\xff" + request_id.encode(), "application/octet-stream"
    return f"/stream?tokens={length % 6}&delay=0.02", b"{}"


# --- the proxy ---


class Shipping:
    """A spool, an account, and what was sent and seen, whatever processes ship from the one to the other."""

    def __init__(
        self, folder: Path, model_url: str, account_url: str, request_of: Callable[[str], Request] = request_of
    ) -> None:
        self.folder = folder
        self.spool = folder / "spool"
        self.kept = folder / "kept"
        self.kept.mkdir()
        self.model_url = model_url
        self.account_url = account_url
        self.traffic = Traffic()
        self.request_of = request_of
        self.logs: list[Path] = []

    @contextlib.asynccontextmanager
    async def process(self, *faults: str, **more: object) -> AsyncIterator[ProxyProcess]:
        """Runs the proxy on this spool. ``more`` as for ``proxy_process``."""
        options: dict[str, object] = {
            "environment": EMULATOR,
            "log_name": f"proxy-{len(self.logs)}",
            "spool__path": self.spool,
            "storage__ship_interval": "50ms",
            # On a machine that is busy with other things an answer may leave after max_hold; that is another promise.
            "spool__max_hold": "20s",
        } | more
        self.logs.append(self.folder / f"{options['log_name']}.log")
        async with proxy_process(
            self.model_url,
            f"{self.account_url}/{CONTAINER}/data",
            log_folder=self.folder,
            broken=",".join([f"keep:{self.kept}", *faults]),
            **options,  # type: ignore[arg-type]
        ) as proxy:
            yield proxy

    def requests(self, client: str) -> Iterator[Request]:
        return (self.request_of(f"{client}.{number}") for number in itertools.count())

    @contextlib.asynccontextmanager
    async def load(
        self, proxy: ProxyProcess, name: str, *, connections: int = 10, per_second: float = 400
    ) -> AsyncIterator[None]:
        """Clients that go on until the block ends, or the proxy does. Their requests are called ``{name}.{client}.{number}``."""
        stopped = False
        tasks = [
            asyncio.create_task(
                self.traffic.client(
                    proxy.port,
                    f"{name}.{number}",
                    itertools.takewhile(lambda _: not stopped, self.requests(f"{name}.{number}")),
                    seconds_between=connections / per_second,
                )
            )
            for number in range(connections if proxy.port else 0)
        ]
        try:
            yield
        finally:
            stopped = True
            await asyncio.gather(*tasks)

    async def send(self, proxy: ProxyProcess, name: str, count: int, connections: int = 4) -> None:
        """``count`` exchanges, all of which must be answered."""
        await asyncio.gather(
            *(
                self.traffic.client(
                    proxy.port, f"{name}.{n}", itertools.islice(self.requests(f"{name}.{n}"), count // connections)
                )
                for n in range(connections)
            )
        )
        assert not self.traffic.cut

    def spooled(self, pattern: str = "*") -> list[Path]:
        """What is yet to be shipped, or removed. Folders that are removed meanwhile are empty."""
        found = (
            Path(folder, name)
            for root in self.spool.glob("http*")
            for folder, _, names in os.walk(root)
            for name in names
        )
        return [path for path in found if fnmatch(path.name, pattern) and path.exists()]

    def kept_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.kept.iterdir())

    async def all_is_at(self, server: BlobServer, within_seconds: float = SOON_SECONDS, but: float = 0) -> None:
        """Waits until every byte that the spool has had is in a blob of ``server``, ``but`` so many."""

        def arrived() -> int:
            foreign = server.happened["foreign write"] * len(FOREIGN)
            return sum(len(blob.data) for blob in server.blobs.values() if blob.kind == APPEND_BLOB) - foreign

        await until(lambda: arrived() >= self.kept_bytes() - but, within_seconds)

    async def stop(self, proxy: ProxyProcess) -> tuple[int, ...]:
        """SIGTERM, exit 0: received, delivered, discarded, pending."""
        (account,) = await self.stop_all(proxy)
        return account

    async def stop_all(self, proxy: ProxyProcess) -> list[tuple[int, ...]]:
        """The same, of each worker."""
        proxy.signal(signal.SIGTERM)
        assert await proxy.exit_status(SOON_SECONDS) == 0, proxy.log()
        return stopped_accounts(proxy)

    async def deliver_rest(self) -> tuple[int, ...]:
        """Has a process ship what all the others left; its account."""
        async with self.process() as proxy:
            await until(lambda: not self.spooled(), SOON_SECONDS)
            account = await self.stop(proxy)
        assert account[2:] == (0, 0), "discarded or pending"
        assert not list(self.spool.glob("*.journal"))
        return account

    def log(self) -> str:
        """Of all processes."""
        return "".join(path.read_text() for path in self.logs)


def adopted(proxy: ProxyProcess) -> int:
    """Events that were shipped for processes that have ended, as logged at the end."""
    found = _ADOPTED.search(proxy.log())
    return int(found[1]) if found else 0


# --- what came ---


def blobs_of(server: BlobServer) -> Blobs:
    return {key: (blob.kind, blob.data) for key, blob in server.blobs.items()}


@dataclass
class Arrived:
    """What is in the account, compared with what was sent and seen, and with what was in the spool's files."""

    ids: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in COLLECTIONS})
    lines: int = 0
    foreign: int = 0
    gaps: list[tuple[str, int, int]] = field(default_factory=list)  # file, from, to: bytes that are in no blob
    gap_lines: int = 0
    twice: list[tuple[str, int, int]] = field(default_factory=list)  # bytes that are in more than one
    wrong: list[str] = field(default_factory=list)  # what it should not be, in words

    def lost(self, seen: set[str]) -> set[str]:
        """Exchanges of ``seen`` that miss a line in some collection."""
        return {one for one in seen if not all(counter[one] for counter in self.ids.values())}

    def doubled(self) -> set[str]:
        return {one for counter in self.ids.values() for one, count in counter.items() if count > 1}

    def check(self, traffic: Traffic) -> None:
        """All is there, once, and as it was."""
        assert self.wrong == []
        assert self.gaps == []
        assert self.twice == []
        assert self.lost(traffic.seen) == self.doubled() == set()
        assert all(set(ids) <= traffic.sent for ids in self.ids.values())
        assert traffic.changed == set()
        assert set(traffic.statuses) <= {200}


def compare(shipping: Shipping, blobs: Blobs) -> Arrived:
    found = Arrived()
    pieces: dict[str, list[tuple[int, int]]] = {path.name: [] for path in shipping.kept.iterdir()}
    kept = _Kept(shipping.kept)
    for key, (kind, data) in sorted(blobs.items()):
        if kind != APPEND_BLOB:
            continue
        ours, foreign, rest = _without_foreign(bytes(data))
        found.foreign += foreign
        if rest:
            found.wrong.append(f"{key}: something was written after what somebody else wrote")
        if not ours:
            continue
        if not ours.endswith(b"\n"):
            found.wrong.append(f"{key}: half a line at the end")
        place = kept.find(Path(key).name, ours)
        if place is None:
            found.wrong.append(f"{key}: no file of the spool had these bytes")
        else:
            pieces[place[0]].append((place[1], place[1] + len(ours)))
        _read_lines(shipping, blobs, key, ours, found)
    for name, parts in pieces.items():
        _tile(name, parts, kept.content(name), found)
    return found


def _without_foreign(data: bytes) -> tuple[bytes, int, bytes]:
    """What is ours, how often somebody else wrote behind it, and what stands behind that."""
    at = data.find(FOREIGN)
    if at < 0:
        return data, 0, b""
    rest = data[at:]
    count = 0
    while rest.startswith(FOREIGN):
        rest = rest[len(FOREIGN) :]
        count += 1
    return data[:at], count, rest


class _Kept:
    """What was in the spool's files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[bytes, tuple[str, int]] | None = None

    def content(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def find(self, blob: str, data: bytes) -> tuple[str, int] | None:
        """The file that had these bytes, and where. The blob has the file's name, unless it is the rest of one."""
        name, at = blob, 0
        if not (self._folder / blob).exists():
            first = data[: data.find(b"\n") + 1]
            name, at = self._lines().get(first, ("", 0))
        if not name or self.content(name)[at : at + len(data)] != data:
            return None
        return name, at

    def _lines(self) -> dict[bytes, tuple[str, int]]:
        """Where each line is; each has an id of its own."""
        if self._places is None:
            self._places = {}
            for path in self._folder.iterdir():
                at = 0
                for line in path.read_bytes().splitlines(keepends=True):
                    self._places[line] = path.name, at
                    at += len(line)
        return self._places


def _tile(name: str, parts: list[tuple[int, int]], content: bytes, found: Arrived) -> None:
    """Whether the pieces make up the file."""
    at = 0
    for start, end in [*sorted(parts), (len(content), len(content))]:
        if start > at:
            found.gaps.append((name, at, start))
            found.gap_lines += content.count(b"\n", at, start)
        if start < at:
            found.twice.append((name, start, min(at, end)))
        at = max(at, end)


def _read_lines(shipping: Shipping, blobs: Blobs, key: str, data: bytes, found: Arrived) -> None:
    for line in data.splitlines():
        found.lines += 1
        try:
            event = orjson.loads(line)
            collection, request_id = event["type"].rpartition(".")[2], event["xrequestid"]
        except (ValueError, KeyError):
            found.wrong.append(f"{key}: no event: {line[:200]!r}")
            continue
        found.ids[collection][request_id] += 1
        if request_id in shipping.traffic.seen and not _holds(shipping, blobs, event, request_id, collection):
            found.wrong.append(f"{key}: not what was sent: {line[:500]!r}")


def _holds(shipping: Shipping, blobs: Blobs, event: dict[str, object], request_id: str, collection: str) -> bool:
    """Whether the line holds what was sent and answered under its id."""
    path, body, *content_type = shipping.request_of(request_id)
    if path != "/echo":
        return collection == "response" or event["data"] == {}
    if not content_type:
        return event["data"] == json.loads(body)
    url = str(event["data"])
    _, content = blobs.get(unquote(url.removeprefix(f"{shipping.account_url}/")), ("", b""))
    return event.get("datainblob") == "true" and content == body


# --- plans ---


@dataclass
class Witness:
    """A plan that asks another one, and notes when each request came, in seconds: (operation, blob, when, its fault)."""

    plan: Plan
    seen: list[tuple[str, str, float, Fault | None]] = field(default_factory=list)

    def __call__(self, operation: str, blob: str, number: int) -> Fault | None:
        fault = self.plan(operation, blob, number)
        self.seen.append((operation, blob, asyncio.get_running_loop().time(), fault))
        return fault
