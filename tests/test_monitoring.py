"""The alert rules and the dashboard ask for what there is, and the docs say what to do about each alert."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from proxy.admin.metrics import COMMON, METRICS, PREFIX, Kind

ROOT = Path(__file__).parents[1]
FILES = ROOT / "helm" / "payload-logger" / "files"
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
PANELS: list[dict[str, Any]] = json.loads((FILES / "dashboard.json").read_text())["panels"]
OF_PROMETHEUS = {"job", "instance"}  # labels that a scrape adds


def series() -> dict[str, set[str]]:
    """The labels of each series by its name."""
    found: dict[str, set[str]] = {f"{PREFIX}build_info": {"version", "python", "compiled"}}
    for metric in (*METRICS, *COMMON):
        labels = (
            OF_PROMETHEUS | ({"worker"} if metric in METRICS else set()) | ({metric.label} if metric.label else set())
        )
        if metric.kind is Kind.HISTOGRAM:
            found[f"{metric.full_name}_bucket"] = labels | {"le"}
            found[f"{metric.full_name}_sum"] = found[f"{metric.full_name}_count"] = labels
        else:
            found[metric.full_name] = labels
    return found


SERIES = series()


def parts(expression: Any) -> Iterator[Any]:
    """The expression and all that it is made of."""
    yield expression
    for name in ("expr", "lhs", "rhs", "param", "vector_selector"):
        part = getattr(expression, name, None)
        if part is not None:
            yield from parts(part)
    for argument in getattr(expression, "args", None) or ():
        yield from parts(argument)


def check(text: str) -> set[str]:
    """Every series is there, and has the labels that it is asked for; the names of the series."""
    names = set()
    for part in parts(promql_parser.parse(re.sub(r"\$__rate_interval", "5m", text))):
        if isinstance(part, promql_parser.VectorSelector):
            assert part.name in SERIES, f"there is no {part.name}: {text}"
            labels = {matcher.name for matcher in part.matchers.matchers}
            assert labels <= SERIES[part.name], f"{part.name} has no {labels - SERIES[part.name]}: {text}"
            names.add(part.name)
    assert names
    for grouping in re.findall(r"(?:by|on|without)\s*\(([^)]*)\)", text):
        labels = {label.strip() for label in grouping.split(",")}
        assert labels <= set.union(*(SERIES[name] for name in names)), f"{labels}: {text}"
    return names


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert(rule: dict[str, Any]) -> None:
    check(rule["expr"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert {"summary", "description", "runbook"} <= rule["annotations"].keys()
    assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
    assert f"\n### {rule['alert']}\n" in OPERATIONS


def test_no_alert_is_told_of_that_there_is_none_of() -> None:
    assert re.findall(r"^### (\S+)$", OPERATIONS, re.MULTILINE) == [rule["alert"] for rule in RULES]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        names = check(target["expr"])
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            assert any(label in SERIES[name] for name in names)


def test_panels_do_not_cover_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_what_is_lost_is_on_the_dashboard_and_alerted() -> None:
    for text in ((FILES / "alerts.yaml").read_text(), (FILES / "dashboard.json").read_text()):
        for name in ("events_discarded_total", "shipping_lag_seconds", "spool_bytes", "unheld_responses_total"):
            assert f"{PREFIX}{name}" in text


def test_the_check_finds_what_is_wrong() -> None:
    for wrong in (
        "rate(payload_logger_no_such_total[5m])",
        'payload_logger_events_discarded_total{cause="x"}',
        "sum by (reason) (payload_logger_events_pending)",
        "histogram_quantile(0.9, payload_logger_added_duration_seconds)",
    ):
        with pytest.raises(AssertionError):
            check(wrong)
