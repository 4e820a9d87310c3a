"""A worker: one of several processes that take traffic, each with a spool writer and an instance id of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import signal
import socket
import sys
from typing import Any

import msgspec

from proxy import logs
from proxy.admin.snapshot import snapshot
from proxy.app import App, Shared, StartError, freeze, running
from proxy.processes.channel import Channel, Message
from proxy.processes.loops import run_loop
from proxy.processes.signals import Signals
from proxy.settings import Settings

logger = logging.getLogger("payload_logger")


def main() -> None:
    """``python -c 'from proxy.processes.worker import main; main()' NAME FD``, started by the supervisor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(run_loop(_work(int(sys.argv[-1]))))


def spent_of(fd: int, workers: int) -> memoryview:
    """The numbers that all workers share through a file: bytes on disk, one for each. See ``proxy.spool.budget``."""
    return memoryview(mmap.mmap(fd, 8 * workers)).cast("q")


async def _work(fd: int) -> int:
    channel = await Channel.over(socket.socket(fileno=fd))
    hello = await channel.receive()
    if hello is None:
        return 1
    signals = Signals(interrupts=False)
    settings = msgspec.convert(hello["settings"], Settings)
    logs.configure(settings.logs, worker=hello["worker"])
    shared = Shared(
        hello["worker"],
        {key: [socket.socket(fileno=number) for number in numbers] for key, numbers in hello["sockets"].items()},
        spent_of(hello["spent"], hello["workers"]),  # type: ignore[arg-type]
    )
    try:
        async with running(settings, shared, signals.stop_now) as app:
            freeze()
            channel.send({"ready": app.address, "frames": app.custom_logging_address})
            listening = asyncio.create_task(_listen(channel, app, signals))
            await signals.stop.wait()
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening
        logger.info("Stopped: %s.", app.ledger.account())
    except StartError as error:
        channel.send({"failed": str(error)})
        await channel.flush()
        return 1
    finally:
        channel.close()
        signals.close()
    return 1 if signals.stop_now.is_set() else 0


async def _listen(channel: Channel, app: App, signals: Signals) -> None:
    """Answers the supervisor, each message with one. When the supervisor is gone, the worker stops."""
    while (message := await channel.receive()) is not None:
        channel.send(await _answer(message, app, signals))
    if not signals.stop.is_set():
        logger.error("The supervisor has ended; this worker stops, too.")
        signals.stop.set()


async def _answer(message: Message, app: App, signals: Signals) -> dict[str, Any]:
    if "apply" not in message:
        return {"snapshot": snapshot(app, ready=not signals.stop.is_set())}
    settings = msgspec.convert(message["apply"], Settings)
    try:
        await app.apply(settings)
    except StartError as error:
        return {"refused": str(error)}
    logs.configure(settings.logs, worker=message["worker"])
    return {"refused": None}


def command(fd: int, name: str) -> tuple[list[str], dict[str, str]]:
    """What the supervisor runs for a worker, with its own modules wherever they came from; and the environment."""
    path = os.pathsep.join(one for one in sys.path if one)
    words = [sys.executable, "-c", "from proxy.processes.worker import main; main()", name, str(fd)]
    return words, {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
