"""The secrets of the environment: which one is used, and that none is told."""

from __future__ import annotations

import base64
import traceback
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.shipping.credentials import Secret, secret
from proxy.shipping.destination import Container
from proxy.shipping.store import NotNow

ACCOUNT = Container("https://acct.blob.core.windows.net", "c")
AZURITE = Container("http://127.0.0.1:10000/devstoreaccount1", "c")
KEY = base64.b64encode(b"the key of the account").decode()
SAS = "sv=2025-01-05&se=2026-11-23&sp=racw&sig=Secret%2FSignature%3D"
CONNECTION = f"DefaultEndpointsProtocol=https;AccountName=acct;AccountKey={KEY};EndpointSuffix=core.windows.net"


def used(environ: dict[str, str], container: Container = ACCOUNT) -> Secret | None:
    return secret({f"AZURE_STORAGE_{name}": value for name, value in environ.items()}, container)


def refused(**environ: str) -> str:
    with pytest.raises(NotNow) as caught:
        used(environ)
    assert caught.value.reason == "identity"
    told = repr(caught.value) + "".join(traceback.format_exception(caught.value))
    for value in (KEY, "Secret"):
        assert value not in told
    return caught.value.words


def test_without_any_an_identity_is_used() -> None:
    assert used({}) is None
    assert used({"KEY": "", "SAS_TOKEN": "  ", "CONNECTION_STRING": "\n", "KEY_FILE": ""}) is None


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({"KEY": KEY}, Secret("AZURE_STORAGE_KEY", account_key=KEY)),
        ({"KEY": f" {KEY}\n"}, Secret("AZURE_STORAGE_KEY", account_key=KEY)),
        ({"SAS_TOKEN": SAS}, Secret("AZURE_STORAGE_SAS_TOKEN", sas_token=SAS)),
        ({"SAS_TOKEN": f"?{SAS}"}, Secret("AZURE_STORAGE_SAS_TOKEN", sas_token=SAS)),
        ({"SAS_TOKEN": f"https://acct.blob.core.windows.net/c?{SAS}"}, Secret("AZURE_STORAGE_SAS_TOKEN", sas_token=SAS)),
        ({"CONNECTION_STRING": CONNECTION}, Secret("AZURE_STORAGE_CONNECTION_STRING", account_key=KEY)),
        ({"CONNECTION_STRING": f" {CONNECTION} ; ;"}, Secret("AZURE_STORAGE_CONNECTION_STRING", account_key=KEY)),
        ({"CONNECTION_STRING": f"accountname = acct ; ACCOUNTKEY = {KEY}"},
         Secret("AZURE_STORAGE_CONNECTION_STRING", account_key=KEY)),
        ({"CONNECTION_STRING": f"BlobEndpoint=https://acct.blob.core.windows.net/;SharedAccessSignature={SAS}"},
         Secret("AZURE_STORAGE_CONNECTION_STRING", sas_token=SAS)),
        ({"CONNECTION_STRING": CONNECTION, "KEY": "other", "SAS_TOKEN": "other"},
         Secret("AZURE_STORAGE_CONNECTION_STRING", account_key=KEY)),
        ({"KEY": KEY, "SAS_TOKEN": "other"}, Secret("AZURE_STORAGE_KEY", account_key=KEY)),
        ({"KEY": KEY, "KEY_FILE": "/nowhere"}, Secret("AZURE_STORAGE_KEY", account_key=KEY)),
    ],
)  # fmt: skip
def test_which_one_is_used(environ: dict[str, str], found: Secret) -> None:
    assert used(environ) == found


def test_azurite_s_connection_string() -> None:
    found = used({"CONNECTION_STRING": "UseDevelopmentStorage=true"}, AZURITE)
    assert found is not None
    assert found.account_key is not None
    assert found.account_key.startswith("Eby8vdM02xNO")
    assert "is for the account 'devstoreaccount1'" in refused(CONNECTION_STRING="UseDevelopmentStorage=true;")


def test_azurite_s_long_connection_string() -> None:
    text = f"AccountName=devstoreaccount1;AccountKey={KEY};BlobEndpoint=http://127.0.0.1:10000/devstoreaccount1;"
    assert used({"CONNECTION_STRING": text}, AZURITE) == Secret("AZURE_STORAGE_CONNECTION_STRING", account_key=KEY)


@pytest.mark.parametrize("name", ["KEY", "SAS_TOKEN", "CONNECTION_STRING"])
def test_each_may_be_in_a_file(tmp_path: Path, name: str) -> None:
    value = {"KEY": KEY, "SAS_TOKEN": SAS, "CONNECTION_STRING": CONNECTION}[name]
    file = tmp_path / "secret"
    file.write_text(f"{value}\n")
    found = used({f"{name}_FILE": str(file)})
    assert found is not None
    assert found.source == f"AZURE_STORAGE_{name}_FILE"
    assert (found.account_key or found.sas_token) in (KEY, SAS)


