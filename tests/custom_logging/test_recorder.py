"""From a frame that is taken to its line: disks that are slow, hang, fail or are full, large frames, batches, the stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from proxy.app import StartError
from proxy.config import load
from proxy.custom_logging import endpoint
from proxy.settings import Durability
from proxy.spool.files import BodyPart, Files
from tests.azure.destinations import destination
from tests.custom_logging.frames import (
    ACCEPTED,
    BATCHED,
    COLLECTIONS,
    RECORDED,
    ROWS,
    Answer,
    ask,
    chunked,
    connection,
    frame,
    referred,
    served,
)
from tests.harness import Proxy, exchange, model_server, proxy, read_request, until_refused
from tests.spool.workbench import MIB, hung

pytestmark = pytest.mark.usefixtures("_tasks_end")
FRAMES = {name: {"enabled": True} for name in COLLECTIONS}
NOWHERE = "http://127.0.0.1:9"  # there is no model


class FullDisk(Files):
    """A disk that takes so many bytes of bodies, and no lines of ``model_outputs``."""

    left = 0

    def append(self, collection: str, lines: list[bytes]) -> None:
        if collection == "model_outputs":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self._budget, "allows", full)
                super().append(collection, lines)
        super().append(collection, lines)

    def write_body(self, part: BodyPart, data: bytes) -> None:
        if self.left < len(data):
            full()
        self.left -= len(data)
        super().write_body(part, data)


def full(*_: object) -> bool:
    raise OSError(errno.ENOSPC, "No space left on device")


# --- a disk that is slow ---


async def test_an_answer_waits_for_its_line(tmp_path: Path) -> None:
    files = hung()
    async with served(tmp_path, kind=files) as s:
        async with connection(s.port) as client:
            await client.send(frame())
            answer = asyncio.create_task(client.answer())
            assert await asyncio.to_thread(files.waiting.wait, 10)
            assert (await s.ask(frame(b"[1]"))).status == 422  # who needs no disk is answered meanwhile
            assert not answer.done()
            files.gate.set()
            assert await answer == RECORDED
        assert s.rows() == [[{"a": 1}]]
        assert s.account.unheld == 0


@pytest.mark.parametrize("count", [1, 300])
async def test_while_the_disk_hangs_the_first_frame_waits_and_the_others_do_not(count: int, tmp_path: Path) -> None:
    files = hung()
    async with served(tmp_path, kind=files, max_hold_seconds=0.05) as s:
        assert await s.ask(frame(b'[{"n":0}]')) == ACCEPTED
        s.running.spool._max_hold_seconds = 1000  # who waits now waits in vain
        async with connection(s.port) as client:
            for n in range(1, count + 1):
                assert await client.ask(frame(b'[{"n":%d}]' % n)) == ACCEPTED
        assert s.raw_lines() == []
        assert s.account.pending == count + 1
        files.gate.set()
        await s.idle()
        assert s.rows() == [[{"n": n}] for n in range(count + 1)]
        assert await s.ask(frame(b'[{"n":-1}]')) == RECORDED
        assert len(s.rows()) == count + 2


async def test_once_the_disk_is_back_a_frame_waits_for_its_line_again(tmp_path: Path) -> None:
    files = hung()
    async with served(tmp_path, kind=files, max_hold_seconds=0.05) as s, connection(s.port) as client:
        assert await s.ask(frame()) == ACCEPTED
        files.gate.set()
        await s.idle()
        files.gate.clear()
        files.waiting.clear()
        s.running.spool._max_hold_seconds = 1000
        await client.send(frame())
        answer = asyncio.create_task(client.answer())
        assert await asyncio.to_thread(files.waiting.wait, 10)
        assert (await s.ask(frame(b"[1]"))).status == 422
        assert not answer.done()
        files.gate.set()
        assert await answer == RECORDED


async def test_without_durability_no_answer_waits(tmp_path: Path) -> None:
    files = hung()
    async with served(tmp_path, kind=files, durability=Durability.NONE) as s:
        for _ in range(3):
            assert await s.ask(frame()) == ACCEPTED
        assert s.raw_lines() == []
        files.gate.set()
        await s.idle()
        assert s.rows() == [[{"a": 1}]] * 3


async def test_a_frame_that_finds_the_hand_off_full_is_discarded_and_its_sender_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.spool.writer.HANDOFF_BYTES", 0)
    body = b"[%b]" % (b" " * (MIB // 2 - 1000))
    async with served(tmp_path, memory_bytes=MIB) as s:
        s.running.spool.memory.take(MIB // 2)
        assert await s.ask(frame(body)) == Answer(503, "not recorded: recording is behind, or stops")
        s.running.spool.memory.release(MIB // 2)
        assert s.held_bytes == 0
        assert s.account.discarded == {"memory_full": 1}
        assert await s.ask(frame()) == RECORDED


# --- a disk that fails, or is full ---


async def test_when_the_budget_is_used_up_the_sender_is_told(tmp_path: Path) -> None:
    async with served(tmp_path, max_bytes=2000) as s:
        answers = [await s.ask(frame(b'[{"n":"%b"}]' % (b"x" * 200))) for _ in range(10)]
        taken = answers.count(RECORDED)
        assert 0 < taken < 10
        assert answers[taken:] == [Answer(503, "not recorded: the disk budget (spool.max_bytes) is used up")] * (
            10 - taken
        )
        assert len(s.rows()) == s.account.delivered == taken
        assert s.account.discarded == {"spool_full": 10 - taken}
        assert s.account.refused == {}


async def test_when_the_disk_fails_the_sender_is_told_and_it_recovers(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        root = s.running.bench.places["model_inputs"].root
        root.parent.mkdir(parents=True)
        root.write_bytes(b"in the way")
        answer = await s.ask(frame())
        assert answer.status == 503
        assert answer.text.startswith("not recorded: Not a directory: ") or answer.text.startswith(
            "not recorded: File exists: "
        )
        assert str(root) in answer.text
        assert await s.ask(frame(collection="model_outputs")) == RECORDED
        assert s.account.discarded == {"write_failed": 1}
        root.unlink()
        assert await s.ask(frame()) == RECORDED
        assert s.rows() == [[{"a": 1}]]


async def test_of_those_that_are_written_together_each_learns_its_own_fate(tmp_path: Path) -> None:
    """Lines of one collection are written, those of another are not."""

    class Half(FullDisk, hung()):  # type: ignore[misc]
        pass

    async with served(tmp_path, kind=Half) as s, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connection(s.port)) for _ in range(20)]
        await clients[0].send(frame())
        assert await asyncio.to_thread(Half.waiting.wait, 10)
        for n, client in enumerate(clients[1:], 1):
            await client.send(frame(b'[{"n":%d}]' % n, collection=COLLECTIONS[n % 2]))
        await s.until(lambda: s.account.received == 20)
        Half.gate.set()
        answers = [await client.answer() for client in clients]
        failed = Answer(503, "not recorded: No space left on device: spool file")
        assert answers == [RECORDED, *([failed, RECORDED] * 10)[:19]]
        assert s.rows() == [[{"a": 1}], *([{"n": n}] for n in range(2, 20, 2))]
        assert s.account.discarded == {"write_failed": 10}


async def test_a_defect_of_ours_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        raise ZeroDivisionError

    async with served(tmp_path) as s:
        with monkeypatch.context() as patch:
            patch.setattr(s.endpoint._recorder, "format_of", fail)
            assert await s.ask(frame()) == Answer(503, "not recorded: a defect of payload-logger")
        assert s.account.discarded == {"render_failed": 1}
        assert await s.ask(frame()) == RECORDED
    assert "ZeroDivisionError" in caplog.text


# --- large frames ---


def rows_of(size: int, *, indent: int | None = None) -> bytes:
    """Rows of about ``size`` bytes."""
    return json.dumps(
        [{"n": n, "text": "größe" * 33} for n in range(size // 250)], indent=indent, ensure_ascii=False
    ).encode()


@pytest.mark.parametrize("indent", [None, 1])
async def test_a_large_frame_is_in_a_file_that_is_whole_before_its_line(indent: int | None, tmp_path: Path) -> None:
    seen: list[bytes] = []

    class Watching(Files):
        def append(self, collection: str, lines: list[bytes]) -> None:
            seen.extend(Path(json.loads(line)["dataref"].removeprefix("file://")).read_bytes() for line in lines)
            super().append(collection, lines)

    body = rows_of(MIB, indent=indent)
    head = [b"trace-id: T", b"ce-x-request-id: X", b"ce-time: 1669884690", b"ce-agent: a", b"ce-x: y"]
    async with served(tmp_path, kind=Watching, capture__max_inline_bytes=256 * 1024) as s:
        assert await s.ask(frame(body, *head, content_type=b"application/json; charset=utf-8")) == RECORDED
        (line,) = s.lines()
        (path,) = (path for path in s.files() if not path.name.startswith("a" * 32))
    assert seen == [path.read_bytes()]
    assert path.read_bytes() == body.translate(None, b"\r\n")
    assert path.parent.parts[-6:-4] == ("e", "n")  # endpoint and deployment, no collection
    assert list(line.items())[4:] == [
        ("datacontenttype", "application/json; charset=utf-8"),
        ("time", "2022-12-01T08:51:30Z"),
        ("dataref", path.as_uri()),
        ("contentrange", f"bytes 0-{len(body) - 1}/{len(body)}"),
        ("correlationid", "X"),
        ("xrequestid", "X"),
        ("agent", "a"),
        ("x", "y"),
    ]
    assert line["id"] == "T"


async def test_where_a_file_of_its_own_begins(tmp_path: Path) -> None:
    async with served(tmp_path, capture__max_inline_bytes=1000) as s:
        for size in (999, 1000, 1001):
            assert await s.ask(frame(b"[%b]" % (b" " * (size - 2)))) == RECORDED
        assert ["dataref" in line for line in s.lines()] == [False, False, True]


async def test_frames_with_the_same_id_have_files_of_their_own(tmp_path: Path) -> None:
    bodies = [json.dumps([{"n": n, "text": "x" * 1000}]).encode() for n in range(10)]
    async with served(tmp_path, capture__max_inline_bytes=100) as s:
        answers = await asyncio.gather(*(s.ask(frame(body, b"trace-id: same")) for body in bodies))
        assert answers == [RECORDED] * 10
        assert sorted(s.rows(), key=lambda rows: rows[0]["n"]) == [json.loads(body) for body in bodies]


async def test_a_remote_line_points_to_the_blob(
    tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name in the spool holds the content type as well."""
    body = rows_of(100_000)
    async with destination("blob server", tmp_path, certificate) as to:
        for name, value in to.environment.items():
            monkeypatch.setenv(name, value)
        async with proxy(
            NOWHERE,
            to.url,  # type: ignore[arg-type]
            data_collector={"collections": FRAMES},
            spool__path=str(tmp_path / "spool"),
            storage__ship_interval="100ms",
            capture__max_inline_bytes=1000,
            endpoint_name="my endpoint",
        ) as p:
            assert await ask(port_of(p), frame(body, content_type=b"application/json; a=b")) == RECORDED
            account = await p.recorded(1)
            assert (account.delivered, account.discarded) == (1, {})
        stored = await to.content()
    lines = {name: content for name, (content, _) in stored.items() if "/model_inputs/" in name}
    ((_, line),) = lines.items()
    url = json.loads(line)["dataref"]
    assert url.startswith(f"{to.url}/my%20endpoint/")
    name = url.removeprefix(f"{to.url}/").replace("%20", " ")
    assert stored[name] == (body, "application/json; a=b")
    assert len(stored) == 2


