"""The fault server against Azurite, case by case, through Azure's own SDK; then the faults themselves."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from azure.core import MatchConditions
from azure.core.exceptions import AzureError, HttpResponseError, ServiceRequestError
from azure.core.pipeline.transport import AioHttpTransport
from azure.storage.blob import BlobBlock, BlobType, ContentSettings
from azure.storage.blob.aio import BlobClient, BlobServiceClient, ContainerClient

from tests.azure import faults
from tests.azure.azurite import ACCOUNT_KEY, Azurite, azurite
from tests.azure.blob_server import ACCOUNT, MAX_APPEND_BYTES, BlobServer, blob_server
from tests.drills.load import REPOSITORY, until

pytestmark = pytest.mark.usefixtures("_tasks_end")

KEY = {"account_name": ACCOUNT, "account_key": ACCOUNT_KEY}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with azurite(tmp_path_factory.mktemp("azurite"), in_memory=True) as server:
        yield server


@pytest.fixture
async def server() -> AsyncIterator[BlobServer]:
    async with blob_server() as server:
        yield server


@contextlib.asynccontextmanager
async def service(account_url: str) -> AsyncIterator[BlobServiceClient]:
    """The SDK, without its own retries, nor aiohttp's after a lost connection; blocks of 1 KiB for blobs over 4 KiB."""
    sizes = dict.fromkeys(("max_single_put_size", "max_single_get_size", "max_chunk_get_size"), 4096)
    session = aiohttp.ClientSession(auto_decompress=False)
    session._retry_connection = False
    transport = AioHttpTransport(session=session)
    async with BlobServiceClient(
        account_url, KEY, transport=transport, retry_total=0, max_block_size=1024, **sizes
    ) as client:
        yield client


@pytest.fixture(params=["fault server", "Azurite"])
async def account(
    request: pytest.FixtureRequest, real: Azurite, server: BlobServer
) -> AsyncIterator[BlobServiceClient]:
    """A storage account: what holds for one of the two servers must hold for the other."""
    async with service(real.account_url if request.param == "Azurite" else server.account_url) as client:
        yield client


@pytest.fixture
async def container(account: BlobServiceClient) -> ContainerClient:
    return await account.create_container(uuid.uuid4().hex)


@pytest.fixture
async def log(container: ContainerClient) -> BlobClient:
    """An append blob with 10 bytes."""
    blob = container.get_blob_client("endpoint/blue/request/2026/01/02/03/x.jsonl")
    await blob.create_append_blob()
    await blob.append_block(b"0123456789")
    return blob


async def refusal(call: Awaitable[object]) -> tuple[int, str]:
    """Status and error code of a call that must fail."""
    with pytest.raises(HttpResponseError) as caught:
        await call
    assert caught.value.response is not None
    return caught.value.status_code or 0, caught.value.response.headers["x-ms-error-code"]


async def content(blob: BlobClient) -> bytes:
    return await (await blob.download_blob()).readall()


# --- containers ---


async def test_a_container_is_made_once(account: BlobServiceClient) -> None:
    container = account.get_container_client(uuid.uuid4().hex)
    assert not await container.exists()
    await container.create_container()
    assert await container.exists()
    assert await refusal(container.create_container()) == (409, "ContainerAlreadyExists")


@pytest.mark.parametrize(
    "call",
    [
        lambda blob: blob.get_blob_properties(),
        lambda blob: blob.create_append_blob(),
        lambda blob: blob.create_append_blob(match_condition=MatchConditions.IfMissing),
        lambda blob: blob.append_block(b"x", appendpos_condition=0),
        lambda blob: blob.download_blob(),
        lambda blob: blob.upload_blob(b"x", overwrite=True),
        lambda blob: blob.upload_blob(b"x" * 5000, overwrite=True),
        lambda blob: blob.delete_blob(),
    ],
    ids=["look", "create", "create if missing", "append", "read", "put", "put blocks", "delete"],
)
async def test_nothing_is_in_a_missing_container(
    account: BlobServiceClient, call: Callable[[BlobClient], Awaitable[object]]
) -> None:
    blob = account.get_blob_client(uuid.uuid4().hex, "x.jsonl")
    assert await refusal(call(blob)) == (404, "ContainerNotFound")


