"""Drills 1 and 2 with Azure Blob: SIGKILL at random moments and at named points, while shipping goes on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.azure import faults
from tests.azure.blob_server import APPEND_BLOB, BlobServer
from tests.azure.faults import Fault
from tests.drills.load import ProxyProcess, until
from tests.drills.points import NEED_A_DEAD_ONE, NEED_A_FOREIGN_WRITE, POINTS
from tests.drills.shipping import FOREIGN, Arrived, Shipping, blobs_of, compare
from tests.drills.sizes import POINT_ROUNDS, SEED, SHIPPING_KILLS, patiently

CLIENTS = 20
FOREIGN_EVERY = 4  # appends


# --- 1: at random moments ---


@dataclass
class Kills:
    """What happened."""

    kills: int = 0
    in_flight: int = 0  # exchanges
    backlog_bytes: int = 0  # of lines, that no blob had when the proxy was killed


async def kill_at_random(shipping: Shipping, server: BlobServer, kills: int, *broken: str) -> Kills:
    """Every other thing that can go wrong with a request does so at the same time."""
    chance = random.Random(SEED)
    done = Kills()
    server.faults = faults.either(
        faults.flaky(SEED, 0.1), faults.ambiguous(SEED, 0.1), faults.always(faults.slow(0.005))
    )
    for round_ in range(kills):
        async with (
            shipping.process("hasty", *broken) as proxy,
            shipping.load(proxy, f"{round_}", connections=CLIENTS),
        ):
            exchanges, appends = len(shipping.traffic.seen), server.requests["append"]
            await until(lambda exchanges=exchanges: len(shipping.traffic.seen) > exchanges + CLIENTS)  # type: ignore[misc]
            if round_ % 2:
                await until(lambda appends=appends: server.requests["append"] > appends, 30)  # type: ignore[misc]
            await asyncio.sleep(chance.uniform(0, 0.4))
            done.in_flight += shipping.traffic.in_flight
            proxy.kill()
            done.kills += 1
            arrived_bytes = sum(len(data) for kind, data in blobs_of(server).values() if kind == APPEND_BLOB)
            done.backlog_bytes += shipping.kept_bytes() - arrived_bytes
    server.faults = None
    return done


@patiently
async def test_nothing_that_a_client_saw_is_lost_or_shipped_twice(
    shipping: Shipping, server: BlobServer, figure: Callable[[str, str], None]
) -> None:
    done = await kill_at_random(shipping, server, SHIPPING_KILLS)
    account = await shipping.deliver_rest()
    arrived = compare(shipping, blobs_of(server))
    figure(
        "1, SIGKILL at random",
        f"{done.kills} kills, {done.in_flight} exchanges in flight then, {done.backlog_bytes / 1e6:.1f} MB on the way; "
        f"{server.happened.total()} faults of the destination; {len(shipping.traffic.seen)} exchanges seen whole, "
        f"{arrived.lines} lines: {len(arrived.lost(shipping.traffic.seen))} lost, {len(arrived.doubled())} twice",
    )
    assert done.kills == SHIPPING_KILLS
    assert done.in_flight >= done.kills // 2, "the kills hit an idle proxy"
    assert done.backlog_bytes, "the kills came when all was shipped"
    assert server.happened.total() > done.kills
    assert len(shipping.traffic.seen) > CLIENTS * done.kills
    assert account[0] == account[1] > 0
    arrived.check(shipping.traffic)


async def test_the_drill_finds_a_proxy_that_answers_before_it_writes(shipping: Shipping, server: BlobServer) -> None:
    await kill_at_random(shipping, server, 3, "answer-first")
    await shipping.deliver_rest()
    assert compare(shipping, blobs_of(server)).lost(shipping.traffic.seen)


# --- 2: at named points ---

# Of an append: the server has it, and the proxy dies before it is answered.
SENT = {
    "append-not-applied": faults.RESET,
    "append-applied": faults.lost(),
    "append-applied-later": faults.late(0.2),
    "append-applied-after-the-next-one": faults.late("append"),
}
ALL_POINTS = [*POINTS, "within-write", *SENT]


def foreign_now_and_then(operation: str, _blob: str, number: int) -> Fault | None:
    return faults.foreign(FOREIGN) if operation == "append" and number % FOREIGN_EVERY == 0 else None


def kill_when_sent(victim: Callable[[], ProxyProcess], nth: int, fault: Fault) -> faults.Plan:
    """The server kills the proxy at the ``nth`` append from now on."""
    left = nth

    def plan(operation: str, _blob: str, _number: int) -> Fault | None:
        nonlocal left
        left -= operation == "append"
        if operation != "append" or left:
            return None
        victim().process.kill()
        return fault

    return plan


async def die_at(shipping: Shipping, server: BlobServer, point: str, name: str, chance: random.Random) -> None:
    """One process, which adopts what the last one left and dies at the point."""
    if point in NEED_A_DEAD_ONE:
        async with shipping.process() as dead, shipping.load(dead, f"before.{name}"):
            seen = len(shipping.traffic.seen)
            await until(lambda: len(shipping.traffic.seen) > seen + 20)
            dead.kill()
    arguments = []
    if point in POINTS:
        arguments = [f"die-at:{point}:{chance.randint(1, POINTS[point].most)}"]
    elif point == "within-write":
        arguments = ["die-in-write"]
    server.faults = foreign_now_and_then if point in NEED_A_FOREIGN_WRITE else None
    if point in SENT:
        server.faults = kill_when_sent(lambda: victim, chance.randint(1, 5), SENT[point])
    async with shipping.process("hasty", *arguments) as victim, shipping.load(victim, name):
        assert await victim.exit_status() == -9, victim.log()


@patiently
async def test_sigkill_at_every_point(
    shipping: Shipping, server: BlobServer, figure: Callable[[str, str], None]
) -> None:
    chance = random.Random(SEED)
    for round_ in range(POINT_ROUNDS):
        for point in chance.sample(ALL_POINTS, len(ALL_POINTS)):
            await die_at(shipping, server, point, f"{point}.{round_}", chance)
    server.faults = None
    await shipping.deliver_rest()
    arrived = compare(shipping, blobs_of(server))
    figure(
        "2, SIGKILL at named points",
        f"{len(ALL_POINTS)} points × {POINT_ROUNDS}: {', '.join(ALL_POINTS)}; {len(shipping.traffic.seen)} exchanges seen "
        f"whole, {arrived.lines} lines: {len(arrived.lost(shipping.traffic.seen))} lost, {len(arrived.doubled())} twice",
    )
    assert arrived.foreign == server.happened["foreign write"] >= POINT_ROUNDS
    assert server.happened["applied, then reset"] >= POINT_ROUNDS
    assert server.happened["late write applied"] + server.happened["late write refused"] >= POINT_ROUNDS
    arrived.check(shipping.traffic)


async def lost_by_a_kill_during_adoption(shipping: Shipping, server: BlobServer, *broken: str) -> Arrived:
    await server.down()
    async with shipping.process() as proxy:
        await shipping.send(proxy, "first", 40)
        proxy.kill()
    await server.up()
    server.faults = kill_when_sent(lambda: victim, 1, faults.RESET)
    async with shipping.process(*broken) as victim:
        assert await victim.exit_status() == -9
    server.faults = None
    await shipping.deliver_rest()
    return compare(shipping, blobs_of(server))


async def test_the_drill_finds_a_proxy_that_removes_files_before_the_blob_has_all(
    shipping: Shipping, server: BlobServer
) -> None:
    arrived = await lost_by_a_kill_during_adoption(shipping, server, "early-removal")
    assert arrived.lost(shipping.traffic.seen)
    assert arrived.gaps


async def test_the_same_with_the_proxy_as_it_is(shipping: Shipping, server: BlobServer) -> None:
    arrived = await lost_by_a_kill_during_adoption(shipping, server)
    arrived.check(shipping.traffic)
    assert arrived.lines == 80
