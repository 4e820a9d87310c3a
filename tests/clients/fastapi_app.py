"""A model server on FastAPI. Runs in the environment of the clients; tests/clients/programs.py starts it."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from pydantic import BaseModel


class Rows(BaseModel):
    data: list[list[float]]


class Gate:
    """Lets ``count`` through when that many have come."""

    def __init__(self) -> None:
        self._waiting = 0
        self._open = asyncio.Event()

    async def pass_with(self, count: int) -> None:
        self._waiting += 1
        opened = self._open
        if self._waiting == count:
            self._waiting, self._open = 0, asyncio.Event()
            opened.set()
        await opened.wait()


app = FastAPI()
handled: Counter[str] = Counter()
gates: defaultdict[str, Gate] = defaultdict(Gate)
seen: asyncio.Queue[None] = asyncio.Queue()


@app.post("/score")
async def score(rows: Rows, request: Request, together: int = 1, group: str = "") -> dict[str, object]:
    """The sums of the rows, when ``together`` requests have come: until then each has a connection of its own."""
    handled[request.headers["x-request-id"]] += 1
    await gates[group].pass_with(together)
    assert request.client is not None
    return {"sums": [sum(row) for row in rows.data], "port": request.client.port}


@app.get("/handled")
async def counts() -> dict[str, int]:
    return handled


@app.post("/stream")
async def stream(tokens: list[str]) -> StreamingResponse:
    """Token by token, each but the first when somebody has said that the one before was seen."""

    async def body() -> AsyncIterator[str]:
        for token in tokens:
            yield token
            await seen.get()

    return StreamingResponse(body(), media_type="text/plain")


@app.post("/tokens")
async def tokens(rows: Rows) -> StreamingResponse:
    """The sums of the rows, one after the other, as a model takes its time."""

    async def body() -> AsyncIterator[str]:
        for row in rows.data:
            yield f"{sum(row)}\n"
            await asyncio.sleep(0.02)

    return StreamingResponse(body(), media_type="text/plain")


@app.post("/seen")
async def was_seen() -> None:
    seen.put_nowait(None)


@app.websocket("/chat")
async def chat(socket: WebSocket) -> None:
    """Says what it is told; ``close CODE REASON`` has it close."""
    await socket.accept(subprotocol="chat.v2" if "chat.v2" in socket.scope["subprotocols"] else None)
    while (message := await socket.receive())["type"] == "websocket.receive":
        if (text := message.get("text")) is None:
            await socket.send_bytes(message["bytes"])
        elif text.startswith("close "):
            _, code, reason = text.split(" ", 2)
            await socket.close(int(code), reason)
            return
        else:
            await socket.send_text(text)


@app.websocket("/private")
async def private(socket: WebSocket) -> None:
    await socket.close()  # before it is accepted: 403