async def test_a_deleted_container_is_missing(container: ContainerClient, log: BlobClient) -> None:
    await container.delete_container()
    assert await refusal(log.append_block(b"x")) == (404, "ContainerNotFound")
    await container.create_container()
    assert not await log.exists()


# --- append blobs ---


async def test_a_new_append_blob_is_empty(container: ContainerClient) -> None:
    blob = container.get_blob_client("a/b.jsonl")
    made = await blob.create_append_blob(content_settings=ContentSettings(content_type="application/x-ndjson"))
    found = await blob.get_blob_properties()
    assert (found.size, found.append_blob_committed_block_count, found.blob_type) == (0, 0, BlobType.APPENDBLOB)
    assert found.content_settings.content_type == "application/x-ndjson"
    assert (found.etag, found.last_modified) == (made["etag"], made["last_modified"])
    assert await content(blob) == b""


async def test_the_content_type_of_an_append_blob_has_a_default(log: BlobClient) -> None:
    assert (await log.get_blob_properties()).content_settings.content_type == "application/octet-stream"


async def test_to_create_if_missing_leaves_what_is_there(log: BlobClient) -> None:
    again = log.create_append_blob(match_condition=MatchConditions.IfMissing)
    assert await refusal(again) == (409, "BlobAlreadyExists")
    assert await content(log) == b"0123456789"


async def test_to_create_without_a_condition_empties_what_is_there(log: BlobClient) -> None:
    await log.create_append_blob()
    found = await log.get_blob_properties()
    assert (found.size, found.append_blob_committed_block_count) == (0, 0)


async def test_an_append_says_where_it_went(log: BlobClient) -> None:
    before = await log.get_blob_properties()
    answer = await log.append_block(b"abc", appendpos_condition=10)
    assert (answer["blob_append_offset"], answer["blob_committed_block_count"]) == ("10", 2)
    found = await log.get_blob_properties()
    assert (found.size, found.append_blob_committed_block_count) == (13, 2)
    assert before.etag != found.etag == answer["etag"]
    assert await content(log) == b"0123456789abc"


@pytest.mark.parametrize("position", [0, 9, 11])
async def test_an_append_elsewhere_is_refused(log: BlobClient, position: int) -> None:
    refused = await refusal(log.append_block(b"abc", appendpos_condition=position))
    assert refused == (412, "AppendPositionConditionNotMet")
    assert await content(log) == b"0123456789"


async def test_an_append_over_the_most_is_refused(log: BlobClient) -> None:
    assert await refusal(log.append_block(b"abc", maxsize_condition=12)) == (412, "MaxBlobSizeConditionNotMet")
    await log.append_block(b"abc", maxsize_condition=13)


async def test_an_append_to_what_has_changed_is_refused(log: BlobClient) -> None:
    old = (await log.append_block(b"a"))["etag"]
    await log.append_block(b"b")
    refused = await refusal(log.append_block(b"c", etag=old, match_condition=MatchConditions.IfNotModified))
    assert refused == (412, "ConditionNotMet")


@pytest.mark.parametrize(
    "call",
    [
        lambda blob: blob.get_blob_properties(),
        lambda blob: blob.append_block(b"x", appendpos_condition=0),
        lambda blob: blob.download_blob(),
        lambda blob: blob.delete_blob(),
    ],
    ids=["look", "append", "read", "delete"],
)
async def test_an_absent_blob(container: ContainerClient, call: Callable[[BlobClient], Awaitable[object]]) -> None:
    assert await refusal(call(container.get_blob_client("x.jsonl"))) == (404, "BlobNotFound")


async def test_an_append_to_a_block_blob_is_refused(container: ContainerClient) -> None:
    blob = await container.upload_blob("x.json", b"{}")
    assert await refusal(blob.append_block(b"x")) == (409, "InvalidBlobType")


async def test_an_append_over_100_mib_is_refused(log: BlobClient) -> None:
    with pytest.raises(HttpResponseError) as caught:
        await log.append_block(io.BytesIO(bytes(MAX_APPEND_BYTES + 1)))
    assert (
        caught.value.status_code == 413
    )  # RequestBodyTooLarge says Azure's documentation; Azurite has a code of its own
    assert (await log.get_blob_properties()).size == 10


