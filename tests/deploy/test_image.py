"""The image, built and run by the Dockerfile's own lines; no container engine was at hand.

What stands for the base image is this machine (see ``image.py``). Costs about 90 seconds, for one build of compiled wheels.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy import container
from tests.deploy.charts import EXAMPLES, Helm, Rendered, merged
from tests.deploy.image import PYTHON, ROOT, Image, build_context, stages

pytestmark = pytest.mark.timeout(600)  # the first one builds

SPOOL = "/var/lib/payload-logger"
USER = "10001:10001"
SCORE = {
    "port": 8080,
    "method": "POST",
    "path": "/score",
    "headers": {"Content-Type": "application/json"},
    "body": '{"data": [[5.1, 3.5, 1.4, 0.2]]}',
}


def _namespaces() -> bool:
    probe = ["unshare", "--mount", "--net", "--pid", "--fork", "true"]
    return os.geteuid() == 0 and subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    if "EXPECT_COMPILED" in os.environ:
        pytest.skip("the image has compiled modules of its own; a copy of the project is not what it is built of")
    if sys.platform != "linux" or not _namespaces():
        assert "CI" not in os.environ, "on CI it has to be possible: it needs root and namespaces"
        pytest.skip("needs root and namespaces of Linux")
    built = Image(tmp_path_factory.mktemp("image"))
    built.build()
    return built


def _task(image: Image, **changes: Any) -> dict[str, Any]:
    """As ``docker run --read-only -v …:/var/lib/payload-logger IMAGE`` runs it, in the network of the model."""
    return {
        "layer": str(image.layer),
        "work": str(image.work),
        "python": PYTHON,
        "user": image.settings["USER"],
        "workdir": image.settings["WORKDIR"],
        "environment": image.final.environment,
        "command": [*image.command("ENTRYPOINT"), *image.command("CMD")],
        "mounts": {},
        "read_only": [],
        "full": "",
        "port": 5001,
        "requests": [SCORE],
        "healthcheck": image.command("HEALTHCHECK"),
        "signal": image.settings["STOPSIGNAL"],
        **changes,
    }


def _volume(folder: Path, *, mode: int = 0o777) -> str:
    folder.mkdir()
    folder.chmod(mode)
    return str(folder)


def _lines(folder: Path, collection: str) -> list[dict[str, Any]]:
    found = folder.glob(f"*/*/{collection}/**/*.jsonl")
    return [json.loads(line) for path in found for line in path.read_text().splitlines()]


def test_the_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        assert "CI" not in os.environ, "hadolint is not installed"
        pytest.skip("hadolint is not installed: there is no wheel of it for this machine")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.skipif("EXPECT_COMPILED" in os.environ, reason="the copy of the project has no .dockerignore")
def test_the_build_is_given_what_it_needs_and_nothing_else() -> None:
    context = [str(path) for path in build_context(ROOT)]
    tops = {path.split("/")[0] for path in context}
    assert tops == {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "proxy"}
    assert not [path for path in context if path.endswith((".so", ".pyc"))]
    steps = [step for stage in stages((ROOT / "Dockerfile").read_text()) for step in stage.steps]
    assert {word for kind, rest in steps if kind == "COPY" for word in rest.split()[:-1]} == tops


def test_the_base_is_pinned() -> None:
    build, final = stages((ROOT / "Dockerfile").read_text())
    assert build.base == final.base
    assert final.base.split(":")[1].split("-")[0].count(".") == 2


def test_it_runs_without_rights_on_a_read_only_root(image: Image, tmp_path: Path) -> None:
    """The very CMD, as process 1; there is nothing that it may write but its volume."""
    spool = _volume(tmp_path / "spool")
    assert image.settings["USER"] == USER
    done = container.run(_task(image, mounts={SPOOL: spool}), tmp_path / "container")
    assert done["status"] == 0, "\n".join(done["log"])
    ((status, _),) = done["answers"]
    assert status == 200
    assert done["healthcheck"] == 0
    messages = [json.loads(line) for line in done["log"]]
    assert messages[-1]["message"].startswith("Stopped: received 2 events = delivered 2 + discarded 0 + pending 0")
    assert {one["level"] for one in messages} == {"info"}
    (line,) = _lines(tmp_path / "spool/data", "request")
    assert line["data"] == {"data": [[5.1, 3.5, 1.4, 0.2]]}
    assert done["left"] == []
    assert {path.name for path in Path(spool).iterdir()} == {"data"}
    assert {f"{path.stat().st_uid}:{path.stat().st_gid}" for path in Path(spool).rglob("*")} == {USER}


def test_the_health_check_fails_where_nothing_answers(image: Image, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text("logs: {format: json}\n")  # no admin port
    mounts = {SPOOL: _volume(tmp_path / "spool"), "/etc/payload-logger": str(tmp_path / "config")}
    done = container.run(_task(image, mounts=mounts, read_only=["/etc/payload-logger"]), tmp_path / "container")
    assert (done["status"], done["healthcheck"]) == (0, 1)


def test_it_says_so_when_its_volume_can_not_be_written(image: Image, tmp_path: Path) -> None:
    spool = _volume(tmp_path / "spool", mode=0o755)
    done = container.run(_task(image, mounts={SPOOL: spool}), tmp_path / "container")
    assert done["status"] == 1
    assert "storage.url: can't write to /var/lib/payload-logger/data: Permission denied" in done["log"][-1]


@pytest.mark.parametrize("workers", [1, 2])
def test_it_starts_and_serves_on_a_disk_that_is_full(image: Image, workers: int, tmp_path: Path) -> None:
    """As after a restart, when the budget was larger than the disk."""
    environment = {**image.final.environment, "PAYLOAD_LOGGER_PROXY_WORKERS": str(workers)}
    done = container.run(_task(image, full=SPOOL, environment=environment), tmp_path / "container")
    assert done["status"] == 0, "\n".join(done["log"])
    assert [status for status, _ in done["answers"]] == [200]
    assert any("discarded 2 (2 write_failed)" in line for line in done["log"]), "\n".join(done["log"])


def test_it_has_the_compiled_modules_and_no_more_than_it_needs(image: Image) -> None:
    (packages,) = (image.layer / PYTHON[1:]).glob("lib/python*/site-packages")
    assert list(packages.glob("proxy/relay/exchange.*.so"))
    assert list(packages.glob("proxy/__pycache__/cli.*.pyc")), "not compiled ahead: it can't be done at run time"
    names = {path.name.partition("-")[0].lower() for path in packages.glob("*.dist-info")}
    assert {"payload_logger", "aiohttp", "azure_storage_blob", "uvloop"} <= names
    assert not names & {"pip", "setuptools", "wheel", "hatchling", "mypy", "pytest"}
    assert not list((image.layer / "wheels").iterdir()), "the wheels are only mounted while they are installed"


def _pod(rendered: Rendered, folder: Path) -> tuple[dict[str, str], list[str]]:
    """The volumes of the proxy's container, as a kubelet makes them."""
    kinds = {one["name"]: one for one in rendered.pod["spec"]["volumes"]}
    targets, read_only = {}, []
    for mount in rendered.proxy["volumeMounts"]:
        target = mount["mountPath"]
        targets[target] = _volume(folder / mount["name"])
        if "configMap" in kinds[mount["name"]]:
            (folder / mount["name"] / "config.yaml").write_text(rendered.config_text)
        if mount.get("readOnly"):
            read_only.append(target)
    return targets, read_only


