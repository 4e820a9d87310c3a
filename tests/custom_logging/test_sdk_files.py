"""What the SDK is told: its configuration file, the environment that ``sdk-env`` prints, and what can't be configured."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from proxy.app import StartError
from proxy.config import ConfigError, load
from proxy.custom_logging import sdk
from proxy.settings import Settings
from tests.custom_logging.frames import settings
from tests.harness import proxy
from tests.test_cli import run

NOWHERE = "http://127.0.0.1:9"
COLLECTIONS: dict[str, Any] = {
    "request": {"enabled": "True"},
    "response": {"enabled": "false"},
    "Model_Inputs": {"enabled": True, "sampling_rate": 0.25},
    "größe": {"enabled": True},
    "model_outputs": {"enabled": False},
}


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def written(given: Settings, path: Path) -> Any:
    sdk.write(given, path)
    return json.loads(path.read_bytes())


def with_rates(tmp_path: Path, *rates: float, root: float = 1.0, **custom_logging: object) -> Settings:
    collections = {f"c{n}": {"enabled": True, "sampling_rate": rate} for n, rate in enumerate(rates)}
    return load(
        overrides={
            "storage.url": str(tmp_path),
            "data_collector": {"sampling_rate": root, "collections": collections},
            **{f"custom_logging.{key}": value for key, value in custom_logging.items()},
        },
        environ={},
    ).settings


# --- the file ---


def test_the_file_as_the_sdk_reads_it(tmp_path: Path) -> None:
    """Booleans, as the SDK takes the text "false" for true; names in lower case; numbers; no sampling by us beside it."""
    path = tmp_path / "mdc.json"
    assert written(settings(tmp_path, COLLECTIONS), path) == {
        "runMode": "cloud",
        "collections": {
            "request": {"enabled": True, "sampleRatePercentage": 100},
            "response": {"enabled": False, "sampleRatePercentage": 100},
            "model_inputs": {"enabled": True, "sampleRatePercentage": 25},
            "größe": {"enabled": True, "sampleRatePercentage": 100},
            "model_outputs": {"enabled": False, "sampleRatePercentage": 100},
        },
    }
    assert path.read_bytes().endswith(b"}\n")
    assert b"25.0" not in path.read_bytes()


@pytest.mark.parametrize(
    ("rate", "percentage"),
    [
        (1, "100"),
        (0, "0"),
        (0.29, "29"),
        (0.07, "7"),
        (0.285, "28.5"),
        (0.001, "0.1"),
        (1 / 3, "33.333333"),
        (1e-9, "0"),
    ],
)
def test_rates_are_percentages(rate: float, percentage: str, tmp_path: Path) -> None:
    sdk.write(with_rates(tmp_path, rate), tmp_path / "f")
    assert f'"sampleRatePercentage": {percentage}\n' in (tmp_path / "f").read_text()


def test_a_collection_without_a_rate_has_that_of_all(tmp_path: Path) -> None:
    given = load(
        overrides={"data_collector": {"sampling_rate": 0.5, "collections": COLLECTIONS}, "storage.url": str(tmp_path)},
        environ={},
    ).settings
    found = written(given, tmp_path / "f")["collections"]
    assert {name: one["sampleRatePercentage"] for name, one in found.items()} == {
        **dict.fromkeys(("request", "response", "größe", "model_outputs"), 50),
        "model_inputs": 25,
    }


@pytest.mark.usefixtures("umask")
def test_another_user_can_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "mdc.json"
    sdk.write(settings(tmp_path), path)
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Who has opened it goes on reading the old one."""
    path = tmp_path / "mdc.json"
    path.write_text("old " * 1000)
    with path.open() as old:
        assert written(settings(tmp_path), path)["runMode"] == "cloud"
        assert old.read() == "old " * 1000
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    sdk.write(settings(tmp_path), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "other").read_bytes())


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        sdk.write(settings(tmp_path), tmp_path / "folder")
    path = tmp_path / "mdc.json"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(orjson, "dumps", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sdk.write(settings(tmp_path), path)
    assert path.read_text() == "old"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "mdc.json"]


async def test_the_proxy_writes_it_at_each_start(tmp_path: Path) -> None:
    path = tmp_path / "shared" / "mdc.json"
    for names in (["a"], ["a", "B"]):
        async with proxy(
            NOWHERE,
            tmp_path / "data",
            data_collector={"collections": {name: {"enabled": True} for name in names}},
            custom_logging__sdk_config_path=str(path),
        ):
            assert list(json.loads(path.read_bytes())["collections"]) == [name.lower() for name in names]
    assert list(path.parent.iterdir()) == [path]


