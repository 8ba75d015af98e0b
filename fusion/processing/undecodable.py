"""Texts that are not valid: lone surrogates, which stand for bytes that could not be decoded."""

from collections.abc import Callable, Iterable


def flaw_of_text(cells: Iterable[tuple[str, str]], encoding: str = "UTF-8", hint: Callable[[int], str] = lambda byte: "") -> str | None:
    """The flaw of the first cell (of column name and text) that is not valid text; None if all are valid.

    Lone surrogates stand for bytes, as in Python's surrogateescape.

    Args:
        cells: column names and texts.
        encoding: in which the text was to be decoded, for the message.
        hint: what the message adds for a byte.
    """
    for name, cell in cells:
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            code = ord(cell[error.start])
            if not 0xDC80 <= code <= 0xDCFF:
                return f"not UTF-8 (lone surrogate U+{code:04X} in column {name})"
            return f"not {encoding} (byte 0x{code - 0xDC00:02x} in column {name}{hint(code - 0xDC00)})"
    return None
