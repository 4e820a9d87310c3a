"""The shipper, with files as the writer makes them, and containers in memory."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.settings import RollingRate
from proxy.shipping import destination
from proxy.shipping import lane as lanes
from proxy.shipping.lane import Backoff
from proxy.shipping.store import NotNow
from proxy.spool import recovery
from proxy.spool.files import SpoolFull
from proxy.spool.layout import instance_id
from tests.drills.load import until
from tests.shipping.bench import OTHER_URL, URL, Account, Cloud, Process, running
from tests.shipping.memory import FOREIGN, Fault, Plan

REQUEST, RESPONSE = f"{URL}/e/d/request", f"{URL}/e/d/response"
FORBIDDEN = NotNow("forbidden", "the SAS is refused (AuthenticationFailed).")
BUSY = NotNow("busy", "it is busy (503 ServerBusy).")


@pytest.fixture
def cloud() -> Cloud:
    return Cloud()


@pytest.fixture
def account(cloud: Cloud) -> Account:
    return cloud.account()


class Processes:
    """Those that a test begins; they die with it."""

    def __init__(self, spool: Path, cloud: Cloud) -> None:
        self.spool = spool
        self.cloud = cloud
        self.all: list[Process] = []

    def __call__(self, *urls: str, **options: object) -> Process:
        self.all.append(Process(self.spool, self.cloud, *urls, **options))  # type: ignore[arg-type]
        return self.all[-1]


@pytest.fixture
def new(tmp_path: Path, cloud: Cloud) -> Iterator[Processes]:
    processes = Processes(tmp_path, cloud)
    yield processes
    for process in processes.all:
        process.die()


@pytest.fixture
def process(new: Processes) -> Process:
    return new()


def always(error: NotNow, *operations: str) -> Plan:
    return lambda operation, _name: error if not operations or operation in operations else None


def flaky(seed: int, rate: float, *faults: Fault) -> Plan:
    chance = random.Random(seed)
    return lambda _operation, _name: chance.choice(faults) if chance.random() < rate else None


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


# --- lines ---


async def test_lines_come_under_the_names_of_their_files(process: Process, account: Account) -> None:
    process.write(1, 2)
    await process.turn()
    name = f"pre fix/e/d/request/2026/11/22/12/{instance_id(process.process_id, 1)}.jsonl"
    assert account.blobs[name].data == b'{"n": 1}\n{"n": 2}\n'
    assert process.ledger.account().delivered == 2
    assert process.pending() == 0


async def test_one_append_per_file_and_turn(new: Processes, account: Account) -> None:
    process = new(REQUEST, RESPONSE)
    for number in range(10):
        for collection in "01":
            for part in range(20):
                process.write(100 * number + part, collection=collection)
        await process.turn()
        assert account.calls["append"] == 2 * (number + 1)
    assert account.calls["look"] == account.calls["create"] == 2


async def test_a_turn_without_news_asks_nothing(process: Process, account: Account) -> None:
    process.write(1)
    await process.turn()
    account.trace.clear()
    await process.turn(3)
    assert account.trace == []


async def test_a_file_is_removed_when_it_is_closed_and_shipped(process: Process, account: Account) -> None:
    process.write(1)
    await process.turn(2)
    assert len(process.left()) == 1
    assert process.budget.used_bytes == len(b'{"n": 1}\n')
    process.seconds += 3600
    process.write(2)
    await process.turn(2)
    assert [path.name for path in process.left()] == [f"{instance_id(process.process_id, 2)}.jsonl"]
    process.close_files()
    await process.turn(2)
    assert process.left() == []
    assert process.budget.used_bytes == 0
    assert process.cloud.numbers() == [1, 2]


async def test_no_file_is_removed_before_all_of_it_is_there(new: Processes, cloud: Cloud, account: Account) -> None:
    process = new(REQUEST, RESPONSE, roll_bytes=64, rate=RollingRate.MINUTE)
    account.plan = flaky(1, 0.4, Fault.REFUSED, Fault.LOST, Fault.LATE, Fault.FOREIGN, Fault.CUT)
    for number in range(150):
        process.write(number, collection=str(number % 2))
        process.seconds += 20
        await process.turn()
        for path, content in process.content.items():
            if not list(path.parent.glob(f"{path.stem}*")):
                assert all(line in account.lines() for line in content.splitlines(keepends=True)), path
    process.close_files()
    account.plan = None
    await process.turn(40)
    assert process.left() == []
    assert cloud.numbers() == list(range(150))
    assert process.pending() == 0
    assert account.happened.total() > 100


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.DELETED])
async def test_a_blob_that_loses_its_end_when_nothing_follows_is_made_whole(
    process: Process, account: Account, fault: Fault
) -> None:
    process.write(1)
    await process.turn()
    process.write(2)
    await process.turn()
    (name,) = account.blobs
    account.disturb(fault, name)
    process.close_files()
    await process.turn(2)
    assert process.left() == []
    assert process.cloud.numbers() == [1, 2]
    assert process.pending() == 0


async def test_a_blob_of_many_blocks_is_not_written_further(
    process: Process, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "FULL_BLOCKS", 5)
    for number in range(12):
        process.write(number)
        await process.turn()
    process.close_files()
    await process.turn(2)
    assert sorted(len(blob.blocks) for blob in account.blobs.values()) == [2, 5, 5]
    assert process.cloud.numbers() == list(range(12))
    assert process.left() == []


async def test_a_blob_that_is_lost_is_left_and_the_log_says_so(
    process: Process, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    process.write(1)
    await process.turn()
    (name,) = account.blobs
    account.disturb(Fault.FOREIGN, name)
    process.write(2)
    await process.turn()
    process.write(3)
    process.close_files()
    await process.turn(4)
    assert process.cloud.numbers() == [1, 2, 3]
    assert account.blobs[name].blocks == [b'{"n": 1}\n', FOREIGN]
    assert process.pending() == 0
    assert process.left() == []
    (told,) = messages(caplog)
    assert told.startswith(f"https://account.blob.core.windows.net/container/{name}: somebody else wrote in it. ")
    assert told.endswith("It is left as it is; what follows goes to a new file.")


async def test_a_lost_blob_s_file_that_can_t_be_renamed_is_tried_again(
    process: Process, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.write(1)
    await process.turn()
    account.disturb(Fault.FOREIGN, next(iter(account.blobs)))
    process.write(2)

    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        await process.turn(3)
        (lane,) = process.lanes()
        assert lane.trouble is not None
        assert lane.trouble.reason == "disk"
    await process.turn(4)
    assert process.cloud.numbers() == [1, 2]
    assert process.left() == []


async def test_a_file_that_is_deleted_before_it_is_opened_is_counted(
    process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    process.write(1, 2, 3)
    process.left()[0].unlink()
    await process.turn(2)
    assert process.ledger.account().discarded == {"spool_deleted": 3}
    assert process.pending() == 0
    assert ["was deleted before it was shipped" in told for told in messages(caplog)] == [True]
    process.write(4)
    await process.turn()
    assert process.cloud.numbers() == [4]


async def test_a_spool_that_is_deleted_at_once_is_counted(process: Process, tmp_path: Path) -> None:
    process.write(1, 2, 3)
    for path in sorted((tmp_path / "https").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    await process.turn()
    assert process.ledger.account().discarded == {"spool_deleted": 3}
    process.write(4)
    await process.turn()
    assert process.cloud.numbers() == [4]
    assert process.pending() == 0


async def test_a_file_in_a_folder_that_is_made_while_the_others_are_looked_for(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = destination.destinations

    def find_and_write(spool: Path) -> Iterator[tuple[Path, str]]:
        yield from find(spool)
        if not (tmp_path / "https").exists():
            process.write(1)

    monkeypatch.setattr(destination, "destinations", find_and_write)
    await process.turn()
    await process.turn()
    assert process.cloud.numbers() == [1]
    assert process.pending() == 0


async def test_a_file_that_is_deleted_later_is_shipped_all_the_same(process: Process) -> None:
    process.write(1)
    await process.turn()
    process.write(2)
    process.left()[0].unlink()
    await process.turn()
    process.write(3)
    await process.turn(2)
    assert process.cloud.numbers() == [1, 2, 3]
    assert process.pending() == 0


async def test_a_file_that_is_cut_is_given_up_and_counted(
    process: Process, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    """As ``> FILE`` does. What was shipped stays, and what is written next to it goes on in a new file."""
    process.write(1)
    await process.turn()
    process.write(2, 3)
    os.truncate(process.left()[0], 0)
    process.write(4)
    await process.turn(2)
    assert process.ledger.account().discarded == {"spool_deleted": 3}
    assert process.ledger.account().delivered == 1
    process.write(5)
    await process.turn(2)
    assert process.cloud.numbers() == [1, 5]
    assert process.pending() == 0
    assert len(messages(caplog)) == 1


async def test_a_file_that_can_t_be_opened_for_now_is_opened_later(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.write(1)
    process.lanes()  # it has its files

    def fail(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        for lane in process.shipper._lanes.values():
            await lane.turn()
            assert lane.trouble is not None
            assert lane.trouble.reason == "disk"
    await process.turn()
    assert process.cloud.numbers() == [1]


async def test_a_lock_that_fails_is_tried_again(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    process.write(1)
    process.lanes()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fail)
        for lane in process.shipper._lanes.values():
            await lane.turn()
    await process.turn()
    assert process.cloud.numbers() == [1]


# --- bodies ---


async def test_a_body_becomes_a_blob_of_its_type(process: Process, account: Account) -> None:
    name = process.body(b"\x89PNG", content_type="image/png; x=ü")
    large = process.body(b"{}", content_type="application/json", large=True)
    process.write(1, body=name)
    process.write(2, body=large)
    await process.turn()
    assert name.startswith("pre fix/e/d/request/2026/11/22/12/")
    assert large.startswith("pre fix/e/d/request-large/2026/11/22/12/")
    assert large.endswith(".jsonl")
    assert (account.blobs[name].data, account.blobs[name].content_type) == (b"\x89PNG", "image/png; x=ü")
    assert (account.blobs[large].data, account.blobs[large].content_type) == (b"{}", "application/json")
    assert account.early == []
    assert process.budget.used_bytes == len((process.left()[0]).read_bytes())


async def test_no_line_comes_before_its_body(process: Process, cloud: Cloud, account: Account) -> None:
    """While bodies and lines are written in the middle of turns, and calls fail."""
    chance = random.Random(2)
    faults = flaky(3, 0.3, Fault.REFUSED, Fault.LOST, Fault.LATE)
    number = 0

    def plan(operation: str, name: str) -> Fault | NotNow | None:
        nonlocal number
        if chance.random() < 0.3 and number < 300:
            process.write(number, body=process.body(os.urandom(chance.choice([10, 300_000]))))
            number += 1
        return faults(operation, name)

    account.plan = plan
    turns = 0
    while number < 300:
        process.write(1000 + turns, body=process.body())
        turns += 1
        await process.turn()
    account.plan = None
    await process.turn(3)
    assert account.early == []
    assert cloud.numbers() == [*range(300), *range(1000, 1000 + turns)]
    assert account.calls["put"] > 350
    assert account.most_in_flight <= lanes.BODIES_AT_ONCE


async def test_lines_wait_for_a_body_that_fails(process: Process, account: Account) -> None:
    name = process.body()
    process.write(1, body=name)
    account.plan = always(BUSY, "put")
    await process.turn(3)
    assert account.calls["append"] == 0
    account.plan = None
    await process.turn(2)
    assert process.cloud.numbers() == [1]


async def test_many_bodies_at_a_flaky_destination_arrive_and_the_lines_with_them(
    process: Process, account: Account
) -> None:
    """Each turn some fail: that must not add up to long pauses, nor keep the lines for ever."""
    account.plan = flaky(4, 0.3, Fault.REFUSED)
    waited = 0.0
    for round_ in range(30):
        for number in range(20):
            process.write(20 * round_ + number, body=process.body())
        waited += sum(await process.turn())
    delivered = process.ledger.account().delivered
    assert delivered > 300
    assert waited < 30 * 1.0
    account.plan = None
    await process.turn(3)
    assert process.cloud.numbers() == list(range(600))


async def test_a_dead_destination_is_not_asked_for_every_body(process: Process, account: Account) -> None:
    for number in range(300):
        process.write(number, body=process.body())
    account.plan = always(BUSY)
    for turns in range(1, 6):
        await process.turn()
        assert account.calls["put"] <= turns * 2 * lanes.BODIES_AT_ONCE
    assert account.calls["append"] == 0
    account.plan = None
    await process.turn(3)
    assert process.cloud.numbers() == list(range(300))


async def test_lines_wait_for_the_bodies_that_were_not_even_tried(process: Process, account: Account) -> None:
    for number in range(60):
        process.write(number, body=process.body())
    refused = 0

    def plan(operation: str, _name: str) -> NotNow | None:
        nonlocal refused
        refused += operation == "put"
        return BUSY if operation == "put" and refused <= 2 * lanes.BODIES_AT_ONCE else None

    account.plan = plan
    while account.calls["append"] == 0:
        await process.turn()
    assert account.early == []
    assert process.cloud.numbers() == list(range(60))


async def test_large_bodies_are_few_at_once(process: Process, account: Account) -> None:
    most = 0

    def plan(operation: str, _name: str) -> None:
        nonlocal most
        if operation == "put":
            most = max(most, account.in_flight)

    account.plan = plan
    for number in range(10):
        process.write(number, body=process.body(bytes(lanes.SMALL_BYTES + 1)))
    await process.turn()
    assert 1 < most <= lanes.FILES_AT_ONCE


async def test_a_body_in_the_place_of_another_kind_of_blob(
    process: Process, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    name = process.body()
    await account.create(name)
    process.write(1, body=name)
    await process.turn(2)
    (told,) = messages(caplog)
    assert f"{name} is a blob of another kind, which somebody else put there; remove it." in told
    del account.blobs[name]
    await process.turn(2)
    assert process.cloud.numbers() == [1]


async def test_a_body_that_can_t_be_read_keeps_no_other_one_waiting(process: Process, account: Account) -> None:
    names = [process.body() for _ in range(20)]
    process.write(*range(20))

    def plan(operation: str, name: str) -> None:
        if operation == "put" and name in names[::5]:
            raise PermissionError(errno.EACCES, "Permission denied")

    account.plan = plan
    await process.turn()
    assert len(account.blobs) == 16
    state = process.shipper.states()[0]
    words = "the spool's disk has a fault: [Errno 13] Permission denied. Lines beside it wait for it."
    assert (state.trouble, state.words) in {("disk", f"{name}: {words}") for name in names[::5]}
    account.plan = None
    await process.turn(2)
    assert set(names) < set(account.blobs)
    assert process.cloud.numbers() == list(range(20))


@pytest.mark.parametrize("bodies", [1, 3 * lanes.BODIES_AT_ONCE])
@pytest.mark.parametrize("large", [False, True])
async def test_a_body_that_can_t_be_shipped_keeps_only_lines_beside_it_waiting(
    new: Processes, account: Account, caplog: pytest.LogCaptureFixture, *, bodies: int, large: bool
) -> None:
    process = new(REQUEST, RESPONSE, interval_seconds=5)
    wrong = [process.body(collection="0", large=large) for _ in range(bodies)]
    for number, name in enumerate(wrong):
        process.write(number, collection="0", body=name)
    account.plan = lambda operation, name: FORBIDDEN if operation == "put" and name in wrong else None
    for number in range(1000, 1010):
        process.write(number, collection="1", body=process.body(collection="1"))
        before = account.calls["put"]
        (pause,) = await process.turn()
        assert pause >= 5  # it is not asked again and again
        assert account.calls["put"] - before <= 3 * lanes.BODIES_AT_ONCE + 1
    assert process.cloud.numbers() == list(range(1000, 1010))
    assert process.shipper.states()[0].trouble == "forbidden"
    (told,) = messages(caplog)
    assert "container: shipping fails: " in told
    assert any(f"{name}: {FORBIDDEN}" in told for name in wrong)
    account.plan = None
    await process.turn(2)
    assert process.cloud.numbers() == [*range(bodies), *range(1000, 1010)]
    assert account.early == []
    assert process.pending() == 0
    assert messages(caplog)[1:] == ["https://account.blob.core.windows.net/container: shipping goes on."]


async def test_some_bodies_that_fail_in_each_turn_do_not_keep_the_lines_for_ever(
    process: Process, account: Account
) -> None:
    """Not even when only what is wrong with single bodies is."""
    chance = random.Random(7)
    account.plan = lambda operation, _name: FORBIDDEN if operation == "put" and chance.random() < 0.3 else None
    for number in range(600):
        process.write(number, body=process.body())
        if number % 20 == 19:
            await process.turn()
    assert process.ledger.account().delivered > 300
    account.plan = None
    await process.turn(3)
    assert process.cloud.numbers() == list(range(600))
    assert account.early == []


async def test_many_bodies_that_can_t_be_shipped_are_not_all_kept_in_mind(
    new: Processes, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "MOST_LEFT", 20)
    process = new(REQUEST, RESPONSE)
    wrong = {process.body() for _ in range(100)}
    process.write(*range(100))
    account.plan = lambda operation, name: (
        FORBIDDEN if operation == "put" and name in wrong and hash(name) % 3 else None
    )
    for number in range(100, 110):
        process.write(number, collection="1")
        await process.turn()
    assert process.cloud.numbers() == list(range(100, 110))
    assert len(next(iter(process.shipper._lanes.values()))._left) <= 20 + lanes.BODIES_AT_ONCE


async def test_a_body_that_another_process_ships_first(process: Process, account: Account) -> None:
    name = process.body()
    process.write(1, body=name)

    def plan(operation: str, _name: str) -> None:
        if operation == "put":
            for path in process.left():
                if ";" in path.name:
                    path.unlink()

    account.plan = plan
    await process.turn()
    assert process.cloud.numbers() == [1]


# --- what other processes left ---


async def test_what_a_dead_process_left_is_shipped_and_counted(new: Processes, account: Account) -> None:
    dead = new(REQUEST)
    dead.write(1, 2)
    await dead.turn()
    dead.write(3, 4, 5, body=dead.body())
    path = dead.files._current["0"].path
    dead.files.open_body("0", "unfinished").close()
    dead.die()
    with path.open("ab") as file:
        file.write(b'{"n": 6')
    process = new(REQUEST)
    process.write(7)
    pauses = await process.turn(2)
    assert pauses[0] == 0.0, "what was taken over waits for no interval"
    assert process.cloud.numbers() == [1, 2, 3, 4, 5, 7]
    found = process.ledger.account()
    assert (found.received, found.delivered, found.adopted) == (4, 4, 3)
    assert (found.torn, found.orphans) == (1, 1)
    assert [one.name for one in process.left()] == [f"{instance_id(process.process_id, 1)}.jsonl"]
    assert account.early == []


async def test_the_files_of_a_living_process_are_not_touched(new: Processes, account: Account) -> None:
    living = new(REQUEST)
    living.write(1)
    process = new(REQUEST)
    await process.turn(3)
    assert account.trace == []
    assert len(process.left()) == 1
    living.die()
    await process.turn(2)
    assert process.cloud.numbers() == [1]
    assert process.left() == []


async def test_files_that_are_not_in_order_yet_are_not_touched(
    new: Processes, account: Account, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The journal is there as long as one of its files is not; the log says it once."""
    dead = new(REQUEST)
    dead.write(1)
    (tmp_path / "folder").mkdir()
    dead.journal.note(tmp_path / "folder")  # can't be put in order
    dead.die()
    process = new(REQUEST)
    await process.turn(2)
    assert account.trace == []
    assert caplog.text.count("Could not put") == 1
    (tmp_path / "folder").rmdir()
    await process.turn(2)
    assert process.cloud.numbers() == [1]


