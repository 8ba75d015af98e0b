"""The Starlette application: predictions, health, metrics, documentation, control."""

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fusion.deploy.serve.control import Control
from fusion.deploy.serve.openapi import page_of, schema_of
from fusion.deploy.serve.predict import Predict
from fusion.deploy.serve.service import Service


def app_of(service: Service, control: Control) -> Starlette:
    """The application of a service; `service.start()` must be called in the event loop."""

    async def healthz(_: Request) -> Response:
        """Whether the process can work at all; if not, it should be restarted."""
        return PlainTextResponse("ok\n" if service.alive else "a thread has ended\n", status_code=200 if service.alive else 500)

    async def readyz(_: Request) -> Response:
        """Whether requests should be sent here."""
        reason = "draining" if service.draining else "" if service.alive else "a thread has ended"
        return PlainTextResponse(f"{reason or 'ready'}\n", status_code=503 if reason else 200)

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    async def openapi(_: Request) -> Response:
        return JSONResponse(schema_of(service))

    async def docs(_: Request) -> Response:
        return HTMLResponse(page_of(schema_of(service)))

    async def error(_: Request, raised: Exception) -> Response:
        assert isinstance(raised, HTTPException)
        return JSONResponse({"error": raised.detail}, status_code=raised.status_code, headers=raised.headers)

    routes: list[Any] = [
        Route("/predict", Predict(service), methods=["POST"]),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        Route("/docs", docs),
        *control.routes(),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: error})
