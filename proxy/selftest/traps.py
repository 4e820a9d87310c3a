"""What the proxy costs in time, and what has to be known of a server to put a proxy before it."""

from __future__ import annotations

import contextlib
import math
from time import perf_counter

from proxy import ids
from proxy.relay.headers import Forwarding
from proxy.selftest.plan import HEADER_BYTES, Plan, Way
from proxy.selftest.report import Found, Report
from proxy.selftest.wire import Link, LostError, Message, Outcome, Side
from proxy.settings import ForwardedHeaders, Proxy

LATENCY_SECONDS = 60.0  # the timed requests end then, however many there were
STREAM_SECONDS = 0.1  # an answer whose end comes so much later than its beginning is a stream
STREAM_TRIES = 3
IDLE_SECONDS = 2.0  # beyond proxy.upstream_keepalive: how long an idle connection is watched
LONGEST_IDLE_SECONDS = 10.0
OWN_HEAD_BYTES = 1024  # generous, of a head beside its long header


async def time(plan: Plan, report: Report, direct: Side, through: Side) -> None:
    """Sends the request alternately directly and through the proxy, one at a time, on connections that are kept."""
    if not plan.count:
        return
    taken: tuple[list[float], list[float]] = ([], [])
    lost: tuple[list[str], list[str]] = ([], [])
    end = perf_counter() + LATENCY_SECONDS
    async with Link(direct) as straight, Link(through) as relayed:
        links = (straight, relayed)
        for number in range(-plan.warm_up, plan.count):
            for side in (0, 1) if number % 2 else (1, 0):
                started = perf_counter()
                try:
                    await links[side].ask(plan.plainest)
                except LostError as error:
                    lost[side].append(str(error))
                else:
                    if number >= 0:
                        taken[side].append(perf_counter() - started)
            if perf_counter() > end:
                break
    if lost[0]:
        report.line(Found.NOTE, "not answered directly", f"{len(lost[0])} timed requests: {lost[0][-1]}")
    if lost[1]:
        found = Found.NOTE if lost[0] else Found.DIFFERS
        report.line(found, "not answered through it", f"{len(lost[1])} timed requests: {lost[1][-1]}")
    if all(taken):
        _table(report, str(plan.request), taken)


def _table(report: Report, request: str, taken: tuple[list[float], list[float]]) -> None:
    count = min(map(len, taken))
    parts = {"p50": 0.5, "p90": 0.9, **({"p99": 0.99} if count >= 100 else {}), "slowest": 1.0}
    report.heading(
        f"Milliseconds for {request}: {count} times each, in turn, one at a time; client and proxy share a process"
    )
    report.plain("", " " * 24 + "".join(f"{name:>10}" for name in parts))
    rows = []
    for name, seconds in zip(("directly", "through the proxy"), taken, strict=True):
        ordered = sorted(seconds)
        rows.append([1000 * ordered[max(0, math.ceil(part * len(ordered)) - 1)] for part in parts.values()])
        report.plain("", f"{name:<24}" + "".join(f"{figure:>10.2f}" for figure in rows[-1]))
    added = [through - direct for direct, through in zip(*rows, strict=True)][:-1]  # of the slowest it says nothing
    report.plain("", f"{'difference':<24}" + "".join(f"{figure:>+10.2f}" for figure in added))


async def look_for_traps(plan: Plan, report: Report, direct: Side, through: Side, proxy: Proxy, first: Outcome) -> None:
    """``first``: what came through the proxy at first."""
    report.heading("What else was looked at")
    try:
        async with Link(direct) as link:
            answer = await link.ask(plan.plainest)
            if first.answers:
                await _stream(plan, report, through, answer, first.answers[0])
            await _long_headers(plan, report, direct, through, proxy, str(answer.status))
    except LostError as lost:
        report.line(Found.NOTE, "not answered directly", str(lost))
        return
    if answer.last:
        report.line(Found.NOTE, "connections", "the server ends each with its answer, so every request costs a new one")
    elif not plan.quick:
        await _idle(plan, report, direct, proxy.upstream_keepalive)


