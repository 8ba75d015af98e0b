"""Fetches images by URL, of hosts on a list, in threads of its own: a slow host delays no other request."""

import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, HTTPResponse
from threading import BoundedSemaphore
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, build_opener

from fusion.deploy.serve.limits import Limits, Rejected, overloaded
from fusion.deploy.serve.requests import Url

THREADS = 16
CHUNK = 65_536


class NoRedirect(HTTPRedirectHandler):
    """A redirection would lead to a host that is not on the list."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Fetcher:
    """Fetches the images that a request names by URL.

    hosts: those that are allowed, host or host:port; with none, every URL is rejected. limits: of bodies, which hold for images too.
    """

    def __init__(self, hosts: Collection[str], limits: Limits) -> None:
        self.hosts, self.limits = {host.lower() for host in hosts}, limits
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="fetch") if hosts else None
        self.opener = build_opener(NoRedirect, ProxyHandler({}))
        self.room = BoundedSemaphore(4 * THREADS)

    def start(self, values: dict[str, Any], then: Callable[[dict[str, Any] | Rejected], None]) -> bool:
        """Fetch what the values name by URL, in another thread, which calls `then` with the values or the reason; False where none does.

        Raises Rejected for a URL that is not allowed.
        """
        urls = [url for value in values.values() for url in (value if isinstance(value, list) else [value]) if isinstance(url, Url)]
        if not urls:
            return False
        for url in urls:
            self.check(url)
        assert self.pool is not None
        if not self.room.acquire(blocking=False):
            raise overloaded("fetch", "too many images are being fetched")
        self.pool.submit(self.run, values, then)
        return True

    def check(self, url: Url) -> None:
        try:
            parts = urlsplit(url)
            names = {(parts.hostname or "").lower(), f"{parts.hostname or ''}:{parts.port or ''}".lower()}
        except ValueError:
            parts, names = urlsplit(""), set()
        if parts.scheme not in ("http", "https"):
            raise Rejected(422, "url", f"{url[:100]!r} is neither base64 nor an http URL")
        if not names & self.hosts:
            allowed = f"fetched only of {', '.join(sorted(self.hosts))}" if self.hosts else "not fetched by this server"
            raise Rejected(422, "url", f"images are {allowed}; send the image in base64")

    def run(self, values: dict[str, Any], then: Callable[[dict[str, Any] | Rejected], None]) -> None:
        result: dict[str, Any] | Rejected
        try:
            result = {
                name: [self.fetched(one) for one in value] if isinstance(value, list) else self.fetched(value)
                for name, value in values.items()
            }
        except Rejected as rejected:
            result = rejected
        finally:
            self.room.release()
        then(result)

    def fetched(self, value: Any) -> Any:
        """The bytes of a URL; any other value as it is."""
        if not isinstance(value, Url):
            return value
        end = time.monotonic() + self.limits.read_timeout_s
        try:
            with self.opener.open(str(value), timeout=self.limits.read_timeout_s) as response:
                return self.read(response, end)
        except HTTPError as error:
            raise Rejected(422, "url", f"{value[:200]} answered {error.code}") from None
        except (OSError, ValueError, HTTPException) as error:
            raise Rejected(422, "url", f"{value[:200]} can't be fetched: {str(error)[:200]}") from None

    def read(self, response: HTTPResponse, end: float) -> bytes:
        chunks, size = [], 0
        while chunk := response.read1(CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > self.limits.max_body:
                raise Rejected(422, "url", f"an image by URL has more than {self.limits.max_body_mb:g} MB")
            if time.monotonic() > end:
                raise Rejected(422, "url", f"an image by URL took longer than {self.limits.read_timeout_s:g} s")
        return b"".join(chunks)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
