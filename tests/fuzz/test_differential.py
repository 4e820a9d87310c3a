"""The same exchanges with and without the proxy: what arrives differs by what is published, and by nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.fuzz import grammar, sizes
from tests.fuzz.conftest import Found
from tests.fuzz.published import closes, towards_client, towards_model_server
from tests.fuzz.strict import Message, read_answers, read_request
from tests.fuzz.wires import Bench, Wire, benched

pytestmark = sizes.patiently


@dataclass(frozen=True)
class Exchange:
    request: bytes
    answer: grammar.Answer
    request_cuts: list[int]
    answer_cuts: list[int]


@st.composite
def exchanges(draw: st.DrawFn) -> Exchange:
    old = draw(st.integers(0, 9)) == 0
    request = draw(grammar.request(old=old, closing=draw(st.integers(0, 19)) == 0, large=draw(st.integers(0, 19)) == 0))
    verb = request.partition(b" ")[0]
    answer = draw(grammar.answer(verb, large=draw(st.integers(0, 19)) == 0))
    return Exchange(request, answer, draw(grammar.cuts), draw(grammar.cuts))


@dataclass(frozen=True)
class Seen:
    """What arrived at the model server, what came back, and how the connection was left."""

    request: Message
    interims: tuple[Message, ...]
    answer: Message
    ended: str


async def ask(bench: Bench, wire: Wire, one: Exchange, *, direct: bool) -> Seen:
    """One exchange over ``wire``."""
    recorder = bench.recorder
    recorder.exact = not direct
    recorder.clear()
    recorder.play = lambda peer: peer.send(grammar.pieces(one.answer.sent, one.answer_cuts), one.answer.how)
    wire.received = b""
    asked = read_request(one.request)[0]
    await wire.send(grammar.pieces(one.request, one.request_cuts))

    def whole() -> bool:
        return recorder.played > 0 and read_answers(wire.received, asked.method, ended=False).final is not None

    await recorder.until(lambda: wire.ended or whole())
    found = read_answers(wire.received, asked.method, ended=bool(wire.ended))
    assert found.final is not None, f"{wire.ended}: {found.why} in {wire.received!r}"
    assert found.rest == b""
    if not direct and closes(found.final.framing, asked):
        await recorder.until(lambda: wire.ended)
    await recorder.settled()
    assert not recorder.refused, recorder.refused
    assert not recorder.cut, recorder.cut
    assert len(recorder.arrived) == 1, recorder.arrived
    return Seen(recorder.arrived[0], found.interims, found.final, wire.ended)


async def both_ways(bench: Bench, plan: list[Exchange]) -> list[Seen]:
    """Each exchange over a fresh connection to the model server, and all, while it lasts, over one to the proxy."""
    direct: list[Seen] = []
    for one in plan:
        async with bench.client(bench.recorder.port) as wire:
            direct.append(await ask(bench, wire, one, direct=True))
    relayed: list[Seen] = []
    while len(relayed) < len(plan):
        async with bench.client() as wire:
            while len(relayed) < len(plan) and not wire.ended:
                relayed.append(await ask(bench, wire, plan[len(relayed)], direct=False))
    for one, without, through in zip(plan, direct, relayed, strict=True):
        compare(bench, one, without, through)
    return direct


def compare(bench: Bench, one: Exchange, without: Seen, through: Seen) -> None:
    request = without.request
    assert request == read_request(one.request)[0]
    found = towards_model_server(request, upstream=bench.upstream).differences(through.request)
    assert not found, f"{one.request!r} arrived otherwise: {found}"

    request_id = through.request.values(b"x-request-id")[0]
    interims = () if request.version == b"1.0" else without.interims
    assert len(interims) == len(through.interims)
    pairs = [*zip(interims, through.interims, strict=True), (without.answer, through.answer)]
    for sent, got in pairs:
        found = towards_client(sent, request, request_id).differences(got)
        assert not found, f"{one.answer.sent!r} came otherwise: {found}"
    assert through.ended == ("closed" if closes(through.answer.framing, request) else "")


def count(seen: Counter[str], exchanges: list[Seen]) -> None:
    seen["exchanges"] += len(exchanges)
    seen["connections"] += 1
    for one in exchanges:
        seen[f"{one.request.framing} >"] += 1
        seen[f"< {one.answer.framing}"] += 1
        seen["trailers"] += bool(one.request.trailers) + bool(one.answer.trailers)
        seen["interim"] += len(one.interims)
        seen["encoded"] += bool(one.request.values(b"content-encoding"))
        seen["large"] += len(one.request.payload) > 65000
        seen["HTTP/1.0"] += one.request.version == b"1.0"
        seen["absolute"] += not one.request.target.startswith((b"/", b"*"))
        seen[f"method {one.request.method.decode()}"] += 1


KINDS = ["none >", "length >", "chunked >", "< none", "< length", "< chunked", "< close"]
KINDS += ["trailers", "interim", "encoded", "large", "HTTP/1.0", "absolute"]
plans = st.lists(exchanges(), min_size=2, max_size=9)


@pytest.mark.promise("A1", "A1a", "A1b", "A3", "A3a", "A4", "B6", "B6b", "C7", "C7a", "C8", "C10", "C10a", "F19a")
@pytest.mark.parametrize(("recorded", "part"), [(False, 1), (True, 10)], ids=["relay", "whole proxy"])
def test_with_and_without_the_proxy(recorded: bool, part: int, tmp_path: Path, found: Found) -> None:
    seen: Counter[str] = Counter()
    with benched(tmp_path if recorded else None) as (made, run):

        def cases(plan: list[Exchange]) -> None:
            count(seen, run(both_ways(made, plan)))

        sizes.fuzz(sizes.DIFFERENTIAL // part, cases, plan=plans)
        if made.whole is not None:
            assert made.whole.account().received >= seen["exchanges"]
    found(seen)
    if recorded:
        assert seen["exchanges"] >= sizes.EXCHANGES // part // 2, seen
    else:
        assert seen["exchanges"] >= sizes.EXCHANGES, seen
        assert min(seen[kind] for kind in KINDS) >= seen["exchanges"] / 200, seen
        assert sum(one.startswith("method ") for one in seen) >= 20, seen
