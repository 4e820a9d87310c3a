"""The simulation of docs/scaling.md: its tables are those of the page, and it does what the real lanes do."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import random
import re
import selectors
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import duckdb
import pytest

from proxy.settings import RollingRate
from proxy.shipping.destination import Destination
from proxy.shipping.lane import LONGEST_RETRY_AFTER_SECONDS, LONGEST_RETRY_SECONDS, Backoff
from proxy.shipping.store import NotNow
from proxy.spool.layout import instance_id, partition
from tests.shipping.bench import NOON, URL, Process
from tests.shipping.memory import MemoryStore

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks/scaling.py"
PAGE = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")


def _loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


scaling: Any = _loaded()


# --- the page ---


def test_the_tables_of_the_page_are_those_it_prints() -> None:
    """But for rows of more than a hundred processes: ``python benchmarks/scaling.py`` prints all, in a quarter of a minute."""
    done = subprocess.run([sys.executable, SCRIPT, "--most", "100"], capture_output=True, text=True, check=True)
    printed = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(printed) > 25
    assert [line for line in printed if line not in PAGE.splitlines()] == []


def test_the_page_has_all_rows() -> None:
    rows = {
        head: rows.count("\n") for head, rows in re.findall(r"^\| (.*) \|\n\|-.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    }
    assert [rows[head] for head in scaling.TABLES.values()] == [4, 7, 6, 8, 4, 8, 5]


def test_duckdb_runs_the_queries_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for hour in range(21 * 24, 23 * 24):
        at = datetime(2026, 11, 1, tzinfo=UTC) + timedelta(hours=hour)
        for collection in ("request", "response"):
            folder = tmp_path / "data/my-endpoint/blue" / collection / partition(RollingRate.HOUR, at.timestamp())
            folder.mkdir(parents=True)
            lines = [line(collection, at + timedelta(minutes=minute)) for minute in range(0, 60, 20)]
            (folder / f"{instance_id('0' * 32, hour)}.jsonl").write_text("".join(f"{one}\n" for one in lines))
    (queries,) = re.findall(r"^```sql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    with duckdb.connect() as connection:
        _macro, by_hour, pairs, _compact, compacted = [
            connection.execute(query).fetchall() for query in queries.split(";\n") if query.strip()
        ]
    assert [row[1:3] for row in by_hour] == [(3, 1)] * 24
    assert len(pairs) == 3 * 24
    assert all(row == "[5.1,3.5]" and prediction == "0.7" for _time, row, prediction in pairs)
    assert compacted == [("22", 72), ("23", 72)]


def line(collection: str, at: datetime) -> str:
    """Of a pair; of three, one has keys that DuckDB takes for the same."""
    event: dict[str, Any] = {"time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z")}
    event |= {"correlationid": at.isoformat(), "data": {"data": [[5.1, 3.5]]}, "capturestatus": "complete"}
    if collection == "response":
        event |= {"data": {"predictions": [0.7]}, "statuscode": 503 if at.minute == 20 else 200, "durationms": 12.5}
    elif at.minute == 40:
        event["data"] |= {"Data": 1}
    return json.dumps(event)


# --- what always holds ---


def test_a_calm_fleet_makes_as_many_operations_as_it_has_files() -> None:
    for processes, interval in ((1, 2.0), (50, 2.0), (50, 10.0)):
        run = scaling.simulate(scaling.Account(), processes, seconds=23 * interval, seed="calm", interval=interval)
        tried = run.tried(3 * interval, 23 * interval)
        period = interval + scaling.ANSWER_SECONDS
        assert sum(tried) / len(tried) == pytest.approx(processes * len(scaling.RATES) / period, rel=0.03)
        assert run.account.kinds["look"] == run.account.kinds["create"] == len(run.files)


def test_nothing_is_shipped_twice_and_nothing_is_left_out() -> None:
    account = scaling.Account(100, 4e6, outage=(600.0, 900.0), lost=0.1)
    run = scaling.simulate(account, 50, seconds=1500, seed="lost", stops=lambda: 300 + 5 * random.random())
    assert account.kinds["append refused by its position"] > 100  # the answer was lost
    assert account.kinds["read"] > 100
    assert sum(account.refused.values()) > 500
    assert len(run.files) == 200
    assert all(file.shipped <= file.blob + 1e-3 <= file.length(1500) + 2e-3 for file in run.files)
    assert account.bytes_done == pytest.approx(sum(file.blob for file in run.files))
    closed = [file for file in run.files if file.ends < 1500]
    assert [file.blob for file in closed] == pytest.approx([file.length(1500) for file in closed])


@pytest.mark.parametrize("retry_after", [0.0, 0.2, 10.0, 299.0, 3600.0])
def test_no_back_off_is_shorter_than_what_was_asked_for(retry_after: float) -> None:
    backoff = Backoff()
    pauses = [backoff.seconds(retry_after) for _ in range(1000)]
    least = min(retry_after, LONGEST_RETRY_AFTER_SECONDS)
    assert all(least < pause <= least + LONGEST_RETRY_SECONDS for pause in pauses)


# --- the real lanes ---


class _Jumps(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Waits in no time: the clock jumps."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found and timeout:
            self.now += timeout
        return found


class _Store(MemoryStore):
    """Asks the account of the simulation, and takes the time that it takes there."""

    def __init__(self, account: Any, retry_after: float) -> None:
        super().__init__()
        self.account = account
        self.retry_after = retry_after

    async def _call(self, operation: str, name: str, act: Callable[[], Any]) -> Any:
        taken = self.account.does(operation, asyncio.get_running_loop().time())
        await asyncio.sleep(scaling.ANSWER_SECONDS)
        if not taken:
            raise NotNow("busy", "it is busy (503 ServerBusy).", self.retry_after)
        return self._answer(operation, name, act)


class _Cloud:
    def __init__(self, store: _Store) -> None:
        self.store = store

    def open(self, _place: Destination, _client_id: str | None) -> _Store:
        return self.store


def real_lanes(folder: Path, account: Any, number: int, *, starts: float, seconds: float, interval: float) -> None:
    """The shippers of ``number`` processes, from ``starts`` on; each writes a line to both of its files every 0.2 s."""
    store = _Store(account, account.retry_after)
    clock = _Jumps()
    clock.now = starts
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now  # type: ignore[method-assign]

    async def live() -> None:
        roots = f"{URL}/e/d/request", f"{URL}/e/d/response"
        processes = []
        for one in range(number):
            spool = folder / str(one)
            spool.mkdir(parents=True)
            process = Process(spool, _Cloud(store), *roots, interval_seconds=interval)  # type: ignore[arg-type]
            for place in process.places.values():
                place.root.mkdir(parents=True)
            processes.append(process)
        tasks = [asyncio.create_task(process.shipper._work()) for process in processes]
        line = 0
        await asyncio.sleep(0.01)  # the first request comes when the shipper has looked around
        while loop.time() < seconds:
            for process in processes:
                process.seconds = NOON + loop.time()
                for collection in "01":
                    process.write(line, collection=collection)
            line += 1
            await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for process in processes:
            for path, content in process.content.items():  # once each, in order
                name = f"pre fix/e/d/{path.relative_to(process.spool).as_posix().partition('/e/d/')[2]}"
                assert name not in store.blobs or content.startswith(store.blobs[name].data)
            process.die()

    with contextlib.closing(loop):
        loop.run_until_complete(live())


SCENES: dict[str, dict[str, Any]] = {
    "calm": {"starts": 0.0, "seconds": 120.0},
    "an hour begins": {"starts": 3540.0, "seconds": 3660.0},
    "an outage": {"starts": 0.0, "seconds": 900.0, "outage": (60.0, 660.0)},
    "an outage, Retry-After": {"starts": 0.0, "seconds": 500.0, "outage": (60.0, 360.0), "retry_after": 10.0},
    "too little": {"starts": 0.0, "seconds": 150.0, "operations": 25.0},
}


@pytest.mark.parametrize("scene", SCENES)
def test_it_does_what_the_real_lanes_do(tmp_path: Path, scene: str) -> None:
    options = dict(SCENES[scene])
    starts, seconds = options.pop("starts"), options.pop("seconds")
    number = 30 if scene == "too little" else 3
    account = scaling.Account(**options)
    run = scaling.simulate(account, number, seconds=seconds, seed=scene, starts=starts, rates=(100.0, 100.0))
    real = scaling.Account(**options)
    random.seed(scene)
    real_lanes(tmp_path, real, number, starts=starts, seconds=seconds, interval=run.interval)
    near = {"rel": 0.2} if scene == "too little" else {"rel": 0.02, "abs": 3}
    assert dict(real.kinds) == pytest.approx(dict(account.kinds), **near)
    assert real.refused.total() == pytest.approx(account.refused.total(), **near)
    assert real.kinds["look"] >= len(run.files)
