"""One event line, byte for byte as Azure ML's data collector writes it: pure.

Order of the fields as in real files: specversion, id, source, type, datacontenttype, time, data, then the extensions.
Our own extensions come last; their names are lower-case letters and digits, and none equals a documented one.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache

import orjson
from multidict import CIMultiDictProxy

from proxy.settings import Settings

_CACHED_CHARACTERS = 128  # content types and methods are the client's to choose, and to make as long as a head may be
DOCUMENTED = frozenset(
    {
        "specversion",
        "id",
        "source",
        "type",
        "datacontenttype",
        "time",
        "data",
        "path",
        "method",
        "contentrange",
        "correlationid",
        "xrequestid",
        "modelversion",
        "collectdatatype",
        "agent",
        "datainblob",
        "dataref",
        "database64",
        "dataschema",
        "subject",
    }
)
RESERVED = DOCUMENTED | {"statuscode", "durationms", "capturestatus", "bodybytes", "contentencoding", "traceparent"}

# W3C Trace Context, level 1, §3.2: version, trace id, parent id, flags; no id is all zeros, and no version ff.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def source(subscription_id: str, resource_group: str, workspace: str, endpoint: str, deployment: str) -> str:
    """The events' ``source``; parts that are not known are empty, as in the documented examples."""
    return (
        f"/subscriptions/{subscription_id}/resourceGroups/{resource_group}/providers/Microsoft.MachineLearningServices"
        f"/workspaces/{workspace}/onlineEndpoints/{endpoint}/deployments/{deployment}"
    )


def source_of(settings: Settings) -> str:
    """The events' ``source``."""
    workspace = settings.azureml
    return source(
        workspace.subscription_id if workspace else "",
        workspace.resource_group if workspace else "",
        workspace.workspace_name if workspace else "",
        settings.endpoint_name,
        settings.name,
    )


def header_fields(names: tuple[str, ...]) -> dict[str, str]:
    """The field of each captured header: its letters and digits in lower case, set apart where that name is taken."""
    fields: dict[str, str] = {}
    taken = set(RESERVED)
    for name in names:
        plain = "".join(letter for letter in name.lower() if letter.isascii() and letter.isalnum()) or "header"
        field = plain if plain not in taken else f"header{plain}"
        number = 2
        while field in taken:
            field = f"header{plain}{number}"
            number += 1
        taken.add(field)
        fields[name] = field
    return fields


def trace_field(headers: CIMultiDictProxy[str]) -> bytes:
    """The trace that an exchange belongs to, as CloudEvents' distributed tracing extension has it; empty without a valid one."""
    parent = headers.get("traceparent")
    if parent is None or not _TRACEPARENT.fullmatch(parent):
        return b""
    return b',"traceparent":"%b"' % parent.encode()


def json_string(text: str) -> bytes:
    """``text`` as a JSON string; header bytes that are not UTF-8 are read as latin-1."""
    try:
        return orjson.dumps(text)
    except TypeError:  # surrogate escapes
        return orjson.dumps(as_latin1(text))


def as_latin1(text: str) -> str:
    """What was no UTF-8, and came with surrogate escapes for it, read as latin-1."""
    return text.encode("utf-8", "surrogateescape").decode("latin-1")


_cached = lru_cache(maxsize=1024)(json_string)


def _json_string_cached(text: str) -> bytes:
    return _cached(text) if len(text) <= _CACHED_CHARACTERS else json_string(text)


_MILLISECONDS = tuple(b".%03dZ" % number for number in range(1000))


@lru_cache(maxsize=256)
def _seconds(epoch_seconds: int) -> bytes:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(epoch_seconds)).encode()


def timestamp(epoch_seconds: float, *, fractions: bool) -> bytes:
    """``2022-05-25T08:59:48Z``, or with milliseconds: ``2022-05-25T08:59:48.123Z``."""
    whole = int(epoch_seconds)
    return _seconds(whole) + (_MILLISECONDS[int((epoch_seconds - whole) * 1000)] if fractions else b"Z")


def content_range(kept: int, total: int | None) -> bytes:
    """``bytes 0-59/60``; the part behind the slash is ``*`` when the length was not known in advance."""
    if not kept:
        return b"bytes */%d" % (total or 0)
    return b"bytes 0-%d/%b" % (kept - 1, b"*" if total is None else b"%d" % total)


class LineFormat:
    """The lines of one collection. ``type`` and ``source`` are constant in it."""

    def __init__(self, collection: str, source_name: str) -> None:
        self._after_id = b'","source":%b,"type":%b,"datacontenttype":' % (
            json_string(source_name),
            json_string(f"azureml.inference.{collection}"),
        )

    def line(
        self,
        *,
        event_id: str,
        content_type: str,
        time: bytes,
        data: bytes,
        data_name: bytes = b"data",
        target: str | None = None,
        method: str | None = None,
        range_: bytes,
        in_blob: bool = False,
        request_id: str,
        extensions: bytes = b"",
    ) -> bytes:
        """A line with its LF. ``event_id`` is fit to stand in a JSON string, ``data`` is a JSON value without line ends;
        ``extensions`` begin with a comma each.
        """
        correlation = json_string(request_id)
        requested = b""
        if target is not None:
            requested = b',"path":%b,"method":%b' % (json_string(target), _json_string_cached(method or ""))
        return (
            b'{"specversion":"1.0","id":"%b%b%b,"time":"%b","%b":%b%b,"contentrange":"%b"%b,"correlationid":%b,"xrequestid":%b%b}\n'
            % (
                event_id.encode(),
                self._after_id,
                _json_string_cached(content_type),
                time,
                data_name,
                data,
                requested,
                range_,
                b',"datainblob":"true"' if in_blob else b"",
                correlation,
                correlation,
                extensions,
            )
        )
