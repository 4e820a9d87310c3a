"""How late an event loop is: what stalls it keeps every exchange waiting."""

from __future__ import annotations

import asyncio
from time import perf_counter

from proxy.relay.traffic import DELAY_BOUNDS, Histogram

EVERY_SECONDS = 0.05


class LoopDelay:
    """Asks to be called twenty times a second, and notes by how much that was too late. Use: ``start``, ``stop``."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.histogram = Histogram(DELAY_BOUNDS)
        self._loop = loop
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._due = perf_counter() + EVERY_SECONDS
        self._timer = self._loop.call_later(EVERY_SECONDS, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self.histogram.observe(max(0.0, perf_counter() - self._due))
        self.start()
