"""Reading the configuration: real files, every message word for word."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.config import AZURE_KEYS, ConfigError, Loaded, keys, load, variable_of
from proxy.settings import Admin, Collection, CustomLogging, Durability, ForwardedHeaders, RollingRate, Settings

Load = Callable[..., Loaded]
Problems = Callable[..., list[str]]

# The page's two full examples and its data.path example, word for word.
MANAGED_DEPLOYMENT = """\
$schema: https://azuremlschemas.azureedge.net/latest/managedOnlineDeployment.schema.json
name: blue
endpoint_name: my_endpoint
model: azureml:iris_mlflow_model@latest
environment:
  image: mcr.microsoft.com/azureml/openmpi4.1.0-ubuntu20.04
  conda_file: model/conda.yaml
code_configuration:
  code: scripts
  scoring_script: score.py
instance_type: Standard_F2s_v2
instance_count: 1
data_collector:
  collections:
    model_inputs:
      enabled: 'True'
    model_outputs:
      enabled: 'True'
"""
PAYLOAD_DEPLOYMENT = """\
$schema: http://azureml/sdk-2-0/OnlineDeployment.json
endpoint_name: my_endpoint
name: blue
model: azureml:my-model-m1:1
environment: azureml:env-m1:1
data_collector:
  collections:
    request:
      enabled: 'True'
    response:
      enabled: 'True'
"""
CUSTOM_CONTAINER = """\
data_collector:
  collections:
    model_inputs:
      enabled: 'True'
      data:
        name: my_model_inputs_data_asset
        path: azureml://datastores/workspaceblobstore/paths/modelDataCollector/my_endpoint/blue/model_inputs
        version: 1
    model_outputs:
      enabled: 'True'
      data:
        name: my_model_outputs_data_asset
        path: azureml://datastores/workspaceblobstore/paths/modelDataCollector/my_endpoint/blue/model_outputs
        version: 1
"""


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a YAML text from a real file, c.yaml, named relative to the working directory."""
    monkeypatch.chdir(tmp_path)

    def read(text: str | bytes = "{}", *, environ: Any = None, overrides: Any = None, as_: str = "config") -> Loaded:
        content = text if isinstance(text, bytes) else textwrap.dedent(text).encode()
        Path("c.yaml").write_bytes(content)
        return load(**{as_: Path("c.yaml")}, environ=environ or {}, overrides=overrides or {})

    return read


