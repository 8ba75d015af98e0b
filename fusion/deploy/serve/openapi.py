"""The description of the interface: openapi.json for programs, and a page for people that loads nothing from elsewhere."""

import html
import json
from typing import Any

from fusion.deploy.serve.requests import max_images_of
from fusion.deploy.serve.service import Service
from fusion.deploy.serve.versions import Version

IMAGE = {"type": "string", "description": "a file (JPEG, PNG, ...) in base64, a data: URL, or an http URL of an allowed host"}
SCALAR = {"type": ["string", "number", "boolean", "null"]}
ERROR = {"type": "object", "properties": {"id": {"type": "string"}, "error": {"type": "string"}}, "required": ["error"]}
STATUSES = {
    "400": "malformed JSON, NaN, a malformed form",
    "408": "the body came too slowly",
    "413": "the body is too large",
    "415": "neither JSON nor multipart",
    "422": "wrong types, unknown inputs, an unreadable or too large image, a text that is too long, no input at all",
    "500": "the model failed for this sample",
    "503": "overloaded: try again after Retry-After seconds",
}


def schema_of(service: Service) -> dict[str, Any]:
    """OpenAPI 3.1, for the inputs of the present main version."""
    version = service.versions.main
    request = {
        "required": True,
        "content": {
            "application/json": {"schema": json_schema(version), "example": example_of(version)},
            "multipart/form-data": {"schema": form_schema(version)},
        },
    }
    id = {"name": "X-Request-ID", "in": "header", "schema": {"type": "string", "maxLength": 200}, "description": "returned with the answer"}
    errors = {
        status: {"description": what, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
        for status, what in STATUSES.items()
    }
    answer = {"description": "the answer", "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Answer"}}}}
    operation = {"summary": "The answer for one sample", "parameters": [id], "requestBody": request, "responses": {"200": answer} | errors}
    return {
        "openapi": "3.1.0",
        "info": {"title": "fusion", "version": version.name, "description": "A trained model over HTTP."},
        "paths": {"/predict": {"post": operation}}
        | {
            path: {"get": {"summary": what, "responses": {"200": {"description": "yes"}, refused: {"description": "no"}}}}
            for path, what, refused in (("/healthz", "Whether the process works", "500"), ("/readyz", "Whether to send requests", "503"))
        }
        | {"/metrics": {"get": {"summary": "Counters for Prometheus", "responses": {"200": {"description": "in text"}}}}},
        "components": {"schemas": {"Answer": answer_schema(version), "Error": ERROR}},
    }


def json_schema(version: Version) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for name, one in version.inputs.items():
        if one.form == "image":
            properties[name] = {"oneOf": [IMAGE, {"type": "array", "items": IMAGE, "maxItems": max_images_of(one)}, {"type": "null"}]}
        elif one.form == "text":
            properties[name] = {"type": ["string", "null"]}
        elif one.form == "table":
            columns = dict.fromkeys(version.reads[name][1:], SCALAR)
            properties[name] = {"type": ["object", "null"], "properties": columns, "additionalProperties": False}
        else:
            properties[name] = SCALAR
    return {"type": "object", "properties": properties, "additionalProperties": False, "minProperties": 1}


def form_schema(version: Version) -> dict[str, Any]:
    file = {"type": "string", "format": "binary"}
    kinds = {"image": file, "table": {"type": "string", "description": "a JSON object"}}
    return {"type": "object", "properties": {name: kinds.get(one.form, {"type": "string"}) for name, one in version.inputs.items()}}


def answer_schema(version: Version) -> dict[str, Any]:
    numbers = {"oneOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "array", "items": {"type": "number"}}]}
    properties = {
        "id": {"type": "string"},
        "answer": {"description": "a class, a list of labels, a number, numbers, or an object of these by task"},
        "probabilities": {"type": "object", "additionalProperties": {"type": "number"}, "description": "of classes and labels"},
        "values": numbers | {"description": "of other tasks"},
        "present": {"type": "object", "properties": {name: {"type": "boolean"} for name in version.inputs}},
        "version": {"type": "string", "description": "which model has answered"},
    }
    return {"type": "object", "properties": properties, "required": ["id", "answer", "present", "version"]}


def example_of(version: Version) -> dict[str, Any]:
    examples = {"image": "iVBORw0KGgo...", "text": "a text"}
    return {
        name: dict.fromkeys(version.reads[name][1:], 1) if one.form == "table" else examples.get(one.form, "a value")
        for name, one in version.inputs.items()
    }


def page_of(schema: dict[str, Any]) -> str:
    """The same for people."""
    post = schema["paths"]["/predict"]["post"]
    example = json.dumps(post["requestBody"]["content"]["application/json"]["example"])
    statuses = "".join(f"<tr><td>{status}<td>{html.escape(one['description'])}" for status, one in post["responses"].items())
    others = "".join(f"<li><code>GET {path}</code> {html.escape(one['get']['summary'])}" for path, one in list(schema["paths"].items())[1:])
    body = html.escape(json.dumps(post["requestBody"]["content"], indent=2))
    answer = html.escape(json.dumps(schema["components"]["schemas"]["Answer"], indent=2))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>fusion</title>'
        "<style>body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}pre{background:#f4f4f4;padding:1em;"
        "overflow:auto}td{padding-right:1em}</style>"
        f"<h1>fusion</h1><p>Version <code>{html.escape(schema['info']['version'])}</code>, as <a href='openapi.json'>openapi.json</a>"
        f"<h2><code>POST /predict</code></h2><p>{html.escape(post['summary'])}."
        f"<pre>curl -X POST -H 'content-type: application/json' -d '{html.escape(example)}' http://HOST:PORT/predict</pre>"
        f"<h3>Request</h3><pre>{body}</pre><h3>Answer</h3><pre>{answer}</pre><h3>Statuses</h3><table>{statuses}</table>"
        f"<h2>Others</h2><ul>{others}</ul></html>"
    )
