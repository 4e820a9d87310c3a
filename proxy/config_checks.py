"""What has to hold between settings, each of which is right by itself, and what their owner should know. Looks at files
(whether they can be read), changes nothing.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from ipaddress import ip_address
from itertools import combinations
from pathlib import Path
from typing import TypeAlias

from proxy.config_values import address, shown
from proxy.settings import MIB, PAYLOAD_COLLECTIONS, Collection, RollingRate, Settings

KeyPath: TypeAlias = tuple[str, ...]
Finding: TypeAlias = tuple[tuple[KeyPath, ...], str]  # the keys that it is about, and what is to be said of the first

_COLLECTIONS = ("data_collector", "collections")
MAX_INLINE_BYTES = 16 * MIB
_NEAR = 0.85  # requests, respnse; not model_request
_CREDENTIALS = {"authorization", "proxy-authorization", "cookie", "x-api-key", "api-key", "ocp-apim-subscription-key"}


def problems(settings: Settings) -> Iterator[Finding]:
    """What makes the settings unusable."""
    yield from _tls(settings)
    yield from _addresses(settings)
    yield from _shared_roots(settings)
    yield from _destinations(settings)
    yield from _custom_logging(settings)
    yield from _workers(settings)


def warnings(settings: Settings) -> Iterator[Finding]:
    """What may surprise the owner of settings that are usable."""
    yield from _little_is_recorded(settings)
    yield from _captured_headers(settings)
    if settings.data_collector.rolling_rate is not RollingRate.HOUR:
        yield (("data_collector", "rolling_rate"),), "Azure ML's model monitor reads only Hour"
    yield from _open_to_others(settings)


def _enabled(settings: Settings) -> list[tuple[str, Collection]]:
    return [(name, one) for name, one in settings.data_collector.collections.items() if one.enabled]


def _tls(settings: Settings) -> Iterator[Finding]:
    proxy = settings.proxy
    pair = ("proxy", "tls_certificate"), ("proxy", "tls_key")
    if (proxy.tls_certificate is None) != (proxy.tls_key is None):
        missing = pair[0] if proxy.tls_certificate is None else pair[1]
        yield (missing, *pair), "missing; tls_certificate and tls_key belong together"
    for key in (*pair, ("proxy", "upstream_ca")):
        file = getattr(proxy, key[1])
        if file is not None and not (os.access(file, os.R_OK) and Path(file).is_file()):
            yield (key,), f"{shown(file)} is not a file that can be read"


def _addresses(settings: Settings) -> Iterator[Finding]:
    sections = {"proxy": settings.proxy, "custom_logging": settings.sdk_endpoint, "admin": settings.admin}
    listeners = {(name, "listen"): section for name, section in sections.items()}
    ours = {key: address(section.listen) for key, section in listeners.items() if section is not None}
    for (key, one), (other_key, other) in combinations(ours.items(), 2):
        if _meet(one, other) or _meet(other, one):
            yield (other_key, key), f"the same address as {'.'.join(key)}"
    upstream = address(settings.proxy.upstream)
    for key, one in ours.items():
        if _meet(one, upstream, local_only=True) or _meet(upstream, one, local_only=True):
            yield (("proxy", "upstream"), key), f"leads back to {'.'.join(key)}"


def _meet(one: tuple[str, int], other: tuple[str, int], *, local_only: bool = False) -> bool:
    """Whether ``one`` takes the place of ``other``: equal, or a wildcard (0.0.0.0, ::) with the same port."""
    (host, port), (other_host, other_port) = one, other
    if port != other_port or port == 0:  # the kernel chooses a free port for 0
        return False
    wildcard = _is_ip(host, "is_unspecified")
    return _ip(host) == _ip(other_host) or (
        wildcard and (not local_only or _is_ip(other_host, "is_loopback") or _is_ip(other_host, "is_unspecified"))
    )


def _ip(host: str) -> str:
    return "127.0.0.1" if host.lower() == "localhost" else host.lower()


def _is_ip(host: str, what: str) -> bool:
    try:
        return bool(getattr(ip_address(_ip(host)), what))
    except ValueError:
        return False


def _shared_roots(settings: Settings) -> Iterator[Finding]:
    local = settings.storage.url.startswith("file:")
    for (key, path), (other_key, other_path) in combinations(_data_paths(settings), 2):
        if path == other_path or (local and _root(path) == _root(other_path)):
            yield (other_key, key), f"{shown(other_path)} is already the root of {key[2]}; give each collection its own"


def _data_paths(settings: Settings) -> list[tuple[KeyPath, str]]:
    return [
        ((*_COLLECTIONS, name, "data", "path"), one.data.path)
        for name, one in _enabled(settings)
        if one.data and one.data.path
    ]


def _root(path: str) -> str:
    """With local storage the folder of an azureml:// path is kept, its datastore is not."""
    return path.partition("/paths/")[2] if path.startswith("azureml:") else path


