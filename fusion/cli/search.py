"""fusion search: the items of an index that are nearest to a text or an image."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion.cli.index import INDEX
from fusion.cli.options import Options, above_zero
from fusion.console import aligned
from fusion.errors import UserError
from fusion.search import Index


def search(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = Options(
        "fusion search", "Find the images nearest to a text, or the texts nearest to an image, in an index made by fusion index."
    )
    parser.add_argument("--run", required=True, help="the run folder that made the index")
    parser.add_argument("--text", help="the query, a text")
    parser.add_argument("--image", help="the query, an image file")
    parser.add_argument("--inputs", type=json.loads, default={}, help='a query of other inputs, by name, as JSON: {"title": "red shoes"}')
    parser.add_argument("--index", help="folder of the index; index in the run folder if not given")
    parser.add_argument("--k", type=above_zero, default=10, help="number of items")
    parser.add_argument("--rerank", type=above_zero, default=None, help="number of nearest items that the run's matcher orders anew")
    parser.add_argument("--checkpoint", default="best", help="best or last")
    parser.add_argument("--json", action="store_true", help="print one JSON object per item")
    options = parser.parse_args(list(arguments))
    query: dict[str, Any] = {name: [value] for name, value in options.inputs.items()}
    query |= {name: [value] for name, value in (("texts", options.text), ("images", options.image)) if value is not None}
    if not query:
        raise UserError('fusion search: no query is given; expected --text "...", --image FILE, or --inputs for others')
    run = Path(options.run).expanduser()
    index = Index.load(options.index or run / INDEX, run, checkpoint=options.checkpoint)
    found = index.search(**query, k=options.k, rerank=options.rerank or 0)[0]
    if options.json:
        for match in found:
            print(json.dumps(match._asdict(), ensure_ascii=False))
        return 0
    names = list(found[0].cells)
    matched = ["match"] if options.rerank else []
    lines = [["", "cosine", *matched, "row", "id", *names]]
    for i, one in enumerate(found, 1):
        probability = [] if not options.rerank else ["" if one.match is None else f"{one.match:.4f}"]
        lines.append([str(i), f"{one.score:.4f}", *probability, str(one.row), one.id, *(str(one.cells[name] or "") for name in names)])
    print(aligned(lines))
    return 0
