"""A model server without a model, for the demo and the tests: a scorer, an echo, an image reader and a token stream."""

from __future__ import annotations

import asyncio
import math

import orjson
from aiohttp import web

IRIS = ("setosa", "versicolor", "virginica")


def application() -> web.Application:
    """``POST /score``, ``POST /classify``, ``POST /echo``, ``GET|POST /stream?tokens=N&delay=SECONDS``, ``GET /health``."""
    app = web.Application(client_max_size=0)
    app.router.add_post("/score", _score)
    app.router.add_post("/classify", _classify)
    app.router.add_route("*", "/echo", _echo)
    app.router.add_route("*", "/stream", _stream)
    app.router.add_get("/health", _health)
    return app


async def start(host: str = "127.0.0.1", port: int = 0) -> tuple[web.AppRunner, str]:
    """Serves the application; its runner (to be cleaned up) and its URL."""
    runner = web.AppRunner(application(), access_log=None, shutdown_timeout=1.0, auto_decompress=False)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    bound = runner.addresses[0]
    return runner, f"http://{bound[0]}:{bound[1]}"


async def _score(request: web.Request) -> web.Response:
    """Rows of four numbers, as the iris examples have them: ``{"data": [[5.1, 3.5, 1.4, 0.2]]}``."""
    try:
        rows = orjson.loads(await request.read())["data"]
        names = [IRIS[min(2, int(math.fsum(row) // 6))] for row in rows]
    except (ValueError, KeyError, TypeError):
        return web.json_response({"error": 'send {"data": [[number, …], …]}'}, status=400)
    return web.json_response({"predictions": names})


async def _classify(request: web.Request) -> web.Response:
    """An image of any kind: how many bytes it has, and what its first bytes say that it is."""
    image = await request.read()
    kinds = {b"\x89PNG": "png", b"\xff\xd8\xff\xe0": "jpeg", b"GIF8": "gif"}
    return web.json_response({"label": kinds.get(image[:4], "unknown"), "bytes": len(image)})


async def _echo(request: web.Request) -> web.StreamResponse:
    """What was sent, as it was sent: status by ``?status=``, same content type and encoding."""
    headers = {name: request.headers[name] for name in ("Content-Type", "Content-Encoding") if name in request.headers}
    response = web.StreamResponse(status=int(request.query.get("status", "200")), headers=headers)
    if request.content_length is not None:
        response.content_length = request.content_length
    await response.prepare(request)
    async for piece in request.content.iter_any():
        await response.write(piece)
    await response.write_eof()
    return response


async def _stream(request: web.Request) -> web.StreamResponse:
    """Server-sent events, one token each."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    for number in range(int(request.query.get("tokens", "5"))):
        await response.write(b'data: {"token": "t%d"}\n\n' % number)
        await asyncio.sleep(float(request.query.get("delay", "0")))
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _health(_request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})
