"""The format of a manifest's file, where its name and its first bytes don't determine it."""

import codecs
from dataclasses import dataclass

from fusion.errors import UserError


@dataclass(frozen=True)
class Format:
    r"""The format of the manifest, where it differs from the default. Raises UserError for invalid values.

    Args:
        encoding: encoding of CSV, TSV and JSON Lines, such as cp1252, latin-1, utf-16; it is never guessed.
        separator: the character between cells of CSV and TSV, "\t" for a tab; null: by the file's name, unless its header shows another.
        quotes: whether double quotes enclose cells; null: they do, except that in tab-separated files only if they enclose the header's.
        missing: spellings of a missing cell besides the empty one, such as ["nan", "N/A"]; surrounding blanks are ignored.
    """

    encoding: str = "utf-8"
    separator: str | None = None
    quotes: bool | None = None
    missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.missing, str):
            object.__setattr__(self, "missing", (self.missing,))
        try:
            "".encode(self.encoding)
        except (LookupError, ValueError):
            raise UserError(
                f"data.format.encoding is '{self.encoding}', which Python does not know; expected utf-8, cp1252, latin-1, utf-16, ..."
            ) from None
        if self.separator == "\\t":  # as typed in a shell
            object.__setattr__(self, "separator", "\t")
        if self.separator is not None and (len(self.separator) != 1 or self.separator in '"\r\n'):
            raise UserError(f"data.format.separator is {self.separator!r}; expected one character, such as ';' or '\\t'")

    @property
    def is_utf8(self) -> bool:
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")
