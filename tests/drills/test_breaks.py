"""Drill 9: either side goes away at any byte, and clients that are as slow as can be. Others notice nothing of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from proxy.settings import MIB
from tests.drills.conftest import Figure
from tests.drills.load import Dataset, ProxyProcess, Traffic, post, proxy_process, read_answer, stopped_account, until
from tests.drills.sizes import BREAK_STEP, SLOWLORIS, patiently
from tests.harness import model_server, read_request
from tests.relay.wire import reset

pytestmark = patiently
T = TypeVar("T")

BODY = b'{"data": "%b"}' % (b"x" * 250)
ANSWERS = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY),
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n%b\r\n3\r\nend\r\n0\r\n\r\n" % (b"y" * 16),
}
WHOLE = f"/length/{len(ANSWERS['length'])}/-"


@dataclass
class Model:
    """Answers ``/{kind}/{cut}/{how}``: an answer of that kind, whole, or so many bytes of it and then an end of that manner.

    ``/whole`` is answered at once; ``ended`` are the requests' ids whose connection ended before their answer was whole.
    """

    received: Counter[str] = field(default_factory=Counter)  # whole requests, by their ids
    ended: set[str] = field(default_factory=set)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, _ = await read_request(reader)
            found = re.search(rb"x-request-id: (\S+)", head)
            assert found is not None
            name = found[1].decode()
            self.received[name] += 1
            kind, cut, how = head.split(b" ", 2)[1].decode().strip("/").split("/")
            answer = ANSWERS[kind]
            if how == "waits":  # for the client to leave
                writer.write(answer[: int(cut)])
                with contextlib.suppress(ConnectionError):
                    await reader.read(-1)
                self.ended.add(name)
                return
            if int(cut) < len(answer):
                writer.write(answer[: int(cut)])
                await writer.drain()
                if how == "resets":
                    reset(writer)
                return
            writer.write(answer)


@dataclass
class Scene:
    """The proxy as a process before such a model, and somebody who asks all the time and must be served."""

    model: Model
    proxy: ProxyProcess
    bystander: Traffic
    storage: Path
    open_files: int
    asking: asyncio.Task[None]
    enough: asyncio.Event

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.proxy.port)

    async def stop(self) -> tuple[tuple[int, ...], dict[str, dict[str, object]]]:
        """The account, and the response's line of each exchange by its id."""
        self.enough.set()
        await self.asking
        self.proxy.signal(signal.SIGTERM)
        assert await self.proxy.exit_status() == 0, self.proxy.log()
        lines = [
            json.loads(line)
            for path in self.storage.glob("*/*/response/**/*.jsonl")
            for line in path.read_bytes().splitlines()
        ]
        dataset = Dataset.read(self.storage)
        assert not dataset.invalid_lines
        assert not dataset.torn_files
        assert dataset.doubled() == set()
        assert dataset.lost(self.bystander.seen) == set()
        return stopped_account(self.proxy), {line["xrequestid"]: line for line in lines}


@contextlib.asynccontextmanager
async def scene(folder: Path, **settings: object) -> AsyncIterator[Scene]:
    model, bystander = Model(), Traffic()
    enough = asyncio.Event()
    async with (
        model_server(model) as server,
        proxy_process(server.url, folder / "data", spool__max_hold="20s", **settings) as proxy,
    ):
        requests = itertools.takewhile(lambda _: not enough.is_set(), itertools.repeat((WHOLE, BODY)))
        asking = asyncio.create_task(bystander.client(proxy.port, "bystander", requests, seconds_between=0.01))
        try:
            await until(lambda: len(bystander.seen) > 5)
            yield Scene(model, proxy, bystander, folder / "data", proxy.open_files(), asking, enough)
        finally:
            enough.set()
            await asking
    assert bystander.cut == set()
    assert set(bystander.statuses) == {200}


def cuts(length: int) -> list[int]:
    """From the first byte to the last but one."""
    return sorted({*range(0, length, BREAK_STEP), 1, length - 2, length - 1})


def name_of(number: int) -> str:
    return f"gone.{number:05}"


def ours(by_name: Mapping[str, T]) -> dict[str, T]:
    """Without the bystander's."""
    return {name: value for name, value in by_name.items() if name.startswith("gone.")}


def leave(writer: asyncio.StreamWriter, manner: str) -> None:
    if manner == "resets":
        reset(writer)
    else:
        writer.close()


# --- the client goes ---


