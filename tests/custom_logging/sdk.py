"""The real ``azureml-ai-monitoring`` in a process of its own, as a scoring script has it. ``make test`` installs it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.drills.load import REPOSITORY, until
from tests.harness import Proxy, proxy

COLLECTIONS = {"model_inputs": {"enabled": True}, "model_outputs": {"enabled": True}}
_IMPORTS = """\
import time
import pandas as pd
from azureml.ai.monitoring import Collector
from azureml.ai.monitoring.context import BasicCorrelationContext
from azureml.ai.monitoring.init import teardown
from azureml.ai.monitoring.queue import get_queue
"""
_FLUSH = "\nteardown(wait_for_flush=True)\n"  # else what is in the queue is lost when the interpreter ends
_LISTENING = re.compile(r"payload-logger \S+ on (\S+),")
_STOPPED = re.compile(r"Stopped: received (\d+) events = delivered (\d+) \+ discarded (\d+).* \+ pending (\d+)")


@dataclass(frozen=True)
class Sdk:
    """An environment with the SDK. data_type: what its pandas calls a frame."""

    version: str
    data_type: str

    def program(self, name: str) -> Path:
        path = Path(sys.prefix, f"sdk-{self.version}", "bin", name)
        assert path.exists(), f"there is no {path}; run `make test`, which installs it"
        return path

    async def run(self, script: str, variables: Mapping[str, str], folder: Path) -> str:
        """Runs ``script`` until all that it collected is sent; what it printed."""
        async with self.script(script, variables, folder) as output:
            pass
        return output.read_text()

    @contextlib.asynccontextmanager
    async def script(self, script: str, variables: Mapping[str, str], folder: Path) -> AsyncIterator[Path]:
        """Runs ``script`` beside the block, and waits for its end then. The file holds what it prints."""
        path, output_path = folder / "script.py", folder / "script.log"
        path.write_text(_IMPORTS + script + _FLUSH)
        with output_path.open("wb") as output:
            process = subprocess.Popen(
                [self.program("python"), path],
                cwd=folder,
                env=environment(variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            yield output_path
            assert await asyncio.to_thread(process.wait, 100) == 0, output_path.read_text()
        finally:
            process.kill()
            await asyncio.to_thread(process.wait, 30)
        assert "Traceback" not in output_path.read_text(), output_path.read_text()  # the thread that sends has ended

    @contextlib.asynccontextmanager
    async def server(self, score_py: str, port: int, variables: Mapping[str, str], folder: Path) -> AsyncIterator[None]:
        """Azure ML's inference server with that scoring script, until the block ends."""
        folder.mkdir()
        (folder / "score.py").write_text(score_py)
        log_path = folder / "log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [self.program("azmlinfsrv"), "--entry_script", "score.py", "--port", str(port)],
                cwd=folder,
                env=environment(variables) | {"AZUREML_APP_ROOT": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            await until(lambda: "ready for serving traffic" in log_path.read_text() or process.poll() is not None, 60)
            assert process.poll() is None, log_path.read_text()
            yield
        finally:
            process.terminate()  # it ends its workers first
            try:
                await asyncio.to_thread(process.wait, 30)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


NEW = Sdk("1.0.0", "pandas.DataFrame")
OLD = Sdk("0.1.0b4", "pandas.core.frame.DataFrame")


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """``variables``, and those of this process that are not about Python, proxies or us."""
    unwanted = ("AZURE", "PAYLOAD_LOGGER_", "PYTHON", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")} | dict(variables)


@contextlib.asynccontextmanager
async def recording(
    folder: Path, collections: Mapping[str, object] = COLLECTIONS, **overrides: object
) -> AsyncIterator[Proxy]:
    """The proxy, with collections of custom logging alone; there is no model behind it."""
    collector = {"collections": dict(collections)}
    async with proxy("http://127.0.0.1:9", folder / "data", data_collector=collector, **overrides) as p:
        yield p


def address(p: Proxy) -> dict[str, str]:
    """Where frames go."""
    assert p.app.custom_logging_address is not None
    host, _, port = p.app.custom_logging_address.rpartition(":")
    return {"AZUREML_MDC_HOST": host, "AZUREML_MDC_PORT": port}


def enabled(p: Proxy) -> dict[str, str]:
    """The environment of a scoring script that logs each frame, to whatever collection."""
    return address(p) | {"AZUREML_MDC_ENABLED": "true"}


def data(line: bytes) -> str:
    """The field ``data`` as it stands in the line."""
    return line.partition(b',"data":')[2].rpartition(b',"contentrange":')[0].decode()


@dataclass
class Running:
    """A ``payload-logger run -c FILE``."""

    url: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=30)

    async def stop(self) -> tuple[int, ...]:
        """SIGTERM: received, delivered, discarded, pending."""
        self.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(self.process.wait, 30) == 0
        found = _STOPPED.search(self.log_path.read_text())
        assert found, self.log_path.read_text()
        return tuple(map(int, found.groups()))


@contextlib.asynccontextmanager
async def running(
    configuration: Path,
    log_name: str = "proxy",
    variables: Mapping[str, str] | None = None,
    *,
    broken: str | None = None,
) -> AsyncIterator[Running]:
    """The proxy as a process, until the block ends. broken: faults of ``tests.drills.broken`` to run it with."""
    log_path = configuration.with_name(f"{log_name}.log")
    module = ["proxy"] if broken is None else ["tests.drills.broken", broken]
    command = [sys.executable, "-m", *module, "run", "-c", str(configuration)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=_ours(variables), stderr=log)
    try:
        await until(lambda: _LISTENING.search(log_path.read_text()) or process.poll() is not None, 60)
        found = _LISTENING.search(log_path.read_text())
        assert found, log_path.read_text()
        yield Running(f"http://{found[1]}", process, log_path)
    finally:
        process.kill()
        await asyncio.to_thread(process.wait, 30)


async def sdk_env(configuration: Path) -> dict[str, str]:
    """What ``payload-logger sdk-env`` prints."""
    command = [sys.executable, "-m", "proxy", "sdk-env", "-c", str(configuration)]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=REPOSITORY, env=_ours(None), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def _ours(variables: Mapping[str, str] | None) -> dict[str, str]:
    unwanted = ("AZURE_", "PAYLOAD_LOGGER_")
    return {name: value for name, value in os.environ.items() if not name.startswith(unwanted)} | dict(variables or {})


def write_configuration(folder: Path, settings: Mapping[str, Any]) -> Path:
    path = folder / "payload-logger.yaml"
    path.write_text(json.dumps(settings))  # YAML, too
    return path
