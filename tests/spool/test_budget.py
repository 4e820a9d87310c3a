from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.spool import budget as module
from proxy.spool.budget import Budget, bytes_below


@contextmanager
def measuring(roots: list[Path], max_bytes: int) -> Iterator[Budget]:
    budget = Budget(roots, max_bytes)
    budget.start()
    try:
        yield budget
    finally:
        budget.stop()


def until(condition: Callable[[], object], timeout_seconds: float = 5) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not come true within {timeout_seconds:g} s"
        time.sleep(0.005)


def test_every_file_at_any_depth_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    (first / "2026/11").mkdir(parents=True)
    second.mkdir()
    (first / "x").write_bytes(b"1")
    (first / "2026/11/y").write_bytes(b"22")
    (second / ".part").write_bytes(b"333")
    assert bytes_below([first, second, tmp_path / "not there"]) == 6


def test_links_count_as_themselves(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    (outside / "large").write_bytes(b"x" * 10_000)
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "large")
    (root / "loop").symlink_to(root)
    assert bytes_below([root]) < 1000


def test_files_that_vanish_while_counting_are_no_error(tmp_path: Path) -> None:
    stop = threading.Event()
    rounds = 0

    def churn() -> None:
        nonlocal rounds
        while not stop.is_set():
            folder = tmp_path / str(rounds)
            folder.mkdir()
            (folder / "x").write_bytes(b"x")
            (folder / "x").unlink()
            folder.rmdir()
            rounds += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        while rounds < 500:
            assert bytes_below([tmp_path]) <= 1
    finally:
        stop.set()
        thread.join()


def test_up_to_the_last_byte_and_no_further(tmp_path: Path) -> None:
    budget = Budget([tmp_path], 100)
    assert budget.allows(100)
    assert not budget.allows(101)
    budget.spend(60)
    assert budget.allows(40)
    assert not budget.allows(41)
    budget.spend(-10)
    assert budget.allows(50)
    assert budget.used_bytes == 50


def test_zero_is_no_limit(tmp_path: Path) -> None:
    with measuring([tmp_path], 0) as budget:
        budget.spend(10**15)
        assert budget.allows(10**15)
        assert "spool-budget" not in {thread.name for thread in threading.enumerate()}


def test_what_is_there_already_counts(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 90)
    with measuring([tmp_path], 100) as budget:
        until(lambda: budget.used_bytes == 90)
        assert not budget.allows(11)


def test_deleted_files_give_their_room_back_soon_though_the_next_measurement_was_not_due(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 90)
    with measuring([tmp_path], 100) as budget:
        until(lambda: budget.used_bytes == 90)
        assert not budget.allows(50)
        (tmp_path / "x").unlink()
        until(lambda: budget.allows(50))


def test_what_is_written_while_measuring_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the measurement has passed already must not be lost from the sum."""
    measuring_now, go_on = threading.Event(), threading.Event()

    def measure(roots: tuple[Path, ...]) -> int:
        total = bytes_below(roots)
        measuring_now.set()
        assert go_on.wait(5)
        return total

    monkeypatch.setattr(module, "bytes_below", measure)
    (tmp_path / "x").write_bytes(b"x" * 50)
    budget = Budget([tmp_path], 100)
    budget.start()
    try:
        assert measuring_now.wait(5)
        with (tmp_path / "x").open("ab") as file:
            file.write(b"x" * 30)
        budget.spend(30)
        go_on.set()
        until(lambda: budget.used_bytes == 80)
    finally:
        go_on.set()
        budget.stop()


def test_stop_ends_the_measuring_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEASURE_WHEN_FULL_SECONDS", 3600.0)
    budget = Budget([tmp_path], 100)
    budget.start()
    budget.stop()  # it would go on for MEASURE_WHEN_FULL_SECONDS
    assert "spool-budget" not in {thread.name for thread in threading.enumerate()}
    budget.stop()


def test_a_folder_that_can_not_be_read_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    assert bytes_below([path]) == 0
    assert bytes_below([Path(os.devnull)]) == 0
