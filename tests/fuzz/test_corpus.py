"""Known attacks, and what looks like them and is none: each does what the corpus says, whole and byte by byte."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fuzz import sizes
from tests.fuzz.corpus import AnswerCase, RequestCase, answer_cases, as_answers, request_cases, without_additions
from tests.fuzz.grammar import single_bytes
from tests.fuzz.judge import ABORTED, FORWARDED, REFUSED, send_answer, send_requests
from tests.fuzz.strict import Message, read_request, read_response, read_stream
from tests.fuzz.wires import SENTINEL, Bench, Recorder, bench

pytestmark = sizes.patiently

REQUESTS = request_cases()
ANSWERS = answer_cases()
_LONG = 4096  # more than that is sent in pieces of this size


def _marked(cases: list[Any]) -> list[Any]:
    return [
        pytest.param(
            case,
            id=case.name,
            marks=pytest.mark.xfail(strict=True, raises=AssertionError, reason=f"DEFECT {case.defect}")
            if case.defect
            else (),
        )
        for case in cases
    ]


def test_the_corpus_is_large() -> None:
    assert len(REQUESTS) + len(ANSWERS) >= 80
    for cases in (REQUESTS, ANSWERS):
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.promise("G21", "G21a", "A4a", "B6b")
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "byte by byte"])
@pytest.mark.parametrize("case", _marked(REQUESTS))
async def test_requests(case: RequestCase, cut: bool) -> None:
    async with bench() as proxied:
        await check_request(proxied, case, cut=cut)


async def check_request(proxied: Bench, case: RequestCase, *, cut: bool) -> None:
    if case.later is not None:
        await _check_early(proxied, case, case.later, cut=cut)
        return
    closes = case.closes or case.answered[-1] != "200"
    stream = read_stream(case.sends + SENTINEL)
    verdict = await send_requests(proxied, _pieces(case.sends + SENTINEL, cut=cut), stream)

    arrived = _arrived(proxied, proxied.recorder)
    sentinels = [message for message in arrived if message.target == b"/sentinel"]
    assert (*case.arrives, *sentinels) == arrived
    assert len(sentinels) == (not closes)
    if not case.begins:
        assert not proxied.recorder.cut
    statuses = [*map(str, verdict.statuses), *(["abort"] if verdict.outcome == ABORTED else [])]
    expected = [*case.answered, *([] if closes else ["200"])]
    assert len(statuses) == len(expected), (statuses, expected)
    assert all(got in wanted.split("|") for got, wanted in zip(statuses, expected, strict=True)), (statuses, expected)


def _arrived(proxied: Bench, recorder: Recorder) -> tuple[Message, ...]:
    """As the corpus has it."""
    return tuple(_named(without_additions(message), proxied.upstream) for message in recorder.arrived)


def _named(message: Message, upstream: bytes) -> Message:
    headers = tuple((name, b"UPSTREAM" if value == upstream else value) for name, value in message.headers)
    return Message(message.start, headers, message.framing, message.payload, message.trailers)


async def _check_early(proxied: Bench, case: RequestCase, later: bytes, *, cut: bool) -> None:
    """The answer comes before the request is whole; what the client sends then is no request, on no connection."""
    recorder = proxied.recorder
    recorder.early = True
    async with proxied.client() as wire:
        await wire.send(_pieces(case.sends, cut=cut))
        await recorder.until(lambda: wire.ended or b"early" in wire.received)
        await wire.send(_pieces(later + SENTINEL, cut=cut))
        await recorder.until(lambda: wire.ended)
    await recorder.settled()
    answer, rest = read_response(wire.received, b"POST")
    assert (str(answer.status),) == case.answered
    assert answer.values(b"connection") == [b"close"]
    assert rest == b""
    assert (recorder.arrived, recorder.refused) == ([], [])
    recorder.early = False
    async with proxied.client() as wire:
        await wire.send([SENTINEL])
        await recorder.until(lambda: recorder.arrived)
    assert [message.target for message in recorder.arrived] == [b"/sentinel"]
    assert recorder.refused == []


@pytest.mark.promise("G22", "C8", "C9", "C9a", "E17a", "A4a")
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "byte by byte"])
@pytest.mark.parametrize("case", _marked(ANSWERS))
async def test_answers(case: AnswerCase, cut: bool) -> None:
    async with bench() as proxied:
        await check_answer(proxied, case, cut=cut)


async def check_answer(proxied: Bench, case: AnswerCase, *, cut: bool) -> None:
    verdict = await send_answer(proxied, case.asks, case.answers, _pieces(case.answers, cut=cut), case.how)
    if isinstance(case.client, bytes):
        method = read_request(case.asks)[0].method
        assert verdict.outcome == FORWARDED, verdict
        assert as_answers(verdict.received, method, ended=True) == as_answers(case.client, method, ended=True)
    else:
        outcome = {REFUSED: "502", ABORTED: "abort"}.get(verdict.outcome)
        assert outcome in case.client.split("|"), verdict


def _pieces(data: bytes, *, cut: bool) -> list[bytes]:
    if not cut:
        return [data] if data else []
    if len(data) <= _LONG:
        return single_bytes(data)
    return [data[at : at + _LONG] for at in range(0, len(data), _LONG)]
