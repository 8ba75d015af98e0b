"""The fusion command: runs the sub-command, and prints a user's mistake as one line."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version

from fusion.console import printing
from fusion.errors import INTERRUPTED, OUTPUT_CLOSED, USER_MISTAKE, UserError, message_of, nearest
from fusion.exit import leave
from fusion.extras import installed

COMMANDS = {
    "fit": "train a model from a recipe, or resume a run",
    "evaluate": "score a run on any split or manifest, optionally by group",
    "predict": "write a run's predictions for a manifest",
    "index": "embed a manifest's images and texts for search",
    "search": "find the images of a text, or the texts of an image",
    "export": "write a run as a package for ONNX Runtime, torch.export or AOTInductor",
    "shrink": "make a run's model smaller, with size, latency and scores before and after",
    "push": "share a run's model on the Hugging Face Hub",
    "serve": "serve a run or a package over HTTP",
    "launch": "train from a recipe on a Ray cluster",
    "schedule": "plot a recipe's learning rate over its updates, without training",
    "benchmark": "measure speed, memory, heads, several ranks, and recovery from kills",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The console command; exits with the sub-command's status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print("usage: fusion COMMAND [OPTION ...]\n\n" + "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items()))
        print("\nfusion COMMAND --help lists a command's options.")
        raise SystemExit(0)
    if words[0] == "--version":
        print(version("fusion"))
        raise SystemExit(0)
    run(words[0], words[1:])


def run(name: str, arguments: Sequence[str] | None = None) -> None:
    """Run one command with these arguments (those of the process if None) and exit with its status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    together = False
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command '{name}'. {nearest(name, COMMANDS)}")
        # Imported here, so that help and mistyped commands don't wait for torch.
        with installed(f"fusion {name}"):
            command: Callable[[list[str]], int] = getattr(import_module(f"fusion.cli.{name}"), name)
        with printing(), installed(f"fusion {name}"):  # some packages are imported when they are needed
            status = command(words)
        together = True
    except UserError as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        status = USER_MISTAKE
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:
        if stdout_is_open():  # another pipe broke
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's flush at exit doesn't fail as well
        status = OUTPUT_CLOSED
    leave(status, together=together)


def stdout_is_open() -> bool:
    """Whether the output still has a reader; False once a reader such as `head` has exited."""
    try:
        print(flush=True)  # flush alone has nothing to write, and so would not fail
    except BrokenPipeError:
        return False
    return True
