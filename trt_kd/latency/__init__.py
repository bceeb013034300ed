"""Latency of models that nobody built, from measurements of some that were."""
