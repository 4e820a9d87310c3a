"""How long clients are waited for, how many there may be, and what each refusal is counted as."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path

import pytest

from proxy.relay import server
from proxy.relay.server import Patience, Relay
from proxy.settings import MIB
from tests.harness import model_server
from tests.relay.test_turns import CountingTransport
from tests.relay.wire import (
    GET,
    OK,
    POST,
    Script,
    bare_relay,
    connected,
    eventually,
    head,
    payload,
    read_message,
    relayed,
    reset,
    slow_reader,
)

pytestmark = pytest.mark.usefixtures("quick_sweep")
HEAD = 0.2
PATIENT = Patience(1000, 1000, 1000)


def code(message: bytes) -> int:
    return int(message.split(b" ", 2)[1])


# --- heads ---


@pytest.mark.promise("G21b")
@pytest.mark.parametrize("first", [b"", GET], ids=["at first", "behind another"])
@pytest.mark.parametrize("part", [b"G", GET[:-2], b"\r\n", b"POST /a HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 10_000])
async def test_a_head_that_does_not_arrive(first: bytes, part: bytes, tmp_path: Path) -> None:
    script = Script()
    async with relayed(script, tmp_path, proxy__head_timeout=HEAD) as p, connected(p.port) as client:
        if first:
            assert payload(await client.ask(first)) == b"ok"
        client.write(part)
        answer = await client.response()
        assert code(answer) == 408
        assert json.loads(payload(answer))["error"]["message"] == (
            "the request's head did not arrive within 0.2 s (proxy.head_timeout)"
        )
        assert await client.rest() == b""
        assert p.app.relay.faults == {"head_timeout": 1}
        await eventually(lambda: not p.app.relay.connections)
    assert len(script.received) == bool(first)


@pytest.mark.promise("G21b")
@pytest.mark.parametrize(("first", "drop"), [(GET[:-4] + b"\r\nX: ", b"x"), (b"", b"\r\n"), (b"", b"\r\n\r\n")])
async def test_drops_do_not_prolong_the_wait_for_a_head(tmp_path: Path, first: bytes, drop: bytes) -> None:
    async with relayed(Script(), tmp_path, proxy__head_timeout=HEAD) as p, connected(p.port) as client:

        async def drip() -> None:
            client.write(first)
            while True:
                client.write(drop)
                await asyncio.sleep(0.03)

        dripping = asyncio.create_task(drip())
        assert code(await client.response()) == 408
        dripping.cancel()


async def test_a_head_that_comes_in_parts_is_waited_for_from_its_own_first_byte_on() -> None:
    """However long the connection was idle before, and however many came so."""
    async with (
        model_server(Script()) as model,
        bare_relay(model.url, patience=Patience(head_seconds=0.5)) as (relay, port),
        connected(port) as client,
    ):
        (one,) = relay.connections
        for _ in range(4):
            one.waiting_since -= 100  # as if it had been idle
            client.write(GET[:10])
            await eventually(lambda: one.partial_since)
            assert asyncio.get_running_loop().time() - one.partial_since < 0.5
            client.write(GET[10:])
            assert payload(await client.response()) == b"ok"
            assert not one.partial_since
        assert not relay.faults


async def test_a_connection_that_says_nothing_is_closed_without_a_word(tmp_path: Path) -> None:
    async with relayed(Script(), tmp_path, proxy__head_timeout=HEAD) as p, connected(p.port) as client:
        assert await client.rest() == b""
        assert not p.app.relay.faults


async def test_one_that_has_asked_is_kept_for_longer(tmp_path: Path) -> None:
    async with relayed(Script(), tmp_path, proxy__head_timeout=0.05) as p, connected(p.port) as client:
        assert payload(await client.ask(GET)) == b"ok"
        async with connected(p.port) as other:
            assert await other.rest() == b""  # by now that time is over
        assert payload(await client.ask(GET)) == b"ok"


@pytest.mark.promise("G21")
@pytest.mark.parametrize(
    ("first", "words"),
    [
        (b"\x16\x03\x01\x02\x00\x01", "TLS is not spoken here"),
        (b"\x00", "this is not HTTP"),
        (b"\x05\x01\x00", "this is not HTTP"),
    ],
)
async def test_what_is_no_http_is_told_at_once(first: bytes, words: str, tmp_path: Path) -> None:
    async with relayed(Script(), tmp_path) as p, connected(p.port) as client:
        client.write(first)
        answer = await client.response()
        assert (code(answer), json.loads(payload(answer))["error"]["message"]) == (400, words)
        assert p.app.relay.faults == {"invalid_request": 1}


async def test_a_tls_client_of_a_plain_port_fails_at_once(tmp_path: Path) -> None:
    async with relayed(Script(), tmp_path) as p:
        with pytest.raises(ssl.SSLError):
            await asyncio.open_connection("127.0.0.1", p.port, ssl=ssl.create_default_context(), server_hostname="h")


async def test_a_model_server_that_speaks_tls_is_told(tmp_path: Path) -> None:
    async with relayed(Script(b"\x15\x03\x01\x00\x02\x02\x46"), tmp_path) as p, connected(p.port) as client:
        answer = await client.ask(GET)
    assert (code(answer), json.loads(payload(answer))["error"]["message"]) == (
        502,
        "the model server does not answer in HTTP",
    )


# --- bodies ---


@pytest.mark.promise("G21b")
@pytest.mark.parametrize(
    "part",
    [
        POST[:-4],
        POST[:-1],
        head(b"POST /a HTTP/1.1", b"Host: h", b"Transfer-Encoding: chunked") + b"5\r\nhel",
        head(b"POST /a HTTP/1.1", b"Host: h", b"Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n",
    ],
)
async def test_a_body_that_does_not_arrive(part: bytes, tmp_path: Path) -> None:
    """The model server's part is aborted; the exchange is recorded."""
    aborted = asyncio.get_running_loop().create_future()

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(-1)
        except ConnectionResetError:
            aborted.set_result(None)

    async with relayed(model, tmp_path, proxy__client_idle_timeout=0.1) as p, connected(p.port) as client:
        client.write(part)
        answer = await client.response()
        assert (code(answer), json.loads(payload(answer))["error"]["message"]) == (
            408,
            "nothing came of the request's body for 0.1 s (proxy.client_idle_timeout)",
        )
        await aborted
        assert p.app.relay.faults == {"body_timeout": 1}
        await p.recorded(1)
        (line,) = p.lines("response")
        assert (line["statuscode"], line["capturestatus"]) == (408, "requestrefused")


