"""Parts of a multipart body that is in memory."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from fusion.deploy.serve.limits import Rejected

MAX_PARTS = 64


def parts_of(body: bytes, content_type: str) -> list[tuple[str, bytes]]:
    """Name and content of each part, in order. Raises Rejected for a malformed body."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise Rejected(400, "malformed", "the content type has no boundary")
    reader = Reader()
    try:
        parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Rejected(400, "malformed", f"the body is not multipart: {str(error).splitlines()[0][:200]}") from None
    if not reader.ended:
        raise Rejected(400, "malformed", "the body is not multipart: its last boundary is missing")
    return reader.parts


class Reader:
    """Collects the parts from the parser's callbacks."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, bytes]] = []
        self.header, self.value, self.name, self.ended = bytearray(), bytearray(), "", False
        self.content: list[bytes] = []

    def callbacks(self) -> dict[str, object]:
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end", "headers_finished", "end")
        return {f"on_{name}": getattr(self, f"on_{name}") for name in names}

    def on_part_begin(self) -> None:
        self.name, self.content = "", []
        if len(self.parts) >= MAX_PARTS:
            raise Rejected(422, "invalid", f"the body has more than {MAX_PARTS} parts")

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self.header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def on_header_end(self) -> None:
        if self.header.lower() == b"content-disposition":
            self.name = parse_options_header(bytes(self.value))[1].get(b"name", b"").decode(errors="replace")
        self.header, self.value = bytearray(), bytearray()

    def on_headers_finished(self) -> None:
        if not self.name:
            raise Rejected(400, "malformed", "a part of the body has no name")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.content.append(data[start:end])

    def on_part_end(self) -> None:
        self.parts.append((self.name, b"".join(self.content)))

    def on_end(self) -> None:
        self.ended = True
