"""A scoring script whose frames have the id of the request that they belong to.

Under Azure ML's inference server, behind payload-logger:  azmlinfsrv --entry_script score.py
Alone, with one sample:                                     python score.py
"""

import atexit
import json
import uuid

import pandas as pd
from azureml.ai.monitoring import Collector
from azureml.ai.monitoring.context import BasicCorrelationContext
from azureml.ai.monitoring.init import teardown

SPECIES = ["setosa", "versicolor", "virginica"]


def init():
    global inputs_collector, outputs_collector
    inputs_collector = Collector(name="model_inputs", on_error=print)
    outputs_collector = Collector(name="model_outputs", on_error=print)
    atexit.register(teardown, wait_for_flush=True)  # else what is not sent yet is lost with the process


def run(data, request_headers):
    inputs = pd.DataFrame(
        json.loads(data)["data"], columns=["sepal_length", "sepal_width", "petal_length", "petal_width"]
    )
    # payload-logger gives each request an x-request-id, or passes on the client's: request, response, inputs and outputs then
    # have the same correlationid. Without a context, the SDK makes up another one for inputs and outputs.
    context = BasicCorrelationContext(id=request_headers["X-Request-Id"])
    inputs_collector.collect(inputs, context)
    outputs = predict(inputs)
    outputs_collector.collect(outputs, context)
    return outputs.to_dict(orient="records")


def predict(inputs):
    return pd.DataFrame({"species": [SPECIES[min(2, int(length // 2.5))] for length in inputs["petal_length"]]})


if __name__ == "__main__":
    init()
    print(run('{"data": [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]}', {"X-Request-Id": str(uuid.uuid4())}))
