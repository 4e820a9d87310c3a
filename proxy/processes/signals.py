"""What the operator asks for by signals."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial

# Some that start processes (timeout, tini -g) send a signal to the process and to its group: that is one signal.
ECHO_SECONDS = 0.5


class Signals:
    """``stop``: SIGTERM or SIGINT came; ``stop_now``: a second one; a third ends the process on the spot.

    ``reload``: SIGHUP came. Made on the event loop that is to be told.
    """

    def __init__(self, *, interrupts: bool = True) -> None:
        """interrupts: SIGINT counts, too; else it is ignored (Ctrl-C reaches a whole group of processes)."""
        self.stop = asyncio.Event()
        self.stop_now = asyncio.Event()
        self.reload = asyncio.Event()
        self._stopped_at = -ECHO_SECONDS
        loop = asyncio.get_running_loop()
        # Not by loop.add_signal_handler: a loop that ends would give SIGTERM its default back, before the process has ended.
        stop = partial(_call_soon, loop, self._stop)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop if interrupts else signal.SIG_IGN)
        signal.signal(signal.SIGHUP, partial(_call_soon, loop, self.reload.set))

    def _stop(self) -> None:
        now = time.monotonic()
        if now - self._stopped_at < ECHO_SECONDS:
            return
        self._stopped_at = now
        if self.stop_now.is_set():
            sys.stderr.flush()
            os._exit(1)
        if self.stop.is_set():
            self.stop_now.set()
        self.stop.set()

    def close(self) -> None:
        """The process is about to end by itself: what comes now changes nothing, its exit status included."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    async def next(self) -> bool:
        """Waits for what is asked for: True for a reload, False for a stop."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self.stop, self.reload)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self.stop.is_set():
            return False
        self.reload.clear()
        return True


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None], *_: object) -> None:
    """A signal's handler runs in the midst of whatever the main thread does."""
    loop.call_soon_threadsafe(callback)


def end_quietly_until_ready() -> None:
    """Before there is an event loop: SIGTERM and SIGINT end the process.

    That is what they do by themselves, but not to the first process of a container, which would not notice them.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
