"""Runs: what stands in a run's folder."""