async def test_the_digest_of_an_append_is_looked_at(log: BlobClient) -> None:
    await log.append_block(b"abc", validate_content=True)
    wrong = {"Content-MD5": "AAAAAAAAAAAAAAAAAAAAAA=="}
    assert await refusal(log.append_block(b"abc", headers=wrong)) == (400, "Md5Mismatch")
    assert (await log.get_blob_properties()).size == 13


async def test_appends_at_one_position_at_once_are_done_once(log: BlobClient) -> None:
    answers = await asyncio.gather(
        *(log.append_block(b"%d" % number, appendpos_condition=10) for number in range(8)), return_exceptions=True
    )
    assert sorted(getattr(answer, "status_code", 201) for answer in answers) == [201] + 7 * [412]
    assert (await log.get_blob_properties()).size == 11


async def test_a_deleted_blob_is_absent(log: BlobClient) -> None:
    await log.delete_blob()
    assert not await log.exists()


NAMES = ["a b/c+d.jsonl", "100%/x%2Fy.jsonl", "é/日本.jsonl", "a/#1?x=y&z.jsonl", "a/b:c@d,e;f='g'.jsonl"]


@pytest.mark.parametrize("name", NAMES)
async def test_names_of_all_kinds(container: ContainerClient, name: str) -> None:
    blob = container.get_blob_client(name)
    await blob.create_append_blob()
    await blob.append_block(name.encode())
    assert await content(blob) == name.encode()


async def test_names_are_stored_as_they_are(server: BlobServer) -> None:
    async with service(server.account_url) as client:
        container = await client.create_container("container")
        for name in NAMES:
            await container.upload_blob(name, b"")
    assert list(server.blobs) == [f"container/{name}" for name in NAMES]


# --- reading ---


async def ranged(blob: BlobClient, offset: int, length: int | None = None) -> tuple[int, str | None, bytes]:
    """Status, Content-Range and content of a read."""
    answers: list[Any] = []
    reader = await blob.download_blob(offset, length, raw_response_hook=lambda each: answers.append(each.http_response))
    data = await reader.readall()
    return answers[0].status_code, answers[0].headers.get("Content-Range"), data


async def test_a_range_is_read(log: BlobClient) -> None:
    assert await ranged(log, 2, 3) == (206, "bytes 2-4/10", b"234")
    assert await ranged(log, 8, 100) == (206, "bytes 8-9/10", b"89")
    assert await ranged(log, 9, 1) == (206, "bytes 9-9/10", b"9")
    assert await ranged(log, 4) == (206, "bytes 4-9/10", b"456789")


async def test_a_range_behind_the_end_is_refused(log: BlobClient) -> None:
    assert await refusal(log.download_blob(11, 5)) == (416, "InvalidRange")


async def test_a_large_blob_is_read_in_pieces(log: BlobClient) -> None:
    await log.append_block(bytes(range(256)) * 40)
    assert await content(log) == b"0123456789" + bytes(range(256)) * 40


async def test_a_read_of_what_has_changed_is_refused(log: BlobClient) -> None:
    old = (await log.append_block(b"a"))["etag"]
    await log.append_block(b"b")
    refused = await refusal(log.download_blob(0, 5, etag=old, match_condition=MatchConditions.IfNotModified))
    assert refused == (412, "ConditionNotMet")


# --- block blobs ---


@pytest.mark.parametrize("size", [0, 100, 4096, 4097, 20_000], ids=lambda size: f"{size} bytes")
async def test_a_block_blob_is_put(container: ContainerClient, tmp_path: Path, size: int) -> None:
    """Up to 4096 bytes at once, else in blocks of 1024."""
    path = tmp_path / "body"
    path.write_bytes(data := bytes(number % 251 for number in range(size)))
    blob = container.get_blob_client("bodies/x_request.json")
    for _ in range(2):  # the second time it takes the place of the first
        with path.open("rb") as file:
            settings = ContentSettings(content_type="application/json")
            await blob.upload_blob(file, overwrite=True, content_settings=settings)
    found = await blob.get_blob_properties()
    assert (found.size, found.blob_type, found.append_blob_committed_block_count) == (size, BlobType.BLOCKBLOB, None)
    assert found.content_settings.content_type == "application/json"
    assert await content(blob) == data


