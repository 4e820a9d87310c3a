"""Where collections go: on disk, in URLs, and as blobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from proxy.config import load
from proxy.places import measured_roots, places, spool_path
from proxy.settings import Settings
from proxy.shipping import destination
from proxy.spool.layout import Place, shipped_body
from tests.shipping.test_destination import SEGMENT

BLOB = "https://acct.blob.core.windows.net/c"
LONG = "azureml://subscriptions/S/resourcegroups/R/workspaces/W/datastores/D/paths"
WORKSPACE = {"subscription_id": "S", "resource_group": "R", "workspace_name": "W"}
EVENT = "01234567-89ab-cdef-0123-456789abcdef"


def given_settings(
    tmp_path: Path,
    url: str,
    *,
    request: str | None = None,
    response: str | None = None,
    endpoint: str = "e",
    name: str = "d",
    spool: str | None = "/spool",
    **more: Any,
) -> Settings:
    """As they are read from YAML: in the normal form."""

    def collection(path: str | None) -> dict[str, Any]:
        return {"enabled": True} | ({"data": {"path": path}} if path is not None else {})

    tree = {
        "endpoint_name": endpoint,
        "name": name,
        "storage": {"url": url},
        "data_collector": {"collections": {"request": collection(request), "response": collection(response)}},
    } | more
    if spool is not None:
        tree["spool"] = {"path": spool}
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=True))
    return load(config=file, overrides={}, environ={}).settings


def shipped_to(place: Place, path: Path, spool: Path) -> tuple[destination.Destination, str]:
    """The container or datastore, and the blob's name in it, as Lane finds them."""
    found = [(folder, url) for folder, url in _tops(spool, path) if path.is_relative_to(folder)]
    ((folder, url),) = found
    to, _ = destination.parse(url)
    parts = path.parent.relative_to(folder).parts
    if isinstance(to, destination.Datastore):
        parts = parts[1:]
    body = shipped_body(path.name)
    return to, "/".join([*map(unquote, parts), body[0] if body else path.name])


def _tops(spool: Path, path: Path) -> list[tuple[Path, str]]:
    parts = path.relative_to(spool).parts
    depth = {"azureml": 9}.get(parts[0], 3 if ".blob." in parts[1] else 4)
    return [(spool.joinpath(*parts[:depth]), f"{parts[0]}://{'/'.join(parts[1:depth])}")]


def check(settings: Settings) -> dict[str, Place]:
    """What a line's URL says is where its body goes; lines and bodies of a collection go to one container."""
    found = places(settings)
    spool = spool_path(settings)
    for place in found.values():
        if not place.remote:
            assert place.root.as_uri() == place.root_url
            assert place.large_root.as_uri() == place.large_url
            continue
        lines = place.lines("2026/11/22/16", "a" * 38)
        to, name = shipped_to(place, lines, spool)
        assert (to, name) == destination.parse(f"{place.root_url}/2026/11/22/16/{'a' * 38}.jsonl")
        for large in (False, True):
            path, url = place.body("2026/11/22/16", EVENT, "image/png", large=large)
            assert shipped_to(place, path, spool) == destination.parse(url)
            assert destination.parse(url)[0] == to, "a body in another container might come after its line"
    return found


# --- local ---


def test_local_storage(tmp_path: Path) -> None:
    found = check(given_settings(tmp_path, "file:///data/set", spool=None))
    assert found["request"].root == Path("/data/set/e/d/request")
    assert found["request"].large_root == Path("/data/set/e/d")
    assert found["response"].root == Path("/data/set/e/d/response")
    assert not found["request"].remote


def test_local_storage_keeps_the_folder_of_a_datastore(tmp_path: Path) -> None:
    found = check(
        given_settings(
            tmp_path, "file:///data", request="azureml://datastores/x/paths/a/b%20c/", response="azureml://datastores/x/paths/d e"
        )
    )  # fmt: skip
    assert found["request"].root == Path("/data/a/b c")
    assert found["request"].large_root == Path("/data/a/b c-large")
    assert found["response"].root == Path("/data/d e")


def test_a_collection_of_local_storage_may_go_to_azure(tmp_path: Path) -> None:
    settings = given_settings(tmp_path, "file:///data", response=f"{BLOB}/x", spool=None)
    found = check(settings)
    assert not found["request"].remote
    assert found["response"].remote
    assert spool_path(settings) == Path("/data/.payload-logger")
    assert found["response"].root == Path("/data/.payload-logger/https/acct.blob.core.windows.net/c/x")


def test_a_collection_of_azure_may_stay_here(tmp_path: Path) -> None:
    found = check(given_settings(tmp_path, BLOB, response="file:///here/x"))
    assert found["request"].remote
    assert found["response"].root == Path("/here/x")
    assert not found["response"].remote


# --- Azure ---


@pytest.mark.parametrize(
    "url",
    [
        BLOB,
        f"{BLOB}/pre%20fix/a",
        "https://acct.blob.core.usgovcloudapi.net/c/x",
        "http://127.0.0.1:10000/devstoreaccount1/c",
        "https://storage.example:8443/acct/c/x",
    ],
)
def test_a_container(tmp_path: Path, url: str) -> None:
    found = check(given_settings(tmp_path, url))
    assert found["request"].root_url == f"{url}/e/d/request"
    assert found["request"].large_url == found["response"].large_url == f"{url}/e/d"
    scheme, _, rest = url.partition("://")
    assert found["request"].root == Path("/spool") / scheme / rest / "e/d/request"