async def test_a_process_that_ended_well_may_leave_files_too(new: Processes) -> None:
    ended = new(REQUEST)
    ended.write(1)
    ended.close_files()
    process = new(REQUEST)
    await process.turn(2)
    assert process.cloud.numbers() == [1]
    ended.shipper.stopping = True
    await ended.turn(2)
    assert process.cloud.numbers() == [1]
    assert ended.ledger.account().discarded == {}, "it was not deleted: somebody else has shipped it"


async def test_a_file_that_its_process_still_ships_after_its_end_is_left_to_it(new: Processes) -> None:
    ending = new(REQUEST)
    ending.write(1)
    ending.lanes()
    ending.shipper._lanes[next(iter(ending.shipper._lanes))]._open_own()
    ending.close_files()
    process = new(REQUEST)
    await process.turn(2)
    assert process.cloud.numbers() == []
    await ending.turn()
    assert process.cloud.numbers() == [1]
    assert process.ledger.account().adopted == 0


async def test_a_file_of_its_own_is_not_taken_for_another_one_s(process: Process) -> None:
    """At the end its journal is gone, and the lane may not have been told of its last file yet."""
    process.write(1)
    await process.turn()
    process.seconds += 3600
    process.write(2)
    process.close_files()
    await next(iter(process.shipper._lanes.values())).turn()
    await process.turn(2)
    assert process.ledger.account().adopted == 0
    assert process.cloud.numbers() == [1, 2]