@pytest.mark.parametrize("size", [100, 5000])
async def test_a_block_blob_is_not_put_over_another_if_it_should_not(container: ContainerClient, size: int) -> None:
    blob = await container.upload_blob("x.json", b"{}")
    assert await refusal(blob.upload_blob(bytes(size), overwrite=False)) == (409, "BlobAlreadyExists")
    assert await content(blob) == b"{}"


async def test_staged_blocks_are_no_blob_yet(container: ContainerClient) -> None:
    blob = container.get_blob_client("x.json")
    await blob.stage_block("a", b"1")
    await blob.stage_block("b", b"2")
    assert await refusal(blob.get_blob_properties()) == (404, "BlobNotFound")
    assert await refusal(blob.commit_block_list([BlobBlock("a"), BlobBlock("c")])) == (400, "InvalidBlockList")
    await blob.commit_block_list([BlobBlock("b"), BlobBlock("a")])
    assert await content(blob) == b"21"


async def test_blocks_are_not_staged_for_an_append_blob(log: BlobClient) -> None:
    assert await refusal(log.stage_block("a", b"1")) == (409, "InvalidBlobType")


async def test_a_put_takes_the_place_of_an_append_blob(log: BlobClient) -> None:
    await log.upload_blob(b"{}", overwrite=True)
    assert (await log.get_blob_properties()).blob_type == BlobType.BLOCKBLOB


# --- Azurite as a process ---


async def test_azurite_keeps_its_blobs_when_it_is_started_again(tmp_path: Path) -> None:
    with azurite(tmp_path) as real:
        async with service(real.account_url) as client:
            container = await client.create_container("container")
            blob = container.get_blob_client("x")
            await blob.create_append_blob()
            await blob.append_block(b"abc")
            await asyncio.to_thread(real.stop)
            with pytest.raises(ServiceRequestError):
                await blob.exists()
            await asyncio.to_thread(real.start)
            assert await content(blob) == b"abc"
            real.kill()
            await asyncio.to_thread(real.restart)
            assert await content(blob) == b"abc"


# --- faults ---


@contextlib.asynccontextmanager
async def one_log(server: BlobServer) -> AsyncIterator[BlobClient]:
    """The append blob container/x.jsonl of ten bytes, when all went well so far."""
    async with service(server.account_url) as client:
        container = await client.create_container("container")
        blob = container.get_blob_client("x.jsonl")
        await blob.create_append_blob()
        await blob.append_block(b"0123456789")
        yield blob


async def no_answer(server: BlobServer, call: Awaitable[object]) -> None:
    """Makes a call that fails, or that hangs: then gives it up when the fault has happened."""
    task = asyncio.ensure_future(call)
    await until(lambda: server.happened)
    if any("hang" in name for name in server.happened):
        task.cancel()
    with pytest.raises((AzureError, asyncio.CancelledError)):
        await task


def stored(server: BlobServer) -> bytes:
    return bytes(server.blobs["container/x.jsonl"].data)


@pytest.mark.parametrize(
    "fault",
    [fault for name, fault in vars(faults).items() if name.isupper() and isinstance(fault, faults.Fault)],
    ids=lambda fault: fault.name,
)
async def test_a_refused_append_is_not_done(server: BlobServer, fault: faults.Fault) -> None:
    async with one_log(server) as blob:
        server.faults = faults.in_turn(fault)
        if isinstance(fault.answer, faults.Refusal):
            assert await refusal(blob.append_block(b"a")) == fault.answer[:2]
        else:
            await no_answer(server, blob.append_block(b"a"))
        assert stored(server) == b"0123456789"
        assert server.happened == {fault.name: 1}
        await blob.append_block(b"b", appendpos_condition=10)
        assert server.requests["append"] == 3


async def test_a_busy_server_says_when_to_come_back(server: BlobServer) -> None:
    async with one_log(server) as blob:
        server.faults = faults.always(faults.busy(7))
        with pytest.raises(HttpResponseError) as caught:
            await blob.append_block(b"a")
    assert caught.value.response is not None
    assert caught.value.response.headers["Retry-After"] == "7"


