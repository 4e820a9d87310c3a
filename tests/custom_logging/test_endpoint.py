"""The endpoint of the SDK on the wire: what it takes and refuses, and what it does with clients that are none."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from proxy.custom_logging import endpoint, rows
from proxy.custom_logging.endpoint import ASIDE_BYTES
from tests.custom_logging.frames import (
    ACCEPTED,
    COLLECTIONS,
    RECORDED,
    ROWS,
    Answer,
    chunked,
    connection,
    frame,
    served,
)
from tests.spool.workbench import MIB, hung

pytestmark = pytest.mark.usefixtures("_tasks_end")

# --- what the SDK sends ---

# Recorded from azureml-ai-monitoring 0.1.0b1, b2, b3, b4 (pandas 2.3) and 1.0.0 (pandas 3.1), with requests 2.34: they differ
# in what they say of themselves, and of pandas. 0.1.2 of its predecessor is known from a line in Azure ML's documentation.
SDK_REQUEST = (
    b"POST /modeldata/log HTTP/1.1\r\n"
    b"Host: 127.0.0.1:50011\r\n"
    b"User-Agent: python-requests/2.34.2\r\n"
    b"Accept-Encoding: gzip, deflate\r\n"
    b"Accept: */*\r\n"
    b"Connection: keep-alive\r\n"
    b"%b"
    b"Content-Type: application/json\r\n"
    b"trace-id: 725aa8af-0834-415c-aaf5-c76d0c08f694\r\n"
    b"ce-time: 1669884690\r\n"
    b"ce-type: azureml.inference.inputs\r\n"
    b"ce-collect-data-type: %b\r\n"
    b"ce-agent: %b\r\n"
    b"ce-x-request-id: 3711655d-b04c-4aa2-a6c4-6a90cbfcb73f\r\n"
    b"ce-model-version: default\r\n"
    b"Content-Length: 117\r\n"
    b"\r\n"
    b'[{"label":"DRUG","pattern":"aspirin"},{"label":"DRUG","pattern":"trazodone"},{"label":"DRUG","pattern":"citalopram"}]'
)
PANDAS_2, PANDAS_3 = b"pandas.core.frame.DataFrame", b"pandas.DataFrame"
SDKS = [
    (b"monitoring-sdk/0.1.2", PANDAS_2),
    (b"azureml-ai-monitoring/0.1.0b1", PANDAS_2),
    (b"azureml-ai-monitoring/0.1.0b2", PANDAS_2),
    (b"azureml-ai-monitoring/0.1.0b3", PANDAS_2),
    (b"azureml-ai-monitoring/0.1.0b4", PANDAS_2),
    (b"azureml-ai-monitoring/1.0.0", PANDAS_2),
    (b"azureml-ai-monitoring/1.0.0", PANDAS_3),
]
# https://learn.microsoft.com/azure/machine-learning/how-to-collect-production-data
DOCUMENTED_LINE = {
    "specversion": "1.0",
    "id": "725aa8af-0834-415c-aaf5-c76d0c08f694",
    "source": "/subscriptions/636d700c-4412-48fa-84be-452ac03d34a1/resourceGroups/mire2etesting/providers"
    "/Microsoft.MachineLearningServices/workspaces/mirmasterws/onlineEndpoints/localdev-endpoint/deployments/localdev",
    "type": "azureml.inference.inputs",
    "datacontenttype": "application/json",
    "time": "2022-12-01T08:51:30Z",
    "data": [
        {"label": "DRUG", "pattern": "aspirin"},
        {"label": "DRUG", "pattern": "trazodone"},
        {"label": "DRUG", "pattern": "citalopram"},
    ],
    "correlationid": "3711655d-b04c-4aa2-a6c4-6a90cbfcb73f",
    "xrequestid": "3711655d-b04c-4aa2-a6c4-6a90cbfcb73f",
    "modelversion": "default",
    "collectdatatype": "pandas.core.frame.DataFrame",
    "agent": "monitoring-sdk/0.1.2",
    "contentrange": "bytes 0-116/117",
}
DOCUMENTED_SETTINGS: dict[str, Any] = {
    "collections": {"inputs": {"enabled": True}},
    "endpoint_name": "localdev-endpoint",
    "name": "localdev",
    "azureml": {
        "subscription_id": "636d700c-4412-48fa-84be-452ac03d34a1",
        "resource_group": "mire2etesting",
        "workspace_name": "mirmasterws",
    },
}


@pytest.mark.parametrize(("agent", "data_type"), SDKS)
async def test_the_documented_line_of_each_sdk(agent: bytes, data_type: bytes, tmp_path: Path) -> None:
    async with served(tmp_path, **DOCUMENTED_SETTINGS) as s:
        assert await s.ask(SDK_REQUEST % (b"", data_type, agent)) == RECORDED
        (line,) = s.lines("inputs")
        assert line == DOCUMENTED_LINE | {"agent": agent.decode(), "collectdatatype": data_type.decode()}
        assert s.account.delivered == s.account.received == 1


async def test_the_order_of_the_fields_is_that_of_real_files(tmp_path: Path) -> None:
    async with served(tmp_path, **DOCUMENTED_SETTINGS) as s:
        await s.ask(SDK_REQUEST % (b"", *reversed(SDKS[0])))
        (line,) = s.lines("inputs")
    assert list(line) == [
        *("specversion", "id", "source", "type", "datacontenttype", "time", "data", "contentrange"),
        *("correlationid", "xrequestid", "modelversion", "collectdatatype", "agent"),
    ]


async def test_a_header_of_a_context_comes_in_latin_1(tmp_path: Path) -> None:
    """Recorded from 1.0.0: ``BasicCorrelationContext(headers={"Tenant-Id": "größer"})``."""
    async with served(tmp_path, **DOCUMENTED_SETTINGS) as s:
        assert await s.ask(SDK_REQUEST % (b"ce-Tenant-Id: gr\xf6\xdfer\r\n", PANDAS_3, b"a")) == RECORDED
        (line,) = s.lines("inputs")
    assert line["tenantid"] == "größer"


# --- bytes of the head ---


async def test_bytes_of_headers_on_the_wire(tmp_path: Path) -> None:
    """UTF-8, else latin-1; the first of several; names that are taken; and names that differ in dashes and case."""
    head = [
        b"trace-id: gr\xc3\xb6\xc3\x9fer",
        b"ce-x-request-id: gr\xf6\xdfer",
        b"ce-model-version: \xed\xa0\x80",
        b"ce-model-version: 2",
        b'CE-Agent: a"\\b\tc',
        b"ce-type: azureml.inference.model_outputs",
        b"ce-data: x",
        b"ce-Da-Ta-Ref: x",
        b"ce-id: x",
        b"ce-source: x",
        b"ce-Tenant-Id: 1",
        b"ce-tenantid: 2",
        b"ce-: x",
        b"ce-empty:",
        b"ce-!#$%&'*+.^_`|~: odd",
    ]
    async with served(tmp_path) as s:
        assert await s.ask(frame(ROWS, *head)) == RECORDED
        (line,) = s.lines()
        assert s.lines("model_outputs") == []
    assert (line["id"], line["correlationid"], line["modelversion"]) == ("größer", "größer", "í\xa0\x80")
    assert (line["agent"], line["tenantid"], line["empty"]) == ('a"\\b\tc', "1", "")
    assert (line["data"], line["!#$%&'*+.^_`|~"]) == ([{"a": 1}], "odd")
    assert "dataref" not in line
    assert len(line) == 15


@pytest.mark.parametrize(
    "id_",
    [
        b"../../x",
        b"/etc/passwd",
        b'a","data":[],"x":"',
        b"a\\",
        b"a\tb",
        b"%b%s%d{}",
        b".",
        b"\xff" * 1000,
        b"x" * 8000,
    ],
    ids=lambda id_: repr(id_[:12]),
)
async def test_ids_do_no_harm(id_: bytes, tmp_path: Path) -> None:
    """Those of frames in a line, and in files of their own."""
    large = json.dumps([{"a": "x" * 1000}]).encode()
    async with served(tmp_path, capture__max_inline_bytes=500) as s:
        for body in (ROWS, large):
            assert await s.ask(frame(body, b"trace-id: " + id_, b"ce-x-request-id: " + id_)) == RECORDED
        expected = id_.decode("latin-1")
        assert [(line["id"], line["correlationid"]) for line in s.lines()] == [(expected, expected)] * 2
        assert s.rows() == [json.loads(ROWS), json.loads(large)]
        for path in s.files():
            assert path.is_relative_to(tmp_path / "data" / "e" / "n")
            assert path.suffix == ".jsonl"


@pytest.mark.parametrize("id_", [b"a\nb", b"a\r\nce-data: 1", b"a\x00b", b"x" * 100_000], ids=lambda id_: repr(id_[:8]))
async def test_ids_that_are_no_http_do_no_harm(id_: bytes, tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        answer = await s.ask(frame(ROWS, b"trace-id: " + id_))
        assert answer.status in (200, 400)
        for line in s.lines():
            assert line["data"] == [{"a": 1}]
        assert await s.ask(frame()) == RECORDED


async def test_names_of_collections_are_compared_without_case(tmp_path: Path) -> None:
    collections = {name: {"enabled": True} for name in ("Model_Inputs", "größe", "a.b-c")}
    async with served(tmp_path, collections=collections) as s:
        for head in (b"AZUREML.INFERENCE.MODEL_inputs", b"azureml.inference.model_inputs"):
            assert await s.ask(frame(ROWS, b"CE-TYPE: " + head, collection=None)) == RECORDED
        for name in ("größe".encode(), "GRÖßE".encode(), "größe".encode("latin-1")):
            assert await s.ask(frame(ROWS, b"ce-type: azureml.inference." + name, collection=None)) == RECORDED
        assert await s.ask(frame(collection="A.B-C")) == RECORDED
        found = {name: [line["type"] for line in s.lines(name)] for name in collections}
    assert found == {
        "Model_Inputs": ["azureml.inference.Model_Inputs"] * 2,
        "größe": ["azureml.inference.größe"] * 3,
        "a.b-c": ["azureml.inference.a.b-c"],
    }


# --- bodies on the wire ---

BODY = b'[{"text":"gr\xc3\xb6\xc3\x9fe","n":1.50e3},\r\n {"text":"\\u00e9\\r\\n","n":-0}]\n'
IN_LINE = b'[{"text":"gr\xc3\xb6\xc3\x9fe","n":1.50e3}, {"text":"\\u00e9\\r\\n","n":-0}]'

ON_THE_WIRE = {
    "at once": frame(BODY),
    "HTTP/1.0": frame(BODY, line=b"POST /modeldata/log HTTP/1.0"),
    "absolute": frame(BODY, line=b"POST http://h:1/modeldata/log HTTP/1.1"),
    "query": frame(BODY, line=b"POST /modeldata/log?a=b HTTP/1.1"),
    "chunked": chunked(BODY, 7),
    "one chunk": chunked(BODY, 1000),
    "trailers": chunked(BODY, 1000, last=b"0\r\nce-data: x\r\n\r\n"),
    "chunk extensions": chunked(BODY, 1000).replace(b"\r\n[", b";a=b\r\n["),
    "identity": frame(BODY, b"Content-Encoding: Identity"),
    "blank first": b"\r\n" + frame(BODY),
}


@pytest.mark.parametrize("case", ON_THE_WIRE)
async def test_a_body_stands_in_its_line_as_it_came(case: str, tmp_path: Path) -> None:
    """But for line ends between tokens."""
    async with served(tmp_path) as s:
        assert await s.ask(ON_THE_WIRE[case]) == RECORDED
        (raw,), (line,) = s.raw_lines(), s.lines()
        assert b',"data":%b,"contentrange":"bytes 0-%d/%d"' % (IN_LINE, len(BODY) - 1, len(BODY)) in raw
        assert line["data"] == json.loads(BODY)


@pytest.mark.parametrize("case", ["at once", "chunked"])
async def test_a_frame_may_come_byte_by_byte(case: str, tmp_path: Path) -> None:
    async with served(tmp_path) as s, connection(s.port) as client:
        for byte in ON_THE_WIRE[case]:
            await client.send(bytes([byte]))
            await asyncio.sleep(0)
        assert await client.answer() == RECORDED
        assert s.rows() == [json.loads(BODY)]


async def test_a_connection_serves_one_frame_after_the_other(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        async with connection(s.port) as client:
            for n in range(3):
                assert await client.ask(frame(b'[{"n":%d}]' % n)) == RECORDED
                assert (await client.ask(frame(collection="other"))).status == 404
        assert s.rows() == [[{"n": n}] for n in range(3)]


async def test_frames_that_come_at_once_on_one_connection_are_answered_in_order(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        async with connection(s.port) as client:
            await client.send(
                b"".join(
                    [
                        frame(b'[{"n":1}]'),
                        frame(b'[{"n":2}]', collection="other"),
                        chunked(b'[{"n":3}]', 2),
                        frame(b"[3]"),
                        frame(b'[{"n":4}]', line=b"PUT /modeldata/log HTTP/1.1"),
                        frame(b'[{"n":5}]', b"Connection: close"),
                    ]
                )
            )
            assert [(await client.answer()).status for _ in range(6)] == [200, 404, 200, 422, 405, 200]
            assert await client.rest() == b""
        assert s.rows() == [[{"n": 1}], [{"n": 3}], [{"n": 5}]]


async def test_who_waits_to_be_asked_for_the_body_is_asked(tmp_path: Path) -> None:
    head, body = frame(ROWS, b"Expect: 100-continue").split(b"\r\n\r\n")
    async with served(tmp_path) as s:
        async with connection(s.port) as client:
            for _ in range(2):
                await client.send(head + b"\r\n\r\n")
                async with asyncio.timeout(10):
                    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
                assert await client.ask(body) == RECORDED
        assert s.rows() == [[{"a": 1}]] * 2


@pytest.mark.parametrize("more", [{"collection": "other"}, {"content_type": b"text/plain"}, {"length": 1000}])
async def test_who_is_refused_is_not_asked_for_the_body(more: dict[str, Any], tmp_path: Path) -> None:
    head = frame(ROWS, b"Expect: 100-continue", **more).split(b"\r\n\r\n")[0]
    async with served(tmp_path, custom_logging__max_body_bytes=100) as s, connection(s.port) as client:
        assert (await client.ask(head + b"\r\n\r\n")).status in (404, 413, 415)
        await client.send(b"x" * more.get("length", len(ROWS)))  # some send it nevertheless
        assert await client.ask(frame()) == RECORDED


async def test_many_connections_at_once(tmp_path: Path) -> None:
    """Frames of all sizes: some are checked aside, and some have files of their own."""
    bodies = [json.dumps([{"n": n, "text": "x" * (n * 37 % 100 * 2000)}]).encode() for n in range(100)]
    async with served(tmp_path, capture__max_inline_bytes=128 * 1024) as s:
        answers = await asyncio.gather(
            *(s.ask(frame(body, collection=COLLECTIONS[n % 2])) for n, body in enumerate(bodies))
        )
        assert answers == [RECORDED] * 100
        found = [rows_ for name in COLLECTIONS for rows_ in s.rows(name)]
        assert sorted(found, key=lambda one: one[0]["n"]) == [json.loads(body) for body in bodies]
        assert len({line["id"] for name in COLLECTIONS for line in s.lines(name)}) == 100
        assert s.account.delivered == 100


async def test_a_large_frame_that_is_checked_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def slow(body: bytearray) -> None:
        if len(body) >= ASIDE_BYTES:
            began.set()
            assert go_on.wait(30)
        check(body)

    check = rows.check
    monkeypatch.setattr(rows, "check", slow)
    large = frame(b'[{"a":"%b"}]' % (b"x" * (ASIDE_BYTES - 10)))
    assert large.endswith(b"x" * 100 + b'"}]')
    async with served(tmp_path) as s, connection(s.port) as client, connection(s.port) as leaves:
        await client.send(large)
        await leaves.send(large)
        assert await asyncio.to_thread(began.wait, 10)
        assert await s.ask(frame()) == RECORDED
        leaves.writer.close()
        go_on.set()
        assert await client.answer() == RECORDED
        await s.until(lambda: len(s.lines()) == 3)  # who has sent all of a frame need not stay


async def test_who_has_sent_a_frame_may_leave(tmp_path: Path) -> None:
    files = hung()
    async with served(tmp_path, kind=files) as s:
        async with connection(s.port) as client:
            await client.send(frame())
            assert await asyncio.to_thread(files.waiting.wait, 10)
        files.gate.set()
        await s.until(lambda: len(s.lines()) == 1)


# --- content types ---


@pytest.mark.parametrize(
    "content_type",
    [
        b"application/json",
        b"Application/JSON; charset=utf-8",
        b"application/json; charset=latin-1",  # JSON is UTF-8
        b"text/json",
        b"application/vnd.x+json;a=b",
        b"application/octet-stream",
        b"",
        None,
    ],
)
async def test_json_may_come_as_json_or_as_no_type_in_particular(content_type: bytes | None, tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        assert await s.ask(frame(b'[{"a":"\xc3\xa9"}]', content_type=content_type)) == RECORDED
        (line,) = s.lines()
    assert line["datacontenttype"] == (content_type or b"application/json").decode()
    assert line["data"] == [{"a": "é"}]


# --- refusals ---

SET = {name: {"enabled": name != "switched_off"} for name in ("model_inputs", "Größe", "switched_off", "request")}
COMPACT = (
    "the body is not valid JSON: unexpected character, expected a JSON value at byte 0; is it the SDK's compact format, a table "
    "for people to read? Set AZUREML_MDC_FORMAT_COMPACT to false, or use AZUREML_MDC_CONFIG_PATH"
)
COMPACT_ROWS = COMPACT.replace(
    "the body is not valid JSON: unexpected character, expected a JSON value at byte 0",
    "element 0 of the array is a number; each has to be an object, a row of the frame",
)
CODED = "a frame is sent as it is, without Content-Encoding; here it is 'GZip'"
REFUSALS: list[tuple[bytes, int, str, str | None]] = [
    (
        frame(collection=None),
        400,
        "the header ce-type has to be azureml.inference.COLLECTION, not absent",
        "malformed",
    ),
    (
        frame(ROWS, b"ce-type: azureml.inference.", collection=None),
        400,
        "the header ce-type has to be azureml.inference.COLLECTION, not 'azureml.inference.'",
        "malformed",
    ),
    (
        frame(ROWS, b"ce-type: gr\xf6\xdfe'", collection=None),
        400,
        'the header ce-type has to be azureml.inference.COLLECTION, not "gr\\udcf6\\udcdfe\'"',
        "malformed",
    ),
    (
        frame(ROWS, b"ce-type: " + b"x" * 5000, collection=None),
        400,
        f"the header ce-type has to be azureml.inference.COLLECTION, not '{'x' * 200}'",
        "malformed",
    ),
    (
        frame(collection="other"),
        404,
        "the collection 'other' is not in data_collector.collections (enabled are: 'model_inputs', 'Größe')",
        "unknown_collection",
    ),
    (
        frame(collection="x" * 5000),
        404,
        f"the collection '{'x' * 200}' is not in data_collector.collections (enabled are: 'model_inputs', 'Größe')",
        "unknown_collection",
    ),
    (
        frame(collection="Switched_Off"),
        403,
        "the collection 'Switched_Off' is disabled; set data_collector.collections.switched_off.enabled to 'True'",
        "disabled_collection",
    ),
    (
        frame(collection="Request"),
        403,
        "the collection 'Request' is recorded of the traffic itself; give the Collector another name",
        "unknown_collection",
    ),
    (
        frame(collection="response"),
        403,
        "the collection 'response' is recorded of the traffic itself; give the Collector another name",
        "unknown_collection",
    ),
    (
        frame(content_type=b"text/csv; charset=utf-8"),
        415,
        "a frame is sent as application/json, not 'text/csv; charset=utf-8'",
        "bad_type",
    ),
    (
        frame(content_type=b"application/x-www-form-urlencoded"),
        415,
        "a frame is sent as application/json, not 'application/x-www-form-urlencoded'",
        "bad_type",
    ),
    (frame(b"a  b\n0  1  2", content_type=b"application/octet-stream"), 415, COMPACT, "bad_type"),
    (frame(b"[1]", content_type=b"application/octet-stream; a=b"), 415, COMPACT_ROWS, "bad_type"),
    (
        frame(b"a  b\n0  1  2", content_type=None),
        422,
        ("the body is not valid JSON: unexpected character, expected a JSON value at byte 0, near 'a  b\\n0  1  2'"),
        "not_rows",
    ),
    (frame(content_type=b"image/png"), 415, "a frame is sent as application/json, not 'image/png'", "bad_type"),
    (frame(b"x", b"Content-Encoding: GZip"), 415, CODED, "bad_type"),
    (
        frame(b"x", b"Content-Encoding: identity, br", content_type=None),
        415,
        CODED.replace("GZip", "identity, br"),
        "bad_type",
    ),
    (
        frame(b'{"a":1}'),
        422,
        "the body is an object, not an array of objects",
        "not_rows",
    ),
    (
        frame(b'[{"a":1},[1]]', content_type=b"application/x+json"),
        422,
        "element 1 of the array is an array; each has to be an object, a row of the frame",
        "not_rows",
    ),
    (frame(b""), 422, "the body is empty", "not_rows"),
    (
        frame(b'[{"Id":1,"ID":2}]'),
        422,
        (
            "the names 'Id' and 'ID' are equal but for case, and Spark and DuckDB can't read a dataset with both; rename one "
            "of the columns"
        ),
        "not_rows",
    ),
    (frame(b'[{"a":1,"a":2}]'), 422, "an object has the name 'a' twice", "not_rows"),
    (
        frame(b'[{"a":%b}]' % (b"[" * 99 + b"]" * 99)),
        422,
        "it nests deeper than 100 levels, which readers fail on",
        "not_rows",
    ),
    (
        frame(b'[{"a":NaN}]'),
        422,
        "the body is not valid JSON: unexpected character, expected a JSON value at byte 6, near '[{\"a\":NaN}]'",
        "not_rows",
    ),
    (
        frame(ROWS + b" " * (20_001 - len(ROWS))),
        413,
        "a body of 20001 bytes is more than custom_logging.max_body_bytes allows (20000); collect fewer rows at once",
        "too_large",
    ),
    (
        chunked(b"[%b]" % (b" " * 19_999), 1000),
        413,
        "the body is more than custom_logging.max_body_bytes allows (20000); collect fewer rows at once",
        "too_large",
    ),
    (frame(line=b"POST / HTTP/1.1"), 404, "there is nothing at '/'; frames go to POST /modeldata/log", None),
    (
        frame(line=b"POST /modeldata/log/ HTTP/1.1"),
        404,
        "there is nothing at '/modeldata/log/'; frames go to POST /modeldata/log",
        None,
    ),
    (
        frame(line=b"GET /%ff%0a'" + b"x" * 5000 + b" HTTP/1.1"),
        404,
        "there is nothing at \"/%ff\\n'" + "x" * 194 + '"; frames go to POST /modeldata/log',
        None,
    ),
    (frame(line=b"GET /modeldata/log HTTP/1.1"), 405, "'GET' is not for frames; use POST", None),
    (frame(line=b"PUT /modeldata/log HTTP/1.1"), 405, "'PUT' is not for frames; use POST", None),
    (frame(line=b"OPTIONS /modeldata/log HTTP/1.1"), 405, "'OPTIONS' is not for frames; use POST", None),
]


@pytest.mark.parametrize(("request_", "status", "words", "reason"), REFUSALS, ids=range(len(REFUSALS)))
async def test_who_is_refused_is_told_why(
    request_: bytes, status: int, words: str, reason: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is counted each time, and logged once; nothing is recorded."""
    async with served(tmp_path, collections=SET, custom_logging__max_body_bytes=20_000) as s:
        for _ in range(3):
            assert await s.ask(request_) == Answer(status, words)
            assert s.held_bytes == 0
        assert s.account.refused == ({} if reason is None else {reason: 3})
        assert s.account.received == 0
        assert await s.ask(frame()) == RECORDED
    logged = [record.getMessage() for record in caplog.records]
    said = words.partition(", near ")[0]  # what stands in the frame is for its sender
    of = " of model_inputs" if status in (413, 415, 422) else ""
    assert logged == (
        [] if reason is None else [f"A frame{of} was refused ({status}): {said}. Further ones are counted."]
    )