@pytest.mark.promise("D13a")
async def test_a_body_that_comes_slowly_is_waited_for(tmp_path: Path) -> None:
    script = Script()
    async with relayed(script, tmp_path, proxy__client_idle_timeout=0.5) as p, connected(p.port) as client:
        client.write(head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: 100"))
        (one,) = p.app.relay.connections
        for _ in range(100):
            one.waiting_since -= 0.4
            client.write(b"x")
            await eventually(lambda: asyncio.get_running_loop().time() - one.waiting_since < 0.1)
        assert payload(await client.response()) == b"ok"
        assert payload(script.received[0]) == b"x" * 100


@pytest.mark.promise("D13a")
async def test_while_the_model_server_is_at_work_nobody_waits_for_the_client(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        await go_on.wait()
        writer.write(OK)

    async with relayed(model, tmp_path, proxy__client_idle_timeout=0.02) as p, connected(p.port) as client:
        client.write(POST)
        async with connected(p.port) as other:  # who is waited for
            other.write(POST[:-1])
            assert code(await other.response()) == 408
        go_on.set()
        assert payload(await client.response()) == b"ok"


async def test_a_body_that_the_model_server_does_not_take_is_not_the_clients_silence(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await read_message(reader)
        writer.write(OK)

    size = 64 * MIB  # more than the kernel takes
    async with relayed(model, tmp_path) as p, connected(p.port) as client:
        client.write(head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: %d" % size) + b"x" * size)
        (one,) = p.app.relay.connections
        await eventually(lambda: one._reading_paused and not one.awaited)
        p.app.relay.patience = Patience(idle_seconds=0.02)
        async with connected(p.port) as other:  # who is waited for
            other.write(POST[:-1])
            assert code(await other.response()) == 408
        p.app.relay.patience = PATIENT
        go_on.set()
        assert payload(await client.response()) == b"ok"


async def test_zero_is_no_limit(tmp_path: Path) -> None:
    async with (
        relayed(Script(), tmp_path, proxy__client_idle_timeout=0) as p,
        connected(p.port) as client,
    ):
        client.write(POST[:-1])
        (one,) = p.app.relay.connections
        await eventually(lambda: not one.stirred)
        one.waiting_since -= 1_000_000
        one.look(asyncio.get_running_loop().time())
        client.write(POST[-1:])
        assert payload(await client.response()) == b"ok"


@pytest.mark.promise("D12a", "G21b")
async def test_a_client_that_waits_for_a_100_is_not_waited_for(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        if b"Expect" in request:
            await go_on.wait()
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await reader.readexactly(4)
        writer.write(OK)

    post = head(b"POST /a HTTP/1.1", b"Host: h", b"Content-Length: 4", b"Expect: 100-continue")
    async with relayed(model, tmp_path, proxy__client_idle_timeout=0.1) as p, connected(p.port) as client:
        client.write(post)
        await others_time(p.port)
        go_on.set()
        assert code(await client.response(bodyless=True)) == 100
        client.write(POST[-4:])
        assert payload(await client.response()) == b"ok"
        client.write(post)
        assert code(await client.response(bodyless=True)) == 100  # and from now on, it is
        assert code(await client.response()) == 408


async def test_a_client_that_has_begun_its_body_is_waited_for_again(tmp_path: Path) -> None:
    """A part of a chunk's size is a beginning, too."""
    post = head(b"POST /a HTTP/1.1", b"Host: h", b"Transfer-Encoding: chunked", b"Expect: 100-continue")
    async with relayed(Script(), tmp_path, proxy__client_idle_timeout=0.1) as p, connected(p.port) as client:
        client.write(post + b"5")
        assert code(await client.response()) == 408


async def others_time(port: int) -> None:
    """Until the time is over for a client whose body does not come."""
    async with connected(port) as other:
        other.write(POST[:-1])
        assert code(await other.response()) == 408


@pytest.mark.promise("D13a", "E15")
async def test_a_client_that_takes_its_time_is_not_the_model_servers_silence() -> None:
    silent = 0.1
    patience = Patience(idle_seconds=0)
    script = Script()
    async with (
        model_server(script) as model,
        bare_relay(model.url, patience=patience, idle_timeout_seconds=silent) as (relay, port),
        connected(port) as client,
    ):
        client.write(POST[:-1])
        await eventually(lambda: relay.pool.open_connections)
        (upstream,) = relay.pool._quiet_since
        await eventually(lambda: not upstream.stirred)
        relay.pool._quiet_since[upstream] -= 1000
        relay.pool.sweep()
        assert not upstream.lost
        client.write(POST[-1:])
        assert payload(await client.response()) == b"ok"


# --- answers that nobody takes ---


@pytest.mark.promise("D13", "G21b")
@pytest.mark.parametrize("framing", [b"Content-Length: %d" % (64 * MIB), b"Transfer-Encoding: chunked"])
async def test_a_client_that_takes_nothing_of_its_answer(framing: bytes, tmp_path: Path) -> None:
    aborted = asyncio.get_running_loop().create_future()

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(head(b"HTTP/1.1 200 OK", framing))
        try:
            while True:
                writer.write(b"%x\r\n%b\r\n" % (MIB, b"x" * MIB))
                await writer.drain()
        except ConnectionError:
            aborted.set_result(None)

    async with relayed(model, tmp_path, proxy__client_idle_timeout=0.2) as p, connected(p.port) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.write(GET)
        await aborted
        assert p.app.relay.faults == {"client_idle": 1}
        await p.recorded(1)
        (line,) = p.lines("response")
        assert (line["statuscode"], line["capturestatus"]) == (499, "clientleft")


@pytest.mark.promise("D13a")
async def test_a_client_that_takes_its_answer_slowly_is_waited_for() -> None:
    size = 16 * MIB
    answer = head(b"HTTP/1.1 200 OK", b"Content-Length: %d" % size) + b"x" * size
    async with (
        model_server(Script(answer)) as model,
        bare_relay(model.url, patience=Patience(idle_seconds=0.5)) as (relay, port),
        connected(port) as client,
    ):
        client.write(GET)
        (one,) = relay.connections
        left = len(answer) + len(b"x-request-id: ") + 36 + 2
        while left:
            one.waiting_since -= 0.2  # as if each piece took its time
            left -= len(await client.reader.readexactly(min(left, MIB)))
        assert not relay.faults


@pytest.mark.promise("D13a")
async def test_what_the_kernel_holds_back_does_not_hide_that_a_client_takes_its_answer() -> None:
    """Its buffer takes more only when a good part of it is free; a slow client needs minutes for that."""
    size = 16 * MIB
    answer = head(b"HTTP/1.1 200 OK", b"Content-Length: %d" % size) + b"x" * size
    async with (
        model_server(Script(answer)) as model,
        bare_relay(model.url, patience=Patience(idle_seconds=1e9)) as (relay, port),
    ):
        loop = asyncio.get_running_loop()
        async with slow_reader(port, GET) as client:
            await eventually(lambda: any(one._writing_paused for one in relay.connections))
            (one,) = relay.connections
            assert one.transport is not None
            unsent = 0
            while unsent != one.transport.get_write_buffer_size() + one._queued_bytes():
                unsent = one.transport.get_write_buffer_size() + one._queued_bytes()
                await others_turn(relay)
            buffered = one.transport.get_write_buffer_size()
            for _ in range(4):
                one.waiting_since = 0
                for _ in range(8):
                    await loop.sock_recv(client, 16 * 1024)
                await eventually(lambda: one.waiting_since)
            assert one.transport.get_write_buffer_size() == buffered
            one.waiting_since = 0
            for _ in range(3):
                await others_turn(relay)
            assert not one.waiting_since


async def others_turn(relay: Relay) -> None:
    """A sweep of the clients has been made."""
    now = asyncio.get_running_loop().time()
    for one in list(relay.connections):
        one.look(now)
    await asyncio.sleep(0.01)


async def test_what_is_left_unread_of_a_last_answer_ends_too(tmp_path: Path) -> None:
    """The exchange is over by then, but for bytes that the client does not take."""
    size = 8 * MIB
    answer = head(b"HTTP/1.1 200 OK", b"Content-Length: %d" % size) + b"x" * size
    async with relayed(Script(answer), tmp_path, proxy__client_idle_timeout=0.2) as p, connected(p.port) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.write(GET)
        await eventually(lambda: p.app.relay.faults["client_idle"])
        await eventually(lambda: not p.app.relay.connections)


# --- many connections ---


@pytest.mark.promise("G21b")
async def test_one_more_takes_the_place_of_the_idlest() -> None:
    async with (
        model_server(Script()) as model,
        bare_relay(model.url, patience=PATIENT, max_connections=3) as (relay, port),
        connected(port) as first,
        connected(port) as second,
        connected(port) as third,
    ):
        for client in (second, first, third):
            assert payload(await client.ask(GET)) == b"ok"
        for one, seconds in zip(
            sorted(relay.connections, key=lambda one: one.waiting_since), (10, 30, 20), strict=True
        ):
            await eventually(lambda one=one: not one.stirred)  # type: ignore[misc]
            one.waiting_since -= seconds
        (idlest,) = [
            one for one in relay.connections if one.waiting_since == min(o.waiting_since for o in relay.connections)
        ]
        async with connected(port) as fourth:
            assert payload(await fourth.ask(GET)) == b"ok"
            assert idlest not in relay.connections
            assert len(relay.connections) == 3
            assert not relay.faults
        ended = [client for client in (first, second, third) if client.reader.at_eof() or not await still_there(client)]
        assert len(ended) == 1


async def still_there(client: object) -> bool:
    try:
        return payload(await client.ask(GET)) == b"ok"  # type: ignore[attr-defined]
    except (asyncio.IncompleteReadError, ConnectionError):
        return False


@pytest.mark.promise("G21b")
async def test_one_that_has_not_taken_its_answer_does_not_make_way_unseen() -> None:
    """Nobody would look after it any more; client_idle_timeout does."""
    async with (
        model_server(Script()) as model,
        bare_relay(model.url, patience=PATIENT, max_connections=1) as (relay, port),
        connected(port) as first,
    ):
        assert payload(await first.ask(GET)) == b"ok"
        (one,) = relay.connections
        await eventually(lambda: not one.stirred)
        one.waiting_since -= 10
        real = one.transport
        assert real is not None
        one.transport = Unsent(real)
        async with connected(port) as second:
            assert code(await second.ask(GET)) == 503
            assert one in relay.connections
        one.transport = real
        assert payload(await first.ask(GET)) == b"ok"


class Unsent(CountingTransport):
    """Some of what was written has not left."""

    def get_write_buffer_size(self) -> int:
        return 14_000


@pytest.mark.promise("G21b")
async def test_while_none_is_idle_one_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = asyncio.Event()

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_message(reader)
            await go_on.wait()
            writer.write(OK)

    async with (
        model_server(model) as served,
        bare_relay(served.url, patience=PATIENT, max_connections=2) as (relay, port),
        connected(port) as first,
        connected(port) as second,
    ):
        for client in (first, second):
            client.write(GET)
        await eventually(lambda: sum(one.busy for one in relay.connections) == 2)
        async with connected(port) as third:
            answer = await third.ask(POST)
            assert (code(answer), json.loads(payload(answer))["error"]["message"]) == (
                503,
                "there are too many connections; proxy.max_connections allows no more",
            )
            assert await third.rest() == b""
        assert relay.faults == {"connections": 1}
        monkeypatch.setattr(server, "LINGER_SECONDS", 1000.0)
        async with connected(port) as third, connected(port) as fourth:
            for client in (third, fourth):
                assert code(await client.ask(POST)) == 503
            async with connected(port) as fifth:  # there are as many refused ones as others
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await fifth.ask(POST)
        go_on.set()
        for client in (first, second):
            assert payload(await client.response()) == b"ok"
        await eventually(lambda: len(relay.connections) == 2)


@pytest.mark.promise("G21b")
async def test_five_hundred_that_dribble_heads_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SWEEP_SECONDS", 0.02)
    async with (
        model_server(Script()) as model,
        bare_relay(model.url, patience=PATIENT, max_connections=100) as (relay, port),
    ):
        attackers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        for _, writer in attackers:
            writer.write(GET[:-2])
        await eventually(lambda: sum(bool(one.partial_since) for one in relay.connections) == 100)
        for one in relay.connections:
            one.partial_since -= 1
        for _ in range(50):
            async with connected(port) as client:
                assert payload(await client.ask(GET)) == b"ok"
        for _, writer in attackers:
            reset(writer)
        await eventually(lambda: not relay.connections)


@pytest.mark.promise("G21b")
async def test_thousands_of_idle_connections_cost_little_and_serve_on() -> None:
    async with (
        model_server(Script()) as model,
        bare_relay(model.url, patience=PATIENT) as (relay, port),
    ):
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2000)]
        async with connected(port) as client:
            for _ in range(100):
                assert payload(await client.ask(GET)) == b"ok"
            assert len(relay.connections) == 2001
        for _, writer in idle:
            reset(writer)
        await eventually(lambda: not relay.connections)
