"""The kustomize component adds what the chart adds, to a Deployment that is there already."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.config import load
from tests.deploy.charts import EXAMPLES, ROOT, Helm, Object, merged, ports, validate

OVERLAY = ROOT / "helm/examples/kustomize"


@pytest.fixture(scope="module")
def built() -> dict[str, Object]:
    """The objects of the example, by kind."""
    kubectl = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if kubectl is None:
        assert "CI" not in os.environ, "kubectl is not installed"
        pytest.skip("kubectl is not installed: there is no wheel of it for this machine")
    done = subprocess.run([kubectl, "kustomize", OVERLAY], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}


def test_every_object_is_one_to_kubernetes(built: dict[str, Object]) -> None:
    assert set(built) == {"Deployment", "Service", "ConfigMap"}
    for one in built.values():
        validate(one)


def test_the_sidecar_is_that_of_the_chart(built: dict[str, Object], helm: Helm) -> None:
    values = {"workloadIdentity": {"enabled": False}, "topologySpreadConstraints": []}
    rendered = helm.render(merged(EXAMPLES["sidecar"], values))
    spec = built["Deployment"]["spec"]["template"]["spec"]
    (sidecar,) = spec["initContainers"]
    assert sidecar == rendered.proxy
    theirs = rendered.pod["spec"]
    for key in ("terminationGracePeriodSeconds", "securityContext"):
        assert spec[key] == theirs[key]
    (model,) = spec["containers"]
    assert model["lifecycle"] == rendered.containers["model"]["lifecycle"]

    def volumes(pod: Object) -> Any:
        return [one if "configMap" not in one else one["name"] for one in pod["volumes"]]

    assert volumes(spec) == volumes(theirs)


def test_the_configuration_is_good_and_its_ports_are_those_of_the_pod(built: dict[str, Object]) -> None:
    settings = load(config=OVERLAY / "config.yaml", overrides={}, environ={}).settings
    spec = built["Deployment"]["spec"]["template"]["spec"]
    (sidecar,) = spec["initContainers"]
    listeners = {"http": settings.proxy.listen, "admin": settings.admin.listen if settings.admin else ""}
    assert ports(sidecar) == {name: int(listen.rpartition(":")[2]) for name, listen in listeners.items()}
    (port,) = built["Service"]["spec"]["ports"]
    assert port["targetPort"] == ports(sidecar)["http"]
    assert settings.proxy.upstream == f"http://127.0.0.1:{spec['containers'][0]['ports'][0]['containerPort']}"
    assert spec["terminationGracePeriodSeconds"] == 10 + 30 + settings.proxy.drain_seconds + 25
    assert settings.spool.max_bytes <= 0.9 * 10 * 1024**3
    (volume,) = (one for one in spec["volumes"] if one["name"] == "config")
    assert volume["configMap"]["name"] == built["ConfigMap"]["metadata"]["name"] != "payload-logger"  # with a hash
    assert built["ConfigMap"]["data"]["config.yaml"] == (OVERLAY / "config.yaml").read_text()


def test_a_deployment_without_the_label_stays_as_it_is(built: dict[str, Object], tmp_path: Path) -> None:
    assert built["Deployment"]["spec"]["template"]["spec"]["initContainers"]
    shutil.copytree(ROOT / "helm", tmp_path / "helm")
    folder = tmp_path / "helm/examples/kustomize"
    text = (folder / "model.yaml").read_text().replace("payload-logger: sidecar", "payload-logger: none")
    (folder / "model.yaml").write_text(text)
    kubectl = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([str(kubectl), "kustomize", folder], capture_output=True, text=True, check=False, timeout=60)
    rendered = {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}
    given = list(yaml.safe_load_all(text))
    assert [rendered["Deployment"]["spec"], rendered["Service"]["spec"]] == [one["spec"] for one in given]
