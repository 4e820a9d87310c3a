"""The same requests directly and through the proxy; and through it to a server that shows what it receives."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from proxy.relay.upstream import UpstreamAddress
from proxy.selftest.differences import Difference, between
from proxy.selftest.mirror import STEPS, Mirror, received_otherwise, steps_in_time
from proxy.selftest.plan import Plan, Way
from proxy.selftest.report import Found, Report
from proxy.selftest.wire import Outcome, Side
from proxy.settings import Proxy

OF_BODIES = frozenset(("body", "header content-length"))
CONFIRMATIONS = 5  # further direct requests before a difference is held against the proxy


class _Listed:
    """What was seen of the list in docs/transparency.md, each kind once."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], Difference] = {}

    def take(self, found: list[Difference]) -> list[Difference]:
        """Those that are not listed."""
        for one in found:
            if one.listed:
                self.seen.setdefault((one.place, one.words[:1]), one)
        return [one for one in found if not one.listed]


async def compare(plan: Plan, report: Report, direct: Side, through: Side) -> Outcome:
    """Sends the request in every way directly, through the proxy and directly again; what came through at first."""
    report.heading("The same directly, through the proxy and directly again")
    listed = _Listed()
    by_itself: dict[str, None] = {}
    first = Outcome()
    for way in plan.ways():
        one, other, found, unsteady = await _ask(direct, way, through, way, OF_BODIES & by_itself.keys())
        by_itself |= dict.fromkeys(sorted(unsteady))
        unlisted = listed.take(found)
        if not first.answers:
            first = other
        if unlisted and way.http10 and await _as_in_http11(direct, through, way):
            report.line(Found.NOTE, way.name, "the server answers HTTP/1.1 otherwise, in which the proxy asks it:")
            report.differences(unlisted)
        elif unlisted:
            report.line(Found.DIFFERS, way.name, "through the proxy:")
            report.differences(unlisted)
        elif not one.answers:
            report.line(Found.NOTE, way.name, f"not answered without the proxy either: {one.lost}")
        else:
            answers = [f"{answer.status}, {len(answer.body)} bytes" for answer in one.answers]
            report.line(Found.OK, way.name, "; ".join(answers))
    if by_itself:
        words = "direct answers differ in it among themselves"
        hint = "; name a request whose answer stays the same to have bodies compared" if "body" in by_itself else ""
        report.line(Found.NOTE, "not compared", f"{', '.join(by_itself)}: {words}{hint}")
    if listed.seen:
        report.plain("", "Changed on the way to the client, as docs/transparency.md lists it:")
        report.differences(listed.seen.values())
    return first


async def _ask(
    direct: Side, direct_way: Way, through: Side, way: Way, varies: Set[str] = frozenset()
) -> tuple[Outcome, Outcome, list[Difference], set[str]]:
    """What came directly and through the proxy, what differs, and in what direct answers differ among themselves.

    ``varies``: what is known to do so already.
    """
    one = await direct.send(direct_way)
    other = await through.send(way)
    unsteady = set(varies)
    found: list[Difference] = []
    for _ in range(1 + CONFIRMATIONS):
        again = await direct.send(direct_way)
        unsteady |= {each.place for each in between(one, again, direct_way)}
        if "body" in unsteady:  # its length may be another one next time
            unsteady |= OF_BODIES
        found = [each for each in between(one, other, way) if each.place not in unsteady]
        if all(each.listed for each in found):
            break
    return one, other, found, unsteady


async def _as_in_http11(direct: Side, through: Side, way: Way) -> bool:
    """Whether an HTTP/1.0 client gets through the proxy what the server answers in HTTP/1.1."""
    in_http11 = replace(way, http10=False, header=b"Connection: close\r\n")
    one, _, found, _ = await _ask(direct, in_http11, through, way)
    return bool(one.answers) and all(each.listed for each in found)


async def show(plan: Plan, report: Report, mirror: Mirror, through: Side, proxy: Proxy, host: bytes) -> None:
    """Sends the request in every way through the proxy to a server that shows it."""
    report.heading("What the server receives, shown by a server of the self-test's own")
    listed = _Listed()
    ways, alike = plan.ways(), 0
    base_path = UpstreamAddress.parse(proxy.upstream).base_path
    for way in ways:
        mirror.received.clear()
        await through.send(way)
        found = [
            each for message in mirror.received for each in received_otherwise(way, host, message, base_path, proxy)
        ]
        if len(mirror.received) != way.times:
            found.append(Difference("requests", f"{len(mirror.received)} of {way.times} arrived"))
        if unlisted := listed.take(found):
            report.line(Found.DIFFERS, way.name, "arrives otherwise than it was sent:")
            report.differences(unlisted)
        else:
            alike += 1
    if alike:
        report.line(Found.OK, "requests", f"{alike} of {len(ways)} ways of sending arrive as they were sent")
    if listed.seen:
        report.plain("", "Changed on the way to the server, as docs/transparency.md lists it:")
        report.differences(listed.seen.values())
    steps = await steps_in_time(through)
    words = f"{steps} of {STEPS} pieces came back, each before the next was sent"
    report.line(Found.OK if steps == STEPS else Found.DIFFERS, "streams both ways", words)
