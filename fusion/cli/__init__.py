"""The command line: one file per command."""

from fusion.cli.main import main

__all__ = ["main"]