@pytest.mark.parametrize("left", [0, 256 * 1024, 700 * 1024])
async def test_a_large_frame_that_does_not_fit_on_the_disk_leaves_nothing(left: int, tmp_path: Path) -> None:
    class Full(FullDisk):
        pass

    Full.left = left
    async with served(tmp_path, kind=Full, capture__max_inline_bytes=1000) as s:
        assert await s.ask(frame(rows_of(MIB))) == Answer(503, "not recorded: No space left on device: spool file")
        await s.idle()
        assert s.files() == []
        assert s.account.discarded == {"write_failed": 1}
        s.running.bench.files.left = 2 * MIB  # type: ignore[attr-defined]
        assert await s.ask(frame(rows_of(MIB))) == RECORDED
        assert s.rows() == [json.loads(rows_of(MIB))]


async def test_a_large_frame_whose_line_can_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    class Full(FullDisk):
        left = 10 * MIB

    async with served(tmp_path, kind=Full, capture__max_inline_bytes=1000) as s:
        answer = await s.ask(frame(rows_of(MIB), collection="model_outputs"))
        assert answer == Answer(503, "not recorded: No space left on device: spool file")
        await s.idle()
        assert s.files() == []
        assert s.account.discarded == {"write_failed": 1}


async def test_a_large_frame_whose_file_can_not_get_its_name_leaves_nothing(tmp_path: Path) -> None:
    async with served(tmp_path, capture__max_inline_bytes=1000) as s:
        place = s.running.bench.places["model_inputs"]
        place.large_root = tmp_path / "data" / "in the way"
        place.large_root.parent.mkdir()
        place.large_root.write_bytes(b"")
        answer = await s.ask(frame(rows_of(MIB)))
        assert answer.status == 503
        assert answer.text.startswith(f"not recorded: Not a directory: {place.large_root}/")
        assert s.files() == [place.large_root]
        assert s.account.discarded == {"write_failed": 1}
        place.large_root.unlink()


