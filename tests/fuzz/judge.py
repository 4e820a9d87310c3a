"""Sends a case through the proxy, and says what became of it: forwarded, refused or aborted. Anything else fails."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.fuzz.published import OUR_FAILURES, OUR_REFUSALS, towards_client, towards_model_server
from tests.fuzz.strict import Message, Stream, read_answers, read_request, read_response
from tests.fuzz.wires import SENTINEL, SENTINEL_ANSWER, Bench, Wire, numbered

LONG = 16_000  # more of chunk extensions or trailers is not passed on
FORWARDED, REFUSED, ABORTED = "forwarded", "refused", "aborted"


@dataclass(frozen=True)
class Verdict:
    """``statuses`` are those of the answers that the client got in whole; ``received`` is all that it got."""

    outcome: str
    statuses: tuple[int, ...]
    received: bytes = field(default=b"", compare=False)


# --- requests ---


async def send_requests(bench: Bench, pieces: Iterable[bytes], stream: Stream) -> Verdict:
    """Sends what holds ``stream``, and judges what arrived and what was answered."""
    recorder = bench.recorder
    recorder.clear()
    async with bench.client() as wire:
        await wire.send(pieces)
        before = len(stream.messages)
        await recorder.until(
            lambda: (
                wire.ended
                or SENTINEL_ANSWER in wire.received
                or (stream.end == "short" and recorder.begun and wire.received.count(b"HTTP/1.1 200 OK") >= before)
            )
        )
        left = not wire.ended
    await recorder.settled()
    return judge_requests(bench, wire, stream, left=left)


def judge_requests(bench: Bench, wire: Wire, stream: Stream, *, left: bool = False) -> Verdict:
    """``left``: the client has ended the connection by itself."""
    recorder = bench.recorder
    assert not recorder.refused, f"the model server got what is no HTTP: {recorder.refused}"
    arrived, messages = recorder.arrived, stream.messages
    assert len(arrived) <= len(messages), f"{arrived[len(messages) :]} arrived, but {stream.end}: {stream.why}"
    for sent, got in zip(messages, arrived, strict=False):
        found = towards_model_server(sent, upstream=bench.upstream).differences(got)
        assert not found, f"{sent} arrived otherwise: {found}"
    complete = len(arrived) == len(messages) and stream.end in ("whole", "last")
    if recorder.cut:
        assert len(recorder.cut) == 1, recorder.cut
        assert not complete, recorder.cut
        assert len(arrived) < len(messages) or stream.end != "head", f"begun, but {stream.why}: {recorder.cut}"

    rest = wire.received
    statuses: list[int] = []
    closing = False
    for number, (sent, got) in enumerate(zip(messages, arrived, strict=False), 1):
        answers = read_answers(rest, sent.method, ended=wire.ended == "closed")
        if answers.final is None:
            assert answers.why == "not whole", answers
            assert wire.ended == "reset", f"a part of an answer without an abort: {rest!r}"
            return Verdict(ABORTED, tuple(statuses))
        expected = towards_client(numbered(sent, number)[1], sent, got.values(b"x-request-id")[0])
        closing = b"close" in answers.final.options()
        if closing and not sent.last:  # as after the last one that is read
            expected.added.append((b"connection", b"close"))
        found = expected.differences(answers.final)
        assert not found, f"the answer to {sent} came otherwise: {found}"
        statuses.append(answers.final.status)
        rest = answers.rest
    if rest:
        method = messages[len(arrived)].method if len(arrived) < len(messages) else stream.rest.lstrip(b"\r\n")
        own, more = read_response(rest, b"HEAD" if method.startswith(b"HEAD ") or method == b"HEAD" else b"GET")
        _check_own(own, more, wire, OUR_REFUSALS)
        assert not complete, f"refused after all was answered: {rest!r}"
        return Verdict(REFUSED, (*statuses, own.status))
    if complete or closing:
        return Verdict(FORWARDED, tuple(statuses))
    assert wire.ended == "reset" or (left and stream.end == "short"), f"not a word: {wire.ended}, {stream}"
    return Verdict(ABORTED, tuple(statuses))


def _check_own(answer: Message, rest: bytes, wire: Wire, statuses: set[int]) -> None:
    """It is an answer of the proxy's own, with one of ``statuses``, and the end."""
    assert answer.status in statuses, answer
    assert rest == b"", rest
    assert wire.ended == "closed", wire.ended
    assert answer.values(b"connection") == [b"close"], answer
    if answer.framing != "none":
        assert json.loads(answer.payload)["error"]["code"] == answer.status


