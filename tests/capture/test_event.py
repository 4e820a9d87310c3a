"""The event line, its fields' names and their forms."""

from __future__ import annotations

import json
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.capture.event import (
    RESERVED,
    LineFormat,
    content_range,
    header_fields,
    json_string,
    source,
    timestamp,
)

MANY = settings(deadline=None, max_examples=300)
# RFC 9110 §5.6.2, and dense where names collide.
HEADER_NAMES = (
    st.text("!#$%&'+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=1, max_size=20)
    | st.builds(
        "".join, st.lists(st.sampled_from(["X", "x", "-", "_", "Data", "id", "header", "2", "time"]), min_size=1)
    )
    | st.sampled_from(sorted(RESERVED)).map(str.title)
)
# What header bytes become: UTF-8 where they are, else escaped byte by byte.
HEADER_TEXTS = st.binary(max_size=40).map(lambda value: value.decode("utf-8", "surrogateescape"))


@MANY
@given(names=st.lists(HEADER_NAMES, max_size=30, unique=True))
def test_header_fields_never_meet_each_other_nor_a_documented_one(names: list[str]) -> None:
    fields = header_fields(tuple(names))
    assert list(fields) == names
    values = list(fields.values())
    assert all(re.fullmatch("[a-z0-9]+", field) for field in values)  # CloudEvents 1.0, attribute names
    assert len({field.casefold() for field in values}) == len(values)
    assert not RESERVED & set(values)


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        (["X-Tenant-Id", "ocp-apim-trace"], ["xtenantid", "ocpapimtrace"]),
        (["Data", "data-", "X_Data"], ["headerdata", "headerdata2", "xdata"]),
        (["x-request-id", "StatusCode"], ["headerxrequestid", "headerstatuscode"]),
        (["HeaderData", "Data"], ["headerdata", "headerdata2"]),
        (["a-b", "A_B", "ab", "Ab"], ["ab", "headerab", "headerab2", "headerab3"]),
        (["~~~", "_"], ["header", "headerheader"]),
    ],
)
def test_names_of_header_fields(names: list[str], fields: list[str]) -> None:
    assert list(header_fields(tuple(names)).values()) == fields


def test_every_field_of_ours_and_of_azure_is_reserved() -> None:
    documented = (
        "specversion id source type datacontenttype time data path method contentrange correlationid xrequestid"
    )
    binary_and_custom = "datainblob dataref modelversion collectdatatype agent"
    ours = "statuscode durationms capturestatus bodybytes contentencoding"
    assert set(f"{documented} {binary_and_custom} {ours}".split()) <= RESERVED


@MANY
@given(seconds=st.floats(0, 4_000_000_000))
def test_timestamps(seconds: float) -> None:
    whole = timestamp(seconds, fractions=False).decode()
    fine = timestamp(seconds, fractions=True).decode()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", whole)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fine)
    assert fine[:19] == whole[:19]


def test_timestamps_are_cut_not_rounded_and_in_utc() -> None:
    assert timestamp(1653469188.9999, fractions=False) == b"2022-05-25T08:59:48Z"
    assert timestamp(1653469188.9999, fractions=True) == b"2022-05-25T08:59:48.999Z"


@pytest.mark.parametrize(
    ("kept", "total", "expected"),
    [
        (60, None, b"bytes 0-59/*"),
        (39, 39, b"bytes 0-38/39"),
        (40, 100, b"bytes 0-39/100"),
        (0, 0, b"bytes */0"),
        (0, 100, b"bytes */100"),
        (0, None, b"bytes */0"),
    ],
)
def test_content_ranges(kept: int, total: int | None, expected: bytes) -> None:
    assert content_range(kept, total) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ('a"b\\c\r\n\t\x00', 'a"b\\c\r\n\t\x00'),
        (b"caf\xc3\xa9".decode("utf-8", "surrogateescape"), "café"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), "café"),
        (b"\xc3\xa9 and \xe9".decode("utf-8", "surrogateescape"), "Ã© and é"),
        ("日本\U0001f600", "日本\U0001f600"),
    ],
)
def test_header_bytes_are_utf8_else_latin1(text: str, expected: str) -> None:
    assert json.loads(json_string(text)) == expected


@MANY
@given(target=HEADER_TEXTS, method=HEADER_TEXTS, content_type=HEADER_TEXTS, request_id=HEADER_TEXTS, name=HEADER_TEXTS)
def test_any_header_bytes_make_one_line(
    target: str, method: str, content_type: str, request_id: str, name: str
) -> None:
    line = LineFormat("request", source("s", name, "w", "e", "d")).line(
        event_id="19790b87-a63c-4295-9a67-febb2d8fbce0",
        content_type=content_type,
        time=b"2022-05-25T08:59:48Z",
        data=b"[1]",
        target=target,
        method=method,
        range_=b"bytes 0-2/3",
        in_blob=True,
        request_id=request_id,
        extensions=b',"bodybytes":3',
    )
    assert line.endswith(b"}\n")
    assert not set(line[:-1]) & set(b"\r\n")
    event = json.loads(line)
    order = "specversion id source type datacontenttype time data path method contentrange datainblob correlationid"
    assert list(event) == [*order.split(), "xrequestid", "bodybytes"]
    assert event["data"] == [1]
    assert event["correlationid"] == event["xrequestid"]


def test_header_values_are_the_clients_to_choose_and_take_no_memory() -> None:
    lines = LineFormat("request", "s")
    tracemalloc.start()
    try:
        for number in range(1100):
            long = f"{number:050000}"
            lines.line(
                event_id="e",
                content_type=long,
                time=b"",
                data=b"1",
                target="/",
                method=long,
                range_=b"",
                request_id="1",
            )
        assert tracemalloc.get_traced_memory()[0] < 10_000_000
    finally:
        tracemalloc.stop()
