"""Benchmarks: the measurements reported in README."""
