"""The chart, rendered by Helm's own engine and checked against Kubernetes' schemas. No cluster was at hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from proxy import __version__
from proxy.config import load
from tests.deploy import values_schema
from tests.deploy.charts import CHART, EXAMPLES, ROOT, Helm, Rendered, RenderError, merged, ports, validate
from tests.harness import exchange

SIDECAR = EXAMPLES["sidecar"]
GATEWAY = merged(EXAMPLES["gateway"], {"spool": {"persistence": {"enabled": False}}})
PERSISTENT = {"spool": {"persistence": {"enabled": True}}}
BASES = {
    "sidecar": SIDECAR,
    "sidecar, persistent": merged(SIDECAR, PERSISTENT),
    "gateway": GATEWAY,
    "gateway, persistent": merged(GATEWAY, PERSISTENT),
}
SDK = {"data_collector": EXAMPLES["custom-logging"]["config"]["data_collector"]}
PEERS = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
# Each is rendered with each base that it suits; `sidecar` and `gateway` say so where it is only one.
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "digest": {"image": {"digest": f"sha256:{'0' * 64}"}, "imagePullSecrets": [{"name": "pull"}]},
    "own probes": {"probes": {"startup": {"failureThreshold": 600}, "liveness": {"periodSeconds": 20}}},
    "other ports": {"config": {"proxy": {"listen": "[::]:9080"}, "admin": {"listen": 9081}}},
    "TLS": {"tls": {"secretName": "serving"}},
    "upstream CA of a ConfigMap": {"upstreamCa": {"configMapName": "authorities"}},
    "upstream CA of a Secret": {"upstreamCa": {"secretName": "authorities", "key": "tls.crt"}},
    "secret as a file": {"credentials": {"secretName": "account", "secretKey": "key", "kind": "key"}},
    "secret in the environment": {
        "credentials": {"secretName": "account", "secretKey": "sas", "kind": "sasToken", "asFile": False}
    },
    "no identity": {"workloadIdentity": {"enabled": False}},
    "an identity of a tenant": {"workloadIdentity": {"tenantId": "t"}, "serviceAccount": {"annotations": {"a": "b"}}},
    "a service account that is there": {"serviceAccount": {"create": False, "name": "models"}},
    "HPA": {"autoscaling": {"enabled": True, "behavior": {"scaleDown": {"stabilizationWindowSeconds": 600}}}},
    "HPA by own metrics": {
        "autoscaling": {
            "enabled": True,
            "metrics": [
                {
                    "type": "Resource",
                    "resource": {"name": "memory", "target": {"type": "Utilization", "averageUtilization": 80}},
                }
            ],
        }
    },
    "no PDB": {"podDisruptionBudget": {"enabled": False}},
    "PDB by percentage": {"podDisruptionBudget": {"minAvailable": "50%", "maxUnavailable": None}},
    "recreate": {"strategy": {"type": "Recreate"}},
    "network policy": {
        "networkPolicy": {
            "enabled": True,
            "from": PEERS,
            "adminFrom": PEERS,
            "egress": [{"to": PEERS, "ports": [{"port": 443}]}],
        }
    },
    "network policy, open": {"networkPolicy": {"enabled": True}},
    "monitoring": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True},
        "dashboard": {"enabled": True},
    },
    "scheduling": {
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "podAnnotations": {"a": "1"},
        "podLabels": {"team": "risk"},
        "podSecurityContext": {"fsGroup": 2000, "supplementalGroups": [3000]},
    },
    "extras": {
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://egress:3128"}],
        "extraVolumes": [{"name": "more", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
        "config": {"spool": {"path": "/more/spool"}},
    },
    "local storage": {"config": {"storage": {"url": "/var/lib/payload-logger/data"}}, "spool": {"acceptLoss": True}},
    "own sizes": {"spool": {"size": "1.5Ti"}, "config": {"spool": {"max_bytes": 1_099_511_627_776}}},
    "own times": {
        "config": {"proxy": {"drain_seconds": "2.5min"}},
        "preStopSeconds": 0,
        "terminationGracePeriodSeconds": 900,
    },
    "no roll": {"rollOnConfigChange": False, "resources": {"limits": {"cpu": "1"}}},
    "names": {"nameOverride": "recorder", "fullnameOverride": "a" * 60},
    "load balancer": {"service": {"type": "LoadBalancer", "port": 443, "annotations": {"a": "b"}}},
}
ONLY_SIDECAR: dict[str, dict[str, Any]] = {
    "custom logging": {"config": SDK},
    "custom logging elsewhere": {
        "config": {**SDK, "custom_logging": {"listen": 50099, "sdk_config_path": "/sdk/c.json"}}
    },
    "a model with everything": {
        "model": {
            "command": ["serve"],
            "args": ["--port", "5001"],
            "env": [{"name": "A", "value": "1"}],
            "envFrom": [{"secretRef": {"name": "model"}}],
            "livenessProbe": {"tcpSocket": {"port": "model"}},
            "startupProbe": {"httpGet": {"path": "/", "port": "model"}},
            "securityContext": {"runAsNonRoot": True},
            "lifecycle": {"preStop": {"exec": {"command": ["drain"]}}},
            "volumeMounts": [{"name": "weights", "mountPath": "/weights"}],
        },
        "extraVolumes": [{"name": "weights", "emptyDir": {}}],
    },
}
CASES = [
    (base, option) for base in BASES for option in (OPTIONS | ONLY_SIDECAR if base.startswith("sidecar") else OPTIONS)
]
SECURE = {
    "runAsNonRoot": True,
    "runAsUser": 10001,
    "runAsGroup": 10001,
    "readOnlyRootFilesystem": True,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
STANDARD_LABELS = {
    "helm.sh/chart",
    *(f"app.kubernetes.io/{one}" for one in ("name", "instance", "version", "managed-by")),
}


@pytest.fixture(scope="module", params=CASES, ids=": ".join)
def case(request: pytest.FixtureRequest, helm: Helm) -> tuple[dict[str, Any], Rendered]:
    """Values, and what Helm makes of them."""
    base, option = request.param
    values = merged(BASES[base], (OPTIONS | ONLY_SIDECAR)[option])
    return values, helm.render(values)


@pytest.mark.parametrize("values", [{}, *EXAMPLES.values()], ids=["nothing", *EXAMPLES])
def test_lint_finds_nothing(helm: Helm, values: dict[str, Any]) -> None:
    assert [one for one in helm.lint(values) if one["error"] != "icon is recommended"] == []


def test_every_object_is_one_to_kubernetes(case: tuple[dict[str, Any], Rendered]) -> None:
    _, rendered = case
    for one in rendered.objects:
        validate(one)
        assert set(one["metadata"]["labels"]) >= STANDARD_LABELS
        assert len(one["metadata"]["name"]) <= 63
    assert len({(one["kind"], one["metadata"]["name"]) for one in rendered.objects}) == len(rendered.objects)
    assert rendered.notes.strip()


def test_validation_sees_what_is_wrong(helm: Helm) -> None:
    workload = helm.render(SIDECAR).workload
    workload["spec"]["template"]["spec"]["initContainers"][0]["restartPolcy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="restartPolcy"):
        validate(workload)


def test_the_proxy_is_a_native_sidecar_or_alone(case: tuple[dict[str, Any], Rendered]) -> None:
    values, rendered = case
    spec = rendered.pod["spec"]
    if values["mode"] == "sidecar":
        (sidecar,) = spec["initContainers"]
        assert (sidecar["name"], sidecar["restartPolicy"]) == ("payload-logger", "Always")
        assert [one["name"] for one in spec["containers"]] == ["model"]
        assert "lifecycle" not in sidecar  # the kubelet stops it after the model
        stops_first = spec["containers"][0]
    else:
        assert "initContainers" not in spec
        (stops_first,) = spec["containers"]
        assert "restartPolicy" not in stops_first
    seconds = values.get("preStopSeconds", 10)
    pre_stop = values.get("model", {}).get("lifecycle", {}).get("preStop", {"sleep": {"seconds": seconds}})
    assert stops_first.get("lifecycle") == ({"preStop": pre_stop} if seconds else None)


def test_the_proxy_has_no_rights(case: tuple[dict[str, Any], Rendered]) -> None:
    _, rendered = case
    spec = rendered.pod["spec"]
    assert rendered.proxy["securityContext"] == SECURE
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(spec)
    for mount in rendered.proxy["volumeMounts"]:
        assert mount.get("readOnly") or mount["name"] in {"spool", "sdk-config", "more"}


def test_a_pods_end_has_time_for_all_of_it(case: tuple[dict[str, Any], Rendered], loaded: Any) -> None:
    values, rendered = case
    model = values["model"].get("shutdownSeconds", 30) if values["mode"] == "sidecar" else 0
    needed = values.get("preStopSeconds", 10) + model + loaded(rendered).proxy.drain_seconds + 25
    grace = rendered.pod["spec"]["terminationGracePeriodSeconds"]
    assert grace == values.get("terminationGracePeriodSeconds", needed) >= needed


def test_the_ports_of_the_configuration_are_those_of_the_pod(
    case: tuple[dict[str, Any], Rendered], loaded: Any
) -> None:
    values, rendered = case
    settings = loaded(rendered)
    numbers = {"http": settings.proxy.listen, "admin": settings.admin.listen}
    assert ports(rendered.proxy) == {name: int(listen.rpartition(":")[2]) for name, listen in numbers.items()}
    for probe, path in {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}.items():
        assert rendered.proxy[probe]["httpGet"] == {"path": path, "port": "admin"}
    service, pods = rendered.all("Service")
    assert [one["targetPort"] for one in service["spec"]["ports"]] == ["http"]
    assert [one["targetPort"] for one in pods["spec"]["ports"]] == ["admin"]
    assert pods["spec"]["clusterIP"] == "None"
    if values["mode"] == "sidecar":
        assert settings.proxy.upstream == f"http://127.0.0.1:{ports(rendered.containers['model'])['model']}"
    else:
        assert settings.proxy.upstream == values["gateway"]["upstream"]


def test_selectors_are_stable_and_meet_the_pods(case: tuple[dict[str, Any], Rendered]) -> None:
    values, rendered = case
    name = values.get("nameOverride", "payload-logger")
    selector = {"app.kubernetes.io/name": name, "app.kubernetes.io/instance": "demo"}
    assert rendered.workload["spec"]["selector"] == {"matchLabels": selector}
    assert rendered.pod["metadata"]["labels"].items() >= selector.items()
    found = [one["spec"]["selector"] for one in rendered.all("Service")]
    found += [one["spec"]["selector"]["matchLabels"] for one in rendered.all("PodDisruptionBudget")]
    found += [one["spec"]["podSelector"]["matchLabels"] for one in rendered.all("NetworkPolicy")]
    constraints = rendered.pod["spec"].get("topologySpreadConstraints", ())
    found += [one["labelSelector"]["matchLabels"] for one in constraints]
    assert all(one == selector for one in found)


def test_every_mount_has_its_volume(case: tuple[dict[str, Any], Rendered]) -> None:
    _, rendered = case
    spec = rendered.pod["spec"]
    volumes = [one["name"] for one in spec["volumes"]]
    claimed = [one["metadata"]["name"] for one in rendered.workload["spec"].get("volumeClaimTemplates", ())]
    assert len(set(volumes + claimed)) == len(volumes + claimed)
    mounted = set()
    for container in rendered.containers.values():
        mounts = container.get("volumeMounts", [])
        mounted |= {one["name"] for one in mounts}
        assert len({one["mountPath"] for one in mounts}) == len(mounts)
    assert mounted == set(volumes + claimed)


def test_the_spool_fits_in_its_volume(case: tuple[dict[str, Any], Rendered], loaded: Any) -> None:
    values, rendered = case
    size = values.get("spool", {}).get("size", "10Gi")
    budget = loaded(rendered).spool.max_bytes
    volume_bytes = Decimal(size[:-2]) * 1024 ** (3 if size.endswith("Gi") else 4)
    given = values["config"].get("spool", {}).get("max_bytes")
    assert budget == (given or int(volume_bytes * Decimal("0.8"))) <= volume_bytes * Decimal("0.9")
    persistent = values.get("spool", {}).get("persistence", {}).get("enabled")
    requests = rendered.proxy["resources"].get("requests", {})
    if persistent:
        (claim,) = rendered.workload["spec"]["volumeClaimTemplates"]
        assert claim["spec"]["resources"] == {"requests": {"storage": size}}
        assert "ephemeral-storage" not in requests
        assert rendered.workload["kind"] == "StatefulSet"
        assert rendered.workload["spec"]["serviceName"] == rendered.one("Service", "-pods")["metadata"]["name"]
    else:
        (volume,) = (one for one in rendered.pod["spec"]["volumes"] if one["name"] == "spool")
        assert volume["emptyDir"] == {"sizeLimit": size}
        assert requests["ephemeral-storage"] == size
        assert rendered.workload["kind"] == "Deployment"


def test_secrets_are_only_referred_to(case: tuple[dict[str, Any], Rendered]) -> None:
    values, rendered = case
    assert not rendered.all("Secret")
    credentials = values.get("credentials", {})
    secret = {
        one["name"]: one
        for container in rendered.containers.values()
        for one in container.get("env", ())
        if one["name"].startswith("AZURE_")
    }
    if not credentials:
        assert secret == {}
        return
    variable = {"key": "AZURE_STORAGE_KEY", "sasToken": "AZURE_STORAGE_SAS_TOKEN"}[credentials["kind"]]
    if credentials.get("asFile", True):
        (one,) = (one for one in rendered.pod["spec"]["volumes"] if one["name"] == "credentials")
        assert one["secret"]["items"] == [{"key": credentials["secretKey"], "path": "credential"}]
        assert secret == {f"{variable}_FILE": {"name": f"{variable}_FILE", "value": f"{CREDENTIALS}/credential"}}
        mounts = {one["name"]: one["mountPath"] for one in rendered.proxy["volumeMounts"]}
        assert mounts["credentials"] == CREDENTIALS
    else:
        reference = {"name": credentials["secretName"], "key": credentials["secretKey"]}
        assert secret == {variable: {"name": variable, "valueFrom": {"secretKeyRef": reference}}}


CREDENTIALS = "/etc/payload-logger-credentials"


@pytest.fixture
def loaded(certificate: tuple[Path, Path], tmp_path: Path) -> Any:
    """Reads a rendered configuration as the proxy does; mounted files are ones that are there."""

    def read(rendered: Rendered) -> Any:
        text = rendered.config_text
        for mounted in re.findall(r"/etc/payload-logger-\S+", text):
            text = text.replace(mounted, str(certificate[mounted.endswith(".key")]))
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return load(config=file, overrides={}, environ={}).settings

    return read


# What a single option changes


def test_workload_identity_is_labelled_and_annotated(helm: Helm) -> None:
    rendered = helm.render(SIDECAR)
    assert rendered.pod["metadata"]["labels"]["azure.workload.identity/use"] == "true"
    account = rendered.one("ServiceAccount")
    client_id = SIDECAR["workloadIdentity"]["clientId"]
    assert account["metadata"]["annotations"] == {"azure.workload.identity/client-id": client_id}
    assert rendered.pod["spec"]["serviceAccountName"] == account["metadata"]["name"]
    without = helm.render(merged(SIDECAR, {"workloadIdentity": {"enabled": False}}))
    assert "azure.workload" not in without.text


def test_custom_logging_has_the_environment_that_sdk_env_prints(helm: Helm, tmp_path: Path) -> None:
    for options in ("custom logging", "custom logging elsewhere"):
        rendered = helm.render(merged(SIDECAR, ONLY_SIDECAR[options]))
        model = rendered.containers["model"]
        (tmp_path / "config.yaml").write_text(rendered.config_text)
        command = [sys.executable, "-m", "proxy", "sdk-env", "-c", str(tmp_path / "config.yaml")]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        assert {one["name"]: one["value"] for one in model["env"]} == dict(
            line.split("=", 1) for line in printed.splitlines()
        )
        # Both see one folder: the proxy writes the SDK's file there, the scoring script reads it.
        path = rendered.config["custom_logging"]["sdk_config_path"]
        mounts = [
            {one["name"]: one for one in container["volumeMounts"]}["sdk-config"]
            for container in (rendered.proxy, model)
        ]
        assert [one["mountPath"] for one in mounts] == [os.path.dirname(path)] * 2  # noqa: PTH120
        assert [one.get("readOnly", False) for one in mounts] == [False, True]
    assert "MDC" not in helm.render(SIDECAR).text


def test_a_changed_configuration_rolls_the_pods(helm: Helm) -> None:
    def checksum(**values: Any) -> str | None:
        found: str | None = helm.render(merged(SIDECAR, values)).pod["metadata"]["annotations"].get("checksum/config")
        return found

    assert checksum() == checksum(replicas=3) != checksum(config={"logs": {"level": "debug"}})
    assert checksum(rollOnConfigChange=False) is None


def test_a_new_version_of_the_chart_changes_nothing_about_the_pods(helm: Helm, tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "chart")
    file = tmp_path / "chart/Chart.yaml"
    file.write_text(re.sub(r"(?m)^version: .*", "version: 9.9.9", file.read_text()))
    assert helm.render(SIDECAR, chart=tmp_path / "chart").workload["spec"] == helm.render(SIDECAR).workload["spec"]


def test_releases_of_one_namespace_share_nothing(helm: Helm) -> None:
    one, other = (helm.render(SIDECAR, name=name) for name in ("one", "other"))
    names = [{(thing["kind"], thing["metadata"]["name"]) for thing in rendered.objects} for rendered in (one, other)]
    assert not names[0] & names[1]
    unnamed = merged(SIDECAR, {"config": {"endpoint_name": None}})
    assert [helm.render(unnamed, name=name).config["endpoint_name"] for name in ("one", "other")] == [
        "one-payload-logger",
        "other-payload-logger",
    ]


def test_before_kubernetes_1_30_a_command_sleeps(helm: Helm, tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "chart")
    file = tmp_path / "chart/templates/_helpers.tpl"
    text = file.read_text()
    assert text.count(".Capabilities.KubeVersion.Version") == 1
    file.write_text(text.replace(".Capabilities.KubeVersion.Version", '"v1.29.15"'))
    for base in (SIDECAR, GATEWAY):
        rendered = helm.render(base, chart=tmp_path / "chart")
        validate(rendered.workload)
        assert rendered.pod["spec"]["containers"][0]["lifecycle"] == {"preStop": {"exec": {"command": ["sleep", "10"]}}}


def test_the_service_monitor_finds_the_admin_port(helm: Helm) -> None:
    rendered = helm.render(merged(SIDECAR, OPTIONS["monitoring"]))
    monitor = rendered.one("ServiceMonitor")
    selected = [
        one
        for one in rendered.all("Service")
        if one["metadata"]["labels"].items() >= monitor["spec"]["selector"]["matchLabels"].items()
    ]
    assert [one["metadata"]["name"] for one in selected] == ["demo-payload-logger-pods"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == (selected[0]["spec"]["ports"][0]["name"], "/metrics")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_alert_rules_and_dashboard_are_passed_on_as_they_are(helm: Helm) -> None:
    """Their braces are Prometheus' and Grafana's, not Helm's."""
    rendered = helm.render(merged(SIDECAR, OPTIONS["monitoring"]))
    alerts = (CHART / "files/alerts.yaml").read_text()
    assert "{{ $" in alerts
    assert rendered.one("PrometheusRule")["spec"] == {"groups": yaml.safe_load(alerts)["groups"]}
    dashboard = rendered.one("ConfigMap", "-dashboard")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    file = CHART / "files/dashboard.json"
    assert json.loads(dashboard["data"]["payload-logger.json"]) == json.loads(file.read_text())