def test_roots_of_their_own(tmp_path: Path) -> None:
    found = check(
        given_settings(tmp_path, BLOB, request=f"{BLOB}/in", response="https://other.blob.core.windows.net/c/out")
    )
    assert found["request"].root_url == f"{BLOB}/in"
    assert found["request"].large_url == f"{BLOB}/in-large"
    assert found["response"].root_url == "https://other.blob.core.windows.net/c/out"


@pytest.mark.parametrize("path", ["azureml://datastores/D/paths/a/b%20c", f"{LONG}/a/b%20c"])
def test_a_datastore(tmp_path: Path, path: str) -> None:
    found = check(given_settings(tmp_path, BLOB, request=path, azureml=WORKSPACE))
    assert found["request"].root_url == f"{LONG}/a/b%20c"
    assert found["request"].large_url == f"{LONG}/a/b%20c-large"
    assert found["request"].root == Path("/spool/azureml") / LONG.partition("://")[2] / "a/b%20c"


def test_a_datastore_as_storage(tmp_path: Path) -> None:
    found = check(given_settings(tmp_path, "azureml://datastores/D/paths/x", azureml=WORKSPACE))
    assert found["request"].root_url == f"{LONG}/x/e/d/request"


def test_a_datastore_in_the_long_form_needs_no_workspace(tmp_path: Path) -> None:
    url = LONG.replace("resourcegroups", "resourceGroups").replace("paths", "Paths")
    found = check(given_settings(tmp_path, f"{url}/x"))
    assert found["request"].root_url == f"{LONG}/x/e/d/request"


def test_a_datastore_of_another_workspace(tmp_path: Path) -> None:
    found = check(given_settings(tmp_path, f"{LONG}/x", azureml=WORKSPACE | {"workspace_name": "other"}))
    assert found["request"].root_url == f"{LONG}/x/e/d/request"


@pytest.mark.parametrize("endpoint", ["ü ä", "100%", "a+b", "a#b?c", "a%20b", "日本語", "a;b@c&d=e", "~x'(y)*"])
@pytest.mark.parametrize("url", ["file:///data", BLOB, f"{LONG}/x"])
def test_any_name_of_an_endpoint(tmp_path: Path, url: str, endpoint: str) -> None:
    found = check(given_settings(tmp_path, url, endpoint=endpoint, name=endpoint[::-1]))
    assert found["request"].root_url == f"{url}/{quote(endpoint, safe='')}/{quote(endpoint[::-1], safe='')}/request"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    st.sampled_from(["file:///data", BLOB, "http://127.0.0.1:1/acct/c", f"{LONG}/x"]),
    st.lists(SEGMENT, max_size=3),
    st.lists(SEGMENT, min_size=1, max_size=3),
    SEGMENT,
    SEGMENT,
    st.booleans(),
)
@example(BLOB, ["a b"], ["c%20d"], "e", "d", False)
def test_anything_there_and_back(
    tmp_path: Path, url: str, prefix: list[str], own: list[str], endpoint: str, name: str, encoded: bool
) -> None:
    def path(parts: list[str]) -> str:
        return "".join("/" + quote(part, safe="" if encoded else "'()*!") for part in parts)

    settings = given_settings(
        tmp_path,
        url + path(prefix),
        request=("file:///own" if url.startswith("file:") else BLOB) + path(own),
        endpoint=endpoint,
        name=name,
    )
    check(settings)
    assert len({place.root for place in places(settings).values()}) == 2


def test_a_disabled_collection_has_no_place(tmp_path: Path) -> None:
    collections = {
        "collections": {"request": {"enabled": False}, "response": {"enabled": True}, "custom": {"enabled": True}}
    }
    found = places(given_settings(tmp_path, BLOB, data_collector=collections))
    assert set(found) == {"response", "custom"}


# --- the spool and its budget ---


def test_the_spool(tmp_path: Path) -> None:
    assert spool_path(given_settings(tmp_path, "file:///data/a%20b", spool=None)) == Path("/data/a b/.payload-logger")
    assert spool_path(given_settings(tmp_path, BLOB, spool=None)) == Path("/var/lib/payload-logger/spool")
    assert spool_path(given_settings(tmp_path, BLOB, spool="/mine")) == Path("/mine")


def test_what_the_budget_is_for(tmp_path: Path) -> None:
    local = measured_roots(given_settings(tmp_path, "file:///data"))
    assert local == [Path("/data/e/d")]
    remote = measured_roots(given_settings(tmp_path, BLOB))
    assert set(remote) == {Path("/spool/https"), Path("/spool/http"), Path("/spool/azureml")}
    both = measured_roots(given_settings(tmp_path, "file:///data", response=f"{BLOB}/x", spool=None))
    assert Path("/data/e/d") in both
    assert Path("/data/.payload-logger/https") in both
