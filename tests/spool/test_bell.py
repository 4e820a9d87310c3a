"""A bell wakes its sleeper once, however often it was rung, and never makes the ringer wait."""

from __future__ import annotations

import threading

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
    bell.close()
