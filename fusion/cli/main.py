"""The fusion command: finds the sub-command, and tells a user's mistake in one line."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version

from fusion.console import printing
from fusion.errors import INTERRUPTED, UNHEARD, USER_MISTAKE, UserError, message_of, nearest
from fusion.exit import leave

COMMANDS = {
    "fit": "train a model by recipe, or continue a run",
    "evaluate": "score a run on any split or manifest, also by group",
    "predict": "write a run's predictions for a manifest",
    "launch": "train by recipe on a Ray cluster",
    "schedule": "draw the learning rate over a recipe's updates, before training",
    "benchmark": "measure speed, memory, heads, several ranks, and runs that are killed",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The console command; ends the process with its status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print("usage: fusion COMMAND [OPTION ...]\n\n" + "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items()))
        print("\nfusion COMMAND --help tells a command's options.")
        raise SystemExit(0)
    if words[0] == "--version":
        print(version("fusion"))
        raise SystemExit(0)
    run(words[0], words[1:])


def run(name: str, arguments: Sequence[str] | None = None) -> None:
    """One command with its arguments (the process's own if None); ends the process with its status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    together = False
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command '{name}'. {nearest(name, COMMANDS)}")
        # Imported here, so that help and mistakes don't wait for torch.
        command: Callable[[list[str]], int] = getattr(import_module(f"fusion.cli.{name}"), name)
        with printing():
            status = command(words)
        together = True
    except UserError as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        status = USER_MISTAKE
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:
        if heard():  # it is another pipe that broke
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor does Python find it closed when it ends
        status = UNHEARD
    leave(status, together=together)


def heard() -> bool:
    """Whether what is printed is still read: not once a reader such as `head` has gone."""
    try:
        print(flush=True)  # flushing alone finds nothing left to write
    except BrokenPipeError:
        return False
    return True
