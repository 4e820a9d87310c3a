"""``make bench``: the proxy beside its peers, before the same upstream, under the same load.

Every proxy is pinned to core 0; the upstream (nginx) and the load (wrk) to core 1. Rounds are interleaved: each round
measures every proxy once, so that what the machine does otherwise falls on all of them. What counts are ratios within
one run. Prints a Markdown table; writes it and all the figures as JSON into --output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import measure
import peers
import psutil
from peers import CADDY, COMPILED, ENVOY, ENVOY_TAP, MITMDUMP, OURS, OURS_OFF, OURS_PURE, PEERS, Peer

PROXY_CORE = "0"
SMALL, MEDIUM, LARGE, HUGE = 714, 64 * 1024, 10 * 2**20, 2**30
Figures = dict[str, dict[str, list[float]]]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=4)
    options.add_argument("--only", default="", help="part of the names of the peers to measure, comma separated")
    options.add_argument("--parts", default="small,bodies,streams,extremes", help="what to measure, comma separated")
    options.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    chosen = options.parse_args()
    for tool in ("wrk", "nginx", "taskset"):
        if peers.find(tool) is None:
            print(f"make bench needs {tool} (Debian: apt-get install wrk nginx-light util-linux)", file=sys.stderr)
            return 2
    wanted = [part.strip().lower() for part in chosen.only.split(",") if part.strip()]
    available = [peer for peer in PEERS if not wanted or any(part in peer.name.lower() for part in wanted)]
    missing = [peer for peer in available if peer.program and peers.find(peer.program) is None]
    available = [peer for peer in available if peer not in missing]
    os.environ |= {"PYTHONPATH": str(COMPILED), "PYTHONSAFEPATH": "1"}  # else the folder we are in comes first
    with tempfile.TemporaryDirectory(prefix="payload-logger-bench-") as name, upstream(Path(name)) as port:
        bench = Bench(Path(name), port, chosen.seconds)
        parts = chosen.parts.split(",")
        for number in range(chosen.rounds if "small" in parts else 0):
            for peer in available:
                print(f"round {number + 1}/{chosen.rounds}: {peer.name}", file=sys.stderr, flush=True)
                bench.small(peer)
        for number in range(chosen.rounds if "bodies" in parts else 0):
            for peer in available:
                if peer.name not in (MITMDUMP, OURS_PURE):
                    print(f"large bodies {number + 1}/{chosen.rounds}: {peer.name}", file=sys.stderr, flush=True)
                    bench.bodies(peer)
        if "streams" in parts:
            bench.streams([peer for peer in available if peer.name in (OURS, ENVOY, ENVOY_TAP, CADDY)])
        if "extremes" in parts:
            bench.extremes([peer for peer in available if peer.name == OURS])
    report = render(bench.figures, [peer.name for peer in missing], available, chosen.rounds)
    print(report)
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "bench.md").write_text(report)
    (chosen.output / "bench.json").write_text(json.dumps({"machine": machine(), "figures": bench.figures}, indent=1))
    return 0


@contextlib.contextmanager
def upstream(folder: Path) -> Iterator[int]:
    """nginx as the model server: it takes any body and answers with 219 bytes (or 64 KiB for /medium) of JSON."""
    own = folder / "upstream"
    (own / "www").mkdir(parents=True)
    answer = json.dumps({"predictions": [[0.123456789, 0.987654321, 0.5]] * 4, "model": "iris", "pad": "x" * 64})
    shutil.copy(measure.body_file(folder, MEDIUM, json_body=True), own / "www" / "medium")
    port = free_port()
    command = peers.nginx_config(
        own,
        f" access_log off; default_type application/json; client_body_buffer_size 128k;\n"
        f" server {{ listen 127.0.0.1:{port} backlog=1024; root {own}/www; error_page 405 =200 $uri;\n"
        f"  location / {{ return 200 '{answer}'; }}\n"
        "  location = /medium { try_files /medium =404; } }",
    )
    with process(["taskset", "-c", measure.LOAD_CORE, *command], {}, port):
        yield port


class Bench:
    """Measures, and keeps every figure: {measurement: {peer: [one for each round]}}."""

    def __init__(self, folder: Path, upstream_port: int, seconds: float) -> None:
        self.figures: Figures = {}
        self._folder = folder
        self._upstream_port = upstream_port
        self._seconds = seconds
        self._count = 0

    def small(self, peer: Peer) -> None:
        body = measure.body_file(self._folder, SMALL, json_body=True)
        with self._running(peer) as (running, url, folder):
            self._add("RSS idle (MiB)", peer, measure.rss_bytes(running) / 2**20)
            for connections in (32, 1):
                load = measure.wrk(
                    folder,
                    running,
                    url + "/score",
                    body,
                    connections=connections,
                    seconds=self._seconds,
                    content_type="application/json",
                )
                if load.failures:
                    self._add(f"failures at {connections}", peer, load.failures)
                if connections > 1:
                    self._add("requests/s at 32", peer, load.requests_per_second)
                    self._add("CPU µs/request at 32", peer, load.cpu_us)
                self._add(f"p50 µs at {connections}", peer, load.p50_us)
                self._add(f"p99 µs at {connections}", peer, load.p99_us)
            if peer.name in (OURS, OURS_OFF, ENVOY):
                load = measure.wrk(
                    folder,
                    running,
                    url + "/score",
                    body,
                    connections=32,
                    seconds=self._seconds,
                    content_type="application/json",
                    changing=True,
                )
                self._add("CPU µs/request at 32, no two heads alike", peer, load.cpu_us)
            self._add("RSS after load (MiB)", peer, measure.rss_bytes(running) / 2**20)

    def bodies(self, peer: Peer) -> None:
        seconds = max(2.0, self._seconds / 2)
        with self._running(peer) as (running, url, folder):
            body = measure.body_file(self._folder, MEDIUM, json_body=True)
            load = measure.wrk(
                folder, running, url + "/medium", body, connections=8, seconds=seconds, content_type="application/json"
            )
            self._add("64 KiB JSON both ways, requests/s", peer, load.requests_per_second)
            self._add("64 KiB JSON both ways, CPU µs/request", peer, load.cpu_us)
        body = measure.body_file(self._folder, LARGE, json_body=False)
        if peer.records:
            measure.warm_page_cache(self._folder)
        with sink() as port, self._running(peer, port) as (running, url, folder):
            load = measure.wrk(
                folder,
                running,
                url + "/score",
                body,
                connections=2,
                seconds=seconds,
                content_type="application/octet-stream",
            )
            self._add("10 MiB upload, MiB/s", peer, load.requests_per_second * LARGE / 2**20)

    def streams(self, chosen: list[Peer]) -> None:
        port = free_port()
        model = ["taskset", "-c", measure.LOAD_CORE, sys.executable, "-c", MODEL, str(port)]
        with process(model, {}, port):
            print("streams: without a proxy", file=sys.stderr, flush=True)
            direct = p99(measure.stream_delays_ms(port, 500, 0.02))
            for peer in chosen:
                print(f"streams: {peer.name}", file=sys.stderr, flush=True)
                with self._running(peer, port) as (_, url, _folder):
                    delays = measure.stream_delays_ms(int(url.rpartition(":")[2]), 500, 0.02)
                    self._add("SSE, added delay p99 (ms)", peer, p99(delays) - direct)
            for peer in chosen:
                if peer.name == OURS:
                    script = [sys.executable, str(Path(__file__).parent / "stall.py"), f"http://127.0.0.1:{port}"]
                    for capture in ("on", "off"):
                        stall = subprocess.run(
                            [*script, capture, str(self._folder / f"stall-{capture}")],
                            check=True,
                            capture_output=True,
                            text=True,
                        )
                        self._add(
                            f"longest loop stall, 4 MB JSON both ways, recording {capture} (ms)",
                            peer,
                            float(stall.stdout),
                        )

    def extremes(self, chosen: list[Peer]) -> None:
        for peer in chosen:
            print(f"1 GiB and start: {peer.name}", file=sys.stderr, flush=True)
            for _ in range(3):
                began = time.perf_counter()
                with self._running(peer) as (_, url, _folder):
                    post(url + "/score")
                    self._add("start to first answer (s)", peer, time.perf_counter() - began)
            with sink() as port, self._running(peer, port) as (running, url, _folder):
                post(url + "/score")
                before = measure.rss_bytes(running)
                seconds = measure.upload(int(url.rpartition(":")[2]), HUGE)
                self._add("1 GiB upload, MiB/s", peer, HUGE / 2**20 / seconds)
                self._add("1 GiB upload, peak RSS growth (MiB)", peer, (peak_rss_bytes(running) - before) / 2**20)

    def _add(self, measurement: str, peer: Peer, value: float) -> None:
        self.figures.setdefault(measurement, {}).setdefault(peer.name, []).append(round(value, 3))

    @contextlib.contextmanager
    def _running(self, peer: Peer, upstream_port: int | None = None) -> Iterator[tuple[psutil.Process, str, Path]]:
        self._count += 1
        folder = self._folder / f"peer-{self._count}"
        folder.mkdir()
        port = free_port()
        command = ["taskset", "-c", PROXY_CORE, *peer.command(folder, port, upstream_port or self._upstream_port)]
        try:
            with process(command, peer.environment, port) as running:
                yield running, f"http://127.0.0.1:{port}", folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()  # what one peer wrote is not to slow down the next one


@contextlib.contextmanager
def sink() -> Iterator[int]:
    """A model server that takes large bodies; its port."""
    port = free_port()
    command = ["taskset", "-c", measure.LOAD_CORE, sys.executable, str(Path(__file__).parent / "sink.py"), str(port)]
    with process(command, {}, port):
        yield port


MODEL = """
import asyncio, sys
from proxy import dummy_model
async def main():
    await dummy_model.start(port=int(sys.argv[1]))
    await asyncio.Event().wait()
