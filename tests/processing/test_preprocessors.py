"""Raw values to arrays without torch, and back from plain data."""

import json
import subprocess
import sys
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.errors import UserError
from fusion.processing.answers import Classes, Labels, Numbers, OrderedClasses, SeveralAnswers, Similarities, answering_of, state_of
from fusion.processing.image import ImagePreprocessor
from fusion.processing.images import ImageSpec
from fusion.processing.preprocessor import Preprocessor
from fusion.processing.raw_columns import text_column
from fusion.processing.table import TablePreprocessor, scale_of, scaled
from fusion.processing.text import TextPreprocessor
from fusion.processing.tokenizer import Tokenizer

TEXTS = ["is there a red circle?", "a blue square", "is it red"]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def table() -> TablePreprocessor:
    numbers = np.array([1.0, 2.0, 2.0, 5.0])
    scales, known = {"price": scale_of(numbers, "quantile")}, {"brand": ["a", "b"]}
    return TablePreprocessor(["price", "brand"], {"price": "number", "brand": "category"}, "quantile", scales, known)


PREPROCESSORS: dict[str, tuple[Preprocessor, list[Any]]] = {
    "image": (ImagePreprocessor(ImageSpec((4, 5))), [None, picture(0), picture(1)]),
    "several images": (ImagePreprocessor(ImageSpec((4, 5)), 3), [None, picture(0), (picture(1), picture(2)), (picture(3),) * 3]),
    "text": (TextPreprocessor(Tokenizer.train(TEXTS, vocab_size=60, max_length=8)), [None, *TEXTS]),
    "table": (table(), [None, ("1.5", "a"), (None, "c"), ("9", None)]),
}


@pytest.mark.parametrize("name", PREPROCESSORS)
@given(chosen=st.lists(st.integers(0, 2), min_size=1, max_size=6), cut=st.integers(0, 6))
def test_batches_that_are_put_together_mean_the_same_as_one_batch(name: str, chosen: list[int], cut: int) -> None:
    preprocessor, cells = PREPROCESSORS[name]
    sample = [cells[i] for i in chosen]
    parts = [preprocessor.batch(part, {}) for part in (sample[:cut], sample[cut:]) if part]
    whole, joined = preprocessor.batch(sample, {}), preprocessor.concat(parts)
    for one, other in zip(meaning(whole), meaning(joined), strict=True):
        assert np.array_equal(one, other)


def meaning(arrays: Any) -> list[Any]:
    """The arrays, but of several images in a sample those that each sample shows: they may be numbered differently."""
    if getattr(arrays, "image_index", None) is None:
        return [one for one in arrays if one is not None]
    shown = [arrays.pixels[index[mask]] for index, mask in zip(arrays.image_index, arrays.image_mask, strict=True)]
    return [arrays.present, *shown]


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_a_preprocessor_is_rebuilt_from_json(name: str) -> None:
    preprocessor, cells = PREPROCESSORS[name]
    again = type(preprocessor).of_state(json.loads(json.dumps(preprocessor.state())))
    for one, other in zip(preprocessor.batch(cells, {}), again.batch(cells, {}), strict=True):
        assert np.array_equal(one, other)


@given(st.floats(1e-3, 1 - 1e-3))
def test_quantiles_are_scaled_to_those_of_the_normal_distribution(share: float) -> None:
    levels = np.linspace(0, 1, 1001)
    assert scaled(np.array([share]), levels.tolist(), "quantile")[0] == pytest.approx(NormalDist().inv_cdf(share), abs=1e-9)


ANSWERINGS = {
    "classes": (Classes(["no", "yes"]), [[0.2, 0.8], [0.9, 0.1]], ["yes", "no"]),
    "ordered": (OrderedClasses(["1", "2", "3"]), [[0.4, 0.3, 0.3], [0.5, 0.0, 0.5]], ["2", "1"]),
    "labels": (Labels(["a", "b"], [0.5, 0.9]), [[0.6, 0.8], [0.1, 0.95]], [["a"], ["b"]]),
    "numbers": (Numbers(["price"], [10.0], [2.0]), [[0.5], [-1.0]], [11.0, 8.0]),
    "quantiles": (Numbers(["price"], [10.0], [2.0], 3, 1), [[-1.0, 0.5, 1.0]], [11.0]),
    "similarities": (Similarities(["similarity"]), [[3.0, 4.0, 9.0, 4.0, 3.0, 7.0]], [pytest.approx(24 / 25)]),
}


@pytest.mark.parametrize("name", ANSWERINGS)
def test_answers_are_the_same_after_a_trip_through_json(name: str) -> None:
    answering, values, expected = ANSWERINGS[name]
    again = answering_of(json.loads(json.dumps(state_of(answering))))
    array = np.array(values, dtype=np.float32)
    assert answering.answers(array) == again.answers(array) == expected
    assert np.array_equal(answering.in_units(array), again.in_units(array))


def test_several_tasks_answer_side_by_side() -> None:
    several = SeveralAnswers(["x_no", "x_yes", "y_price"], {"x": ANSWERINGS["classes"][0], "y": ANSWERINGS["numbers"][0]}, [2, 1])
    again = answering_of(json.loads(json.dumps(state_of(several))))
    assert again.answers(np.array([[0.2, 0.8, 0.5]], dtype=np.float32)) == [{"x": "yes", "y": 11.0}]
    assert again.in_units(np.array([[0.2, 0.8, 0.5]])).tolist() == [[0.2, 0.8, 11.0]]


def test_a_package_has_no_code_for_answers_of_ones_own() -> None:
    class Own(Classes):
        form = "own"

    with pytest.raises(UserError, match="Own can't be part of a package"):
        state_of(Own(["a"]))
    with pytest.raises(UserError, match=r"unknown answers 'klasses'\. Did you mean classes"):
        answering_of({"form": "klasses"})


def test_processing_needs_neither_torch_nor_arrow() -> None:
    script = (
        "import sys\n"
        "import fusion, fusion.predictions\n"
        "from fusion.processing import answers, image, text, table\n"
        "from fusion.processing.raw_columns import text_column\n"
        "assert text_column(['a', 3.0]) == ['a', '3']\n"
        "print([name for name in ('torch', 'pyarrow', 'transformers', 'lightning', 'pandas') if name in sys.modules])\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60).stdout == "[]\n"


def test_large_integers_of_a_column_with_missing_ones_keep_their_digits() -> None:
    for dtype in ("Int64", "int64[pyarrow]", "UInt64"):
        column = pd.Series([1234567890123456789, None], dtype=dtype)
        assert text_column(column, "id") == ["1234567890123456789", None]
    assert text_column(pd.Series([3, 4]), "id") == ["3", "4"]


def test_no_samples_are_answered_by_no_answers() -> None:
    answering = Numbers(["price", "weight"], [10.0, 1.0], [2.0, 1.0], 3, 1)
    assert answering.answers(np.zeros((0, 6), np.float32)) == []
    assert answering.in_units(np.zeros((0, 6), np.float32)).shape == (0, 6)
