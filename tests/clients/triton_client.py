"""What ``tritonclient[http]`` makes of a server. Runs in the environment of the clients; prints a line for each call.

``python triton_client.py HOST:PORT``, and on each line of its input the arguments of a call as JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import numpy as np
import tritonclient.http as triton


def call(client: triton.InferenceServerClient, what: dict[str, Any]) -> object:
    if what["call"] == "about":
        metadata = client.get_model_metadata("adder", headers={"X-Asked": "yes"})
        return [client.is_server_live(), client.is_model_ready("adder"), metadata]
    left = np.arange(what["size"], dtype=np.float32).reshape(1, -1) / 3
    right = np.full(left.shape, -0.5, dtype=np.float32)
    words = np.array([["é".encode(), b"\x00\xff"]], dtype=np.object_)
    inputs = [
        triton.InferInput("LEFT", list(left.shape), "FP32"),
        triton.InferInput("RIGHT", list(right.shape), "FP32"),
        triton.InferInput("WORDS", [1, 2], "BYTES"),
    ]
    inputs[0].set_data_from_numpy(left, binary_data=True)
    inputs[1].set_data_from_numpy(right, binary_data=what["binary"])
    inputs[2].set_data_from_numpy(words, binary_data=True)
    outputs = [triton.InferRequestedOutput(name, binary_data=what["binary"]) for name in ("SUM", "WORDS")]
    given = {
        "request_id": what["id"],
        "request_compression_algorithm": what["request_compression"],
        "response_compression_algorithm": what["response_compression"],
        "headers": {"x-request-id": what["id"]},
        "outputs": outputs if what["binary"] else outputs[:1],
    }
    if what["call"] == "many":
        running = [client.async_infer("adder", inputs, **given) for _ in range(what["count"])]
        answers = [one.get_result() for one in running]
    else:
        answers = [client.infer(what.get("model", "adder"), inputs, **given)]
    for answer in answers:
        np.testing.assert_array_equal(answer.as_numpy("SUM"), left + right)
        if what["binary"]:
            np.testing.assert_array_equal(answer.as_numpy("WORDS"), words)
    return [answers[0].get_response()["id"], hashlib.sha256((left + right).tobytes()).hexdigest()]


def main() -> None:
    with triton.InferenceServerClient(sys.argv[1], concurrency=8) as client:
        for line in sys.stdin:
            try:
                told = call(client, json.loads(line))
            except triton.InferenceServerException as error:
                told = [error.status(), error.message()]
            print(json.dumps(told), flush=True)


main()