async def test_what_was_for_another_destination_goes_there(new: Processes, cloud: Cloud) -> None:
    dead = new(f"{OTHER_URL}/e/d/request")
    dead.write(1, body=dead.body())
    dead.die()
    process = new(REQUEST)
    await process.turn(3)
    assert process.left() == []
    assert len(cloud.account(OTHER_URL).lines()) == 1
    assert cloud.account(OTHER_URL).early == []


async def test_a_backlog_of_many_files_is_shipped_with_few_of_them_open(
    new: Processes, cloud: Cloud, account: Account
) -> None:
    dead = new(REQUEST, rate=RollingRate.MINUTE)
    for number in range(300):
        dead.write(number)
        dead.seconds += 60
    dead.die()
    before = open_files()
    process = new(REQUEST)
    process.write(1000)
    most = 0
    for _ in range(15):
        (pause,) = await process.turn()
        most = max(most, open_files() - before)
        if pause:
            break
        assert process.shipper.states()[0].lag_seconds > 0
    assert pause == process.shipper.interval_seconds  # once it has caught up, not before
    assert process.shipper.states()[0].lag_seconds == 0
    assert cloud.numbers() == [*range(300), 1000]
    assert most < 2 * lanes.MIRRORS
    assert process.ledger.account().adopted == 300
    assert account.most_in_flight <= lanes.FILES_AT_ONCE


