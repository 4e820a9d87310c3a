"""Requests that nobody should send: each is forwarded exactly, refused or aborted, whatever the pieces it comes in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.fuzz import grammar, sizes
from tests.fuzz.conftest import Found
from tests.fuzz.judge import ABORTED, FORWARDED, REFUSED, Verdict, send_requests
from tests.fuzz.strict import completed, read_stream
from tests.fuzz.wires import SENTINEL, Bench, bench, benched

pytestmark = sizes.patiently

requests = st.lists(st.booleans().flatmap(lambda old: grammar.request(old=old)), min_size=1, max_size=3).map(b"".join)


@pytest.mark.promise("G21", "G21a", "C7", "B6", "A4")
@pytest.mark.parametrize(("recorded", "part"), [(False, 1), (True, 10)], ids=["relay", "whole proxy"])
def test_mutated_requests(recorded: bool, part: int, tmp_path: Path, found: Found) -> None:
    """Each is forwarded exactly, refused or aborted: so ``send_requests`` says, or fails."""
    seen: Counter[str] = Counter()
    with benched(tmp_path if recorded else None) as (made, run):

        def cases(valid: bytes, changes: list[grammar.Mutation], places: list[int], stays: bool) -> None:
            data = grammar.mutated(valid, changes)
            if stays or read_stream(data).end != "short":  # else the client leaves within a body
                data = completed(data) + SENTINEL
            verdicts = run(_in_all_pieces(made, data, places))
            seen.update(verdict.outcome for verdict in verdicts)
            seen["cases"] += 1
            seen[f"end: {read_stream(data).end}"] += 1

        sizes.fuzz(
            sizes.REQUESTS // part,
            cases,
            valid=requests,
            changes=grammar.mutations,
            places=grammar.cuts,
            stays=st.booleans(),
        )
        if made.whole is not None:
            assert made.whole.account().received > seen[FORWARDED]
    found(seen)
    assert seen["cases"] >= sizes.REQUESTS // part * 0.8, seen
    assert min(seen[FORWARDED], seen[REFUSED]) >= seen["cases"] / 3, seen
    if not recorded:
        assert seen[ABORTED] >= 1, seen
        assert min(seen[f"end: {end}"] for end in ("head", "body", "whole", "last", "short")) >= 1, seen


async def _in_all_pieces(made: Bench, data: bytes, places: list[int]) -> list[Verdict]:
    stream = read_stream(data)
    ways = [[data], grammar.single_bytes(data), grammar.pieces(data, places)]
    verdicts = [await send_requests(made, pieces, stream) for pieces in ways]
    if stream.end != "body":  # of a body that breaks a rule, the begin may have been forwarded
        assert len(set(verdicts)) == 1, verdicts
    return verdicts


async def test_byte_by_byte_is_byte_by_byte() -> None:
    """For what is cut into pieces here is received in these pieces."""
    data = b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nping"
    async with bench() as made, made.client(made.recorder.port) as wire:
        await wire.send(grammar.single_bytes(data))
        await made.recorder.until(lambda: wire.received)
        assert made.recorder.pieces == len(data)
