"""Loading of transformers models by hub name or folder, with one clear error for what is missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file, logging

from fusion.errors import UserError, first_line


class Source:
    """A hub name or a folder.

    name: as given. path: what transformers' functions take. what: of the errors, "text encoder". alternatives: the sentences that end them.
    """

    def __init__(self, name: str, what: str, alternatives: str) -> None:
        folder = Path(name).expanduser()
        self.name, self.what, self.alternatives = name, what, alternatives
        self.path = str(folder) if folder.is_dir() else name
        self.described = f"folder {folder}" if folder.is_dir() else f"hub name or folder {name}"

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Context for transformers' own functions: raises their errors as a UserError."""
        logging.set_verbosity_error()
        try:
            yield
        except UserError:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            tried = f"tried {self.described}: {first_line(error)}"
            raise UserError(f"{self.what}: could not load ({tried}). {self.alternatives}") from error

    def weights(self, model_class: Any, config: Any, dtype: torch.dtype, **options: Any) -> nn.Module:
        """The model with its weights, in one file or in shards. Raises UserError where any is missing or has another shape."""
        # Weights of another shape are then reported, with the missing ones, and rejected below.
        more = {"config": config, "dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        with self.loading():
            try:
                model, report = model_class.from_pretrained(self.path, **more, **options)
            except TypeError:
                if not options:
                    raise
                model, report = model_class.from_pretrained(self.path, **more)
        missing = sorted(report["missing_keys"]) + sorted(
            f"{key}: {tuple(shape)} where {tuple(expected)} is expected" for key, shape, expected in report["mismatched_keys"]
        )
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise UserError(
                f"{self.what}: {self.described} is missing {len(missing)} of the model's weights ({shown}), which would be random. "
                f"{self.alternatives}"
            )
        return model

    def file(self, name: str) -> Path | None:
        """The path of one of its files; None where it has none of that name, or isn't available."""
        try:
            path = cached_file(
                self.path,
                name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        except (OSError, ValueError):  # not a name that a hub could have
            return None
        return None if path is None else Path(path)


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a hub name or folder, the fast one where it has both: SigLIP's own class is slow and needs further packages.

    Raises transformers' errors, of any type, for a missing or corrupt tokenizer.
    """
    try:
        loaded = AutoTokenizer.from_pretrained(path)
    except ImportError:  # sentencepiece
        return PreTrainedTokenizerFast.from_pretrained(path)
    return loaded if hasattr(loaded, "backend_tokenizer") else PreTrainedTokenizerFast.from_pretrained(path)


def recompute_blocks(body: Any, what: str) -> None:
    """Activation checkpointing of a transformers model. Raises UserError if it has none."""
    # transformers before 5.2 has only the older name.
    enable = getattr(body, "activation_checkpointing_enable", None) or body.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"{what}: a {body.config.model_type} does not support activation checkpointing") from error