async def test_a_large_frame_that_a_disk_that_hangs_takes_no_more_of_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.spool.writer.HANDOFF_BYTES", 256 * 1024)
    monkeypatch.setattr("proxy.spool.writer.BODY_WAIT_SECONDS", 0.05)
    files = hung()
    async with served(tmp_path, kind=files, capture__max_inline_bytes=1000) as s:
        for _ in range(2):
            assert await s.ask(frame(rows_of(MIB))) == Answer(
                503, "not recorded: the disk is slower than the frames, or hangs"
            )
        assert s.account.discarded == {"memory_full": 2}
        files.gate.set()
        await s.until(lambda: not s.running.spool.stalled and not s.running.spool._spilled_bytes)
        await s.until(lambda: s.files() == [])
        assert await s.ask(frame(rows_of(MIB))) == RECORDED
        assert s.account.received == 3


async def test_a_large_frame_is_accepted_while_the_disk_hangs(tmp_path: Path) -> None:
    files = hung()
    bodies = [rows_of(MIB), rows_of(2 * MIB)]
    async with served(tmp_path, kind=files, max_hold_seconds=0.05, capture__max_inline_bytes=1000) as s:
        assert await s.ask(frame(bodies[0])) == ACCEPTED
        s.running.spool._max_hold_seconds = 1000
        assert await s.ask(chunked(bodies[1], 100_000)) == ACCEPTED
        assert s.raw_lines() == []
        files.gate.set()
        await s.idle()
        assert s.rows() == [json.loads(body) for body in bodies]


