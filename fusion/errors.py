"""Mistakes that a person can mend, told in one line: what, where, what was expected, the nearest thing that would work."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in a recipe, an option or the data. The command line prints its message alone and exits with status 2."""


@contextmanager
def construction() -> Iterator[None]:
    """Around constructors of classes that know no UserError: the values and missing packages that they reject are the user's mistakes.

    Around nothing else: elsewhere a ValueError is a bug of ours, and keeps its traceback.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error


def message_of(error: UserError) -> str:
    r"""What a user's mistake says; from one that a loader's worker process met, without the worker's traceback, which torch puts before.

    >>> message_of(UserError("Caught UserError in DataLoader worker process 0.\nTraceback ...\nfusion.errors.UserError: a.png: missing"))
    'a.png: missing'
    """
    text = str(error).strip()
    return text.rpartition(f"\n{UserError.__module__}.{UserError.__name__}: ")[2] if text.startswith("Caught ") else text


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """A sentence with the known names closest to `name`, or all of them when none is close and they are few.

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


# What a command's process ends with.
USER_MISTAKE = 2
INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C
UNHEARD = 141  # what a shell reports for a command whose output nobody reads any more (SIGPIPE)
REQUEUE = 75  # EX_TEMPFAIL: stopped by SIGTERM or SIGUSR1, saved; a scheduler should start the command again
LOST_RANK = 69  # EX_UNAVAILABLE: another rank has died or is silent; the run goes on from its last checkpoint
