"""Where a URL leads, and the folder of the spool that stands for it. Pure.

In the spool the folders are the URL: ``https://ACCOUNT.blob.core.windows.net/CONTAINER/PREFIX`` is
``{spool}/https/ACCOUNT.blob.core.windows.net/CONTAINER/PREFIX``. So what a file is and where it belongs can be told
from its path alone, by any process, whatever the settings are by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

SCHEMES = ("https", "http", "azureml")
_DATASTORE_FOLDERS = 8  # subscriptions/S/resourcegroups/R/workspaces/W/datastores/X


@dataclass(frozen=True, slots=True)
class Container:
    """One container of a storage account: ``account_url`` as the SDK wants it, ``name`` of the container."""

    account_url: str
    name: str

    @property
    def url(self) -> str:
        return f"{self.account_url}/{self.name}"

    @property
    def account(self) -> str:
        """The account's name: the first label of the host, or with Azurite the first folder."""
        host, _, folder = self.account_url.partition("://")[2].partition("/")
        return folder or host.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Datastore:
    """A datastore of an Azure ML workspace: a name for a container, which the control plane knows."""

    subscription_id: str
    resource_group: str
    workspace_name: str
    name: str

    @property
    def url(self) -> str:
        """In the long form, without ``/paths``."""
        return (
            f"azureml://subscriptions/{self.subscription_id}/resourcegroups/{self.resource_group}"
            f"/workspaces/{self.workspace_name}/datastores/{self.name}"
        )


Destination = Container | Datastore


def folder(spool: Path, url: str) -> Path:
    """The folder that stands for ``url``."""
    scheme, _, rest = url.partition("://")
    return spool.joinpath(scheme, *rest.split("/"))


def parse(url: str) -> tuple[Destination, str]:
    """The container or datastore that ``url`` leads to, and the path in it, as a blob's name. Raises ValueError."""
    scheme, _, rest = url.partition("://")
    parts = rest.split("/")
    if scheme == "azureml":
        names = dict(
            zip((part.lower() for part in parts[0:_DATASTORE_FOLDERS:2]), parts[1:_DATASTORE_FOLDERS:2], strict=False)
        )
        if list(names) != ["subscriptions", "resourcegroups", "workspaces", "datastores"]:
            raise ValueError(url)
        path = parts[_DATASTORE_FOLDERS + 1 :]  # after "paths"
        return Datastore(*map(unquote, names.values())), unquote("/".join(path))
    if scheme not in SCHEMES:
        raise ValueError(url)
    depth = _account_parts(parts[0])
    if len(parts) <= depth:
        raise ValueError(url)
    return Container(f"{scheme}://{'/'.join(parts[:depth])}", unquote(parts[depth])), unquote(
        "/".join(parts[depth + 1 :])
    )


def long_form(url: str, subscription_id: str, resource_group: str, workspace_name: str) -> str:
    """An azureml:// URL with its workspace; one in the short form is of the given workspace."""
    path = url.partition("://")[2]
    if path.lower().startswith("datastores/"):
        path = f"subscriptions/{subscription_id}/resourcegroups/{resource_group}/workspaces/{workspace_name}/{path}"
    parts = path.split("/")
    for index in (0, 2, 4, 6, 8):
        parts[index] = parts[index].lower()
    return "azureml://" + "/".join(parts)


def destinations(spool: Path) -> Iterator[tuple[Path, str]]:
    """(folder, URL) of every container and datastore that ``spool`` has something for."""
    for scheme in SCHEMES:
        if scheme == "azureml":
            for store, url in _below(spool / scheme, _DATASTORE_FOLDERS, f"{scheme}://"):
                try:
                    parse(url)
                except ValueError:  # somebody else's folder
                    continue
                yield store, url
            continue
        for host, url in _below(spool / scheme, 1, f"{scheme}://"):
            yield from _below(host, _account_parts(host.name), f"{url}/")


def _account_parts(host: str) -> int:
    """How many parts of a URL name the account: the host, and where that is not Azure's the first folder as well."""
    return 1 if ".blob." in host else 2


def _below(folder: Path, depth: int, url: str) -> Iterator[tuple[Path, str]]:
    pattern = "/".join("*" * depth)
    for path in sorted(folder.glob(pattern)):
        if path.is_dir():
            yield path, url + path.relative_to(folder).as_posix()