asyncio.run(main())
"""


@contextlib.contextmanager
def process(command: list[str], environment: dict[str, str], port: int) -> Iterator[psutil.Process]:
    """Runs a server until the block is over; the block begins once it listens."""
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 30
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise RuntimeError(f"{' '.join(command)} did not start: {output.read().decode()[-2000:]}")
                time.sleep(0.01)
            yield psutil.Process(server.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(timeout=10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def post(url: str) -> None:
    request = urllib.request.Request(url, b'{"data": []}', {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        answer.read()


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def peak_rss_bytes(running: psutil.Process) -> int:
    status = Path(f"/proc/{running.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def machine() -> dict[str, str]:
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in cpus if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def version(peer: Peer) -> str:
    if not peer.version:
        return f"Python {platform.python_version()}"
    output = subprocess.run(
        [peers.find(peer.version[0]) or "", *peer.version[1:]], capture_output=True, text=True, check=False
    )
    found = re.search(r"\d+\.\d+\.\d+", output.stdout + output.stderr)
    return found[0] if found else "?"


# (measurement, ours, factor, other, whether more is better): ours must be ≤ factor × other, or ≥ where more is better.
TARGETS = (
    ("CPU µs/request at 32", OURS, 0.65, ENVOY_TAP, False),
    ("CPU µs/request at 32", OURS, 1.15, ENVOY, False),
    ("CPU µs/request at 32, no two heads alike", OURS, 1.15, ENVOY, False),
    ("CPU µs/request at 32", OURS, 1.3, OURS_OFF, False),
    ("requests/s at 32", OURS, 1.6, ENVOY_TAP, True),
    ("requests/s at 32", OURS, 2.0, CADDY, True),
    ("requests/s at 32", OURS, 12.0, MITMDUMP, True),
    ("p50 µs at 1", OURS, 1.0, ENVOY_TAP, False),
    ("p99 µs at 32", OURS, 1.0, ENVOY_TAP, False),
    ("64 KiB JSON both ways, requests/s", OURS, 1.0, ENVOY_TAP, True),
    ("10 MiB upload, MiB/s", OURS, 0.5, ENVOY, True),
)


# (measurement, limit): ours must be at most that.
LIMITS = (
    ("RSS idle (MiB)", 50),
    ("SSE, added delay p99 (ms)", 2),
    ("longest loop stall, 4 MB JSON both ways, recording on (ms)", 10),
    ("start to first answer (s)", 0.5),
    ("1 GiB upload, peak RSS growth (MiB)", 32),
)


def render(figures: Figures, missing: list[str], available: list[Peer], rounds: int) -> str:
    """The report in Markdown: medians (and spread), then the ratios that are aimed at."""
    what = machine()
    lines = [
        f"Machine: {what['cpu']}, {what['cores']} cores, Linux {what['kernel']}.",
        f"Medians of {rounds} interleaved rounds (lowest–highest).",
        "",
        "| | " + " | ".join(peer.name for peer in available) + " |",
        "|---" * (len(available) + 1) + "|",
        "| version | " + " | ".join(version(peer) for peer in available) + " |",
    ]
    for measurement, by_peer in figures.items():
        cells = [_cell(by_peer.get(peer.name)) for peer in available]
        lines.append(f"| {measurement} | " + " | ".join(cells) + " |")
    if missing:
        lines += ["", "Not measured, since not installed: " + ", ".join(missing) + "."]
    lines += ["", "| ratio | is | aim | |", "|---|---|---|---|"]
    for measurement, ours, factor, other, more in TARGETS:
        by_peer = figures.get(measurement, {})
        if ours in by_peer and other in by_peer:
            ratio = statistics.median(by_peer[ours]) / statistics.median(by_peer[other])
            reached = ratio >= factor if more else ratio <= factor
            aim = f"{'≥' if more else '≤'} {factor:g} | {'✓' if reached else '✗'}"
            lines.append(f"| {measurement}: {ours} ÷ {other} | {ratio:.2f} | {aim} |")
    p50 = figures.get("p50 µs at 1", {})
    if OURS in p50 and OURS_OFF in p50:
        added = statistics.median(p50[OURS]) - statistics.median(p50[OURS_OFF])
        lines.append(
            f"| p50 µs at 1: {OURS} − {OURS_OFF} | {added:.0f} µs | ≤ 100 µs | {'✓' if added <= 100 else '✗'} |"
        )
    for measurement, limit in LIMITS:
        if measurement in figures:
            value = statistics.median(figures[measurement][OURS])
            lines.append(f"| {measurement} | {value:.2f} | ≤ {limit:g} | {'✓' if value <= limit else '✗'} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float] | None) -> str:
    if not values:
        return "–"
    text = (
        f"{statistics.median(values):,.4g}"
        if abs(statistics.median(values)) < 1000
        else f"{statistics.median(values):,.0f}"
    )
    return f"{text} ({min(values):,.4g}–{max(values):,.4g})" if len(values) > 1 else text


if __name__ == "__main__":
    sys.exit(main())