async def test_a_file_that_can_not_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path, reason in (
        (tmp_path / "file" / "f", "Not a directory|File exists"),
        (tmp_path / "folder", "Is a directory"),
    ):
        with pytest.raises(StartError) as error:
            async with proxy(
                NOWHERE,
                tmp_path / "data",
                data_collector={"collections": {"a": {"enabled": True}}},
                custom_logging__sdk_config_path=str(path),
            ):
                pass
        assert re.fullmatch(f"custom_logging.sdk_config_path: can't write {path}: ({reason})", str(error.value))
    assert list((tmp_path / "folder").iterdir()) == []


# --- the environment ---


def environment(given: Settings) -> dict[str, str]:
    assert given.sdk_endpoint is not None
    return sdk.environment(given, given.sdk_endpoint)


@pytest.mark.parametrize(
    ("listen", "host", "port"),
    [
        ("127.0.0.1:50011", "127.0.0.1", "50011"),
        ("10.1.2.3:1", "10.1.2.3", "1"),
        ("localhost:8000", "localhost", "8000"),
        ("sidecar.example:8000", "sidecar.example", "8000"),
        ("0.0.0.0:8000", "127.0.0.1", "8000"),
        (":8000", "127.0.0.1", "8000"),
        ("[::]:8000", "[::1]", "8000"),
        ("[::1]:8000", "[::1]", "8000"),  # the SDK makes a URL of it
    ],
)
def test_where_the_sdk_connects(listen: str, host: str, port: str, tmp_path: Path) -> None:
    assert environment(with_rates(tmp_path, 1, listen=listen)) == {
        "AZUREML_MDC_HOST": host,
        "AZUREML_MDC_PORT": port,
        "AZUREML_MDC_ENABLED": "true",
        "AZUREML_MDC_FORMAT_COMPACT": "false",
    }


def test_without_a_section_it_is_the_default(tmp_path: Path) -> None:
    found = environment(with_rates(tmp_path, 1))
    assert (found["AZUREML_MDC_HOST"], found["AZUREML_MDC_PORT"]) == ("127.0.0.1", "50011")


def test_the_path_of_the_file_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scoring script has another working directory. The file says which collections are enabled."""
    monkeypatch.chdir(tmp_path)
    for path in ("a b/mdc.json", str(tmp_path / "a b" / "mdc.json")):
        assert environment(with_rates(tmp_path, 0.001, 0.5, sdk_config_path=path)) == {
            "AZUREML_MDC_HOST": "127.0.0.1",
            "AZUREML_MDC_PORT": "50011",
            "AZUREML_MDC_CONFIG_PATH": str(tmp_path / "a b" / "mdc.json"),
        }


@pytest.mark.parametrize(
    ("rates", "root", "said"),
    [((1.0,), 1, None), ((0.5, 0.5), 1, "50"), ((0.29,), 1, "29"), ((0.0,), 1, "0"), ((), 0.1, None)],
)
def test_one_rate_is_in_the_environment(
    rates: tuple[float, ...], root: float, said: str | None, tmp_path: Path
) -> None:
    found = environment(with_rates(tmp_path, *rates, root=root, listen="127.0.0.1:1"))
    assert found["AZUREML_MDC_ENABLED"] == "true"
    assert found.get("AZUREML_MDC_SAMPLE_RATE") == said


def test_rates_of_collections_that_the_sdk_does_not_log_do_not_count(tmp_path: Path) -> None:
    rated = {"a": (True, 0.5), "request": (True, 0.1), "response": (True, 0.3), "off": (False, 0.7)}
    collections = {name: {"enabled": enabled, "sampling_rate": rate} for name, (enabled, rate) in rated.items()}
    given = load(overrides={"data_collector": {"collections": collections}}, environ={}).settings
    assert environment(given)["AZUREML_MDC_SAMPLE_RATE"] == "50"


@pytest.mark.parametrize("rates", [(0.5, 1), (0.005,), (0.285, 0.285)])
def test_what_the_environment_can_not_say_needs_the_file(rates: tuple[float, ...], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^custom_logging\.sdk_config_path: missing; the collections' sampling rates differ"
    ):
        environment(with_rates(tmp_path, *rates))


# --- sdk-env ---


def configured(tmp_path: Path, text: str) -> tuple[int, str, str]:
    (tmp_path / "c.yaml").write_text(text)
    done = run("sdk-env", "-c", "c.yaml", cwd=tmp_path)
    return done.returncode, done.stdout, done.stderr


def test_sdk_env_prints_lines_for_the_environment(tmp_path: Path) -> None:
    text = """
