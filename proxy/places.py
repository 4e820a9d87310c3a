"""Where each collection goes: on local disk, and in its destination."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from proxy.settings import AzureML, Settings
from proxy.shipping import destination
from proxy.spool.layout import LARGE, Place

LOCAL_SPOOL_FOLDER = ".payload-logger"
REMOTE_SPOOL = Path("/var/lib/payload-logger/spool")


def places(settings: Settings) -> dict[str, Place]:
    """The places of the collections that are enabled."""
    storage = settings.storage.url
    deployment = "/".join((storage, quote(settings.endpoint_name, safe=""), quote(settings.name, safe="")))
    found: dict[str, Place] = {}
    for name, collection in settings.data_collector.collections.items():
        if not collection.enabled:
            continue
        root, large = f"{deployment}/{quote(name, safe='')}", deployment
        if collection.data is not None and collection.data.path is not None:
            root = collection.data.path
            if _is_local(storage) and root.startswith("azureml:"):
                root = f"{storage}/{quote(destination.parse(destination.long_form(root, '', '', ''))[1])}"
            large = f"{root}{LARGE}"  # beside the root: what is below it is taken for lines
        found[name] = _place(settings, root, large)
    return found


def spool_path(settings: Settings) -> Path:
    """Where locks and journals are kept, and what is to be shipped."""
    if settings.spool.path is not None:
        return Path(settings.spool.path)
    return local_path(settings.storage.url) / LOCAL_SPOOL_FOLDER if _is_local(settings.storage.url) else REMOTE_SPOOL


def measured_roots(settings: Settings) -> list[Path]:
    """The folders that the disk budget is for, without those within another one."""
    found = places(settings).values()
    roots = {root for place in found if not place.remote for root in (place.root, place.large_root)}
    if any(place.remote for place in found):
        roots.update(spool_path(settings) / scheme for scheme in destination.SCHEMES)
    return [root for root in roots if not any(parent in roots for parent in root.parents)]


def local_path(file_url: str) -> Path:
    """The path of a ``file://`` URL."""
    return Path(unquote(urlsplit(file_url).path))


def _is_local(url: str) -> bool:
    return url.startswith("file:")


def _place(settings: Settings, root: str, large: str) -> Place:
    if _is_local(root):
        return Place(local_path(root), root, local_path(large), large)
    if root.startswith("azureml:"):
        workspace = settings.azureml or AzureML(subscription_id="", resource_group="", workspace_name="")
        names = workspace.subscription_id, workspace.resource_group, workspace.workspace_name
        root, large = (destination.long_form(url, *names) for url in (root, large))
    spool = spool_path(settings)
    return Place(destination.folder(spool, root), root, destination.folder(spool, large), large, remote=True)
