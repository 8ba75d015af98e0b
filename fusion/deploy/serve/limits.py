"""What the server accepts, and how it rejects the rest."""

from dataclasses import dataclass, fields

from fusion.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Bounds on requests and on the work in progress. Raises UserError for a bound that is not above 0.

    Args:
        max_body_mb: larger bodies are rejected with 413, before they are read where the client announces their size.
        max_megapixels: larger images are rejected by their headers, before they are decoded.
        max_text: characters of a text.
        max_queue: requests in progress; further ones are rejected with 503 and Retry-After.
        max_memory_mb: bodies of all requests in progress together; further ones are rejected with 503.
        max_connections: open connections; further ones are answered with 503 and closed.
        read_timeout_s: time in which a client must have sent a request; else 408.
        timeout_s: a request that has waited longer for the model is rejected with 503.
        keep_alive_s: idle connections are closed after this time.
    """

    max_body_mb: float = 10.0
    max_megapixels: float = 25.0
    max_text: int = 20_000
    max_queue: int = 512
    max_memory_mb: float = 512.0
    max_connections: int = 1000
    read_timeout_s: float = 10.0
    timeout_s: float = 30.0
    keep_alive_s: float = 75.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise UserError(f"--{field.name} is {getattr(self, field.name)}; expected a number above 0")

    @property
    def max_body(self) -> int:
        """In bytes."""
        return int(self.max_body_mb * 1e6)

    @property
    def max_memory(self) -> int:
        """In bytes."""
        return int(self.max_memory_mb * 1e6)


class Rejected(Exception):
    """A request that gets no answer.

    status: of HTTP. reason: one word, by which rejections are counted. message: for the client. retry_after_s: when to try again, for 503.
    """

    def __init__(self, status: int, reason: str, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.message, self.retry_after_s = status, reason, message, retry_after_s


def overloaded(reason: str, message: str, waiting: int = 0, per_second: float = 0.0) -> Rejected:
    """A 503, with the seconds in which `waiting` requests are done at the present rate, between 1 and 30.

    >>> overloaded("queue", "the queue is full", waiting=500, per_second=100.0).retry_after_s
    5
    """
    seconds = round(waiting / per_second) if per_second > 0 else 1
    return Rejected(503, reason, message, retry_after_s=min(max(seconds, 1), 30))