data_collector: {collections: {model_inputs: {enabled: 'True', sampling_rate: 0.5}}}
custom_logging: {listen: '127.0.0.1:50012'%s}
"""
    assert configured(tmp_path, text % "") == (
        0,
        "AZUREML_MDC_HOST=127.0.0.1\nAZUREML_MDC_PORT=50012\nAZUREML_MDC_ENABLED=true\nAZUREML_MDC_FORMAT_COMPACT=false\nAZUREML_MDC_SAMPLE_RATE=50\n",
        "",
    )
    assert configured(tmp_path, text % ", sdk_config_path: run/mdc.json") == (
        0,
        f"AZUREML_MDC_HOST=127.0.0.1\nAZUREML_MDC_PORT=50012\nAZUREML_MDC_CONFIG_PATH={tmp_path}/run/mdc.json\n",
        "",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]  # it changes nothing


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "data_collector: {collections: {request: {enabled: true}, off: {enabled: false}}}",
            "data_collector.collections: none is enabled but request and response; add 'model_inputs: {enabled: true}'",
        ),
        (
            "{data_collector: {collections: {a: {enabled: true}}}, custom_logging: {listen: '127.0.0.1:0'}}",
            "custom_logging.listen: port 0 is another one at each start; name one for the SDK",
        ),
        (
            "data_collector: {collections: {a: {enabled: true, sampling_rate: 0.5}, b: {enabled: true}}}",
            (
                "custom_logging.sdk_config_path: missing; the collections' sampling rates differ, or are no whole percentages, "
                "and the SDK takes such only from a file"
            ),
        ),
    ],
)
def test_sdk_env_says_in_a_line_what_is_wrong(text: str, problem: str, tmp_path: Path) -> None:
    assert configured(tmp_path, text) == (2, "", f"payload-logger: {problem}\n")


# --- what can't be configured ---


def problems(**overrides: object) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        load(overrides={key.replace("__", "."): value for key, value in overrides.items()}, environ={})
    return tuple(one.removeprefix("command line: ") for one in error.value.problems)


@pytest.mark.parametrize(
    ("one", "other"), [("model_inputs", "Model_Inputs"), ("request", "REQUEST"), ("größe", "GRÖßE"), ("k", "\u212a")]
)
@pytest.mark.parametrize("enabled", [(True, True), (True, False), (False, False)])
def test_names_that_are_equal_but_for_case(one: str, other: str, enabled: tuple[bool, bool]) -> None:
    collections = {name: {"enabled": on} for name, on in zip((one, other), enabled, strict=True)}
    (found,) = problems(data_collector={"collections": collections})
    assert found == (
        f"data_collector.collections.{other}: the same as '{one}' but for case; "
        + ("write 'request'" if one == "request" else "the SDK has all names in lower case")
    )


def test_the_sdk_connects_to_a_port_only(tmp_path: Path) -> None:
    assert problems(custom_logging__listen="unix:/run/mdc.sock") == (
        "custom_logging.listen: 'unix:/run/mdc.sock': the SDK connects to HOST:PORT only",
    )


def test_the_default_port_is_not_the_proxys_too() -> None:
    """Though there is no section that says so."""
    (found,) = problems(
        proxy__listen="127.0.0.1:50011", data_collector={"collections": {"model_inputs": {"enabled": True}}}
    )
    assert found == "custom_logging.listen: the same address as proxy.listen"


def test_the_model_is_not_where_frames_go() -> None:
    (found,) = problems(
        proxy__upstream="http://127.0.0.1:50011", data_collector={"collections": {"model_inputs": {"enabled": True}}}
    )
    assert found == "proxy.upstream: leads back to custom_logging.listen"


@pytest.mark.parametrize(
    ("listen", "warned"),
    [(f"{host}:1", False) for host in ("127.0.0.1", "localhost", "[::1]", "127.9.9.9")]
    + [(f"{host}:1", True) for host in ("0.0.0.0", "", "[::]", "10.0.0.1", "sidecar")],
)
def test_who_opens_it_to_others_is_warned(listen: str, warned: bool) -> None:
    found = load(
        overrides={"custom_logging.listen": listen, "data_collector": {"collections": {"a": {"enabled": True}}}},
        environ={},
    ).warnings
    assert bool([one for one in found if "is open to others" in one]) == warned


def test_run_says_in_a_line_that_the_port_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "c.yaml").write_text(
            f"{{proxy: {{listen: '127.0.0.1:0', upstream: '{NOWHERE}'}}, custom_logging: {{listen: '{address}'}}, "
            f"storage: {{url: data}}, data_collector: {{collections: {{a: {{enabled: true}}}}}}}}"
        )
        done = run("run", "-c", "c.yaml", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith(
        f"custom_logging.listen: can't listen on {address}: the address is in use by another process; choose another one"
    )
