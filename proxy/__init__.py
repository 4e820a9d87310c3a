"""payload-logger: a reverse proxy that records traffic as Azure ML data-collector events."""

__version__ = "0.1.0"
