"""Scoring scripts: Azure's own, word for word, and what there is to change for one id from request to outputs.

Source: https://learn.microsoft.com/azure/machine-learning/how-to-collect-production-data
"""

from __future__ import annotations

DOCUMENTED = """\
import pandas as pd
import json
from azureml.ai.monitoring import Collector

def init():
  global inputs_collector, outputs_collector, inputs_outputs_collector

  # instantiate collectors with appropriate names, make sure align with deployment spec
  inputs_collector = Collector(name='model_inputs')
  outputs_collector = Collector(name='model_outputs')

def run(data):
  # json data: { "data" : {  "col1": [1,2,3], "col2": [2,3,4] } }
  pdf_data = preprocess(json.loads(data))

  # tabular data: {  "col1": [1,2,3], "col2": [2,3,4] }
  input_df = pd.DataFrame(pdf_data)

  # collect inputs data, store correlation_context
  context = inputs_collector.collect(input_df)

  # perform scoring with pandas Dataframe, return value is also pandas Dataframe
  output_df = predict(input_df)

  # collect outputs data, pass in correlation_context so inputs and outputs data can be correlated later
  outputs_collector.collect(output_df, context)

  return output_df.to_dict()

def preprocess(json_data):
  # preprocess the payload to ensure it can be converted to pandas DataFrame
  return json_data["data"]

def predict(input_df):
  # process input and return with outputs
  ...

  return output_df
"""

DOCUMENTED_WITH_IDS = """\
import pandas as pd
import json
from azureml.ai.monitoring import Collector
from azureml.ai.monitoring.context import BasicCorrelationContext

def init():
  global inputs_collector, outputs_collector, inputs_outputs_collector

  # instantiate collectors with appropriate names, make sure align with deployment spec
  inputs_collector = Collector(name='model_inputs')
  outputs_collector = Collector(name='model_outputs')

def run(data):
  # json data: { "data" : {  "col1": [1,2,3], "col2": [2,3,4] } }
  pdf_data = preprocess(json.loads(data))

  # tabular data: {  "col1": [1,2,3], "col2": [2,3,4] }
  input_df = pd.DataFrame(pdf_data)

  # create a context with a custom unique id
  artificial_context = BasicCorrelationContext(id='test')

  # collect inputs data, store correlation_context
  context = inputs_collector.collect(input_df, artificial_context)

  # perform scoring with pandas Dataframe, return value is also pandas Dataframe
  output_df = predict(input_df)

  # collect outputs data, pass in context so inputs and outputs data can be correlated later
  outputs_collector.collect(output_df, context)

  return output_df.to_dict()

def preprocess(json_data):
  # preprocess the payload to ensure it can be converted to pandas DataFrame
  return json_data["data"]

def predict(input_df):
  # process input and return with outputs
  ...

  return output_df
"""

# A model in place of the page's dots.
MODEL = "output_df = pd.DataFrame({'sum': input_df.sum(axis=1)})"
SCORE = DOCUMENTED.replace("...", MODEL)
SCORE_WITH_IDS = DOCUMENTED_WITH_IDS.replace("...", MODEL)

# The three ways to the id of the request under azureml-inference-server-http.
OF_FLASK = SCORE_WITH_IDS.replace("import json\n", "import json\nfrom flask import request\n").replace(
    "id='test'", "id=request.headers['x-request-id']"
)
OF_PARAMETER = SCORE_WITH_IDS.replace("def run(data):", "def run(data, request_headers):").replace(
    "id='test'", "id=request_headers['X-Request-Id']"
)
OF_RAW_REQUEST = (
    SCORE_WITH_IDS.replace(
        "import json\n", "import json\nfrom azureml_inference_server_http.api.aml_request import rawhttp\n"
    )
    .replace("def run(data):", "@rawhttp\ndef run(request):")
    .replace("json.loads(data)", "request.get_json()")
    .replace("id='test'", "id=request.headers['x-request-id']")
)
