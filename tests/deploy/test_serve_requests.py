"""Bodies of requests: what is read of them, and what is rejected, each with its status."""

import base64
import contextlib
import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from serving import JSON, Parity, asked, counted, encoded, parity_of, picture, png, service_of, version_of

from fusion.deploy.serve.limits import Limits, Rejected
from fusion.deploy.serve.model import bound_embedded_images
from fusion.deploy.serve.requests import Url, values_of
from fusion.processing.image import ImagePreprocessor
from fusion.processing.images import ImageSpec
from fusion.processing.table import TablePreprocessor

PICTURE = png(picture(0))
TABLE = TablePreprocessor(["price", "brand"], {"price": "number", "brand": "category"}, "standard", {"price": [1.0, 2.0]}, {"brand": ["a"]})
INPUTS = Parity().preprocessors | {"facts": TABLE, "photos": ImagePreprocessor(ImageSpec((8, 8)), max_images=3)}


def read(body: object, content_type: str = "application/json", **limits: float) -> dict[str, object]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return values_of(raw, content_type, INPUTS, Limits(**limits))  # type: ignore[arg-type]


def form(*parts: tuple[str, bytes], boundary: str = "frontier") -> bytes:
    lines = b"".join(
        b'--frontier\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), content) for name, content in parts
    )
    return lines + f"--{boundary}--\r\n".encode()


