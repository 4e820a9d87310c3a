"""What the operator asks for by signals."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

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
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self.reload.set)
        if interrupts:
            loop.add_signal_handler(signal.SIGINT, self._stop)
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

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
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)
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


def end_quietly_until_ready() -> None:
    """Before there is an event loop: SIGTERM and SIGINT end the process.

    That is what they do by themselves, but not to the first process of a container, which would not notice them.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