@pytest.mark.promise("E14")
@pytest.mark.parametrize("manner", ["closes", "resets"])
async def test_the_client_goes_within_its_request(manner: str, tmp_path: Path, figure: Figure) -> None:
    """The model server never has a whole request of it, and what is recorded says that the client left."""
    async with scene(tmp_path) as s:
        places = cuts(len(post(WHOLE, BODY, name_of(0))))
        for number, at in enumerate(places):
            reader, writer = await s.connect()
            writer.write(post(WHOLE, BODY, name_of(number))[:at])
            await writer.drain()
            leave(writer, manner)
            with contextlib.suppress(ConnectionError):
                await reader.read(-1)
        await until(lambda: s.proxy.open_files() <= s.open_files + 1)  # the bystander's
        account, lines = await s.stop()
    gone = ours(lines)
    assert len(gone) == account[0] // 2 - len(s.bystander.seen)
    assert {(line["statuscode"], line["capturestatus"]) for line in gone.values()} == {(499, "clientleft")}
    assert not ours(s.model.received)
    figure(
        f"9, the client {manner} at {len(places)} places of its request",
        f"0 passed on whole, {len(gone)} had a whole head: all recorded as left",
    )


@pytest.mark.promise("E14")
@pytest.mark.parametrize("manner", ["closes", "resets"])
@pytest.mark.parametrize("kind", ANSWERS)
async def test_the_client_goes_within_its_answer(kind: str, manner: str, tmp_path: Path, figure: Figure) -> None:
    """The model server's connection ends, and what is recorded says that the client left."""
    async with scene(tmp_path) as s:
        places = cuts(len(ANSWERS[kind]))
        for number, at in enumerate(places):
            reader, writer = await s.connect()
            writer.write(post(f"/{kind}/{at}/waits", BODY, name_of(number)))
            await until(lambda number=number: s.model.received[name_of(number)])  # type: ignore[misc]
            if at > ANSWERS[kind].index(b"\r\n\r\n") + 4:
                await reader.readuntil(b"\r\n\r\n")
            leave(writer, manner)
        await until(lambda: len(s.model.ended) == len(places))
        account, lines = await s.stop()
    gone = ours(lines)
    assert len(gone) == len(places) == account[0] // 2 - len(s.bystander.seen)
    assert {(line["statuscode"], line["capturestatus"]) for line in gone.values()} == {(499, "clientleft")}
    figure(
        f"9, the client {manner} at {len(places)} places of its answer ({kind})",
        f"{len(s.model.ended)} requests cancelled, all recorded as left",
    )


# --- the model server goes ---


@pytest.mark.promise("C9", "E15")
@pytest.mark.parametrize("manner", ["closes", "resets"])
@pytest.mark.parametrize("kind", ANSWERS)
async def test_the_model_server_goes_within_its_answer(kind: str, manner: str, tmp_path: Path, figure: Figure) -> None:
    """The client sees 502, or an abort, and never the end of an answer."""
    found: Counter[str] = Counter()
    async with scene(tmp_path) as s:
        places = cuts(len(ANSWERS[kind]))
        for number, at in enumerate(places):
            reader, writer = await s.connect()
            writer.write(post(f"/{kind}/{at}/{manner}", BODY, name_of(number)))
            try:
                status, _, _ = await read_answer(reader)
                found[str(status)] += 1
            except (ConnectionResetError, asyncio.IncompleteReadError):
                found["aborted"] += 1
            writer.close()
        account, lines = await s.stop()
    failed = ours(lines)
    assert set(found) == {"502", "aborted"}
    assert len(failed) == len(places) == account[0] // 2 - len(s.bystander.seen)
    assert {line["capturestatus"] for line in failed.values()} == {"upstreamfailed"}
    assert Counter(str(line["statuscode"]) for line in failed.values()) == {
        "502": found["502"],
        "200": found["aborted"],
    }
    figure(
        f"9, the model server {manner} at {len(places)} places of its answer ({kind})",
        f"{found['502']} × 502, {found['aborted']} aborts, 0 ends",
    )


# --- as slow as can be ---


@pytest.mark.promise("G21b")
async def test_slow_heads_and_bodies(tmp_path: Path, figure: Figure) -> None:
    """Each is told 408, and nothing is left of them; who is not slow is served meanwhile."""
    async with scene(tmp_path, proxy__head_timeout="1s", proxy__client_idle_timeout="1s") as s:
        s.proxy.forget_peak_memory()
        memory = s.proxy.peak_memory_bytes()
        crowd = [await s.connect() for _ in range(SLOWLORIS)]
        for number, (_, writer) in enumerate(crowd):
            request = post(WHOLE, BODY, name_of(number))
            writer.write(request[: 20 if number % 2 else -1])
        before = len(s.bystander.seen)
        statuses = Counter([(await read_answer(reader))[0] for reader, _ in crowd])
        served = len(s.bystander.seen) - before
        growth = s.proxy.peak_memory_bytes() - memory
        for _, writer in crowd:
            writer.close()
        await until(lambda: s.proxy.open_files() <= s.open_files + 1)
        await s.stop()
        log = s.proxy.log()
    assert statuses == {408: SLOWLORIS}
    assert served
    assert f"{SLOWLORIS // 2} × body_timeout, {SLOWLORIS // 2} × head_timeout" in log
    assert not ours(s.model.received)
    figure(
        f"9, {SLOWLORIS} slow heads and bodies at once",
        f"all 408; {served} others served meanwhile; memory + {growth / MIB:.1f} MiB",
    )
