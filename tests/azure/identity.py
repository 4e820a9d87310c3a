"""A managed identity on loopback, as Azure's App Service has it: IDENTITY_ENDPOINT and IDENTITY_HEADER.

Its tokens look like those of Entra ID, and nobody has signed them: Azurite with ``--oauth basic`` takes them, and looks at
audience, issuer and expiry. A token goes over HTTPS only, both with the SDK and with Azurite.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from aiohttp import web

TENANT = "11111111-2222-3333-4444-555555555555"
STORAGE = "https://storage.azure.com"
SECRET = "the-secret-of-the-endpoint"


def token(audience: str = STORAGE, lifetime_seconds: int = 3600, number: int = 1) -> str:
    """A token that ends so many whole seconds from now. Tokens with different numbers differ."""
    now = int(time.time())
    claims = {
        "aud": audience,
        "iss": f"https://sts.windows.net/{TENANT}/",
        "iat": min(now, now + lifetime_seconds),
        "nbf": min(now, now + lifetime_seconds),
        "exp": now + lifetime_seconds,
        "uti": str(number),
    }
    parts = (json.dumps(part).encode() for part in ({"typ": "JWT", "alg": "RS256", "kid": "none"}, claims))
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (*parts, b"not a signature"))


@dataclass
class Identity:
    """The endpoint. ``issued`` are the tokens so far, ``asked`` the queries. ``refuses`` is a status to answer with."""

    lifetime_seconds: int = 3600
    refuses: int | None = None
    port: int = 0
    issued: list[str] = field(default_factory=list)
    asked: list[dict[str, str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Where the credential finds it."""
        return {"IDENTITY_ENDPOINT": f"http://127.0.0.1:{self.port}/msi/token", "IDENTITY_HEADER": SECRET}

    async def _answer(self, request: web.Request) -> web.Response:
        if request.headers.get("X-IDENTITY-HEADER") != SECRET:
            return web.json_response({"statusCode": 401, "message": "the header is not the secret"}, status=401)
        self.asked.append(dict(request.query))
        if self.refuses is not None:
            return web.json_response({"statusCode": self.refuses, "message": "not now"}, status=self.refuses)
        resource, expires = request.query["resource"], int(time.time()) + self.lifetime_seconds
        self.issued.append(token(resource, self.lifetime_seconds, len(self.issued) + 1))
        return web.json_response(
            {
                "access_token": self.issued[-1],
                "expires_on": str(expires),
                "resource": resource,
                "token_type": "Bearer",
                "client_id": request.query.get("client_id", "00000000-0000-0000-0000-000000000000"),
            }
        )


@contextlib.asynccontextmanager
async def identity(lifetime_seconds: int = 3600) -> AsyncIterator[Identity]:
    """Runs the endpoint until the block ends. Its tokens live that many seconds, or what is set later."""
    endpoint = Identity(lifetime_seconds)
    application = web.Application()
    application.router.add_get("/msi/token", endpoint._answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        endpoint.port = site.port
        yield endpoint
    finally:
        await runner.cleanup()
