"""A client that asks and is gone at once, as a port scanner is."""

from __future__ import annotations

import socket

from tests.harness import model_server
from tests.relay.wire import Script, bare_relay, eventually


async def test_a_refused_client_that_is_gone_already_is_no_defect() -> None:
    async with model_server(Script()) as server, bare_relay(server.url) as (relay, port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            await eventually(lambda: relay.connections)
            client.sendall(b"no HTTP\r\n\r\n")
        await eventually(lambda: not relay.connections)
        assert relay.faults == {"invalid_request": 1}
        assert relay.defects == 0
