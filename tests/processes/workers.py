"""The workers of a proxy that runs several."""

from __future__ import annotations

import asyncio
import contextlib
import re

import psutil

from tests.drills.load import ProxyProcess
from tests.processes.admin import admin_port, status_of

TWO = {"admin__listen": "127.0.0.1:0", "proxy__workers": 2, "proxy__drain_seconds": 20}


def workers_of(running: ProxyProcess) -> dict[int, psutil.Process]:
    """The worker processes by their numbers."""
    found = {}
    for child in psutil.Process(running.process.pid).children():
        with contextlib.suppress(psutil.Error):
            if match := re.search(r"payload-logger-worker-(\d+)", " ".join(child.cmdline())):
                found[int(match[1])] = child
    return found


async def replaced(running: ProxyProcess, times: int) -> None:
    """Waits until so many workers have been replaced, and all take traffic."""
    port = admin_port(running)
    async with asyncio.timeout(30):
        while True:
            status = await status_of(port)
            if status["worker_restarts"] >= times and status["workers"] == 2:
                return
            await asyncio.sleep(0.01)
