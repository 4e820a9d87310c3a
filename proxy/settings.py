"""What can be configured: one frozen, typed tree.

``config.py`` reads it from YAML and the environment; the JSON Schema (``payload-logger schema``)
and ``docs/configuration.md`` are generated from the descriptions here.

The top level is an Azure ML online deployment (``endpoint_name``, ``name``, ``data_collector``) with
our own sections beside it. Source of the ``data_collector`` block: Azure ML's managed and Kubernetes
online deployment YAML schemas (CLI v2).
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from msgspec import Meta, Struct

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# Leaf types whose YAML form differs from their Python form. ``config.py`` has one reader for each kind.
Bytes = Annotated[int, Meta(extra={"kind": "bytes"}, examples=["64KiB", "4MiB", "10GiB"])]
Seconds = Annotated[float, Meta(extra={"kind": "seconds"}, examples=["50ms", "30s", "10min"])]
Rate = Annotated[float, Meta(ge=0, le=1, extra={"kind": "rate"})]
Switch = Annotated[bool, Meta(extra={"kind": "switch"}, examples=["True", "False"])]
Listen = Annotated[str, Meta(extra={"kind": "listen"}, examples=["0.0.0.0:8080", "[::1]:8080", "unix:/run/p.sock"])]
Upstream = Annotated[str, Meta(extra={"kind": "upstream"}, examples=["http://127.0.0.1:5001", "unix:/run/model.sock"])]
StorageUrl = Annotated[str, Meta(extra={"kind": "storage_url"}, examples=["file:///var/lib/payload-logger/data"])]
ManagementUrl = Annotated[str, Meta(extra={"kind": "management_url"})]
DataPath = Annotated[str, Meta(extra={"kind": "data_path"}, examples=["azureml://datastores/NAME/paths/FOLDER"])]
FilePath = Annotated[str, Meta(extra={"kind": "path"})]
Segment = Annotated[str, Meta(extra={"kind": "segment"})]
HeaderName = Annotated[str, Meta(extra={"kind": "header"})]
PathRule = Annotated[str, Meta(extra={"kind": "path_rule"}, examples=["/score", "GET,HEAD /health*"])]


class RollingRate(Enum):
    """How finely the dataset is partitioned by time (UTC)."""

    MINUTE = "Minute"
    HOUR = "Hour"
    DAY = "Day"
    MONTH = "Month"
    YEAR = "Year"


class Durability(Enum):
    """When an exchange counts as recorded, and so when its response may be completed."""

    NONE = "none"
    WRITTEN = "written"
    SYNCED = "synced"


class WhenFull(Enum):
    """What happens to traffic when the spool can take no more."""

    DROP = "drop"
    REJECT = "reject"


class ForwardedHeaders(Enum):
    """What is done about X-Forwarded-For, X-Forwarded-Proto and X-Forwarded-Host."""

    APPEND = "append"
    REPLACE = "replace"
    OFF = "off"


class HostHeader(Enum):
    """Which Host header the model server sees."""

    PASS = "pass"  # noqa: S105
    UPSTREAM = "upstream"


class LogFormat(Enum):
    TEXT = "text"
    JSON = "json"


class LogLevel(Enum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Data(Struct, frozen=True, kw_only=True):
    """Where a collection's data goes, and the data asset that it is registered as."""

    name: Annotated[
        str | None, Meta(description="Name of the data asset. Default: {endpoint_name}-{name}-{collection}.")
    ] = None
    path: Annotated[
        DataPath | None,
        Meta(
            description="Root of this collection, in place of {storage.url}/{endpoint_name}/{name}/{collection}: "
            "azureml://datastores/NAME/paths/FOLDER (short or long form), https://ACCOUNT.blob.core.windows.net/"
            "CONTAINER/FOLDER or file:///FOLDER. With local storage an azureml:// path is kept as FOLDER below storage.url."
        ),
    ] = None
    version: Annotated[str, Meta(extra={"kind": "text"}, description="Version of the data asset.")] = "1"


class Collection(Struct, frozen=True, kw_only=True):
    """One collection: ``request`` and ``response`` are payload logging, any other name is custom logging."""

    enabled: Annotated[Switch, Meta(description="Whether this collection is recorded: true or 'True', any case.")]
    sampling_rate: Annotated[
        Rate | None,
        Meta(description="Part of the exchanges that is recorded, in place of data_collector.sampling_rate."),
    ] = None
    client_id: Annotated[
        str | None, Meta(description="Client id of the user-assigned identity that writes this collection.")
    ] = None
    data: Annotated[Data | None, Meta(description="Own destination and data asset of this collection.")] = None