async def test_more_files_of_its_own_than_can_be_open(new: Processes, cloud: Cloud, account: Account) -> None:
    """The destination is away for more files than that."""
    process = new(REQUEST, rate=RollingRate.MINUTE)
    account.plan = always(BUSY)
    for number in range(3 * lanes.MIRRORS):
        process.write(number)
        process.seconds += 60
        await process.turn()
    most = open_files()
    process.close_files()
    account.plan = None
    pauses = await process.turn(4)
    assert pauses == [0.0, 0.0, process.shipper.interval_seconds, process.shipper.interval_seconds]
    assert cloud.numbers() == list(range(3 * lanes.MIRRORS))
    assert process.pending() == 0
    assert most - open_files() <= lanes.MIRRORS + 3  # one for its root, its journal, the file that it writes


@pytest.mark.parametrize("seed", range(4))
async def test_processes_that_come_and_go_on_one_spool(
    new: Processes, cloud: Cloud, account: Account, seed: int
) -> None:
    """Two at a time, their turns mixed, one of them killed in the middle of it now and then."""
    chance = random.Random(seed)
    account.plan = flaky(seed, 0.2, Fault.REFUSED, Fault.LOST, Fault.LATE, Fault.FOREIGN)
    alive = [new(REQUEST, RESPONSE, roll_bytes=200) for _ in range(2)]
    number = 0
    for _ in range(60):
        turns = []
        for process in alive:
            for _ in range(chance.randrange(5)):
                body = {"body": process.body()} if chance.random() < 0.3 else {}
                process.write(number, collection=chance.choice("01"), **body)
                number += 1
            turns.append(asyncio.create_task(process.turn()))
        if chance.random() < 0.2:
            for _ in range(chance.randrange(20)):
                await asyncio.sleep(0)
            turns[0].cancel()
            await asyncio.wait([turns[0]])
            alive.pop(0).die()
            alive.append(new(REQUEST, RESPONSE, roll_bytes=200))
        await asyncio.gather(*turns, return_exceptions=True)
    for process in alive:
        process.die()
    account.plan = None
    last = new(REQUEST)
    await last.turn(12)
    assert cloud.numbers() == list(range(number))
    assert last.left() == []
    assert account.early == []
    assert len(new.all) > 5


