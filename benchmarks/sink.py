"""``sink.py PORT``: a model server that takes bodies of any size whole before it answers. (nginx's ``return`` does not wait.)"""

from __future__ import annotations

import asyncio
import re
import sys

import uvloop

ANSWER = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{"taken": 1}'
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class Sink(asyncio.Protocol):
    """One connection, one request with a Content-Length after the other."""

    def __init__(self) -> None:
        self.head = b""
        self.left: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.left is None:
            self.head += data
            head, end, data = self.head.partition(b"\r\n\r\n")
            if not end:
                return
            found = LENGTH.search(head)
            assert found, head
            self.left, self.head = int(found[1]), b""
        self.left -= len(data)
        if self.left <= 0:
            self.left = None
            self.transport.write(ANSWER)  # type: ignore[attr-defined]


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
