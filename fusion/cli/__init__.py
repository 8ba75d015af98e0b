"""The command line: one file a command."""

from fusion.cli.main import main

__all__ = ["main"]