def test_the_network_policy_closes_what_it_does_not_name(helm: Helm) -> None:
    closed = helm.render(merged(SIDECAR, OPTIONS["network policy, open"])).one("NetworkPolicy")["spec"]
    assert closed["ingress"] == [{"ports": [{"port": "http"}]}]
    assert closed["policyTypes"] == ["Ingress"]
    named = helm.render(merged(SIDECAR, OPTIONS["network policy"])).one("NetworkPolicy")["spec"]
    assert named["policyTypes"] == ["Ingress", "Egress"]
    assert [(one["ports"], one["from"]) for one in named["ingress"]] == [
        ([{"port": "http"}], PEERS),
        ([{"port": "admin"}], PEERS),
    ]


def test_the_autoscaler_scales_what_there_is(helm: Helm) -> None:
    for base, container in (("sidecar", "model"), ("gateway, persistent", "payload-logger")):
        rendered = helm.render(merged(BASES[base], OPTIONS["HPA"]))
        target = rendered.one("HorizontalPodAutoscaler")["spec"]
        assert target["scaleTargetRef"]["kind"] == rendered.workload["kind"]
        assert target["scaleTargetRef"]["name"] == rendered.workload["metadata"]["name"]
        assert target["metrics"][0]["containerResource"]["container"] == container
        assert "replicas" not in rendered.workload["spec"]


