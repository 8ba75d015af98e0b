"""Benchmarks: what README's figures come from."""
