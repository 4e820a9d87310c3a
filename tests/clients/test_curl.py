"""curl with every odd flag: each call once to the server and once to the proxy before it.

Exit status and output are the same, and so is what the server got, but for what docs/transparency.md lists.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.custom_logging.sdk import environment
from tests.harness import Proxy, model_server, proxy
from tests.relay.wire import eventually, head, payload, read_message

pytestmark = pytest.mark.skipif(
    shutil.which("curl") is None and not os.environ.get("CI"), reason="curl is not installed"
)

SECONDS = 60
TEXT = b"0123456789" * 1000
LARGE = bytes(range(256)) * 8192  # 2 MiB: curl asks first whether it may send that


def header(message: bytes, name: bytes) -> list[bytes]:
    """Its values; curl sends what it is told to, so that there need be no blank behind the colon."""
    pairs = (line.partition(b":") for line in message.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:])
    return [value.strip() for key, _, value in pairs if key.lower() == name]


@dataclass
class Got:
    """A request as the server got it. ``connection``: the number of the one that it came on."""

    line: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    chunked: bool
    connection: int


@dataclass
class Server:
    """Answers by the path, and keeps what came."""

    got: list[Got] = field(default_factory=list)
    connections: int = 0
    open: int = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            await self._serve(self.connections, reader, writer)
        finally:
            self.open -= 1

    async def _serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            start = await reader.readuntil(b"\r\n\r\n")
            path = start.split(b" ", 2)[1].partition(b"?")[0].rpartition(b"/")[2]
            expects = header(start, b"expect")
            if expects and path == b"refuses-to-expect":
                self._keep(start, number)
                writer.write(head(b"HTTP/1.1 417 Expectation Failed", b"Content-Length: 0", b"Connection: close"))
                return
            if expects:
                writer.write(head(b"HTTP/1.1 100 Continue"))
            message = await self._whole(start, reader)
            self._keep(message, number)
            if not await self._answer(path, message, reader, writer):
                return

    async def _whole(self, start: bytes, reader: asyncio.StreamReader) -> bytes:
        if path_takes_a_part(start):
            return start
        rest = asyncio.StreamReader(limit=2**24)
        rest.feed_data(start)
        if header(start, b"transfer-encoding"):
            end = b""
            while not end.endswith(b"0\r\n\r\n"):
                end += await reader.readline()
            rest.feed_data(end)
        elif length := header(start, b"content-length"):
            rest.feed_data(await reader.readexactly(int(length[0])))
        return await read_message(rest)

    def _keep(self, message: bytes, number: int) -> None:
        line, *lines = message.partition(b"\r\n\r\n")[0].split(b"\r\n")
        pairs = [(name, value.strip()) for name, _, value in (one.partition(b":") for one in lines)]
        chunked = bool(header(message, b"transfer-encoding"))
        self.got.append(Got(line, pairs, payload(message), chunked, number))

    async def _answer(
        self, path: bytes, message: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the connection stays."""
        method = message.partition(b" ")[0]
        answer = ANSWERS.get(path)
        if path == b"gzip" and b"gzip" in b"".join(header(message, b"accept-encoding")):
            body = gzip.compress(TEXT, mtime=0)
            answer = head(b"HTTP/1.1 200 OK", b"Content-Encoding: gzip", b"Content-Length: %d" % len(body)) + body
        elif path == b"range" and (span := header(message, b"range")):
            answer = _part(span[0])
        elif path == b"auth" and header(message, b"authorization"):
            answer = None
        elif path == b"etag" and header(message, b"if-none-match") == [b'"1"']:
            answer = head(b"HTTP/1.1 304 Not Modified", b'ETag: "1"')
        if answer is None:
            body = b"%b with %d bytes\n" % (method, len(payload(message)))
            answer = head(b"HTTP/1.1 200 OK", b"X-Empty: ", b"X-Two: 1", b"X-Two: 2", b"Content-Length: %d" % len(body))
            answer += body
        writer.write(answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if method == b"HEAD" else answer)
        await writer.drain()
        if path in (b"stalls", b"reads-nothing"):
            with contextlib.suppress(ConnectionResetError):
                await reader.read(-1)
        closes = path in (b"stalls", b"reads-nothing", b"close", b"short", b"nothing", b"ancient")
        return not closes and b" HTTP/1.0\r\n" not in message


