"""What follows a change of protocols (RFC 9110 §7.8): bytes both ways as they come, each direction ended for itself."""

from __future__ import annotations

import asyncio

from proxy.relay.connection import Connection


async def tunnel(loop: asyncio.AbstractEventLoop, client: Connection, upstream: Connection) -> None:
    """Returns when both directions have ended. Raises what either connection was failed with."""
    client.peer, upstream.peer = upstream, client
    upward = loop.create_task(_pass(client, upstream), name="tunnel")
    try:
        await _pass(upstream, client)
        await upward
    finally:
        upward.cancel()
        client.peer = upstream.peer = None


async def _pass(source: Connection, sink: Connection) -> None:
    data = await source.receive()
    while data:
        sink.write(data)
        await sink.drain()
        data = await source.receive()
    if source.broken:
        sink.abort()
    elif source.lost:  # both of its directions
        sink.close()
    else:
        sink.write_eof()
