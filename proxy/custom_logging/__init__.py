"""What the ``azureml-ai-monitoring`` SDK sends: frames of a scoring script, in collections of their own."""
