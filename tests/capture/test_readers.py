"""What reads such datasets reads these: the CloudEvents SDK, DuckDB, pandas, each by itself."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest
from cloudevents.core.formats.json import JSONFormat

from tests.capture.traffic import body_file, checked, send
from tests.harness import model_server, proxy, read_request

JSON = "application/json"
LARGE = b"[" + b"0.5, " * 2000 + b"1]"
EVENTS = 'data: {"token": "t0"}\n\ndata: {"token": "t1"}\n\ndata: [DONE]\n\n'

# body, Content-Type, further headers, query; what a reader finds in ``data``
BODIES: list[tuple[bytes, str | None, list[Any], str, Any]] = [
    (b'{"data": [[1, 2.5, -3e-2], [4, 5, 6]]}', JSON, [], "", {"data": [[1, 2.5, -0.03], [4, 5, 6]]}),
    (b'{\r\n  "a": null,\n\t"b": [true, false]\n}\n', JSON, [], "?x=1&y=%20", {"a": None, "b": [True, False]}),
    ('{"é": "日本 \U0001f600 \u2028\u0085"}'.encode(), JSON, [], "", {"é": "日本 \U0001f600 \u2028\u0085"}),
    (rb'{"text": "a\r\n\t\"\\\u00e9\ud83d\ude00\u0001"}', JSON, [], "", {"text": 'a\r\n\t"\\é\U0001f600\x01'}),
    (b"[]", "application/x+json", [], "", []),
    (b"12", JSON, [], "", 12),
    (b"null", JSON, [], "", None),
    (b'"text"', JSON, [], "", "text"),
    (b"[" * 100 + b"]" * 100, JSON, [], "", json.loads("[" * 100 + "]" * 100)),
    (b"[" * 150 + b"]" * 150, JSON, [], "", "[" * 150 + "]" * 150),  # DuckDB would read no line of the dataset
    (b"{broken", JSON, [], "?status=400", "{broken"),
    (b'{"Data": 1, "data": 2, "id": {}}', JSON, [], "?status=500", {"Data": 1, "data": 2, "id": {}}),
    ('plain "quoted"\r\nlines\r and \u2028'.encode(), "text/plain", [], "", 'plain "quoted"\r\nlines\r and \u2028'),
    ("caf\xe9".encode("latin-1"), "text/plain; charset=latin-1", [], "", "café"),
    (b"a=1&b=2", "application/x-www-form-urlencoded", [], "", "a=1&b=2"),
    (EVENTS.encode(), "text/event-stream", [], "", EVENTS),
    (gzip.compress(b'{"packed": 1}'), JSON, [("Content-Encoding", "gzip")], "", {"packed": 1}),
    (b"\x89PNG\r\n\x00\xff", "image/png", [], "", b"\x89PNG\r\n\x00\xff"),
    (LARGE, JSON, [], "", LARGE),
    (b"", JSON, [], "?status=204", None),
    (b"{}", JSON, [("Data", "header"), ("X_Data", '"\\'), b"X-Latin: caf\xe9"], "", {}),
]
# Digits that a reader of doubles can't keep; pandas' parser refuses them.
DIGITS = b'{"big": 123456789012345678901234567890, "exact": 0.1000000000000000055511151231257827, "far": 1e400}'


@dataclass
class Dataset:
    root: Path
    bodies: list[Any]

    def lines(self, collection: str) -> list[bytes]:
        files = self.root.glob(f"{collection}/*/*/*/*/*.jsonl")
        return [line for file in files for line in file.read_bytes().splitlines(keepends=True)]

    def pattern(self, collection: str = "*") -> str:
        return str(self.root / collection / "*/*/*/*/*.jsonl")


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The same body with the same type and coding; the status is in the query."""
    head, body = await read_request(reader)
    status = int((re.search(rb"status=(\d+)", head) or [b"", b"200"])[1])
    headers = re.findall(rb"\r\n(content-(?:type|encoding|length): [^\r]*)", head, re.IGNORECASE)
    writer.write(b"HTTP/1.1 %d Reason\r\n" % status + b"\r\n".join(headers) + b"\r\n\r\n" + body)
    await writer.drain()


async def _record(folder: Path, bodies: list[Any]) -> None:
    overrides: dict[str, Any] = {
        "endpoint_name": "e",
        "name": "d",
        "capture__max_inline_bytes": 4096,
        "data_collector__request_logging__capture_headers": [
            "Data",
            "data-",
            "X_Data",
            "X-Latin",
            "x-request-id",
            "Type",
        ],
    }
    async with model_server(_echo) as model, proxy(model.url, folder, **overrides) as p:
        for number, (body, content_type, more, query, _) in enumerate(bodies):
            await send(p, body, content_type, ("x-request-id", f"id-{number}"), *more, target=f"/echo{query}")
        assert p.account().delivered == 2 * len(bodies)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("dataset")
    asyncio.run(_record(folder, BODIES))
    return Dataset(folder / "e" / "d", BODIES)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("digits")
    bodies = [(DIGITS, JSON, [], "", None)]
    asyncio.run(_record(folder, bodies))
    return Dataset(folder / "e" / "d", bodies)


@pytest.fixture
def duck() -> Iterator[duckdb.DuckDBPyConnection]:
    connection = duckdb.connect(config={"threads": "1"})
    yield connection
    connection.close()


