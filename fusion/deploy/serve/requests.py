"""The body of a request, JSON or multipart: raw values of a model's inputs, checked."""

import binascii
import json
import math
from collections.abc import Mapping
from typing import Any

from fusion.deploy.serve.limits import Limits, Rejected
from fusion.deploy.serve.model import Reads
from fusion.deploy.serve.multipart import parts_of
from fusion.errors import nearest

MAX_IMAGES = 8  # of a sample
JSON, MULTIPART = "application/json", "multipart/form-data"


class Url(str):
    """Where an image is to be fetched from."""


def values_of(body: bytes, content_type: str, inputs: Mapping[str, Reads], limits: Limits) -> dict[str, Any]:
    """The raw values in a body, by input: a text, an image's bytes, a list of images (bytes or Url), a table's row by column.

    Missing ones are left out. Raises Rejected.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == JSON:
        given = object_of(body)
    elif kind == MULTIPART:
        given = form_of(body, content_type, inputs)
    else:
        raise Rejected(415, "content_type", f"the content type is {kind or 'missing'}; expected {JSON} or {MULTIPART}")
    return checked_values(given, inputs, limits)


def checked_values(given: Mapping[str, Any], inputs: Mapping[str, Reads], limits: Limits) -> dict[str, Any]:
    """The raw values in what was given, JSON's types and a form's bytes, by input. Raises Rejected."""
    values = {}
    for name, value in given.items():
        if name not in inputs:
            raise Rejected(422, "invalid", f"unknown input {name[:100]!r}. {nearest(name[:100], inputs)}")
        checked = CHECKS.get(inputs[name].form, scalar_of)(value, name, inputs[name], limits)
        if checked is not None:
            values[name] = checked
    if not values:
        raise Rejected(422, "invalid", f"the sample has none of {', '.join(inputs)}; at least one is needed")
    return values


# JSON


def reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON value")


DECODER = json.JSONDecoder(parse_constant=reject_constant)


def object_of(body: bytes) -> dict[str, Any]:
    """A JSON object; NaN and Infinity, which Python would read, are not JSON."""
    try:
        value = DECODER.decode(body.decode())
    except UnicodeDecodeError:
        raise Rejected(400, "malformed", "the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Rejected(400, "malformed", f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:  # a constant, a number of thousands of digits, deeply nested brackets
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise Rejected(400, "malformed", f"the body is not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise Rejected(422, "invalid", f"the body is {kind_of(value)}; expected an object with the inputs by name")
    return value


def kind_of(value: Any) -> str:
    """A JSON value's type, as JSON calls it.

    >>> [kind_of(value) for value in (None, True, 1.5, "a", [1], {})]
    ['null', 'a boolean', 'a number', 'a string', 'an array', 'an object']
    """
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), type(value).__name__)


# Multipart


def form_of(body: bytes, content_type: str, inputs: Mapping[str, Reads]) -> dict[str, Any]:
    """The parts of a form by name: images as bytes, texts decoded, a table's row as JSON."""
    given: dict[str, Any] = {}
    for name, content in parts_of(body, content_type):
        form = inputs[name].form if name in inputs else ""
        value: Any = content or None
        if value is not None and form == "table":
            value = object_of(content)
        elif value is not None and form != "image":
            try:
                value = content.decode()
            except UnicodeDecodeError:
                raise Rejected(400, "malformed", f"the part {name[:100]!r} is not UTF-8") from None
        if name in given and form != "image":
            raise Rejected(422, "invalid", f"the part {name[:100]!r} occurs twice")
        given[name] = [*given.get(name, []), value] if form == "image" else value
    return given


# Values


def text_of(value: Any, name: str, _: Reads, limits: Limits) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise Rejected(422, "invalid", f"{name} is {kind_of(value)}; expected a string or null")
    if len(value) > limits.max_text:
        raise Rejected(422, "too_long", f"{name} has {len(value):,} characters, limit {limits.max_text:,}")
    return value if value and not value.isspace() else None


def images_of(value: Any, name: str, preprocessor: Any, limits: Limits) -> Any:
    if not isinstance(value, list):
        return image_of(value, name)
    most = max_images_of(preprocessor)
    if len(value) > most:
        raise Rejected(422, "invalid", f"{name} has {len(value)} images, expected at most {most}")
    images = [image for image in (image_of(one, name) for one in value) if image is not None]
    return images if len(images) > 1 else images[0] if images else None


def max_images_of(preprocessor: Any) -> int:
    """How many images a sample may have: one, if every sample of train had at most one."""
    return MAX_IMAGES if preprocessor.max_images > 1 else 1


def image_of(value: Any, name: str) -> bytes | Url | None:
    """An image's bytes from base64 (also of a data: URL), or its URL."""
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise Rejected(422, "invalid", f"{name} is {kind_of(value)}; expected an image in base64, an array of images, or null")
    encoded = value
    if ":" in value[:8]:  # never in base64
        head, _, encoded = value.partition(",")
        if not head.startswith("data:"):
            return Url(value)
        if not head.endswith(";base64"):
            raise Rejected(422, "invalid", f"{name} is a data URL without base64")
    try:
        return binascii.a2b_base64(encoded, strict_mode=True) or None
    except ValueError:
        try:  # in lines, as written by many programs
            return binascii.a2b_base64("".join(encoded.split()), strict_mode=True) or None
        except ValueError as error:
            raise Rejected(422, "invalid", f"{name} is not base64: {error}") from None


def row_of(value: Any, name: str, preprocessor: Any, limits: Limits) -> dict[str, Any] | None:
    if value is None:
        return None
    columns = list(preprocessor.names)
    if not isinstance(value, dict):
        raise Rejected(422, "invalid", f"{name} is {kind_of(value)}; expected an object with {', '.join(columns)}")
    for column, cell in value.items():
        if column not in columns:
            raise Rejected(422, "invalid", f"{name} has an unknown column {column[:100]!r}. {nearest(column[:100], columns)}")
        scalar_of(cell, f"{name}: {column}", preprocessor, limits)
    row = {column: value.get(column) for column in columns}
    return row if any(cell is not None for cell in row.values()) else None


def scalar_of(value: Any, name: str, preprocessor: Reads, limits: Limits) -> Any:
    if isinstance(value, dict | list):
        raise Rejected(422, "invalid", f"{name} is {kind_of(value)}; expected a string, a number, a boolean or null")
    if isinstance(value, float) and not math.isfinite(value):  # 1e999
        raise Rejected(422, "invalid", f"{name} is not a finite number")
    return text_of(value, name, preprocessor, limits) if isinstance(value, str) else value


CHECKS = {"image": images_of, "text": text_of, "table": row_of}
