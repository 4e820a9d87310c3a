"""Scoring scripts under Azure ML's own inference server, behind the proxy: what becomes of a request, from end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import duckdb
import pytest

from tests.azure.blob_server import reserved_port
from tests.azure.destinations import Stored, destination
from tests.custom_logging import score_examples
from tests.custom_logging.sdk import NEW, enabled, recording, running, sdk_env, write_configuration
from tests.drills.load import REPOSITORY, until

REQUEST = {"data": {"col1": [1, 2, 3], "col2": [2, 3, 4]}}
INPUTS = [{"col1": 1, "col2": 2}, {"col1": 2, "col2": 3}, {"col1": 3, "col2": 4}]
OUTPUTS = [{"sum": 3}, {"sum": 5}, {"sum": 7}]
RESPONSE = {"sum": {"0": 3, "1": 5, "2": 7}}
CONTENT = {"request": REQUEST, "response": RESPONSE, "model_inputs": INPUTS, "model_outputs": OUTPUTS}

Lines = dict[str, list[dict[str, Any]]]


def lines(stored: Stored) -> Lines:
    return {
        collection: [
            json.loads(line)
            for name, (content, _) in stored.items()
            if name.startswith(f"my-endpoint/blue/{collection}/")
            for line in content.splitlines()
        ]
        for collection in CONTENT
    }


async def score(url: str, request_id: str | None, request: object, response: object) -> str:
    """Has ``request`` scored; its id."""
    headers = {} if request_id is None else {"x-request-id": request_id}
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
        session.post(f"{url}/score", json=request, headers=headers) as answer,
    ):
        assert (answer.status, await answer.json()) == (200, response)
        return answer.headers["x-request-id"]


async def recorded(
    score_py: str,
    where: str,
    folder: Path,
    certificate: tuple[Path, Path],
    request_ids: list[str | None],
    *,
    request: object = REQUEST,
    response: object = RESPONSE,
) -> tuple[list[str], Lines]:
    """The ids of the requests, as answered, and the lines there are of them in the end."""
    with reserved_port() as model_port, reserved_port() as frames_port:
        async with destination(where, folder, certificate) as to:
            configuration = write_configuration(
                folder,
                {
                    "endpoint_name": "my-endpoint",
                    "name": "blue",
                    "data_collector": {"collections": {name: {"enabled": "True"} for name in CONTENT}},
                    "proxy": {"listen": "127.0.0.1:0", "upstream": f"http://127.0.0.1:{model_port}"},
                    "storage": {"url": to.url, "ship_interval": "100ms"},
                    "spool": {"path": str(folder / "spool")},
                    "custom_logging": {
                        "listen": f"127.0.0.1:{frames_port}",
                        "sdk_config_path": str(folder / "mdc.json"),
                    },
                },
            )
            variables = await sdk_env(configuration)
            async with running(configuration, variables=to.environment) as proxy:
                async with NEW.server(score_py, model_port, variables, folder / "model"):
                    ids = [await score(proxy.url, one, request, response) for one in request_ids]
                    wanted = [len(ids)] * len(CONTENT)
                    await until(lambda: [*map(len, lines(to.read()).values())] == wanted, 30)
                events = len(ids) * len(CONTENT)
                assert await proxy.stop() == (events, events, 0, 0)
            return ids, lines(await to.content())


def of(found: Lines, field: str) -> dict[str, list[str]]:
    return {name: [line[field] for line in of_collection] for name, of_collection in found.items()}


@pytest.mark.parametrize("where", ["local disk", "Azurite"])
async def test_the_documented_script(where: str, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    """The SDK makes one id for inputs and outputs; request and response have the request's."""
    request_ids, found = await recorded(score_examples.SCORE, where, tmp_path, certificate, [None, "my-id"])
    assert of(found, "data") == {name: [data] * 2 for name, data in CONTENT.items()}
    ids = of(found, "correlationid")
    assert ids["request"] == ids["response"] == request_ids
    assert request_ids[1] == "my-id"
    assert ids["model_inputs"] == ids["model_outputs"]
    assert len({UUID(one) for one in ids["model_inputs"]}) == 2
    check_common(found)


@pytest.mark.parametrize("where", ["local disk", "Azurite"])
async def test_the_documented_script_with_ids(where: str, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    request_ids, found = await recorded(score_examples.SCORE_WITH_IDS, where, tmp_path, certificate, [None, "my-id"])
    assert of(found, "data") == {name: [data] * 2 for name, data in CONTENT.items()}
    ids = of(found, "correlationid")
    assert ids["request"] == ids["response"] == request_ids
    assert ids["model_inputs"] == ids["model_outputs"] == ["test", "test"]
    check_common(found)


def check_common(found: Lines) -> None:
    for name, of_collection in found.items():
        for line in of_collection:
            assert line["type"] == f"azureml.inference.{name}"
            assert line["source"].endswith("/onlineEndpoints/my-endpoint/deployments/blue")
            assert line["xrequestid"] == line["correlationid"]
            assert ("agent" in line) == name.startswith("model_")


@pytest.mark.parametrize("script", ["OF_FLASK", "OF_PARAMETER", "OF_RAW_REQUEST"])
async def test_one_id_from_request_to_outputs(script: str, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    """The proxy gives each request an id, and hands it to the model server: the scoring script can pass it on."""
    score_py = getattr(score_examples, script)
    request_ids, found = await recorded(score_py, "local disk", tmp_path, certificate, [None, "my-id", None])
    assert of(found, "correlationid") == dict.fromkeys(CONTENT, request_ids)
    assert len(set(request_ids)) == 3
    assert request_ids[1] == "my-id"


EXAMPLE = (REPOSITORY / "docs" / "examples" / "score.py").read_text()
IRIS = {"data": [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]}
SPECIES = [{"species": "setosa"}, {"species": "virginica"}]


async def test_the_example_of_our_documentation(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    """Its lines are joined as shown beside it."""
    request_ids, found = await recorded(
        EXAMPLE, "local disk", tmp_path, certificate, [None, "my-id"], request=IRIS, response=SPECIES
    )
    assert of(found, "correlationid") == dict.fromkeys(CONTENT, request_ids)
    (query,) = re.findall("```sql\n(.*?)```", (REPOSITORY / "docs" / "custom-logging.md").read_text(), re.DOTALL)
    with duckdb.connect() as connection:
        rows = connection.sql(query.replace("payload-logger-data/", f"{tmp_path}/data/")).fetchall()
    assert sorted(row[0] for row in rows) == sorted(request_ids)
    assert all(json.loads(outputs) == SPECIES for _, _, outputs, *_ in rows)


async def test_the_example_alone(tmp_path: Path) -> None:
    async with recording(tmp_path) as p:
        await NEW.run(EXAMPLE, enabled(p), tmp_path)
        await p.recorded(2)
        ((inputs,), (outputs,)) = p.lines("model_inputs"), p.lines("model_outputs")
    assert outputs["data"] == SPECIES
    assert inputs["correlationid"] == outputs["correlationid"]
