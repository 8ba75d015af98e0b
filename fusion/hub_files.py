"""Files of models on a Hugging Face Hub: downloaded and uploaded by huggingface_hub's client, whose errors become one line."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fusion.errors import UserError, first_line

SCHEME = "hf://"
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
MISSING = "models on a hub need huggingface_hub: pip install huggingface_hub, or this package with its extra hub"
LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"


class HubModel(NamedTuple):
    """A model's name on a hub.

    repository: USER/NAME. revision: a branch, tag or commit; None: the main branch.
    """

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> "HubModel":
        """The model of [hf://]USER/NAME[@REVISION]. Raises UserError for other forms.

        >>> HubModel.parse("hf://ada/shoes@v1"), HubModel.parse("ada/shoes")
        (HubModel(repository='ada/shoes', revision='v1'), HubModel(repository='ada/shoes', revision=None))
        """
        repository, at, revision = name.removeprefix(SCHEME).partition("@")
        if not NAME.fullmatch(repository) or (at and not revision):
            prefix = SCHEME if name.startswith(SCHEME) else ""
            raise UserError(f"'{name}' is no model of a hub; expected {prefix}USER/NAME or {prefix}USER/NAME@REVISION")
        return cls(repository, revision or None)

    def __str__(self) -> str:
        return SCHEME + self.repository + (f"@{self.revision}" if self.revision else "")


def is_hub_name(run: object) -> bool:
    """Whether this is hf://USER/NAME, rather than a path."""
    return isinstance(run, str) and run.startswith(SCHEME)


def download(model: HubModel, files: Sequence[str]) -> Path:
    """The folder with these files of a model, all of one commit; from the client's cache where they are there already, which is all that is
    used without a network.

    Raises UserError for a model, a revision or a file that doesn't exist, and for a hub that can't be reached.
    """
    with client(model.repository, model.revision) as hub:
        folder = Path(hub.snapshot_download(model.repository, revision=model.revision, allow_patterns=list(files)))
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(f"{model} has no {' and no '.join(missing)}: it was not pushed by fusion")
    return folder


def upload(repository: str, files: Mapping[str, Path | bytes], *, private: bool, message: str) -> str:
    """Commit files to a model's repository, which is made if there is none; returns the commit's page.

    Args:
        repository: USER/NAME.
        files: by name, the path of a file or its content.
        private: make a repository that only its owners can read.
        message: of the commit.

    Raises UserError without a login, for a repository that may not be written to, and if `private` but it exists and is public.
    """
    if not NAME.fullmatch(repository):
        raise UserError(f"'{repository}' is no name of a model on a hub; expected USER/NAME")
    with client(repository) as hub:
        if hub.get_token() is None:
            raise UserError(f"can't push {repository}: not logged in to {hub.constants.ENDPOINT}; {LOG_IN}")
        api = hub.HfApi()
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError(f"{repository} exists and is public; make it private in its settings, or push to another name")
        operations = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
        return api.create_commit(repository, operations, commit_message=message).commit_url


@contextmanager
def client(repository: str, revision: str | None = None) -> Iterator[Any]:
    """Context for calls of huggingface_hub alone, which it provides: raises their errors as a UserError. Shows progress on a terminal."""
    try:
        import huggingface_hub as hub
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    except ImportError as error:
        raise UserError(MISSING) from error
    silent = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if silent:
        disable_progress_bars()
    try:
        yield hub
    except UserError:
        raise
    except Exception as error:  # of any type: those of the client, of its HTTP library, and of the system
        raise UserError(explained(error, repository, revision)) from error
    finally:
        if silent:
            enable_progress_bars()


def explained(error: Exception, repository: str, revision: str | None) -> str:
    """One line about an error of the client."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if type(error) is RuntimeError and isinstance(error.__cause__, Exception):  # of one file of several
        error = error.__cause__
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return f"'{repository}' is no name of a model on a hub: {first_line(error)}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} on {hub} has no revision '{revision}'; expected a branch, a tag or a commit, such as main"
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} on {hub} is gated: ask for access on its page, and {LOG_IN}"
    if status == 401 and "Invalid" in str(response.headers.get("X-Error-Message")):
        return f"{hub} rejects the token: {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no model {repository} on {hub}, or it is private: if so, {LOG_IN}"
    if status == 403:
        return f"{hub} does not allow this account to write to {repository}; push to a name of your own, or use a token that may write"
    uncached = isinstance(error, errors.LocalEntryNotFoundError)
    cause = error.__cause__ if uncached and isinstance(error.__cause__, Exception) else error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set"
    elif uncached or type(cause).__module__.startswith("httpx"):  # the client's HTTP library: httpx, httpx2
        reason = first_line(cause)
    else:
        return f"{repository} on {hub}: {type(error).__name__}: {first_line(error)}"
    cached = f", nor is it in the cache {constants.HF_HUB_CACHE}" if uncached else ""
    return f"can't reach {repository} on {hub} ({reason}){cached}"
