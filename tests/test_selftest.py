"""``selftest``: nothing to object to before servers of many kinds; every deliberately broken proxy is found."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.app import App, running
from proxy.cli import main
from proxy.config import load
from proxy.selftest import mirror, run
from proxy.selftest.plan import Named, Plan, Way, plan
from proxy.selftest.run import selftest
from proxy.settings import Settings
from tests.harness import model_server

ROOT = Path(__file__).parent.parent
LISTED = "Nothing differs but what docs/transparency.md lists."
BODY = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'


def planned(path: str = "/score", *, body: bytes | None = None, **more: Any) -> Plan:
    given = {"method": None, "headers": (), "content_type": None, "count": 2, "timeout_seconds": 20.0, "quick": True}
    return plan(path=path, body=body, **{**given, **more})


async def examined(upstream: str, wanted: Plan, **settings: Any) -> tuple[int, str]:
    """Exit status and report. What was recorded is gone then."""
    overrides = {"proxy.upstream": upstream, **{key.replace("__", "."): value for key, value in settings.items()}}
    lines: list[str] = []
    status = await selftest(load(overrides=overrides, environ={}).settings, wanted, lines.append)
    assert not list(Path(tempfile.gettempdir()).iterdir())
    return status, "\n".join(lines) + "\n"


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))


class Server:
    """A model server that speaks HTTP as it should, but for what a subclass has in mind. ``asked``: requests by method."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await self.head(reader)
            if b"Expect: " in head:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await self.body(reader, head)
            self.asked[head.partition(b" ")[0].decode()] += 1
            answer = self.answer(head, body)
            if head.startswith(b"HEAD "):
                answer = answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
            await self.send(writer, answer)
            if b"HTTP/1.0\r\n" in head or b"Connection: close" in head + answer:
                return

    async def head(self, reader: asyncio.StreamReader) -> bytes:
        return await reader.readuntil(b"\r\n\r\n")

    async def body(self, reader: asyncio.StreamReader, head: bytes) -> bytes:
        if b"Transfer-Encoding: chunked" in head:
            body = b""
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
            return body
        length = re.search(rb"Content-Length: (\d+)", head)
        return await reader.readexactly(int(length[1])) if length else b""

    def answer(self, head: bytes, body: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nX-One: 1\r\nX-Two: 2\r\nContent-Length: 4\r\n\r\npong"

    async def send(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
        writer.write(answer)
        await writer.drain()


# --- nothing differs ---


@pytest.mark.parametrize(("path", "body"), [("/score", BODY), ("/", None), ("/stream", None), ("/echo", b"")])
async def test_nothing_differs_before_the_dummy_model(model: str, path: str, body: bytes | None) -> None:
    status, report = await examined(model, planned(path, body=body))
    assert (status, re.findall("^differs .*", report, re.MULTILINE)) == (0, [])
    assert LISTED in report
    assert "+ x-request-id: " in report
    assert "+ X-Forwarded-For: 127.0.0.1" in report
    assert re.search(r"ok +streams both ways +5 of 5 pieces", report)
    assert re.search(r"ok +recording +received (\d+) events = delivered \1 \+ discarded 0 \+ pending 0", report)
    assert bool(re.search(r"^note +status +the server answers 404", report, re.MULTILINE)) == (path == "/")


@pytest.mark.parametrize(
    ("more", "methods"),
    [({}, {"GET", "HEAD", "OPTIONS"}), ({"body": BODY}, {"POST"}), ({"method": "DELETE"}, {"DELETE"})],
)
async def test_nothing_is_sent_but_what_is_said(more: dict[str, Any], methods: set[str]) -> None:
    server = Server()
    wanted = planned(**more, count=20, quick=False)
    async with model_server(server) as model:
        status, report = await examined(model.url, wanted, proxy__upstream_keepalive="100ms")
    assert status == 0
    assert set(server.asked) == methods
    assert f" up to {server.asked.total()} times in all" in report
    sent = re.search(r"The server got (.*)\.\n", report)
    assert sent is not None
    assert dict.fromkeys(sent[1].split(", ")) == dict.fromkeys(
        f"{count} × {method} /score" for method, count in server.asked.items()
    )


async def test_the_settings_are_those_that_are_given() -> None:
    """Without forwarded headers, with a Host of the server's and a path before the request's."""
    seen: list[bytes] = []

    class Seeing(Server):
        def answer(self, head: bytes, body: bytes) -> bytes:
            seen.append(head)
            return super().answer(head, body)

    async with model_server(Seeing()) as model:
        status, report = await examined(
            f"{model.url}/base", planned(headers=["Host: named"]), proxy__forwarded_headers="off", proxy__host_header="upstream"
        )  # fmt: skip
        hosts = Counter(re.findall(rb"Host: ([^\r]*)", b"".join(seen)))
    assert status == 0
    assert "X-Forwarded" not in report
    assert "Host: named → Host: 127.0.0.1:" in report
    assert set(hosts) == {b"named", f"127.0.0.1:{model.port}".encode()}
    assert {head.split(b" ")[1] for head in seen} == {b"/base/score"}


async def test_over_tls_and_unix_sockets(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    import ssl

    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*certificate)
    async with model_server(Server(), tls=tls) as model:
        assert (await examined(model.url, planned(body=BODY), proxy__upstream_ca=str(certificate[0])))[0] == 0
    async with model_server(Server(), unix_path=tmp_path / "s"):
        assert (await examined(f"unix:{tmp_path / 's'}", planned(body=BODY)))[0] == 0


# --- what servers do by themselves ---


async def test_what_differs_by_itself_is_not_held_against_the_proxy() -> None:
    class Counting(Server):
        def answer(self, head: bytes, body: bytes) -> bytes:
            number = b"%d" % self.asked.total()
            return b"HTTP/1.1 200 OK\r\nX-Number: %b\r\nContent-Length: %d\r\n\r\n%b" % (number, len(number), number)

    async with model_server(Counting()) as model:
        status, report = await examined(model.url, planned())
    assert status == 0
    assert re.search(r"note +not compared +body, .*header x-number.*: direct answers differ in it", report)


async def test_the_length_of_a_body_that_varies_is_not_compared() -> None:
    """Not even if it happens to be the same in every direct answer."""

    class Varying(Server):
        def answer(self, head: bytes, body: bytes) -> bytes:
            word = b"%05d" % self.asked.total() + b"!" * (b"X-Forwarded-For" in head)
            return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(word), word)

    async with model_server(Varying()) as model:
        status, report = await examined(model.url, planned())
    assert status == 0
    assert re.search(r"note +not compared +body, header content-length: direct answers differ in it", report)


async def test_a_rare_change_is_asked_for_again() -> None:
    """Two direct answers are alike, a third one tells that the server does so by itself."""

    class Rotating(Server):
        def answer(self, head: bytes, body: bytes) -> bytes:
            turn = self.asked.total() % 2
            return b"HTTP/1.1 200 OK\r\nX-Replica: %d\r\nContent-Length: 0\r\n\r\n" % turn

    async with model_server(Rotating()) as model:
        status, report = await examined(model.url, planned())
    assert status == 0
    assert "header x-replica" in report


async def test_a_server_that_ends_each_connection() -> None:
    class Closing(Server):
        def answer(self, head: bytes, body: bytes) -> bytes:
            return b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\npong"

    async with model_server(Closing()) as model:
        status, report = await examined(model.url, planned(quick=False))
    assert status == 0
    assert re.search(r"note +connections +the server ends each with its answer", report)


async def test_a_server_that_ends_idle_connections() -> None:
    class Impatient(Server):
        async def head(self, reader: asyncio.StreamReader) -> bytes:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.3):
                    return await reader.readuntil(b"\r\n\r\n")
            raise ConnectionError

    async with model_server(Impatient()) as model:
        status, report = await examined(model.url, planned(quick=False))
        assert status == 0
        assert re.search(
            r"note +idle connections +the server ends them after 0\.\d s, the proxy only after 4 s", report
        )
        assert "Set proxy.upstream_keepalive to less than 0." in report
        status, report = await examined(model.url, planned(quick=False), proxy__upstream_keepalive="100ms")
        assert re.search(r"ok +idle connections +the server ends them after .* the proxy before that", report)