def path_takes_a_part(start: bytes) -> bool:
    return b"/reads-nothing" in start.split(b"\r\n", 1)[0]


def _part(span: bytes) -> bytes:
    first, _, last = span.removeprefix(b"bytes=").partition(b"-")
    begin, end = (int(first), int(last or len(TEXT) - 1)) if first else (len(TEXT) - int(last), len(TEXT) - 1)
    body = TEXT[begin : end + 1]
    where = b"Content-Range: bytes %d-%d/%d" % (begin, end, len(TEXT))
    return head(b"HTTP/1.1 206 Partial Content", where, b"Content-Length: %d" % len(body)) + body


CHUNKS = b"5\r\nhello\r\n6\r\n world\r\n0\r\nX-Sum: 11\r\n\r\n"
ANSWERS = {
    b"gzip": head(b"HTTP/1.1 200 OK", b"Content-Length: 5") + b"plain",
    b"range": head(b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(TEXT)) + TEXT,
    b"chunks": head(b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked", b"Trailer: X-Sum") + CHUNKS,
    b"one-chunk": head(b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n",
    b"close": head(b"HTTP/1.1 200 Fine", b"Connection: close") + TEXT,
    b"moved": head(
        b"HTTP/1.1 302 Found",
        b"Location: /here?a=1",
        b"Set-Cookie: a=1; Path=/",
        b"Set-Cookie: b=2; Path=/; HttpOnly",
        b"Content-Length: 4",
    )
    + b"gone",
    b"moved-307": head(b"HTTP/1.1 307 Temporary Redirect", b"Location: here", b"Content-Length: 0"),
    b"auth": head(b"HTTP/1.1 401 Unauthorized", b'WWW-Authenticate: Basic realm="r"', b"Content-Length: 2") + b"no",
    b"etag": head(b"HTTP/1.1 200 OK", b'ETag: "1"', b"Content-Length: 2") + b"ok",
    b"hints": head(b"HTTP/1.1 103 Early Hints", b"Link: </a>; rel=preload")
    + head(b"HTTP/1.1 200 OK", b"Content-Length: 2")
    + b"ok",
    b"none": head(b"HTTP/1.1 204 No Content"),
    b"fails": head(b"HTTP/1.1 404 Not Found", b"Content-Length: 6") + b"not it",
    b"busy": head(b"HTTP/1.1 503 Busy", b"Content-Length: 4") + b"busy",
    b"stalls": head(b"HTTP/1.1 200 OK", b"Content-Length: 100") + b"part",
    b"reads-nothing": head(b"HTTP/1.1 413 Content Too Large", b"Content-Length: 3", b"Connection: close") + b"no!",
    b"short": head(b"HTTP/1.1 200 OK", b"Content-Length: 100") + b"part",
    b"nothing": b"",
    b"ancient": b"an answer of HTTP/0.9\n",
}


# --- calling it ---


@dataclass
class Told:
    """What curl did."""

    status: int
    output: bytes
    got: list[Got]
    files: dict[str, bytes]
    errors: str


async def curl(server: Server, arguments: list[str], folder: Path) -> Told:
    folder.mkdir()
    (folder / "text").write_bytes(TEXT)
    (folder / "large").write_bytes(LARGE)
    before = len(server.got)
    done = await asyncio.to_thread(
        subprocess.run,
        ["curl", "-q", "-sS", *arguments],
        cwd=folder,
        env=environment({"HOME": str(folder), "TZ": "UTC"}),
        input=b"from standard input",
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("text", "large")}
    output, got = done.stdout, server.got[before:]
    if "-Z" in arguments:  # which come and end in any order
        output, got = b"".join(sorted(output.splitlines(keepends=True))), sorted(got, key=lambda one: one.line)
    return Told(done.returncode, output, got, files, done.stderr.decode())


def to(port: int, arguments: list[str]) -> list[str]:
    """curl is told a name, and where that is: so the server sees the same Host, whoever it comes through."""
    found = ["--connect-to", f"::127.0.0.1:{port}", *arguments]
    where = found[:2]
    for at in [number for number, word in enumerate(found) if word == "--next"][::-1]:
        found[at + 1 : at + 1] = where
    return found


# --- what the proxy may change (docs/transparency.md) ---

HOP_BY_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade"} | {
    b"proxy-authorization",
    b"http2-settings",
}
ADDED = [b"x-request-id", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"]


def passed_on(got: Got) -> Got:
    """What of a request gets to the server by way of the proxy, but for what the proxy adds."""
    method, target, _ = got.line.split(b" ")
    target = re.sub(rb"^http://[^/?]*", b"", target)
    headers = [(name, value) for name, value in got.headers if name.lower() not in HOP_BY_HOP]
    return replace(got, line=b"%b %b HTTP/1.1" % (method, target), headers=headers, connection=0)


def without_what_is_added(got: Got) -> Got:
    names = [name.lower() for name, _ in got.headers]
    assert [name for name in ADDED if name in names] == ADDED, names
    headers = [(name, value) for name, value in got.headers if name.lower() not in {*ADDED, b"transfer-encoding"}]
    return replace(got, headers=headers, connection=0)


def comparable(got: list[Got]) -> list[Got]:
    """curl makes another boundary each time."""
    return [
        replace(
            one,
            headers=[(name, re.sub(rb"-{20,}\w+", b"BOUNDARY", value)) for name, value in one.headers],
            body=re.sub(rb"-{20,}\w+", b"BOUNDARY", one.body),
        )
        for one in got
    ]


def output_of(told: Told) -> bytes:
    return re.sub(
        rb"(?im)^(x-request-id: .*|connection: (close|keep-alive)|(transfer-encoding|trailer): .*)\r\n",
        b"",
        told.output,
    )


async def compared(
    arguments: list[str], folder: Path, *, exit_status: int = 0, fully: bool = True, **settings: object
) -> tuple[Told, Told, Proxy]:
    """Both calls; the proxy has stopped then."""
    server = Server()
    async with model_server(server) as model, proxy(model.url, folder / "data", **settings) as p:
        direct = await curl(server, to(model.port, arguments), folder / "direct")
        proxied = await curl(server, to(p.port, arguments), folder / "proxied")
        await eventually(lambda: not p.app.relay.connections)
        if fully:
            account = await p.recorded(2 * len(proxied.got))
            assert (account.received, account.discarded) == (2 * len(proxied.got), {})
    assert direct.status == exit_status, direct.errors
    if fully:
        assert (proxied.status, output_of(proxied)) == (direct.status, output_of(direct)), proxied.errors
        assert proxied.files == direct.files
        expected = comparable([passed_on(one) for one in direct.got])
        assert comparable([without_what_is_added(one) for one in proxied.got]) == expected
        assert direct.got
    return direct, proxied, p


MODEL = "http://model.test"
SUMMARY = r"%{http_code}|%{size_download}|%{size_upload}|%{num_redirects}|%{num_connects}|%{url_effective}\n"
CALLS = {
    "get": f"{MODEL}/a",
    "its head, too": f"-i {MODEL}/a",
    "an HTTP/1.0 request": f"--http1.0 {MODEL}/a",
    "HTTP/1.0, kept alive": f"--http1.0 -H 'Connection: keep-alive' {MODEL}/a",
    "HTTP/1.0, with a body": f"--http1.0 -d x {MODEL}/a",
    "head": f"-I {MODEL}/a",
    "head of what is chunked": f"-I {MODEL}/chunks",
    "a method": f"-X PROPFIND {MODEL}/a",
    "a method of one's own": f'-X "M-SEARCH!#$%&\'*+.^_`|~9" {MODEL}/a',
    "a method with a body": f"-X purge -d what {MODEL}/a",
    "get with a body": f"-X GET -d what {MODEL}/a",
    "options of all": f"-X OPTIONS --request-target '*' {MODEL}",
    "a target": f"--request-target '/a?b={{}}|\"^`&&=;c' {MODEL}/x",
    "compressed": f"--compressed {MODEL}/gzip",
    "compressed, as it comes": f"-H Accept-Encoding:gzip {MODEL}/gzip",
    "upload": f"-T text {MODEL}/a/",
    "upload of what is large": f"-T large -m 40 --expect100-timeout 50 {MODEL}/a",
    "upload without asking": f"-T large -H Expect: {MODEL}/a",
    "upload after asking": f"-T text -H 'Expect: 100-continue' -m 40 --expect100-timeout 50 {MODEL}/a",
    "upload from a pipe": f"-T - {MODEL}/a",
    "upload in chunks": f"-T text -H 'Transfer-Encoding: chunked' {MODEL}/a",
    "upload after a refusal to say so": f"-T text -H 'Expect: 100-continue' {MODEL}/refuses-to-expect",
    "upload to one that wants none": f"-i -T large -H Expect: {MODEL}/reads-nothing",
    "upload at a limited rate": f"--limit-rate 100k -T text {MODEL}/a",
    "download at a limited rate": f"--limit-rate 100k {MODEL}/range",
    "bytes": f"--data-binary @large -m 40 --expect100-timeout 50 {MODEL}/a",
    "json": f"--json '{{}}' {MODEL}/a",
    "encoded": f"-G --data-urlencode e=é/b?c --data-urlencode @text {MODEL}/a?x",
    "nothing to send": f"-X POST {MODEL}/a",
    "an empty body": f"-d '' -H Content-Type: {MODEL}/a",
    "a form": f"-F a=b -F 'file=@text;type=image/png;filename=\"a \\\"b\"' -F 'c=<text' {MODEL}/a",
    "a form, escaped": f"--form-escape -F file=@large -m 40 --expect100-timeout 50 {MODEL}/a",
    "a range": f"-r 3-7 {MODEL}/range",
    "the end of a range": f"-r -5 {MODEL}/range",
    "resumed": f"-C 9990 {MODEL}/range",
    "a path as it is": f"--path-as-is {MODEL}/../a/./b//c%2F..%2f;d?",
    "globs": f"-g '{MODEL}/[1-2]{{a}}'",
    "raw": f"--raw {MODEL}/one-chunk",
    "not buffered": f"-N {MODEL}/chunks",
    "chunks and trailers": f"-i {MODEL}/chunks",
    "until the close": f"-i {MODEL}/close",
    "transfer coding": f"--tr-encoding {MODEL}/gzip",
    "hop by hop": f"-H 'Connection: close, X-Hop' -H 'Keep-Alive: 5' -H 'Proxy-Connection: x' {MODEL}/a",
    "an empty header": f"-i -H 'X-Empty;' {MODEL}/a",
    "headers twice": f"-H 'X-A: 1' -H 'x-a: 2' -H 'X-A: 1' {MODEL}/a",
    "no headers": f"-H Accept: -H User-Agent: {MODEL}/a",
    "odd headers": f"-A ü -e 'x;auto' -H 'X-Odd:  é \" ' -b 'a;b=c; d' {MODEL}/a",
    "followed": f"-L {MODEL}/moved",
    "followed with its method": f"-L --post302 -d x {MODEL}/moved",
    "followed, of 307": f"-L -d x {MODEL}/moved-307",
    "not followed": f"-i {MODEL}/moved",
    "cookies": f"-L -b '' -c - {MODEL}/moved",
    "several on one connection": f"{MODEL}/a -d x -w '{SUMMARY}' --next {MODEL}/range -w '{SUMMARY}' --next -I {MODEL}/a",
    "a list on one connection": f"'{MODEL}/[1-20]?q=1' -d body",
    "at once": f"-Z --parallel-immediate --parallel-max 20 -o 'out-#1' '{MODEL}/[1-20]'",
    "any way to say who": f"--anyauth -u me:secret {MODEL}/auth",
    "who, at once": f"-u me:secret {MODEL}/auth",
    "a token": f"--oauth2-bearer token {MODEL}/auth",
    "unchanged": f"-H 'If-None-Match: \"1\"' -i {MODEL}/etag",
    "etags": f"--etag-save tag {MODEL}/etag",
    "early hints": f"-i {MODEL}/hints",
    "nothing": f"-i {MODEL}/none",
    "an offer of HTTP/2": f"--http2 -i {MODEL}/a",
    "an offer of HTTP/2 with a body": f"--http2 -i -d x {MODEL}/a",
    "with credentials in the URL": "http://me:secret@model.test:80/a#part",
    "without keep-alive": f"--no-keepalive --tcp-nodelay -H 'Connection: close' {MODEL}/a",
    "a dot behind the name": "http://model.test./a",
}
FAILS = {
    "fails": (22, f"-f {MODEL}/fails"),
    "fails with its body": (22, f"--fail-with-body {MODEL}/fails"),
    "too large": (63, f"--max-filesize 100 {MODEL}/range"),
    "too many redirects": (47, f"-L --max-redirs 0 {MODEL}/moved"),
}


def words(call: str) -> list[str]:
    """What the shell would make of it, and a line about what happened where heads aren't printed."""
    found = shlex.split(call)
    return found if {"-i", "--next"} & {*found} else [*found, "-w", SUMMARY]


@pytest.mark.promise("A1", "A3", "A3a", "B6", "B6b", "B6c", "C7", "C7a", "C8", "C10", "C10b", "F19", "F19a")
@pytest.mark.parametrize("call", CALLS)
async def test_the_same_call_does_the_same(call: str, tmp_path: Path) -> None:
    await compared(words(CALLS[call]), tmp_path)


@pytest.mark.parametrize("call", FAILS)
async def test_the_same_call_fails_in_the_same_way(call: str, tmp_path: Path) -> None:
    status, arguments = FAILS[call]
    await compared(words(arguments), tmp_path, exit_status=status)


# --- what differs, as documented ---

NOT_PASSED_ON = {  # what curl is told; the fault that is counted
    "a PROXY line": ("--haproxy-protocol", "/a", b"400", "invalid_request"),
    "HTTP/2 at once": ("--http2-prior-knowledge", "/a", b"", "invalid_request"),
    "a tunnel": ("-X CONNECT --request-target model.test:80", "/a", b"405", "method"),
    "a trace": ("-X TRACE", "/a", b"405", "method"),
    "a method in small letters": ("-X get", "/a", b"400", "invalid_request"),
    "a target of raw bytes": ("-G -d é", "/a", b"400", "invalid_request"),
    "a bad header": ("-H 'X-É: 1'", "/a", b"400", "invalid_request"),
    "a coding": ("-X POST -H 'Transfer-Encoding: gzip, chunked'", "/a", b"501", "coding"),
    "two framings": ("-T text -H 'Transfer-Encoding: chunked' -H 'Content-Length: 3'", "/a", b"400", "invalid_request"),
}


@pytest.mark.promise("B6b", "G21")
@pytest.mark.parametrize("case", NOT_PASSED_ON)
async def test_what_is_refused_is_refused_in_words(case: str, tmp_path: Path) -> None:
    flags, path, status, reason = NOT_PASSED_ON[case]
    server = Server()
    async with model_server(server) as model, proxy(model.url, tmp_path / "data") as p:
        arguments = to(p.port, [*shlex.split(flags), "-w", "|%{http_code}", MODEL + path])
        told = await curl(server, arguments, tmp_path / "curl")
        assert p.app.relay.faults == {reason: 1}
        await eventually(lambda: not p.app.relay.connections)
    assert server.connections == 0
    if status:
        assert told.status == 0, told.errors
        body, _, code = told.output.rpartition(b"|")
        assert (json.loads(body)["error"]["code"], code) == (int(status), status)
    else:
        assert told.status != 0
        assert told.errors.startswith("curl: (")


@pytest.mark.promise("C9a", "E15")
@pytest.mark.parametrize(
    ("call", "direct_status", "proxied_status", "proxied_code"),
    [
        (f"{MODEL}/short", 18, 56, b"200"),  # cut by a reset, which is never taken for an end
        (f"{MODEL}/nothing", 52, 0, b"502"),
        (f"--http0.9 {MODEL}/ancient", 0, 0, b"502"),
    ],
)
async def test_what_the_server_does_wrong(
    call: str, direct_status: int, proxied_status: int, proxied_code: bytes, tmp_path: Path
) -> None:
    arguments = [*shlex.split(call), "-w", "|%{http_code}"]
    _, proxied, p = await compared(arguments, tmp_path, exit_status=direct_status, fully=False)
    body, _, code = proxied.output.rpartition(b"|")
    assert (proxied.status, code) == (proxied_status, proxied_code)
    assert p.lines("response")[0]["capturestatus"] == "upstreamfailed"
    if proxied_status == 0:
        assert json.loads(body)["error"]["code"] == 502


@pytest.mark.promise("E14")
@pytest.mark.parametrize(
    "call", [f"{MODEL}/stalls", f"--limit-rate 20k -T large -H Expect: {MODEL}/a"], ids=["download", "upload"]
)
async def test_a_call_that_gives_up(call: str, tmp_path: Path) -> None:
    server = Server()
    async with model_server(server) as model, proxy(model.url, tmp_path / "data") as p:
        direct, proxied = await asyncio.gather(
            curl(server, to(model.port, ["--max-time", "2", *shlex.split(call)]), tmp_path / "direct"),
            curl(server, to(p.port, ["--max-time", "2", *shlex.split(call)]), tmp_path / "proxied"),
        )
        assert (proxied.status, direct.status) == (28, 28)
        await eventually(lambda: not server.open)
        await p.recorded(2)
        assert p.lines("response")[0]["capturestatus"] == "clientleft"


@pytest.mark.promise("B6b")
@pytest.mark.parametrize("flags", ["-x", "--proxy1.0"])
async def test_as_the_proxy_of_curl(flags: str, tmp_path: Path) -> None:
    """The absolute form is what the client of a forward proxy sends; it goes to the model server, whoever is meant."""
    server = Server()
    async with model_server(server) as model, proxy(model.url, tmp_path / "data") as p:
        told = [
            await curl(server, [flags, one, "-d", "x", f"{MODEL}/a?b=%2F"], tmp_path / name)
            for name, one in (("direct", model.url), ("proxied", p.url))
        ]
    assert told[0].got[0].line.startswith(b"POST http://model.test/a?b=%2F HTTP/1.")
    assert told[1].output == told[0].output == b"POST with 1 bytes\n"
    assert [without_what_is_added(one) for one in told[1].got] == [passed_on(one) for one in told[0].got]


async def test_a_tunnel_through_it_is_refused(tmp_path: Path) -> None:
    server = Server()
    async with model_server(server) as model, proxy(model.url, tmp_path / "data") as p:
        told = await curl(server, ["-p", "-x", p.url, f"{MODEL}/a"], tmp_path / "curl")
    assert (told.status, told.got) == (56, [])
    assert "405" in told.errors


# --- other ways to it ---


@pytest.mark.parametrize(
    "call", ["-k", "-k --tls-max 1.2", "--cacert certificate.pem", "-k --http2", "-k --http1.0 -i"]
)
async def test_over_tls(call: str, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*certificate)
    server = Server()
    settings = {"proxy__tls_certificate": str(certificate[0]), "proxy__tls_key": str(certificate[1])}
    flags = shlex.split(call.replace("certificate.pem", str(certificate[0])))
    async with (
        model_server(server, tls=tls) as by_tls,
        model_server(server) as model,
        proxy(model.url, tmp_path / "data", **settings) as p,
    ):
        arguments = [
            *flags,
            "-T",
            "large",
            "--expect100-timeout",
            "50",
            "https://localhost/a",
            "https://localhost/range",
        ]
        direct = await curl(server, to(by_tls.port, arguments), tmp_path / "direct")
        proxied = await curl(server, to(p.port, arguments), tmp_path / "proxied")
    assert (proxied.status, output_of(proxied)) == (direct.status, output_of(direct))
    assert direct.status == 0, direct.errors
    assert [without_what_is_added(one) for one in proxied.got] == [passed_on(one) for one in direct.got]
    assert (b"X-Forwarded-Proto", b"https") in proxied.got[0].headers


@pytest.mark.promise("G21")
async def test_tls_where_none_is_spoken(tmp_path: Path) -> None:
    server = Server()
    async with model_server(server) as model, proxy(model.url, tmp_path / "data") as p:
        told = await curl(server, to(p.port, ["-k", "https://model.test/a"]), tmp_path / "curl")
        assert p.app.relay.faults == {"invalid_request": 1}
    assert (told.status, told.got, server.connections) == (35, [], 0)


async def test_over_a_unix_socket(tmp_path: Path) -> None:
    server = Server()
    with tempfile.TemporaryDirectory() as short:  # 107 bytes are the longest
        own, listen = Path(short, "model"), Path(short, "proxy")
        async with (
            model_server(server, unix_path=own),
            proxy(f"unix:{own}", tmp_path / "data", proxy__listen=f"unix:{listen}"),
        ):
            direct, proxied = [
                await curl(
                    server, ["--unix-socket", str(path), "-i", "-F", "a=@large", f"{MODEL}/a"], tmp_path / path.name
                )
                for path in (own, listen)
            ]
    assert (proxied.status, output_of(proxied)) == (direct.status, output_of(direct))
    assert direct.status == 0
    (one,) = comparable(proxied.got)
    added = [(name, value) for name, value in one.headers if name.lower() in ADDED]
    assert [name.lower() for name, _ in added] == [b"x-request-id", b"x-forwarded-proto", b"x-forwarded-host"]
    kept = replace(one, headers=[pair for pair in one.headers if pair not in added], connection=0)
    assert [kept] == comparable([passed_on(request) for request in direct.got])