# --- folders ---


async def test_folders_that_have_long_been_empty_are_removed_and_made_again(process: Process, tmp_path: Path) -> None:
    process.write(1)
    hour = process.left()[0].parent
    process.seconds += 3600
    process.write(2)
    await process.turn(2)
    assert list(hour.iterdir()) == []
    long_ago = time.time() - lanes.EMPTY_SECONDS - 60
    os.utime(hour, (long_ago, long_ago))
    await process.turn()
    assert not hour.exists()
    assert hour.parent.exists()
    process.seconds -= 3600
    process.write(3)
    process.close_files()
    await process.turn(2)
    for folder in sorted((path for path in (tmp_path / "https").rglob("*") if path.is_dir()), reverse=True):
        os.utime(folder, (long_ago, long_ago))
        await process.turn()
    assert [path for path in (tmp_path / "https").rglob("*") if path.is_dir()] != []
    assert process.cloud.numbers() == [1, 2, 3]


async def test_the_writer_survives_that_all_folders_are_removed(process: Process, tmp_path: Path) -> None:
    process.write(1)
    process.seconds += 3600
    process.files.begin(process.seconds)
    await process.turn(2)
    long_ago = time.time() - lanes.EMPTY_SECONDS - 60
    for _ in range(10):
        for folder in (path for path in (tmp_path / "https").rglob("*") if path.is_dir()):
            os.utime(folder, (long_ago, long_ago))
        await process.turn()
    assert not (tmp_path / "https/account.blob.core.windows.net/container").exists()
    process.write(2, body=process.body())
    await process.turn(2)
    assert process.cloud.numbers() == [1, 2]


async def test_a_folder_that_was_empty_for_a_moment_stays(process: Process) -> None:
    process.write(1)
    hour = process.left()[0].parent
    process.close_files()
    await process.turn(3)
    assert hour.is_dir()
    assert process.left() == []


async def test_other_people_s_files_are_left_alone(process: Process, account: Account) -> None:
    process.write(1)
    folder = process.left()[0].parent
    for name in ("notes.txt", ".hidden", "x.jsonl", f"{process.process_id}.jsonl", ".a.b.part"):
        (folder / name).write_bytes(b"theirs")
    (folder / "link").symlink_to("/")
    process.close_files()
    await process.turn(2)
    assert len(list(folder.iterdir())) == 6
    assert process.cloud.numbers() == [1]
    assert len(account.blobs) == 1


# --- pauses, and what the log says ---


def test_waits_become_longer_up_to_half_a_minute() -> None:
    backoff = Backoff()
    for longest in (0.5, 1, 2, 4, 8, 16, 30, 30, 30):
        assert longest / 2 <= backoff.seconds() <= longest
    for _ in range(2000):
        backoff.seconds()
    assert 15 <= backoff.seconds() <= 30


def test_waits_differ() -> None:
    """Else all replicas come at once when the destination is back."""
    assert len({Backoff(5).seconds() for _ in range(20)}) > 10


@pytest.mark.parametrize(("asked", "least", "most"), [(0, 0.25, 0.5), (7, 7.25, 7.5), (86_400, 300.25, 300.5)])
def test_the_destination_may_ask_for_a_pause(asked: float, least: float, most: float) -> None:
    assert least <= Backoff().seconds(asked) <= most


async def test_pauses_of_a_lane(process: Process, account: Account) -> None:
    process.write(1)
    account.plan = always(BUSY)
    for longest in (0.5, 1, 2, 4):
        (pause,) = await process.turn()
        assert longest / 2 <= pause <= longest
    account.plan = always(NotNow("busy", "it is busy.", 20))
    (pause,) = await process.turn()
    assert pause >= 20
    account.plan = None
    assert await process.turn() == [process.shipper.interval_seconds]
    process.write(2)
    account.plan = always(BUSY)
    assert (await process.turn())[0] <= 0.5, "it has worked since"