# --- answers ---


async def send_answer(bench: Bench, request: bytes, sent: bytes, pieces: list[bytes], how: str) -> Verdict:
    """Has the model server answer ``request`` with ``pieces``, and judges what the client got, now and the next time."""
    recorder = bench.recorder
    recorder.clear()
    asked = read_request(request)[0]
    if how == "keep" and read_answers(sent, asked.method, ended=False).final is None:
        how = "close"  # the proxy would wait
    recorder.play = lambda peer: peer.send(pieces, how)

    def whole() -> bool:
        return recorder.played > 0 and read_answers(wire.received, asked.method, ended=False).final is not None

    async with bench.client() as wire:
        await wire.send([request])
        await recorder.until(lambda: wire.ended or whole())
        final = read_answers(wire.received, asked.method, ended=wire.ended == "closed").final
        if final is not None and b"close" in final.options():
            await recorder.until(lambda: wire.ended)
        await recorder.settled()
        verdict = _judge_answer(bench, wire, asked, sent, how)
        if not wire.ended:
            wire.received = b""
            await _ask_sentinel(bench, wire)
            return verdict
    async with bench.client() as wire:
        await _ask_sentinel(bench, wire)
    return verdict


async def _ask_sentinel(bench: Bench, wire: Wire) -> None:
    """The next request gets its own answer, whatever became of the last one."""
    await wire.send([SENTINEL])
    await bench.recorder.until(lambda: wire.ended or SENTINEL_ANSWER in wire.received)
    message, rest = read_response(wire.received, b"GET")
    assert (message.status, message.payload, rest) == (200, SENTINEL_ANSWER, b""), wire.received
    assert bench.recorder.arrived[-1].target == b"/sentinel"


def _judge_answer(bench: Bench, wire: Wire, request: Message, sent: bytes, how: str) -> Verdict:
    recorder, received = bench.recorder, wire.received
    assert not recorder.refused, recorder.refused
    assert not recorder.cut, recorder.cut
    arrived = recorder.arrived
    # A pooled connection that dies without a byte of answer is taken for one that was dead before ("Known limits").
    assert len(arrived) == 1 or (len(arrived) == 2 and not sent), arrived
    request_id = b"".join(arrived[-1].values(b"x-request-id"))
    legit = read_answers(sent, request.method, ended=how == "close")
    got = read_answers(received, request.method, ended=wire.ended == "closed")

    passed = 0 if request.version == b"1.0" else len(got.interims)
    assert len(got.interims) == passed <= len(legit.interims), got
    for expected, found in zip(legit.interims, got.interims, strict=False):
        differences = towards_client(expected, request, request_id).differences(found)
        assert not differences, f"the client got {received!r}: {differences}"
    statuses = tuple(one.status for one in got.interims)

    if got.final is None:
        assert got.why == "not whole", f"the client got what is no HTTP: {got.why} in {received!r}"
        assert wire.ended == "reset", f"a part of an answer without an abort: {received!r}"
        limited = len(sent) > LONG
        assert legit.final is None or how == "reset" or limited, f"a whole answer was aborted: {legit}"
        return Verdict(ABORTED, statuses, received)
    statuses += (got.final.status,)
    if legit.final is not None:
        differences = towards_client(legit.final, request, request_id).differences(got.final)
        if not differences:
            assert passed == len(legit.interims) or request.version == b"1.0", got
            assert got.rest == b"", f"more than the answer: {got.rest!r}"
            return Verdict(FORWARDED, statuses, received)
    else:
        differences = [f"the model server's answer breaks the rules: {legit.why}"]
    ours = got.final.status in OUR_FAILURES and got.final.values(b"content-type") == [b"application/json"]
    assert ours, f"the client got {received!r}: {differences}"
    _check_own(got.final, got.rest, wire, OUR_FAILURES)
    return Verdict(REFUSED, statuses, received)
