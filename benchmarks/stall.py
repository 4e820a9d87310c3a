"""How long capture work keeps the event loop from its next turn: the proxy in this process, with a ticker beside it.

Usage: stall.py UPSTREAM_URL on|off STORAGE; sends large JSON bodies and prints the longest stall in ms.
"""

from __future__ import annotations

import asyncio
import sys
import time

import uvloop

from proxy.app import running
from proxy.config import load

SIZE = 4 * 1000 * 1000
REQUESTS = 30
TICK_SECONDS = 0.001


async def main(upstream: str, capture: bool, storage: str) -> None:
    settings = load(
        overrides={
            "proxy.upstream": upstream,
            "proxy.listen": "127.0.0.1:0",
            "storage.url": storage,
            "data_collector.collections": {name: {"enabled": capture} for name in ("request", "response")},
        },
        environ={},
    ).settings
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK_SECONDS)
            longest = max(longest, time.perf_counter() - before - TICK_SECONDS)

    async with running(settings) as app:
        # The client is another process: what it does must not count.
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CLIENT, app.address.rpartition(":")[2], str(SIZE), str(REQUESTS)
        )
        ticker = asyncio.create_task(tick())
        if await client.wait() != 0:
            raise SystemExit("the client failed")
        ticker.cancel()
    print(f"{longest * 1e3:.2f}")


CLIENT = """
import http.client, json, sys
rows = json.dumps({"data": [[5.1, 3.5, 1.4, 0.2]] * (int(sys.argv[2]) // 22)}).encode()
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
for _ in range(int(sys.argv[3])):
    connection.request("POST", "/echo", rows, {"Content-Type": "application/json"})
    assert connection.getresponse().read() == rows
"""

if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2] == "on", sys.argv[3]))
