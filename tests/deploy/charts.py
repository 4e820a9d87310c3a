"""The chart, rendered by Helm itself, and what its objects are to each other."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/payload-logger"
EXAMPLES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "helm/examples").glob("*.yaml"))}
KUBERNETES = ("1.29", "1.34")  # the oldest that the chart is for, and a new one
FOREIGN = {"ServiceMonitor", "PrometheusRule"}  # of the Prometheus operator: their schemas are not Kubernetes'

Object = dict[str, Any]


class RenderError(Exception):
    """Helm refused the values."""


class Helm:
    """Use as a context manager."""

    def __enter__(self) -> Helm:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.deploy.helm_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # in lint mode Helm tells there what `fail` would have said
            text=True,
            cwd=ROOT,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=10)

    def lint(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._ask(do="lint", chart=str(CHART), values=values)
        return found

    def render(self, values: Mapping[str, Any], *, chart: Path = CHART, name: str = "demo") -> Rendered:
        """Raises RenderError."""
        files = self._ask(do="render", chart=str(chart), values=values, name=name)
        objects = [
            one
            for file, text in files.items()
            if not file.endswith("NOTES.txt")
            for one in yaml.safe_load_all(text)
            if one is not None
        ]
        (notes,) = (text for file, text in files.items() if file.endswith("NOTES.txt"))
        return Rendered(objects, notes, "\n".join(files.values()))

    def _ask(self, **task: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise RenderError(answer["error"])
        return answer["result"]


@dataclass(frozen=True)
class Rendered:
    """What ``helm install`` would apply."""

    objects: list[Object]
    notes: str
    text: str

    def one(self, kind: str, suffix: str = "") -> Object:
        (found,) = (
            one for one in self.all(kind) if one["metadata"]["name"].endswith(suffix or one["metadata"]["name"])
        )
        return found

    def all(self, kind: str) -> list[Object]:
        return [one for one in self.objects if one["kind"] == kind]

    @property
    def workload(self) -> Object:
        (found,) = self.all("Deployment") + self.all("StatefulSet")
        return found

    @property
    def pod(self) -> Object:
        pod: Object = self.workload["spec"]["template"]
        return pod

    @property
    def containers(self) -> dict[str, Object]:
        """Of the pod, by name; native sidecars among them."""
        spec = self.pod["spec"]
        return {one["name"]: one for one in [*spec.get("initContainers", ()), *spec["containers"]]}

    @property
    def proxy(self) -> Object:
        return self.containers["payload-logger"]

    @property
    def config_text(self) -> str:
        (found,) = (one for one in self.all("ConfigMap") if "config.yaml" in one["data"])
        text: str = found["data"]["config.yaml"]
        return text

    @property
    def config(self) -> Object:
        config: Object = yaml.safe_load(self.config_text)
        return config


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """The later ones win; lists are replaced, as with Helm."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            below = result.get(key)
            both = isinstance(value, dict) and isinstance(below, dict)
            result[key] = merged(below, value) if both and below is not None else copy.deepcopy(value)
    return result


def ports(container: Object) -> dict[str, int]:
    return {one["name"]: one["containerPort"] for one in container["ports"]}


def validate(thing: Object) -> None:
    """Against Kubernetes' own schemas; unknown fields are errors. Raises kubernetes_validate.ValidationError."""
    if thing["kind"] not in FOREIGN:
        _validate(json.dumps(thing, sort_keys=True))


@functools.cache
def _validate(text: str) -> None:
    for version in KUBERNETES:
        kubernetes_validate.validate(json.loads(text), version, strict=True)
