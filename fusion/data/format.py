"""How a manifest's file is written, where its name and its first bytes don't say."""

import codecs
from dataclasses import dataclass

from fusion.errors import UserError


@dataclass(frozen=True)
class Format:
    r"""How the manifest is written, where that differs from the usual. Raises UserError for values that cannot be.

    Args:
        encoding: encoding of CSV, TSV and JSON Lines, such as cp1252, latin-1, utf-16; it is never guessed.
        separator: the character between cells of CSV and TSV, "\t" for a tab; null: by the file's name, unless its header shows another.
        quotes: whether double quotes enclose cells; null: they do, except where tabs separate the cells, unless they enclose its header.
        missing: spellings of a missing cell besides the empty one, such as ["nan", "N/A"]; compared without blanks around.
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
        if self.separator == "\\t":  # as it comes from a shell
            object.__setattr__(self, "separator", "\t")
        if self.separator is not None and (len(self.separator) != 1 or self.separator in '"\r\n'):
            raise UserError(f"data.format.separator is {self.separator!r}; expected one character, such as ';' or '\\t'")

    @property
    def is_utf8(self) -> bool:
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")
