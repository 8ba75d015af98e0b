"""The command line: fusion fit, evaluate, predict, benchmark."""

from fusion.cli.main import main

__all__ = ["main"]