async def _stream(plan: Plan, report: Report, through: Side, one: Message, other: Message) -> None:
    lasts = one.seconds - one.first_seconds
    if lasts < STREAM_SECONDS:
        report.line(Found.NOTE, "streaming", "this answer does not come piece by piece; name one that does to see it")
        return
    for _ in range(STREAM_TRIES):
        if other.first_seconds - one.first_seconds < lasts / 2:
            break
        with contextlib.suppress(LostError):
            async with Link(through) as link:
                other = await link.ask(plan.plainest)
    found = Found.OK if other.first_seconds - one.first_seconds < lasts / 2 else Found.DIFFERS
    words = [f"{1000 * answer.first_seconds:.0f} ms of {1000 * answer.seconds:.0f}" for answer in (one, other)]
    report.line(found, "streaming", f"the first piece is there after {words[0]} directly, {words[1]} through the proxy")


async def _long_headers(plan: Plan, report: Report, direct: Side, through: Side, proxy: Proxy, usual: str) -> None:
    taken, ours = 0, _own_headers(direct.host, proxy)
    for size in HEADER_BYTES:
        way = plan.long_header(size)
        one, other = [_status(await side.send(way)) for side in (direct, through)]
        if one == other == usual:
            taken = size
            continue
        words = f"up to {taken:,} bytes change nothing; {size:,}: {one} directly, {other} through the proxy"
        if one == usual and size > proxy.max_head_bytes - OWN_HEAD_BYTES:
            report.line(Found.NOTE, "long headers", f"{words} (proxy.max_head_bytes)")
        elif usual not in (one, other):
            report.line(Found.OK, "long headers", words)
        elif one == usual and _status(await direct.send(plan.long_header(size + ours))) == other:
            words += f", whose own headers add {ours} bytes: with as many more, {other} directly, too"
            report.line(Found.NOTE, "long headers", words)
        elif other == usual and await _behind_another(plan, direct, way) == other:  # Go reads ahead there
            words += f", {other} directly, too, on a connection that has had a request before"
            report.line(Found.NOTE, "long headers", words)
        else:
            again = _status(await direct.send(way))
            found = Found.DIFFERS if again == one else Found.NOTE
            report.line(found, "long headers", f"{words}, {again} directly again")
        return
    report.line(Found.OK, "long headers", f"up to {taken:,} bytes change nothing, directly and through the proxy")


async def _behind_another(plan: Plan, direct: Side, way: Way) -> str:
    """The status of what is sent as the second request of a connection."""
    try:
        async with Link(direct) as link:
            await link.ask(plan.plainest)
            return str((await link.ask(way)).status)
    except LostError:
        return "no answer"


def _own_headers(host: bytes, proxy: Proxy) -> int:
    """How many bytes the proxy adds to a head of the self-test's."""
    added = b"x-request-id: %b\r\n" % ids.uuid4().encode()
    if proxy.forwarded_headers is not ForwardedHeaders.OFF:
        added += Forwarding(proxy.forwarded_headers, b"127.0.0.1", b"http").lines([], host)
    return len(added)


def _status(outcome: Outcome) -> str:
    return str(outcome.answers[0].status) if outcome.answers else "no answer"


async def _idle(plan: Plan, report: Report, direct: Side, ours: float) -> None:
    watched = min(ours + IDLE_SECONDS, LONGEST_IDLE_SECONDS)
    async with Link(direct) as link:
        await link.ask(plan.plainest)
        started = perf_counter()
        ends = await link.closes_within(watched)
        seconds = perf_counter() - started
    if not ends:
        words = f"the server keeps them for more than {watched:g} s, the proxy for {ours:g} s"
        report.line(Found.OK if watched > ours else Found.NOTE, "idle connections", words)
    elif seconds > ours:
        words = f"the server ends them after {seconds:.1f} s, the proxy before that, after {ours:g} s"
        report.line(Found.OK, "idle connections", words)
    else:
        words = f"the server ends them after {seconds:.1f} s, the proxy only after {ours:g} s"
        report.line(Found.NOTE, "idle connections", words)
        report.plain(
            "",
            "  A request that meets such an end is sent once more if its body had come with its head, else it gets 502.",
        )
        report.plain("", f"  Set proxy.upstream_keepalive to less than {seconds:.1f}s, and it does not come to that.")
