"""Optimisation: optimisers, schedules, groups of parameters, precision."""
