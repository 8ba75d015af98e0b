"""Errors that a user can fix, reported in one line: what is wrong, where, what was expected, and the nearest thing that would work."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in a recipe, an option or the data. The command line prints its message alone and exits with status 2."""


@contextmanager
def construction() -> Iterator[None]:
    """Context for constructors that don't raise UserError: converts their ValueError and ImportError (invalid values, missing packages).

    For constructors only: elsewhere a ValueError is a bug of this library, and its traceback must be shown.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error


def message_of(error: UserError) -> str:
    r"""The message of a UserError; of one from a data loader's worker process without its traceback, which torch puts before it.

    >>> message_of(UserError("Caught UserError in DataLoader worker process 0.\nTraceback ...\nfusion.errors.UserError: a.png: missing"))
    'a.png: missing'
    """
    text = str(error).strip()
    return text.rpartition(f"\n{UserError.__module__}.{UserError.__name__}: ")[2] if text.startswith("Caught ") else text


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """A sentence with the known names closest to `name`, or if none is close, with the first 20 of them.

    >>> nearest("Gatd", ["Gated", "Concat", "LogitMean"])
    'Did you mean Gated?'
    >>> nearest("xyz", ["Gated", "Concat"])
    'Known: Concat, Gated.'
    """
    known = sorted(set(known))
    folded = {candidate.lower(): candidate for candidate in known}
    close = [folded[match] for match in get_close_matches(name.lower(), folded, n=most, cutoff=0.6)]
    if close:
        return f"Did you mean {' or '.join(close)}?"
    if not known:
        return "None is known."
    shown = ", ".join(known[:20])
    return f"Known: {shown}." if len(known) <= 20 else f"Known: {shown} and {len(known) - 20} more."


# Exit statuses of the commands
USER_MISTAKE = 2
INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C
OUTPUT_CLOSED = 141  # what a shell reports for a command whose output pipe was closed (SIGPIPE)
REQUEUE = 75  # EX_TEMPFAIL: stopped by SIGTERM or SIGUSR1, saved; a scheduler should start the command again
LOST_RANK = 69  # EX_UNAVAILABLE: another rank has died or doesn't respond; the run continues from its last checkpoint
