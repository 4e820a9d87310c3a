"""What the headers of a frame say."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy.capture.event import DOCUMENTED, LineFormat
from proxy.custom_logging.frame import Frame, collection
from tests.custom_logging.frames import check_line

MANY = settings(deadline=None, max_examples=300)
NOW = 1700000000.75
NOW_TEXT = b"2023-11-14T22:13:20Z"


def headers(*pairs: tuple[str, str]) -> CIMultiDict[str]:
    """As aiohttp has them: names without case, each any number of times, bytes that are no UTF-8 as surrogates."""
    return CIMultiDict(pairs)


def wire(value: bytes) -> str:
    """A header's value, as aiohttp reads it."""
    return value.decode("utf-8", "surrogateescape")


def fields(*pairs: tuple[str, str]) -> dict[str, Any]:
    """What a line says beside its data, in its order."""
    found = Frame.of(headers(*pairs), NOW)
    line = LineFormat("model_inputs", "/s").line(
        event_id=found.event_id,
        content_type=found.content_type,
        time=found.time,
        data=b"[]",
        range_=b"bytes 0-1/2",
        request_id=found.request_id,
        extensions=found.extensions,
    )
    return check_line(line)


# --- ids ---


def test_the_ids_of_a_frame() -> None:
    found = fields(("trace-id", "T"), ("ce-x-request-id", "X"))
    assert (found["id"], found["correlationid"], found["xrequestid"]) == ("T", "X", "X")


def test_an_id_stands_for_the_correlation_id_that_is_missing() -> None:
    assert fields(("trace-id", "T"))["correlationid"] == "T"
    assert fields(("trace-id", "T"), ("ce-x-request-id", ""))["xrequestid"] == "T"


def test_what_has_no_id_gets_one_of_its_own() -> None:
    made = [fields(("trace-id", "")), fields(), fields()]
    assert len({UUID(one["id"]) for one in made}) == 3
    assert all(one["correlationid"] == one["id"] for one in made)


IDS = ["../../x", 'a"b\\c', "a\tb\x01\x7f", "größe", "東京 😀", "x" * 100_000, "\u2028", "{}", "%b%d%s", " "]


@pytest.mark.parametrize("text", IDS, ids=lambda text: repr(text[:12]))
def test_any_text_may_be_an_id(text: str) -> None:
    found = fields(("trace-id", text))
    assert (found["id"], found["correlationid"]) == (text, text)


# --- bytes of headers ---

BYTES = [
    (b"plain", "plain"),
    ("größe 東京".encode(), "größe 東京"),
    ("größe".encode("latin-1"), "größe"),
    (b"\xff\xfe", "ÿþ"),
    ("ö".encode() + b"\xff", "Ã¶ÿ"),  # no UTF-8 as a whole
    (b"\xed\xa0\x80", "í\xa0\x80"),  # a surrogate in UTF-8
    (b"\xc0\xaf", "À¯"),
    (b"\xf4\x90\x80\x80", "ô\x90\x80\x80"),  # beyond Unicode
    (b'"\\\t', '"\\\t'),
]


@pytest.mark.parametrize(("sent", "read"), BYTES)
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("trace-id", "id"),
        ("ce-x-request-id", "correlationid"),
        ("ce-model-version", "modelversion"),
        ("ce-tenant", "tenant"),
        ("content-type", "datacontenttype"),
    ],
)
def test_bytes_are_utf_8_else_latin_1(sent: bytes, read: str, name: str, field: str) -> None:
    assert fields((name, wire(sent)))[field] == read


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        (b"azureml.inference.model_inputs", "model_inputs"),
        (b"AzureML.Inference.Model_Inputs", "Model_Inputs"),
        (b"azureml.inference.a.b", "a.b"),
        (b"azureml.inference. x", " x"),
        ("azureml.inference.größe".encode(), "größe"),
        ("azureml.inference.größe".encode("latin-1"), "größe"),
        (b"azureml.inference.\xed\xa0\x80", "í\xa0\x80"),
        (b"azureml.inference.", None),
        (b"azureml.inference", None),
        (b"inference.model_inputs", None),
        (b" azureml.inference.x", None),
        (b"", None),
        ("azureml.\u0130nference.x".encode(), None),
    ],
)
def test_the_collection(sent: bytes, name: str | None) -> None:
    assert collection(headers(("CE-Type", wire(sent)))) == name


def test_a_collection_s_name_may_have_any_letters() -> None:
    assert collection(headers(("ce-type", wire("azureml.inference.no\u00a0break".encode())))) == "no\u00a0break"


def test_without_a_type_there_is_no_collection() -> None:
    assert collection(headers()) is None


# --- time ---


