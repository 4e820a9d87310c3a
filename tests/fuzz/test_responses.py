"""Answers that no model server should give: each is passed on exactly, made a 502, or aborted; and never the next one's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.fuzz import grammar, sizes
from tests.fuzz.conftest import Found
from tests.fuzz.judge import ABORTED, FORWARDED, REFUSED, Verdict, send_answer
from tests.fuzz.wires import Bench, benched

pytestmark = sizes.patiently

REQUESTS = {
    b"GET": b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n",
    b"HEAD": b"HEAD /a HTTP/1.1\r\nHost: h\r\n\r\n",
    b"POST": b"POST /a HTTP/1.0\r\nHost: h\r\nContent-Length: 4\r\n\r\nping",
}


hows = st.sampled_from(["keep", "close", "close", "reset"])


@st.composite
def asked_and_answered(draw: st.DrawFn) -> tuple[bytes, grammar.Answer]:
    verb = draw(st.sampled_from([b"GET", b"GET", b"GET", b"POST", b"HEAD"]))
    return REQUESTS[verb], draw(grammar.answer(verb))


@pytest.mark.promise("G22", "C8", "C9", "C9a", "E17a", "A4")
@pytest.mark.parametrize(("recorded", "part"), [(False, 1), (True, 10)], ids=["relay", "whole proxy"])
def test_mutated_answers(recorded: bool, part: int, tmp_path: Path, found: Found) -> None:
    """Each is passed on exactly, answered with 502 or aborted, and the next one is its own: or ``send_answer`` fails."""
    seen: Counter[str] = Counter()
    with benched(tmp_path if recorded else None) as (made, run):

        def cases(
            valid: tuple[bytes, grammar.Answer], changes: list[grammar.Mutation], how: str, places: list[int]
        ) -> None:
            request, answer = valid
            sent = grammar.mutated(answer.sent, changes)
            verdicts = run(_in_all_pieces(made, request, sent, how, places))
            seen.update(verdict.outcome for verdict in verdicts)
            seen["cases"] += 1

        sizes.fuzz(
            sizes.RESPONSES // part,
            cases,
            valid=asked_and_answered(),
            changes=grammar.mutations,
            how=hows,
            places=grammar.cuts,
        )
        if made.whole is not None:
            assert made.whole.account().received > seen["cases"]
    found(seen)
    assert seen["cases"] >= sizes.RESPONSES // part * 0.8, seen
    assert min(seen[FORWARDED], seen[REFUSED]) >= seen["cases"] / 3, seen
    assert seen[ABORTED] >= seen["cases"] / 30, seen


async def _in_all_pieces(made: Bench, request: bytes, sent: bytes, how: str, places: list[int]) -> list[Verdict]:
    ways = [[sent] if sent else [], grammar.single_bytes(sent), grammar.pieces(sent, places)]
    return [await send_answer(made, request, sent, pieces, how) for pieces in ways]
