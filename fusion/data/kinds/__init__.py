"""Kinds of input, one file each: which columns they read, how cells are checked, fitted to and made into batches."""

from fusion.data.kinds.base import Kind
from fusion.data.kinds.image import ImageInput
from fusion.data.kinds.table import TableInput
from fusion.data.kinds.text import TextInput

__all__ = ["ImageInput", "Kind", "TableInput", "TextInput"]