class RequestLogging(Struct, frozen=True, kw_only=True):
    """What is recorded of a request beside its payload."""

    capture_headers: Annotated[
        tuple[HeaderName, ...],
        Meta(
            description="Names of request headers that become fields of the request's line. No wildcards: Authorization, "
            "Cookie and keys are recorded only when they are named here one by one."
        ),
    ] = ()


class DataCollector(Struct, frozen=True, kw_only=True):
    """Azure ML's ``data_collector`` block, word for word."""

    rolling_rate: Annotated[
        RollingRate,
        Meta(description="Partition of the dataset: yyyy/MM/dd/HH for Hour. Azure ML's model monitor reads only Hour."),
    ] = RollingRate.HOUR
    sampling_rate: Annotated[
        Rate,
        Meta(
            description="Part of the exchanges that is recorded, 0 to 1. Applies to every collection; those of custom logging "
            "are sampled by the SDK (payload-logger sdk-env)."
        ),
    ] = 1.0
    request_logging: Annotated[
        RequestLogging, Meta(description="What is recorded of a request beside its payload.")
    ] = RequestLogging()
    collections: Annotated[
        dict[Segment, Collection],
        Meta(description="The collections by name; at least request and response make sense here."),
    ]


class Proxy(Struct, frozen=True, kw_only=True):
    """The traffic path."""

    listen: Annotated[Listen, Meta(description="Where clients connect: HOST:PORT or unix:/PATH.")] = "0.0.0.0:8080"
    upstream: Annotated[
        Upstream,
        Meta(
            description="The model server: http://HOST:PORT, https://HOST:PORT or unix:/PATH. A path in the URL is put "
            "before the path of every request."
        ),
    ] = "http://127.0.0.1:5001"
    workers: Annotated[
        int,
        Meta(
            ge=1,
            le=256,
            description="Number of processes that take traffic, each for one core. With more than one there is a supervisor, "
            "which replaces those that end.",
        ),
    ] = 1
    tls_certificate: Annotated[
        FilePath | None,
        Meta(description="PEM file with the certificate chain; with tls_key it makes the listener speak TLS."),
    ] = None
    tls_key: Annotated[FilePath | None, Meta(description="PEM file with the private key of tls_certificate.")] = None
    upstream_ca: Annotated[
        FilePath | None, Meta(description="PEM file with the authorities that an https upstream is checked against.")
    ] = None
    upstream_verify: Annotated[Switch, Meta(description="Whether the certificate of an https upstream is checked.")] = (
        True
    )
    host_header: Annotated[
        HostHeader,
        Meta(description="Host header that the model server sees: the client's (pass) or the upstream's own."),
    ] = HostHeader.PASS
    forwarded_headers: Annotated[
        ForwardedHeaders,
        Meta(
            description="append: the client's address is appended to X-Forwarded-For; -Proto and -Host are set where "
            "absent. replace: what the client sent is dropped first. off: they pass as they came."
        ),
    ] = ForwardedHeaders.APPEND
    connect_timeout: Annotated[
        Seconds, Meta(gt=0, description="Longest wait for a connection to the upstream; then 504.")
    ] = 5.0
    upstream_idle_timeout: Annotated[
        Seconds,
        Meta(
            description="Longest silence of the upstream within an exchange; then 504, or an abort mid-body. 0: no limit."
        ),
    ] = 600.0
    upstream_keepalive: Annotated[
        Seconds,
        Meta(
            description="How long an idle upstream connection is kept. Less than the upstream's own limit (uvicorn: 5 s)."
        ),
    ] = 4.0
    keepalive_timeout: Annotated[
        Seconds,
        Meta(gt=0, description="How long an idle client connection is kept; longer than load balancers keep theirs."),
    ] = 620.0
    head_timeout: Annotated[
        Seconds,
        Meta(
            gt=0,
            description="Longest wait for a request's head, from its first byte on; then 408. A new connection that sends "
            "nothing is closed after it.",
        ),
    ] = 30.0
    client_idle_timeout: Annotated[
        Seconds,
        Meta(
            description="Longest silence of a client within an exchange: while its body is awaited (then 408), or while it "
            "takes nothing of the answer (then an abort). 0: no limit."
        ),
    ] = 60.0
    max_connections: Annotated[
        int,
        Meta(
            ge=0,
            description="Most client connections at once, TLS handshakes included. One more takes the place of the one "
            "that has been idle for longest, and gets 503 if none is idle. 0: no limit.",
        ),
    ] = 4096
    max_head_bytes: Annotated[
        Bytes,
        Meta(
            ge=1024, description="Largest request or response head (start line and headers). A larger request gets 431."
        ),
    ] = 128 * KIB
    max_headers: Annotated[int, Meta(ge=1, description="Most headers in one message; more in a request get 431.")] = 256
    drain_seconds: Annotated[
        Seconds, Meta(description="On SIGTERM: how long exchanges in flight may take to finish.")
    ] = 30.0