@pytest.mark.parametrize(
    "answer", [faults.Silence.RESET, faults.Silence.HANG, faults.Refusal(500, "OperationTimedOut")], ids=str
)
async def test_an_append_whose_answer_is_lost_is_done(server: BlobServer, answer: faults.Answer) -> None:
    async with one_log(server) as blob:
        server.faults = faults.in_turn(faults.lost(answer))
        await no_answer(server, blob.append_block(b"a", appendpos_condition=10))
        assert stored(server) == b"0123456789a"
        assert server.happened == {f"applied, then {answer}": 1}
        assert await refusal(blob.append_block(b"a", appendpos_condition=10)) == (412, "AppendPositionConditionNotMet")


async def test_an_answer_is_lost_only_if_there_was_something_to_lose(server: BlobServer) -> None:
    async with one_log(server) as blob:
        server.faults = faults.in_turn(faults.lost())
        assert await refusal(blob.append_block(b"a", appendpos_condition=3)) == (412, "AppendPositionConditionNotMet")
        assert not server.happened


async def test_a_late_append_comes_after_the_next_one(server: BlobServer) -> None:
    async with one_log(server) as blob:
        server.faults = faults.in_turn(faults.late("append"), faults.late("append"))
        with pytest.raises(AzureError):
            await blob.append_block(b"a", appendpos_condition=10)
        with pytest.raises(AzureError):
            await blob.append_block(b"b")  # nothing says where: it is done wherever the end is by then
        assert server.blobs["container/x.jsonl"].data == b"0123456789a"  # the first was done after the second's answer
        assert server.late_writes == 1
        await blob.append_block(b"c", appendpos_condition=11)
        assert stored(server) == b"0123456789acb"
        assert server.happened == {"applied late, reset": 2, "late write applied": 2}


async def test_a_late_append_at_a_position_that_is_taken_is_refused(server: BlobServer) -> None:
    async with one_log(server) as blob:
        server.faults = faults.in_turn(faults.late("append"))
        with pytest.raises(AzureError):
            await blob.append_block(b"a", appendpos_condition=10)
        await blob.append_block(b"a", appendpos_condition=10)
        assert stored(server) == b"0123456789a"
        assert server.happened == {"applied late, reset": 1, "late write refused": 1}


async def test_a_late_append_waits_for_its_own_blob(server: BlobServer) -> None:
    async with one_log(server) as blob, service(server.account_url) as client:
        server.faults = faults.in_turn(faults.late("append"))
        with pytest.raises(AzureError):
            await blob.append_block(b"a", appendpos_condition=10)
        other = client.get_blob_client("container", "other.jsonl")
        await other.create_append_blob()
        await other.append_block(b"b")
        assert stored(server) == b"0123456789"


async def test_a_late_append_comes_after_a_look(server: BlobServer) -> None:
    async with one_log(server) as blob:
        server.faults = faults.in_turn(faults.late("look", faults.Refusal(500, "OperationTimedOut")))
        assert await refusal(blob.append_block(b"a", appendpos_condition=10)) == (500, "OperationTimedOut")
        assert (await blob.get_blob_properties()).size == 10
        assert stored(server) == b"0123456789a"


async def test_a_late_append_comes_after_a_while(server: BlobServer) -> None:
    async with one_log(server) as blob:
        server.faults = faults.in_turn(faults.late(0.02))
        with pytest.raises(AzureError):
            await blob.append_block(b"a", appendpos_condition=10)
        await until(lambda: server.happened["late write applied"])
        assert stored(server) == b"0123456789a"
        server.faults = faults.in_turn(faults.late(3600))
        with pytest.raises(AzureError):
            await blob.append_block(b"b")
        assert server.late_writes == 1
        await server.close()  # is the end of it
        assert server.late_writes == 0


async def test_a_request_hangs_until_it_may_go_on(server: BlobServer) -> None:
    async with one_log(server) as blob:
        server.faults = faults.in_turn(faults.HANG, faults.lost(faults.Silence.HANG))
        for size in (10, 11):
            call = asyncio.create_task(blob.append_block(b"a"))
            await until(lambda size=size: server.happened.total() == size - 9)
            assert not call.done()
            server.release()
            assert (await call)["blob_append_offset"] == str(size)


