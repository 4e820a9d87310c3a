"""What is generated from the settings is what lies in the repository, and editors get the same answer as the program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from proxy.config import ConfigError, keys, load, variable_of
from proxy.config_reference import reference_markdown, schema
from proxy.settings import Settings

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "config").glob("*.yaml"))
VALIDATOR = Draft202012Validator(schema())


def test_the_schema_in_the_repository_is_the_generated_one() -> None:
    Draft202012Validator.check_schema(schema())
    assert json.loads((ROOT / "config/payload-logger.schema.json").read_text(encoding="utf-8")) == schema()


def test_the_reference_in_the_repository_is_the_generated_one() -> None:
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == reference_markdown()


def test_the_reference_has_one_row_for_each_key() -> None:
    rows = [line for line in reference_markdown().splitlines() if line.startswith("| `")]
    expected = [(f"| `{'.'.join(path)}` |", f"| `{variable_of(path)}` |") for path, _ in keys()]
    assert len(rows) == len(expected)
    assert all(row.startswith(name) and variable in row for row, (name, variable) in zip(rows, expected, strict=True))


def test_there_are_the_examples_that_the_documentation_speaks_of() -> None:
    names = ["azure.yaml", "azureml-deployment.yaml", "custom-logging.yaml", "local.yaml", "sidecar.yaml"]
    assert [file.name for file in EXAMPLES] == names


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_an_example_satisfies_the_schema_and_loads(file: Path) -> None:
    VALIDATOR.validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    as_ = "deployment" if "deployment" in file.name else "config"
    assert load(**{as_: file}, overrides={}, environ={}).warnings == ()  # type: ignore[arg-type]


def test_the_defaults_in_the_schema_are_the_defaults() -> None:
    def defaults(part: dict[str, Any], path: str = "") -> dict[str, Any]:
        found = {}
        for name, below in part.get("properties", {}).items():
            if "default" in below:
                found[path + name] = below["default"]
            found |= defaults(below, f"{path}{name}.")
        return found

    written = defaults(schema())
    sections_that_default_to_nothing = ("data_collector.", "custom_logging.", "admin.", "azureml.")
    written = {path: value for path, value in written.items() if not path.startswith(sections_that_default_to_nothing)}
    assert len(written) > 25
    assert load(overrides=written, environ={}).settings == Settings()


REFUSED: list[dict[str, Any]] = [
    {"proxi": {}},
    {"proxy": {"listne": 1}},
    {"proxy": 5},
    {"proxy": {"listen": "nowhere"}},
    {"proxy": {"upstream": "ftp://x"}},
    {"proxy": {"max_headers": 0}},
    {"proxy": {"connect_timeout": 0}},
    {"spool": {"max_bytes": "10 GX"}},
    {"spool": {"max_bytes": True}},
    {"spool": {"max_hold": -1}},
    {"spool": {"durability": "maybe"}},
    {"spool": {"roll_bytes": 1024}},
    {"endpoint_name": "a/b"},
    {"name": "_x"},
    {"capture": {"include": ["GET"]}},
    {"azureml": {"workspace_name": "w"}},
    {"data_collector": {}},
    {"data_collector": {"sampling_rate": 1.5, "collections": {}}},
    {"data_collector": {"rolling_rate": "Week", "collections": {}}},
    {"data_collector": {"collections": {"request": None}}},
    {"data_collector": {"collections": {"request": {}}}},
    {"data_collector": {"collections": {"request": {"enabled": "maybe"}}}},
    {"data_collector": {"collections": {".x": {"enabled": True}}}},
    {"data_collector": {"request_logging": {"capture_headers": ["x-*"]}, "collections": {}}},
]


@pytest.mark.parametrize("tree", REFUSED, ids=json.dumps)
def test_what_the_schema_refuses_the_program_refuses_too(tmp_path: Path, tree: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(tree)
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(ConfigError):
        load(config=file, overrides={}, environ={})


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"proxy": None, "capture": {"include": None, "exclude": "GET,HEAD /x, *"}},
    {"proxy": {"listen": 8080, "upstream": "localhost:5001", "connect_timeout": "50 ms"}},
    {"proxy": {"listen": "[::1]:0", "upstream": "HTTPS://x/v1", "drain_seconds": 1.5}},
    {"proxy": {"listen": "unix:/run/p", "upstream": "unix:/run/m"}},
    {"storage": {"url": "data"}, "spool": {"max_bytes": "1.5 KiB", "max_hold": "1e-3", "durability": "none"}},
    {"name": 2024, "spool": {"max_bytes": 0, "when_full": "reject"}, "admin": {}},
    {"capture": {"include": ["get, HEAD /x", "*"]}, "$schema": "x", "model": {"any": ["thing"]}},
    {
        "data_collector": {
            "rolling_rate": "hour",
            "sampling_rate": "0.5",
            "request_logging": {"capture_headers": ["X-Tenant"]},
            "collections": {
                "request": {"enabled": "True", "data": {"name": "n", "path": "/x ", "version": 1}},
                "response": {"enabled": False, "sampling_rate": 0.1, "client_id": "c"},
            },
        }
    },
]


@pytest.mark.parametrize("tree", ACCEPTED, ids=json.dumps)
def test_what_the_program_reads_the_schema_accepts(tmp_path: Path, tree: dict[str, Any]) -> None:
    VALIDATOR.validate(tree)
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")
    load(config=file, overrides={}, environ={})
