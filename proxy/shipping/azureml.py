"""Azure ML's control plane: where a datastore leads, and the data assets that the collections are registered as.

Azure Resource Manager; paths, fields and the rule for names are those of its specification, ``stable/2024-04-01/mfe.json`` in
https://github.com/Azure/azure-rest-api-specs/tree/main/specification/machinelearningservices.
Who calls, tries again; only aiohttp repeats a GET or PUT, once, when its connection broke.
No text that leaves this module holds a token, a key or a SAS.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import aiohttp
import orjson

from proxy.settings import MANAGEMENT_URL, Data, Settings
from proxy.shipping import destination
from proxy.shipping.destination import Container, Datastore
from proxy.shipping.store import NotNow

PUBLIC_CLOUD = MANAGEMENT_URL
STORAGE_ENDPOINTS = {  # of each cloud
    PUBLIC_CLOUD: "core.windows.net",
    "https://management.chinacloudapi.cn": "core.chinacloudapi.cn",
    "https://management.usgovcloudapi.net": "core.usgovcloudapi.net",
}
API_VERSION = "2024-04-01"
CALL_SECONDS = 30.0
MAX_ANSWER_BYTES = 1024 * 1024
_CONTAINER_FIELDS = {"AzureBlob": "containerName", "AzureDataLakeGen2": "filesystem"}  # by type of datastore
_ASSET_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9\-_]{0,254}")
_BLOB_ENDPOINT = re.compile(r"[a-z0-9]{3,24}\.blob(\.[a-z0-9-]+)+(:[0-9]+)?/\$?[a-z0-9-]{3,63}")
_ERROR_CODE = re.compile(r"[A-Za-z.]{1,64}")
_SHORT_FORM = re.compile(r"azureml://datastores/[^/]+/paths/", re.IGNORECASE)
_CASELESS = re.compile(r"azureml://.*?/paths/|https://[^/]*", re.IGNORECASE)
_NOT_FOUND = {
    "SubscriptionNotFound": "subscription",
    "ResourceGroupNotFound": "resource group",
    "ResourceNotFound": "workspace",
}
_REFUSALS = {  # by status: reason and words
    401: ("identity", "the token is refused ({said}): it is of another tenant or another cloud."),
    403: ("forbidden", "the identity may not do this ({said}); give it the role 'AzureML Data Scientist' on {places}."),
    404: ("missing", "there is no such {missing} ({said}), looked for in {places}."),
    **dict.fromkeys((408, 429, 503), ("busy", "Azure is busy ({said}).")),
}
_SERVER_FAULT = ("server", "Azure has a fault of its own ({said}).")
_UNKNOWN = ("unexpected", "Azure refuses this ({said}): {message}.")

Token = Callable[[str], Awaitable[str]]  # of a scope; may raise NotNow


@dataclass(frozen=True, slots=True)
class ResolvedDatastore:
    """The container of a datastore, and its secret; without one, an identity is to be used."""

    container: Container
    account_key: str | None = field(default=None, repr=False)
    sas_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class DataAsset:
    """A version of a data asset: a name for a folder, which the workspace knows."""

    subscription_id: str
    resource_group: str
    workspace_name: str
    name: str
    version: str
    data_uri: str


def assets(settings: Settings, roots: Mapping[str, str]) -> dict[str, DataAsset]:
    """The data asset of each enabled collection. ``roots`` are the URLs of their folders; local ones have no asset.

    In a default name, what Azure takes in no name becomes "-". Raises ValueError for a name that Azure does not take.
    """
    workspace = settings.azureml
    found: dict[str, DataAsset] = {}
    for collection, one in settings.data_collector.collections.items():
        root = roots.get(collection, "")
        if workspace is None or not one.enabled or not root.startswith(("azureml://", "https://")):
            continue
        data = one.data or Data()
        default = re.sub(r"[^a-zA-Z0-9\-_]", "-", f"{settings.endpoint_name}-{settings.name}-{collection}")
        name = data.name or default
        if not _ASSET_NAME.fullmatch(name):
            raise ValueError(
                f"data_collector.collections.{collection}.data.name: {name!r} is no name for a data asset; use letters, "
                "digits, - and _, a letter or digit first, 255 at most"
            )
        ids = (workspace.subscription_id, workspace.resource_group, workspace.workspace_name)
        uri = destination.long_form(root, *ids) if root.startswith("azureml:") else root
        found[collection] = DataAsset(*ids, name, data.version, uri)
    return found


class ControlPlane:
    """``url`` is that of the cloud's Azure Resource Manager. Every call may raise NotNow."""

    def __init__(self, token: Token, url: str = PUBLIC_CLOUD) -> None:
        self._token = token
        self._url = url.rstrip("/").lower()

    async def resolve(self, datastore: Datastore) -> ResolvedDatastore:
        """Where ``datastore`` leads, with its own key or SAS if it has one that the identity may list."""
        path = ("datastores", datastore.name)
        answer = await self._call("GET", datastore, *path)
        container = answer.expect(200).container(STORAGE_ENDPOINTS.get(self._url))
        credentials = answer.fields("properties").get("credentials")
        kind = credentials.get("credentialsType") if isinstance(credentials, dict) else None
        if kind not in (None, "AccountKey", "Sas"):
            return ResolvedDatastore(container)
        answer = await self._call("POST", datastore, *path, "listSecrets")
        if answer.status in (400, 401, 403, 404):  # the identity may not list them, or there are none
            return ResolvedDatastore(container)
        secrets = answer.expect(200).fields()
        kind = answer.text(secrets, "secretsType")
        key = answer.text(secrets, "key") if kind == "AccountKey" else None
        sas = answer.text(secrets, "sasToken").removeprefix("?") if kind == "Sas" else None
        return ResolvedDatastore(container, key, sas)

    async def register(self, asset: DataAsset) -> str:
        """Makes ``asset``, or keeps the one that is there; says in words which.

        A version that is there is not put again: that would change its description and tags, and can't change its ``dataUri``.
        """
        path = ("data", asset.name, "versions", asset.version)
        answer = await self._call("GET", asset, *path)
        kept = answer.status != 404
        if not kept:
            body = {"properties": {"dataType": "uri_folder", "dataUri": asset.data_uri}}
            answer = await self._call("PUT", asset, *path, body=body)
            if answer.status in (400, 409):  # somebody else may have been faster
                found = await self._call("GET", asset, *path)
                if found.status != 404:
                    answer, kept = found, True
        uri = answer.expect(200, 201).text(answer.fields("properties"), "dataUri")
        if _normal(uri, asset) != _normal(asset.data_uri, asset):
            return (
                f"{_named(asset)} is kept as it is: it stands for {_shown(uri.partition('?')[0])}, not for {asset.data_uri}, "
                "and a version can't be changed; give the collection's data another version or name."
            )
        return f"{_named(asset)} is {'kept' if kept else 'registered'}: it stands for {asset.data_uri}."

    async def _call(self, method: str, resource: Datastore | DataAsset, *path: str, body: object = None) -> _Answer:
        named, host = _named(resource), self._url.partition("://")[2]
        if not _is_private(self._url):
            raise NotNow("identity", f"{named}: {self._url} is plain HTTP, over which no token is sent; use https.")
        token = await self._token(f"{self._url}/.default")
        group = ("subscriptions", resource.subscription_id, "resourceGroups", resource.resource_group)
        workspace = ("providers", "Microsoft.MachineLearningServices", "workspaces", resource.workspace_name)
        quoted = "/".join(quote(name, safe="") for name in (*group, *workspace, *path))
        url = f"{self._url}/{quoted}?api-version={API_VERSION}"
        headers = {"Authorization": f"Bearer {token}"}
        timeout = aiohttp.ClientTimeout(total=CALL_SECONDS)
        try:
            async with (  # a proxy is for https alone: it would see the token
                aiohttp.ClientSession(timeout=timeout, trust_env=self._url.startswith("https:")) as session,
                session.request(method, url, json=body, headers=headers, allow_redirects=False) as response,
            ):
                content = b""
                while len(content) <= MAX_ANSWER_BYTES and (piece := await response.content.readany()):
                    content += piece
                content = b"" if len(content) > MAX_ANSWER_BYTES else content.replace(token.encode(), b"...")
                return _Answer(resource, response.status, content, response.headers.get("Retry-After", ""))
        except TimeoutError:
            failure = NotNow("timeout", f"{named}: no answer from {host} within {CALL_SECONDS:g} s.")
        except (aiohttp.ClientError, OSError) as error:  # only those of connecting don't quote what was received
            words = str(error) if isinstance(error, aiohttp.ClientConnectorError) else type(error).__name__
            failure = NotNow("unreachable", f"{named}: {host} can't be reached: {words}.")
        raise failure  # here, so that it has no context, which would hold the token