def test_the_version_is_that_of_the_program() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


def test_the_schema_knows_the_configuration() -> None:
    assert values_schema.FILE.read_text() == values_schema.expected(), "run: python -m tests.deploy.values_schema"


def test_the_schema_has_every_default(helm: Helm) -> None:
    """What stands in values.yaml is allowed, and nothing is allowed that does not stand there."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads(values_schema.FILE.read_text())

    def compare(values: dict[str, Any], node: dict[str, Any], path: str) -> None:
        assert node["additionalProperties"] is False, path
        assert set(node["properties"]) - {"global"} == set(values), path
        for key, value in values.items():
            below = node["properties"][key]
            if isinstance(value, dict) and "properties" in below and value:
                compare(value, below, f"{path}.{key}")

    compare(defaults, schema, "")


# Values that are refused

BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "a typo": ("sidecar", {"modle": {}}, "at '': additional properties 'modle' not allowed"),
    "a typo below": ("sidecar", {"spool": {"sise": "1Gi"}}, "at '/spool': additional properties 'sise' not allowed"),
    "a typo in config": (
        "sidecar",
        {"config": {"proxy": {"listne": 1}}},
        "at '/config/proxy': additional properties 'listne' not allowed",
    ),
    "a bad value in config": ("sidecar", {"config": {"proxy": {"drain_seconds": "soon"}}}, "at '/config/proxy/drain_"),
    "a type": ("sidecar", {"replicas": "2"}, "at '/replicas': got string, want integer"),
    "a number in env": ("sidecar", {"model": {"env": [{"name": "A", "value": 1}]}}, "at '/model/env/0/value'"),
    "a mode": ("sidecar", {"mode": "side-car"}, "at '/mode': value must be one of 'sidecar', 'gateway'"),
    "a size": ("sidecar", {"spool": {"size": "10"}}, "at '/spool/size'"),
    "a probe's port": (
        "sidecar",
        {"probes": {"startup": {"httpGet": {}}}},
        "additional properties 'httpGet' not allowed",
    ),
    "no image": ("sidecar", {"image": {"repository": ""}}, "image.repository: name the repository"),
    "no model": ("sidecar", {"model": {"image": ""}}, "model.image: name the model server's image"),
    "no upstream": ("gateway", {"gateway": {"upstream": ""}}, "gateway.upstream: name the Service to stand before"),
    "two upstreams": (
        "gateway",
        {"config": {"proxy": {"upstream": "http://other"}}},
        "gateway.upstream and config.proxy.upstream",
    ),
    "a model before a Service": ("gateway", {"model": {"image": "m:1"}}, "model.image: belongs to mode: sidecar"),
    "a Service before a model": (
        "sidecar",
        {"gateway": {"upstream": "http://m"}},
        "gateway.upstream: belongs to mode: gateway",
    ),
    "the SDK elsewhere": ("gateway", {"config": SDK}, "custom logging needs mode: sidecar"),
    "the SDK's file in the spool": (
        "sidecar",
        {"config": {**SDK, "custom_logging": {"sdk_config_path": "/var/lib/payload-logger/sdk.json"}}},
        "config.custom_logging.sdk_config_path: the model's container gets /var/lib/payload-logger as a volume",
    ),
    "the model on the proxy's port": ("sidecar", {"model": {"port": 8081}}, "model.port: 8081 is a port of the proxy"),
    "an admin port that probes can't reach": (
        "sidecar",
        {"config": {"admin": {"listen": "127.0.0.1:8081"}}},
        "config.admin.listen: 127.0.0.1:8081 can't be reached",
    ),
    "a socket": ("gateway", {"config": {"proxy": {"listen": "unix:/run/p"}}}, "config.proxy.listen: unix:/run/p is a"),
    "too short an end": (
        "sidecar",
        {"terminationGracePeriodSeconds": 94},
        "terminationGracePeriodSeconds: 94 is less than the 95 seconds that a pod's end can take",
    ),
    "no time to end": ("gateway", {"terminationGracePeriodSeconds": 0}, "0 is less than the 65 seconds"),
    "too long a drain": (
        "gateway",
        {"config": {"proxy": {"drain_seconds": "1min"}}, "terminationGracePeriodSeconds": 94},
        "94 is less than the 95 seconds",
    ),
    "a spool larger than its volume": (
        "sidecar",
        {"config": {"spool": {"max_bytes": "10GiB"}}},
        "config.spool.max_bytes: 10GiB is more than nine tenths of spool.size (10Gi): the kubelet evicts the pod",
    ),
    "a spool without limit": (
        "gateway, persistent",
        {"config": {"spool": {"max_bytes": 0}}},
        "config.spool.max_bytes: no limit is more than nine tenths of spool.size (50Gi): the volume runs full",
    ),
    "a spool on the root file system": (
        "sidecar",
        {"config": {"spool": {"path": "/var/spool"}}},
        "config.spool.path: /var/spool is in no volume",
    ),
    "a dataset on the root file system": (
        "gateway, persistent",
        {"config": {"storage": {"url": "file:///data"}}},
        "config.storage.url: /data is in no volume",
    ),
    "a dataset that ends with its pod": (
        "sidecar",
        {"config": {"storage": {"url": None}}},
        "config.storage.url: the dataset would be on an emptyDir",
    ),
    "a secret in values": (
        "sidecar",
        {"extraEnv": [{"name": "AZURE_STORAGE_KEY", "value": "c2VjcmV0"}]},
        "extraEnv: AZURE_STORAGE_KEY is a secret",
    ),
    "a setting behind the chart's back": (
        "sidecar",
        {"extraEnv": [{"name": "PAYLOAD_LOGGER_PROXY_DRAIN_SECONDS", "value": "600"}]},
        "extraEnv: PAYLOAD_LOGGER_PROXY_DRAIN_SECONDS would change what the chart computes with",
    ),
    "a secret without a key": ("sidecar", {"credentials": {"secretName": "account"}}, "credentials.secretKey: name"),
    "an identity without an id": ("sidecar", {"workloadIdentity": {"clientId": ""}}, "workloadIdentity.clientId: name"),
    "two authorities": (
        "gateway",
        {"upstreamCa": {"configMapName": "a", "secretName": "b"}},
        "upstreamCa: set configMapName or secretName",
    ),
    "a scrape that is shut out": (
        "sidecar",
        {"serviceMonitor": {"enabled": True}, "networkPolicy": {"enabled": True}},
        "networkPolicy.adminFrom: name who may scrape",
    ),
    "two budgets": ("sidecar", {"podDisruptionBudget": {"minAvailable": 1}}, "podDisruptionBudget: set one of"),
    "an inverted range": (
        "sidecar",
        {"autoscaling": {"enabled": True, "minReplicas": 3, "maxReplicas": 2}},
        "autoscaling.maxReplicas: less than",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused_in_words(helm: Helm, case: str) -> None:
    base, values, words = BAD[case]
    with pytest.raises(RenderError) as refused:
        helm.render(merged(BASES[base], values))
    assert words in str(refused.value)
    assert "c2VjcmV0" not in str(refused.value)


def test_the_budget_may_be_nine_tenths_of_the_volume(helm: Helm) -> None:
    most = 9 * 1024**3
    assert helm.render(merged(SIDECAR, {"config": {"spool": {"max_bytes": most}}})).config["spool"]["max_bytes"] == most
    with pytest.raises(RenderError, match="nine tenths"):
        helm.render(merged(SIDECAR, {"config": {"spool": {"max_bytes": most + 1}}}))


def test_numbers_of_any_size_arrive_as_they_were_written(helm: Helm, loaded: Any) -> None:
    """Helm reads them as floating point, and would write 1e+10."""
    numbers = {"spool": {"max_bytes": 8_000_000_000, "roll_bytes": 1_000_000}, "proxy": {"max_connections": 10_000_000}}
    settings = loaded(helm.render(merged(SIDECAR, {"config": numbers})))
    assert settings.spool.max_bytes == 8_000_000_000
    assert (settings.spool.roll_bytes, settings.proxy.max_connections) == (1_000_000, 10_000_000)


# The real proxy, on what the chart rendered


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


async def _post(port: int, path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: h", "Connection: close", "Content-Type: application/json", *headers]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}"])
    return await exchange(port, head.encode() + b"\r\n\r\n" + body)


@pytest.mark.parametrize("base", ["custom-logging", "gateway"])
async def test_the_proxy_runs_on_what_the_chart_rendered(helm: Helm, base: str, model: str, tmp_path: Path) -> None:
    """Word for word, but for addresses and folders of this machine."""
    rendered = helm.render(EXAMPLES[base])
    (tmp_path / "config.yaml").write_text(rendered.config_text)
    traffic, admin, frames = _free_ports(3)
    custom = "custom_logging" in rendered.config
    environment = {
        "PROXY_LISTEN": f"127.0.0.1:{traffic}",
        "PROXY_UPSTREAM": model,
        "ADMIN_LISTEN": f"127.0.0.1:{admin}",
        "STORAGE_URL": str(tmp_path / "data"),
        "SPOOL_PATH": str(tmp_path / "spool"),
        **({"CUSTOM_LOGGING_LISTEN": f"127.0.0.1:{frames}"} if custom else {}),
        **({"CUSTOM_LOGGING_SDK_CONFIG_PATH": str(tmp_path / "sdk.json")} if custom else {}),
    }
    arguments = [str(tmp_path / "config.yaml") if one.startswith("/") else one for one in rendered.proxy["args"]]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "proxy",
        *arguments,
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("PAYLOAD_LOGGER_")},
            **{f"PAYLOAD_LOGGER_{key}": value for key, value in environment.items()},
        },
    )
    assert process.stderr is not None
    log = [json.loads(await process.stderr.readline())]
    try:
        while not log[-1]["message"].startswith("payload-logger ") and process.returncode is None:
            log.append(json.loads(await process.stderr.readline()))
        body = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'
        answer = await _post(traffic, "/score", body)
        assert answer.startswith(b"HTTP/1.1 200 ")
        if custom:
            sent = await _post(frames, "/modeldata/log", b'[{"a": 1}]', "ce-type: azureml.inference.model_inputs")
            assert sent.startswith(b"HTTP/1.1 200 ")
        probes = [
            rendered.proxy[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")
        ]
        for path in [*probes, "/metrics"]:
            probe = await exchange(admin, f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
            assert probe.startswith(b"HTTP/1.1 200 "), probe
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        rest = await asyncio.wait_for(process.stderr.read(), 30)
        status = await process.wait()
    log += [json.loads(line) for line in rest.splitlines()]
    assert status == 0, log
    events = 3 if custom else 2
    assert f"received {events} events = delivered {events} + discarded 0 + pending 0" in log[-1]["message"]
    assert {one["level"] for one in log} == {"info"}
    dataset = tmp_path / "data/my-endpoint/blue"
    (line,) = (json.loads(path.read_text()) for path in (dataset / "request").rglob("*.jsonl"))
    assert line["data"] == {"data": [[5.1, 3.5, 1.4, 0.2]]}
    if custom:
        (line,) = (json.loads(path.read_text()) for path in (dataset / "model_inputs").rglob("*.jsonl"))
        assert line["data"] == [{"a": 1}]
        sdk = json.loads((tmp_path / "sdk.json").read_text())
        assert sdk["collections"]["model_outputs"] == {"enabled": True, "sampleRatePercentage": 10}
