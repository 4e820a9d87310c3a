"""Probes, metrics and status."""