@dataclass(frozen=True, slots=True, repr=False)
class _Answer:
    """What Azure said about ``resource``. It may hold secrets. All but the statuses may raise NotNow."""

    resource: Datastore | DataAsset
    status: int
    body: bytes
    retry_after: str

    def expect(self, *statuses: int) -> _Answer:
        """Itself, if it has one of ``statuses``."""
        if self.status in statuses:
            return self
        try:
            error = self.fields("error")
        except NotNow:
            error = {}
        code, message = (_shown(str(error.get(name, ""))) for name in ("code", "message"))
        code = code if _ERROR_CODE.fullmatch(code) else ""
        reason, words = _REFUSALS.get(self.status, _SERVER_FAULT if self.status >= 500 else _UNKNOWN)
        words = words.format(
            said=f"{self.status} {code}".rstrip(),
            message=message.rstrip(".") or "it does not say why",
            missing=_NOT_FOUND.get(code, "datastore" if isinstance(self.resource, Datastore) else "workspace"),
            places=f"workspace {self.resource.workspace_name}, resource group {self.resource.resource_group}, "
            f"subscription {self.resource.subscription_id}",
        )
        seconds = int(self.retry_after) if re.fullmatch("[0-9]{1,4}", self.retry_after) else 0
        raise NotNow(reason, f"{_named(self.resource)}: {words}", seconds)

    def fields(self, name: str | None = None) -> dict[str, Any]:
        """The object that the body is, or its field ``name``."""
        try:
            value = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            value = None
        if name is not None and isinstance(value, dict):
            value = value.get(name)
        if not isinstance(value, dict):
            raise self._unexpected(f"there is no object {name!r}" if name else "it is no JSON object")
        return value

    def text(self, fields: Mapping[str, Any], name: str) -> str:
        value = fields.get(name)
        if not isinstance(value, str) or not value:
            raise self._unexpected(f"there is no text {name!r}")
        return value

    def container(self, cloud: str | None) -> Container:
        """That of a datastore. ``cloud`` is the only endpoint that tokens may be sent to: who may edit datastores may not choose.

        Its ``protocol`` does not matter: it may be wasbs or abfss as well, and https works in any case.
        """
        properties = self.fields("properties")
        kind = self.text(properties, "datastoreType")
        if kind not in _CONTAINER_FIELDS:
            types = " or ".join(_CONTAINER_FIELDS)
            raise NotNow("datastore", f"{_named(self.resource)} is of type {_shown(kind)}; use one of type {types}.")
        account, name = self.text(properties, "accountName"), self.text(properties, _CONTAINER_FIELDS[kind])
        default = cloud or STORAGE_ENDPOINTS[PUBLIC_CLOUD]
        endpoint = default if properties.get("endpoint") is None else self.text(properties, "endpoint")
        if cloud not in (None, endpoint):
            raise NotNow(
                "datastore", f"{_named(self.resource)} is at {_shown(endpoint)}, which is not this cloud's {cloud}."
            )
        host = f"{account}.blob.{endpoint}"
        if not _BLOB_ENDPOINT.fullmatch(f"{host}/{name}"):
            raise self._unexpected("account, endpoint or container is no such name")
        plain = properties.get("protocol") == "http" and _is_private(f"http://{host}")  # an emulator
        return Container(f"{'http' if plain else 'https'}://{host}", name)

    def _unexpected(self, words: str) -> NotNow:
        return NotNow("unexpected", f"{_named(self.resource)}: the answer ({self.status}) can't be used: {words}.")


def _is_private(url: str) -> bool:
    """Whether what is sent to ``url`` is encrypted, or stays on this machine."""
    try:
        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
        local = host == "localhost" or host.endswith(".localhost")  # RFC 6761
        return scheme == "https" or (scheme == "http" and (local or ip_address(host).is_loopback))
    except ValueError:
        return False


def _normal(uri: str, asset: DataAsset) -> str:
    """For comparison. Case counts in paths, not in the names of resources and hosts."""
    if _SHORT_FORM.match(uri):
        uri = destination.long_form(uri, asset.subscription_id, asset.resource_group, asset.workspace_name)
    uri = unquote(uri).rstrip("/")
    found = _CASELESS.match(uri)
    return uri if found is None else found[0].lower() + uri[found.end() :]


def _named(resource: Datastore | DataAsset) -> str:
    if isinstance(resource, Datastore):
        return f"datastore {resource.name} of workspace {resource.workspace_name}"
    return f"data asset {resource.name}:{resource.version} of workspace {resource.workspace_name}"


def _shown(text: str) -> str:
    """What somebody else wrote, fit for a line of the log."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:300]).strip()