class Short(Server):
    """Heads of ``limit`` bytes and more are refused."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def answer(self, head: bytes, body: bytes) -> bytes:
        if len(head) < self._limit:
            return super().answer(head, body)
        return b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\n\r\n"


async def test_long_headers() -> None:
    async with model_server(Short(10_000)) as model:
        status, report = await examined(model.url, planned())
        assert status == 0
        words = "up to 8,000 bytes change nothing; 16,000: 431 directly, 431 through the proxy"
        assert re.search(rf"ok +long headers +{words}", report)
        status, report = await examined(model.url, planned(), proxy__max_head_bytes=6000)
    assert status == 0
    words = r"up to 4,000 bytes change nothing; 8,000: 200 directly, 431 through the proxy \(proxy.max_head_bytes\)"
    assert re.search(rf"note +long headers +{words}", report)


async def test_a_limit_of_the_server_that_our_own_headers_reach() -> None:
    async with model_server(Short(8_200)) as model:
        status, report = await examined(model.url, planned())
        assert status == 0
        words = "8,000: 200 directly, 431 through the proxy, whose own headers add 1[0-9]{2} bytes"
        assert re.search(
            rf"note +long headers +up to 4,000 bytes change nothing; {words}: with as many more, 431 directly, too",
            report,
        )


async def test_a_server_that_takes_longer_heads_on_a_connection_that_it_knows() -> None:
    """Go does: what it reads while it waits for the next request does not count."""

    class ReadsAhead(Short):
        def __init__(self) -> None:
            super().__init__(10_000)
            self.readers: list[asyncio.StreamReader] = []

        async def head(self, reader: asyncio.StreamReader) -> bytes:
            self._limit = 20_000 if reader in self.readers else 10_000
            self.readers.append(reader)
            return await super().head(reader)

    async with model_server(ReadsAhead()) as model:
        status, report = await examined(model.url, planned())
    assert status == 0
    words = (
        "16,000: 431 directly, 200 through the proxy, 200 directly, too, on a connection that has had a request before"
    )
    assert re.search(rf"note +long headers +up to 8,000 bytes change nothing; {words}", report)


async def test_a_stream() -> None:
    class Slow(Server):
        def answer(self, head: bytes, body: bytes) -> bytes:
            self.plain = re.search(rb"HTTP/1.0|\r\n(Connection|Accept-Encoding|x-request-id|X-Selftest):", head) is None
            return b""

        async def send(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(3):
                writer.write(b"4\r\npong\r\n")
                if self.plain:
                    await asyncio.sleep(0.06)  # what makes it a stream
            writer.write(b"0\r\n\r\n")

    async with model_server(Slow()) as model:
        status, report = await examined(model.url, planned(method="POST", count=0))
    assert status == 0
    assert re.search(
        r"ok +streaming +the first piece is there after \d+ ms of \d+ directly, \d+ ms of \d+ through", report
    )
    assert "Milliseconds" not in report


async def test_a_server_with_other_answers_for_http10() -> None:
    class Old(Server):
        def answer(self, head: bytes, body: bytes) -> bytes:
            if b"HTTP/1.0\r\n" not in head:
                return super().answer(head, body)
            return b"HTTP/1.1 200 OK\r\nX-Old: 1\r\nContent-Length: 4\r\n\r\npong"

    async with model_server(Old()) as model:
        status, report = await examined(model.url, planned())
    assert status == 0
    assert re.search(r"note +HTTP/1.0 +the server answers HTTP/1.1 otherwise, .*\n +− X-Old: 1\n", report)


async def test_what_the_list_has_is_no_difference() -> None:
    """Blanks around values, chunk extensions, and what HTTP/1.0 clients do not get of a chunked answer."""

    class Odd(Server):
        def answer(self, head: bytes, body: bytes) -> bytes:
            headers = b"X-One:1\r\nX-Two:  2 \r\ntransfer-encoding: chunked\r\nKeep-Alive: 5\r\n"
            return b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n1;a=b\r\np\r\n3\r\nong\r\n0\r\nX-Sum: 1\r\n\r\n"

    async with model_server(Odd()) as model:
        status, report = await examined(model.url, planned())
    assert (status, re.findall("^differs .*", report, re.MULTILINE)) == (0, [])
    listed = report.partition("Changed on the way to the client")[2].partition("\n\n")[0]
    for words in ("blanks around", "− Keep-Alive: 5", "the body's framing: chunked → close", "trailers: [b'X-Sum: 1"):
        assert words in listed


# --- broken proxies ---


@contextlib.asynccontextmanager
async def spoiled(
    settings: Settings, requests: Callable[[bytes], bytes], responses: Callable[[bytes], bytes]
) -> AsyncIterator[App]:
    """The proxy behind one that spoils what passes."""
    async with running(settings) as app:
        host, _, port = app.address.rpartition(":")

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            good_reader, good_writer = await asyncio.open_connection(host, int(port))

            async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, spoil: Any) -> None:
                while data := await reader.read(2**20):
                    writer.write(spoil(data))
                writer.close()

            try:
                await asyncio.gather(pump(reader, good_writer, requests), pump(good_reader, writer, responses))
            finally:
                good_writer.close()

        async with model_server(handler) as front:
            app.address = f"127.0.0.1:{front.port}"
            yield app


def swap(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(old, new)


def same(data: bytes) -> bytes:
    return data


FIRST = b"HTTP/1.1 200 OK\r\n"
BROKEN_ANSWERS = {
    "adds a header": (swap(FIRST, FIRST + b"Via: 1.1 x\r\n"), "+ Via: 1.1 x"),
    "drops a header": (swap(b"X-One: 1\r\n", b""), "− X-One: 1"),
    "changes a value": (swap(b"X-One: 1", b"X-One: 7"), "X-One: 1 → X-One: 7"),
    "changes a name's case": (swap(b"X-One: 1", b"x-one: 1"), "X-One: 1 → x-one: 1"),
    "adds the header again": (swap(b"X-One: 1\r\n", b"X-One: 1\r\nX-One: 1\r\n"), "X-One: 1 → X-One: 1, X-One: 1"),
    "changes the order": (swap(b"X-One: 1\r\nX-Two: 2", b"X-Two: 2\r\nX-One: 1"), "the order of headers: x-one, x-two"),
    "adds a hop-by-hop header": (swap(FIRST, FIRST + b"Keep-Alive: 5\r\n"), "+ Keep-Alive: 5"),
    "adds another id": (swap(FIRST, FIRST + b"x-request-id: 1\r\n"), "+ x-request-id: 1, x-request-id: "),
    "changes the client's id": (swap(b"selftest-1", b"selftest-2"), "comes back as [b'selftest-2']"),
    "changes the reason": (swap(FIRST, b"HTTP/1.1 200 Fine\r\n"), "HTTP/1.1 200 OK → HTTP/1.1 200 Fine"),
    "changes the status": (swap(FIRST, b"HTTP/1.1 500 OK\r\n"), "HTTP/1.1 200 OK → HTTP/1.1 500 OK"),
    "changes the body": (swap(b"pong", b"pXng"), "the body, 4 bytes, from byte 1 on: 'ong' → 'Xng'"),
    "cuts the body": (swap(b"Content-Length: 4", b"Content-Length: 2"), "the body, 4 → 2 bytes, from byte 2 on"),
    "eats 100 Continue": (swap(b"HTTP/1.1 100 Continue\r\n\r\n", b""), "HTTP/1.1 100 Continue → none"),
    "ends connections": (
        swap(FIRST, FIRST + b"Connection: close\r\n"),
        "1 of 2 answers came: the connection was closed",
    ),
    "answers nothing": (swap(FIRST, b""), "0 of 1 answers came: it does not answer in HTTP/1.1: b'X-One: 1'"),
    "changes the framing": (
        lambda data: swap(b"Content-Length: 4", b"Transfer-Encoding: chunked")(
            swap(b"\r\n\r\npong", b"\r\n\r\n4\r\npong\r\n0\r\n\r\n")(data)
        ),
        "the body's framing: length → chunked",
    ),
}


async def found_broken(monkeypatch: pytest.MonkeyPatch, *, requests: Any = same, responses: Any = same) -> str:
    monkeypatch.setattr(run, "running", lambda settings: spoiled(settings, requests, responses))
    async with model_server(Server()) as model:
        status, report = await examined(model.url, planned(body=BODY, timeout_seconds=2))
    assert status == 1
    assert report.endswith("The lines that begin with 'differs' are not in the list of docs/transparency.md.\n")
    return "\n".join(line for line in report.splitlines() if not line.startswith(("ok", "note")))


@pytest.mark.parametrize("case", BROKEN_ANSWERS)
async def test_a_proxy_that_spoils_answers_is_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, words = BROKEN_ANSWERS[case]
    assert words in await found_broken(monkeypatch, responses=spoil)


CHUNKED = Way(name="", request=Named("", "", b"", BODY), chunked=True).body()
BROKEN_REQUESTS = {
    "adds a header": (swap(b"Accept: */*\r\n", b"Accept: */*\r\nVia: x\r\n"), "+ Via: x"),
    "drops a header": (swap(b"Accept: */*\r\n", b""), "− Accept: */*"),
    "changes the path": (swap(b"POST /score ", b"POST /scores "), "b'POST /score HTTP/1.1' → b'POST /scores HTTP/1.1'"),
    "changes the body": (swap(b"5.1", b"5.2"), "the body, 32 bytes, from byte 13 on: '1, 3.5"),
    "unchunks it": (
        lambda data: swap(CHUNKED, BODY)(
            swap(b"Transfer-Encoding: chunked", b"Content-Length: 32")(data) if CHUNKED in data else data
        ),
        "the body's framing: chunked → length",
    ),
    "drops all after the first": (
        lambda data: data[: data.find(b"POST", 1)] if data.count(b"POST") > 1 else data,
        "1 of 2",
    ),
}


@pytest.mark.parametrize("case", BROKEN_REQUESTS)
async def test_a_proxy_that_spoils_requests_is_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, words = BROKEN_REQUESTS[case]
    assert words in await found_broken(monkeypatch, requests=spoil)


async def test_a_proxy_that_holds_streams_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "STEP_SECONDS", 0.5)
    kept: dict[str, bytes] = {"data": b""}

    def hold(data: bytes) -> bytes:
        if b"step" not in data:
            return data
        kept["data"] += data
        return b""

    assert "0 of 5 pieces came back" in await found_broken(monkeypatch, responses=hold)


# --- the command ---

BAD = {
    "no path": (["--path", "score"], "--path: 'score' is not a path; it begins with / and is visible ASCII"),
    "a path with a blank": (["--path", "/a b"], "--path: '/a b' is not a path"),
    "no method": (["--method", "get"], "--method: 'get' is not a method that a proxy passes on"),
    "CONNECT": (["--method", "CONNECT"], "--method: 'CONNECT' is not a method that a proxy passes on"),
    "a type without a body": (["--content-type", "a/b"], "--content-type: there is no body; name one with --body FILE"),
    "no header": (["--header", "x"], "--header: 'x' is not a header; use 'NAME: VALUE'"),
    "a header in two lines": (["--header", "a: b\nc: d"], "--header: 'a' is not a header; use 'NAME: VALUE'"),
    "a header of ours": (["--header", "Content-Length: 1"], "--header: content-length is set by the self-test itself"),
    "less than nothing": (["--count", "-1"], "--count: -1 is less than 0"),
    "no time": (["--timeout", "0"], "--timeout: 0 is not more than 0"),
    "no such body": (
        ["--body", "/does/not/exist"],
        "--body: /does/not/exist cannot be read: No such file or directory",
    ),
    "no URL": (["--upstream", "ftp://h"], "command line: proxy.upstream: 'ftp://h' is not an upstream"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = BAD[case]
    assert main(["selftest", *arguments]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith(f"payload-logger: {words}")


def command(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "proxy", "selftest", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    with process:
        out, err = await asyncio.to_thread(process.communicate, timeout=60)
    return process.returncode, out, err


async def test_nobody_there(tmp_path: Path) -> None:
    async with model_server(Server()) as gone:
        pass
    status, out, err = await finished(command("--upstream", gone.url, folder=tmp_path))
    assert (status, out.count("\n")) == (1, 1)
    assert err == f"payload-logger: {gone.url} can't be tested: no connection: Connection refused\n"


async def _ssh(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-x\r\n\r\n")


async def _hangs_up(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")


async def _silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read(-1)


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (_ssh, "it does not answer in HTTP/1.1: b'SSH-2.0-x'"),
        (_hangs_up, "the connection ended before the answer"),
        (_silent, "no whole answer within 0.2 s"),
    ],
)
async def test_no_model_server(handler: Any, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with model_server(handler) as model:
        status, report = await examined(model.url, planned(timeout_seconds=0.2))
    assert (status, report) == (1, "\n")
    assert capsys.readouterr().err == f"payload-logger: {model.url} can't be tested: {words}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_it_can_be_stopped(number: signal.Signals, tmp_path: Path) -> None:
    arrived = asyncio.Event()

    class Hanging(Server):
        async def send(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
            if self.asked.total() > 8:
                arrived.set()
                await asyncio.Event().wait()
            await super().send(writer, answer)

    async with model_server(Hanging()) as model:
        process = command("--upstream", model.url, folder=tmp_path / "t")
        await arrived.wait()
        assert list((tmp_path / "t").iterdir())
        process.send_signal(number)
        status, _, err = await finished(process)
    assert (status, err) == (130, "payload-logger: stopped before the end; what was recorded is removed\n")
    assert not list((tmp_path / "t").iterdir())


async def test_a_secret_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        run, "running", lambda settings: spoiled(settings, swap(b"Bearer s3cret", b"Bearer s4cret"), same)
    )
    async with model_server(Server()) as model:
        status, report = await examined(model.url, planned(headers=["Authorization: Bearer s3cret"]))
    assert status == 1
    assert "Authorization: … → Authorization: …" in report
    assert "cret" not in report


async def test_the_sample_of_the_documentation_holds(model: str, tmp_path: Path) -> None:
    """In form: what is measured, and the identifiers, are others each time."""
    text = (ROOT / "docs/selftest.md").read_text()
    sample = text.partition("```text\n")[2].partition("```")[0]
    (tmp_path / "input.json").write_bytes(BODY)
    arguments = re.search(r"payload-logger selftest (--upstream .*)\n", text)
    assert arguments is not None
    wanted = arguments[1].replace("http://127.0.0.1:5001", model).split()
    status, out, err = await finished(command(*wanted, folder=tmp_path))
    assert (status, err) == (0, "")

    def form(report: str) -> str:
        report = re.sub(r"^payload-logger .*", "payload-logger", report)
        report = re.sub(r"note +not compared .*date.*\n", "", report)  # a second may begin between two answers
        report = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4,12}){4}", "ID", report)
        return re.sub(r" *[-+]?\d+(\.\d+)?", " N", report)

    assert form(out) == form(sample)
