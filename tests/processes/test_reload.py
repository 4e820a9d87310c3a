"""SIGHUP: what can change does, at once and under load; what can't is refused in words."""

from __future__ import annotations

import asyncio
import datetime
import signal
import ssl
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from proxy.config import load
from proxy.reload import CHANGEABLE, reloaded
from proxy.settings import Settings
from tests.drills.load import Dataset, ProxyProcess, Traffic, proxy_process, until
from tests.processes.admin import admin_port, status_of

ADMIN = {"admin__listen": "127.0.0.1:0"}
BOTH = {"request": {"enabled": True}, "response": {"enabled": True}}


def settings(**overrides: Any) -> Settings:
    return load(overrides={key.replace("__", "."): value for key, value in overrides.items()}, environ={}).settings


def collections(**one: Any) -> Settings:
    return settings(data_collector={"collections": BOTH | one})


# --- which settings ---

CHANGES: list[tuple[Settings, Settings, tuple[str, ...], tuple[str, ...]]] = [
    (settings(), settings(), (), ()),
    (
        settings(capture__exclude="GET /a"),
        settings(data_collector__sampling_rate=0.5, capture__exclude="/x", logs__level="debug"),
        (
            "data_collector.sampling_rate: 1.0 → 0.5",
            'capture.exclude: ["GET /a"] → ["/x"]',
            'logs.level: "info" → "debug"',
        ),
        (),
    ),
    (
        settings(),
        settings(proxy__workers=2, storage__url="/elsewhere", admin={}),
        (),
        (
            "proxy.workers: 1 stays until a restart",
            'storage.url: "file:///var/lib/payload-logger/data" stays until a restart',
            "admin: null stays until a restart",
        ),
    ),
    (
        settings(),
        collections(response={"enabled": False}),
        ("data_collector.collections.response.enabled: true → false",),
        (),
    ),
    (
        collections(response={"enabled": False}),
        settings(data_collector={"collections": {"request": {"enabled": True, "sampling_rate": 0.1}}}),
        ("data_collector.collections.request.sampling_rate: null → 0.1",),
        (),
    ),
    (
        collections(response={"enabled": False, "data": {"path": "file:///a"}}),
        collections(response={"enabled": True, "data": {"path": "file:///b"}}),
        ("data_collector.collections.response.enabled: false → true",),
        (),
    ),
    (
        collections(response={"enabled": True, "data": {"path": "file:///a"}}),
        collections(response={"enabled": True, "data": {"path": "file:///b"}, "client_id": "c"}),
        (),
        (
            "data_collector.collections.response.data: it stays as it is until a restart",
            "data_collector.collections.response.client_id: it stays as it is until a restart",
        ),
    ),
    (
        settings(),
        collections(model_inputs={"enabled": True}),
        (),
        ("data_collector.collections.model_inputs.enabled: there is no listener for the SDK until a restart",),
    ),
    (
        collections(model_inputs={"enabled": True}),
        collections(model_inputs={"enabled": False}, model_outputs={"enabled": True}),
        (
            "data_collector.collections.model_inputs.enabled: true → false",
            "data_collector.collections.model_outputs.enabled: false → true",
        ),
        (),
    ),
]


@pytest.mark.parametrize(("old", "new", "changed", "refused"), CHANGES, ids=range(len(CHANGES)))
def test_what_changes_and_what_stays(
    old: Settings, new: Settings, changed: tuple[str, ...], refused: tuple[str, ...]
) -> None:
    found = reloaded(old, new)
    assert (found.changed, found.refused) == (changed, refused)
    again = reloaded(found.settings, new)
    assert (again.changed, again.refused) == ((), refused)  # what could change has
    if not refused:
        rest = reloaded(new, found.settings)
        assert (rest.changed, rest.refused) == ((), ())
    if not changed:
        assert found.settings == old


def test_a_place_that_stays_is_the_old_one() -> None:
    old = collections(response={"enabled": True, "data": {"path": "file:///a"}})
    new = collections(response={"enabled": True, "data": {"path": "file:///b"}, "sampling_rate": 0.5})
    found = reloaded(old, new)
    response = found.settings.data_collector.collections["response"]
    assert response.data is not None
    assert (response.data.path, response.sampling_rate) == ("file:///a", 0.5)


def test_a_part_that_does_not_go_with_what_stays_is_refused_with_it() -> None:
    old = settings(storage__url="https://a.blob.core.windows.net/c")
    new = settings(storage__url="/local", capture__max_inline_bytes="64MiB")
    found = reloaded(old, new)
    assert found.settings == old
    assert found.changed == ()
    assert found.refused[-1].startswith("67108864 is too large for lines that are shipped")


