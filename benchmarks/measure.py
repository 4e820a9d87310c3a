"""One measurement of one running proxy: wrk for requests, sockets of our own for streams and very large bodies."""

from __future__ import annotations

import itertools
import json
import re
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

LOAD_CORE = "1"
_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 6e7}
_SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "{content_type}"
local file = io.open("{body}", "rb")
wrk.body = file:read("*a")
file:close()
"""
_CHANGING = """
local number = 0
request = function()
  number = number + 1
  wrk.headers["X-Trace"] = "trace-" .. number
  return wrk.format()
end
"""


@dataclass(frozen=True)
class Load:
    """What wrk saw, and what the proxy's processes spent on it."""

    requests: int
    requests_per_second: float
    p50_us: float
    p99_us: float
    cpu_us: float  # user and system time of the proxy per request
    failures: int


def body_file(folder: Path, size: int, *, json_body: bool) -> Path:
    """A body of exactly ``size`` bytes: a JSON object of rows of numbers, or binary."""
    path = folder / f"body-{size}"
    if json_body:
        rows = json.dumps({"data": [[5.1, 3.5, 1.4, 0.2]] * max(1, (size - 40) // 22)}, separators=(", ", ": "))
        padding = size - len(rows) - len(', "pad": ""')
        path.write_text(rows[:-1] + ', "pad": "' + "x" * padding + '"}')
    else:
        path.write_bytes(bytes(range(256)) * (size // 256))
    assert path.stat().st_size == size, (path.stat().st_size, size)
    return path


def warm_page_cache(folder: Path) -> None:
    """Makes the kernel hold as much memory as is going to be written: a virtual machine gets new memory from its host at a
    tenth of the speed (here 0.3 GB/s, and 4 GB/s the second time)."""
    path, piece = folder / "warm", bytes(2**20)
    with path.open("wb") as file:
        for _ in range(3 * 1024):
            file.write(piece)
    path.unlink()


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time so far, of the process and its children."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        times = one.cpu_times()
        total += times.user + times.system
    return total


def rss_bytes(process: psutil.Process) -> int:
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


def wrk(
    folder: Path,
    process: psutil.Process,
    url: str,
    body: Path,
    *,
    connections: int,
    seconds: float,
    content_type: str,
    changing: bool = False,
) -> Load:
    """Runs wrk for ``seconds`` after a short warm-up; ``changing`` gives each request a header of its own."""
    script = folder / "post.lua"
    script.write_text(_SCRIPT.format(content_type=content_type, body=body) + (_CHANGING if changing else ""))
    command = [
        "taskset",
        "-c",
        LOAD_CORE,
        "wrk",
        "-t1",
        f"-c{connections}",
        "-s",
        str(script),
        "--timeout",
        "20s",
        "--latency",
    ]
    subprocess.run([*command, "-d1s", url], check=True, capture_output=True)
    before = cpu_seconds(process)
    text = subprocess.run([*command, f"-d{seconds:g}s", url], check=True, capture_output=True, text=True).stdout
    spent = cpu_seconds(process) - before
    requests = int(_found(r"(\d+) requests in", text))
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    return Load(
        requests=requests,
        requests_per_second=float(_found(r"Requests/sec:\s+([\d.]+)", text)),
        p50_us=_time(_found(r"50%\s+([\d.]+[a-z]+)", text)),
        p99_us=_time(_found(r" 99%\s+([\d.]+[a-z]+)", text)),
        cpu_us=spent / max(1, requests) * 1e6,
        failures=sum(map(int, errors.groups() if errors else ())) + (int(bad[1]) if bad else 0),
    )


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"wrk printed something else than expected:\n{text}")
    return match[1]


def _time(text: str) -> float:
    number, unit = re.findall(r"([\d.]+)([a-z]+)", text)[0]
    return float(number) * _UNITS[unit]


def stream_delays_ms(port: int, events: int, interval_seconds: float) -> list[float]:
    """How much later than the interval each event of a server-sent stream came after the one before, in ms."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        query = f"tokens={events}&delay={interval_seconds}"
        sock.settimeout(10)
        sock.sendall(f"GET /stream?{query} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        arrivals: list[float] = []
        buffer = b""
        while b"[DONE]" not in buffer:
            data = sock.recv(65536)
            if not data:
                raise RuntimeError("the stream ended early")
            now = time.perf_counter()
            buffer = buffer[-16:] + data
            arrivals += [now] * data.count(b'"token"')
    return [(after - before - interval_seconds) * 1e3 for before, after in itertools.pairwise(arrivals)]


def upload(port: int, size: int) -> float:
    """Seconds for one POST of ``size`` bytes."""
    piece = bytes(2**20)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        began = time.perf_counter()
        sock.sendall(
            b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n"
            % size
        )
        for _ in range(size // len(piece)):
            sock.sendall(piece)
        sock.settimeout(60)
        answer = sock.recv(65536)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"unexpected answer: {answer[:100]!r}")
        return time.perf_counter() - began
