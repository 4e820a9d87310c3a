from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from proxy import dummy_model


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """No thread and no file descriptor outlives its test."""
    threads = set(threading.enumerate())
    descriptors = _descriptors()
    yield
    leaked = [thread.name for thread in set(threading.enumerate()) - threads if not thread.name.startswith("asyncio_")]
    assert not leaked, f"threads left running: {leaked}"
    more = _descriptors() - descriptors
    assert not more, f"file descriptors left open: {more}"


def _descriptors() -> set[str]:
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue
        if not target.startswith(("anon_inode", "/dev/", "/proc/")):
            found.add(f"{descriptor.name}: {target}")
    return found


@pytest.fixture
async def model() -> AsyncIterator[str]:
    """URL of the dummy model."""
    runner, url = await dummy_model.start()
    yield url
    await runner.cleanup()


@pytest.fixture
async def _tasks_end() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    leaked = [task for task in asyncio.all_tasks() - before if not task.done()]
    assert not leaked, f"tasks left running: {leaked}"
