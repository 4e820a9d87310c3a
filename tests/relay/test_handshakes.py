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
from proxy.settings import MIB
from tests.harness import model_server
from tests.relay.test_connections import server_context
from tests.relay.wire import GET, Script, bare_relay, connected, eventually, head, payload

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


@pytest.mark.promise("G21b", "C9")
async def test_a_client_that_still_receives_is_not_idle(certificate: tuple[Path, Path]) -> None:
    """Though the relay has sent the whole answer: it would be lost within the kernel."""
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    answer = head(b"HTTP/1.1 200 OK", b"Content-Length: %d" % MIB) + b"x" * MIB
    async with (
        model_server(Script(answer)) as model,
        bare_relay(model.url, patience=PATIENT, max_connections=1, client_tls=server_context(certificate)) as (
            relay,
            port,
        ),
        connected(port, tls=trust) as first,
    ):
        first.writer.transport.pause_reading()  # type: ignore[attr-defined]
        first.write(GET)
        await eventually(
            lambda: any(not one.busy and not one.stirred and one.unsent_bytes() for one in relay.connections)
        )
        (one,) = relay.connections
        one.waiting_since -= 10
        async with connected(port, tls=trust) as second:
            assert (await second.ask(GET)).startswith(b"HTTP/1.1 503 ")
        first.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert payload(await first.response()) == b"x" * MIB


@pytest.mark.promise("G21b", "E18")
@pytest.mark.parametrize("stops", [False, True])
async def test_nobody_waits_for_an_idle_client_to_say_goodbye(stops: bool, certificate: tuple[Path, Path]) -> None:
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    patience = Patience(keepalive_seconds=1000 if stops else 0.1)
    async with (
        model_server(Script()) as model,
        bare_relay(model.url, patience=patience, client_tls=server_context(certificate)) as (relay, port),
        connected(port, tls=trust) as client,
    ):
        assert payload(await client.ask(GET)) == b"ok"
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        if stops:
            assert await relay.drain(1000) == 0
        await eventually(lambda: not relay.connections)
        assert relay.defects == 0
        client.writer.transport.abort()


@pytest.mark.promise("G21b")
async def test_one_that_was_ended_when_it_was_done_is_no_connection(certificate: tuple[Path, Path]) -> None:
    """uvloop may read the last bytes of a handshake after it was ended."""
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    async with (
        model_server(Script()) as model,
        bare_relay(model.url, patience=PATIENT, client_tls=server_context(certificate)) as (relay, port),
    ):

        async def ask() -> bytes:
            async with connected(port, tls=trust) as client:
                client.write(GET)
                return await client.rest()

        asking = asyncio.create_task(ask())
        while (client := relay.handshakes.oldest()) is None:
            await asyncio.sleep(0)
        relay.handshakes.done(client)
        with pytest.raises(OSError):
            await asking
        assert not relay.connections
        assert not model.connections


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
