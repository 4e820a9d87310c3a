"""The admin port of a running proxy."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics

from proxy.admin.metrics import COMMON, METRICS, Kind, exposition, reference_markdown
from tests.drills.load import PatientModel, Traffic, one_each, proxy_process, until
from tests.harness import model_server
from tests.processes.admin import admin_port, check_identity, get, scrape, status_of, total, until_scraped

ADMIN = {"admin__listen": "127.0.0.1:0"}
DOCS = Path(__file__).parents[2] / "docs"


async def test_probes_metrics_and_status(model: str, tmp_path: Path) -> None:
    traffic = Traffic()
    async with proxy_process(model, tmp_path / "data", **ADMIN) as running:
        port = admin_port(running)
        assert await get(port, "/healthz") == (200, "ok\n")
        assert await get(port, "/readyz") == (200, "ready\n")
        assert await get(port, "/readyz", method="HEAD") == (200, "")
        await traffic.send(running.port, "a", 20)
        samples = await until_scraped(port, lambda found: total(found, "events_delivered_total") == 40)
        assert total(samples, "events_received_total") == 40
        assert total(samples, "upstream_responses_total", code="2xx") == 20
        assert total(samples, "upstream_duration_seconds_count") == 20
        assert total(samples, "added_duration_seconds_count") == 20
        assert 0 < total(samples, "added_duration_seconds_sum") < 20
        assert total(samples, "workers") == total(samples, "ready") == 1
        assert total(samples, "spool_bytes") > 0
        assert total(samples, "spool_limit_bytes") == 10 * 1024**3
        assert {labels["worker"] for labels, _ in samples["process_resident_memory_bytes"]} == {"0"}
        status = await status_of(port)
        assert (status["ready"], status["workers"]) == (True, 1)
        assert status["events"] == {
            "received": 40,
            "delivered": 40,
            "discarded": {},
            "pending": 0,
            "spooled": 0,
            "adopted": 0,
        }


async def test_what_is_not_there(model: str, tmp_path: Path) -> None:
    async with proxy_process(model, tmp_path / "data", **ADMIN) as running:
        port = admin_port(running)
        assert await get(port, "/") == (404, "there are /healthz, /readyz, /metrics, /status\n")
        assert await get(port, "/metrics", "Content-Length: 0", method="POST") == (405, "use GET\n")
        assert "Traceback" not in running.log()


async def test_without_the_section_there_is_none(model: str, tmp_path: Path) -> None:
    async with proxy_process(model, tmp_path / "data") as running:
        assert "Probes and metrics" not in running.log()


async def test_an_address_that_is_taken(model: str, tmp_path: Path) -> None:
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    try:
        with pytest.raises(AssertionError, match="did not start"):
            async with proxy_process(model, tmp_path / "data", admin__listen=f"127.0.0.1:{port}"):
                pass
    finally:
        taken.close()
    log = (tmp_path / "proxy.log").read_text()
    words = f"admin.listen: can't listen on 127.0.0.1:{port}: the address is in use by another process"
    assert words in log
    assert "Traceback" not in log


@pytest.mark.promise("E18a")
@pytest.mark.parametrize("workers", [1, 2])
async def test_on_sigterm_readiness_says_no_while_what_is_in_flight_is_finished(tmp_path: Path, workers: int) -> None:
    patient, traffic = PatientModel(), Traffic()
    async with (
        model_server(patient.handle) as server,
        proxy_process(
            server.url, tmp_path / "data", proxy__workers=workers, proxy__drain_seconds=60, **ADMIN
        ) as running,
    ):
        port = admin_port(running)
        clients = one_each(traffic, running.port, 20)
        await until(lambda: patient.waiting == 20)
        assert total(await scrape(port), "exchanges_in_flight") == 20
        running.signal(signal.SIGTERM)
        await until(lambda: "Stopping" in running.log())
        assert await get(port, "/readyz") == (503, "stopping\n")
        assert await get(port, "/healthz") == (200, "ok\n")
        assert (await status_of(port))["not_ready"] == "stopping"
        samples = await until_scraped(port, lambda found: total(found, "ready") == 0)
        assert total(samples, "workers") == 0
        assert total(samples, "exchanges_in_flight") == 20
        patient.answer.set()
        await clients
        assert await running.exit_status() == 0
    assert len(traffic.seen) == 20


async def test_the_identity_holds_at_every_scrape_while_it_is_busy(model: str, tmp_path: Path) -> None:
    traffic = Traffic()
    async with proxy_process(model, tmp_path / "data", **ADMIN) as running:
        port = admin_port(running)
        busy = asyncio.gather(*(traffic.send(running.port, f"c{n}", 150) for n in range(8)))
        scrapes = [await scrape(port)]
        while not busy.done():
            scrapes.append(await scrape(port))
        await busy
        scrapes.append(await until_scraped(port, lambda found: total(found, "events_delivered_total") == 2400))
    for samples in scrapes:
        check_identity(samples)
    counts = [total(samples, "events_received_total") for samples in scrapes]
    assert counts == sorted(counts)
    assert len(set(counts)) > 3  # it was busy


async def test_what_is_answered_by_the_proxy_itself_is_counted_by_reason(tmp_path: Path) -> None:
    traffic = Traffic()
    async with proxy_process("http://127.0.0.1:9", tmp_path / "data", **ADMIN) as running:
        await traffic.client(running.port, "a", iter([("/score", b"[1]")]))
        samples = await scrape(port := admin_port(running))
        assert samples["payload_logger_own_answers_total"] == [({"worker": "0", "reason": "upstream_unreachable"}, 1.0)]
        status = await status_of(port)
        assert status["upstream"]["trouble"].startswith("no connection to the model server")


def snapshot_of(value: int) -> dict[str, object]:
    """Each metric with a value."""
    found: dict[str, object] = {}
    for metric in METRICS:
        if metric.kind is Kind.HISTOGRAM:
            found[metric.name] = {"counts": [value] * (len(metric.bounds) + 1), "seconds": 1.5}
        else:
            found[metric.name] = {'od"d\n': value} if metric.label else value
    return found


def test_names_follow_the_conventions() -> None:
    assert len({metric.full_name for metric in (*METRICS, *COMMON)}) == len(METRICS) + len(COMMON)
    for metric in (*METRICS, *COMMON):
        name = metric.full_name
        assert re.fullmatch(r"(payload_logger|process)_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind is Kind.COUNTER)
        if metric.kind is Kind.HISTOGRAM:
            assert name.endswith("_seconds")
            assert list(metric.bounds) == sorted(set(metric.bounds))
        for wrong in ("_ms", "milliseconds", "_mb", "_count", "_sum", "_bucket"):
            assert not name.endswith(wrong)
        assert metric.words.rstrip().endswith(".")


def test_both_formats_are_those_of_prometheus() -> None:
    workers = [("0", snapshot_of(1)), ("1", snapshot_of(2))]
    build = {"version": "1", "python": "3", "compiled": "no"}
    body, content_type = exposition(workers, {"workers": 2}, build, "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    families = {family.name: family for family in open_metrics(body.decode())}
    assert families["payload_logger_build"].samples[0].labels == build
    for metric in METRICS:
        family = families[metric.full_name.removesuffix("_total")]
        assert family.documentation == metric.words
        assert {sample.labels["worker"] for sample in family.samples} == {"0", "1"}
        if metric.kind is Kind.HISTOGRAM:
            counts = [one.value for one in family.samples if one.name.endswith("_count")]
            assert counts == [len(metric.bounds) + 1, 2 * (len(metric.bounds) + 1)]
    body, content_type = exposition(workers, {"workers": 2}, build, "*/*")
    assert content_type.startswith("text/plain")
    assert b'payload_logger_events_discarded_total{reason="spool_full",worker="1"} 0.0\n' in body


def test_the_reference_is_the_one_in_the_docs() -> None:
    assert (DOCS / "metrics.md").read_text() == reference_markdown(), "run make docs"


def test_the_reference_names_each_metric() -> None:
    text = reference_markdown()
    assert all(f"`{metric.full_name}`" in text for metric in (*METRICS, *COMMON))


async def test_status_is_json_for_scripts(model: str, tmp_path: Path) -> None:
    async with proxy_process(model, tmp_path / "data", **ADMIN) as running:
        _, body = await get(admin_port(running), "/status")
        assert set(json.loads(body)) >= {"build", "ready", "workers", "events", "spool", "destinations", "upstream"}