def number_of(event: Any) -> int:
    return int(event["correlationid"].removeprefix("id-"))


def holds(event: dict[str, Any], data: Any, expected: Any) -> bool:
    """Whether ``data`` is what was sent; ``expected`` bytes stand for a file of them."""
    if isinstance(expected, bytes):
        return body_file(event).read_bytes() == expected
    return bool(data == expected and type(data) is type(expected))


@pytest.mark.parametrize("collection", ["request", "response"])
def test_each_line_is_what_was_sent(dataset: Dataset, collection: str) -> None:
    events = [checked(line) for line in dataset.lines(collection)]  # no two names alike, ignoring case
    assert [number_of(event) for event in events] == list(range(len(BODIES)))
    for event, (_, _, _, query, expected) in zip(events, BODIES, strict=True):
        assert holds(event, event["data"], expected), event
        if collection == "response":
            assert event["statuscode"] == int(query.partition("status=")[2] or 200)
        else:
            assert event["path"] == f"/echo{query}"


@pytest.mark.parametrize("collection", ["request", "response"])
def test_the_cloudevents_sdk_takes_every_line(dataset: Dataset, collection: str) -> None:
    lines = dataset.lines(collection)
    assert len(lines) == len(BODIES)
    ids = set()
    for line in lines:
        event = JSONFormat().read(None, line)  # raises where a rule of the specification is broken
        raw = json.loads(line)
        expected = BODIES[number_of(raw)][4]
        ids.add(event.get_id())
        assert event.get_specversion() == "1.0"
        assert event.get_type() == f"azureml.inference.{collection}"
        assert event.get_source().endswith("/onlineEndpoints/e/deployments/d")
        assert event.get_datacontenttype() == raw["datacontenttype"]
        moment = event.get_time()
        assert moment is not None
        assert timedelta(0) <= datetime.now(UTC) - moment < timedelta(minutes=5)
        assert holds(raw, event.get_data(), expected)
        assert event.get_extension("correlationid") == raw["correlationid"]
    assert len(ids) == len(BODIES)


def test_duckdb_finds_the_schema_and_joins_the_pairs(dataset: Dataset, duck: duckdb.DuckDBPyConnection) -> None:
    rows = duck.execute(
        """
        with events as (from read_ndjson($pattern, union_by_name = true))
        select q.correlationid, q.data::varchar, r.data::varchar, q.datainblob, r.datainblob, q.id, r.id,
               r.statuscode, r.durationms, q.capturestatus, q.bodybytes, epoch(r.time::timestamp - q.time::timestamp)
        from events q join events r using (correlationid)
        where q.type = 'azureml.inference.request' and r.type = 'azureml.inference.response'
        order by q.correlationid
        """,
        {"pattern": dataset.pattern()},
    ).fetchall()
    raw = {name: {number_of(e): e for e in map(checked, dataset.lines(name))} for name in ("request", "response")}
    assert len(rows) == len(BODIES)
    for correlation, asked, answered, asked_file, answered_file, asked_id, answered_id, *more in rows:
        number = number_of({"correlationid": correlation})
        request, response = raw["request"][number], raw["response"][number]
        assert (str(asked_id), str(answered_id)) == (request["id"], response["id"])
        assert [file == "true" or file is True for file in (asked_file, answered_file)] == ["datainblob" in request] * 2
        for data, event in ((asked, request), (answered, response)):
            assert (None if data is None else json.loads(data)) == event["data"]
            assert holds(event, event["data"], BODIES[number][4])
        status, duration, capture, length, seconds = more
        assert (status, duration, capture) == (response["statuscode"], response["durationms"], "complete")
        assert length == len(BODIES[number][0])
        assert 0 <= seconds < 60


def test_duckdb_reads_numbers_of_any_length(digits: Dataset, duck: duckdb.DuckDBPyConnection) -> None:
    rows = duck.execute(
        "select data->>'big', data->>'far' from read_ndjson(?, columns = {data: 'JSON'})", [digits.pattern()]
    ).fetchall()
    assert rows == [("123456789012345678901234567890", "1e400")] * 2


def test_digits_stay_in_the_lines(digits: Dataset) -> None:
    for collection in ("request", "response"):
        (line,) = digits.lines(collection)
        assert b'"data":' + DIGITS + b"," in line


def test_pandas_reads_and_joins_the_pairs(dataset: Dataset) -> None:
    frames = {}
    for collection in ("request", "response"):
        (file,) = dataset.root.glob(f"{collection}/*/*/*/*/*.jsonl")
        frames[collection] = pd.read_json(file, lines=True, dtype=False, precise_float=True)
        assert len(frames[collection]) == len(BODIES)
    pairs = frames["request"].merge(frames["response"], on="correlationid", suffixes=("_q", "_r"), validate="1:1")
    assert len(pairs) == len(BODIES)
    asked, answered = (pd.to_datetime(pairs[name], utc=True) for name in ("time_q", "time_r"))
    assert (asked <= answered).all()
    for _, row in pairs.iterrows():
        _, content_type, _, query, expected = BODIES[number_of(row)]
        assert row["statuscode"] == int(query.partition("status=")[2] or 200)
        for side in ("_q", "_r"):
            event = {name: row[name + side] for name in ("data", "datainblob")}
            assert row["datacontenttype" + side] == content_type
            data = None if expected is None and pd.isna(event["data"]) else event["data"]
            assert holds(event, data, expected), row