def test_a_file_is_read_each_time(tmp_path: Path) -> None:
    file = tmp_path / "key"
    for text in ("a2V5MQ==", "a2V5Mg=="):
        file.write_text(text)
        found = used({"KEY_FILE": str(file)})
        assert found is not None
        assert found.account_key == text


def test_files_that_can_t_be_used(tmp_path: Path) -> None:
    binary, empty = tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(b"\xff\xfe")
    empty.write_text(" \n")
    bare = "/Secret" + KEY.rstrip("=")
    # the secret itself by mistake; longer than a name, and than a path, can be
    for value in (KEY, SAS, CONNECTION, f"/{KEY}", bare, "Secret", f"{KEY}\0", f"{bare}\0", KEY * 10, f"/{KEY}" * 300):
        assert refused(KEY_FILE=value) == (
            "AZURE_STORAGE_KEY_FILE names no file that exists (or none that may be read); "
            "it takes the path of a file that holds the secret, not the secret itself."
        )
    assert refused(KEY_FILE=str(tmp_path)) == f"AZURE_STORAGE_KEY_FILE: can't read {tmp_path}: Is a directory."
    assert refused(KEY_FILE=str(binary)) == f"AZURE_STORAGE_KEY_FILE: can't read {binary}: it is no text."
    assert refused(KEY_FILE=str(empty)) == f"AZURE_STORAGE_KEY_FILE: can't read {empty}: it is empty."


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"KEY": f"{KEY}?"}, "AZURE_STORAGE_KEY is no account key: it has to be base64"),
        ({"KEY": "SecretSecret1"}, "AZURE_STORAGE_KEY is no account key"),
        ({"KEY": "Secretü"}, "AZURE_STORAGE_KEY is no account key"),
        ({"SAS_TOKEN": "Secret"}, "AZURE_STORAGE_SAS_TOKEN is no SAS"),
        ({"SAS_TOKEN": "sv=1&Secret=2"}, "AZURE_STORAGE_SAS_TOKEN is no SAS"),
        ({"CONNECTION_STRING": "Secret"}, "AZURE_STORAGE_CONNECTION_STRING is no connection string"),
        ({"CONNECTION_STRING": "AccountName=acct;Secret"}, "is no connection string"),
        ({"CONNECTION_STRING": "AccountName=acct;Password=Secret"}, "has neither AccountKey nor SharedAccessSignature"),
        ({"CONNECTION_STRING": f"AccountName=other;AccountKey={KEY}"},
         "AZURE_STORAGE_CONNECTION_STRING is for the account 'other', the destination is https://acct.blob.core.windows.net/c"),
        ({"CONNECTION_STRING": "AccountName=acct;AccountKey=Secret!"}, "is no account key"),
        ({"CONNECTION_STRING": "SharedAccessSignature=Secret"}, "is no SAS"),
    ],
)  # fmt: skip
def test_what_can_t_be_used_is_told_without_its_value(environ: dict[str, str], words: str) -> None:
    assert words in refused(**environ)


@pytest.mark.parametrize(
    ("token", "so"), [("sv=1&sr=c&sig=x", True), ("sv=1&ss=b&srt=sco&sig=x", False), (None, False)]
)
def test_what_is_for_one_container(token: str | None, so: bool) -> None:
    assert Secret("SOURCE", sas_token=token).of_one_container == so


def test_who_has_an_identity_needs_no_secret_of_another_account() -> None:
    environ = {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName=other;AccountKey={KEY}"}
    assert secret(environ, ACCOUNT, or_identity=True) is None
    environ = {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName=acct;AccountKey={KEY}"}
    assert secret(environ, ACCOUNT, or_identity=True) == Secret("AZURE_STORAGE_CONNECTION_STRING", account_key=KEY)


def test_a_secret_does_not_show_itself() -> None:
    for one in (Secret("SOURCE", account_key=KEY), Secret("SOURCE", sas_token=SAS)):
        assert repr(one) == str(one) == f"{one}" == "Secret(SOURCE)"
        assert repr({"a": [one]}) == "{'a': [Secret(SOURCE)]}"


@settings(deadline=None, max_examples=300)
@given(
    st.text(st.characters(exclude_characters="\0"), max_size=60),
    st.sampled_from(["KEY", "SAS_TOKEN", "CONNECTION_STRING"]),
)
def test_any_text_is_used_or_refused(text: str, name: str) -> None:
    try:
        used({name: text})
    except NotNow as error:
        told = error.words
    else:
        told = ""
    assert len(text) < 8 or text not in told
