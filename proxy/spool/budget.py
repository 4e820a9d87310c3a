"""How much disk the dataset may take: counted as it is written, measured now and then, since others delete files."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, MutableSequence
from pathlib import Path

MEASURE_SECONDS = 60.0
MEASURE_WHEN_FULL_SECONDS = 2.0


def bytes_below(roots: Iterable[Path]) -> int:
    """Sum of the sizes of all files below ``roots``, in bytes. Files that vanish meanwhile count as gone."""
    total = 0
    pending = [os.fspath(root) for root in roots]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    try:
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(entry.path)
                        else:
                            total += entry.stat(follow_symlinks=False).st_size
                    except FileNotFoundError:
                        continue
        except OSError:
            continue
    return total


class Budget:
    """Keeps the bytes below ``roots`` under ``max_bytes`` (0: no limit). ``start`` begins to measure, in a thread of its own.

    Processes that write there together share ``spent``: what each has written and not removed since it was made, in
    bytes; ``spent[slot]`` is this one's.
    """

    def __init__(
        self, roots: Iterable[Path], max_bytes: int, spent: MutableSequence[int] | None = None, slot: int = 0
    ) -> None:
        self.max_bytes = max_bytes
        self._roots = tuple(roots)
        self._spent: MutableSequence[int] = [0] if spent is None else spent
        self._slot = slot
        self._base = -sum(self._spent)  # what was measured, less what had been spent when the measurement began
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._refused = False
        self._worker = threading.Thread(target=self._measure, name="spool-budget", daemon=True)

    def start(self) -> None:
        if self.max_bytes:
            self._worker.start()

    def stop(self) -> None:
        """Ends the measuring; a disk that hangs keeps its thread, which ends with the process."""
        self._stop.set()
        if self._worker.is_alive():
            self._worker.join(timeout=1)

    @property
    def used_bytes(self) -> int:
        return self._base + sum(self._spent)

    def allows(self, size: int) -> bool:
        """Whether ``size`` further bytes may be written."""
        if not self.max_bytes or self.used_bytes + size <= self.max_bytes:
            return True
        self._refused = True
        return False

    def spend(self, size: int) -> None:
        """Counts what was written; a negative size, what was removed."""
        with self._lock:
            self._spent[self._slot] += size

    def _measure(self) -> None:
        due = time.monotonic()
        while True:
            if self._refused or time.monotonic() >= due:
                self._refused = False
                before = sum(self._spent)
                # Files written while measuring may count twice until the next time: the safe side.
                self._base = bytes_below(self._roots) - before
                due = time.monotonic() + MEASURE_SECONDS
            if self._stop.wait(MEASURE_WHEN_FULL_SECONDS):
                return