def _custom_logging(settings: Settings) -> Iterator[Finding]:
    names = {name: name for name in PAYLOAD_COLLECTIONS}
    for name in settings.data_collector.collections:
        other = names.setdefault(name.lower(), name)
        if other != name:
            words = f"the same as {shown(other)} but for case; "
            words += f"write '{other}'" if other in PAYLOAD_COLLECTIONS else "the SDK has all names in lower case"
            yield ((*_COLLECTIONS, name), (*_COLLECTIONS, other)), words
    options = settings.custom_logging
    if options is not None and options.listen.startswith("unix:"):
        yield (("custom_logging", "listen"),), f"{shown(options.listen)}: the SDK connects to HOST:PORT only"


def _open_to_others(settings: Settings) -> Iterator[Finding]:
    options = settings.custom_logging
    if options is not None and not _is_ip(options.listen.rpartition(":")[0].strip("[]"), "is_loopback"):
        yield (
            (("custom_logging", "listen"),),
            f"{shown(options.listen)} is open to others; whoever reaches it can write to the dataset",
        )


def _workers(settings: Settings) -> Iterator[Finding]:
    listen = settings.proxy.listen
    if settings.proxy.workers > 1 and listen.startswith("unix:"):
        yield (
            (("proxy", "workers"), ("proxy", "listen")),
            f"{shown(listen)} can't be shared; use HOST:PORT, or one worker",
        )


def _destinations(settings: Settings) -> Iterator[Finding]:
    local = settings.storage.url.startswith("file:")
    urls = [(("storage", "url"), settings.storage.url), *_data_paths(settings)]
    remote = [(key, url) for key, url in urls if not url.startswith(("file:", "azureml:") if local else "file:")]
    for key, url in remote:
        if url.lower().startswith("azureml://datastores/") and settings.azureml is None:
            words = "of which workspace? Add 'azureml: {subscription_id: …, resource_group: …, workspace_name: …}'"
            yield (key, ("azureml",)), f"{shown(url)}: {words}"
        if key[0] == "data_collector" and _is_container(url):
            yield (key,), f"{shown(url)} is a whole container; name a folder in it, large bodies go to one beside it"
    if remote and settings.capture.max_inline_bytes > MAX_INLINE_BYTES:
        words = "is too large for lines that are shipped: a blob takes 100 MiB at once, and text may become six times as long"
        most = f"use at most {MAX_INLINE_BYTES // MIB}MiB"
        yield (("capture", "max_inline_bytes"),), f"{settings.capture.max_inline_bytes} {words}; {most}"


def _is_container(url: str) -> bool:
    host, *folders = url.partition("://")[2].split("/")
    return url.startswith("http") and len(folders) <= (1 if ".blob." in host else 2)


def _little_is_recorded(settings: Settings) -> Iterator[Finding]:
    enabled = _enabled(settings)
    if not enabled:
        yield (_COLLECTIONS,), "none is enabled; nothing is recorded; add 'request: {enabled: true}'"
    elif settings.custom_logging is not None and all(name in PAYLOAD_COLLECTIONS for name, _ in enabled):
        yield (
            (("custom_logging",), _COLLECTIONS),
            "no collection but request and response is enabled; every frame will be refused",
        )
    if settings.data_collector.sampling_rate == 0:
        yield (("data_collector", "sampling_rate"),), "0; a collection without a rate of its own records nothing"
    for name, one in enabled:
        if name not in PAYLOAD_COLLECTIONS:
            for near in difflib.get_close_matches(name.lower(), PAYLOAD_COLLECTIONS, n=1, cutoff=_NEAR):
                yield ((*_COLLECTIONS, name),), f"taken for custom logging; did you mean '{near}'?"
        if one.sampling_rate == 0:
            yield ((*_COLLECTIONS, name, "sampling_rate"),), "0; it records nothing"


def _captured_headers(settings: Settings) -> Iterator[Finding]:
    key = ("data_collector", "request_logging", "capture_headers")
    names = settings.data_collector.request_logging.capture_headers
    if names and not settings.capture.extended_fields:
        yield (key,), "not recorded; headers are extended fields, and capture.extended_fields is off"
    for name in names:
        if name.lower() in _CREDENTIALS:
            yield (key,), f"{shown(name)} carries credentials; they will be stored in clear"