def seconds(text: str) -> bytes:
    return Frame.of(headers(("ce-time", text)), NOW).time


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("1669884690", b"2022-12-01T08:51:30Z"),
        ("1669884690.0", b"2022-12-01T08:51:30Z"),
        ("1669884690.5", b"2022-12-01T08:51:30.500Z"),
        ("1669884690.9996", b"2022-12-01T08:51:30.999Z"),
        ("0", b"1970-01-01T00:00:00Z"),
        ("253402300799", b"9999-12-31T23:59:59Z"),
        ("2022-12-01T08:51:30Z", b"2022-12-01T08:51:30Z"),
        ("2022-12-01T09:51:30.25+01:00", b"2022-12-01T08:51:30.250Z"),
        ("2022-12-01T08:51:30.000000001Z", b"2022-12-01T08:51:30Z"),
    ],
)
def test_a_time_is_in_seconds_or_of_rfc_3339(text: str, time: bytes) -> None:
    assert seconds(text) == time


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "1.66988469e9",
        "1_669884690",
        " 1669884690",
        "1669884690.",
        "nan",
        "-nan",
        "inf",
        "-inf",
        "-1",
        "-0.001",
        "1e300",
        "9" * 400,
        "253402300800",
        "1669884690000",  # milliseconds
        "2022-12-01T08:51:30",  # of which zone?
        "2022-12-01",
        "0001-01-01T00:00:00+23:59",
        "0001-01-01T00:00:00Z",
        "9999-12-31T23:59:59-23:59",
        "2022-13-01T00:00:00Z",
        wire("größe".encode("latin-1")),
        "\u200b",
        '","data":1,"x":"',
        "1" * 100_000,
    ],
    ids=lambda text: repr(text[:30]),
)
def test_now_stands_for_what_is_no_time(text: str) -> None:
    assert seconds(text) == NOW_TEXT


def test_now_stands_for_a_time_that_is_missing() -> None:
    assert Frame.of(headers(), NOW).time == NOW_TEXT


@MANY
@given(text=st.text() | st.floats().map(str) | st.datetimes().map(str) | st.datetimes(timezones=st.just(UTC)).map(str))
@example("0")
def test_whatever_a_time_says_the_line_has_one(text: str) -> None:
    time = seconds(text).decode()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z", time)
    datetime.fromisoformat(time)


# --- further headers ---


def test_further_headers_are_fields_in_the_sdks_order() -> None:
    found = Frame.of(
        headers(
            ("ce-Tenant-Id", "t"),
            ("CE-AGENT", "a"),
            ("Ce-Rows", "2"),
            ("ce-collect-data-type", "pandas.DataFrame"),
            ("ce-model-version", "1"),
        ),
        NOW,
    )
    assert found.extensions == (
        b',"modelversion":"1","collectdatatype":"pandas.DataFrame","agent":"a","tenantid":"t","rows":"2"'
    )


def test_the_first_of_several_headers_counts() -> None:
    found = fields(
        ("trace-id", "T1"),
        ("trace-id", "T2"),
        ("ce-x-request-id", "X1"),
        ("Ce-X-Request-Id", "X2"),
        ("ce-tenant-id", "1"),
        ("ce-tenantid", "2"),
        ("CE-TENANT-ID", "3"),
        ("ce-agent", "a1"),
        ("ce-a-gent", "a2"),
    )
    assert (found["id"], found["correlationid"], found["tenantid"], found["agent"]) == ("T1", "X1", "1", "a1")


@pytest.mark.parametrize("name", sorted(DOCUMENTED - {"modelversion", "collectdatatype", "agent"}))
def test_no_header_takes_the_place_of_a_field(name: str) -> None:
    plain = fields(("trace-id", "T"))
    for spelled in (name, name.upper(), "-".join(name), f"-{name}-"):
        assert fields(("trace-id", "T"), (f"ce-{spelled}", "x")).keys() == plain.keys()


def test_a_header_without_a_name_is_none() -> None:
    plain = fields(("trace-id", "T"))
    assert fields(("trace-id", "T"), ("ce-", "x"), ("ce---", "x"), ("ce", "x"), ("xce-a", "x"), ("ce_a", "x")) == plain


def test_our_own_fields_of_payload_lines_are_free_here() -> None:
    found = fields(("ce-status-code", "7"), ("ce-duration-ms", "1.5"))
    assert (found["statuscode"], found["durationms"]) == ("7", "1.5")


TOKENS = st.text("abcdAB-!#$%&'*+.^_`|~0129", max_size=8).map("ce-".__add__)
KNOWN = st.sampled_from([*sorted(DOCUMENTED), "x-request-id", "model-version", "collect-data-type", "DATA", "Id"])
NAMES = TOKENS | KNOWN.map("ce-".__add__) | st.sampled_from(["trace-id", "content-type", "host"])


@MANY
@given(pairs=st.lists(st.tuples(NAMES, st.binary(max_size=12).map(wire)), max_size=8))
def test_whatever_the_headers_say_the_line_is_one_that_readers_read(pairs: list[tuple[str, str]]) -> None:
    found = fields(*pairs)
    assert found["data"] == []
    further = {name for name in found if name not in DOCUMENTED}
    assert (
        further
        == {field for name, _ in pairs if name.startswith("ce-") and (field := name[3:].replace("-", "").lower())}
        - DOCUMENTED
    )
    assert json.dumps(found, ensure_ascii=False).encode()
