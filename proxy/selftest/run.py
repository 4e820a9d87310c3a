"""The self-test from beginning to end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import ssl
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from proxy.app import App, StartError, running
from proxy.relay.upstream import UpstreamAddress, upstream_tls
from proxy.selftest.comparison import compare, show
from proxy.selftest.mirror import Mirror
from proxy.selftest.plan import Plan
from proxy.selftest.report import Found, Report
from proxy.selftest.traps import look_for_traps, time
from proxy.selftest.wire import Link, LostError, Side
from proxy.settings import (
    GIB,
    PAYLOAD_COLLECTIONS,
    Collection,
    DataCollector,
    Settings,
    Spool,
    Storage,
)

RECORDED_SECONDS = 5.0
INTERRUPTED = 130


class UnusableError(Exception):
    """The server can't be tested; the message says why."""


async def selftest(settings: Settings, plan: Plan, write: Callable[[str], object]) -> int:
    """Runs it; the exit status. SIGINT and SIGTERM end it in an orderly way, too: no recorded body is left behind."""
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(_run(settings, plan, Report(write)), name="selftest")
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        return 0 if await task else 1
    except (UnusableError, StartError) as error:
        print(f"payload-logger: {error}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        print("payload-logger: stopped before the end; what was recorded is removed", file=sys.stderr)
        return INTERRUPTED
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _run(settings: Settings, plan: Plan, report: Report) -> bool:
    """Whether nothing differs but what docs/transparency.md lists. Raises UnusableError and StartError."""
    proxy = settings.proxy
    address = UpstreamAddress.parse(proxy.upstream)
    host = plan.host or address.host_header
    try:
        tls = upstream_tls(proxy.upstream_ca, verify=proxy.upstream_verify) if address.tls else None
    except (OSError, ssl.SSLError) as error:
        raise UnusableError(f"proxy.upstream_ca: {proxy.upstream_ca} can't be used: {error}") from None
    direct = Side(address, host=host, tls=tls, timeout_seconds=plan.timeout_seconds)
    await _introduce(plan, report, direct, proxy.upstream)
    with tempfile.TemporaryDirectory(prefix="payload-logger-selftest-") as folder:
        async with running(_own(settings, proxy.upstream, Path(folder, "server"))) as app:
            through = _before(app, host, plan)
            first = await compare(plan, report, direct, through)
            await _show(settings, plan, report, host, Path(folder, "mirror"))
            await time(plan, report, direct, through)
            await look_for_traps(plan, report, direct, through, proxy, first)
            await _account(report, app)
    sent = (direct.sent + through.sent).items()
    report.heading(f"The server got {', '.join(f'{count} × {what}' for what, count in sent)}.")
    if report.good:
        report.end("Nothing differs but what docs/transparency.md lists.")
    else:
        report.end("The lines that begin with 'differs' are not in the list of docs/transparency.md.")
    return report.good


async def _introduce(plan: Plan, report: Report, direct: Side, upstream: str) -> None:
    """Says what will be sent, once one request was answered."""
    try:
        async with Link(direct) as link:
            status = (await link.ask(plan.plainest)).status
    except LostError as lost:
        raise UnusableError(f"{upstream} can't be tested: {lost}") from None
    body = plan.request.body
    requests = ", ".join(dict.fromkeys(str(way.request) for way in plan.ways()))
    report.plain("server", upstream)
    report.plain("request", f"{requests}, {'without a body' if body is None else f'{len(body):,} bytes'}")
    report.plain(
        "", f"up to {plan.most} times in all, in ways that mean the same (a few more where something differs)."
    )
    report.plain("", "What the proxy records goes to a temporary folder, which is removed at the end.")
    if status >= 400:
        words = f"the server answers {status}; name a request that it serves (--path, --body, --header)"
        report.line(Found.NOTE, "status", words)


async def _show(settings: Settings, plan: Plan, report: Report, host: bytes, folder: Path) -> None:
    base_path = UpstreamAddress.parse(settings.proxy.upstream).base_path.decode()
    async with (
        Mirror().serving() as mirror,
        running(_own(settings, f"http://127.0.0.1:{mirror.port}{base_path}", folder)) as app,
    ):
        await show(plan, report, mirror, _before(app, host, plan), app.settings.proxy, host)


def _own(settings: Settings, upstream: str, folder: Path) -> Settings:
    """The user's settings, but for where the proxy listens, and that it records everything in ``folder``."""
    collections = {name: Collection(enabled=True) for name in PAYLOAD_COLLECTIONS}
    return replace(
        settings,
        data_collector=DataCollector(collections=collections),
        proxy=replace(settings.proxy, listen="127.0.0.1:0", upstream=upstream, tls_certificate=None, tls_key=None),
        capture=replace(settings.capture, include=("*",), exclude=()),
        storage=Storage(url=folder.as_uri()),
        spool=Spool(max_bytes=GIB),
        custom_logging=None,
        azureml=None,
    )


def _before(app: App, host: bytes, plan: Plan) -> Side:
    address = UpstreamAddress.parse(f"http://{app.address}")
    return Side(address, host=host, tls=None, timeout_seconds=plan.timeout_seconds)


async def _account(report: Report, app: App) -> None:
    """Whether all that went through the proxy was recorded."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(RECORDED_SECONDS):
            while app.ledger.account().pending:
                await asyncio.sleep(0.02)
    account = app.ledger.account()
    if app.relay.defects:
        report.line(Found.DIFFERS, "recording", f"{app.relay.defects} defects of payload-logger; {account}")
    else:
        report.line(Found.NOTE if account.discarded or account.pending else Found.OK, "recording", str(account))
