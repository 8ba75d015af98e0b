"""Which sample went into which split, kept with the run, and found again by content when the table has changed since."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fusion.data.table import Table
from fusion.errors import UserError

FILE = "samples.parquet"
INPUTS = ("image", "text", "label")
BYTES = ("digest", "text", "label")  # the same, by what is in the image's file instead of its path
SCHEMA = pa.schema(
    {
        "split": pa.string(),
        "file": pa.string(),
        "row": pa.int64(),
        "id": pa.string(),
        **{name: pa.uint64() for name in (*INPUTS, "other")},
        "digest": pa.string(),
    }
)


@dataclass
class Difference:
    """How a table differs from the one that was recorded: a sentence for each kind of change; samples: whether any of it concerns images,
    texts, labels, splits or the order of the rows, which the path of an unchanged image doesn't; others: whether other columns differ."""

    sentences: list[str]
    samples: bool
    others: bool

    def __str__(self) -> str:
        return "; ".join(self.sentences)


class Record:
    """The rows of a run's manifests in order: the split of each, and digests of its cells and of its image's file.

    Args:
        columns: by the names of SCHEMA, all of one length. image, text, label: digests of the cells, 0 where there is none (an image's
            cell is its path from the manifest's folder, so that both may be moved); other: of all other columns that are no split. digest:
            of the image's file, "" for none or an unreadable one.
    """

    def __init__(self, columns: dict[str, list]) -> None:
        self.columns = columns

    @classmethod
    def of(cls, table: Table, digests: Mapping[str, str]) -> "Record":
        """A table's record; digests: by path of an image, of its file."""
        cells = {"image": table.local_paths(), "text": table.texts, "label": table.labels}
        columns: dict[str, list] = {name: hashed(column) for name, column in cells.items()}
        others = [table.groups, *(table.extra[name] for name in sorted(table.extra))]
        columns["other"] = hashed(list(map(repr, zip(*others, strict=True))))
        columns |= {"split": list(table.splits), "file": [Path(file).name for file in table.files], "row": table.rows, "id": table.ids}
        columns["digest"] = [digests.get(path or "", "") for path in table.images]
        return cls(columns)

    def __len__(self) -> int:
        return len(self.columns["row"])

    def write(self, folder: Path) -> None:
        pq.write_table(pa.table(self.columns, schema=SCHEMA), folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """A run's record; None where the run has none. Raises UserError where it can't be read."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            return cls(pq.read_table(path, schema=SCHEMA).to_pydict())
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"can't read {path}, the run's record of its samples: {str(error).splitlines()[0]}") from error

    def digest(self) -> str:
        """Of all that training, validation and test depend on: rows in order, with their images."""
        found = blake2b(digest_size=16)
        for name in ("split", *INPUTS, "digest"):
            for cell in self.columns[name]:
                found.update(f"{cell}\n".encode())
        return found.hexdigest()

    def match(self, now: "Record") -> list[int | None]:
        """For each row of `now`, the row here that it is: None where it is new.

        By content first: equal image, text and label, each row here used once, for its own id, file and given split where several are
        equal; an image that was moved or renamed by the digest of its file, where `now` has it. Of what is left, rows of one id are the
        same, as long as ids hold; then those that agree in two of the three, where that names one row on each side.
        """
        found: list[int | None] = [None] * len(now)
        left: Sequence[int] = range(len(self))
        left_now: Sequence[int] = range(len(now))
        # Of equal rows, those that also share what was given with them: they may be in different splits.
        given = (("file", "id"), ("file", "split"), ("split",), ("file",), ())
        equal = [((*content, *more), True) for content in (INPUTS, BYTES) for more in given]
        two_of_three = [content[places] for places in (slice(2), slice(0, 3, 2)) for content in (INPUTS, BYTES)]
        alike = [(names, False) for names in (("id",), *two_of_three, INPUTS[1:])]
        for names, repeats in [*equal, *alike]:
            if names == ("id",) and not self.ids_hold(now, found):
                continue
            here, there = self.rows_by(names, left), now.rows_by(names, left_now)
            for key, rows in there.items():
                same = here.get(key, [])
                if repeats or len(rows) == len(same) == 1:
                    for row, other in zip(rows, same, strict=False):
                        found[row] = other
            left_now = [row for row in left_now if found[row] is None]
            taken = {row for row in found if row is not None}
            left = [row for row in left if row not in taken]
        return found

    def rows_by(self, names: Sequence[str], rows: Sequence[int]) -> dict[Hashable, list[int]]:
        """The rows by their cells in these columns, in order. Left out are rows whose id, if asked for, is only their line, and rows of
        which one of the cells is empty; but an image or a text may be, beside all of INPUTS or beside the other of the two, and a text
        beside the digest of an image."""
        found: dict[Hashable, list[int]] = defaultdict(list)
        for row in rows:
            key = tuple(self.columns[name][row] for name in names)
            if names[: len(INPUTS)] == INPUTS:
                tells = all(key[len(INPUTS) :])
            elif names == INPUTS[:2]:  # a sample may lack one of them
                tells = any(key)
            elif names[:2] == BYTES[:2]:
                tells = bool(key[0]) and all(key[2:])
            else:
                tells = all(key)
            if tells and not ("id" in names and self.is_line(row)):
                found[key].append(row)
        return found

    def ids_hold(self, now: "Record", found: Sequence[int | None]) -> bool:
        """Whether an id names the same sample in both, as the rows of equal content tell: not once a table was numbered anew."""
        pairs = [(here, row) for row, here in enumerate(found) if here is not None]
        same = sum(self.columns["id"][here] == now.columns["id"][row] for here, row in pairs)
        return bool(pairs) and same >= 0.95 * len(pairs)

    def is_line(self, row: int) -> bool:
        """Whether a row's id is nothing but its place in the file."""
        id, line = str(self.columns["id"][row]), str(self.columns["row"][row])
        return id == line or id.endswith(f"-{line}")

    def difference(self, now: "Record", found: Sequence[int | None] | None = None, *, images: bool = True) -> Difference:
        """What `now` has other than this record. found: what `match` gave, if it is known. images: whether their files are compared."""
        found = self.match(now) if found is None else found
        gone = sorted(set(range(len(self))) - set(found))
        new = [row for row, here in enumerate(found) if here is None]
        pairs = [(here, row) for row, here in enumerate(found) if here is not None]

        def unlike(name: str) -> list[int]:
            ours, theirs = self.columns[name], now.columns[name]
            return [row for here, row in pairs if ours[here] != theirs[row]]

        then, since = self.columns["split"], now.columns["split"]
        # A training sample that data.train_samples left out has no split here.
        moved = [row for here, row in pairs if since[row] not in (None, then[here] or "train")]
        digests, digests_now = self.columns["digest"], now.columns["digest"]
        renamed = {row for here, row in pairs if digests[here] and digests[here] == digests_now[row]}
        paths = unlike("image")
        changes = [
            (new, now, "new"),
            (gone, self, "gone"),
            ([row for row in paths if row not in renamed], now, "of another image"),
            *((unlike(name), now, f"of another {name}") for name in INPUTS[1:]),
            ([row for row in unlike("digest") if now.columns["split"][row]] if images else [], now, "of a changed image file"),
            (moved, now, "in another split"),
        ]
        sentences = [counted(rows, of, what) for rows, of, what in changes if rows]
        order = [here for here, _ in pairs]
        if not sentences and order != sorted(order):
            sentences.append("the rows are in another order")
        samples, others, paths = bool(sentences), unlike("other"), [row for row in paths if row in renamed]
        if paths:
            sentences.append(counted(paths, now, "of the same image under another path"))
        if others:
            sentences.append(counted(others, now, "changed in columns other than image, text and label"))
        return Difference(sentences, samples, bool(others))


def counted(rows: Sequence[int], record: Record, what: str) -> str:
    """So many rows, and where the first stands."""
    first = f"{record.columns['file'][rows[0]]}, row {record.columns['row'][rows[0]]}"
    return f"{len(rows):,} row{'s are' if len(rows) > 1 else ' is'} {what} ({first})"


def hashed(cells: Iterable[str | None]) -> list[int]:
    """A digest of each cell, 0 for None; worked out once for each distinct cell."""
    known: dict[str | None, int] = {None: 0}
    found = []
    for cell in cells:
        if cell not in known:
            assert cell is not None
            known[cell] = int.from_bytes(blake2b(cell.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
        found.append(known[cell])
    return found
