"""Pruning of trained runs: structured, which makes them smaller and faster, and unstructured, which sets weights to zero."""