async def test_somebody_else_writes_first(server: BlobServer) -> None:
    async with one_log(server) as blob:
        server.faults = faults.in_turn(faults.foreign(b"their own\n"))
        assert await refusal(blob.append_block(b"a", appendpos_condition=10)) == (412, "AppendPositionConditionNotMet")
        assert stored(server) == b"0123456789their own\n"
        assert server.blobs["container/x.jsonl"].blocks == [10, 10]
        assert server.happened == {"foreign write": 1}


async def test_a_slow_answer(server: BlobServer) -> None:
    async with one_log(server) as blob:
        server.faults = faults.always(faults.slow(0.05), "append")
        started = asyncio.get_running_loop().time()
        await blob.append_block(b"a")
        assert asyncio.get_running_loop().time() - started >= 0.05
        assert server.happened == {"slow": 1}


async def test_a_blob_takes_so_many_blocks(server: BlobServer) -> None:
    server.max_blocks = 2
    async with one_log(server) as blob:
        await blob.append_block(b"a")
        assert await refusal(blob.append_block(b"b", appendpos_condition=11)) == (409, "BlockCountExceedsLimit")
        assert stored(server) == b"0123456789a"


async def test_azure_repeats_what_it_could_not_authenticate(server: BlobServer) -> None:
    async with one_log(server) as blob:
        server.faults = faults.always(faults.NOT_AUTHENTICATED)
        with pytest.raises(HttpResponseError) as caught:
            await blob.append_block(b"a")
        assert server.authorizations[-1].startswith(f"SharedKey {ACCOUNT}:")
        assert server.authorizations[-1] in str(caught.value)


async def test_a_server_goes_down_and_comes_up_where_it_was(server: BlobServer) -> None:
    async with one_log(server) as blob:
        server.faults = faults.always(faults.HANG, "read")
        reading = asyncio.create_task(blob.download_blob())
        await until(lambda: server.happened["hang"])
        await server.down()
        with pytest.raises(AzureError):
            await reading
        with pytest.raises(ServiceRequestError):
            await blob.append_block(b"a")
        await server.up()
        await blob.append_block(b"a", appendpos_condition=10)


async def test_the_lines_of_append_blobs(server: BlobServer) -> None:
    async with service(server.account_url) as client:
        container = await client.create_container("container")
        for name in ("b/1.jsonl", "a/2.jsonl"):
            blob = container.get_blob_client(name)
            await blob.create_append_blob()
            await blob.append_block(b'{"in": "%s"}\n\n{"no": 2}\n' % name.encode())
        await container.upload_blob("a/body.json", b"[")
    assert server.lines("container/a/") == [{"in": "a/2.jsonl"}, {"no": 2}]
    assert len(server.lines()) == 4
    server.blobs["container/a/2.jsonl"].append(b'{"torn":')
    with pytest.raises(json.JSONDecodeError):
        server.lines()


def test_a_random_plan_is_the_same_every_time() -> None:
    plan = faults.flaky(seed=7)
    first = [plan("append", f"container/{number}", number) for number in range(1, 1001)]
    assert first == [faults.flaky(seed=7)("append", "container/other", number) for number in range(1, 1001)]
    assert first != [faults.flaky(seed=8)("append", "container/other", number) for number in range(1, 1001)]
    assert 250 < sum(fault is not None for fault in first) < 350
    assert set(first) == {None, *faults.FLAKY}
    assert not any(faults.ambiguous(seed=7)("look", "container/x", number) for number in range(1, 100))


def test_plans_are_put_together() -> None:
    plan = faults.either(faults.in_turn(None, faults.RESET), faults.always(faults.HANG, "look"))
    assert [plan(operation, "container/x", 1) for operation in ("append", "look", "append", "append", "read")] == [
        None,
        faults.HANG,
        faults.RESET,
        None,
        None,
    ]


def test_it_runs_as_a_process() -> None:
    command = [sys.executable, "-m", "tests.azure.blob_server", "--container", "container"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            put = urllib.request.Request(f"{url}/account/container/x", b"abc", method="PUT")
            assert urllib.request.urlopen(put).status == 201
            stats = json.load(urllib.request.urlopen(f"{url}/_stats"))
            assert stats == {"requests": {"put": 1}, "happened": {}, "blobs": 1, "bytes": 3}
        finally:
            process.terminate()
    assert process.returncode == 0
