"""A bell wakes its sleeper once, however often it was rung, and never makes the ringer wait."""

from __future__ import annotations

import threading
from pathlib import Path

from proxy.spool.bell import Bell


def test_it_wakes_a_thread() -> None:
    bell, woken = Bell(), threading.Semaphore(0)

    def sleep_twice() -> None:
        for _ in range(2):
            bell.sleep()
            woken.release()

    sleeper = threading.Thread(target=sleep_twice)
    sleeper.start()
    try:
        assert not woken.acquire(timeout=0.05), "it woke by itself"
        bell.ring()
        assert woken.acquire(timeout=5)
        assert not woken.acquire(timeout=0.05), "one ring woke it twice"
        bell.ring()
        assert woken.acquire(timeout=5)
    finally:
        bell.ring()
        sleeper.join(5)
        bell.close()


def test_ringing_never_blocks_though_nobody_listens() -> None:
    bell = Bell()
    for _ in range(100_000):  # more than a pipe holds
        bell.ring()
    bell.sleep()
    bell.close()


def test_a_closed_bell_writes_into_nobody_elses_file(tmp_path: Path) -> None:
    bell = Bell()
    bell.close()
    files = [(tmp_path / str(number)).open("wb") for number in range(4)]  # which get its numbers
    bell.ring()
    bell.close()
    for file in files:
        file.close()
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [0, 0, 0, 0]


def test_without_blocking_it_returns_though_it_was_not_rung() -> None:
    bell = Bell(blocking=False)
    bell.sleep()
    bell.close()
