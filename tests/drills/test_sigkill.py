"""Drill 1: SIGKILL at random moments under load, restart on the same storage."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.drills.load import Dataset, Traffic, proxy_process, until
from tests.drills.sizes import KILLS, SEED, patiently

CONNECTIONS = 20
_RECOVERED = re.compile(r"what (\d+) ended process\(es\) left: (\d+) torn lines cut off")


@dataclass
class Drill:
    """What happened."""

    traffic: Traffic = field(default_factory=Traffic)
    kills: int = 0
    kills_in_write: int = 0
    in_flight_at_kills: int = 0
    torn_found: int = 0  # by this test, right after a kill
    torn_cut: int = 0  # by the proxy, according to its log
    processes_recovered: int = 0

    def note_recovery(self, log: str) -> None:
        if found := _RECOVERED.search(log):
            self.processes_recovered += int(found[1])
            self.torn_cut += int(found[2])


def mixed_requests(random_: random.Random) -> Iterator[tuple[str, bytes]]:
    """Small JSON for the most part, some streams, some bodies whose lines take the kernel a while to write."""
    for _ in itertools.count():
        kind = random_.random()
        if kind < 0.8:
            yield "/score", b'{"data": [[6, 3, 5, 2]]}'
        elif kind < 0.95:
            yield f"/stream?tokens={random_.randrange(1, 6)}", b"{}"
        else:
            yield "/echo", b'["%b"]' % (b"x" * random_.randrange(200_000))


async def drill(model: str, storage: Path, kills: int, *, broken: str | None = None) -> Drill:
    random_ = random.Random(SEED)
    done = Drill()
    for round_ in range(kills):
        fault = "die-in-write" if broken is None and round_ % 5 == 4 else broken
        # On a machine that is busy with other things an answer may leave after max_hold; that is another promise.
        async with proxy_process(model, storage, broken=fault, spool__max_hold="20s") as proxy:
            done.note_recovery(proxy.log())
            clients = [
                asyncio.create_task(
                    done.traffic.client(
                        proxy.port, f"{round_}.{number}", mixed_requests(random.Random(f"{SEED}/{round_}/{number}"))
                    )
                )
                for number in range(CONNECTIONS)
            ]
            if fault == "die-in-write":
                assert await proxy.exit_status() == -9
                done.kills_in_write += 1
            else:
                before = len(done.traffic.seen)
                await until(lambda before=before: len(done.traffic.seen) > before + CONNECTIONS)  # type: ignore[misc]
                await asyncio.sleep(random_.uniform(0, 0.25))
                done.in_flight_at_kills += done.traffic.in_flight
                proxy.kill()
            done.kills += 1
            await asyncio.gather(*clients)
        done.torn_found += len(Dataset.read(storage).torn_files)
    async with proxy_process(model, storage) as proxy:
        done.note_recovery(proxy.log())
    return done


@patiently
async def test_nothing_that_a_client_saw_is_lost(
    model: str, tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    done = await drill(model, tmp_path / "data", KILLS)
    dataset = Dataset.read(tmp_path / "data")
    figure(
        "1, SIGKILL at random, local storage",
        f"{done.kills} kills, {done.kills_in_write} of them within a write, {done.in_flight_at_kills} exchanges in flight "
        f"then, {done.torn_found} torn files; {len(done.traffic.seen)} exchanges seen whole, {dataset.lines} lines: "
        f"{len(dataset.lost(done.traffic.seen))} lost, {len(dataset.doubled())} twice",
    )

    assert done.kills == KILLS
    assert done.in_flight_at_kills >= done.kills - done.kills_in_write, "the kills hit an idle proxy"
    assert done.torn_found >= done.kills_in_write, "no write was interrupted"
    assert len(done.traffic.seen) > 20 * KILLS

    assert set(done.traffic.statuses) == {200}
    assert dataset.lost(done.traffic.seen) == set()
    assert dataset.doubled() == set()
    assert set(dataset.ids["response"]) <= done.traffic.sent
    assert dataset.invalid_lines == []
    assert dataset.torn_files == []
    assert done.torn_cut == done.torn_found
    assert done.processes_recovered == done.kills


async def test_the_drill_finds_a_proxy_that_answers_before_it_writes(model: str, tmp_path: Path) -> None:
    done = await drill(model, tmp_path / "data", 3, broken="answer-first")
    dataset = Dataset.read(tmp_path / "data")
    assert done.kills == 3
    assert dataset.lost(done.traffic.seen), "the drill can't tell a broken proxy from a good one"