@pytest.fixture
def problems(read: Load) -> Problems:
    """What is wrong with a YAML text, without the name of the file."""

    def problems(text: str | bytes = "{}", **given: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            read(text, **given)
        assert str(caught.value) == "\n".join(caught.value.problems)
        return [line.removeprefix("c.yaml: ") for line in caught.value.problems]

    return problems


def key(path: str, value: Any) -> str:
    """A YAML text with one value, written as JSON."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return json.dumps(value)


def at(loaded: Loaded, path: str) -> Any:
    value: Any = loaded.settings
    for name in path.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


# What Azure ML's own files hold


NOTHING = "data_collector.collections: none is enabled; nothing is recorded; add 'request: {enabled: true}'"


@pytest.mark.parametrize("as_", ["config", "deployment"])
def test_the_documentations_managed_deployment(read: Load, as_: str) -> None:
    loaded = read(MANAGED_DEPLOYMENT, as_=as_)
    assert (loaded.settings.endpoint_name, loaded.settings.name) == ("my_endpoint", "blue")
    assert loaded.settings.data_collector.collections == {
        "model_inputs": Collection(enabled=True),
        "model_outputs": Collection(enabled=True),
    }
    assert loaded.warnings == ()
    assert loaded.settings.sdk_endpoint == CustomLogging()


@pytest.mark.parametrize("as_", ["config", "deployment"])
def test_the_documentations_payload_logging_deployment(read: Load, as_: str) -> None:
    loaded = read(PAYLOAD_DEPLOYMENT, as_=as_)
    assert loaded.settings.data_collector == Settings().data_collector
    assert loaded.warnings == ()


def test_the_documentations_custom_container(read: Load) -> None:
    data = read(CUSTOM_CONTAINER).settings.data_collector.collections["model_outputs"].data
    assert data is not None
    assert data.version == "1"
    assert data.name == "my_model_outputs_data_asset"
    assert (
        data.path == "azureml://datastores/workspaceblobstore/paths/modelDataCollector/my_endpoint/blue/model_outputs"
    )


@pytest.mark.parametrize("written", ["'True'", '"true"', "true", "True", "TRUE", "yes", "1"])
def test_enabled_as_people_write_it(read: Load, written: str) -> None:
    text = f"data_collector: {{collections: {{request: {{enabled: {written}}}}}}}"
    assert at(read(text), "data_collector.collections.request.enabled") is True


@pytest.mark.parametrize("written", ["'False'", '"false"', "false", "False", "no", "off", "0"])
def test_disabled_as_people_write_it(read: Load, written: str) -> None:
    text = f"data_collector: {{collections: {{request: {{enabled: {written}}}}}}}"
    assert at(read(text), "data_collector.collections.request.enabled") is False


def test_the_rest_of_the_data_collector_block(read: Load) -> None:
    loaded = read("""
        data_collector:
          rolling_rate: hour
          sampling_rate: '0.5'
          request_logging: { capture_headers: [X-Tenant, ocp-apim-trace] }
          collections:
            request:
              enabled: 'True'
              sampling_rate: 0.1
              client_id: 11111111-2222-3333-4444-555555555555
              data:
                name: 2024
                path: 'azureml://subscriptions/S/resourcegroups/R/workspaces/W/datastores/D/paths/a b/c  '
                version: 1.10
    """)
    collector = loaded.settings.data_collector
    assert collector.rolling_rate is RollingRate.HOUR
    assert collector.sampling_rate == 0.5
    assert collector.request_logging.capture_headers == ("X-Tenant", "ocp-apim-trace")
    request = collector.collections["request"]
    assert request.sampling_rate == 0.1
    assert request.client_id == "11111111-2222-3333-4444-555555555555"
    assert request.data is not None
    assert request.data.name == "2024"
    assert request.data.version == "1.10"
    assert request.data.path == "azureml://subscriptions/S/resourcegroups/R/workspaces/W/datastores/D/paths/a b/c"


@pytest.mark.parametrize(
    ("written", "version"), [("1", "1"), ('"1"', "1"), ("1.0", "1.0"), ("007", "007"), ("2024-01-02", "2024-01-02")]
)
def test_a_version_stays_as_written(read: Load, written: str, version: str) -> None:
    text = f"data_collector: {{collections: {{request: {{enabled: true, data: {{version: {written}}}}}}}}}"
    assert at(read(text), "data_collector.collections.request.data.version") == version


def test_every_key_of_azures_schemas_is_ignored(read: Load) -> None:
    text = json.dumps({name: {"anything": [1, {"below": None}]} for name in sorted(AZURE_KEYS)})
    assert read(text) == Loaded(Settings(), ())


def test_a_deployment_ignores_unknown_top_level_keys_but_reads_our_sections(read: Load) -> None:
    loaded = read("{some_new_key: 1, proxy: {listen: 9000}}", as_="deployment")
    assert loaded.settings.proxy.listen == "0.0.0.0:9000"


@pytest.mark.parametrize("name", ["data_colector", "dataCollector", "data-collector", "Data_Collector"])
def test_a_deployment_with_a_misspelt_data_collector(problems: Problems, name: str) -> None:
    assert problems(key(name, {}), as_="deployment") == [f"{name}: unknown key; did you mean 'data_collector'?"]


def test_a_deployment_with_unknown_keys_inside_data_collector(problems: Problems) -> None:
    text = "data_collector: {samplingrate: 1, collections: {request: {enabled: true, Enabled: true}}}"
    assert problems(text, as_="deployment") == [
        "data_collector.samplingrate: unknown key; did you mean 'sampling_rate'?",
        "data_collector.collections.request.Enabled: unknown key; did you mean 'enabled'?",
    ]


# Values that are right


@pytest.mark.parametrize(
    ("path", "written", "value"),
    [
        ("spool.max_bytes", 0, 0),
        ("spool.max_bytes", 9007199254740993, 9007199254740993),
        ("spool.max_bytes", "10GiB", 10 * 2**30),
        ("spool.max_bytes", "4 MB", 4_000_000),
        ("spool.max_bytes", "64k", 64_000),
        ("spool.max_bytes", "64Ki", 65_536),
        ("spool.max_bytes", "1.5 kib", 1536),
        ("spool.max_bytes", "1_000 b", 1000),
        ("spool.max_bytes", "2TiB", 2 * 2**40),
        ("spool.max_hold", "50ms", 0.05),
        ("spool.max_hold", 1.5, 1.5),
        ("spool.max_hold", "1e-3", 0.001),
        ("spool.max_hold", "30s", 30),
        ("spool.max_hold", "2 m", 120),
        ("spool.max_hold", "10min", 600),
        ("spool.max_hold", "1H", 3600),
        ("spool.durability", "Synced", Durability.SYNCED),
        ("proxy.forwarded_headers", "OFF", ForwardedHeaders.OFF),
        ("proxy.max_headers", "12", 12),
        ("proxy.listen", 8080, "0.0.0.0:8080"),
        ("proxy.listen", ":8081", "0.0.0.0:8081"),
        ("proxy.listen", "localhost:0", "localhost:0"),
        ("proxy.listen", "[0:0:0:0:0:0:0:1]:80", "[::1]:80"),
        ("proxy.listen", "unix:/run/p.sock", "unix:/run/p.sock"),
        ("proxy.upstream", "127.0.0.1:5002", "http://127.0.0.1:5002"),
        ("proxy.upstream", "HTTPS://model.svc", "https://model.svc"),
        ("proxy.upstream", "http://[::1]:5001/", "http://[::1]:5001"),
        ("proxy.upstream", "http://triton:8000/v2/", "http://triton:8000/v2"),
        ("proxy.upstream", "unix:/run/model.sock", "unix:/run/model.sock"),
        ("storage.url", "/a b/c%20d/", "file:///a%20b/c%2520d"),
        ("storage.url", "file:///a%20b/../c d", "file:///c%20d"),
        ("storage.url", "file://localhost/data", "file:///data"),
        ("endpoint_name", 2024, "2024"),
        ("endpoint_name", "  an endpoint é ", "an endpoint é"),
        ("endpoint_name", "é" * 127, "é" * 127),
        ("capture.include", ["get , head  /a*", "*", "/x?y"], ("GET,HEAD /a*", "*", "/x?y")),
        ("capture.exclude", [], ()),
        ("capture.exclude", None, Settings().capture.exclude),
        ("capture", None, Settings().capture),
        ("admin", {}, Admin()),
        ("admin", None, None),
        ("data_collector", None, Settings().data_collector),
    ],
)
def test_a_value_and_what_it_becomes(read: Load, path: str, written: Any, value: Any) -> None:
    assert at(read(key(path, written)), path) == value


def test_a_relative_path_becomes_an_absolute_url(read: Load) -> None:
    assert read("storage: {url: data/x}").settings.storage.url == (Path.cwd() / "data/x").as_uri()


def test_plain_yaml_words_are_not_guessed_at(read: Load) -> None:
    loaded = read(
        "{endpoint_name: on, name: 0123, proxy: {forwarded_headers: off}, logs: {level: null}, tags: =}"
    )  # YAML 1.1: true, 83, false
    assert loaded.settings.proxy.forwarded_headers is ForwardedHeaders.OFF
    assert (loaded.settings.endpoint_name, loaded.settings.name) == ("on", "0123")


def test_anchors_merges_and_tags_work(read: Load) -> None:
    loaded = read("""
        tags: { on: &on { enabled: true, sampling_rate: 0.5 }, more: &more { <<: *on, client_id: me, enabled: no } }
        data_collector:
          sampling_rate: !!float 1
          collections:
            request: { <<: *more, enabled: !!bool true }
            response: *on
    """)
    assert loaded.settings.data_collector.collections == {
        "request": Collection(enabled=True, sampling_rate=0.5, client_id="me"),
        "response": Collection(enabled=True, sampling_rate=0.5),
    }


# Values that are wrong, with the exact words

SIZE = "is not a size; use a number of bytes or one with a unit, like 64KiB, 4MB or 10GiB"
DURATION = "is not a duration; use a number of seconds or one with a unit, like 50ms, 30s, 10min or 1h"
LISTEN = "is not a listen address; use HOST:PORT, [IPV6]:PORT, PORT or unix:/PATH"
UPSTREAM = "is not an upstream; use http://HOST:PORT, https://HOST:PORT or unix:/PATH, without user, query or fragment"
URLS = "file:///PATH, https://ACCOUNT.blob.core.windows.net/CONTAINER/FOLDER or azureml://datastores/NAME/paths/FOLDER"
NAME = "is not a name; use at most 255 bytes without / and \\, not beginning with . or _"
HEADER = "is not a header name; use letters, digits and dashes, no wildcard"
RULE = "is not a path rule; use PATTERN or 'METHOD,METHOD PATTERN'; a pattern begins with / or *"
RATE = "is not a rate; use a number from 0 to 1"
SWITCH = "is not a switch; use true or false"
WHOLE = "is not a whole number; use digits"
CONTAINER = "for a container; its name is 3 to 63 lower-case letters, digits and single dashes"
SAS = "has a query; if that is a SAS it is a secret, and secrets come from the environment: AZURE_STORAGE_SAS_TOKEN"
COLLECTION = "data_collector.collections.request"


@pytest.mark.parametrize(
    ("path", "written", "problem"),
    [
        ("proxy.listne", 1, "unknown key; did you mean 'listen'?"),
        ("prxy", {}, "unknown key; did you mean 'proxy'?"),
        ("instance_typ", 1, "unknown key; did you mean 'instance_type'?"),
        ("spool.zzz", 1, "unknown key"),
        ("logs", [1], "a list is not a section; write level, format below it"),
        ("admin", True, "'true' is not a section; write listen below it"),
        ("data_collector.sampling_rate", 1.5, f"1.5 {RATE}"),
        ("data_collector.sampling_rate", -1, f"-1 {RATE}"),
        ("data_collector.sampling_rate", True, f"'true' {RATE}"),
        ("data_collector.sampling_rate", "50%", f"'50%' {RATE}"),
        ("data_collector.sampling_rate", ".nan", f"'.nan' {RATE}"),
        ("data_collector.sampling_rate", "1e400", f"'1e400' {RATE}"),
        (
            "data_collector.rolling_rate",
            "Week",
            "'Week' is not a choice here; use Minute or Hour or Day or Month or Year",
        ),
        ("spool.when_full", False, "'false' is not a choice here; use drop or reject"),
        (f"{COLLECTION}.enabled", "maybe", f"'maybe' {SWITCH}"),
        (f"{COLLECTION}.enabled", 2, f"2 {SWITCH}"),
        (f"{COLLECTION}.enabled", [], f"a list {SWITCH}"),
        (f"{COLLECTION}.enabled", None, "missing; write 'enabled: true'"),
        (COLLECTION, None, "empty; write 'request: {enabled: true}'"),
        (COLLECTION, True, "'true' is not a section; write enabled, sampling_rate, client_id, data below it"),
        (
            "data_collector.collections",
            None,
            "missing; write 'collections: {request: {enabled: true}, response: {enabled: true}}'",
        ),
        (
            "data_collector.collections",
            ["request"],
            "a list is not a section; write 'collections: {request: {enabled: true}, response: {enabled: true}}'",
        ),
        ("spool.max_bytes", -1, f"-1 {SIZE}"),
        ("spool.max_bytes", "10 GX", f"'10 GX' {SIZE}"),
        ("spool.max_bytes", 0.5, f"0.5 {SIZE}"),
        ("spool.max_bytes", ".inf", f"'.inf' {SIZE}"),
        ("spool.max_bytes", True, f"'true' {SIZE}"),
        ("spool.max_bytes", {}, f"a mapping {SIZE}"),
        ("spool.max_bytes", "8388608 TiB", f"'8388608 TiB' {SIZE}"),
        ("spool.roll_bytes", "1KiB", "'1KiB' is too small; the least is 65536"),
        ("proxy.drain_seconds", "-1s", f"'-1s' {DURATION}"),
        ("proxy.drain_seconds", "3 weeks", f"'3 weeks' {DURATION}"),
        ("proxy.connect_timeout", 0, "0 is too small; it must be more than 0"),
        ("proxy.max_headers", 1.5, f"1.5 {WHOLE}"),
        ("proxy.max_headers", True, f"'true' {WHOLE}"),
        ("proxy.max_headers", 0, "0 is too small; the least is 1"),
        ("proxy.workers", 257, "257 is too large; the most is 256"),
        *(
            ("proxy.listen", wrong, f"'{wrong}' {LISTEN}")
            for wrong in (
                "localhost",
                "0.0.0.0:65536",
                "::1:80",
                "[::1]",
                "[zz]:80",
                "1.2.3:80",
                "a b:80",
                "http://x:80",
                "unix:run/p",
                "unix:/",
                "",
                "x:-1",
                "unix:/" + "é" * 54,
            )
        ),
        *(
            ("proxy.upstream", wrong, f"'{wrong}' {UPSTREAM}")
            for wrong in (
                "localhost",
                "ftp://x",
                "http://",
                "http://:80",
                "http://x:0",
                "http://x:99999",
                "http://x/#f",
                "http://[::1",
                "unix:x",
                "http://x/é",
                "x:0",
            )
        ),
        ("proxy.upstream", "http://x/?q=1", f"'http://x/?…' {UPSTREAM}"),
        ("proxy.upstream", "http://me:hunter2@x:80", f"'…@x:80' {UPSTREAM}"),
        *(
            ("storage.url", wrong, f"'{wrong}' is not a destination; use {URLS}")
            for wrong in (
                "",
                "file:/x",
                "file://host/x",
                "file:///x%00y",
                "file:///a#b",
                "s3://bucket/x",
                "azureml://x",
                "https:x",
                "https://a.blob.core.windows.net",
                "http://a.blob.core.windows.net/c",
                "https://a.blob.x.net/c//d",
                "https://host/only",
                "https://a.blob.x.net/c/%2e%2e/d",
                "https://a.blob.x.net/c/%zz",
                "azureml://datastores/d/paths/",
                "azureml://datastores/d/paths/a/../b",
            )
        ),
        *(
            (
                "storage.url",
                f"https://a.blob.x.net/{wrong}/d",
                f"'https://a.blob.x.net/{wrong}/d' has '{wrong}' {CONTAINER}",
            )
            for wrong in ("C", "c_d", "-c", "c-", "c--d", "c.d", "é")
        ),
        *(
            (
                "storage.url",
                lake,
                f"{shown} is spoken to in another protocol; for blobs the same place is https://a.blob.x.net/c{d}",
            )
            for lake, shown, d in (
                ("https://a.dfs.x.net/c/d/e", "'https://a.dfs.x.net/c/d/e'", "/d/e"),
                ("abfss://c@a.dfs.x.net/d/", "'…@a.dfs.x.net/d/'", "/d"),
                ("abfs://c@a.dfs.x.net", "'…@a.dfs.x.net'", ""),
                ("wasbs://c@a.blob.x.net/d", "'…@a.blob.x.net/d'", "/d"),
            )
        ),
        *(
            (path, wrong, f"'{shown}' has no scheme; write 'https://{url}', or the absolute path if it is a folder")
            for path in ("storage.url", f"{COLLECTION}.data.path")
            for wrong, shown, url in (
                ("a.blob.core.windows.net/c", "a.blob.core.windows.net/c", "a.blob.core.windows.net/c"),
                ("A.BLOB.x.net/c/d/", "A.BLOB.x.net/c/d/", "A.BLOB.x.net/c/d/"),
                ("a1-x.dfs.x.net/c/d", "a1-x.dfs.x.net/c/d", "a1-x.blob.x.net/c/d"),
                ("a.blob.x.net", "a.blob.x.net", "a.blob.x.net/CONTAINER"),
                ("a_b.blob.x.net/", "a_b.blob.x.net/", "a_b.blob.x.net/CONTAINER"),
                ("c@a.dfs.x.net/d", "…@a.dfs.x.net/d", "a.blob.x.net/CONTAINER/d"),
                ("a.blob.x.net/c?sig=S", "a.blob.x.net/c?…", "a.blob.x.net/c"),
            )
        ),
        ("storage.url", "https://a.blob.core.windows.net/c?sv=1&sig=S", f"'https://a.blob.core.windows.net/c?…' {SAS}"),
        *(
            (f"{COLLECTION}.data.path", wrong, f"'{wrong}' is not a data path; use {URLS}, without . and .. folders")
            for wrong in ("./x", "/a/../b", "file:///a/%2E./b", "azureml://datastores/d/paths/./x")
        ),
        ("spool.path", "file:///x", "'file:///x' is not a file path; use /PATH"),
        ("capture.include", {}, "a mapping is not a list; use [A, B] or 'A, B'"),
        ("endpoint_name", [], f"a list {NAME}"),
        *(
            ("name", wrong, f"{wrong!r} {NAME}")
            for wrong in ("", "a/b", "a\\b", ".", "..", ".x", "_x", "a\nb", "a\x7f")
        ),
        ("name", "é" * 128, f"'{'é' * 59}…' {NAME}"),
    ],
)
def test_a_wrong_value(problems: Problems, path: str, written: Any, problem: str) -> None:
    tree = yaml.safe_load(key(path, written))
    collector = tree.get("data_collector")
    if isinstance(collector, dict):
        collector.setdefault("collections", {})
        if isinstance(collector["collections"], dict) and isinstance(collector["collections"].get("request"), dict):
            collector["collections"]["request"].setdefault("enabled", True)
    assert problems(json.dumps(tree)) == [f"{path}: {problem}"]


def test_items_of_a_list_are_named_by_their_place(problems: Problems) -> None:
    headers = {"collections": {}, "request_logging": {"capture_headers": ["x-*", "ok", None, "a b", ["c"]]}}
    path = "data_collector.request_logging.capture_headers"
    assert problems(json.dumps({"data_collector": headers, "capture": {"include": ["GET", "/ok", "x/y"]}})) == [
        f"{path}[0]: 'x-*' {HEADER}",
        f"{path}[2]: null {HEADER}",
        f"{path}[3]: 'a b' {HEADER}",
        f"{path}[4]: a list {HEADER}",
        f"capture.include[0]: 'GET' {RULE}",
        f"capture.include[2]: 'x/y' {RULE}",
    ]


def test_collection_names_are_folders_too(problems: Problems) -> None:
    text = "data_collector: {collections: {_x: {enabled: true}, null: {enabled: true}}}"
    collections = "data_collector.collections"
    assert problems(text) == [f"{collections}._x: '_x' {NAME}", f"{collections}.null: null {NAME}"]
    below = {"enabled": True, "data": {"path": "/x"}}
    text = json.dumps({"data_collector": {"collections": {"request": below, "a/b": below}}})
    assert problems(text) == [f"{collections}.a/b: 'a/b' {NAME}"]


def test_a_section_without_its_required_keys(problems: Problems) -> None:
    assert problems("azureml: {workspace_name: w}") == [
        "azureml.subscription_id: missing; write 'subscription_id: …'",
        "azureml.resource_group: missing; write 'resource_group: …'",
    ]
    assert problems("data_collector: {collections: {request: {}}}") == [
        f"{COLLECTION}.enabled: missing; write 'enabled: true'"
    ]


def test_everything_that_is_wrong_is_reported_at_once(problems: Problems) -> None:
    text = """
        prxy: {}
        data_collector:
          sampling_rate: 2
          sampling_rate: 3
          collections: { request: { enabled: perhaps }, response: }
        proxy: { listen: nowhere, workers: 0, tls_key: /nonexistent }
        storage: { url: 's3://x' }
    """
    assert problems(text, environ={"PAYLOAD_LOGGER_LOGS_LEVEL": "loud"}, overrides={"spool.pth": "/x"}) == [
        "line 5: duplicate key 'sampling_rate', first on line 4",
        "prxy: unknown key; did you mean 'proxy'?",
        f"data_collector.sampling_rate: 3 {RATE}",
        f"{COLLECTION}.enabled: 'perhaps' {SWITCH}",
        "data_collector.collections.response: empty; write 'response: {enabled: true}'",
        f"proxy.listen: 'nowhere' {LISTEN}",
        "proxy.workers: 0 is too small; the least is 1",
        f"storage.url: 's3://x' is not a destination; use {URLS}",
        "PAYLOAD_LOGGER_LOGS_LEVEL: logs.level: 'loud' is not a choice here; use debug or info or warning or error",
        "command line: spool.pth: unknown key; did you mean 'path'?",
        "proxy.tls_certificate: missing; tls_certificate and tls_key belong together",
        "proxy.tls_key: '/nonexistent' is not a file that can be read",
    ]


def test_a_check_between_values_waits_for_both_to_be_right(problems: Problems) -> None:
    # tls_key is given, though wrong: nothing is said of the pair.
    text = "proxy: {tls_certificate: c.yaml, tls_key: {}, listen: 'x', upstream: '0.0.0.0:8080'}"
    assert problems(text) == [
        "proxy.tls_key: a mapping is not a file path; use /PATH",
        f"proxy.listen: 'x' {LISTEN}",
    ]


@pytest.mark.parametrize(
    ("path", "written", "secret"),
    [
        ("storage.url", "AccountName=a;AccountKey=c2VjcmV0;EndpointSuffix=core.windows.net://", "c2VjcmV0"),
        ("storage.url", "https://a.blob.core.windows.net/c?sig=c2VjcmV0", "c2VjcmV0"),
        ("storage.url", "a.blob.core.windows.net/c?sig=c2VjcmV0", "c2VjcmV0"),
        ("storage.url", "c2VjcmV0@a.blob.core.windows.net/c", "c2VjcmV0"),
        ("proxy.upstream", "http://user:c2Vj/cmV0@host:80", "c2Vj"),
        ("proxy.upstream", "user:c2VjcmV0@host:80", "c2VjcmV0"),
        ("capture.include", ["Authorization: Bearer c2VjcmV0"], "c2VjcmV0"),
        ("proxy.tls_key", "-----BEGIN PRIVATE KEY-----\nc2VjcmV0", "c2VjcmV0"),
        ("logs.level", "token c2VjcmV0", "c2VjcmV0"),
    ],
)
def test_a_problem_never_shows_a_secret(problems: Problems, path: str, written: Any, secret: str) -> None:
    lines = problems(key(path, written))
    assert lines
    assert secret not in "".join(lines)


def test_long_values_and_keys_are_shortened(problems: Problems) -> None:
    assert problems(key("logs.level", "x" * 500))[0].startswith(f"logs.level: '{'x' * 59}…' is not a choice")
    assert problems(key("y" * 500, 1)) == [f"{'y' * 60}: unknown key"]


def test_a_problem_is_one_line(problems: Problems) -> None:
    assert problems(json.dumps({"y\ny\u2028": 1})) == [r"y\ny\u2028: unknown key"]


# The file


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty"),
        (b"# only a comment\n", "empty"),
        (b"- a\n- b\n", "a list is not a mapping of keys to values"),
        (b"just text", "'just text' is not a mapping of keys to values"),
        (b"name: \xff\n", "not UTF-8 text (byte 6)"),
        (b"name: [a\nb: c", "line 2, column 2: expected ',' or ']', but got ':'"),
        (b"a:\n\tb: 1", "line 2, column 1: found character '\\t' that cannot start any token"),
        (b"name: a\x07b", "line 1, column 8: special characters are not allowed"),
        (b"name: *nobody", "line 1, column 7: found undefined alias 'nobody'"),
        (b"a: 1\n---\nb: 2", "line 2, column 1: but found another document"),
        (b"? [a]\n: b", "line 1, column 3: found unhashable key"),
        (
            b"name: !!python/name:os.system x",
            "line 1, column 7: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'",
        ),
        (b'name: "\\U00110000"', "not YAML: chr() arg not in range(0x110000)"),
        (b"[" * 5000, "nested too deeply"),
        (b"name: a\nname: b", "line 2: duplicate key 'name', first on line 1"),
        (b"tags: {x: {y: 1, 'y': 2}}", "line 1: duplicate key 'y', first on line 1"),
        (b"tags: {x: &x {}, y: {<<: *x, <<: *x}}", "line 1: duplicate key '<<', first on line 1"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration(problems: Problems, content: bytes, problem: str) -> None:
    assert problems(content) == [problem]


def test_a_byte_order_mark_is_no_trouble(read: Load) -> None:
    assert read(b"\xef\xbb\xbfname: x").settings.name == "x"


@pytest.mark.parametrize("as_", ["config", "deployment"])
def test_a_file_that_is_missing_or_a_folder(tmp_path: Path, as_: Any) -> None:
    for file, why in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            load(**{as_: file}, overrides={}, environ={})
        assert caught.value.problems == (f"{file}: cannot be read: {why}",)


def test_one_file_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give either a configuration file or a deployment, not both"):
        load(config=tmp_path, deployment=tmp_path, overrides={}, environ={})


def test_nothing_is_created(read: Load) -> None:
    read("{storage: {url: data}, spool: {path: spool}}")
    assert [path.name for path in Path().iterdir()] == ["c.yaml"]


# The environment and the flags


def test_without_anything_there_are_the_defaults() -> None:
    assert load(overrides={}, environ={}) == Loaded(Settings(), ())


def test_precedence(read: Load) -> None:
    text = "{proxy: {listen: ':1', upstream: 'a:1', max_headers: 1}, name: file}"
    environ = {"PAYLOAD_LOGGER_PROXY_LISTEN": ":2", "PAYLOAD_LOGGER_PROXY_UPSTREAM": "a:2", "PAYLOAD_LOGGER_NAME": ""}
    overrides = {"proxy.listen": "localhost:3", "name": None}
    loaded = read(text, environ=environ, overrides=overrides).settings
    assert (loaded.proxy.listen, loaded.proxy.upstream) == ("localhost:3", "http://a:2")
    assert (loaded.proxy.max_headers, loaded.name) == (1, "file")


def test_overrides_may_be_python_values(tmp_path: Path) -> None:
    given = {
        "storage.url": tmp_path,
        "proxy.upstream_verify": False,
        "proxy.max_headers": 7,
        "spool.max_hold": 0.00001,
        "capture.exclude": ("GET /x", "*"),
        "admin": {"listen": 9},
    }
    loaded = load(overrides=given, environ={}).settings
    assert loaded.storage.url == tmp_path.as_uri()
    assert (loaded.proxy.upstream_verify, loaded.proxy.max_headers, loaded.spool.max_hold) == (False, 7, 0.00001)
    assert loaded.capture.exclude == ("GET /x", "*")
    assert loaded.admin == Admin(listen="0.0.0.0:9")


def test_every_key_has_a_variable_of_its_own() -> None:
    names = [variable_of(path) for path, _ in keys()]
    assert len(set(names)) == len(names) > 40
    for name in ("ENDPOINT_NAME", "NAME", "SPOOL_MAX_BYTES", "CUSTOM_LOGGING_LISTEN", "DATA_COLLECTOR_ROLLING_RATE"):
        assert f"PAYLOAD_LOGGER_{name}" in names


def test_values_from_the_environment() -> None:
    loaded = load(
        overrides={},
        environ={
            "PAYLOAD_LOGGER_ENDPOINT_NAME": "e",
            "PAYLOAD_LOGGER_SPOOL_MAX_BYTES": "1GiB",
            "PAYLOAD_LOGGER_ADMIN_LISTEN": "8081",
            "PAYLOAD_LOGGER_CAPTURE_INCLUDE": "GET,HEAD /a*, /b,POST,put *c",
            "PAYLOAD_LOGGER_CAPTURE_EXCLUDE": "[]",
            "PAYLOAD_LOGGER_DATA_COLLECTOR_SAMPLING_RATE": "0.25",
            "PAYLOAD_LOGGER_DATA_COLLECTOR_REQUEST_LOGGING_CAPTURE_HEADERS": "['x-a', x-b]",
            "PAYLOAD_LOGGER_DATA_COLLECTOR_COLLECTIONS_REQUEST_ENABLED": "False",
            "PAYLOAD_LOGGER_DATA_COLLECTOR_COLLECTIONS_RESPONSE_DATA_PATH": "file:///r",
            "PAYLOAD_LOGGER_AZUREML_SUBSCRIPTION_ID": "s",
            "PAYLOAD_LOGGER_AZUREML_RESOURCE_GROUP": "r",
            "PAYLOAD_LOGGER_AZUREML_WORKSPACE_NAME": "w",
            "OTHER": "x",
        },
    )
    assert loaded.warnings == ()
    assert loaded.settings.admin == Admin(listen="0.0.0.0:8081")
    assert loaded.settings.endpoint_name == "e"
    assert loaded.settings.spool.max_bytes == 2**30
    assert loaded.settings.capture.include == ("GET,HEAD /a*", "/b", "POST,PUT *c")
    assert loaded.settings.capture.exclude == ()
    assert loaded.settings.azureml is not None
    collector = loaded.settings.data_collector
    assert collector.sampling_rate == 0.25
    assert collector.request_logging.capture_headers == ("x-a", "x-b")
    assert not collector.collections["request"].enabled  # the other keeps its default: only the named value changes
    assert collector.collections["response"].enabled
    assert collector.collections["response"].data is not None


def test_a_variable_changes_one_of_two_aliases(read: Load) -> None:
    text = "data_collector: {collections: {request: &x {enabled: true}, response: *x}}"
    environ = {"PAYLOAD_LOGGER_DATA_COLLECTOR_COLLECTIONS_REQUEST_ENABLED": "false"}
    collections = read(text, environ=environ).settings.data_collector.collections
    assert collections == {"request": Collection(enabled=False), "response": Collection(enabled=True)}


def test_a_wrong_value_names_its_variable_or_flag(problems: Problems) -> None:
    environ = {"PAYLOAD_LOGGER_SPOOL_MAX_BYTES": "much", "PAYLOAD_LOGGER_CAPTURE_INCLUDE": "[a"}
    unclosed = "line 1, column 3: expected ',' or ']', but got '<stream end>'"
    assert problems(environ=environ, overrides={"proxy.listen": True}) == [
        f"PAYLOAD_LOGGER_SPOOL_MAX_BYTES: spool.max_bytes: 'much' {SIZE}",
        f"PAYLOAD_LOGGER_CAPTURE_INCLUDE: capture.include: '[a' is not a list: {unclosed}",
        f"command line: proxy.listen: 'True' {LISTEN}",
    ]


def test_a_variable_below_something_that_is_no_section(problems: Problems) -> None:
    environ = {"PAYLOAD_LOGGER_LOGS_LEVEL": "info"}
    assert problems("logs: 1", environ=environ) == ["logs: 1 is not a section; write level, format below it"]


def test_unknown_variables_are_warned_of() -> None:
    environ = {"PAYLOAD_LOGGER_PROXY_LISTNE": "x", "PAYLOAD_LOGGER_PROXY_PORT": "8080", "PAYLOAD_LOGGER_XQZ": "1"}
    assert load(overrides={}, environ=environ).warnings == (
        "PAYLOAD_LOGGER_PROXY_LISTNE: unknown variable; did you mean 'PAYLOAD_LOGGER_PROXY_LISTEN'?",
        "PAYLOAD_LOGGER_PROXY_PORT: unknown variable",
        "PAYLOAD_LOGGER_XQZ: unknown variable",
    )


def test_what_kubernetes_sets_for_services_is_not() -> None:
    environ = {
        "PAYLOAD_LOGGER_SERVICE_HOST": "10.0.0.1",
        "PAYLOAD_LOGGER_SERVICE_PORT": "8080",
        "PAYLOAD_LOGGER_SERVICE_PORT_HTTP": "8080",
        "PAYLOAD_LOGGER_PORT": "tcp://10.0.0.1:8080",
        "PAYLOAD_LOGGER_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "PAYLOAD_LOGGER_PORT_8080_TCP_PROTO": "tcp",
        "PAYLOAD_LOGGER_PORT_8080_TCP_PORT": "8080",
        "PAYLOAD_LOGGER_PORT_8080_TCP_ADDR": "10.0.0.1",
        "PAYLOAD_LOGGER_ADMIN_SERVICE_HOST": "10.0.0.2",
        "PAYLOAD_LOGGER_ADMIN_PORT": "udp://10.0.0.2:8081",
    }
    assert load(overrides={}, environ=environ) == Loaded(Settings(), ())


# Between values


@pytest.mark.parametrize(
    ("listen", "upstream"),
    [
        ("0.0.0.0:80", "http://127.0.0.1"),
        ("127.0.0.1:443", "https://localhost/v1"),
        ("[::]:8080", "http://[::1]:8080"),
        ("localhost:8080", "0.0.0.0:8080"),
        ("model:8080", "http://MODEL:8080"),
        ("[::]:8080", "http://0.0.0.0:8080"),
        ("unix:/run/x", "unix:/run/x"),
    ],
)
def test_an_upstream_that_is_the_proxy_itself(problems: Problems, listen: str, upstream: str) -> None:
    tree = {"proxy": {"listen": listen, "upstream": upstream}}
    assert problems(json.dumps(tree)) == ["proxy.upstream: leads back to proxy.listen"]


@pytest.mark.parametrize(
    ("listen", "upstream"),
    [
        ("0.0.0.0:8080", "http://model:8080"),
        ("127.0.0.1:8080", "http://10.0.0.1:8080"),
        (":0", "0.0.0.0:1"),
        ("[::]:80", "http://10.0.0.1"),
    ],
)
def test_an_upstream_with_the_same_port_elsewhere(read: Load, listen: str, upstream: str) -> None:
    read(json.dumps({"proxy": {"listen": listen, "upstream": upstream}}))


def test_listeners_that_take_the_same_port(problems: Problems, read: Load) -> None:
    text = "{proxy: {listen: '0.0.0.0:9000'}, admin: {listen: '127.0.0.1:9000'}, custom_logging: {listen: '[::]:9000'}}"
    assert problems(text) == [
        "custom_logging.listen: the same address as proxy.listen",
        "admin.listen: the same address as proxy.listen",
        "admin.listen: the same address as custom_logging.listen",
    ]
    read("{proxy: {listen: '10.0.0.1:9000'}, admin: {listen: '127.0.0.1:9000'}, custom_logging: {listen: ':0'}}")
    read("{admin: {listen: ':0'}, custom_logging: {listen: ':0'}}")


def test_tls_files(problems: Problems, read: Load, tmp_path: Path) -> None:
    (tmp_path / "pem").write_text("pem")
    read("proxy: {tls_certificate: pem, tls_key: pem, upstream_ca: pem}")
    assert problems("proxy: {tls_certificate: pem}") == [
        "proxy.tls_key: missing; tls_certificate and tls_key belong together"
    ]
    assert problems(json.dumps({"proxy": {"upstream_ca": str(tmp_path)}})) == [
        f"proxy.upstream_ca: '{tmp_path}' is not a file that can be read"
    ]
    assert problems(key("proxy.upstream_ca", "x" * 5000)) == [
        f"proxy.upstream_ca: '{'x' * 59}…' is not a file that can be read"
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_tls_file_that_may_not_be_read(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "pem").touch(mode=0)
    assert problems("proxy: {upstream_ca: pem}") == ["proxy.upstream_ca: 'pem' is not a file that can be read"]


def collections(**paths: str) -> str:
    return json.dumps(
        {
            "data_collector": {
                "collections": {name: {"enabled": True, "data": {"path": path}} for name, path in paths.items()}
            }
        }
    )


def test_two_collections_with_one_root(problems: Problems, read: Load) -> None:
    response = "data_collector.collections.response.data.path"
    words = "is already the root of request; give each collection its own"
    assert problems(collections(request="/d/x", response="file:///d/x/")) == [f"{response}: 'file:///d/x' {words}"]
    # Below local storage only the folder counts.
    one, other = "azureml://datastores/a/paths/x", "azureml://datastores/b/paths/x"
    assert problems(collections(request=one, response=other)) == [f"{response}: '{other}' {words}"]
    read(collections(request="/d/x", response="/d/y"))
    read(collections(request="/a/paths/x", response="/b/paths/x"))


def test_remote_destinations(problems: Problems, read: Load) -> None:
    for url in (
        "https://a.blob.core.windows.net/c/d",
        "http://127.0.0.1:10000/devstoreaccount1/c",
        "azureml://subscriptions/S/resourcegroups/R/workspaces/W/datastores/D/paths/p",
    ):
        assert read(key("storage.url", url)).settings.storage.url == url
        assert read(collections(request=f"{url}/x")).settings.storage.url.startswith("file:")


WORKSPACE = key("azureml", {"subscription_id": "s", "resource_group": "r", "workspace_name": "w"})


def both(*texts: str) -> str:
    """One YAML text of several with different sections."""
    return json.dumps({name: value for text in texts for name, value in json.loads(text).items()})


def test_a_short_datastore_url_needs_a_workspace(problems: Problems, read: Load) -> None:
    url = "azureml://datastores/d/paths/p"
    words = "of which workspace? Add 'azureml: {subscription_id: …, resource_group: …, workspace_name: …}'"
    assert problems(key("storage.url", url)) == [f"storage.url: '{url}': {words}"]
    read(both(key("storage.url", url), WORKSPACE))
    read(collections(request=url))  # with local storage it is a folder
    remote = key("storage.url", "https://a.blob.core.windows.net/c")
    assert problems(both(remote, collections(request=url))) == [f"{COLLECTION}.data.path: '{url}': {words}"]


def test_remote_urls_have_one_form(read: Load) -> None:
    """Else the folder of the spool that stands for them would not be found."""
    for url, normal in {
        "AzureML://subscriptions/S/resourcegroups/R/workspaces/W/datastores/D/paths/P/": (
            "azureml://subscriptions/S/resourcegroups/R/workspaces/W/datastores/D/paths/P"
        ),
        "HTTPS://Acct.BLOB.core.windows.net/c/D/": "https://acct.blob.core.windows.net/c/D",
    }.items():
        assert read(key("storage.url", url)).settings.storage.url == normal


def test_a_collection_has_a_folder_of_its_container(problems: Problems, read: Load) -> None:
    for url in ("https://a.blob.core.windows.net/c", "http://127.0.0.1:10000/devstoreaccount1/c"):
        words = "is a whole container; name a folder in it, large bodies go to one beside it"
        assert problems(collections(request=url)) == [f"{COLLECTION}.data.path: '{url}' {words}"]
        read(collections(request=f"{url}/d"))
        read(key("storage.url", url))


def test_two_datastores_may_have_the_same_folder(read: Load) -> None:
    one, other = "azureml://datastores/a/paths/x", "azureml://datastores/b/paths/x"
    remote = key("storage.url", "https://a.blob.core.windows.net/c")
    read(both(remote, WORKSPACE, collections(request=one, response=other)))


def test_what_a_line_may_have_when_it_is_shipped(problems: Problems, read: Load) -> None:
    large, limit = key("capture.max_inline_bytes", "17MiB"), key("capture.max_inline_bytes", "16MiB")
    remote = key("storage.url", "https://a.blob.core.windows.net/c")
    words = (
        "17825792 is too large for lines that are shipped: a blob takes 100 MiB at once, and text may become six times "
        "as long; use at most 16MiB"
    )
    assert problems(both(large, remote)) == [f"capture.max_inline_bytes: {words}"]
    read(both(limit, remote))
    read(large)


HEADERS = "data_collector.request_logging.capture_headers"
CAPTURED_HEADERS = {
    "data_collector": {
        "request_logging": {"capture_headers": ["x", "Authorization", "X-API-Key"]},
        "collections": {"request": {"enabled": True}},
    },
    "capture": {"extended_fields": "off"},
}


@pytest.mark.parametrize(
    ("text", "warnings"),
    [
        (
            "data_collector: {collections: {}}",
            [NOTHING],
        ),
        (
            "data_collector: {collections: {request: {enabled: false}}}",
            [NOTHING],
        ),
        (
            "data_collector: {sampling_rate: 0, collections: {request: {enabled: true, sampling_rate: 0}}}",
            [
                "data_collector.sampling_rate: 0; a collection without a rate of its own records nothing",
                "data_collector.collections.request.sampling_rate: 0; it records nothing",
            ],
        ),
        (
            "data_collector: {rolling_rate: DAY, collections: {request: {enabled: true}, x: {enabled: false}}}",
            ["data_collector.rolling_rate: Azure ML's model monitor reads only Hour"],
        ),
        (
            "{admin: {}, custom_logging: {}}",
            [
                "custom_logging: no collection but request and response is enabled; every frame will be refused",
            ],
        ),
        (
            json.dumps(CAPTURED_HEADERS),
            [
                f"{HEADERS}: not recorded; headers are extended fields, and capture.extended_fields is off",
                f"{HEADERS}: 'Authorization' carries credentials; they will be stored in clear",
                f"{HEADERS}: 'X-API-Key' carries credentials; they will be stored in clear",
            ],
        ),
    ],
)
def test_warnings(read: Load, text: str, warnings: list[str]) -> None:
    assert list(read(text).warnings) == [f"c.yaml: {warning}" for warning in warnings]


# Whatever it is given: settings or ConfigError, and problems of one line each

NAMES = st.sampled_from(sorted({name for path, _ in keys() for name in path} | {"request", "model", "<<", "x"}))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["1GiB", "5s", "unix:/x", "file:///x", "https://a.blob.c/d", "GET /x", "True", "[a, b", "127.0.0.1:1"]
    ),
)
TREES = st.recursive(
    LEAVES,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES | st.text(max_size=8), below, max_size=6),
    max_leaves=25,
)
EVERY_KEY = st.dictionaries(st.sampled_from([".".join(path) for path, _ in keys()]), LEAVES, max_size=8)
MANY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)


def loads_or_reports(**given: Any) -> None:
    try:
        lines = load(**{"environ": {}, "overrides": {}} | given).warnings
    except ConfigError as error:
        lines = error.problems or ("",)  # no reason is a mistake too
    assert all(line and line.isprintable() for line in lines)


@MANY
@given(tree=st.dictionaries(NAMES, TREES, max_size=5), as_=st.sampled_from(["config", "deployment"]))
def test_any_tree(tmp_path: Path, tree: Any, as_: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="backslashreplace")
    loads_or_reports(**{as_: file})
    file.write_text(json.dumps(tree))
    loads_or_reports(**{as_: file})


@MANY
@given(
    content=st.text(st.characters(codec="utf-8")).map(str.encode)
    | st.text("&*{}[]:,!-?|> \n\t'\"%<ab1~").map(str.encode)
    | st.binary()
)
def test_any_text(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    loads_or_reports(config=file)


@MANY
@given(values=EVERY_KEY)
def test_any_value_of_any_key(values: dict[str, Any]) -> None:
    loads_or_reports(overrides=values)
    environ = {variable_of(tuple(path.split("."))): str(value) for path, value in values.items()}
    loads_or_reports(environ=environ)


@pytest.mark.parametrize("as_", ["config", "deployment"])
def test_a_block_that_lost_its_indentation_is_named(read: Load, as_: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read("name: blue\ndata_collector:\ncollections:\nrequest:\nenabled: 'False'\n", as_=as_)
    assert raised.value.problems == tuple(
        f"c.yaml: {key}: belongs below data_collector; is the indentation lost?"
        for key in ("collections", "request", "enabled")
    )


def test_a_misspelt_collection_is_named(read: Load) -> None:
    loaded = read("data_collector: {collections: {reqest: {enabled: true}, response: {enabled: true}}}")
    (warning,) = loaded.warnings
    assert warning == "c.yaml: data_collector.collections.reqest: taken for custom logging; did you mean 'request'?"
