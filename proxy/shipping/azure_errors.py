"""What the SDK of Azure Storage raises, in the words of Store.

Errors are told apart by Azure's error codes:
https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from proxy.shipping.credentials import Opened, Secret
from proxy.shipping.store import AbsentError, BlobFullError, NotNow, OtherBlobError, PositionTakenError

if TYPE_CHECKING:
    from azure.core.exceptions import AzureError, HttpResponseError

_ROLE = "Storage Blob Data Contributor"
_OWN_WORDS = {
    "AccountIsDisabled": "the storage account is disabled; enable it, or see to its subscription",
    "AuthorizationSourceIPMismatch": "the SAS is for other addresses than this machine's; put one for these there",
    "UnauthorizedBlobOverwrite": "the right allows no overwriting; a SAS has to allow read, add, create and write (sp=racw)",
}
_NO_APPEND_BLOBS = frozenset(
    {
        "BlobTypeNotSupported",
        "BlobOperationNotSupported",
        "FeatureNotSupportedForAccount",
        "FeatureNotYetSupportedForHierarchicalNamespaceAccounts",
        "OperationNotSupportedOnPremiumStorage",
        "UnsupportedBlobType",
    }
)


class ExistsError(Exception):
    """What was to be made is there already."""


class BeyondError(Exception):
    """The blob ends before that."""


class azure_errors:  # noqa: N801
    """Turns what the SDK raises into the words of Store: ``with azure_errors(url, opened): …``."""

    def __init__(self, url: str, opened: Opened | None = None) -> None:
        self._url = url
        self._opened = opened

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None:
            return
        from azure.core.exceptions import (
            AzureError,
            ClientAuthenticationError,
            HttpResponseError,
            ServiceRequestTimeoutError,
            ServiceResponseTimeoutError,
        )

        if isinstance(error, HttpResponseError) and error.status_code is not None:
            raise _refusal(error, self._url, self._opened) from None
        if isinstance(error, ClientAuthenticationError):
            raise NotNow("identity", _no_identity(error, self._opened)) from None
        if isinstance(error, TimeoutError | ServiceRequestTimeoutError | ServiceResponseTimeoutError):
            raise NotNow("timeout", f"{_host(self._url)} does not answer in time.") from None
        if isinstance(error, AzureError):
            raise NotNow("unreachable", f"it can't be reached: {_connection_words(error, self._url)}.") from None
        if isinstance(error, ValueError | LookupError):  # of the SDK, which does not find what Azure's answers have
            raise NotNow("unexpected", f"{_host(self._url)} does not answer as Azure does.") from None


def _refusal(error: HttpResponseError, url: str, opened: Opened | None) -> Exception:
    code = _code(error)
    status = error.status_code or 0
    stated = {
        "AppendPositionConditionNotMet": PositionTakenError,
        "BlobNotFound": AbsentError,
        "BlockCountExceedsLimit": BlobFullError,
        "InvalidBlobType": OtherBlobError,
        "BlobAlreadyExists": ExistsError,
        "ContainerAlreadyExists": ExistsError,
        "InvalidRange": BeyondError,
    }.get(code)
    if stated is not None:
        return stated(url)
    if code in ("ContainerNotFound", "ContainerBeingDeleted", "ContainerDisabled"):
        return NotNow("container", f"there is no such container ({code}); make it, or correct storage.url.")
    if code in ("InvalidResourceName", "OutOfRangeInput"):
        return NotNow(
            "missing",
            f"the name of the container, or of a folder, is none that it takes ({code}); correct storage.url.",
        )
    if status == 404:
        if not code:  # a HEAD request has no body, and some servers no code
            return AbsentError(url)
        return NotNow("missing", f"it is not there ({code}); correct storage.url.")
    if code in _NO_APPEND_BLOBS:
        return NotNow(
            "account",
            f"this storage account has no append blobs ({code}); use a general-purpose v2 account "
            "(or a premium one for block blobs).",
        )
    if code.startswith("Lease"):
        return NotNow("conflict", f"somebody has leased the blob or the container ({code}); break the lease.")
    if code.startswith("BlobImmutable"):
        return NotNow("forbidden", f"the blob is immutable by a policy ({code}); allow protected append writes in it.")
    if status in (401, 403):
        return NotNow(*_forbidden(error, code, opened))
    refusal = f"{status} {code}".rstrip()
    if status in (408, 429, 503) or code in ("BlobModifiedWhileReading", "ServerBusy"):
        return NotNow("busy", f"it is busy ({refusal}).", _retry_after(error))
    if status >= 500:
        return NotNow("server", f"it has a fault of its own ({refusal}).", _retry_after(error))
    return NotNow("unexpected", f"it refuses this: {status} {code or error.reason}.", _retry_after(error))


def _forbidden(error: HttpResponseError, code: str, opened: Opened | None) -> tuple[str, str]:
    secret = opened.secret if opened is not None else None
    right = opened.right if opened is not None else "this machine's identity"
    if code in _OWN_WORDS:
        return "forbidden", f"{_OWN_WORDS[code]} ({code})."
    if code == "AuthorizationFailure":
        words = f"the account's firewall or network rules refuse this machine ({code})"
        return "forbidden", f"{words}." if secret is None else f"{words}, or {right} is wrong: {_doubt(secret)}."
    if code == "KeyBasedAuthenticationNotPermitted":
        return (
            "forbidden",
            f"the account allows no keys ({code}); unset {secret.source if secret else 'the key'} and use an identity.",
        )
    refusal = f"{error.status_code} {code}".rstrip()
    if secret is not None:
        return "forbidden", f"{right} is refused ({refusal}): {_doubt(secret)}."
    if code in ("AuthorizationPermissionMismatch", "InsufficientAccountPermissions", "AuthorizationPermissionDenied"):
        return "forbidden", (
            f"{right} may not write there ({code}); give it the role {_ROLE!r} on the account or the container "
            "(it takes some minutes until a role works)."
        )
    return "forbidden", (
        f"{right} is refused ({refusal}): it is of another tenant than the account, this machine's clock is wrong, "
        f"or it lacks the role {_ROLE!r}."
    )


def _doubt(secret: Secret) -> str:
    """What may be wrong with ``secret``."""
    if secret.sas_token is None:
        return "it is not this account's key, or this machine's clock is wrong"
    expires = parse_qs(secret.sas_token).get("se", [""])[0]
    with contextlib.suppress(ValueError):
        end = datetime.fromisoformat(expires)
        if (end if end.tzinfo else end.replace(tzinfo=UTC)) < datetime.now(UTC):
            return f"it has expired at {expires}; put a new one there"
    until = f"is valid until {expires}, and " if expires else ""
    return f"it {until}has to allow read, add, create and write (sp=racw) in this container; put a new one there"


def _no_identity(error: AzureError, opened: Opened | None) -> str:
    right = opened.right if opened is not None else "this machine's identity"
    tried = sorted(set(re.findall(r"\b(\w+)Credential:", str(error))))
    return (
        f"there is no token for {right} (tried: {', '.join(tried) or 'all ways'}). Use workload or managed identity, "
        "'az login', or set AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN."
    )


def _connection_words(error: AzureError, url: str) -> str:
    host = _host(url)
    cause = getattr(error, "inner_exception", None) or error
    text = str(getattr(cause, "os_error", None) or cause)
    if re.search(r"not known|nodename|getaddrinfo|no address|name resolution|domain name", text, re.IGNORECASE):
        return f"there is no host {host} (is the account's name right?)"
    text = " ".join(text.partition("?")[0].split())  # no query: a SAS would be in it
    return f"{host}: {text[:200].rstrip('.')}"


def _host(url: str) -> str:
    return urlsplit(url).netloc or url


def _code(error: HttpResponseError) -> str:
    code: Any = getattr(error, "error_code", None) or _headers(error).get("x-ms-error-code")
    return str(getattr(code, "value", code) or "")


def _headers(error: HttpResponseError) -> Mapping[str, str]:
    headers: Mapping[str, str] = getattr(error.response, "headers", {})
    return headers


def _retry_after(error: HttpResponseError) -> float:
    """In seconds; 0 if it does not say."""
    headers = _headers(error)
    for name, unit in (("retry-after-ms", 0.001), ("x-ms-retry-after-ms", 0.001), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            return max(0.0, float(headers[name]) * unit)
    with contextlib.suppress(KeyError, ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    return 0.0
