"""Drills 3 to 6, 11 and 12 with Azure Blob: the destination is down, flaky, ambiguous, forbids; stops; two on one spool."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import random
import resource
import signal
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from proxy.settings import MIB
from proxy.shipping.lane import BODIES_AT_ONCE, FILES_AT_ONCE, FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS
from tests.azure import faults
from tests.azure.blob_server import BlobServer
from tests.azure.faults import Fault, Refusal
from tests.drills.conftest import Figure
from tests.drills.load import PatientModel, Request, one_each, post, read_answer, stopped_account, until
from tests.drills.shipping import (
    FAILS,
    FOREIGN,
    GOES_ON,
    SOON_SECONDS,
    Arrived,
    Shipping,
    Witness,
    adopted,
    blobs_of,
    compare,
    request_of,
)
from tests.drills.sizes import (
    AMBIGUOUS_APPENDS,
    BACKLOG_MIB,
    CLOCK_STEPS,
    FLAKY_APPENDS,
    FORBIDDEN_SECONDS,
    FOREIGN_WRITES,
    OUTAGE_RATE,
    OUTAGE_SECONDS,
    SEED,
    STOPS,
    patiently,
)

GROWTH_BYTES = 32 * MIB


# --- 3: the destination is down ---


def without_streams(request_id: str) -> Request:
    request = request_of(request_id)
    return ("/echo", b"{}") if request[0] != "/echo" else request


def percentile(seconds: list[float], share: float) -> float:
    """In milliseconds."""
    return 1000 * sorted(seconds)[int(share * len(seconds))]


@patiently
async def test_an_outage(shipping: Shipping, server: BlobServer, figure: Figure) -> None:
    traffic = shipping.traffic
    shipping.request_of = without_streams  # which take as long as they like
    async with shipping.process(storage__ship_interval="200ms") as proxy:
        async with shipping.load(proxy, "load", per_second=OUTAGE_RATE):
            enough = OUTAGE_RATE * min(60, OUTAGE_SECONDS)  # for a p99 to compare with
            await until(lambda: server.requests["append"] > 4 and len(traffic.seen) > enough, 60 + SOON_SECONDS)
            before = len(traffic.seconds)
            proxy.forget_peak_memory()
            memory, bytes_before = proxy.peak_memory_bytes(), shipping.kept_bytes()

            await server.down()
            began = time.monotonic()
            await until(lambda: time.monotonic() - began > OUTAGE_SECONDS, math.inf)
            during = traffic.seconds[before:].tolist()
            backlog, came_in = shipping.kept_bytes() - bytes_before, time.monotonic() - began

            growth_during = proxy.peak_memory_bytes() - memory
            appends = server.requests["append"]
            await server.up()
            await until(lambda: server.requests["append"] > appends, SOON_SECONDS)  # it comes to look when it is due
            back = time.monotonic()
            # But for what a second brings: more comes all the while, and the moment when all is there may never be seen.
            await shipping.all_is_at(server, SOON_SECONDS + OUTAGE_SECONDS / 2, but=backlog / came_in)
            caught_up = time.monotonic() - back
        growth = proxy.peak_memory_bytes() - memory
        account = await shipping.stop(proxy)
    figure(
        f"3, destination down for {OUTAGE_SECONDS} s at {OUTAGE_RATE} requests/s",
        f"{len(during)} exchanges meanwhile, p99 {percentile(traffic.seconds[:before].tolist(), 0.99):.1f} ms before, "
        f"{percentile(during, 0.99):.1f} ms during; backlog {backlog / 1e6:.1f} MB, caught up in {caught_up:.2f} s "
        f"({came_in / caught_up:.0f} × as fast as it came); memory + {growth_during / MIB:.1f} MiB during, "
        f"+ {growth / MIB:.1f} MiB in all; account {account}",
    )
    assert len(during) > OUTAGE_SECONDS
    assert traffic.cut == set()
    assert account == (2 * len(traffic.seen), 2 * len(traffic.seen), 0, 0)
    assert shipping.log().count(FAILS) == shipping.log().count(GOES_ON) <= 1
    compare(shipping, blobs_of(server)).check(traffic)
    assert growth <= GROWTH_BYTES


@patiently
async def test_a_large_backlog(shipping: Shipping, server: BlobServer, figure: Figure) -> None:
    """It takes no memory, and no time at the start."""
    text = "x" * (MIB // 4 - 1024)  # a request and a response of 256 KiB each
    shipping.request_of = lambda request_id: ("/echo", f'{{"id":"{request_id}","text":"{text}"}}'.encode())
    await server.down()
    async with shipping.process() as proxy:
        await shipping.send(proxy, "load", 2 * BACKLOG_MIB)
        account = await shipping.stop(proxy)
        assert account == (4 * BACKLOG_MIB, 0, 0, 4 * BACKLOG_MIB)
    began = time.monotonic()
    async with shipping.process() as proxy:
        ready = time.monotonic() - began
        await until(lambda: FAILS in proxy.log(), SOON_SECONDS)  # it has loaded all
        proxy.forget_peak_memory()
        memory = proxy.peak_memory_bytes()
        await server.up()
        appends = server.requests["append"]
        await until(lambda: server.requests["append"] > appends, SOON_SECONDS)
        began = time.monotonic()
        await until(lambda: not shipping.spooled(), 60 * SOON_SECONDS)
        seconds = time.monotonic() - began
        growth = proxy.peak_memory_bytes() - memory
        assert adopted(proxy) == 0
        account = await shipping.stop(proxy)
        assert account == (4 * BACKLOG_MIB, 4 * BACKLOG_MIB, 0, 0)
        assert adopted(proxy) == 4 * BACKLOG_MIB
    figure(
        f"3, backlog of {shipping.kept_bytes() / MIB:.0f} MiB",
        f"ready after {ready:.2f} s, shipped at {shipping.kept_bytes() / seconds / 1e6:.0f} MB/s, "
        f"memory + {growth / MIB:.1f} MiB",
    )
    compare(shipping, blobs_of(server)).check(shipping.traffic)
    assert growth <= GROWTH_BYTES


# --- 4: the destination is flaky ---

WAIT_SECONDS = 1
RETRY_AFTER_EVERY = 40  # appends
FLAKY = (
    faults.refused(503, "ServerBusy"),
    faults.refused(429, "TooManyRequests"),
    faults.INTERNAL_ERROR,
    faults.TIMED_OUT,
    faults.REQUEST_TIMEOUT,
    faults.RESET,
    faults.HANG,
)


def asks_to_wait(operation: str, _blob: str, number: int) -> Fault | None:
    """A Retry-After now and then; on each of thousands of failures it would take hours."""
    asked = (faults.busy(WAIT_SECONDS), faults.refused(429, "TooManyRequests", WAIT_SECONDS))
    due = operation == "append" and number % RETRY_AFTER_EVERY == 0
    return asked[number // RETRY_AFTER_EVERY % 2] if due else None


def waits(witness: Witness) -> list[float]:
    """How long the proxy left each blob in peace for which it was asked to wait."""
    found = []
    last: dict[str, float] = {}
    for _, blob, when, fault in witness.seen:
        if blob in last:
            found.append(when - last.pop(blob))
        if fault is not None and isinstance(fault.answer, Refusal) and fault.answer.retry_after_seconds:
            last[blob] = when
    return found


@patiently
async def test_a_flaky_destination(shipping: Shipping, server: BlobServer, figure: Figure) -> None:
    server.faults = witness = Witness(faults.either(asks_to_wait, faults.at_random(SEED, 0.3, FLAKY)))
    async with shipping.process("hasty", "small-blocks") as proxy:
        async with shipping.load(proxy, "load", per_second=50):
            await until(lambda: server.requests["append"] >= FLAKY_APPENDS, FLAKY_APPENDS)
        server.faults = None
        await shipping.all_is_at(server)
        account = await shipping.stop(proxy)
    waited = waits(witness)
    arrived = compare(shipping, blobs_of(server))
    figure(
        "4, flaky destination",
        f"{server.requests['append']} appends, {server.requests['put']} puts, {server.happened.total()} requests failed "
        f"({', '.join(f'{count} × {name}' for name, count in sorted(server.happened.items()))}); "
        f"{len(waited)} times asked to wait {WAIT_SECONDS} s, waited {min(waited):.2f} s at least; {arrived.lines} lines: "
        f"{len(arrived.lost(shipping.traffic.seen))} lost, {len(arrived.doubled())} twice",
    )
    assert {fault.name for fault in FLAKY} <= set(server.happened)
    assert server.happened.total() > FLAKY_APPENDS // 5
    assert len(waited) >= FLAKY_APPENDS // RETRY_AFTER_EVERY // 2
    assert min(waited) >= WAIT_SECONDS - 0.05  # the clocks of two loops
    assert account == (2 * len(shipping.traffic.seen), 2 * len(shipping.traffic.seen), 0, 0)
    arrived.check(shipping.traffic)


# --- 5: appends of which nobody knows whether they worked ---


async def ambiguous_appends(
    shipping: Shipping, server: BlobServer, appends: int, foreign_writes: int, *broken: str
) -> Arrived:
    def ambiguous() -> int:
        return sum(count for name, count in server.happened.items() if name.startswith("applied"))

    foreign = faults.at_random(SEED, foreign_writes / (2 * appends), (faults.foreign(FOREIGN),), "append")
    server.faults = faults.either(foreign, faults.ambiguous(SEED))
    async with shipping.process("hasty", "small-blocks", *broken) as proxy:
        async with shipping.load(proxy, "load", per_second=100):
            await until(
                lambda: ambiguous() >= appends and server.happened["foreign write"] >= foreign_writes, 60 + appends
            )
        server.faults = None
        if not broken:
            await shipping.all_is_at(server)
            assert (await shipping.stop(proxy))[2:] == (0, 0)
    return compare(shipping, blobs_of(server))


@patiently
async def test_ambiguous_appends(shipping: Shipping, server: BlobServer, figure: Figure) -> None:
    arrived = await ambiguous_appends(shipping, server, AMBIGUOUS_APPENDS, FOREIGN_WRITES)
    happened = dict(server.happened)
    figure(
        "5, ambiguous appends and foreign writers",
        f"{server.requests['append']} appends, "
        f"{', '.join(f'{count} × {name}' for name, count in sorted(happened.items()))}; {arrived.lines} lines in "
        f"{len([key for key in server.blobs if key.endswith('.jsonl')])} blobs: {len(arrived.lost(shipping.traffic.seen))} "
        f"lost, {len(arrived.doubled())} twice, {len(arrived.wrong)} foreign bytes written over",
    )
    assert {fault.name for fault in faults.AMBIGUOUS} <= set(happened)
    assert happened["late write applied"]
    assert happened["late write refused"]
    assert arrived.foreign == happened["foreign write"] >= FOREIGN_WRITES
    assert arrived.lines == 2 * len(shipping.traffic.seen)
    arrived.check(shipping.traffic)


async def test_the_drill_finds_appends_without_a_position(shipping: Shipping, server: BlobServer) -> None:
    assert (await ambiguous_appends(shipping, server, 20, 0, "no-position")).doubled()


async def test_the_drill_finds_a_position_that_is_assumed(shipping: Shipping, server: BlobServer) -> None:
    arrived = await ambiguous_appends(shipping, server, 20, 0, "assumed-position")
    assert arrived.lost(shipping.traffic.seen)


# --- 6: the destination forbids it, or is not there ---


def most_requests(seconds: float) -> int:
    """That back-off lets through in this time. A pause is twice as long as the last one, of which half may be left out."""
    turns, at = 2, 0.0
    while at < seconds:
        at += min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** (turns - 2)) / 2
        turns += 1
    return turns * (2 * BODIES_AT_ONCE + FILES_AT_ONCE)


@patiently
async def test_it_is_forbidden_for_a_while(shipping: Shipping, server: BlobServer, figure: Figure) -> None:
    async with shipping.process(storage__ship_interval="200ms") as proxy, shipping.load(proxy, "load", per_second=100):
        for period, refusal in enumerate((faults.NOT_PERMITTED, faults.NOT_AUTHENTICATED), start=1):
            await until(lambda: server.requests["append"], SOON_SECONDS)
            before, began = server.requests.total(), time.monotonic()
            server.faults = faults.always(refusal)
            await until(lambda period=period: proxy.log().count(FAILS) == period, SOON_SECONDS)  # type: ignore[misc]
            await until(lambda began=began: time.monotonic() - began > FORBIDDEN_SECONDS, math.inf)  # type: ignore[misc]
            refused, seconds = server.requests.total() - before, time.monotonic() - began
            server.faults = None
            figure(
                f"6, {refusal.answer} for {seconds:.1f} s",
                f"{refused} requests meanwhile (at most {most_requests(seconds)}), logged once",
            )
            assert refused <= most_requests(seconds)
            await until(lambda period=period: proxy.log().count(GOES_ON) == period, SOON_SECONDS)  # type: ignore[misc]
            appends = server.requests["append"]
            await until(lambda appends=appends: server.requests["append"] > appends, SOON_SECONDS)  # type: ignore[misc]
    async with shipping.process() as proxy:
        await until(lambda: not shipping.spooled(), SOON_SECONDS)
        await shipping.stop(proxy)
    assert shipping.log().count(FAILS) == shipping.log().count(GOES_ON) == 2
    assert "ERROR" not in shipping.log().replace(f"ERROR   {shipping.account_url}/drill: {FAILS}", "")
    compare(shipping, blobs_of(server)).check(shipping.traffic)


async def test_a_container_that_is_missing_and_may_not_be_made(shipping: Shipping, server: BlobServer) -> None:
    server.faults = faults.always(faults.NOT_PERMITTED, "create_container")
    async with shipping.process() as proxy:
        await shipping.send(proxy, "load", 40)
        await until(lambda: FAILS in proxy.log(), SOON_SECONDS)
        assert f"there is no container {shipping.account_url}/drill, and it can't be made" in proxy.log()
        assert server.blobs == {}
        server.faults = None
        await shipping.all_is_at(server)
        assert await shipping.stop(proxy) == (80, 80, 0, 0)
        assert proxy.log().count(FAILS) == 1
    compare(shipping, blobs_of(server)).check(shipping.traffic)


async def test_a_container_that_is_deleted(shipping: Shipping, server: BlobServer) -> None:
    """It is made again. What was in it is gone with it, but for the lines whose files are still in the spool."""
    async with shipping.process() as proxy:
        async with shipping.load(proxy, "load", per_second=100):
            await until(lambda: server.requests["append"] > 4, SOON_SECONDS)
            bodies = {key: blob for key, blob in server.blobs.items() if blob.kind != "AppendBlob"}
            server.containers.clear()
            server.blobs.clear()
            appends = server.requests["append"]
            await until(lambda: server.requests["append"] > appends + 4, SOON_SECONDS)
        await shipping.all_is_at(server)
        account = await shipping.stop(proxy)
    assert account == (2 * len(shipping.traffic.seen), 2 * len(shipping.traffic.seen), 0, 0)
    compare(shipping, blobs_of(server) | {key: (blob.kind, blob.data) for key, blob in bodies.items()}).check(
        shipping.traffic
    )


CANARY = base64.b64encode(b"canary: an account key of which nobody may see a byte").decode()


@pytest.mark.parametrize(
    "variables",
    [
        {"AZURE_STORAGE_KEY": CANARY},
        {"AZURE_STORAGE_SAS_TOKEN": f"sv=2025-07-05&se=2030-01-01&sp=racw&sig={quote(CANARY, safe='')}"},
        {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName=devstoreaccount1;AccountKey={CANARY}"},
    ],
    ids=lambda variables: next(iter(variables)),
)
async def test_no_secret_in_a_log_or_a_file(variables: dict[str, str], shipping: Shipping, server: BlobServer) -> None:
    """Neither a key nor a signature, whatever goes wrong, with the log at its most talkative."""
    every_refusal = (
        *(fault for fault in vars(faults).values() if isinstance(fault, Fault) and fault is not faults.HANG),
        faults.refused(403, "AuthorizationFailure"),
        faults.refused(400, "InvalidHeaderValue"),
    )
    server.faults = faults.at_random(SEED, 0.5, every_refusal)
    async with shipping.process("hasty", environment=variables, logs__level="debug") as proxy:
        async with shipping.load(proxy, "load", per_second=50):
            await until(lambda: len(server.happened) >= len({f.name for f in every_refusal}), SOON_SECONDS)
        server.faults = None
        await shipping.all_is_at(server)
        await shipping.stop(proxy)
    assert FAILS in shipping.log()
    secrets = {CANARY, quote(CANARY, safe=""), quote(CANARY)}
    secrets |= {one.removeprefix("sig=").rpartition(":")[2] for one in server.authorizations}
    secrets -= {""}  # of a request without any
    contents = [path.read_text(errors="replace") for path in shipping.folder.rglob("*") if path.is_file()]
    contents += [bytes(blob.data).decode(errors="replace") for blob in server.blobs.values()]
    assert not [content for content in contents if any(secret in content for secret in secrets)]


# --- 11: SIGTERM ---


@pytest.mark.promise("E18")
async def test_sigterm_delivers_what_is_in_flight(
    patient: PatientModel, shipping: Shipping, server: BlobServer
) -> None:
    shipping.model_url = patient.server.url
    async with shipping.process(proxy__drain_seconds=20) as proxy:
        clients = one_each(shipping.traffic, proxy.port, 50)
        await until(lambda: patient.waiting == 50)
        proxy.signal(signal.SIGTERM)
        await until(lambda: "Stopping" in proxy.log())
        patient.answer.set()
        await clients
        assert await proxy.exit_status() == 0
        assert stopped_account(proxy) == (100, 100, 0, 0)
    assert len(shipping.traffic.seen) == 50
    assert not shipping.spooled()
    arrived = compare(shipping, blobs_of(server))
    assert arrived.lines == 100
    assert arrived.lost(shipping.traffic.seen) == arrived.doubled() == set()


@pytest.mark.promise("E18")
@patiently
async def test_sigterm_with_a_backlog(shipping: Shipping, server: BlobServer, figure: Figure) -> None:
    """The destination is down, or does not answer: exit 0 within the grace; the next process delivers the rest."""
    chance = random.Random(SEED)
    longest = 0.0
    for round_ in range(STOPS):
        for kind in ("down", "hangs", "slow"):
            if kind == "down":
                await server.down()
            server.faults = {"down": None, "hangs": faults.always(faults.HANG), "slow": faults.always(faults.slow(1))}[
                kind
            ]
            sent = len(shipping.traffic.seen)
            async with shipping.process(proxy__drain_seconds=1, storage__ship_interval="100ms") as proxy:
                async with shipping.load(proxy, f"{kind}.{round_}", per_second=200):
                    await until(lambda sent=sent: len(shipping.traffic.seen) >= sent + 50)  # type: ignore[misc]
                    await asyncio.sleep(chance.uniform(0, 0.2))
                    proxy.signal(signal.SIGTERM)
                    began = time.monotonic()
                    assert await proxy.exit_status() == 0
                    longest = max(longest, time.monotonic() - began)
                _, _, discarded, pending = stopped_account(proxy)
                assert discarded == 0
                assert kind == "slow" or pending >= 100
            assert "Stopped" in proxy.log()
            if kind == "down":
                await server.up()
    server.faults = None
    await shipping.deliver_rest()
    arrived = compare(shipping, blobs_of(server))
    figure(
        "11, SIGTERM with a backlog",
        f"{3 * STOPS} stops, {longest:.1f} s at most until exit 0; {arrived.lines} lines: "
        f"{len(arrived.lost(shipping.traffic.seen))} lost, {len(arrived.doubled())} twice",
    )
    arrived.check(shipping.traffic)


@pytest.mark.parametrize("refusal", [faults.INTERNAL_ERROR, faults.busy(), faults.RESET], ids=lambda fault: fault.name)
async def test_sigterm_when_the_destination_fails_just_then(
    refusal: Fault, shipping: Shipping, server: BlobServer
) -> None:
    """It is tried again within the grace: there may be no next process on this spool."""
    failed = 0
    server.faults = faults.always(refusal)
    async with shipping.process() as proxy:
        await shipping.send(proxy, "load", 40)
        await until(lambda: FAILS in proxy.log(), SOON_SECONDS)

        def twice_more(_operation: str, _blob: str, _number: int) -> Fault | None:
            nonlocal failed
            failed += "Stopping" in proxy.log()
            return refusal if failed <= 2 else None

        server.faults = twice_more
        assert await shipping.stop(proxy) == (80, 80, 0, 0)
    assert failed > 2
    assert not shipping.spooled()
    compare(shipping, blobs_of(server)).check(shipping.traffic)


async def test_a_second_sigterm_ends_at_once(shipping: Shipping, server: BlobServer) -> None:
    server.faults = faults.always(faults.HANG)
    async with shipping.process(proxy__drain_seconds=60) as proxy:
        await shipping.send(proxy, "load", 100)
        await until(lambda: server.happened["hang"], SOON_SECONDS)
        proxy.signal(signal.SIGTERM)
        await until(lambda: "Stopping" in proxy.log())
        while "Stopped" not in proxy.log():  # those that come at once are taken for the same signal
            proxy.signal(signal.SIGTERM)
            await asyncio.sleep(0.01)
        assert await proxy.exit_status() == 1
        assert stopped_account(proxy) == (200, 0, 0, 200)
    server.faults = None
    account = await shipping.deliver_rest()
    assert account[:2] == (200, 200)
    compare(shipping, blobs_of(server)).check(shipping.traffic)


# --- 12: two on one spool, the clock, no file descriptors left ---


async def test_two_processes_on_one_spool(shipping: Shipping, server: BlobServer) -> None:
    """Each ships its own; when one dies, the other ships what it left, without a restart."""
    server.faults = faults.always(faults.slow(0.01))
    async with shipping.process() as first, shipping.load(first, "first"):
        [journal] = shipping.spool.glob("*.journal")

        def left_by_others() -> list[Path]:
            return [path for path in shipping.spooled("*.jsonl") if not path.name.startswith(journal.stem)]

        async with shipping.process() as second, shipping.load(second, "second"):
            await until(lambda: server.requests["append"] > 10, SOON_SECONDS)
            await server.down()
            seen = len(shipping.traffic.seen)
            await until(lambda: len(shipping.traffic.seen) > seen + 200, SOON_SECONDS)  # so that there is a backlog
            second.kill()
        assert left_by_others()
        await server.up()
        await until(lambda: not left_by_others(), SOON_SECONDS)
        assert list(shipping.spool.glob("*.journal")) == [journal]
        async with shipping.process() as third, shipping.load(third, "third"):
            appends = server.requests["append"]
            await until(lambda: server.requests["append"] > appends + 10, SOON_SECONDS)
            first.signal(signal.SIGTERM)
            third.signal(signal.SIGTERM)
            assert await first.exit_status(SOON_SECONDS) == 0
            assert await third.exit_status(SOON_SECONDS) == 0
        assert adopted(first) > 0
        for proxy in (first, third):
            assert stopped_account(proxy)[2:] == (0, 0)
    assert not shipping.spooled()
    compare(shipping, blobs_of(server)).check(shipping.traffic)


@patiently
async def test_the_clock_steps(shipping: Shipping, server: BlobServer, figure: Figure) -> None:
    """Over the edge of an hour and back, by a day, by seconds."""

    def partitions() -> set[str]:
        return {key.rpartition("/")[0] for key in server.blobs if key.endswith(".jsonl")}

    async with shipping.process("clock-steps") as proxy:
        async with shipping.load(proxy, "load", per_second=200):
            await until(lambda: len(list(shipping.kept.iterdir())) > 2 * CLOCK_STEPS, SOON_SECONDS + CLOCK_STEPS)
        await shipping.all_is_at(server)
        assert await shipping.stop(proxy) == (2 * len(shipping.traffic.seen), 2 * len(shipping.traffic.seen), 0, 0)
    arrived = compare(shipping, blobs_of(server))
    figure(
        "12, the clock steps",
        f"{len(list(shipping.kept.iterdir())) // 2} partitions begun, {len(partitions()) // 2} of them different; "
        f"{arrived.lines} lines: {len(arrived.lost(shipping.traffic.seen))} lost, {len(arrived.doubled())} twice",
    )
    assert len(partitions()) >= 2 * 4
    assert not shipping.spooled()
    arrived.check(shipping.traffic)


async def test_no_file_descriptors_left(shipping: Shipping, server: BlobServer) -> None:
    """Clients take them all. What was recorded is shipped when they are gone, and the log is not full of it."""
    limit = 64

    def few_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    async with shipping.process(before_start=few_descriptors, data_collector__rolling_rate="Minute") as proxy:
        crowd = []
        for _ in range(2 * limit):
            with contextlib.suppress(OSError):
                crowd.append(await asyncio.open_connection("127.0.0.1", proxy.port))
        await until(lambda: proxy.open_files() >= limit - 1)
        served = await asyncio.gather(*(ask(shipping, n, *connection) for n, connection in enumerate(crowd)))
        await until(lambda: "could not be looked through: [Errno 24]" in proxy.log(), SOON_SECONDS)
        for _, writer in crowd:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        assert not all(served), "there were descriptors enough"
        await until(lambda: proxy.open_files() < limit // 2)
        shipping.traffic.cut.clear()
        await shipping.send(proxy, "afterwards", 100)
        await shipping.all_is_at(server)
        received, delivered, discarded, pending = await shipping.stop(proxy)
    assert len(shipping.log().splitlines()) < 60, shipping.log()
    assert "Traceback" not in shipping.log()
    assert (pending, received) == (0, delivered + discarded)
    arrived = compare(shipping, blobs_of(server))
    assert arrived.lines == delivered
    assert len(arrived.lost(shipping.traffic.seen)) <= discarded
    assert arrived.wrong == arrived.gaps == arrived.twice == []
    assert arrived.doubled() == set()


async def ask(shipping: Shipping, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """One exchange; whether the connection was served."""
    request_id = f"crowd.{number}"
    path, body, *content_type = shipping.request_of(request_id)
    shipping.traffic.sent.add(request_id)
    try:
        async with asyncio.timeout(3):
            writer.write(post(path, body, request_id, *content_type))
            status, _, _ = await read_answer(reader)
    except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
        shipping.traffic.cut.add(request_id)
        return False
    if status == 200:
        shipping.traffic.seen.add(request_id)
    return status == 200