async def test_the_key_of_a_disabled_collection_is_named_as_it_is_configured(tmp_path: Path) -> None:
    async with served(tmp_path, collections=SET | {"Off": {"enabled": False}}) as s:
        assert "data_collector.collections.Off.enabled " in (await s.ask(frame(collection="off"))).text


async def test_each_kind_of_refusal_is_logged_and_again_when_it_is_news(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path) as s:
        for _ in range(2):
            await s.ask(frame(b"{}"))
            await s.ask(frame(collection="other"))
            await s.ask(frame(b"[1]"))
        assert len(caplog.records) == 2
        monkeypatch.setattr(endpoint, "QUIET_SECONDS", 0.0)
        await s.ask(frame(b"[2]"))
        assert len(caplog.records) == 3
        assert s.account.refused == {"not_rows": 5, "unknown_collection": 2}
        assert str(s.account).endswith("7 frames refused (5 not_rows, 2 unknown_collection)")


async def test_a_body_of_just_the_size_that_is_allowed_is_taken(tmp_path: Path) -> None:
    body = b"[%b]" % (b" " * 19_998)
    bodies = [
        frame(body),
        chunked(body, 3000),
    ]
    async with served(tmp_path, custom_logging__max_body_bytes=20_000) as s:
        for request in bodies:
            assert await s.ask(request) == RECORDED
        assert s.rows() == [[]] * 2


