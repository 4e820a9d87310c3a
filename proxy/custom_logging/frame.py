"""What the headers of a frame say, as the SDK and Azure ML's collector understand each other. Pure.

Source: the requests of azureml-ai-monitoring 0.1.0b1 to 1.0.0, and lines of real files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from proxy import ids
from proxy.capture.event import DOCUMENTED, as_latin1, json_string, timestamp

PREFIX = "ce-"  # of the attributes of an event (CloudEvents over HTTP)
TYPE_PREFIX = "azureml.inference."
_SDKS_OWN = ("modelversion", "collectdatatype", "agent")  # in the order in which they stand in a line
_TAKEN = DOCUMENTED.difference(_SDKS_OWN)
_END_OF_TIME = 253402300800  # the year 10000
_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands in a frame's line beside its data."""

    event_id: str  # fit to stand in a JSON string
    time: bytes
    request_id: str
    content_type: str
    extensions: bytes

    @classmethod
    def of(cls, headers: Mapping[str, str], now: float, *, fractions: bool = True) -> Frame:
        """``now``, in seconds since 1970, stands for a time that is not given, or is none. fractions: of a second, if given."""
        event_id = headers.get("trace-id") or ids.uuid4()
        return cls(
            event_id=json_string(event_id)[1:-1].decode(),
            time=_time(headers.get("ce-time", ""), now, fractions=fractions),
            request_id=headers.get("ce-x-request-id") or event_id,  # readers need one
            content_type=headers.get("content-type") or "application/json",
            extensions=_extensions(headers),
        )


def collection(headers: Mapping[str, str]) -> str | None:
    """The name of the collection that a frame is for."""
    kind = headers.get("ce-type", "")
    if not kind.isascii():
        kind = as_latin1(kind) if _SURROGATE.search(kind) else kind
    return kind[len(TYPE_PREFIX) :] or None if kind.lower().startswith(TYPE_PREFIX) else None


def _extensions(headers: Mapping[str, str]) -> bytes:
    """``,"name":"value"`` for each attribute whose name is still free."""
    fields: dict[str, str] = {}
    for name, value in headers.items():
        if name.lower().startswith(PREFIX):
            field = name[len(PREFIX) :].replace("-", "").lower()
            if field and field not in _TAKEN:
                fields.setdefault(field, value)
    ordered = [name for name in _SDKS_OWN if name in fields]
    ordered += [name for name in fields if name not in _SDKS_OWN]
    return b"".join(b",%b:%b" % (json_string(name), json_string(fields[name])) for name in ordered)


def _time(text: str, now: float, *, fractions: bool) -> bytes:
    """Of seconds since 1970, as the SDK gives it, or of RFC 3339, as CloudEvents has it."""
    try:
        seconds = float(text) if _NUMBER.fullmatch(text) else _from_iso(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < _END_OF_TIME:
        return timestamp(now, fractions=False)
    return timestamp(seconds, fractions=fractions and seconds % 1 != 0)


def _from_iso(text: str) -> float:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(text)
    return moment.timestamp()
