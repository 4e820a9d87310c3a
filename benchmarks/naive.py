"""The baseline: the proxy that one writes in an afternoon with aiohttp's ClientSession. Records nothing.

Usage: naive.py PORT UPSTREAM_URL
"""

import sys

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host", "content-length"}


async def session(app: web.Application):
    app["session"] = ClientSession(
        timeout=ClientTimeout(total=None), connector=TCPConnector(limit=0), auto_decompress=False
    )
    yield
    await app["session"].close()


async def relay(request: web.Request) -> web.StreamResponse:
    headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
    url = sys.argv[2] + request.raw_path
    body = request.content if request.can_read_body else None
    async with request.app["session"].request(request.method, url, headers=headers, data=body) as answer:
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
        response = web.StreamResponse(status=answer.status, headers=kept)
        response.content_length = answer.content_length
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            await response.write(piece)
        await response.write_eof()
        return response


if __name__ == "__main__":
    application = web.Application(client_max_size=0)
    application.cleanup_ctx.append(session)
    application.router.add_route("*", "/{tail:.*}", relay)
    web.run_app(application, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