async def test_the_longest_pause_that_is_asked_for_counts(new: Processes, account: Account) -> None:
    process = new(REQUEST, RESPONSE, f"{URL}/e/d/third")
    for collection in "012":
        process.write(1, collection=collection)
    account.plan = lambda _, name: NotNow("busy", "it is busy.", 20) if "response" in name else BUSY
    (pause,) = await process.turn()
    assert pause >= 20
    for collection in "012":
        process.body(collection=collection)
    account.plan = lambda _, name: NotNow("busy", "it is busy.", 20) if "response" in name else BUSY
    (pause,) = await process.turn()
    assert pause >= 20


async def test_some_progress_keeps_pauses_short(new: Processes, account: Account) -> None:
    process = new(REQUEST, RESPONSE)
    account.plan = lambda operation, name: BUSY if operation == "append" and "response" in name else None
    for number in range(20):
        process.write(number, collection="0")
        process.write(100 + number, collection="1")
        (pause,) = await process.turn()
        assert pause <= 0.5
    assert process.cloud.numbers() == list(range(20))


async def test_what_lasts_is_told_once_and_its_end_once(
    process: Process, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    process.write(1)
    account.plan = always(FORBIDDEN)
    for number in range(2, 10):
        await process.turn()
        process.write(number)
    (lane,) = process.lanes()
    assert lane.trouble is not None
    assert [(state.url, state.trouble, state.words) for state in process.shipper.states()] == [
        (lane.url, "forbidden", FORBIDDEN.words)
    ]
    (told,) = messages(caplog)
    assert told.startswith(f"https://account.blob.core.windows.net/container: shipping fails: {FORBIDDEN}")
    assert str(lane.folder) in told
    caplog.clear()
    account.plan = None
    for number in range(10, 15):
        await process.turn()
        process.write(number)
    assert messages(caplog) == ["https://account.blob.core.windows.net/container: shipping goes on."]
    assert process.shipper.states()[0].trouble is None


async def test_what_passes_is_no_news(process: Process, account: Account, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5):
        process.write(number)
        account.plan = always(BUSY)
        await process.turn(lanes.TOLD_AFTER - 1)
        account.plan = None
        await process.turn()
    assert messages(caplog) == []
    process.write(5)
    account.plan = always(BUSY)
    await process.turn(10)
    assert len(messages(caplog)) == 1


async def test_reasons_that_alternate_are_told_once_each(
    process: Process, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    process.write(1)
    for _ in range(10):
        for error in (BUSY, NotNow("timeout", "no answer."), FORBIDDEN):
            account.plan = always(error)
            await process.turn()
    assert len(messages(caplog)) == 3
    account.plan = None
    await process.turn(3)
    assert messages(caplog)[3:] == ["https://account.blob.core.windows.net/container: shipping goes on."]


async def test_a_budget_that_is_full_of_what_is_shipped_is_given_back(new: Processes) -> None:
    """Files that are still written keep it; so they are closed."""
    process = new(REQUEST, RESPONSE, f"{URL}/e/d/small")
    process.budget.max_bytes = 200_000
    process.write(1, collection="0", text="x" * 90_000)
    process.write(2, collection="1", text="x" * 90_000)
    process.write(3, collection="2")
    await process.turn()
    (small,) = [path for path in process.content if "small" in path.parts]
    for collection in ("0", "1"):
        with pytest.raises(SpoolFull):
            process.files.append(collection, [b"x" * 50_000])
    await process.turn()
    assert process.left() == [small]  # it is not worth a file
    process.write(4, text="x" * 50_000)
    await process.turn()
    assert process.cloud.numbers() == [1, 2, 3, 4]


async def test_a_defect_while_the_spool_is_looked_through_ends_nothing(
    process: Process, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recover = recovery.recover
    failures = 0

    def fail(*arguments: Any) -> recovery.Recovered:
        nonlocal failures
        failures += 1
        if failures > 3:
            return recover(*arguments)
        raise ValueError("a defect")

    monkeypatch.setattr(recovery, "recover", fail)
    process.write(1)
    async with running(process):
        await until(lambda: process.cloud.numbers() == [1])
    assert len(messages(caplog)) == 1
    assert "could not be looked through, by a defect" in messages(caplog)[0]


async def test_when_shipping_has_ended_by_a_defect_its_state_says_so(
    process: Process, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process.write(1)
    async with running(process):
        await until(lambda: process.cloud.numbers() == [1])

        async def fail(_seconds: float) -> bool:
            raise ValueError("a defect")

        monkeypatch.setattr(process.shipper, "stopped_within", fail)
        await until(lambda: not process.shipper._worker.is_alive())
    assert [state.trouble for state in process.shipper.states()] == ["defect"]
    assert any("Shipping has ended, by a defect" in message for message in messages(caplog))


async def test_a_defect_is_told_and_the_lane_goes_on(
    process: Process, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    process.write(1)

    def fail(*_: object) -> None:
        raise KeyError("a defect")

    account.plan = fail
    (pause,) = await process.turn()
    assert pause > 0
    assert process.shipper.states()[0].trouble == "defect"
    account.plan = None
    await process.turn()
    assert process.cloud.numbers() == [1]
    assert "by a defect of payload-logger; nothing is lost." in messages(caplog)[0]
    assert process.shipper.states()[0].trouble is None


async def test_troubles_hold_no_files_open(process: Process, account: Account) -> None:
    for number in range(30):
        process.write(number, body=process.body())
    account.plan = always(BUSY)
    process.lanes()[0]._open_own()
    before = open_files()
    await process.turn(5)
    assert open_files() == before
    for error in (process.lanes()[0].trouble, *process.lanes()[0]._left.values()):
        assert error is not None
        frames = 0
        traceback = error.__traceback__
        while traceback is not None:
            frames, traceback = frames + 1, traceback.tb_next
        assert frames < 10


# --- identities ---


async def test_each_collection_has_its_identity(new: Processes, cloud: Cloud) -> None:
    """For its lines, and for its bodies, also those that are large: beside its root, or beside those of all."""
    own = f"{OTHER_URL}/own/root"
    process = new(REQUEST, RESPONSE, own, client_ids=["first", "second", "third"])
    for collection in "012":
        process.write(1, collection=collection, body=process.body(collection=collection, large=True))
        process.body(collection=collection)
    await process.turn()
    here, there = (url.removesuffix("/pre%20fix") for url in (URL, OTHER_URL))
    assert set(cloud.opened) == {(here, "first"), (here, "second"), (there, "third")}
    assert len(cloud.opened) == 3, "one store for all that has the same place and identity"


async def test_what_another_deployment_left_is_shipped_with_the_identity_that_there_is(
    new: Processes, cloud: Cloud
) -> None:
    dead = new(f"{URL}/e/blue/request")
    dead.write(1)
    dead.die()
    elsewhere = new(f"{OTHER_URL}/e/blue/request")
    elsewhere.write(2)
    elsewhere.die()
    process = new(f"{URL}/e/green/request", client_ids=["first"])
    await process.turn(2)
    assert set(cloud.opened) == {
        (URL.removesuffix("/pre%20fix"), "first"),
        (OTHER_URL, None),
    }
    assert cloud.numbers() == [1, 2]


async def test_a_root_within_another_has_its_own_identity(new: Processes, cloud: Cloud) -> None:
    process = new(OTHER_URL, f"{OTHER_URL}/within", client_ids=["outer", "inner"])
    process.write(1, collection="1")
    await process.turn()
    assert cloud.opened == [(OTHER_URL, "inner")]


# --- the thread ---


async def test_lines_and_files_that_come_while_it_runs(new: Processes, cloud: Cloud) -> None:
    process = new(REQUEST, roll_bytes=100)
    async with running(process):
        for number in range(50):
            process.write(number)
            await asyncio.sleep(0)
        await until(lambda: cloud.numbers() == list(range(50)))
        process.close_files()
        await process.shipper.finish(10)
    assert process.left() == []
    assert process.is_closed
    assert cloud.account().closed == 1
    assert process.pending() == 0


async def test_what_comes_at_the_end_is_shipped(new: Processes, cloud: Cloud) -> None:
    process = new(REQUEST, OTHER_URL, interval_seconds=3600)
    async with running(process):
        for number in range(5):
            process.write(number, collection="0", body=process.body())
            process.write(10 + number, collection="1", body=process.body(collection="1"))
        process.close_files()
        await process.shipper.finish(10)
    assert cloud.numbers() == [*range(5), *range(10, 15)]
    assert process.left() == []
    assert not cloud.account().early


async def test_a_blob_that_is_lost_at_the_end_is_followed_by_its_next(new: Processes, cloud: Cloud) -> None:
    process = new(REQUEST, interval_seconds=3600)
    cloud.account().plan = plan = flaky(1, 1, Fault.FOREIGN)
    async with running(process):
        for number in range(5):
            process.write(number)
        process.close_files()
        foreign = iter([True])
        cloud.account().plan = lambda operation, name: (
            plan(operation, name) if operation == "append" and next(foreign, False) else None
        )
        await process.shipper.finish(10)
    assert cloud.numbers() == list(range(5))
    assert process.left() == []


async def test_a_container_that_hangs_keeps_no_other_one_waiting(new: Processes, cloud: Cloud) -> None:
    process = new(REQUEST, OTHER_URL)
    hung = cloud.account(URL)
    hung.gate = asyncio.Event()
    async with running(process):
        process.write(1, collection="0")
        await until(lambda: hung.in_flight)
        for number in range(2, 10):
            process.write(number, collection="1")
            await until(lambda number=number: cloud.numbers()[-1:] == [number])  # type: ignore[misc]
        process.write(10, collection="1")
        process.close_files()
        await process.shipper.finish(0.5)
    assert cloud.numbers() == list(range(2, 11))
    assert len(process.left()) == 1, "what hangs is there for the next process"
    assert process.pending() == 1


async def test_a_container_that_fails_keeps_no_other_one_waiting(new: Processes, cloud: Cloud) -> None:
    process = new(REQUEST, OTHER_URL)
    cloud.account(URL).plan = always(NotNow("busy", "it is busy.", 300))
    async with running(process):
        process.write(1, collection="0")
        process.write(2, collection="1")
        await until(lambda: cloud.numbers() == [2])
        process.close_files()
        await process.shipper.finish(10)
    assert len(process.left()) == 1


async def test_it_ends_in_time_though_the_destination_hangs(
    new: Processes, cloud: Cloud, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of an append, and of puts: nothing goes on behind the back of whoever is told that it has ended."""
    process = new(REQUEST, RESPONSE)
    account = cloud.account()
    process.write(1, collection="0")
    process.write(2, collection="1")
    async with running(process):
        await until(lambda: cloud.numbers() == [1, 2])
        account.gate = asyncio.Event()
        for _ in range(20):
            process.body()
        process.write(3)
        await until(lambda: account.in_flight)
        process.close_files()
        async with asyncio.timeout(20):
            await process.shipper.finish(0.3)
    assert account.in_flight == 0
    assert process.is_closed
    assert messages(caplog) == []
    account.gate = None
    heir = new(REQUEST)
    await heir.turn(3)
    assert cloud.numbers() == [1, 2, 3]
    assert heir.left() == []


async def test_what_fails_at_the_end_is_tried_again(
    new: Processes, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "FIRST_RETRY_SECONDS", 0.01)
    process = new(REQUEST, interval_seconds=3600)
    left = lanes.TOLD_AFTER - 1

    def plan(operation: str, _name: str) -> NotNow | None:
        nonlocal left
        left -= operation == "append"
        return BUSY if operation == "append" and left >= 0 else None

    cloud.account().plan = plan
    async with running(process):
        process.write(1)
        process.close_files()
        await process.shipper.finish(10)
    assert cloud.numbers() == [1]
    assert process.left() == []


async def test_what_fails_for_good_does_not_keep_the_end_waiting(
    new: Processes, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "FIRST_RETRY_SECONDS", 0.01)
    process = new(REQUEST, interval_seconds=3600)
    cloud.account().plan = always(BUSY)
    async with running(process):
        process.write(1)
        process.close_files()
        async with asyncio.timeout(60):
            await process.shipper.finish(3600)
    assert cloud.account().calls.total() == lanes.TOLD_AFTER
    assert process.pending() == 1


async def test_appends_end_with_the_turn(new: Processes, account: Account) -> None:
    process = new(REQUEST, RESPONSE)
    process.write(1, collection="0")
    process.write(2, collection="1")
    account.gate = asyncio.Event()
    turn = asyncio.create_task(process.turn())
    while not account.in_flight:
        await asyncio.sleep(0)
    turn.cancel()
    await asyncio.wait([turn])
    assert account.in_flight == 0
    assert len(asyncio.all_tasks()) == 1


async def test_a_defect_does_not_make_the_end_hot(
    new: Processes, cloud: Cloud, caplog: pytest.LogCaptureFixture
) -> None:
    process = new(REQUEST, interval_seconds=3600)

    def fail(*_: object) -> None:
        raise KeyError("a defect")

    cloud.account().plan = fail
    async with running(process):
        process.write(1)
        process.close_files()
        await process.shipper.finish(5)
    assert 1 <= len(messages(caplog)) <= 3


async def test_what_a_process_that_dies_meanwhile_leaves_is_adopted(new: Processes, cloud: Cloud) -> None:
    process = new(REQUEST)
    async with running(process):
        other = new(f"{OTHER_URL}/x")  # there was nothing for that container before
        other.write(1)
        other.die()
        await until(lambda: cloud.numbers() == [1])
        await until(lambda: not process.left())
        await process.shipper.finish(10)
    assert process.ledger.account().adopted == 1


async def test_a_spool_that_can_t_be_read_for_now(
    new: Processes, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = threading.Event()
    failing.set()
    failed = 0
    recover = recovery.recover

    def fail(spool: Path, told: set[Path]) -> object:
        nonlocal failed
        if failing.is_set():
            failed += 1
            raise OSError(errno.EIO, "Input/output error")
        return recover(spool, told)

    monkeypatch.setattr(recovery, "recover", fail)
    process = new(REQUEST)
    async with running(process):
        process.write(1)
        await until(lambda: failed > 3)
        failing.clear()
        await until(lambda: cloud.numbers() == [1])
        await process.shipper.finish(10)
    assert len(messages(caplog)) == 1


async def test_folders_that_stand_for_nothing_are_passed_over(new: Processes, tmp_path: Path) -> None:
    (tmp_path / "azureml/a/b/c/d/e/f/g/h").mkdir(parents=True)
    (tmp_path / "https/account.blob.core.windows.net").mkdir(parents=True)
    (tmp_path / "https/account.blob.core.windows.net/file").touch()
    (tmp_path / "lost+found").mkdir()
    process = new(REQUEST)
    process.write(1)
    await process.turn()
    assert process.cloud.numbers() == [1]


# --- chores ---


async def test_a_chore_is_done_once(new: Processes) -> None:
    done: list[str] = []

    async def chore() -> None:
        done.append(threading.current_thread().name)

    process = new(REQUEST, chores=[chore, chore])
    async with running(process):
        await until(lambda: len(done) == 2)
        process.write(1)
        await until(lambda: process.cloud.numbers() == [1])
        await process.shipper.finish(10)
    assert done == ["shipper"] * 2


async def test_a_chore_that_fails_is_tried_again_and_told_once(
    new: Processes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lanes, "FIRST_RETRY_SECONDS", 0.001)
    monkeypatch.setattr(lanes, "LONGEST_RETRY_SECONDS", 0.001)
    tried = 0

    async def chore() -> None:
        nonlocal tried
        tried += 1
        if tried < 6:
            raise NotNow("forbidden", "the identity may not do this.")

    process = new(REQUEST, chores=[chore])
    async with running(process):
        process.write(1)
        await until(lambda: tried == 6)
        await until(lambda: process.cloud.numbers() == [1])
    assert messages(caplog) == ["the identity may not do this. It is tried again and again; nothing waits for it."]


async def test_a_chore_with_a_defect_costs_nothing_else(new: Processes, caplog: pytest.LogCaptureFixture) -> None:
    async def chore() -> None:
        raise KeyError("a defect")

    process = new(REQUEST, chores=[chore], interval_seconds=3600)
    async with running(process):
        await until(lambda: messages(caplog))
        process.write(1)
        process.close_files()
        await process.shipper.finish(10)
    assert process.cloud.numbers() == [1]
    assert process.left() == []
    assert len(messages(caplog)) == 1


async def test_a_chore_that_hangs_keeps_nothing_waiting_but_the_end(new: Processes) -> None:
    async def chore() -> None:
        await asyncio.Event().wait()

    process = new(REQUEST, chores=[chore], interval_seconds=3600)
    async with running(process):
        process.write(1)
        process.close_files()
        await process.shipper.finish(0.5)
    assert process.cloud.numbers() == [1]
    assert process.left() == []
