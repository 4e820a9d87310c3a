"""Compiles the hot modules with mypyc: the same source, at about half the CPU per request. docs/decisions/0005-compiled.md.

A wheel holds compiled modules when it is built with PAYLOAD_LOGGER_COMPILE=1 (it needs a C compiler); else it is pure Python.
``python hatch_build.py FOLDER`` makes ``FOLDER`` a copy of the project with compiled modules, to test and measure.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
COMPILED = (
    "capture/body.py",
    "capture/event.py",
    "capture/policy.py",
    "capture/recorder.py",
    "ids.py",
    "ledger.py",
    "relay/connection.py",
    "relay/exchange.py",
    "relay/framing.py",
    "relay/headers.py",
    "relay/parsing.py",
    "relay/recording.py",
    "relay/request.py",
    "relay/response.py",
    "relay/server.py",
    "relay/traffic.py",
    "relay/tunnel.py",
    "relay/upstream.py",
    "spool/writer.py",
)


def compile_modules(folder: Path) -> list[Path]:
    """Compiles the modules below ``folder``, which holds a copy of the package; the extension modules, beside them."""
    from mypyc.build import mypycify
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    back = Path.cwd()
    os.chdir(folder)
    try:
        modules = [f"proxy/{name}" for name in COMPILED]
        extensions = mypycify(["--strict", *modules], opt_level="3", debug_level="0", group_name="payload_logger")
        for extension in extensions:
            # Warnings of another compiler's version are no reason to stop.
            extension.extra_compile_args.append("-Wno-error")
        command = build_ext(Distribution({"name": "payload-logger", "ext_modules": extensions}))
        command.inplace = True
        command.ensure_finalized()
        command.run()
        shutil.rmtree("build")
    finally:
        os.chdir(back)
    return sorted(folder.rglob("*.so"))


class CustomBuildHook(BuildHookInterface[Any]):
    """Hatchling's way in: adds the compiled modules to a wheel."""

    def _wanted(self) -> bool:
        return self.target_name == "wheel" and os.environ.get("PAYLOAD_LOGGER_COMPILE") == "1"

    def dependencies(self) -> list[str]:
        if not self._wanted():
            return []
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        return [*project["dependency-groups"]["compile"], *self.metadata.core.dependencies]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if not self._wanted() or version == "editable":
            return
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        shutil.copytree(ROOT / "proxy", folder / "proxy", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        build_data["force_include"].update(
            {str(path): str(path.relative_to(folder)) for path in compile_modules(folder)}
        )
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(
        ROOT, target, ignore=shutil.ignore_patterns(".*", "build", "dist", "results", "__pycache__", "*.so")
    )
    compile_modules(target)
