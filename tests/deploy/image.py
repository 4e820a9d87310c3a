"""Follows the Dockerfile's own lines without an engine: each stage is an overlay over this machine's root file system.

What stands for the base image is this machine, with an environment of Python that has pip and nothing else in front of
its PATH. An overlay takes all that is written: the machine stays as it is. Needs root and Linux.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = "/opt/image-python"  # where the base image's Python is, to the stages
BUILD_SECONDS = 600


@dataclass
class Stage:
    """What the Dockerfile says of one stage, in order; what is for running the image is in ``settings``."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)


def stages(text: str) -> list[Stage]:
    """The stages of a Dockerfile. Raises ValueError for an instruction that is not known here."""
    arguments: dict[str, str] = {}
    found: list[Stage] = []
    lines = re.sub(r"(?m)^\s*#.*\n", "", text).replace("\\\n", "").splitlines()
    for word, rest in (line.split(maxsplit=1) for line in lines if line.strip()):
        if word == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif word == "FROM":
            base, _, name = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], rest).partition(" AS ")
            found.append(Stage(name or f"stage-{len(found)}", base))
        elif word == "ENV":
            found[-1].environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word in {"RUN", "COPY"}:
            found[-1].steps.append((word, rest))
        elif word in {"WORKDIR", "USER", "EXPOSE", "STOPSIGNAL", "VOLUME", "ENTRYPOINT", "CMD", "HEALTHCHECK", "LABEL"}:
            found[-1].settings[word] = rest
            found[-1].steps.append((word, rest))
        else:
            raise ValueError(word)
    return found


def build_context(folder: Path) -> list[Path]:
    """What an engine is given: the files below ``folder`` that .dockerignore leaves, relative to it."""
    rules = [line for line in (folder / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]

    def ignored(path: Path) -> bool:
        out = False
        for rule in rules:
            pattern = rule.removeprefix("!").removeprefix("**/")
            anywhere = rule.startswith("**/")
            parents = [path, *path.parents][:-1]
            if any(fnmatch.fnmatch(one.name if anywhere else str(one), pattern) for one in parents):
                out = not rule.startswith("!")
        return out

    tops = [one for one in folder.iterdir() if not ignored(one.relative_to(folder))]
    found = [path.relative_to(folder) for top in tops for path in (top, *top.rglob("*")) if path.is_file()]
    return [path for path in found if not ignored(path)]


class Image:
    """The final stage, built: ``layer`` has what it adds to this machine's root file system."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.stages = stages((ROOT / "Dockerfile").read_text())
        self.final = self.stages[-1]
        self.log = ""

    @property
    def layer(self) -> Path:
        return self._layer(self.final.name)

    @property
    def work(self) -> Path:
        """What an overlay with ``layer`` on top needs beside it."""
        return self._folder / f"work-{self.final.name}"

    @property
    def settings(self) -> dict[str, str]:
        return self.final.settings

    def command(self, instruction: str) -> list[str]:
        """ENTRYPOINT, CMD or HEALTHCHECK, as a list."""
        words: list[str] = json.loads(self.settings[instruction][self.settings[instruction].index("[") :])
        return words

    def build(self) -> None:
        """Raises CalledProcessError, with what it printed in ``log``."""
        context = self._folder / "context"
        for path in build_context(ROOT):
            (context / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, context / path)
        for stage in self.stages:
            layer = self._layer(stage.name)
            for part in ("work", "root"):
                (self._folder / f"{part}-{stage.name}").mkdir()
            layer.mkdir()
            self._run(stage, "\n".join(self._script(stage, context)))

    def _layer(self, stage: str) -> Path:
        return self._folder / f"layer-{stage}"

    def _script(self, stage: Stage, context: Path) -> list[str]:
        """For a shell in a mount namespace of its own."""
        root, layer, work = (self._folder / f"{part}-{stage.name}" for part in ("root", "layer", "work"))
        home = Path(sys.base_prefix).resolve()
        lines = [
            "set -eu",
            f"mount -t overlay overlay -o lowerdir=/,upperdir={layer},workdir={work} {root}",
            f"mount --rbind /dev {root}/dev; mount -t proc proc {root}/proc",
            # The base image's Python can be used by everybody; this machine's may be in somebody's home.
            *(f"chmod o+x {root}{folder}" for folder in [home, *home.parents][:-1]),
            f"chroot {root} {home}/bin/python3 -m venv {PYTHON}",
        ]
        folder = "/"
        for word, rest in stage.steps:
            if word == "WORKDIR":
                folder = rest
                lines.append(f"mkdir -p {root}{folder}")
            elif word == "COPY":
                *sources, target = rest.split()
                lines += [f"mkdir -p {root}{folder}", f"cd {root}{folder}"]
                for source in sources:
                    # A folder's content is what is copied of it, under the name that is given.
                    one = context / source
                    lines.append(
                        f"cp -r {one} {target}" if one.is_file() else f"mkdir -p {target}; cp -r {one}/. {target}"
                    )
            elif word == "RUN":
                lines += self._run_lines(root, folder, rest)
        return lines

    def _run_lines(self, root: Path, folder: str, rest: str) -> list[str]:
        lines = []
        while rest.startswith("--mount="):
            option, rest = rest.split(maxsplit=1)
            bound = dict(pair.split("=", 1) for pair in option.removeprefix("--mount=").split(","))
            assert bound["type"] == "bind", option
            source = f"{self._layer(bound['from'])}{bound['source']}"
            lines.append(f"mkdir -p {root}{bound['target']}; mount --bind -o ro {source} {root}{bound['target']}")
        if rest.startswith("apt-get"):
            packages = re.findall(r"--no-install-recommends (.*?) &&", re.sub(r"\s+", " ", rest))
            rest = f"dpkg -s {packages[0]} >/dev/null 2>&1 || {{ {rest}; }}"  # what is there already is not fetched
        command = shlex.quote(f"cd {folder} && {rest}")
        return [*lines, f"chroot {root} /bin/sh -ec {command}"]

    def _run(self, stage: Stage, script: str) -> None:
        """As an engine does it: the environment is what the Dockerfile says, and what pip needs on this machine."""
        environment = {
            "PATH": f"{PYTHON}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            **stage.environment,
        }
        if stage is not self.final:  # in the final stage it has to do without
            environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        self.log += done.stdout
        if done.returncode:
            raise RuntimeError(f"stage {stage.name} failed:\n{done.stdout[-4000:]}")
