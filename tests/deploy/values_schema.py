"""The chart's schema knows payload-logger's configuration: ``python -m tests.deploy.values_schema`` brings it up to date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from proxy.config_reference import schema

FILE = Path(__file__).parents[2] / "helm/payload-logger/values.schema.json"


def expected() -> str:
    """The text of the file: what stands in it, and the schema of ``config`` as the settings have it now."""
    values = json.loads(FILE.read_text())
    values["properties"]["config"] = _without_words({key: value for key, value in schema().items() if key != "title"})
    return json.dumps(values, indent=2) + "\n"


def _without_words(node: Any) -> Any:
    """Only what is checked: the words stand in docs/configuration.md."""
    if not isinstance(node, dict):
        return node
    return {
        key: {name: _without_words(one) for name, one in value.items()}
        if key == "properties"
        else _without_words(value)
        for key, value in node.items()
        if key not in {"description", "default", "examples", "$schema"}
    }


if __name__ == "__main__":
    FILE.write_text(expected())
