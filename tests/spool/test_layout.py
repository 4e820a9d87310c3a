from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.settings import RollingRate
from proxy.spool.layout import Place, instance_id, new_process_id, partition

PLACE = Place(Path("/d/e/n/request"), "file:///d/e/n/request", Path("/d/e/n"), "file:///d/e/n")
MOMENT = datetime(2026, 11, 22, 16, 5, 59, 999_999, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("rate", "folder"),
    [
        (RollingRate.MINUTE, "2026/11/22/16/05"),
        (RollingRate.HOUR, "2026/11/22/16"),
        (RollingRate.DAY, "2026/11/22"),
        (RollingRate.MONTH, "2026/11"),
        (RollingRate.YEAR, "2026"),
    ],
)
def test_a_partition_is_the_moment_in_utc(rate: RollingRate, folder: str) -> None:
    assert partition(rate, MOMENT) == folder


@given(st.floats(min_value=0, max_value=4e9))
def test_the_partition_of_an_hour_is_the_one_that_python_s_calendar_says(epoch_seconds: float) -> None:
    expected = datetime.fromtimestamp(int(epoch_seconds), UTC).strftime("%Y/%m/%d/%H")
    assert partition(RollingRate.HOUR, epoch_seconds) == expected


def test_an_hour_ends_with_its_last_second() -> None:
    end = datetime(2027, 1, 1, tzinfo=UTC).timestamp()
    assert partition(RollingRate.HOUR, end - 0.001) == "2026/12/31/23"
    assert partition(RollingRate.HOUR, end) == "2027/01/01/00"


def test_lines_are_named_as_azure_names_them() -> None:
    name = instance_id(new_process_id(), 1)
    assert re.fullmatch(r"[0-9a-f]{32}000001", name)
    assert PLACE.lines("2026/11/22/16", name) == Path(f"/d/e/n/request/2026/11/22/16/{name}.jsonl")


def test_no_two_processes_share_a_name() -> None:
    assert len({new_process_id() for _ in range(1000)}) == 1000


def test_a_binary_body_is_beside_its_line() -> None:
    path, url = PLACE.body("2026/11/22/16", "abc", "a/b", large=False)
    assert path == Path("/d/e/n/request/2026/11/22/16/abc")
    assert url == path.as_uri()


def test_a_large_body_leaves_the_collection_out() -> None:
    path, url = PLACE.body("2026/11/22/16", "abc", "a/b", large=True)
    assert path == Path("/d/e/n/2026/11/22/16/abc.jsonl")
    assert url == path.as_uri()


def test_what_is_not_finished_is_hidden_and_on_the_same_disk_as_what_it_becomes() -> None:
    path = PLACE.unfinished(new_process_id(), str(uuid.UUID(int=0)))
    assert path.name.startswith(".")
    assert path.parent == PLACE.root
