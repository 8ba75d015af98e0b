"""Which sample went into which split, kept with the run, and found again by content when the table has changed since."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion.data.table import Table
from fusion.errors import UserError

FILE = "samples.parquet"
FIXED = {"split": pa.string(), "file": pa.string(), "row": pa.int64(), "id": pa.string(), "label": pa.uint64(), "other": pa.uint64()}
CELL, DIGEST = "input.", "digest."  # before an input's name


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
    """The rows of a run's manifests in order: the split of each, and digests of its cells and of the files that these name.

    Args:
        columns: by the names of FIXED, and for each input "input." and "digest." before its name; all of one length. label and input.*:
            digests of the cells, 0 where there is none (of a file its path from the manifest's folder, so that both may be moved); other:
            of all other columns that are no split. digest.*: of an input's files, "" for none or unreadable ones.
    """

    def __init__(self, columns: dict[str, list]) -> None:
        self.columns = columns

    @classmethod
    def of(cls, table: Table, digests: Mapping[str, Mapping[Any, str]] | None = None) -> "Record":
        """A table's record. digests: by input and cell, of its files; None: as its kind found them when they were checked."""
        columns: dict[str, list] = {}
        for name, kind in table.kinds.items():
            columns[f"{CELL}{name}"] = hashed(table.local_cells(name))
            known = None if digests is None else digests.get(name, {})
            cells = table.inputs[name]
            columns[f"{DIGEST}{name}"] = [kind.digest(cell) if known is None else known.get(cell, "") for cell in cells]
        columns["label"] = hashed(table.labels)
        others = [table.groups, *(table.extra[name] for name in sorted(table.extra))]
        columns["other"] = hashed(list(map(repr, zip(*others, strict=True))))
        columns |= {"split": list(table.splits), "file": [Path(file).name for file in table.files]}
        columns |= {"row": list(table.rows), "id": list(table.ids)}
        return cls(columns)

    def __len__(self) -> int:
        return len(self.columns["row"])

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return [name.removeprefix(CELL) for name in self.columns if name.startswith(CELL)]

    @property
    def content(self) -> tuple[str, ...]:
        """The columns that say what a sample is: its inputs' cells, and its label."""
        return (*(f"{CELL}{name}" for name in self.inputs), "label")

    @property
    def bytes_content(self) -> tuple[str, ...]:
        """The same, by what is in its files instead of their paths, where an input has files."""
        found = []
        for name in self.inputs:
            column = f"{DIGEST}{name}"
            found.append(column if any(self.columns[column]) else f"{CELL}{name}")
        return (*found, "label")

    def write(self, folder: Path) -> None:
        schema = {name: FIXED.get(name, pa.uint64() if name.startswith(CELL) else pa.string()) for name in self.columns}
        pq.write_table(pa.table(self.columns, schema=pa.schema(schema)), folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """A run's record; None where the run has none. Raises UserError where it can't be read."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            found = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"can't read {path}, the run's record of its samples: {str(error).splitlines()[0]}") from error
        if not FIXED.keys() <= set(found.column_names):
            raise UserError(f"can't read {path}, the run's record of its samples: it is of another version of fusion")
        return cls(found.to_pydict())

    def digest(self) -> str:
        """Of all that training, validation and test depend on: rows in order, with their files."""
        found = blake2b(digest_size=16)
        for name in ("split", *self.content, *(f"{DIGEST}{name}" for name in self.inputs)):
            for cell in self.columns[name]:
                found.update(f"{cell}\n".encode())
        return found.hexdigest()

    def match(self, now: "Record") -> list[int | None]:
        """For each row of `now`, the row here that it is: None where it is new.

        By content first: equal inputs and label, each row here used once, for its own id, file and given split where several are equal;
        an image that was moved or renamed by the digest of its file, where `now` has it. Of what is left, rows of one id are the same, as
        long as ids hold; then those that agree in all but one of the inputs and the label, where that names one row on each side.
        """
        found: list[int | None] = [None] * len(now)
        left: Sequence[int] = range(len(self))
        left_now: Sequence[int] = range(len(now))
        # Of equal rows, those that also share what was given with them: they may be in different splits.
        given = (("file", "id"), ("file", "split"), ("split",), ("file",), ())
        equal = [((*content, *more), True) for content in (self.content, self.bytes_content) for more in given]
        one_left_out = [
            (*content[:out], *content[out + 1 :])
            for out in reversed(range(len(self.content)))
            for content in (self.content, self.bytes_content)
        ]
        alike = [(names, False) for names in (("id",), *one_left_out) if names != ("label",)]
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
        which one of the cells is empty; but inputs may be, beside all the others, or beside the digests of those that have files."""
        found: dict[Hashable, list[int]] = defaultdict(list)
        content, inputs, by_bytes = self.content, self.content[:-1], self.bytes_content[:-1]
        count = len(inputs)
        digests = [place for place, name in enumerate(by_bytes) if name.startswith(DIGEST)]
        for row in rows:
            key = tuple(self.columns[name][row] for name in names)
            if names[: count + 1] == content:
                tells = all(key[count + 1 :])
            elif names == inputs:  # a sample may lack one of them
                tells = any(key)
            elif names[:count] == by_bytes:
                tells = all(key[place] for place in digests) and all(key[count:])
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
        other, renamed, changed = [], [], []
        for name in self.inputs:
            digests, digests_now = self.columns[f"{DIGEST}{name}"], now.columns[f"{DIGEST}{name}"]
            same_file = {row for here, row in pairs if digests[here] and digests[here] == digests_now[row]}
            paths = unlike(f"{CELL}{name}")
            other.append(([row for row in paths if row not in same_file], now, f"of another {name}"))
            renamed.append(([row for row in paths if row in same_file], now, f"of the same {name} under another path"))
            files = [row for row in unlike(f"{DIGEST}{name}") if now.columns["split"][row]] if images else []
            changed.append((files, now, f"of a changed {name} file"))
        changes = [
            (new, now, "new"),
            (gone, self, "gone"),
            *other,
            (unlike("label"), now, "of another label"),
            *changed,
            (moved, now, "in another split"),
        ]
        sentences = [counted(rows, of, what) for rows, of, what in changes if rows]
        order = [here for here, _ in pairs]
        if not sentences and order != sorted(order):
            sentences.append("the rows are in another order")
        samples, others = bool(sentences), unlike("other")
        sentences += [counted(rows, of, what) for rows, of, what in renamed if rows]
        if others:
            sentences.append(counted(others, now, f"changed in columns other than {', '.join(self.inputs)} and label"))
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
