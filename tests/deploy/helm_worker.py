"""Helm's engine, in a process of its own: it brings Go's runtime, which belongs in no process that measures latencies.

Reads one JSON object per line, ``{"do": "render" | "lint", "chart": …, "values": …}``, and answers each with a line:
``{"result": …}`` or ``{"error": "…"}``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import helm_python


def answer(task: dict[str, Any]) -> Any:
    if task["do"] == "lint":
        return helm_python.lint(task["chart"], task["values"], strict=True)["messages"]
    with helm_python.Chart.load(task["chart"]) as chart:
        return chart.render(task["values"], name=task["name"], namespace="models")


if __name__ == "__main__":
    for line in sys.stdin:
        try:
            found = {"result": answer(json.loads(line))}
        except helm_python.HelmError as error:
            found = {"error": str(error)}
        print(json.dumps(found), flush=True)
