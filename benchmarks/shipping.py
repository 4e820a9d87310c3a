"""What shipping costs: ``make bench-shipping``. Against the blob server of the tests, on another core; prints a table.

Run in the compiled copy of the project, with its folder in PYTHONPATH, it measures the compiled proxy.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import psutil
from measure import cpu_seconds, rss_bytes, warm_page_cache
from run import free_port, peak_rss_bytes, process

ROOT = Path(__file__).parents[1]
MIB = 1024 * 1024
REQUESTS_PER_SECOND = 1000
SECONDS = 20
BACKLOG_FILES, FILE_BYTES, LINE_BYTES = 8, 256 * MIB, 1024
BODY = orjson.dumps({"data": [[5.1, 3.5, 1.4, 0.2]] * 30, "pad": "x" * 70})  # its lines have about 1 KiB


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory(prefix="payload-logger-bench-") as name:
        folder = Path(name)
        warm_page_cache(folder)
        rows += idle(folder / "idle")
        rows += backlog(folder / "backlog")
        rows += sustained(folder)
    print("| figure | is | aim |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def idle(folder: Path) -> list[tuple[str, str, str]]:
    with blob_server() as blobs, proxy(folder, blobs) as (running, port):
        asyncio.run(send(port, 1, 1))
        until(lambda: stats(blobs)["requests"].get("append", 0) >= 2)
        return [("RSS when idle, Azure's SDK loaded (MiB)", f"{rss_bytes(running) / MIB:.0f}", "≤ 100")]


def backlog(folder: Path) -> list[tuple[str, str, str]]:
    with blob_server() as blobs:
        lines = write_backlog(folder / "spool", blobs)
        started = time.perf_counter()
        with proxy(folder, blobs) as (running, _port):
            ready = time.perf_counter() - started
            at_start = rss_bytes(running)
            until(lambda: not list((folder / "spool").rglob("*.jsonl")), 300)
            took = time.perf_counter() - started
            cpu = cpu_seconds(running)
            grown = peak_rss_bytes(running) - at_start
        assert stats(blobs)["bytes"] == lines * LINE_BYTES
    size = lines * LINE_BYTES / MIB
    return [
        (f"backlog of {size:.0f} MiB at start: ready after (s)", f"{ready:.2f}", "≤ 2"),
        ("  RSS + while it is shipped, Azure's SDK included (MiB)", f"{grown / MIB:.0f}", "≤ 32 and the SDK's 23"),
        ("  shipped, MiB/s", f"{size / took:.0f}", ""),
        ("  CPU per event of 1 KiB (µs)", f"{cpu / lines * 1e6:.1f}", "≤ 15"),
    ]


def sustained(folder: Path) -> list[tuple[str, str, str]]:
    """The same traffic into local files and into blobs, in turn; the difference is what shipping costs."""
    costs: dict[str, list[float]] = {"local": [], "blobs": []}
    pending: list[int] = []
    appends: list[float] = []
    for number in range(3):
        with blob_server() as blobs:
            for kind in costs:
                with proxy(folder / f"{kind}{number}", blobs if kind == "blobs" else None) as (running, port):
                    asyncio.run(send(port, 100, 100))
                    time.sleep(3)
                    before, count = cpu_seconds(running), appended(blobs)
                    asyncio.run(send(port, REQUESTS_PER_SECOND * SECONDS, REQUESTS_PER_SECOND))
                    if kind == "blobs":
                        held = sum(path.stat().st_size for path in (folder / f"{kind}{number}/spool").rglob("*.jsonl"))
                        pending.append(held - stats(blobs)["bytes"])
                        appends.append((appended(blobs) - count) / 2 / (SECONDS / 2))
                    time.sleep(3)
                    costs[kind].append((cpu_seconds(running) - before) / (2 * REQUESTS_PER_SECOND * SECONDS) * 1e6)
    more = sorted(there - here for here, there in zip(costs["local"], costs["blobs"], strict=True))
    rate = f"{2 * REQUESTS_PER_SECOND:,} events/s of 1 KiB for {SECONDS} s"
    return [
        (
            f"{rate}: not yet shipped at the end (MiB)",
            f"{max(pending) / MIB:.1f}",
            f"≤ {2 * 2 * 1.1:.1f}: one interval",
        ),
        ("  appends per file and interval", f"{max(appends):.2f}", "≤ 1"),
        ("  CPU of shipping per event (µs, median of 3)", f"{more[1]:.1f} ({more[0]:.1f}–{more[2]:.1f})", "≤ 15"),
    ]


@contextmanager
def blob_server() -> Iterator[int]:
    port = free_port()
    command = ["taskset", "-c", "1", sys.executable, "-m", "tests.azure.blob_server", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as server:
        until(lambda: stats(port) is not None)
        try:
            yield port
        finally:
            server.terminate()


@contextmanager
def proxy(folder: Path, blobs: int | None) -> Iterator[tuple[psutil.Process, int]]:
    folder.mkdir(parents=True, exist_ok=True)
    model, port = free_port(), free_port()
    storage = folder / "data" if blobs is None else f"http://127.0.0.1:{blobs}/devstoreaccount1/c/p"
    command = ["taskset", "-c", "0", sys.executable, "-m", "proxy", "run", "--upstream", f"127.0.0.1:{model}"]
    environment = os.environ | {
        "AZURE_STORAGE_CONNECTION_STRING": "UseDevelopmentStorage=true",
        "PAYLOAD_LOGGER_SPOOL_PATH": str(folder / "spool"),
    }
    with (
        process(
            ["taskset", "-c", "1", sys.executable, str(ROOT / "benchmarks/sink.py"), str(model)], environment, model
        ),
        process([*command, "--listen", f"127.0.0.1:{port}", "--storage", str(storage)], environment, port) as running,
    ):
        yield running, port


def write_backlog(spool: Path, blobs: int) -> int:
    """Files of a process that has ended; the number of their lines."""
    part = f"http/127.0.0.1:{blobs}/devstoreaccount1/c/p/local-endpoint/default/request/2026/11/21/07"
    (spool / part).mkdir(parents=True)
    line = orjson.dumps({"pad": "x" * (LINE_BYTES - 11)}) + b"\n"
    assert len(line) == LINE_BYTES
    for number in range(BACKLOG_FILES):
        with (spool / part / f"{number:032x}000001.jsonl").open("wb") as file:
            for _ in range(FILE_BYTES // MIB):
                file.write(line * (MIB // LINE_BYTES))
    return BACKLOG_FILES * FILE_BYTES // LINE_BYTES


async def send(port: int, requests: int, per_second: int) -> None:
    """At a steady rate, on a few connections."""
    message = b"POST /score HTTP/1.1\r\nHost: m\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(
        BODY
    )
    answer = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
    started, sent = time.perf_counter(), 0

    async def client() -> None:
        nonlocal sent
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while sent < requests:
            sent += 1
            await asyncio.sleep(max(0.0, started + sent / per_second - time.perf_counter()))
            writer.write(message + BODY)
            head = await reader.readuntil(b"\r\n\r\n")
            found = answer.search(head)
            assert found is not None
            await reader.readexactly(int(found[1]))
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client() for _ in range(min(16, requests))))


def stats(port: int) -> dict | None:
    done = subprocess.run(["curl", "-s", f"http://127.0.0.1:{port}/_stats"], capture_output=True)
    return orjson.loads(done.stdout) if done.returncode == 0 else None


def appended(port: int) -> int:
    return stats(port)["requests"].get("append", 0)


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("did not come true")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
