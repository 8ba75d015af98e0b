"""Option parser of the commands that take no recipe."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from fusion.errors import UserError, nearest


class Options(argparse.ArgumentParser):
    """argparse.ArgumentParser that raises UserError, naming the nearest option."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As in argparse, but reports a mistyped option rather than the required one that is therefore missing."""
        known = [option.removeprefix("--") for action in self._actions for option in action.option_strings if option.startswith("--")]
        for word in args or ():
            name = word.partition("=")[0].removeprefix("--")
            if word.startswith("--") and name not in known:
                raise UserError(f"{self.prog}: unknown option --{name}. {nearest(name, known)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")


def above_zero(text: str) -> int:
    """argparse type: an integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected an integer of at least 1")
    return number
