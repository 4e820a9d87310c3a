"""The secrets of storage accounts that the environment holds, for those that don't use an identity. Pure, but for reading files.

The names are those of Azure's command line: AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN.
With ``_FILE`` appended they name a file that holds the value, as secrets are mounted in containers; it is read again
when the destination refuses the secret.
"""

from __future__ import annotations

import base64
import binascii
import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs

from proxy.shipping.destination import Container
from proxy.shipping.store import NotNow

CONNECTION_STRING = "AZURE_STORAGE_CONNECTION_STRING"
KEY = "AZURE_STORAGE_KEY"
SAS_TOKEN = "AZURE_STORAGE_SAS_TOKEN"  # noqa: S105
_EMULATOR_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # published


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """An account key or a SAS, and the name of the variable that it comes from. Its value is never shown."""

    source: str
    account_key: str | None = None
    sas_token: str | None = None

    def __repr__(self) -> str:
        return f"Secret({self.source})"

    @property
    def of_one_container(self) -> bool:
        """Whether it is a SAS that is not the account's, and so may not make a container."""
        return self.sas_token is not None and "sr" in parse_qs(self.sas_token)


@dataclass(frozen=True, slots=True)
class Opened:
    """Where a store leads, and by what right: a secret, or an identity, that of ``client_id`` if there is one."""

    container: Container
    secret: Secret | None
    client_id: str | None

    @property
    def right(self) -> str:
        """In words."""
        if self.secret is None:
            return f"the identity with client id {self.client_id}" if self.client_id else "this machine's identity"
        return f"{'the account key' if self.secret.account_key else 'the SAS'} of {self.secret.source}"


def secret(environ: Mapping[str, str], container: Container, *, or_identity: bool = False) -> Secret | None:
    """The secret for ``container``; None: an identity is to be used. Raises NotNow when what is there can't be used.

    or_identity: there is an identity for this container, in case that the secret is another account's.
    """
    for name, read in ((CONNECTION_STRING, _from_connection_string), (KEY, _from_key), (SAS_TOKEN, _from_sas)):
        value, source = _value(environ, name)
        if value:
            try:
                return read(value, source, container)
            except _OtherAccountError:
                if not or_identity:
                    raise
                return None
    return None


class _OtherAccountError(NotNow):
    """The secret is another account's."""


def _value(environ: Mapping[str, str], name: str) -> tuple[str, str]:
    if environ.get(name, "").strip():
        return environ[name].strip(), name
    file = environ.get(f"{name}_FILE", "")
    if not file:
        return "", name
    # What is no path may be the secret itself, and is not shown. Path.exists raises if it is too long.
    if not os.path.exists(file):  # noqa: PTH110
        raise NotNow(
            "identity",
            f"{name}_FILE names no file that exists (or none that may be read); "
            "it takes the path of a file that holds the secret, not the secret itself.",
        )
    try:
        text = Path(file).read_text().strip()
        reason = "" if text else "it is empty"
    except (OSError, ValueError) as error:
        text, reason = "", (error.strerror or "") if isinstance(error, OSError) else "it is no text"
    if not text:
        raise NotNow("identity", f"{name}_FILE: can't read {file}: {reason}.")
    return text, f"{name}_FILE"


def _from_connection_string(text: str, source: str, container: Container) -> Secret:
    parts = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        key, separator, value = part.partition("=")
        if not separator:
            raise NotNow("identity", f"{source} is no connection string: it has to be NAME=VALUE;NAME=VALUE;…")
        parts[key.strip().lower()] = value.strip()
    if parts.get("usedevelopmentstorage", "").lower() == "true":
        parts = {"accountname": "devstoreaccount1", "accountkey": _EMULATOR_KEY}
    account = parts.get("accountname")
    if account is not None and account != container.account:
        raise _OtherAccountError(
            "identity", f"{source} is for the account {account!r}, the destination is {container.url}."
        )
    if parts.get("accountkey"):
        return _from_key(parts["accountkey"], source, container)
    if parts.get("sharedaccesssignature"):
        return _from_sas(parts["sharedaccesssignature"], source, container)
    raise NotNow("identity", f"{source} has neither AccountKey nor SharedAccessSignature.")


def _from_key(text: str, source: str, _container: Container) -> Secret:
    try:
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise NotNow("identity", f"{source} is no account key: it has to be base64, as the portal shows it.") from None
    return Secret(source, account_key=text)


def _from_sas(text: str, source: str, _container: Container) -> Secret:
    token = text.partition("?")[2] or text
    if "sig=" not in token:
        raise NotNow("identity", f"{source} is no SAS: it has to be sv=…&sig=…, as the portal shows it.")
    return Secret(source, sas_token=token)