# GET and HEAD on these are probes and scrapes, not inferences; people who want them recorded empty the list.
PROBES = (
    "GET,HEAD /",
    "GET,HEAD /health*",
    "GET,HEAD /live*",
    "GET,HEAD /ready*",
    "GET,HEAD /ping",
    "GET,HEAD /metrics",
    "GET,HEAD /v2/health/*",
    "GET,HEAD /favicon.ico",
)


class Capture(Struct, frozen=True, kw_only=True):
    """What is recorded of an exchange."""

    include: Annotated[
        tuple[PathRule, ...],
        Meta(
            description="Requests that are recorded: '[METHOD,…] PATH' with * and ? as wildcards, without the query string."
        ),
    ] = ("*",)
    exclude: Annotated[
        tuple[PathRule, ...],
        Meta(description="Requests that are not recorded, of those included. Default: health probes."),
    ] = PROBES
    max_inline_bytes: Annotated[
        Bytes,
        Meta(description="A body above this becomes a file of its own, and its line points to it. Azure ML: 4 MB."),
    ] = 4 * MIB
    max_body_bytes: Annotated[
        Bytes,
        Meta(
            description="Most that is recorded of one body; the traffic is never cut. 0: no limit but the disk budget."
        ),
    ] = 0
    max_decoded_bytes: Annotated[
        Bytes, Meta(description="Most that a compressed body is unpacked to; guards against decompression bombs.")
    ] = 256 * MIB
    memory_bytes: Annotated[
        Bytes,
        Meta(
            description="Memory for bodies in flight, all exchanges together. Beyond it bodies go to files of their own."
        ),
    ] = 64 * MIB
    extended_fields: Annotated[
        Switch,
        Meta(
            description="Adds statuscode, durationms, capturestatus, captured headers and fractions of seconds. Off: lines "
            "have exactly the fields that Azure ML documents."
        ),
    ] = True


class Storage(Struct, frozen=True, kw_only=True):
    """Where the dataset goes."""

    url: Annotated[
        StorageUrl,
        Meta(
            description="Root of the dataset, below which {endpoint_name}/{name}/{collection}/yyyy/MM/dd/HH/ follows: "
            "file:///PATH (or a plain path), https://ACCOUNT.blob.core.windows.net/CONTAINER/PREFIX or "
            "azureml://datastores/NAME/paths/FOLDER. The right to write there comes from AZURE_STORAGE_CONNECTION_STRING, "
            "AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN in the environment (or _FILE behind the name and the path of a "
            "file), else from the machine's identity."
        ),
    ] = "file:///var/lib/payload-logger/data"
    ship_interval: Annotated[
        Seconds,
        Meta(gt=0, description="How often what was recorded is shipped to a remote destination: one append per file."),
    ] = 2.0


class Spool(Struct, frozen=True, kw_only=True):
    """The local disk that every line is written to first."""

    path: Annotated[
        FilePath | None,
        Meta(
            description="Folder of the spool. With local storage only locks are kept there, by default in "
            ".payload-logger below storage.url; otherwise the default is /var/lib/payload-logger/spool."
        ),
    ] = None
    max_bytes: Annotated[
        Bytes,
        Meta(
            description="Disk budget. With local storage this is the size of the dataset itself, else of what is not "
            "shipped yet. 0: no limit."
        ),
    ] = 10 * GIB
    durability: Annotated[
        Durability,
        Meta(
            description="What must have happened before the last byte of a response leaves: written (the kernel has the "
            "lines: survives a crash of the process), synced (the disk has them: survives power loss) or none."
        ),
    ] = Durability.WRITTEN
    when_full: Annotated[
        WhenFull,
        Meta(
            description="When the budget is used up or the disk fails: drop (serve, count what is not recorded) or reject "
            "(answer 503, but for what is under way and one exchange a second that tries again)."
        ),
    ] = WhenFull.DROP
    max_hold: Annotated[
        Seconds,
        Meta(description="Longest that the end of a response waits for the disk; then it leaves and is counted."),
    ] = 0.05
    roll_bytes: Annotated[
        Bytes,
        Meta(
            ge=64 * KIB,
            description="A file is closed, and the next one begun, at this size. When it is shipped: at a sixteenth of "
            "max_bytes, if that is less.",
        ),
    ] = 256 * MIB


