"""No payload and no secret is anywhere but in the dataset: canaries go in everywhere, and all that was written is searched."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import signal
from pathlib import Path

import pytest
import yaml

from tests.azure.blob_server import ACCOUNT, blob_server
from tests.azure.faults import always, refused
from tests.drills.load import proxy_process, until
from tests.harness import exchange, model_server
from tests.processes.admin import admin_port, get
from tests.relay.wire import Script

CANARY = "CANARY5417"
KEY = base64.b64encode(CANARY.encode() * 4).decode()
SIGNATURE = f"sv=2023-11-03&ss=b&srt=sco&sp=rwlac&se=2100-01-01T00%3A00%3A00Z&sig={CANARY}"
CREDENTIALS = {
    "connection string": {
        "AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};"
        "BlobEndpoint={account_url};"
    },
    "SAS": {"AZURE_STORAGE_SAS_TOKEN": SIGNATURE},
    "key": {"AZURE_STORAGE_KEY": KEY},
}
SECRETS = "\r\n".join(
    f"{name}: {CANARY}" for name in ("Authorization", "Cookie", "X-Api-Key", "Api-Key", "X-Tenant", "Traceparent")
)
BODY = json.dumps({"text": CANARY})


def post(body: str, *, headers: str = SECRETS, target: str = f"/score?key={CANARY}") -> bytes:
    content_type = "" if "Content-Type" in headers else "Content-Type: application/json\r\n"
    return (
        f"POST {target} HTTP/1.1\r\nHost: h\r\n{content_type}{headers}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    ).encode()


ANSWER = (
    f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nSet-Cookie: {CANARY}\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}"
).encode()
WRONG_ANSWERS = [
    f"HTTP/1.1 200 OK\r\nContent-Length: 5{CANARY}\r\n\r\n{BODY}".encode(),
    f"{CANARY} what is that\r\n\r\n".encode(),
    ANSWER[:-3],
    f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{CANARY}\r\n".encode(),
]
REQUESTS = [
    *[post(BODY)] * (len(WRONG_ANSWERS) + 2),
    post(BODY[:-2]),  # no JSON
    post(f"\0\1{CANARY}"),
    post(BODY, headers=f"X Bad: {CANARY}"),
    post(BODY, headers=f"Transfer-Encoding: {CANARY}"),
    post(BODY, headers=f"Host: {CANARY}@"),
    post(BODY, headers=f"{CANARY}: " + "x" * 200_000),
    post(BODY, target=f"nowhere{CANARY}"),
    f"{CANARY}\r\n\r\n".encode(),
    b"\x16\x03\x01" + CANARY.encode(),
]
FRAME = "Content-Type: application/octet-stream\r\nce-type: azureml.inference.model_inputs\r\nce-source: s\r\n"
# Of a frame, the log names the collection that it asks for: who sent it needs to be told.
FRAMES = [
    post(f'[{{"a": "{CANARY}"}}]', headers=FRAME + SECRETS, target="/modeldata/log"),
    post(f'{{"a": "{CANARY}"}}', headers=FRAME + SECRETS, target="/modeldata/log"),
    post(f'[{{"a": {CANARY}}}]', headers=FRAME + SECRETS, target="/modeldata/log"),
    post(f'[{{"a": "{CANARY}"}}]', headers="ce-type: azureml.inference.no_such", target="/modeldata/log"),
    post(f'[{{"a": "{CANARY}"}}]', headers="ce-type: wrong", target=f"/modeldata/{CANARY}"),
]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("credential", CREDENTIALS)
async def test_no_canary_is_found(tmp_path: Path, credential: str, workers: int) -> None:
    config = tmp_path / "c.yaml"
    sections = {
        "data_collector": {
            "collections": {name: {"enabled": True} for name in ("request", "response", "model_inputs")},
        },
        "custom_logging": {"listen": "127.0.0.1:0", "sdk_config_path": str(tmp_path / "mdc.json")},
        "logs": {"format": "json", "level": "debug"},
        "admin": {"listen": "127.0.0.1:0"},
        "spool": {"path": str(tmp_path / "spool")},
        "storage": {"ship_interval": "50ms"},
    }
    config.write_text(yaml.safe_dump(sections))
    async with (
        blob_server() as server,
        model_server(Script(*WRONG_ANSWERS, ANSWER, close=True)) as model,
    ):
        server.faults = always(refused(403, "AuthorizationFailure"))
        environment = {
            name: value.replace("{account_url}", server.account_url) for name, value in CREDENTIALS[credential].items()
        }
        async with proxy_process(
            model.url,
            f"{server.account_url}/c",
            log_folder=tmp_path,
            environment=environment,
            config=config,
            proxy__workers=workers,
        ) as running:
            frames_port = int(running.log().partition("custom logging on 127.0.0.1:")[2].partition(".")[0])
            for request in REQUESTS:
                with contextlib.suppress(ConnectionError):  # an answer that was cut
                    await exchange(running.port, request)
            for request in FRAMES:
                answer = await exchange(frames_port, request)
                assert answer.startswith(b"HTTP/1.1 ")
            _, cut = await asyncio.open_connection("127.0.0.1", running.port)
            cut.write(post(BODY)[:-3])
            cut.close()
            await until(lambda: "shipping fails" in running.log())
            server.faults = None
            await until(lambda: "shipping goes on" in running.log(), 60)
            said = [(await get(admin_port(running), path))[1] for path in ("/status", "/metrics")]
            config.write_text("proxy: [nonsense")
            running.signal(signal.SIGHUP)
            await until(lambda: "Not reloaded" in running.log())
            running.signal(signal.SIGTERM)
            assert await running.exit_status() == 0
        assert any(CANARY.encode() in blob.data for blob in server.blobs.values())  # they did go in
        assert len(server.blobs) >= 3
    said += [f"{path.name}: {path.read_text()}" for path in tmp_path.rglob("*") if path.is_file()]
    assert len(said) >= 4  # the log and the SDK's configuration among them
    for text in said:
        assert CANARY not in text
        assert KEY not in text
    for line in (tmp_path / "proxy.log").read_text().splitlines():
        assert {"time", "level", "logger", "message"} <= json.loads(line).keys()
    assert "Traceback" not in (tmp_path / "proxy.log").read_text()
