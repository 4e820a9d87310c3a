"""A first run: the dummy model, the proxy before it, three requests, and what was recorded of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import zlib
from pathlib import Path

import orjson
from aiohttp import ClientSession, TCPConnector

from proxy import dummy_model, logs
from proxy.app import App, StartError, running
from proxy.config import ConfigError, load
from proxy.settings import PAYLOAD_COLLECTIONS, LogLevel, Logs, Settings

DEFAULT_LISTEN = "127.0.0.1:8080"
DEFAULT_FRAMES_LISTEN = "127.0.0.1:50011"  # where the SDK looks
REMOTE_SPOOL = "demo-data/spool"  # for a dataset that goes further
_IRIS = {"data": [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]}


def _png(side: int = 64) -> bytes:
    """A real, if dull, picture: ``side`` × ``side`` grey pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    rows = b"".join(b"\0" + bytes((x * y) % 256 for x in range(side)) for y in range(side))
    header = side.to_bytes(4, "big") * 2 + bytes((8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


_REQUESTS = (
    ("JSON", "/score", "application/json", orjson.dumps(_IRIS)),
    ("text", "/echo", "text/plain; charset=utf-8", "Grüße an das Modell\nzweite Zeile".encode()),
    ("image", "/classify", "image/png", _png()),
)


async def demo(*, listen: str | None, storage: str, once: bool) -> int:
    """Runs the demo; the exit status. Serves until SIGINT or SIGTERM unless ``once``.

    Without ``listen`` it takes DEFAULT_LISTEN, or a free port when that is in use.
    """
    logs.configure(Logs(level=LogLevel.WARNING))
    model, model_url = await dummy_model.start()
    try:
        async with contextlib.AsyncExitStack() as stack:
            try:
                settings = _settings(model_url, listen or DEFAULT_LISTEN, DEFAULT_FRAMES_LISTEN, storage)
                app = await stack.enter_async_context(running(settings))
            except StartError:
                settings = _settings(model_url, listen or "127.0.0.1:0", "127.0.0.1:0", storage)
                app = await stack.enter_async_context(running(settings))
                if listen is None:
                    print(f"({DEFAULT_LISTEN} or {DEFAULT_FRAMES_LISTEN} is in use; other ports were taken.)")
            print(f"Dummy model on {model_url}, payload-logger before it on http://{app.address}\n")
            await _send(app)
            _show(app)
            if not once:
                await _serve(app)
        print(f"\n{app.ledger.account()}")
    except (ConfigError, StartError) as error:
        print(f"payload-logger: {error}", file=sys.stderr)
        return 1
    finally:
        await model.cleanup()
    return 0


def _settings(model_url: str, listen: str, frames_listen: str, storage: str) -> Settings:
    names = (*PAYLOAD_COLLECTIONS, "model_inputs", "model_outputs")
    flags: dict[str, object] = {"proxy.upstream": model_url, "proxy.listen": listen, "storage.url": storage}
    flags |= {
        "custom_logging.listen": frames_listen,
        "data_collector.collections": {name: {"enabled": True} for name in names},
    }
    flags |= {"endpoint_name": "demo", "name": "blue", "spool.path": REMOTE_SPOOL if "://" in storage else None}
    return load(overrides=flags, environ={}).settings


async def _send(app: App) -> None:
    async with ClientSession(connector=TCPConnector(force_close=True)) as session:
        for name, path, content_type, body in _REQUESTS:
            async with session.post(
                f"http://{app.address}{path}", data=body, headers={"Content-Type": content_type}
            ) as response:
                answer = await response.read()
                print(f"  {name:<5}  POST {path:<9} {len(body):>4} bytes → {response.status} {answer.decode()!r}")


def _show(app: App) -> None:
    """Prints the newest lines of each collection, and the files of the dataset."""
    files: list[Path] = []
    for name in PAYLOAD_COLLECTIONS:
        place = app.places[name]
        found = sorted(
            (path for path in place.root.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime
        )
        files += found
        newest = [path for path in found if path.suffix == ".jsonl"][-1]
        print(f"\nThe {name} collection's lines, in {_shown(newest)}:")
        for line in newest.read_bytes().splitlines()[-len(_REQUESTS) :]:
            text = line.decode()
            print("  " + (text if len(text) <= 900 else text[:900] + " …"))
    print("\nFiles of the dataset:")
    for path in files[-8:]:
        print(f"  {path.stat().st_size:>7} bytes  {_shown(path)}")


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


async def _serve(app: App) -> None:
    print(
        "\nTry it, and look at the files again:\n"
        f"  curl -i http://{app.address}/score -H 'Content-Type: application/json' -d '{orjson.dumps(_IRIS).decode()}'\n"
        f"  curl -N 'http://{app.address}/stream?tokens=5&delay=0.3'\n"
        "It takes the frames of the azureml-ai-monitoring SDK, too (docs/custom-logging.md has the script):\n"
        f"  AZUREML_MDC_ENABLED=true AZUREML_MDC_PORT={str(app.custom_logging_address).rpartition(':')[2]} "
        "python docs/examples/score.py\n"
        "Ctrl-C stops it."
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    with contextlib.suppress(asyncio.CancelledError):
        await stop.wait()