def test_each_key_that_can_change_exists() -> None:
    for key in CHANGEABLE:
        value: Any = settings()
        for name in key.split("."):
            value = getattr(value, name)


# --- in a running proxy ---


def write(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump(sections))
    return path


async def reload(running: ProxyProcess, times: int = 1) -> None:
    """Sends SIGHUP, and waits until that many reloads are counted."""
    running.signal(signal.SIGHUP)
    port = admin_port(running)
    async with asyncio.timeout(10):
        while sum((await status_of(port))["reloads"].values()) < times:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 2])
async def test_under_load_no_exchange_fails_and_the_new_settings_hold(model: str, tmp_path: Path, workers: int) -> None:
    config = write(tmp_path / "c.yaml", data_collector={"collections": BOTH})
    traffic, storage = Traffic(), tmp_path / "data"
    async with proxy_process(model, storage, config=config, proxy__workers=workers, **ADMIN) as running:
        busy = asyncio.gather(*(traffic.send(running.port, f"c{n}", 300) for n in range(8)))
        await until(lambda: len(traffic.seen) > 300)
        write(config, data_collector={"collections": {"request": {"enabled": True}}})
        await reload(running)
        assert not busy.done()
        await busy
        await traffic.send(running.port, "after", 20)
        assert "enabled: true → false" in running.log()
        running.signal(signal.SIGTERM)
        assert await running.exit_status() == 0
    dataset = Dataset.read(storage)
    assert set(dataset.ids["request"]) == traffic.seen
    assert dataset.doubled() == set()
    responses = set(dataset.ids["response"])
    assert 300 <= len(responses) < len(traffic.seen)
    assert not any(name.startswith("after") for name in responses)


async def test_a_collection_that_was_off_is_recorded_from_then_on(model: str, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", data_collector={"collections": {"request": {"enabled": True}}})
    traffic, storage = Traffic(), tmp_path / "data"
    async with proxy_process(model, storage, config=config, **ADMIN) as running:
        await traffic.send(running.port, "a", 3)
        write(config, data_collector={"sampling_rate": 1, "collections": BOTH})
        await reload(running)
        await traffic.send(running.port, "b", 3)
    dataset = Dataset.read(storage)
    assert len(dataset.ids["request"]) == 6
    assert set(dataset.ids["response"]) == {"b.0", "b.1", "b.2"}


async def test_mistakes_are_told_and_nothing_changes(model: str, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", data_collector={"collections": BOTH})
    traffic, storage = Traffic(), tmp_path / "data"
    async with proxy_process(model, storage, config=config, **ADMIN) as running:
        write(config, data_collector={"sampling_rate": 2, "collections": BOTH})
        await reload(running)
        write(config, proxy={"workers": 3}, data_collector={"collections": BOTH})
        await reload(running, 2)
        config.unlink()
        await reload(running, 3)
        write(config, proxy={"workers": 3}, data_collector={"sampling_rate": 0, "collections": BOTH})
        await reload(running, 4)
        await traffic.send(running.port, "a", 3)
        log = running.log()
        assert (await status_of(admin_port(running)))["reloads"] == {"refused": 3, "partly": 1}
    assert "Not reloaded: " in log
    assert "data_collector.sampling_rate: 2" in log
    assert "Not reloaded: proxy.workers: 1 stays until a restart." in log
    assert f"Not reloaded: {config}" in log
    assert "Reloaded: data_collector.sampling_rate: 1.0 → 0.0." in log
    assert "Traceback" not in log
    assert Dataset.read(storage).lines == 0


async def test_a_renewed_certificate_is_taken(model: str, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    """Rotation puts another file in its place; new connections see it."""
    files = [tmp_path / "tls.pem", tmp_path / "key.pem"]
    for file, source in zip(files, certificate, strict=True):
        file.write_bytes(source.read_bytes())
    tls = {"proxy__tls_certificate": files[0], "proxy__tls_key": files[1]}
    async with proxy_process(model, tmp_path / "data", **tls, **ADMIN) as running:

        def seen() -> str:
            return ssl.get_server_certificate(("127.0.0.1", running.port))

        before = await asyncio.to_thread(seen)
        files[0].write_text("no certificate")
        await reload(running)
        assert "proxy.tls_certificate, proxy.tls_key: not a PEM certificate and its key" in running.log()
        assert await asyncio.to_thread(seen) == before
        other = another_certificate()
        for file, content in zip(files, other, strict=True):
            file.write_bytes(content)
        await reload(running, 2)
        assert await asyncio.to_thread(seen) == other[0].decode()


def another_certificate() -> tuple[bytes, bytes]:
    """PEM of a certificate that signed itself, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "renewed")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    return (
        builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