async def test_who_announces_too_much_is_answered_before_the_body(tmp_path: Path) -> None:
    async with served(tmp_path) as s, connection(s.port) as client:
        answer = await client.ask(frame(b"[", length=32 * MIB + 1))
        assert answer.status == 413
        assert "custom_logging.max_body_bytes allows (33554432)" in answer.text
        await client.send(b" " * 32 * MIB)  # the SDK listens only then
        assert await client.ask(frame()) == RECORDED


async def test_no_frame_is_larger_than_the_memory(tmp_path: Path) -> None:
    async with served(tmp_path, memory_bytes=MIB) as s:
        answer = await s.ask(frame(b" " * (MIB + 1)))
        assert (answer.status, s.account.refused) == (413, {"too_large": 1})
        assert "more than capture.memory_bytes allows, half of it (524288)" in answer.text


# --- frames that don't arrive ---


def cut(request: bytes, missing: int) -> tuple[bytes, bytes]:
    return request[:-missing], request[-missing:]


CUT = {
    "body": cut(frame(ROWS), 3),
    "no body": cut(frame(ROWS), len(ROWS)),
    "chunk": cut(chunked(ROWS, 5), 9),
    "last chunk": cut(chunked(ROWS, 5), 5),
    "large": cut(frame(b'[{"a":"%b"}]' % (b"x" * MIB)), 1),
}


