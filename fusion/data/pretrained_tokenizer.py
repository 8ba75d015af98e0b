"""The tokenizer that belongs to a pretrained model."""

import os

from fusion.encoders.pretrained import load_tokenizer
from fusion.errors import UserError
from fusion.processing.tokenizer import Tokenizer


def pretrained_tokenizer(name_or_path: str, *, max_length: int) -> Tokenizer:
    """The tokenizer that belongs to a transformers model. Raises UserError if it can't be loaded or is not a fast one."""
    source = os.path.expanduser(name_or_path)
    try:
        loaded = load_tokenizer(source if os.path.isdir(source) else name_or_path)
    except Exception as error:  # tokenizers raises plain Exception, transformers KeyError, for a file that isn't a tokenizer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"tokenizer of '{name_or_path}' could not be loaded ({reason}); expected tokenizer.json in that folder") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    # Without a vocabulary file transformers makes a tokenizer with an empty vocabulary.
    if backend is None or backend.get_vocab_size() <= len(loaded.all_special_tokens):
        raise UserError(f"tokenizer of '{name_or_path}' has no tokenizer.json; save it as a fast tokenizer there first")
    pad_id = loaded.pad_token_id if loaded.pad_token_id is not None else 0
    return Tokenizer(backend, pad_id=pad_id, max_length=max_length)
