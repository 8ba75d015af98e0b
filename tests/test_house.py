"""The structure of the code: which private names of Lightning are used, and where. (What may import what, import-linter checks in CI.)"""

import ast
import re
from pathlib import Path

import lightning

import fusion

PACKAGE = Path(fusion.__file__).parent
ALLOWED = PACKAGE / "lightning_private.py"


def private_names(path: Path) -> set[str]:
    """Names with a leading underscore that a file reads off some object, or defines in a class."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    given = {str(getattr(c.args[1], "value", "")) for c in calls if c.func.id in ("getattr", "setattr", "hasattr")}
    return {name for name in read | defined | given if re.fullmatch(r"_[a-z]\w*", name)}


def names_of_lightning() -> set[str]:
    source = "".join(path.read_text(encoding="utf-8") for path in Path(lightning.__file__).parent.rglob("*.py"))
    return set(re.findall(r"(?:self\.|def |^)(_[a-z]\w*)", source, re.MULTILINE))


def test_private_names_of_lightning_stand_in_one_file():
    theirs = names_of_lightning()
    found = {
        str(path.relative_to(PACKAGE)): used & theirs for path in PACKAGE.rglob("*.py") if path != ALLOWED and (used := private_names(path))
    }
    assert {file: names for file, names in found.items() if names} == {}
    assert len(private_names(ALLOWED) & theirs) >= 15  # the test sees what it looks for
