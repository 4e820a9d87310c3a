"""TLS clients that are not connections yet: each takes a place, for as long as a head may take."""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
from pathlib import Path

import pytest

from proxy.relay import handshakes
from proxy.relay.server import Patience
from tests.harness import model_server
from tests.relay.test_connections import server_context
from tests.relay.wire import GET, Script, bare_relay, connected, eventually, payload

pytestmark = pytest.mark.usefixtures("quick_sweep")
PATIENT = Patience(1000, 1000, 1000)


@pytest.mark.promise("G21b")
async def test_the_slowest_makes_way(certificate: tuple[Path, Path]) -> None:
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    async with (
        model_server(Script()) as model,
        bare_relay(model.url, patience=PATIENT, max_connections=2, client_tls=server_context(certificate)) as (
            relay,
            port,
        ),
        connected(port) as first,
        connected(port) as second,
    ):
        await eventually(lambda: len(relay.handshakes) == 2)
        slowest = relay.handshakes.oldest()
        assert slowest is not None
        slowest.waiting_since -= 10
        async with connected(port, tls=trust) as third:
            assert await first.rest() == b""
            for _ in range(2):
                assert payload(await third.ask(GET)) == b"ok"
                assert (len(relay.handshakes), len(relay.connections)) == (1, 1)
        second.writer.close()
        await eventually(lambda: not relay.connections and not relay.handshakes)
        async with connected(port, tls=trust) as fourth:
            assert payload(await fourth.ask(GET)) == b"ok"


@pytest.mark.promise("G21b")
async def test_there_are_never_more_than_twice_as_many(certificate: tuple[Path, Path]) -> None:
    async with (
        model_server(Script()) as model,
        bare_relay(model.url, patience=PATIENT, max_connections=1, client_tls=server_context(certificate)) as (
            relay,
            port,
        ),
        connected(port),
    ):
        await eventually(lambda: len(relay.handshakes) == 1)
        only = relay.handshakes.oldest()
        assert only is not None
        only.waiting_since += 1000  # so that it need not make way
        async with connected(port), connected(port) as third:
            assert await third.rest() == b""
            assert len(relay.handshakes) == 2


@pytest.mark.promise("G21b")
async def test_an_idle_client_that_does_not_say_goodbye_makes_way_at_once(certificate: tuple[Path, Path]) -> None:
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    async with (
        model_server(Script()) as model,
        bare_relay(model.url, patience=PATIENT, max_connections=1, client_tls=server_context(certificate)) as (
            relay,
            port,
        ),
        connected(port, tls=trust) as first,
    ):
        assert payload(await first.ask(GET)) == b"ok"
        first.writer.transport.pause_reading()  # type: ignore[attr-defined]
        (idle,) = relay.connections
        await eventually(lambda: not idle.stirred)
        idle.waiting_since -= 10
        async with connected(port, tls=trust) as second:
            assert payload(await second.ask(GET)) == b"ok"
            await eventually(lambda: idle.transport is None)
        first.writer.transport.abort()


@pytest.mark.promise("G21b")
@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", GET], ids=["nothing", "part", "no TLS"])
async def test_what_is_no_handshake_ends(sent: bytes, certificate: tuple[Path, Path]) -> None:
    async with (
        model_server(Script()) as model,
        bare_relay(model.url, patience=Patience(head_seconds=0.1), client_tls=server_context(certificate)) as (
            relay,
            port,
        ),
        connected(port) as client,
    ):
        client.write(sent)
        await client.rest()
        await eventually(lambda: not relay.handshakes.tasks)
        assert not relay.handshakes
        assert not relay.connections


@pytest.mark.promise("E18", "G21b")
async def test_a_stop_does_not_wait_for_one(certificate: tuple[Path, Path]) -> None:
    async with (
        model_server(Script()) as model,
        bare_relay(model.url, patience=PATIENT, client_tls=server_context(certificate)) as (relay, port),
        connected(port) as client,
    ):
        await eventually(lambda: len(relay.handshakes) == 1)
        assert await relay.drain(1000) == 0
        assert await client.rest() == b""


async def test_a_client_waits_while_there_are_no_more_files(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "ACCEPT_RETRY_SECONDS", 0.02)
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with (
        model_server(Script()) as model,
        bare_relay(model.url, patience=PATIENT, client_tls=server_context(certificate)) as (relay, port),
    ):
        with socket.create_connection(("127.0.0.1", port)) as client:
            resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno(), hard))
            try:
                await eventually(lambda: told)
                assert not relay.handshakes
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await eventually(lambda: len(relay.handshakes) == 1)
    assert told[0]["message"] == "socket.accept() out of system resource"
