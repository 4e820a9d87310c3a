"""URLs, the folders that stand for them, and the names of blobs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import config
from proxy.config_values import KINDS
from proxy.shipping.destination import Container, Datastore, destinations, folder, long_form, parse

MANY = settings(deadline=None, max_examples=200)
SPOOL = Path("/spool")
LONG = "azureml://subscriptions/S/resourcegroups/R/workspaces/W/datastores/D"


@pytest.mark.parametrize(
    ("url", "account_url", "container", "path", "account"),
    [
        ("https://acct.blob.core.windows.net/c", "https://acct.blob.core.windows.net", "c", "", "acct"),
        ("https://acct.blob.core.windows.net/c/a/b", "https://acct.blob.core.windows.net", "c", "a/b", "acct"),
        ("https://a.blob.core.usgovcloudapi.net/c/x", "https://a.blob.core.usgovcloudapi.net", "c", "x", "a"),
        ("https://a.blob.core.chinacloudapi.cn/c/x", "https://a.blob.core.chinacloudapi.cn", "c", "x", "a"),
        ("https://a.z42.blob.storage.azure.net/c/x", "https://a.z42.blob.storage.azure.net", "c", "x", "a"),
        ("https://a.privatelink.blob.core.windows.net:443/c", "https://a.privatelink.blob.core.windows.net:443", "c", "", "a"),
        ("https://a.blob.core.windows.net/$web/x", "https://a.blob.core.windows.net", "$web", "x", "a"),
        ("http://127.0.0.1:10000/devstoreaccount1/c/x", "http://127.0.0.1:10000/devstoreaccount1", "c", "x", "devstoreaccount1"),
        ("http://[::1]:10000/acct/c", "http://[::1]:10000/acct", "c", "", "acct"),
        ("https://storage.example/acct/c/a%20b/100%25", "https://storage.example/acct", "c", "a b/100%", "acct"),
        ("https://a.blob.core.windows.net/c/%C3%BC%20x/%23%3F", "https://a.blob.core.windows.net", "c", "ü x/#?", "a"),
    ],
)  # fmt: skip
def test_containers(url: str, account_url: str, container: str, path: str, account: str) -> None:
    found, name = parse(url)
    assert found == Container(account_url, container)
    assert isinstance(found, Container)
    assert (name, found.account, found.url) == (path, account, f"{account_url}/{container}")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        (LONG, ""),
        (f"{LONG}/paths/a", "a"),
        (f"{LONG}/paths/a/b%20c", "a/b c"),
        (f"{LONG.replace('resourcegroups', 'resourceGroups')}/Paths/a", "a"),
    ],
)
def test_datastores(url: str, path: str) -> None:
    found, name = parse(url)
    assert found == Datastore("S", "R", "W", "D")
    assert isinstance(found, Datastore)
    assert (name, found.url) == (path, LONG)


@pytest.mark.parametrize(
    "url",
    [
        "file:///data",
        "ftp://a/b/c",
        "https://a.blob.core.windows.net",
        "https://storage.example/account",
        "azureml://datastores/D/paths/x",
        "azureml://subscriptions/S/resourcegroups/R/workspaces/W",
        "azureml://a/b/c/d/e/f/g/h",
        "azureml://",
        "",
    ],
)
def test_what_leads_nowhere(url: str) -> None:
    with pytest.raises(ValueError):
        parse(url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("azureml://datastores/D/paths/a/b", f"{LONG}/paths/a/b"),
        ("azureml://Datastores/D/Paths/a/B", f"{LONG}/paths/a/B"),
        (f"{LONG}/paths/x", f"{LONG}/paths/x"),
        (
            "azureml://Subscriptions/s1/resourceGroups/Rg/Workspaces/Ws/DataStores/Ds/PATHS/Paths/X",
            "azureml://subscriptions/s1/resourcegroups/Rg/workspaces/Ws/datastores/Ds/paths/Paths/X",
        ),
    ],
)
def test_the_long_form(url: str, expected: str) -> None:
    assert long_form(url, "S", "R", "W") == expected
    assert long_form(expected, "other", "other", "other") == expected


# --- there and back ---

SEGMENT = st.text(
    st.characters(exclude_characters="/\\", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12
).filter(lambda text: text.isprintable() and text == text.strip() and text[0] not in "._")
PATH = st.lists(SEGMENT, max_size=4)
ACCOUNT_URL = st.sampled_from(
    [
        "https://acct.blob.core.windows.net",
        "https://acct.blob.core.usgovcloudapi.net:8443",
        "http://127.0.0.1:10000/devstoreaccount1",
        "https://storage.example/acct",
    ]
)
CONTAINERS = st.from_regex(r"\$?[a-z0-9][a-z0-9-]{2,20}", fullmatch=True)
WORKSPACE_NAME = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.() -]{0,10}[A-Za-z0-9]", fullmatch=True)


def quoted(path: list[str]) -> str:
    return "".join("/" + quote(part, safe="") for part in path)


@MANY
@given(ACCOUNT_URL, CONTAINERS, PATH)
def test_a_container_s_url_there_and_back(account_url: str, name: str, path: list[str]) -> None:
    url = f"{account_url}/{name}{quoted(path)}"
    assert parse(url) == (Container(account_url, name), "/".join(path))
    check_folder(url, f"{account_url}/{name}", path)


@MANY
@given(st.tuples(*[WORKSPACE_NAME] * 4), st.lists(SEGMENT, min_size=1, max_size=3))
def test_a_datastore_s_url_there_and_back(names: tuple[str, str, str, str], path: list[str]) -> None:
    store = Datastore(*names)
    url = long_form(f"azureml://datastores/{names[3]}/paths{quoted(path)}", *names[:3])
    assert parse(url) == (store, "/".join(path))
    check_folder(url, store.url, ["paths", *path])


def check_folder(url: str, place: str, path: list[str]) -> None:
    """What Lane makes of it: the folder of the place, and of the folders below it the names of blobs."""
    here = folder(SPOOL, url)
    scheme, _, rest = place.partition("://")
    top = SPOOL / scheme / rest
    assert unquote("/".join(here.relative_to(top).parts)) == "/".join(path)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(ACCOUNT_URL, CONTAINERS, PATH), min_size=1, max_size=4))
def test_what_the_spool_has_something_for(places: list[tuple[str, str, list[str]]]) -> None:
    with tempfile.TemporaryDirectory() as spool:
        for account_url, name, path in places:
            folder(Path(spool), f"{account_url}/{name}{quoted(path)}").mkdir(parents=True, exist_ok=True)
        folder(Path(spool), f"{LONG}/paths/x/y").mkdir(parents=True)
        found = dict(destinations(Path(spool)))
        wanted = {f"{account_url}/{name}" for account_url, name, _ in places} | {LONG}
        assert set(found.values()) == wanted
        for here, url in found.items():
            assert folder(Path(spool), url) == here
            assert parse(url)[1] == ""


def test_what_is_no_folder_is_passed_over(tmp_path: Path) -> None:
    for path in (
        "https/a.blob.core.windows.net",
        "http/127.0.0.1:1/acct",
        "azureml/subscriptions/S",
        "file/x",
        "other/x/y",
    ):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "file").touch()
    (tmp_path / "azureml/1/2/3/4/5/6/7/8/9").mkdir(parents=True)
    (tmp_path / f"{'a' * 32}.journal").touch()
    assert list(destinations(tmp_path)) == []
    assert list(destinations(tmp_path / "missing")) == []


# --- what the configuration takes ---


@pytest.mark.parametrize(
    "text",
    [
        "https://acct.blob.core.windows.net/c",
        "https://acct.blob.core.windows.net/c/a%20b/",
        "http://127.0.0.1:10000/devstoreaccount1/c/p",
        "azureml://subscriptions/S/resourcegroups/R/workspaces/W/datastores/D/paths/a b/%C3%BC",
    ],
)
def test_what_the_configuration_takes_leads_somewhere(text: str) -> None:
    url = KINDS["storage_url"].read(text)
    assert isinstance(url, str)
    parse(url)
    assert folder(SPOOL, url).is_relative_to(SPOOL)


@MANY
@given(st.text(max_size=40), st.sampled_from(["https://a.blob.core.windows.net/c/", LONG + "/paths/"]))
def test_no_url_leads_out_of_the_spool(text: str, start: str) -> None:
    try:
        url = KINDS["data_path"].read(start + text)
    except (ValueError, config.ConfigError):
        return
    assert isinstance(url, str)
    if not url.startswith("file:"):
        parts = folder(SPOOL, url).relative_to(SPOOL).parts
        assert ".." not in parts
        assert ".." not in parse(url)[1].split("/")
