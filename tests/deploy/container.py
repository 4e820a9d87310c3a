"""Runs an image as a container engine would, and a model before which it stands: see ``run``.

``python -m tests.deploy.container`` reads one JSON object from its standard input, and answers with one. It is started in
mount and network namespaces of its own, so the ports of the image are free, and what it mounts ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from proxy import dummy_model

ROOT = Path(__file__).parents[2]
USER_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What came of it: ``log`` (lines), ``answers``, ``healthcheck``, ``status``, ``left`` (temporary files).

    task: ``layer`` and ``work`` (of the image), ``python`` (its environment), ``user`` (UID:GID), ``environment``,
    ``workdir``, ``command``, ``mounts`` (target in the container to a folder here; those in ``read_only`` can't be written),
    ``full`` (where a disk is mounted on which there is no room), ``port`` (of the model), ``requests`` (port, method, path,
    headers, body), ``healthcheck`` (a command) and ``signal``.
    """
    folder.mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "--net", sys.executable, "-m", "tests.deploy.container"],
        input=json.dumps({**task, "folder": str(folder)}),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0x1 | 0x40)  # IFF_UP, IFF_RUNNING
        fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS


def _mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


def _root(task: dict[str, Any]) -> Path:
    """The container's root file system, read-only but for its mounts."""
    folder = Path(task["folder"])
    image, root, scratch, work = (folder / name for name in ("image", "root", "scratch", "work"))
    for one in (image, root, scratch, work):
        one.mkdir()
    # Two overlays, as a layer can't be a lower one beside the file system that it is a part of.
    _mount("-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={task['layer']},workdir={task['work']}", image)
    _mount("-o", "remount,ro", image)
    _mount("-t", "overlay", "overlay", "-o", f"lowerdir={image},upperdir={scratch},workdir={work}", root)
    for target in task["mounts"]:
        (root / target[1:]).mkdir(parents=True, exist_ok=True)  # as an engine makes them
    _mount("-o", "remount,ro", root)
    _mount("--rbind", "/dev", root / "dev")
    _mount("-t", "tmpfs", "tmpfs", root / "dev/shm")
    _mount("-t", "tmpfs", "-o", "ro", "tmpfs", f"{root}{ROOT}")  # the project is not in an image
    if task["full"]:
        disk = root / task["full"][1:]
        _mount("-t", "tmpfs", "-o", "size=256k,mode=777", "tmpfs", disk)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
    for target, source in task["mounts"].items():
        _mount("--bind", source, root / target[1:])
        if target in task["read_only"]:
            _mount("-o", "remount,ro,bind", root / target[1:])
    return root


class _Container:
    """Process 1 of a PID namespace, as in a container, with no name for its user and no home."""

    def __init__(self, task: dict[str, Any], root: Path) -> None:
        self._task = task
        self._root = root
        self.process: asyncio.subprocess.Process | None = None

    def words(self, command: list[str]) -> list[str]:
        user = f"--userspec={self._task['user']}"
        inner = f'cd {self._task["workdir"]} && exec "$@"'
        return ["chroot", user, "--groups=", str(self._root), "/bin/sh", "-c", inner, "sh", *command]

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self._task['python']}/bin:{USER_PATH}", "HOME": "/", **self._task["environment"]}

    async def start(self) -> None:
        spaces = ["unshare", "--pid", "--fork", "--kill-child", f"--mount-proc={self._root}/proc"]
        self.process = await asyncio.create_subprocess_exec(
            *spaces, *self.words(self._task["command"]), stderr=asyncio.subprocess.PIPE, env=self._outer(), limit=2**20
        )

    def _outer(self) -> dict[str, str]:
        return {**self.environment, "PATH": f"{self.environment['PATH']}:{os.environ['PATH']}"}

    def send(self, number: int) -> None:
        assert self.process is not None
        (first,) = psutil.Process(self.process.pid).children()
        first.send_signal(number)

    async def execute(self, command: list[str]) -> int:
        process = await asyncio.create_subprocess_exec(*self.words(command), env=self._outer())
        return await process.wait()


def _ask(one: dict[str, Any]) -> list[Any]:
    connection = http.client.HTTPConnection("127.0.0.1", one["port"], timeout=10)
    with contextlib.closing(connection):
        connection.request(one["method"], one["path"], one.get("body"), one.get("headers", {}))
        answer = connection.getresponse()
        return [answer.status, answer.read().decode(errors="replace")]


async def _run(task: dict[str, Any]) -> dict[str, Any]:
    _loopback_up()
    root = _root(task)
    runner, _ = await dummy_model.start(port=task["port"])
    container = _Container(task, root)
    result: dict[str, Any] = {"answers": [], "healthcheck": None}
    try:
        await container.start()
        assert container.process is not None
        assert container.process.stderr is not None
        log: list[str] = []
        async with asyncio.timeout(60):
            while line := (await container.process.stderr.readline()).decode():
                log.append(line.rstrip())
                if "payload-logger " in line and ", before " in line:
                    for one in task["requests"]:
                        result["answers"].append(await asyncio.to_thread(_ask, one))
                    result["healthcheck"] = await container.execute(task["healthcheck"])
                    container.send(getattr(signal, task["signal"]))
        result["log"] = log
        result["status"] = await container.process.wait()
    finally:
        if container.process is not None and container.process.returncode is None:
            container.process.kill()
            await container.process.wait()
        await runner.cleanup()
    result["left"] = sorted(str(path.relative_to(root)) for path in (root / "dev/shm").rglob("*"))
    return result


if __name__ == "__main__":
    given = json.load(sys.stdin)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    assert shutil.which("chroot", path=os.environ["PATH"]), "chroot is not in PATH"
    print(json.dumps(asyncio.run(_run(given))))
