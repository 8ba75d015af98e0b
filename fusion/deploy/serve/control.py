"""Commands to a running server: which versions it serves; and their client."""

import asyncio
import hmac
import json
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

from starlette.requests import Request as Received
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fusion.deploy.serve.service import Service
from fusion.deploy.serve.versions import Load, Version, check_shares
from fusion.errors import UserError, nearest

LOCAL = ("127.0.0.1", "::1", "localhost", "testclient")
HEADER = "x-fusion-control"  # which a page in a browser can't send to another host without asking first
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")
TIMEOUT_S = 600.0  # a large model takes a while to load
COMMANDS = {
    "status": "print the versions, what is known of each, and what happened",
    "promote": "[VERSION]: make the canary or shadow the main version",
    "rollback": "end canaries and shadow; where there is none, return to the previous main version",
    "reload": "[PATH]: load the main version anew, or another one in its place, without losing a request",
    "canary": "PATH=5%: send a share of the requests to another version",
    "shadow": "PATH: send copies of all requests to another version",
}


class Control:
    """The commands of a service, as routes. Without a token, only requests from this machine, not forwarded by a proxy, are obeyed.

    load: loads and warms up a version, in a thread. token: which requests must carry, from wherever they come.
    """

    def __init__(self, service: Service, load: Load, batch_size: int, token: str | None = None) -> None:
        self.service, self.load, self.batch_size = service, load, batch_size
        self.token = token or None  # an empty one is none
        self.one_at_a_time = asyncio.Lock()

    def routes(self) -> list[Route]:
        status = Route("/control/status", self.status, methods=["GET"])
        return [status, *(Route(f"/control/{name}", partial(self.obey, name), methods=["POST"]) for name in COMMANDS if name != "status")]

    def refusal(self, request: Received) -> str | None:
        """Why a request is not obeyed."""
        if self.token is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            return None if hmac.compare_digest(given.encode(), self.token.encode()) else "the token is missing or wrong"
        host = request.headers.get("host", "").rpartition(":")[0].strip("[]") or request.headers.get("host", "")
        is_local = request.client is not None and request.client.host in LOCAL and host in LOCAL
        if not is_local or any(name in request.headers for name in FORWARDED):
            return "without a token, commands are taken from this machine only"
        return None if HEADER in request.headers else f"the header {HEADER} is missing"

    async def status(self, request: Received) -> Response:
        refused = self.refusal(request)
        return JSONResponse({"error": refused}, 403) if refused else JSONResponse(self.service.versions.summary())

    async def obey(self, name: str, request: Received) -> Response:
        refused = self.refusal(request)
        if refused:
            return JSONResponse({"error": refused}, 403)
        argument = request.query_params.get("argument") or None
        try:
            async with self.one_at_a_time:
                await getattr(self, name)(argument)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 409)
        self.service.show_shares()
        return JSONResponse(self.service.versions.summary())

    async def promote(self, name: str | None) -> None:
        self.service.versions.promote(name)

    async def rollback(self, _: str | None) -> None:
        self.service.versions.rollback()

    async def reload(self, path: str | None) -> None:
        versions = self.service.versions
        version = await self.loaded(path or versions.main.path)
        if version.name == versions.main.name:
            versions.note(f"{version.name} is unchanged")
            return
        versions.check(version)
        versions.replace_main(version, "loaded")

    async def canary(self, argument: str | None) -> None:
        path, share = canary_of(argument or "")
        check_shares([*(one for _, one in self.service.versions.canaries), share])
        self.service.versions.add_canary(await self.loaded(path), share)

    async def shadow(self, path: str | None) -> None:
        if not path:
            raise UserError("shadow: expected the path of a version")
        self.service.versions.add_shadow(await self.loaded(path))

    async def loaded(self, path: str) -> Version:
        return await asyncio.to_thread(ready, path, self.load, self.batch_size)


def ready(path: str, load: Load, batch_size: int) -> Version:
    """A version, loaded and warmed up."""
    version = Version(load(path), path)
    version.warm_up(batch_size)
    return version


def canary_of(text: str) -> tuple[str, float]:
    """Path and share of a canary. Raises UserError.

    >>> canary_of("packages/new=5%")
    ('packages/new', 0.05)
    """
    path, _, share = text.rpartition("=")
    try:
        number = float(share.removesuffix("%")) / 100 if share.endswith("%") else float("nan")
    except ValueError:
        number = float("nan")
    if not path or not 0 < number <= 1:
        raise UserError(f"canary {text!r}: expected PATH=SHARE%, above 0 and at most 100 %, as packages/new=5%")
    return path, number


# The client


def send_command(url: str, words: list[str], token: str | None = None, opener: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Sends a command to a server, and returns its summary of the versions. Raises UserError for one that is not obeyed."""
    name, argument = words[0] if words else "", words[1] if len(words) > 1 else ""
    if name not in COMMANDS or len(words) > 2:
        raise UserError(f"unknown command '{' '.join(words)}'. {nearest(name, COMMANDS)}")
    headers = {HEADER: "1"} | ({"Authorization": f"Bearer {token}"} if token else {})
    query = f"?{urlencode({'argument': argument})}" if argument else ""
    try:
        request = Request(f"{url.rstrip('/')}/control/{name}{query}", headers=headers, method="GET" if name == "status" else "POST")
        with (opener or build_opener(ProxyHandler({})).open)(request, timeout=TIMEOUT_S) as response:
            summary: dict[str, Any] = json.load(response)
            return summary
    except HTTPError as error:
        try:
            message = json.load(error)["error"]
        except (ValueError, KeyError, TypeError):
            message = f"status {error.code}"
        raise UserError(f"{name}: {message}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no server answers at {url} ({getattr(error, 'reason', error)})") from None
