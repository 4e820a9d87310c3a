"""What a single configuration value may look like: one reader for each ``kind`` in settings.py. Pure.

A reader takes text as it stands in YAML or the environment, without blanks around it, and returns the value in its one
normal form (bytes, seconds, HOST:PORT, URL). It raises ValueError for anything else; the words for that are in KINDS.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from decimal import Decimal
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, unquote_to_bytes


class WrongValueError(ValueError):
    """A value is wrong in a way that the general words for its kind do not tell."""


_NUMBER = r"(?:\d[\d_]{0,17}(?:\.\d{0,18})?|\.\d{1,18})(?:e[+-]?\d{1,2})?"
_RATE = re.compile(_NUMBER, re.ASCII | re.IGNORECASE)
_SIZE = re.compile(rf"({_NUMBER})\s*([kmgt]i?)?b?", re.ASCII | re.IGNORECASE)
_DURATION = re.compile(rf"({_NUMBER})\s*(ms|s|m|min|h|d)?", re.ASCII | re.IGNORECASE)
_DURATION_UNITS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_TOKEN = re.compile(r"[!#$%&'+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, 5.6.2, but for *: it would be taken for a wildcard
_RULE = re.compile(r"(?:([A-Za-z-]+(?:\s*,\s*[A-Za-z-]+)*)\s+)?([/*]\S*)")
_AUTHORITY = re.compile(r"(\[[0-9A-Za-z:.%_-]+\]|[0-9A-Za-z._-]*)(?::([0-9]{1,5}))?")
_HTTP = re.compile(r"(https?)://([^/?#@\s]+)((?:/[^?#\s]*)?)", re.IGNORECASE)
_DATASTORE = re.compile(
    r"azureml://(subscriptions/[^/]+/resourcegroups/[^/]+/workspaces/[^/]+/)?datastores/[^/]+/paths(/[^/?#]+)+/?",
    re.IGNORECASE,
)
# Azure wants three letters at least, emulators not.
_CONTAINER = re.compile(r"(?!.*--)(?=.{1,63}$)[a-z0-9](?:[a-z0-9-]*[a-z0-9])?|\$web")
_DATA_LAKE = re.compile(
    r"(?:abfss?|wasbs?)://([a-z0-9-]+)@([a-z0-9]+)\.(?:dfs|blob)\.([a-z0-9.-]+)((?:/[^?#]*)?)"
    r"|https://([a-z0-9]+)\.dfs\.([a-z0-9.-]+)/([a-z0-9-]+)((?:/[^?#]*)?)"
)
_UNIX_PATH_BYTES = 107  # sockaddr_un on Linux


def _need(holds: object) -> None:
    if not holds:
        raise ValueError


def _matched(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    match = pattern.fullmatch(text)
    if match is None:
        raise ValueError
    return match


def _size(text: str) -> int:
    number, unit = _matched(_SIZE, text).groups(default="")
    power = " kmgt".index(unit[:1].lower() or " ")
    size = Decimal(number) * (1024 if unit[1:] else 1000) ** power
    _need(size < 2**63 and size == int(size))
    return int(size)


def _duration(text: str) -> float:
    number, unit = _matched(_DURATION, text).groups(default="s")
    return float(number) * _DURATION_UNITS[unit.lower()]


def _rate(text: str) -> float:
    rate = float(_matched(_RATE, text)[0])
    _need(rate <= 1)
    return rate


def _switch(text: str) -> bool:
    _need(text.lower() in _SWITCH)
    return _SWITCH[text.lower()]


def _integer(text: str) -> int:
    _need(re.fullmatch(r"\d[\d_]{0,17}", text, re.ASCII))
    return int(text)


def _authority(text: str) -> tuple[str, int | None]:
    host, digits = _matched(_AUTHORITY, text).groups()
    if host.startswith("["):
        host = f"[{IPv6Address(host[1:-1])}]"
    elif re.fullmatch(r"[0-9.]+", host):
        host = str(IPv4Address(host))
    _need(digits is None or int(digits) <= 65535)
    return host, None if digits is None else int(digits)


def _unix_socket(text: str) -> str:
    path = text.removeprefix("unix:")
    _need(path.startswith("/") and not path.endswith("/") and len(path.encode()) <= _UNIX_PATH_BYTES)
    return text


def _listen(text: str) -> str:
    if text.startswith("unix:"):
        return _unix_socket(text)
    host, port = _authority(text if ":" in text else f":{text}")
    _need(port is not None)
    return f"{host or '0.0.0.0'}:{port}"


def _upstream(text: str) -> str:
    if text.startswith("unix:"):
        return _unix_socket(text)
    if "://" not in text:
        _need(_authority(text)[1])  # without a scheme only HOST:PORT is clear
        text = f"http://{text}"
    scheme, authority, path = _matched(_HTTP, text).groups()
    host, port = _authority(authority)
    _need(host and port != 0 and path.isascii())
    return f"{scheme.lower()}://{host}{'' if port is None else f':{port}'}{path.rstrip('/')}"


def address(text: str) -> tuple[str, int]:
    """Host and port of a listen address or an upstream in normal form; a Unix socket is ``("unix:/PATH", -1)``."""
    if text.startswith("unix:"):
        return text, -1
    scheme, _, rest = text.rpartition("://")
    host, port = _authority(rest.partition("/")[0])
    return host.strip("[]"), port if port is not None else {"http": 80, "https": 443}[scheme]


def _has_dots(text: str) -> bool:
    return not {".", ".."}.isdisjoint(text.split("/"))


def _file_url(path: str) -> str:
    _need(path.isprintable())
    return Path("/" + os.path.normpath(Path(path).absolute()).lstrip("/")).as_uri()


def _blob_url(text: str) -> str:
    scheme, authority, path = _matched(_HTTP, text.rstrip("/")).groups()
    authority = authority.lower()
    host, folders = _authority(authority)[0], path.split("/")[1:]
    in_azure = ".blob." in host
    # Elsewhere, with Azurite, the account is the first folder. A dfs host speaks another protocol.
    _need(host and ".dfs." not in host and all(folders) and len(folders) >= (1 if in_azure else 2))
    _need(scheme.lower() == "https" or not in_azure)
    container = unquote(folders[0 if in_azure else 1])
    if not _CONTAINER.fullmatch(container):
        raise WrongValueError(
            f"has {shown(container)} for a container; its name is 3 to 63 lower-case letters, digits and single dashes"
        )
    return f"{scheme.lower()}://{authority}{path}"


def _management_url(text: str) -> str:
    scheme, authority, path = _matched(_HTTP, text).groups()
    host, _ = _authority(authority)
    _need(host and path in {"", "/"})
    _need(scheme.lower() == "https" or host in {"127.0.0.1", "localhost", "[::1]"})  # tokens are sent there
    return f"{scheme.lower()}://{authority}"


def _storage_url(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    if not separator:
        _need(text and not re.match(r"[A-Za-z][\w+.-]*:", text))  # file:/x and https:x are no paths
        first, _, path = text.partition("?")[0].partition("/")
        if re.search(r"\.(blob|dfs)\.", first, re.IGNORECASE):
            _, at, host = first.rpartition("@")
            host = re.sub(r"\.dfs\.", ".blob.", host, count=1, flags=re.IGNORECASE)  # dfs speaks another protocol
            url = "/".join(filter(None, (f"https://{host}", "CONTAINER" if at or not path else "", path)))
            raise WrongValueError(f"has no scheme; write {shown(url)}, or the absolute path if it is a folder")
        return _file_url(text)
    if scheme.lower() == "file":
        host, _, path = rest.partition("/")
        _need(host in {"", "localhost"} and not set("?#") & set(rest))
        return _file_url(os.fsdecode(unquote_to_bytes(f"/{path}")))
    if "?" in text:
        raise WrongValueError(
            "has a query; if that is a SAS it is a secret, and secrets come from the environment: AZURE_STORAGE_SAS_TOKEN"
        )
    if found := _DATA_LAKE.fullmatch(text.rstrip("/")):
        lake, account, cloud, path = found.groups()[:4] if found[1] else (found[7], found[5], found[6], found[8])
        raise WrongValueError(
            f"is spoken to in another protocol; for blobs the same place is https://{account}.blob.{cloud}/{lake}{path}"
        )
    _need("%" not in re.sub("%[0-9A-Fa-f]{2}", "", text) and not _has_dots(unquote(text)))
    if scheme.lower() != "azureml":
        return _blob_url(text)
    return f"azureml://{_matched(_DATASTORE, text)[0].rstrip('/').partition('://')[2]}"


def _data_path(text: str) -> str:
    _need(not _has_dots(unquote(text) if "://" in text else text))
    return _storage_url(text)


def _file_path(text: str) -> str:
    _need(text and "://" not in text)
    return text


def _header(text: str) -> str:
    return _matched(_TOKEN, text)[0]


def _segment(text: str) -> str:
    _need(text and text[0] not in "._" and not set("/\\") & set(text) and len(text.encode()) <= 255)
    return text


def _path_rule(text: str) -> str:
    methods, pattern = _matched(_RULE, text).groups(default="")
    return " ".join(filter(None, ("".join(methods.split()).upper(), pattern)))


def _text(text: str) -> str:
    _need(text)
    return text


class Kind(NamedTuple):
    """How a kind of value is read, and the words for it: "VALUE is not {noun}; use {use}"."""

    read: Callable[[str], object]
    noun: str
    use: str


_URLS = "file:///PATH, https://ACCOUNT.blob.core.windows.net/CONTAINER/FOLDER or azureml://datastores/NAME/paths/FOLDER"
KINDS = {
    "bytes": Kind(_size, "a size", "a number of bytes or one with a unit, like 64KiB, 4MB or 10GiB"),
    "seconds": Kind(_duration, "a duration", "a number of seconds or one with a unit, like 50ms, 30s, 10min or 1h"),
    "rate": Kind(_rate, "a rate", "a number from 0 to 1"),
    "switch": Kind(_switch, "a switch", "true or false"),
    "integer": Kind(_integer, "a whole number", "digits"),
    "listen": Kind(_listen, "a listen address", "HOST:PORT, [IPV6]:PORT, PORT or unix:/PATH"),
    "upstream": Kind(
        _upstream, "an upstream", "http://HOST:PORT, https://HOST:PORT or unix:/PATH, without user, query or fragment"
    ),
    "storage_url": Kind(_storage_url, "a destination", _URLS),
    "management_url": Kind(_management_url, "a control plane", "https://HOST"),
    "data_path": Kind(_data_path, "a data path", f"{_URLS}, without . and .. folders"),
    "path": Kind(_file_path, "a file path", "/PATH"),
    "header": Kind(_header, "a header name", "letters, digits and dashes, no wildcard"),
    "segment": Kind(_segment, "a name", "at most 255 bytes without / and \\, not beginning with . or _"),
    "path_rule": Kind(_path_rule, "a path rule", "PATTERN or 'METHOD,METHOD PATTERN'; a pattern begins with / or *"),
    "text": Kind(_text, "text", "one line"),
}


_SECRETS = (  # user info, queries, and whatever follows a telling word
    (re.compile(r"\S*@"), "…@"),
    (re.compile(r"\?.*", re.DOTALL), "?…"),
    (re.compile(r"(?is)(authorization|bearer|cookie|key|passw\w*|secret|sig|token)([\s=:]|--).*"), r"\1\2…"),
)


def shown(value: object) -> str:
    """A value as an error line has it: YAML's words, at most 60 characters, without secrets."""
    if not isinstance(value, str):
        words = {"NoneType": "null", "dict": "a mapping", "list": "a list"}
        return words.get(type(value).__name__, f"a {type(value).__name__}")
    text = value.strip()
    for pattern, left in _SECRETS:
        text = pattern.sub(left, text)
    if len(text) > 60:
        text = f"{text[:59]}…"
    return text if re.fullmatch(r"[-+]?(\d+\.?|\d*\.\d+)", text, re.ASCII) else repr(text)