async def test_a_large_frame_beyond_the_budget_is_counted_as_such(tmp_path: Path) -> None:
    async with served(tmp_path, max_bytes=300_000, capture__max_inline_bytes=1000) as s:
        answer = await s.ask(frame(rows_of(MIB)))
        assert s.account.discarded == {"spool_full": 1}
        assert answer == Answer(503, "not recorded: the disk budget (spool.max_bytes) is used up")


async def test_a_large_frame_that_is_discarded_is_no_body_that_was_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no line that says so."""
    async with served(tmp_path, kind=FullDisk, capture__max_inline_bytes=1000) as s:
        assert (await s.ask(frame(rows_of(MIB)))).status == 503
        assert s.account.bodies_cut == 0
        assert "Its line says so" not in caplog.text


# --- batches ---


async def test_frames_within_the_window_share_a_line(tmp_path: Path) -> None:
    """With the headers of the first."""
    async with served(tmp_path, custom_logging__batch_window=60) as s:
        first = [b"trace-id: T1", b"ce-x-request-id: X1", b"ce-time: 1669884690", b"ce-agent: a1", b"ce-one: 1"]
        second = [b"trace-id: T2", b"ce-x-request-id: X2", b"ce-time: 1669884999", b"ce-agent: a2", b"ce-two: 2"]
        bodies = [
            b"[]",
            b'[{"a":1}]',
            b" [ ] ",
            b'\r\n[ {"a":2},\r\n{"a":"]"} ]\n',
            b"[{}]",
            b"[]",
            b'[{"A":3}]',
            b"[\n]",
        ]
        for n, body in enumerate(bodies):
            assert (
                await s.ask(frame(body, *(second if n else first), content_type=b"text/json" if n else None)) == BATCHED
            )
            assert await s.ask(frame(b'[{"b":%d}]' % n, collection="model_outputs")) == BATCHED
        assert (await s.ask(frame(b"[1]"))).status == 422
        assert s.held_bytes == sum(map(len, bodies)) + len(bodies) * len(b'[{"b":0}]')
        assert s.files() == []
        assert s.account.received == s.account.pending == 2  # an event is a line
        await s.endpoint.close()
        await s.idle()
        assert s.account.delivered == s.account.received == 2
        (raw,), (line,) = s.raw_lines(), s.lines()
        data = b'[{"a":1},{"a":2},{"a":"]"},{},{"A":3}]'
        assert b',"data":%b,"contentrange":"bytes 0-%d/%d",' % (data, len(data) - 1, len(data)) in raw
        assert list(line) == [
            *("specversion", "id", "source", "type", "datacontenttype", "time", "data", "contentrange"),
            *("correlationid", "xrequestid", "agent", "one"),
        ]
        assert (line["id"], line["correlationid"], line["agent"], line["time"]) == (
            "T1",
            "X1",
            "a1",
            "2022-12-01T08:51:30Z",
        )
        assert line["datacontenttype"] == "application/json"
        assert s.rows("model_outputs") == [[{"b": n} for n in range(len(bodies))]]


async def test_the_documented_batch(tmp_path: Path) -> None:
    """Of azureml-ai-monitoring 0.1.0b4; the documentation shows fewer columns than its contentrange counts."""
    head = [
        b"ce-time: 1709662585",
        b"ce-collect-data-type: pandas.core.frame.DataFrame",
        b"ce-agent: azureml-ai-monitoring/0.1.0b4",
        b"ce-model-version: default",
    ]
    frames = [b'[{"LIMIT_BAL":502970,"AGE":54,"PAY_AMT5":-1155}]', b'[{"LIMIT_BAL":293458,"AGE":35,"PAY_AMT5":7051}]']
    async with served(tmp_path, custom_logging__batch_window=60) as s:
        for n, body in enumerate(frames):
            ids = [
                b"ce-x-request-id: " + (b"other" if n else b"test"),
                b"trace-id: 720b8867-54a2-4876-80eb-1fd6a8975770",
            ]
            assert await s.ask(frame(body, *head, *ids)) == BATCHED
        await s.endpoint.close()
        await s.idle()
        (line,) = s.lines()
    del line["source"], line["contentrange"]
    assert line == {
        "specversion": "1.0",
        "id": "720b8867-54a2-4876-80eb-1fd6a8975770",
        "type": "azureml.inference.model_inputs",
        "datacontenttype": "application/json",
        "time": "2024-03-05T18:16:25Z",
        "data": [
            {"LIMIT_BAL": 502970, "AGE": 54, "PAY_AMT5": -1155},
            {"LIMIT_BAL": 293458, "AGE": 35, "PAY_AMT5": 7051},
        ],
        "correlationid": "test",
        "xrequestid": "test",
        "modelversion": "default",
        "collectdatatype": "pandas.core.frame.DataFrame",
        "agent": "azureml-ai-monitoring/0.1.0b4",
    }


async def test_a_batch_without_rows(tmp_path: Path) -> None:
    async with served(tmp_path, custom_logging__batch_window=60) as s:
        for body in (b"[]", b"[ ]", b"[\n]"):
            assert await s.ask(frame(body)) == BATCHED
        await s.endpoint.close()
        await s.idle()
        (line,) = s.lines()
    assert (line["data"], line["contentrange"]) == ([], "bytes 0-1/2")


async def test_a_batch_ends_with_its_window_and_the_next_frame_begins_another(tmp_path: Path) -> None:
    async with served(tmp_path, custom_logging__batch_window=0.05) as s:
        for n in range(3):
            assert await s.ask(frame(b'[{"n":%d}]' % n, b"trace-id: %d" % n)) == BATCHED
            while len(s.rows()) < n + 1:
                await asyncio.sleep(0.002)
        assert [(line["id"], line["data"]) for line in s.lines()] == [(str(n), [{"n": n}]) for n in range(3)]
        await s.until(lambda: s.held_bytes == 0)


async def test_a_batch_is_no_larger_than_a_line(tmp_path: Path) -> None:
    body = b'[{"n":"%b"}]' % (b"x" * 390)
    assert len(body) == 400
    async with served(tmp_path, custom_logging__batch_window=60, capture__max_inline_bytes=1200) as s:
        for n in range(7):
            assert await s.ask(frame(body, b"trace-id: %d" % n)) == BATCHED
            await s.until(lambda: s.account.pending == 1)
            assert len(s.raw_lines()) == n // 3
        await s.endpoint.close()
        await s.idle()
        assert [(line["id"], len(line["data"])) for line in s.lines()] == [("0", 3), ("3", 3), ("6", 1)]


async def test_a_frame_too_large_for_a_batch_has_a_line_of_its_own(tmp_path: Path) -> None:
    large = rows_of(100_000)
    async with served(tmp_path, custom_logging__batch_window=60, capture__max_inline_bytes=1000) as s:
        assert await s.ask(frame(b'[{"n":1}]')) == BATCHED
        assert await s.ask(frame(large)) == RECORDED
        assert await s.ask(frame(b'[{"n":2}]')) == BATCHED
        assert s.rows() == [json.loads(large)]
        await s.endpoint.close()
        await s.idle()
        assert s.rows() == [json.loads(large), [{"n": 1}, {"n": 2}]]


async def test_what_is_lost_of_batches_is_counted_by_lines(tmp_path: Path) -> None:
    async with served(tmp_path, custom_logging__batch_window=60, max_bytes=1) as s:
        for _ in range(3):
            assert await s.ask(frame()) == BATCHED
        await s.endpoint.close()
        await s.idle()
        assert s.account.discarded == {"spool_full": 1}


async def test_whatever_is_batched_nothing_is_lost_or_comes_twice(tmp_path: Path) -> None:
    """Frames of all sizes, windows that end at any moment."""
    chosen = random.Random(1)
    frames: list[list[dict[str, Any]]] = [
        [{"n": n, "row": row, "text": "x" * chosen.randrange(300)} for row in range(chosen.choice((0, 1, 1, 2, 7)))]
        for n in range(300)
    ]
    async with served(tmp_path, custom_logging__batch_window=0.002, capture__max_inline_bytes=1500) as s:

        async def send(mine: list[list[dict[str, Any]]]) -> None:
            async with connection(s.port) as client:
                for one in mine:
                    body = json.dumps(one, indent=chosen.choice((None, 2))).encode()
                    answer = await client.ask(frame(body))
                    assert answer in ((BATCHED,) if len(body) <= 1500 else (RECORDED,))

        await asyncio.gather(*(send(frames[start::5]) for start in range(5)))
        await s.endpoint.close()
        await s.idle()
        found = [row for rows in s.rows() for row in rows]
        assert len(s.rows()) < 300
    key = "{n:03} {row}".format_map
    assert sorted(found, key=key) == [row for one in frames for row in one]
    for n in range(300):  # the rows of a frame stay together, and in order
        at = [index for index, row in enumerate(found) if row["n"] == n]
        assert [found[index] for index in at] == frames[n]
        assert at == list(range(at[0], at[0] + len(at))) if at else True


# --- the stop ---


def port_of(p: Proxy) -> int:
    assert p.app.custom_logging_address is not None
    return int(p.app.custom_logging_address.rpartition(":")[2])


@contextlib.asynccontextmanager
async def stopping(
    upstream: str, folder: Path, **overrides: object
) -> AsyncIterator[tuple[Proxy, asyncio.Event, asyncio.Task[None]]]:
    """The proxy, what makes it stop, and the task that ends when it has."""
    stop = asyncio.Event()
    running: asyncio.Future[Proxy] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        collector = {"collections": FRAMES | {"request": {"enabled": True}, "response": {"enabled": True}}}
        async with proxy(upstream, folder, data_collector=collector, **overrides) as p:
            running.set_result(p)
            await stop.wait()

    task = asyncio.create_task(run())
    try:
        yield await running, stop, task
    finally:
        stop.set()
        async with asyncio.timeout(30):
            await task


async def test_frames_are_taken_while_the_last_exchanges_finish(tmp_path: Path) -> None:
    """A scoring script sends its frames while it answers."""
    asked, answer = asyncio.Event(), asyncio.Event()

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        asked.set()
        await answer.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()

    async with (
        model_server(model) as served_,
        stopping(served_.url, tmp_path / "data", proxy__drain_seconds=20) as (p, stop, task),
    ):
        request = frame(b"{}", b"Connection: close", line=b"POST /score HTTP/1.1", collection=None)
        score = asyncio.create_task(exchange(p.port, request))
        async with asyncio.timeout(10):
            await asked.wait()
            stop.set()
        await until_refused(p.port)
        assert not task.done()
        assert await ask(port_of(p), frame()) == RECORDED
        assert await ask(port_of(p), frame(collection="model_outputs")) == RECORDED
        answer.set()
        assert (await score).startswith(b"HTTP/1.1 200 OK")
        async with asyncio.timeout(30):
            await task
        with pytest.raises(ConnectionRefusedError):
            await ask(port_of(p), frame())
    account = p.account()
    assert (account.received, account.delivered) == (4, 4)
    assert {name: len(p.lines(name)) for name in ("request", "response", *COLLECTIONS)} == dict.fromkeys(
        ("request", "response", *COLLECTIONS), 1
    )


async def test_what_waits_for_its_batch_is_recorded_at_the_stop(tmp_path: Path) -> None:
    async with stopping(NOWHERE, tmp_path / "data", custom_logging__batch_window=60) as (p, stop, task):
        for n in range(3):
            assert await ask(port_of(p), frame(b'[{"n":%d}]' % n)) == BATCHED
        stop.set()
        await task
    assert [line["data"] for line in p.lines("model_inputs")] == [[{"n": n} for n in range(3)]]
    assert p.account().delivered == 1


async def test_a_frame_that_waits_for_the_disk_when_the_proxy_stops_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "STOP_SECONDS", 0.05)
    files = hung()
    async with served(tmp_path, kind=files, custom_logging__batch_window=0) as s, connection(s.port) as client:
        await client.send(frame())
        assert await asyncio.to_thread(files.waiting.wait, 10)
        await s.endpoint.close()
        assert await client.rest() == b""  # not told that it is recorded, as it is not
        files.gate.set()
        await s.idle()
        assert s.rows() == [[{"a": 1}]]


@pytest.mark.parametrize(
    "part", [frame(ROWS)[:-1], frame(b"", length=5000), chunked(ROWS, 3)[:-1], frame(b"[" * MIB, length=2 * MIB)]
)
async def test_a_frame_that_is_under_way_when_the_proxy_stops_is_not_recorded(
    part: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "STOP_SECONDS", 0.05)
    async with served(tmp_path) as s, connection(s.port) as client:
        await client.send(part)
        assert await s.ask(frame()) == RECORDED  # by now it has come
        await s.endpoint.close()
        assert b" 200 " not in await client.rest()
        assert s.held_bytes == 0
        assert s.account.received == 1
        assert s.rows() == [[{"a": 1}]]


async def test_who_sends_a_frame_when_the_proxy_stops_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "STOP_SECONDS", 0.05)
    async with served(tmp_path) as s, connection(s.port) as client:
        await client.send(frame(ROWS)[:-1])
        await s.until(lambda: s.held_bytes)
        await s.endpoint.close()
        assert (await client.answer()).status == 503
        assert s.account.refused == {"unavailable": 1}


async def test_a_frame_that_is_checked_when_the_proxy_stops_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "STOP_SECONDS", 0.05)
    began, go_on = threading.Event(), threading.Event()

    def slow(_: bytearray) -> None:
        began.set()
        assert go_on.wait(30)

    monkeypatch.setattr("proxy.custom_logging.rows.check", slow)
    async with served(tmp_path) as s, connection(s.port) as client:
        await client.send(frame(rows_of(MIB)))
        assert await asyncio.to_thread(began.wait, 10)
        await s.endpoint.close()
        go_on.set()
        await s.idle()
        assert s.files() == []


async def test_a_frame_that_joins_a_batch_while_the_proxy_stops_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def slow(_: bytearray) -> None:
        began.set()
        assert go_on.wait(30)

    monkeypatch.setattr("proxy.custom_logging.rows.check", slow)
    body = rows_of(100_000)
    async with served(tmp_path, custom_logging__batch_window=60) as s, connection(s.port) as client:
        await client.send(frame(body))
        assert await asyncio.to_thread(began.wait, 10)
        closing = asyncio.create_task(s.endpoint.close())
        while True:  # until it has begun to stop
            try:
                async with connection(s.port):
                    await asyncio.sleep(0)
            except OSError:
                break
        go_on.set()
        assert await client.answer() == BATCHED
        await closing
        await s.idle()
        assert s.rows() == [json.loads(body)]


async def test_a_large_frame_that_waits_for_the_disk_when_the_proxy_stops_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "STOP_SECONDS", 0.05)
    monkeypatch.setattr("proxy.spool.writer.HANDOFF_BYTES", 256 * 1024)
    monkeypatch.setattr("proxy.spool.writer.BODY_WAIT_SECONDS", 60.0)
    files = hung()
    async with served(tmp_path, kind=files, capture__max_inline_bytes=1000) as s, connection(s.port) as client:
        await client.send(frame(rows_of(MIB)))
        assert await asyncio.to_thread(files.waiting.wait, 10)
        await s.until(lambda: s.running.spool._spilled_bytes > 256 * 1024)

        async def stop() -> None:  # as app.py does
            await s.endpoint.close()
            await s.running.spool.close()

        closing = asyncio.create_task(stop())
        await s.until(lambda: None in s.running.spool._jobs)
        files.gate.set()
        await closing
        assert await client.rest() == b""
        assert s.held_bytes == 0
        assert s.files() == []


# --- the start ---


async def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    async with proxy(NOWHERE, tmp_path / "a", data_collector={"collections": FRAMES}) as p:
        address = p.app.custom_logging_address
        with pytest.raises(StartError) as error:
            async with proxy(
                NOWHERE, tmp_path / "b", data_collector={"collections": FRAMES}, custom_logging__listen=address
            ):
                pass
    assert str(error.value) == (
        f"custom_logging.listen: can't listen on {address}: the address is in use by another process; choose another one"
    )


async def test_there_is_a_listener_where_there_may_be_frames(tmp_path: Path) -> None:
    payload: dict[str, Any] = {"request": {"enabled": True}, "response": {"enabled": True}}
    off = {"model_inputs": {"enabled": False}}
    async with proxy(NOWHERE, tmp_path, data_collector={"collections": payload}) as p:
        assert p.app.custom_logging_address is None
    loaded = load(overrides={"data_collector": {"collections": payload | off}}, environ={})
    assert loaded.settings.sdk_endpoint is None
    async with proxy(NOWHERE, tmp_path, data_collector={"collections": payload | off}) as p:  # the section is there
        assert (await ask(port_of(p), frame())).status == 403
        assert p.account().refused == {"disabled_collection": 1}
    for listen, shown in (("localhost:0", "127.0.0.1:"), ("[::1]:0", "[::1]:")):
        async with proxy(NOWHERE, tmp_path, data_collector={"collections": FRAMES}, custom_logging__listen=listen) as p:
            assert p.app.custom_logging_address is not None
            assert p.app.custom_logging_address.startswith((shown, "[::1]:"))
            assert not p.app.custom_logging_address.endswith(":0")


async def test_referred_files_are_those_of_the_lines(tmp_path: Path) -> None:
    """In the whole proxy, below storage.url."""
    body = rows_of(5 * MIB)
    async with proxy(NOWHERE, tmp_path / "data", data_collector={"collections": FRAMES}) as p:
        assert await ask(port_of(p), frame(body)) == RECORDED
        (line,) = p.lines("model_inputs")
        assert referred(line) == json.loads(body)
        path = Path(line["dataref"].removeprefix("file://"))
        assert path.is_relative_to(tmp_path / "data")
        assert "model_inputs" not in path.parts
