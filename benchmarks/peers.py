"""The proxies that are compared: how each is started, pinned to one core, before the same upstream."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
COMPILED = HERE.parent / "build" / "compiled"  # what ``make compiled`` makes
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Peer:
    """``command(folder, port, upstream_port)`` writes what the proxy needs into ``folder`` and gives its command line."""

    name: str
    program: str | None  # what must be there: a name on the PATH or beside this Python
    command: Callable[[Path, int, int], list[str]]
    version: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    records: bool = False


def find(program: str) -> str | None:
    """Path of a program beside this Python or on the PATH."""
    beside = BIN / program
    return str(beside) if beside.exists() else shutil.which(program)


def _ours(*flags: str, collections: bool) -> Callable[[Path, int, int], list[str]]:
    def command(folder: Path, port: int, upstream_port: int) -> list[str]:
        enabled = str(collections).lower()
        config = folder / "config.yaml"
        config.write_text(
            f"data_collector: {{collections: {{request: {{enabled: {enabled}}}, response: {{enabled: {enabled}}}}}}}\n"
            f"proxy: {{listen: '127.0.0.1:{port}', upstream: 'http://127.0.0.1:{upstream_port}'}}\n"
            f"storage: {{url: '{folder}/data'}}\nlogs: {{level: error}}\nspool: {{max_bytes: 0}}\n"
        )
        return [sys.executable, "-m", "proxy", "run", "-c", str(config), *flags]

    return command


def _envoy(*, tap: bool) -> Callable[[Path, int, int], list[str]]:
    def command(folder: Path, port: int, upstream_port: int) -> list[str]:
        filters = [
            {
                "name": "router",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
            }
        ]
        if tap:
            (folder / "tap").mkdir()
            sink = {"format": "JSON_BODY_AS_BYTES", "file_per_tap": {"path_prefix": f"{folder}/tap/any"}}
            static = {
                "match": {"any_match": True},
                "output_config": {"sinks": [sink], "max_buffered_rx_bytes": 2**28, "max_buffered_tx_bytes": 2**28},
            }
            filters.insert(
                0,
                {
                    "name": "tap",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.http.tap.v3.Tap",
                        "common_config": {"static_config": static},
                    },
                },
            )
        manager = {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "in",
            "http_filters": filters,
            "route_config": {
                "virtual_hosts": [
                    {
                        "name": "all",
                        "domains": ["*"],
                        "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "model", "timeout": "0s"}}],
                    }
                ]
            },
        }
        config = {
            "static_resources": {
                "listeners": [
                    {
                        "address": _socket(port),
                        "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}],
                    }
                ],
                "clusters": [
                    {
                        "name": "model",
                        "connect_timeout": "5s",
                        "type": "STATIC",
                        "load_assignment": {
                            "cluster_name": "model",
                            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _socket(upstream_port)}}]}],
                        },
                    }
                ],
            }
        }
        path = folder / "envoy.json"
        path.write_text(json.dumps(config))
        # With one worker it does as well as it can on one core; --base-id keeps it apart from other Envoys.
        return [find("envoy") or "", "-c", str(path), "--concurrency", "1", "-l", "error", "--use-dynamic-base-id"]

    return command


def _socket(port: int) -> dict[str, object]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _caddy(folder: Path, port: int, upstream_port: int) -> list[str]:
    path = folder / "Caddyfile"
    path.write_text(
        "{\n admin off\n persist_config off\n auto_https off\n log {\n  level ERROR\n }\n}\n"
        f"http://127.0.0.1:{port} {{\n reverse_proxy 127.0.0.1:{upstream_port}\n}}\n"
    )
    return [find("caddy") or "", "run", "--config", str(path), "--adapter", "caddyfile"]


def nginx_config(folder: Path, servers: str, events: str = "worker_connections 4096;") -> list[str]:
    """An nginx of our own: its command line, for the given http-level configuration."""
    path = folder / "nginx.conf"
    path.write_text(
        f"worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log;\nevents {{ {events} }}\n"
        f"http {{ client_body_temp_path {folder}/bodies; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;\n"
        f" uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; keepalive_requests 1000000000; client_max_body_size 0;\n"
        f"{servers}\n}}\n"
    )
    return [find("nginx") or "", "-p", str(folder), "-c", str(path)]


def _nginx(folder: Path, port: int, upstream_port: int) -> list[str]:
    return nginx_config(
        folder,
        ' log_format bodies escape=json \'{"time":"$time_iso8601","request":"$request","body":"$request_body"}\';\n'
        f" access_log {folder}/access.log bodies; client_body_buffer_size 16m;\n"
        f" upstream model {{ server 127.0.0.1:{upstream_port}; keepalive 256; }}\n"
        f" server {{ listen 127.0.0.1:{port} backlog=1024;\n"
        "  location / { proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection ''; } }",
    )


def _mitmdump(folder: Path, port: int, upstream_port: int) -> list[str]:
    mode = f"reverse:http://127.0.0.1:{upstream_port}"
    return [
        find("mitmdump") or "",
        "--mode",
        mode,
        "-p",
        str(port),
        "--listen-host",
        "127.0.0.1",
        "-q",
        "-w",
        str(folder / "flows"),
    ]


def _naive(_folder: Path, port: int, upstream_port: int) -> list[str]:
    return [sys.executable, str(HERE / "naive.py"), str(port), f"http://127.0.0.1:{upstream_port}"]


OURS = "payload-logger"
OURS_OFF = "payload-logger, recording nothing"
OURS_PURE = "payload-logger, not compiled"
ENVOY = "Envoy"
ENVOY_TAP = "Envoy with tap"
CADDY = "Caddy"
MITMDUMP = "mitmdump -w"

PEERS = (
    Peer(OURS, None, _ours(collections=True), environment={"PYTHONPATH": str(COMPILED)}, records=True),
    Peer(OURS_OFF, None, _ours(collections=False), environment={"PYTHONPATH": str(COMPILED)}),
    Peer(OURS_PURE, None, _ours(collections=True), environment={"PYTHONPATH": str(HERE.parent)}, records=True),
    Peer(ENVOY_TAP, "envoy", _envoy(tap=True), ("envoy", "--version"), records=True),
    Peer(ENVOY, "envoy", _envoy(tap=False), ("envoy", "--version")),
    Peer("nginx, request bodies in its log", "nginx", _nginx, ("nginx", "-v"), records=True),
    Peer(CADDY, "caddy", _caddy, ("caddy", "version"), {"GOMAXPROCS": "1"}),
    Peer("aiohttp with ClientSession", None, _naive),
    Peer(MITMDUMP, "mitmdump", _mitmdump, ("mitmdump", "--version"), records=True),
)