@pytest.mark.parametrize("case", CUT)
async def test_a_frame_that_its_sender_cut_is_not_recorded(case: str, tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        async with connection(s.port) as client:
            await client.send(CUT[case][0])
        await s.until(lambda: s.account.refused == {"malformed": 1})
        assert s.held_bytes == 0
        assert s.files() == []


@pytest.mark.parametrize("case", CUT)
async def test_a_frame_that_does_not_arrive_is_not_waited_for(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does what comes of it later do any harm."""
    part, rest = CUT[case]
    async with served(tmp_path) as s:
        async with connection(s.port) as client:
            with monkeypatch.context() as patch:
                patch.setattr(endpoint, "RECEIVE_SECONDS", 0.25)
                assert await client.ask(part) == Answer(408, "the frame did not arrive within 0.25 s")
            assert s.account.refused == {"malformed": 1}
            assert s.held_bytes == 0
            assert await client.ask(rest + frame()) == RECORDED
        assert s.rows() == [[{"a": 1}]]


async def test_a_body_whose_chunks_are_none_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        for bad in (b"zz\r\n", b"-1\r\n", b"5 \r\n[{}]x", b"ffffffffffffffffff\r\n", b"5\r\n[{}]xyz\r\n0\r\n\r\n"):
            async with connection(s.port) as client:
                answer = await client.ask(frame(bad, b"Transfer-Encoding: chunked", length=None))
                assert answer.status == 400, bad
        assert s.held_bytes == 0
        assert s.files() == []


async def test_without_memory_a_frame_is_refused_and_taken_when_there_is_some(tmp_path: Path) -> None:
    files = hung()
    body = json.dumps([{"a": "x" * 520_000}]).encode()
    async with served(tmp_path, kind=files, memory_bytes=MIB) as s, connection(s.port) as first:
        await first.send(frame(body))
        assert await asyncio.to_thread(files.waiting.wait, 10)
        s.running.spool.memory.take(20_000)
        for request in (frame(body), chunked(body, 60_000)):
            assert await s.ask(request) == Answer(
                503,
                "not recorded: there is no memory for it (capture.memory_bytes): the disk is slower than the traffic",
            )
        assert s.account.refused == {"unavailable": 2}
        s.running.spool.memory.release(20_000)
        files.gate.set()
        assert await first.answer() == RECORDED
        assert await s.ask(frame(body)) == RECORDED
        assert s.rows() == [json.loads(body)] * 2


# --- what is no frame at all ---

GARBAGE = {
    "nothing of HTTP": b"hello\r\n\r\n",
    "zeros": b"\x00" * 100 + b"\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2,
    "SSH": b"SSH-2.0-OpenSSH_9.9\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "version": frame(line=b"POST /modeldata/log HTTP/9.9"),
    "method": frame(line=b"PO ST /modeldata/log HTTP/1.1"),
    "no header": frame(ROWS, b"no header"),
    "blank in a name": frame(ROWS, b"ce-a b: x"),
    "letter in a name": frame(ROWS, b"ce-gr\xc3\xb6\xc3\x9fe: x"),
    "zero in a header": frame(ROWS, b"ce-a: \x00"),
    "return in a header": frame(ROWS, b"ce-a: b\rc"),
    "folded header": frame(ROWS, b"ce-a: b", b" c"),
    "negative length": frame(length=-2),
    "no length": frame(ROWS, b"Content-Length: x", length=None),
    "two lengths": frame(ROWS, b"Content-Length: 3"),
    "length and chunks": chunked(ROWS, 3, b"Content-Length: 9"),
    "large header": frame(ROWS, b"ce-a: " + b"x" * 70_000),
    "large target": frame(line=b"POST /modeldata/log?" + b"x" * 70_000 + b" HTTP/1.1"),
    "many headers": frame(ROWS, *(b"ce-a%d: x" % n for n in range(1000))),
    "target": frame(line=b"POST //[ HTTP/1.1"),
    "absolute target": frame(line=b"POST http://[::1/modeldata/log HTTP/1.1"),
    "port of a target": frame(line=b"POST http://h:99999/modeldata/log HTTP/1.1"),
    "no target": frame(line=b"POST * HTTP/1.1"),
    "connect": frame(b"", line=b"CONNECT h:1 HTTP/1.1"),
    "upgrade": frame(b"{}", b"Connection: Upgrade", b"Upgrade: websocket"),
    "proxy": frame(line=b"GET http://example.com/ HTTP/1.1"),
}


@pytest.mark.parametrize("case", GARBAGE)
async def test_garbage_is_answered(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a word in the log, but for the refusal of what might be a frame."""
    caplog.set_level(logging.DEBUG)
    async with served(tmp_path) as s:
        async with connection(s.port) as client:
            answer = await client.ask(GARBAGE[case])
            assert 400 <= answer.status < 500
            assert answer.text
            assert "Traceback" not in answer.text
        assert s.files() == []
        assert s.held_bytes == 0
        assert await s.ask(frame()) == RECORDED
    assert [record.getMessage() for record in caplog.records if "was refused" not in record.getMessage()] == []
    assert "Traceback" not in caplog.text


async def test_connections_that_say_nothing_are_no_trouble(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with served(tmp_path) as s:
        for said in (b"", b"P", b"POST /modeldata/log HTTP/1.1\r\nHo", b"\x00"):
            async with connection(s.port) as client:
                await client.send(said)
                assert await s.ask(frame()) == RECORDED
        assert s.account.refused == {}
    assert caplog.text == ""


async def test_a_defect_is_told_and_logged_and_holds_no_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    async with served(tmp_path) as s:
        with monkeypatch.context() as patch:
            patch.setattr(rows, "check", fail)
            for body in (ROWS, b" " * ASIDE_BYTES):
                answer = await s.ask(frame(body))
                assert answer == Answer(500, "not recorded: a defect of payload-logger; its log says more")
                assert s.held_bytes == 0
        assert caplog.text.count("A frame was not taken, by a defect of payload-logger.") == 2
        assert "ZeroDivisionError" in caplog.text
        assert await s.ask(frame()) == RECORDED


async def test_an_answer_does_not_wait_for_a_disk_that_hangs(tmp_path: Path) -> None:
    files = hung()
    async with served(tmp_path, kind=files, max_hold_seconds=0.05) as s:
        assert await s.ask(frame()) == ACCEPTED
        assert not files.gate.is_set()