class CustomLogging(Struct, frozen=True, kw_only=True):
    """The endpoint that the azureml-ai-monitoring SDK posts to."""

    listen: Annotated[
        Listen,
        Meta(
            description="Where the SDK connects: HOST:PORT. There is a listener when this section is there, or when a collection "
            "other than request and response is enabled. There is no authentication: leave it on the loopback address."
        ),
    ] = "127.0.0.1:50011"
    max_body_bytes: Annotated[
        Bytes, Meta(gt=0, description="Largest frame that is taken, as JSON; a larger one gets 413.")
    ] = 32 * MIB
    batch_window: Annotated[
        Seconds,
        Meta(
            le=60,
            description="Frames of one collection within this time share a line, as Azure ML documents it, with the ids of the "
            "first. Such a frame is in memory until its line is written. 0: each frame has a line, and an id, of its own.",
        ),
    ] = 0.0
    sdk_config_path: Annotated[
        FilePath | None,
        Meta(
            description="Where the SDK's own configuration (AZUREML_MDC_CONFIG_PATH) is written at start: which collections are "
            "enabled, and their sampling rates. The scoring script has to be able to read it."
        ),
    ] = None


class Admin(Struct, frozen=True, kw_only=True):
    """Probes, metrics and status."""

    listen: Annotated[
        Listen,
        Meta(
            description="Where probes and scrapes connect. There is no authentication, and nothing secret: counts, "
            "and the addresses of the destination and the model server."
        ),
    ] = "127.0.0.1:8081"


MANAGEMENT_URL = "https://management.azure.com"


class AzureML(Struct, frozen=True, kw_only=True):
    """The workspace that the events name as their source, and that azureml:// paths without one belong to."""

    subscription_id: Annotated[str, Meta(description="Subscription of the workspace.")]
    resource_group: Annotated[str, Meta(description="Resource group of the workspace.")]
    workspace_name: Annotated[str, Meta(description="Name of the workspace.")]
    management_url: Annotated[
        ManagementUrl,
        Meta(
            description="Azure's control plane; sovereign clouds have their own, as https://management.usgovcloudapi.net."
        ),
    ] = MANAGEMENT_URL


class Logs(Struct, frozen=True, kw_only=True):
    """The program's own log, on standard error."""

    level: Annotated[LogLevel, Meta(description="Least level that is written.")] = LogLevel.INFO
    format: Annotated[LogFormat, Meta(description="text for people, json for log collectors.")] = LogFormat.TEXT


REQUEST = "request"
RESPONSE = "response"
PAYLOAD_COLLECTIONS = (REQUEST, RESPONSE)


class Settings(Struct, frozen=True, kw_only=True):
    """The whole configuration."""

    endpoint_name: Annotated[Segment, Meta(description="Name of the endpoint; second folder of the dataset.")] = (
        "local-endpoint"
    )
    name: Annotated[Segment, Meta(description="Name of the deployment; third folder of the dataset.")] = "default"
    data_collector: Annotated[
        DataCollector,
        Meta(description="Azure ML's block, word for word. When it is absent, request and response are recorded."),
    ] = DataCollector(collections={REQUEST: Collection(enabled=True), RESPONSE: Collection(enabled=True)})
    proxy: Annotated[Proxy, Meta(description="The traffic path.")] = Proxy()
    capture: Annotated[Capture, Meta(description="What is recorded of an exchange.")] = Capture()
    storage: Annotated[Storage, Meta(description="Where the dataset goes.")] = Storage()
    spool: Annotated[Spool, Meta(description="The local disk that every line is written to first.")] = Spool()
    custom_logging: Annotated[
        CustomLogging | None, Meta(description="The endpoint that the azureml-ai-monitoring SDK posts to.")
    ] = None
    admin: Annotated[
        Admin | None,
        Meta(description="Probes, metrics and status: served when this section is there ('admin: {}' will do)."),
    ] = None
    azureml: Annotated[AzureML | None, Meta(description="The workspace named as the source of the events.")] = None
    logs: Annotated[Logs, Meta(description="The program's own log.")] = Logs()

    @property
    def sdk_endpoint(self) -> CustomLogging | None:
        """The SDK's endpoint, if there is one: its section is there, or a collection of custom logging is enabled."""
        collections = self.data_collector.collections
        wanted = any(one.enabled for name, one in collections.items() if name not in PAYLOAD_COLLECTIONS)
        return self.custom_logging or (CustomLogging() if wanted else None)

    @property
    def management_url(self) -> str:
        """Azure's control plane, with or without a workspace."""
        return MANAGEMENT_URL if self.azureml is None else self.azureml.management_url
