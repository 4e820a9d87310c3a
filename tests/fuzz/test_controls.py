"""Negative controls: a proxy that lets the same cases by is found out."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from proxy.relay import framing
from tests.fuzz import sizes
from tests.fuzz.strict import read_answers, read_request, read_stream
from tests.fuzz.test_corpus import ANSWERS, REQUESTS, check_answer, check_request
from tests.fuzz.wires import SENTINEL, Bench, bench
from tests.harness import model_server

pytestmark = sizes.patiently


@contextlib.asynccontextmanager
async def blind_pipe() -> AsyncIterator[Bench]:
    """In place of the proxy: what passes every byte on, whatever it means."""
    async with bench() as made:

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", made.recorder.port)
            ways = [asyncio.ensure_future(pass_on(reader, back)), asyncio.ensure_future(pass_on(there, writer))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                back.close()

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(65536):
                    writer.write(data)

        async with model_server(connected) as pipe:
            yield Bench(made.recorder, made.relay, pipe.port)


async def test_a_blind_pipe_is_found_out_by_every_bad_request() -> None:
    """Content-Length and Transfer-Encoding both, among others."""
    bad = [case for case in REQUESTS if case.later is None and read_stream(case.sends + SENTINEL).end == "head"]
    assert len(bad) >= 80
    async with blind_pipe() as made:
        for case in bad:
            with pytest.raises(AssertionError, match="the model server got what is no HTTP"):
                await check_request(made, case, cut=False)
            made.recorder.clear()


async def test_a_blind_pipe_is_found_out_by_every_bad_answer() -> None:
    bad = [case for case in ANSWERS if _bad(case.asks, case.answers, case.how)]
    assert len(bad) >= 60
    async with blind_pipe() as made:
        for case in bad:
            with pytest.raises(AssertionError, match=r"the client got|without an abort"):
                await check_answer(made, case, cut=False)
            made.recorder.clear()


def _bad(asks: bytes, answers: bytes, how: str) -> bool:
    return read_answers(answers, read_request(asks)[0].method, ended=how == "close").final is None


# Name of what is broken in the proxy, what takes its place, and a case of the corpus that tells.
BROKEN: dict[str, tuple[str, Any, str]] = {
    "any coding is chunked": ("proxy.relay.request.Request._length", lambda request: None, "TE gzip, chunked"),
    "chunk sizes as int() takes them": (
        "proxy.relay.framing._CHUNK_LINE",
        re.compile(rb"((?:0x)?[0-9a-f]+)[ \t]*(?:;.*)?"),
        "chunk size 0x4",
    ),
    "all trailers pass": ("proxy.relay.headers._NOT_TRAILERS", frozenset(), "trailers that frame"),
    "Connection may name anything": (
        "proxy.relay.headers._NOT_CONNECTION_OPTIONS",
        frozenset(),
        "Connection names Content-Length",
    ),
    "answers in a lenient form": ("proxy.relay.parsing.is_clean", lambda head: True, "one bare LF"),
    "cut answers end like whole ones": (
        "proxy.relay.connection.Connection.abort",
        lambda connection: connection.close(),
        "no last chunk",
    ),
}


@pytest.mark.skipif(str(framing.__file__).endswith(".so"), reason="compiled code can't be broken from outside")
@pytest.mark.parametrize(("place", "broken", "name"), BROKEN.values(), ids=BROKEN)
async def test_a_broken_proxy_is_found_out(
    place: str, broken: Callable[..., object], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cut in (False, True):
        async with bench() as made:
            await _check(made, name, cut=cut)
    monkeypatch.setattr(place, broken)
    async with bench() as made:
        with pytest.raises(AssertionError):
            await _check(made, name, cut=True)
        made.recorder.clear()


async def _check(made: Bench, name: str, *, cut: bool) -> None:
    for request in REQUESTS:
        if request.name == name:
            return await check_request(made, request, cut=cut)
    for answer in ANSWERS:
        if answer.name == name:
            return await check_answer(made, answer, cut=cut)
    raise KeyError(name)