MULTIPART = "multipart/form-data; boundary=frontier"


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header announces a large image."""
    header, content = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), zlib.compress(bytes(10_000_000))
    chunks = ((b"IHDR", header), (b"IDAT", content), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


BOMB = bomb(60_000, 60_000)


def test_json_and_a_form_give_the_same_values():
    facts = {"price": 3.5, "brand": "a"}
    as_json = read({"image": encoded(PICTURE), "text": "é?", "facts": facts, "photos": [encoded(PICTURE), encoded(PICTURE[::-1])]})
    parts = [
        ("image", PICTURE),
        ("text", "é?".encode()),
        ("facts", json.dumps(facts).encode()),
        ("photos", PICTURE),
        ("photos", PICTURE[::-1]),
    ]
    assert as_json == read(form(*parts), MULTIPART)
    assert as_json == {"image": PICTURE, "text": "é?", "facts": facts, "photos": [PICTURE, PICTURE[::-1]]}


def test_base64_may_be_in_lines_or_a_data_url():
    for text in (base64.encodebytes(PICTURE).decode(), f"data:image/png;base64,{encoded(PICTURE)}"):
        assert read({"image": text}) == {"image": PICTURE}


def test_null_blank_and_empty_values_are_missing():
    given = {"text": "x", "image": "", "photos": [], "facts": {"price": None}}
    assert read(given) == read({"text": "x", "image": None, "photos": [None], "facts": None}) == {"text": "x"}
    assert read(form(("text", b"x"), ("image", b"")), MULTIPART) == {"text": "x"}


def test_columns_that_a_row_leaves_out_are_missing():
    assert read({"facts": {"brand": "a"}}) == {"facts": {"price": None, "brand": "a"}}


def test_a_url_is_told_from_base64():
    assert read({"image": "https://example.org/a.png"}) == {"image": Url("https://example.org/a.png")}
    assert isinstance(read({"image": "https://example.org/a.png"})["image"], Url)


BAD = {
    "truncated": (b'{"text": "a', "application/json", 400, "not JSON: Unterminated string"),
    "NaN": (b'{"facts": {"price": NaN}}', "application/json", 400, "NaN is not a JSON value"),
    "infinity": (b'{"facts": {"price": -Infinity}}', "application/json", 400, "-Infinity is not a JSON value"),
    "overflow": (b'{"facts": {"price": 1e999}}', "application/json", 422, "facts: price is not a finite number"),
    "deep": (b"[" * 100_000, "application/json", 400, "nested too deeply"),
    "digits": (b'{"text": ' + b"9" * 5000 + b"}", "application/json", 400, "not JSON"),
    "bytes": (b'{"text": "\xff"}', "application/json", 400, "not UTF-8"),
    "array": (b"[]", "application/json", 422, "an array; expected an object"),
    "empty": (b"", "application/json", 400, "not JSON"),
    "nothing": (b"{}", "application/json", 422, "none of image, text, facts, photos"),
    "name": (b'{"txet": "a"}', "application/json", 422, "unknown input 'txet'. Did you mean text?"),
    "number": (b'{"text": 3}', "application/json", 422, "text is a number; expected a string or null"),
    "object": (b'{"image": {}}', "application/json", 422, "image is an object; expected an image in base64"),
    "list": (b'{"facts": {"price": [1]}}', "application/json", 422, "facts: price is an array"),
    "row": (b'{"facts": "cheap"}', "application/json", 422, "facts is a string; expected an object with price, brand"),
    "column": (b'{"facts": {"prise": 1}}', "application/json", 422, "unknown column 'prise'. Did you mean price?"),
    "base64": (b'{"image": "not base64!"}', "application/json", 422, "image is not base64"),
    "data": (b'{"image": "data:image/png,abc"}', "application/json", 422, "a data URL without base64"),
    "one image": (b'{"image": ["aa==", "aa=="]}', "application/json", 422, "image has 2 images, expected at most 1"),
    "images": (b'{"photos": [' + b",".join([b'"aa=="'] * 9) + b"]}", "application/json", 422, "photos has 9 images, expected at most 8"),
    "long": (b'{"text": "%s"}' % (b"a" * 20_001), "application/json", 422, "text has 20,001 characters, limit 20,000"),
    "type": (
        b"text=a",
        "application/x-www-form-urlencoded",
        415,
        "application/x-www-form-urlencoded; expected application/json or multipart",
    ),
    "no type": (b"{}", "", 415, "missing"),
    "boundary": (form(("text", b"a")), "multipart/form-data", 400, "no boundary"),
    "other boundary": (form(("text", b"a")), "multipart/form-data; boundary=wall", 400, "not multipart"),
    "no end": (form(("text", b"a"), boundary="elsewhere"), MULTIPART, 400, "last boundary is missing"),
    "no name": (b"--frontier\r\n\r\na\r\n--frontier--\r\n", MULTIPART, 400, "no name"),
    "twice": (form(("text", b"a"), ("text", b"b")), MULTIPART, 422, "occurs twice"),
    "parts": (form(*[("image", b"a")] * 65), MULTIPART, 422, "more than 64 parts"),
    "form bytes": (form(("text", b"\xff")), MULTIPART, 400, "not UTF-8"),
    "form row": (form(("facts", b"{")), MULTIPART, 400, "not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_bad_body_has_its_status_and_reason(name):
    body, content_type, status, message = BAD[name]
    with pytest.raises(Rejected) as rejected:
        read(body, content_type)
    assert (rejected.value.status, message in rejected.value.message) == (status, True), rejected.value.message


def test_bad_requests_cost_no_other_one():
    """Each of them between good ones, all at once: every good one is answered, and each bad one has its 4xx."""
    bad = [
        (body, content_type, status)
        for name, (body, content_type, status, _) in BAD.items()
        if b"facts" not in body and b"photos" not in body
    ]
    bad += [
        (json.dumps({"image": encoded(content)}).encode(), "application/json", 422)
        for content in (BOMB, b"no image", PICTURE[:-30], b"\x93NUMPY")
    ]
    bad += [(b'{"text": "\\ud800"}', "application/json", 200)]  # Parity reads any character
    service = service_of(Parity())

    async def ask(client):
        import asyncio

        good = [client.post("/predict", json={"text": f"good {i}", "image": encoded(png(picture(i)))}) for i in range(len(bad))]
        wrong = [client.post("/predict", content=body, headers={"content-type": kind}) for body, kind, _ in bad]
        return await asyncio.gather(*(one for pair in zip(good, wrong, strict=True) for one in pair))

    answers = asked(service, ask)
    for i, answer in enumerate(answers[::2]):
        assert (answer.status_code, answer.json()["answer"]) == (200, parity_of(f"good {i}", picture(i)))
    for (body, _, status), answer in zip(bad, answers[1::2], strict=True):
        assert answer.status_code == status, (body[:50], answer.text)
    assert service.depth == service.memory == 0


def test_a_decompression_bomb_is_rejected_by_its_header():
    answer = asked(service_of(), lambda client: client.post("/predict", json={"image": encoded(BOMB)}))
    assert (answer.status_code, answer.json()["error"]) == (422, "its image can't be read: 3600.0 megapixels, limit 1")


def test_a_bomb_inside_an_icon_is_rejected_by_its_own_header(monkeypatch):
    inner = bomb(1_200, 1_000)
    icon = b"\x00\x00\x01\x00\x01\x00" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # restores it
    bound_embedded_images(1.0)
    answer = asked(service_of(), lambda client: client.post("/predict", json={"image": encoded(icon)}))
    assert answer.status_code == 422
    assert answer.json()["error"] == "its image can't be read: more megapixels than Pillow allows in this format"


def fuzzed(body: bytes, content_type: str) -> None:
    """Reads a body, which may be rejected, by a 4xx alone."""
    try:
        read(body, content_type)
    except Rejected as rejected:
        assert 400 <= rejected.status < 500  # noqa: PT017


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["http://a", "data:,", "aa=="]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*INPUTS, "price", "x"]), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*INPUTS, "other"]), ANYTHING, max_size=4))
def test_any_json_is_read_or_rejected_by_a_4xx(body):
    fuzzed(json.dumps(body).encode(), "application/json")


@given(
    st.binary(max_size=200),
    st.sampled_from(["application/json", MULTIPART, 'multipart/form-data; boundary="', "multipart/form-data; boundary=é"]),
)
def test_any_bytes_are_read_or_rejected_by_a_4xx(body, content_type):
    fuzzed(body, content_type)
    fuzzed(form(("text", body), ("facts", body)), content_type)


@given(st.text(st.characters(codec="latin-1"), max_size=60))  # as headers are decoded
def test_any_content_type_is_read_or_rejected_by_a_4xx(content_type):
    fuzzed(form(("text", b"a")), content_type)
    fuzzed(form(("text", b"a")), f"multipart/form-data; {content_type}")


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@given(st.binary(max_size=120), st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"]), st.integers(0, 400))
def test_any_image_is_read_or_rejected_by_a_4xx(content, kind, at):
    """Files with a part of them overwritten."""
    file = io.BytesIO()
    Image.fromarray(picture(0, 16)).save(file, kind)
    spoilt = file.getvalue()[:at] + content + file.getvalue()[at + len(content) :]
    with contextlib.suppress(Rejected):
        version_of(Parity(), "main").row({"image": spoilt})


def test_the_answer_names_what_was_present():
    service = service_of()

    async def ask(client):
        both = {"text": "ab", "image": encoded(png(picture(1)))}
        return [
            await client.post("/predict", json=both, headers={"x-request-id": "one"}),
            await client.post("/predict", json={"text": "ab"}),
            await client.post("/predict", files={"image": png(picture(1))}),
        ]

    both, text, image = asked(service, ask)
    answer = parity_of("ab", picture(1))
    odd = 0.75 if answer == "odd" else 0.25
    assert both.json() == {
        "id": "one",
        "answer": answer,
        "probabilities": {"even": 1 - odd, "odd": odd},
        "present": {"image": True, "text": True},
        "version": "main",
    }
    assert both.headers["x-request-id"] == "one"
    assert (text.json()["answer"], text.json()["present"]) == (parity_of("ab"), {"image": False, "text": True})
    assert (image.json()["answer"], image.json()["present"]) == (parity_of(None, picture(1)), {"image": True, "text": False})
    assert (
        counted(service, "fusion_missing_inputs_total", input="image") == counted(service, "fusion_missing_inputs_total", input="text") == 1
    )


def test_a_body_is_read_within_its_bounds():
    service = service_of(limits=Limits(max_body_mb=0.001))
    big = b'{"text": "%s"}' % (b"a" * 1000)

    async def ask(client):
        async def in_pieces():
            for start in range(0, len(big), 100):
                yield big[start : start + 100]

        return [
            await client.post("/predict", content=big, headers=JSON),
            await client.post("/predict", content=in_pieces(), headers=JSON),
            await client.post("/predict", content=b'{"text": "a"}', headers=JSON | {"content-encoding": "gzip"}),
            await client.post("/predict", content=b'{"text": "a"}', headers=JSON | {"x-request-id": "i" * 201}),
            await client.get("/predict"),
            await client.post("/predictions"),
        ]

    answers = asked(service, ask)
    assert [answer.status_code for answer in answers] == [413, 413, 415, 400, 405, 404]
    assert all("error" in answer.json() for answer in answers)
    assert service.memory == 0


def test_the_model_reads_images_of_the_preprocessors_limit():
    rgb = np.zeros((1200, 1000, 3), dtype=np.uint8)
    answer = asked(service_of(), lambda client: client.post("/predict", json={"image": encoded(png(rgb))}))
    assert answer.json()["error"] == "its image can't be read: 1.2 megapixels, limit 1"
