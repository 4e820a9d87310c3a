from __future__ import annotations

import asyncio
import datetime
import gc
import ipaddress
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from proxy import dummy_model


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """EVENT_LOOP=uvloop: what runs in the tests' own process is on the loop that the proxy takes by itself."""
    name = os.environ.get("EVENT_LOOP", "asyncio")
    return {name: {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[name]}


@pytest.fixture(scope="session")
def _pipe_of_libuv() -> None:
    """libuv opens a pipe with its first loop, and keeps it."""
    uvloop.new_event_loop().close()


@pytest.fixture(autouse=True)
def _nothing_leaks(_pipe_of_libuv: None) -> Iterator[None]:
    """No thread and no file descriptor outlives its test."""
    threads = set(threading.enumerate())
    descriptors = _descriptors()
    yield
    for thread in set(threading.enumerate()) - threads:
        if thread.name.startswith("asyncio-waitpid"):  # of a child that has ended: it does so a moment later
            thread.join(1)
    leaked = [thread.name for thread in set(threading.enumerate()) - threads if not thread.name.startswith("asyncio_")]
    assert not leaked, f"threads left running: {leaked}"
    more = _descriptors() - descriptors
    if more:  # those of garbage are none
        gc.collect()
        more = _descriptors() - descriptors
    assert not more, f"file descriptors left open: {more}"


def _descriptors() -> set[str]:
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue
        if not target.startswith(
            ("anon_inode", "/dev/", "/proc/", "/var/lib/libuuid/")
        ):  # libuuid keeps its clock open
            found.add(f"{descriptor.name}: {target}")
    return found


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """PEM files: a certificate for localhost and 127.0.0.1 that signed itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("certificate")
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@pytest.fixture
async def model() -> AsyncIterator[str]:
    """URL of the dummy model."""
    runner, url = await dummy_model.start()
    yield url
    await runner.cleanup()


@pytest.fixture
async def _tasks_end() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    leaked = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not leaked, f"tasks left running: {leaked}"
