"""The cases of tests/data/smuggling; its README.md says how they are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz.published import OUR_ID
from tests.fuzz.strict import Message, read_answers, read_stream

FOLDER = Path(__file__).parent.parent / "data/smuggling"
ASKS = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"


@dataclass(frozen=True)
class RequestCase:
    name: str
    why: str
    sends: bytes
    arrives: tuple[Message, ...]
    answered: tuple[str, ...]
    begins: bool
    closes: bool
    later: bytes | None  # None: the model server waits for the whole request, as usual
    defect: str | None


@dataclass(frozen=True)
class AnswerCase:
    name: str
    why: str
    asks: bytes
    answers: bytes
    how: str
    client: bytes | str
    defect: str | None


def request_cases() -> list[RequestCase]:
    return [
        RequestCase(
            case.pop("name"),
            case.pop("why"),
            as_bytes(case.pop("sends")),
            read_stream(as_bytes(case.pop("arrives", ""))).messages,
            _statuses(case.pop("answered")),
            case.pop("begins", False),
            case.pop("closes", False),
            as_bytes(case.pop("later")) if case.pop("early", False) else None,
            case.pop("defect", None),
        )
        for case in _cases("requests.yaml")
        if _no_other(case, "name why sends arrives answered begins closes early later defect")
    ]


def answer_cases() -> list[AnswerCase]:
    return [
        AnswerCase(
            case["name"],
            case["why"],
            as_bytes(case.get("asks", ASKS.decode())),
            as_bytes(case["answers"]),
            case.get("how", "close"),
            _outcome(case["client"]),
            case.get("defect"),
        )
        for case in _cases("answers.yaml")
        if _no_other(case, "name why asks answers how client defect")
    ]


def _cases(file: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = yaml.safe_load((FOLDER / file).read_text(encoding="utf-8"))
    return cases


def _no_other(case: dict[str, Any], keys: str) -> bool:
    assert case.keys() <= set(keys.split()), case
    return True


def as_bytes(spelled: Any) -> bytes:
    """A string, or a list of strings and of ``{times: 3, of: "x"}``."""
    if isinstance(spelled, list):
        return b"".join(as_bytes(part) for part in spelled)
    if isinstance(spelled, dict):
        return as_bytes(spelled["of"]) * int(spelled["times"])
    assert isinstance(spelled, str), spelled
    return spelled.encode("latin-1")


def _statuses(spelled: Any) -> tuple[str, ...]:
    if isinstance(spelled, dict):
        return (str(spelled["of"]),) * int(spelled["times"])
    return tuple(str(one) for one in spelled)


def _outcome(spelled: Any) -> bytes | str:
    """The client's bytes, or what becomes of the answer: ``502``, ``abort`` or both with a bar between them."""
    return str(spelled) if str(spelled) in ("502", "abort", "502|abort") else as_bytes(spelled)


def without_additions(message: Message) -> Message:
    """Without what the proxy adds to every message of the corpus where it is not there."""
    usual = {b"x-forwarded-for": b"127.0.0.1", b"x-forwarded-proto": b"http", b"connection": b"close"}
    hosts = message.values(b"host")
    if hosts:
        usual[b"x-forwarded-host"] = hosts[0]
    headers = tuple(
        (name, value)
        for name, value in message.headers
        if usual.get(name.lower()) != value and not (name.lower() == b"x-request-id" and OUR_ID.fullmatch(value))
    )
    return Message(message.start, headers, message.framing, message.payload, message.trailers)


def as_answers(data: bytes, method: bytes, *, ended: bool) -> tuple[Message, ...]:
    """Interim answers and the final one, without what the proxy adds; this must be whole."""
    answers = read_answers(data, method, ended=ended)
    assert answers.final is not None, answers
    assert answers.rest == b"", answers
    return tuple(without_additions(one) for one in (*answers.interims, answers.final))
