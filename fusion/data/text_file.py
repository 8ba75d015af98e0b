"""The text of a manifest's file, decompressed and decoded by its format. An encoding is never guessed, but suggested where evident."""

import codecs
import gzip
import io
from collections.abc import Iterable, Iterator
from typing import IO, TextIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fusion.data.format import Format
from fusion.errors import UserError
from fusion.processing.undecodable import flaw_of_text

GZIP = b"\x1f\x8b"
NOT_TEXT = {b"PK\x03\x04": "a ZIP archive or an Excel workbook; save it as CSV", b"PAR1": "a Parquet file; name it .parquet"}
BYTE_ORDER_MARK = "\ufeff"
BLOCK = 2**20
LINE_FEED, CARRIAGE_RETURN = b"\n\r"


def open_bytes(path: str) -> IO[bytes]:
    """The file's bytes, decompressed if it begins as gzip does, whatever its name."""
    with open(path, "rb") as file:
        is_gzip = file.read(len(GZIP)) == GZIP
    return cast(IO[bytes], gzip.open(path)) if is_gzip else open(path, "rb")


def open_text(path: str, format: Format, newline: str = "") -> TextIO:
    """The file's text; newline: where lines end, as for `open`. Bytes that cannot be decoded become lone surrogates (see `undecodable`)."""
    with open_bytes(path) as file:
        reject_other_content(path, file.read(64), format)
    encoding = "utf-8-sig" if format.is_utf8 else format.encoding
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, errors="surrogateescape", newline=newline)


def reject_other_content(path: str, start: bytes, format: Format) -> None:
    for first, what in NOT_TEXT.items():
        if start.startswith(first):
            raise UserError(f"{path} begins as {what}")
    if not format.is_utf8:
        return
    encoding = ""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif len(start) > 3 and start[1::2].count(0) > len(start) / 4:  # every other byte of plain letters
        encoding = "utf-16-le"
    elif len(start) > 3 and start[::2].count(0) > len(start) / 4:
        encoding = "utf-16-be"
    if encoding:
        raise UserError(
            f"{path} is not UTF-8: it begins as UTF-16 does (bytes {start[:4].hex(' ')}). "
            f"Read it by --data.format.encoding={encoding}, or save it as UTF-8"
        )


def may_be_utf8(path: str) -> bool:
    """Whether a file is valid UTF-8 and not only ASCII, which text in another encoding hardly ever is."""
    decoder, ascii_only = codecs.getincrementaldecoder("utf-8")(), True
    with open_bytes(path) as file:
        try:
            while block := file.read(BLOCK):
                decoder.decode(block)
                ascii_only = ascii_only and block.isascii()
            decoder.decode(b"", final=True)
        except UnicodeError:
            return False
    return not ascii_only


class Lines:
    """The lines of a text file, each with its line break (\\n, \\r\\n or \\r), side by side in memory.

    array: (n,) their bytes in UTF-8; an undecodable byte of the file becomes a lone surrogate, which is not valid UTF-8.
    decodable: (n,) bool, lines without such a surrogate.
    """

    def __init__(self, path: str, format: Format) -> None:
        with open_bytes(path) as file:
            reject_other_content(path, file.read(64), format)
        with open_bytes(path) as file:
            raw = file.read()
        if not format.is_utf8:
            raw = raw.decode(format.encoding, "surrogateescape").encode("utf-8", "surrogatepass")
        raw = raw.removeprefix(codecs.BOM_UTF8)
        self.array = lines_of(raw)
        self.decodable = np.ones(len(self.array), dtype=bool)
        try:
            self.array.view(pa.large_string()).validate(full=True)
        except pa.ArrowInvalid:
            if format.is_utf8:
                self.array = lines_of(raw.decode("utf-8", "surrogateescape").encode("utf-8", "surrogatepass"))
            self.decodable = ~self.matching(rb"\xed[\xa0-\xbf]")

    def __len__(self) -> int:
        return len(self.array)

    def matching(self, pattern: str | bytes) -> np.ndarray:
        """(n,) bool: the lines in which a regular expression (RE2) has a match."""
        return pc.match_substring_regex(self.array, pattern).to_numpy(zero_copy_only=False)

    def texts(self, start: int) -> Iterator[str]:
        """The lines from line `start` on, counted from 0."""
        for i in range(start, len(self)):
            yield self.array[i].as_py().decode("utf-8", "surrogatepass")


def lines_of(raw: bytes) -> pa.Array:
    """(n,) large_binary: the lines of bytes, without a copy."""
    ends = [np.zeros(1, dtype=np.int64)]
    for start in range(0, len(raw), BLOCK):
        # Includes the byte after the block, since a carriage return at its end may be followed by a line feed there.
        block = np.frombuffer(raw, dtype=np.uint8, offset=start, count=min(BLOCK + 1, len(raw) - start))
        is_end, alone = block == LINE_FEED, block == CARRIAGE_RETURN
        if alone.any():
            alone[:-1] &= ~is_end[1:]
            is_end = is_end | alone
        ends.append(np.flatnonzero(is_end[:BLOCK]) + (start + 1))
    offsets = np.concatenate(ends)
    if offsets[-1] != len(raw):  # a last line without its break
        offsets = np.append(offsets, len(raw))
    return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(raw)])


def undecodable(cells: Iterable[tuple[str, str]], format: Format | None = None) -> str | None:
    """The flaw of the first cell that is not valid text, with the option that would read a file of this format; None if all are valid."""
    encoding = "UTF-8" if format is None or format.is_utf8 else format.encoding
    return flaw_of_text(cells, encoding, lambda byte: hint_of_encoding(byte, format))


def hint_of_encoding(byte: int, format: Format | None) -> str:
    """The option that reads the file in Windows' Western encoding (cp1252), if the byte is a letter there."""
    if format is None or not format.is_utf8:
        return ""
    try:
        letter = bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:
        return ""
    return f"; if it is '{letter}', read the file by --data.format.encoding=cp1252"
