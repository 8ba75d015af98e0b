"""Prepared data is found again as long as all that it was made from is the same."""

import os

import pytest

from fusion.data.prepare import Script, prepared
from fusion.errors import UserError

SCRIPT = """
def prepare(root, folder):
    (folder / "manifest.csv").write_text((root / "in" / "rows.txt").read_text())
    return "made"
"""


@pytest.fixture
def layout(tmp_path):
    """(script, root, function that gives the manifest's text)."""
    script, root = tmp_path / "own.py", tmp_path / "root"
    script.write_text(SCRIPT)
    (root / "in").mkdir(parents=True)
    (root / "in" / "rows.txt").write_text("one")
    return script, root, lambda: (prepared(Script(str(script)), root, tmp_path / "cache")[0] / "manifest.csv").read_text()


def test_a_file_that_changed_under_the_root_is_prepared_anew(layout):
    _, root, manifest = layout
    assert manifest() == "one"
    (root / "in" / "rows.txt").write_text("another")
    assert manifest() == "another"
    before = (root / "in" / "rows.txt").stat()
    (root / "in" / "rows.txt").write_text("onother")  # of the same size, a moment later
    os.utime(root / "in" / "rows.txt", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert manifest() == "onother"


def test_a_cache_inside_the_root_is_rejected(layout):
    script, root, _ = layout
    with pytest.raises(UserError, match=r"data\.cache is .* inside data\.root"):
        prepared(Script(str(script)), root, root / "cache")


@pytest.mark.parametrize("change", ["new file", "gone file", "other script"])
def test_whatever_else_it_is_made_from_is_in_its_key(layout, change):
    script, root, _ = layout
    (root / "more.txt").write_text("more")
    before = Script(str(script)).key(root)
    if change == "new file":
        (root / "new.txt").touch()
    elif change == "gone file":
        (root / "more.txt").unlink()
    else:
        script.write_text(SCRIPT + "\n")
    assert Script(str(script)).key(root) != before


def test_what_is_the_same_is_not_made_again(layout):
    script, root, manifest = layout
    key = Script(str(script)).key(root)
    assert manifest() == "one"
    assert Script(str(script)).key(root) == key
