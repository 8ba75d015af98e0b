"""Structured pruning of a model: what can be removed, and the widths that are left, from which it is rebuilt."""
