"""Azure ML's part of Azure Resource Manager, in memory: datastores, their secrets, versions of data assets.

It answers as the API of 2024-04-01 does, with ARM's error codes. What a version stands for can't be changed; to put it again
replaces its description and tags. It goes wrong as a plan of ``tests.azure.faults`` says, or with a ``Raw`` answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote

from aiohttp import web

from tests.azure.faults import Fault, Refusal, Silence

API_VERSION = "2024-04-01"
TOKEN = "eyJ.arm-token.s3cr3t"
SUBSCRIPTION, GROUP, WORKSPACE = "00000000-1111-2222-3333-444444444444", "my-group", "my-workspace"
_ASSET_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9\-_]{0,254}")
_FROZEN = (
    "A data version with this name and version already exists. If you are trying to create a new data version, use a "
    "different name or version. If you are trying to update an existing data version, the existing asset's data uri cannot "
    "be changed. Only tags, description, and isArchived can be updated."
)


class Raw(NamedTuple):
    """An answer as it stands. It is chunked, and cut off after ``body``, if ``whole`` is not set."""

    status: int
    body: bytes
    headers: dict[str, str] = {}  # noqa: RUF012
    whole: bool = True


Plan = Callable[[str, str, int], Fault | Raw | None]


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(code)
        self.status, self.code, self.message = status, code, message


@dataclass
class ArmServer:
    """The server, and what is in it.

    requests counts by operation: get_datastore, list_secrets, get_data, put_data. ``faults`` is asked with the operation,
    the name of the datastore or data asset, and the number of the request.
    """

    url: str = ""
    token: str = TOKEN
    further_tokens: list[str] = field(default_factory=list)
    subscription: str = SUBSCRIPTION
    group: str = GROUP
    workspace: str = WORKSPACE
    datastores: dict[str, dict[str, Any]] = field(default_factory=dict)
    secrets: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    conflict_status: int = 400
    faults: Plan | None = None
    requests: Counter[str] = field(default_factory=Counter)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def add_datastore(self, name: str, *, secrets: dict[str, Any] | None = None, **properties: Any) -> None:
        """A blob container unless ``properties`` say otherwise. Without ``secrets`` it is for identities."""
        self.datastores[name] = {
            "credentials": {"credentialsType": secrets["secretsType"] if secrets else "None"},
            "datastoreType": "AzureBlob",
            "accountName": "myaccount",
            "containerName": "my-container",
            "endpoint": "core.windows.net",
            "protocol": "https",
            **properties,
        }
        if secrets is not None:
            self.secrets[name] = secrets

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            path = [unquote(part) for part in request.rel_url.raw_path.split("/")[1:]]
            self._check(request, path)
            name = path[9] if len(path) > 9 else ""
            match (request.method, *path[8:]):
                case ("GET", "datastores", _):
                    operation, do = "get_datastore", lambda: self._datastore(name)
                case ("POST", "datastores", _, "listSecrets"):
                    operation, do = "list_secrets", lambda: self._secrets(name)
                case ("GET", "data", _, "versions", version):
                    operation, do = "get_data", lambda: self._data(name, version)
                case ("PUT", "data", _, "versions", version):
                    body = await request.json()
                    operation, do = "put_data", lambda: self._put(name, version, body)
                case _:
                    raise _Refused(404, "InvalidResourceType", "The resource type could not be found.")
            return await self._answer(request, operation, name, do)
        except _Refused as error:
            return _error(error.status, error.code, error.message)

    def _check(self, request: web.BaseRequest, path: list[str]) -> None:
        if request.query.getall("api-version", []) != [API_VERSION]:
            raise _Refused(400, "MissingApiVersionParameter", "The api-version query parameter is required.")
        if request.headers.get("Authorization", "").removeprefix("Bearer ") not in (self.token, *self.further_tokens):
            raise _Refused(401, "InvalidAuthenticationToken", "The access token is invalid.")
        if request.method != "GET" and "Content-Length" not in request.headers:
            raise _Refused(411, "LengthRequired", "The request must have a Content-Length.")
        expected = (
            "subscriptions",
            None,
            "resourcegroups",
            None,
            "providers",
            "microsoft.machinelearningservices",
            "workspaces",
        )
        if len(path) < 8 or any(want not in (None, part.lower()) for want, part in zip(expected, path, strict=False)):
            raise _Refused(404, "InvalidResourceType", "The resource type could not be found.")
        if path[1].lower() != self.subscription:
            raise _Refused(404, "SubscriptionNotFound", f"The subscription '{path[1]}' could not be found.")
        if path[3].lower() != self.group.lower():
            raise _Refused(404, "ResourceGroupNotFound", f"Resource group '{path[3]}' could not be found.")
        if path[7].lower() != self.workspace.lower():
            resource = f"Microsoft.MachineLearningServices/workspaces/{path[7]}"
            raise _Refused(404, "ResourceNotFound", f"The Resource '{resource}' was not found.")

    async def _answer(
        self, request: web.BaseRequest, operation: str, name: str, do: Callable[[], web.Response]
    ) -> web.StreamResponse:
        self.requests[operation] += 1
        fault = self.faults(operation, name, self.requests[operation]) if self.faults else None
        if fault is None:
            return do()
        if isinstance(fault, Raw):
            return await _raw(request, fault)
        if fault.applied:
            with contextlib.suppress(_Refused):
                do()
        match fault.answer:
            case Refusal(status, code, seconds):
                answer = _error(status, code, "As the plan says.")
                if seconds is not None:
                    answer.headers["Retry-After"] = str(seconds)
                return answer
            case Silence.HANG:
                await self.released.wait()
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    def _datastore(self, name: str) -> web.Response:
        if name not in self.datastores:
            raise _Refused(404, "UserError", f"Could not find datastore: {name}")
        return web.json_response({"id": "…", "name": name, "properties": self.datastores[name]})

    def _secrets(self, name: str) -> web.Response:
        if name not in self.secrets:
            raise _Refused(400, "UserError", "No secrets for credentials of type None.")
        return web.json_response(self.secrets[name])

    def _data(self, name: str, version: str) -> web.Response:
        if (name, version) not in self.data:
            raise _Refused(404, "UserError", f"Could not find asset with ID: {name}:{version}")
        return web.json_response({"id": "…", "name": version, "properties": self.data[name, version]})

    def _put(self, name: str, version: str, body: dict[str, Any]) -> web.Response:
        properties = body["properties"]
        if not _ASSET_NAME.fullmatch(name) or properties["dataType"] not in ("uri_file", "uri_folder", "mltable"):
            raise _Refused(400, "ValidationError", f"{name} is not valid.")
        known = self.data.get((name, version))
        if known is not None and known["dataUri"] != properties["dataUri"]:
            raise _Refused(self.conflict_status, "UserError", _FROZEN)
        self.data[name, version] = {"description": None, "tags": {}, "isArchived": False, **properties}
        return web.json_response(
            {"id": "…", "name": version, "properties": self.data[name, version]}, status=200 if known else 201
        )


def _error(status: int, code: str, message: str) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message, "details": []}}, status=status)


async def _raw(request: web.BaseRequest, raw: Raw) -> web.StreamResponse:
    if raw.whole:
        return web.Response(status=raw.status, body=raw.body, headers=raw.headers)
    transport = request.transport
    assert isinstance(transport, asyncio.Transport)
    transport.write(b"HTTP/1.1 %d OK\r\nTransfer-Encoding: chunked\r\n\r\n" % raw.status + raw.body)
    transport.close()
    return web.Response()


@contextlib.asynccontextmanager
async def arm_server() -> AsyncIterator[ArmServer]:
    """Runs an empty workspace's control plane on a free port of 127.0.0.1."""
    server = ArmServer()
    runner = web.ServerRunner(web.Server(server.handle, access_log=None), shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = "http://127.0.0.1:{1}".format(*runner.addresses[0])
        yield server
    finally:
        server.released.set()
        await runner.cleanup()
