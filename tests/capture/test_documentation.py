"""The samples of Azure ML's documentation ("Collect production data from models deployed for real-time inferencing")
are what the running proxy writes for the same bytes, field by field and in order."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.capture.traffic import body_file, only, response, send
from tests.harness import answers, model_server, proxy

# Word for word; "Line breaks are shown only for readability."
REQUEST = """\
{"specversion":"1.0",
"id":"19790b87-a63c-4295-9a67-febb2d8fbce0",
"source":"/subscriptions/d511f82f-71ba-49a4-8233-d7be8a3650f4/resourceGroups/mire2etesting/providers/Microsoft.MachineLearningServices/workspaces/mirmasterenvws/onlineEndpoints/localdev-endpoint/deployments/localdev",
"type":"azureml.inference.request",
"datacontenttype":"application/json",
"time":"2022-05-25T08:59:48Z",
"data":{"data": [ [1,2,3,4,5,6,7,8,9,10], [10,9,8,7,6,5,4,3,2,1]]},
"path":"/score",
"method":"POST",
"contentrange":"bytes 0-59/*",
"correlationid":"f6e806c9-1a9a-446b-baa2-901373162105","xrequestid":"f6e806c9-1a9a-446b-baa2-901373162105"}
"""
RESPONSE = """\
{"specversion":"1.0",
"id":"bbd80e51-8855-455f-a719-970023f41e7d",
"source":"/subscriptions/d511f82f-71ba-49a4-8233-d7be8a3650f4/resourceGroups/mire2etesting/providers/Microsoft.MachineLearningServices/workspaces/mirmasterenvws/onlineEndpoints/localdev-endpoint/deployments/localdev",
"type":"azureml.inference.response",
"datacontenttype":"application/json",
"time":"2022-05-25T08:59:48Z",
"data":[11055.977245525679, 4503.079536107787],
"contentrange":"bytes 0-38/39",
"correlationid":"f6e806c9-1a9a-446b-baa2-901373162105","xrequestid":"f6e806c9-1a9a-446b-baa2-901373162105"}
"""
BINARY = """\
{
"specversion":"1.0",
"id":"ba993308-f630-4fe2-833f-481b2e4d169a",
"source":"/subscriptions//resourceGroups//providers/Microsoft.MachineLearningServices/workspaces/ws/onlineEndpoints/ep/deployments/dp",
"type":"azureml.inference.request",
"datacontenttype":"text/plain",
"time":"2022-02-28T08:41:07Z",
"data":"https://masterws0373607518.blob.core.windows.net/modeldata/mdc/%5Byear%5D%5Bmonth%5D%5Bday%5D-%5Bhour%5D_%5Bminute%5D/ba993308-f630-4fe2-833f-481b2e4d169a",
"path":"/score?size=1",
"method":"POST",
"contentrange":"bytes 0-80770/80771",
"datainblob":"true"
}
"""
# 59 characters are shown; the range says that there were 60 bytes: the last was a line end.
SENT = b'{"data": [ [1,2,3,4,5,6,7,8,9,10], [10,9,8,7,6,5,4,3,2,1]]}\n'
ANSWERED = b"[11055.977245525679, 4503.079536107787]"
ID = ("x-request-id", "f6e806c9-1a9a-446b-baa2-901373162105")
WORKSPACE = {
    "endpoint_name": "localdev-endpoint",
    "name": "localdev",
    "azureml": {
        "subscription_id": "d511f82f-71ba-49a4-8233-d7be8a3650f4",
        "resource_group": "mire2etesting",
        "workspace_name": "mirmasterenvws",
    },
    "capture__extended_fields": "False",
}


def line_of(sample: str) -> bytes:
    """The sample as it stands in a file, without what differs each time."""
    return anonymous(sample.replace("\n", "").encode() + b"\n")


def anonymous(line: bytes) -> bytes:
    line, ids = re.subn(
        rb'"id":"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"', b'"id":ID', line
    )
    line, times = re.subn(rb'"time":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"', b'"time":TIME', line)
    assert (ids, times) == (1, 1)
    return line


@pytest.mark.parametrize("chunked", [True, False])
async def test_the_request_and_the_response(tmp_path: Path, chunked: bool) -> None:
    async with (
        model_server(answers(response(ANSWERED, chunked=not chunked))) as model,
        proxy(model.url, tmp_path, **WORKSPACE) as p,
    ):
        await send(p, SENT, "application/json", ID, chunked=chunked)
        sent = line_of(REQUEST) if chunked else line_of(REQUEST).replace(b"0-59/*", b"0-59/60")
        answered = line_of(RESPONSE) if chunked else line_of(RESPONSE).replace(b"0-38/39", b"0-38/*")
        assert list(map(anonymous, p.raw_lines("request"))) == [sent]
        assert list(map(anonymous, p.raw_lines("response"))) == [answered]
        ids = [p.lines(collection)[0]["id"] for collection in ("request", "response")]
        assert ids[0] != ids[1]
        for path in (*p.files("request"), *p.files("response")):
            assert re.fullmatch(
                r"\d{4}/\d\d/\d\d/\d\d/[0-9a-f]{32}\d{6}\.jsonl", str(path.relative_to(path.parents[4]))
            )
            assert path.parents[4].parent == tmp_path / "localdev-endpoint" / "localdev"


async def test_the_binary_request(tmp_path: Path) -> None:
    sample = json.loads(BINARY)
    body = (bytes(range(256)) * 316)[:80771]
    async with (
        model_server(answers(response(b"[]"))) as model,
        proxy(model.url, tmp_path, endpoint_name="ep", name="dp", capture__extended_fields=False) as p,
    ):
        await send(p, body, "text/plain", target="/score?size=1")
        event = only(p, "request")
        # The sample is older than the two ids, which all later ones have.
        assert list(event) == [*sample, "correlationid", "xrequestid"]
        differing = {"id", "time", "data", "source", "correlationid", "xrequestid"}
        assert {name: event[name] for name in event if name not in differing} == {
            name: sample[name] for name in sample if name not in differing
        }
        assert event["source"] == sample["source"].replace("/ws/", "//")
        file = body_file(event)
        assert file.read_bytes() == body
        assert file.name == event["id"]
        (lines,) = (path for path in p.files("request") if path.suffix == ".jsonl")
        assert file.parent == lines.parent


async def test_a_large_payload(tmp_path: Path) -> None:
    body = b"[" + b"1," * 2_200_000 + b"2]"
    async with (
        model_server(answers(response(b"[]"))) as model,
        proxy(model.url, tmp_path, endpoint_name="my_endpoint", name="blue", capture__extended_fields=False) as p,
    ):
        await send(p, body)
        event = only(p, "request")
        file = body_file(event)
        assert file.read_bytes() == body
        assert event["contentrange"] == f"bytes 0-{len(body) - 1}/{len(body)}"
        root = tmp_path / "my_endpoint" / "blue"
        (lines,) = p.files("request")
        rolled_time = lines.parent.relative_to(root / "request")
        assert file == root / rolled_time / f"{event['id']}.jsonl"