@pytest.mark.parametrize("workers", [1, 2])
def test_it_runs_as_the_chart_says(image: Image, helm: Helm, workers: int, tmp_path: Path) -> None:
    """With the chart's configuration word for word, its user, its mounts and its arguments, beside a model on its port."""
    values = {
        "config": {"storage": {"url": None}, "proxy": {"workers": workers}},
        "spool": {"acceptLoss": True},
        "credentials": {"secretName": ""},
    }
    rendered = helm.render(merged(EXAMPLES["custom-logging"], values))
    (tmp_path / "pod").mkdir()
    mounts, read_only = _pod(rendered, tmp_path / "pod")
    security = rendered.proxy["securityContext"]
    sdk = {one["name"]: one["value"] for one in rendered.containers["model"]["env"]}
    frame = {
        "port": int(sdk["AZUREML_MDC_PORT"]),
        "method": "POST",
        "path": "/modeldata/log",
        "headers": {"Content-Type": "application/json", "ce-type": "azureml.inference.model_inputs"},
        "body": '[{"a": 1}]',
    }
    probes = [
        {"port": 8081, "method": "GET", "path": rendered.proxy[name]["httpGet"]["path"]}
        for name in ("startupProbe", "readinessProbe", "livenessProbe")
    ]
    task = _task(
        image,
        user=f"{security['runAsUser']}:{security['runAsGroup']}",
        command=[*image.command("ENTRYPOINT"), *rendered.proxy["args"]],
        mounts=mounts,
        read_only=read_only,
        port=rendered.containers["model"]["ports"][0]["containerPort"],
        requests=[*probes, SCORE, frame],
    )
    done = container.run(task, tmp_path / "container")
    assert done["status"] == 0, "\n".join(done["log"])
    assert [status for status, _ in done["answers"]] == [200] * 5
    assert done["healthcheck"] == 0
    (request,) = _lines(tmp_path / "pod/spool/data", "request")
    assert request["data"] == {"data": [[5.1, 3.5, 1.4, 0.2]]}
    (inputs,) = _lines(tmp_path / "pod/spool/data", "model_inputs")
    assert inputs["data"] == [{"a": 1}]
    file = tmp_path / "pod/sdk-config/sdk.json"
    assert set(json.loads(file.read_text())["collections"]) >= {"model_inputs", "model_outputs"}
    assert file.stat().st_mode & 0o777 == 0o644  # for the model's user
    assert done["left"] == []
