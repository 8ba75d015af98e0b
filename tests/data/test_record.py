"""For any table and any single change of it: it is reported by its row, and every other row is found again with the split that it had."""

from hypothesis import given
from hypothesis import strategies as st

from fusion.data.kinds import ImageInput, TextInput
from fusion.data.record import Record
from fusion.data.table import Table

CELL = st.sampled_from(["", "a", "b", "nan"])  # few, so that equal rows and equal cells are common
ROW = st.tuples(CELL, CELL, st.sampled_from("xy"), st.sampled_from(["train", "val", "test"]), CELL)
NAMES = ("images", "texts", "labels", "splits", "note")


def record(rows, digests=None, ids=None):
    images, texts, labels, splits, notes = (list(column) for column in zip(*rows, strict=True))
    lines = list(range(2, len(rows) + 2))
    table = Table(
        kinds={"image": ImageInput(), "text": TextInput()},
        inputs={"image": [f"/data/{cell}.png" if cell else None for cell in images], "text": [cell or None for cell in texts]},
        labels=labels,
        splits=splits,
        ids=ids or list(map(str, lines)),
        groups=[None] * len(rows),
        rows=lines,
        files=["/data/m.csv"] * len(rows),
        extra={"note": notes},
    )
    return Record.of(table, {"image": digests or {}})


@given(st.lists(ROW, min_size=1, max_size=8))
def test_a_table_is_found_again_row_by_row(rows):
    then, now = record(rows), record(rows)
    assert not str(then.difference(now))
    assert [then.columns["split"][i] for i in then.match(now)] == [row[3] for row in rows]
    assert then.digest() == now.digest()


@given(st.lists(ROW, min_size=1, max_size=8), st.data())
def test_any_changed_cell_is_reported_and_moves_no_other_row_to_another_split(rows, data):
    row, column = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, 4))
    cell = data.draw(st.sampled_from(["new", "train", "val", "test"] if column == 3 else ["new", "", "a"]))
    if column == 3 and cell == "new":
        cell = "train"
    changed = [list(one) for one in rows]
    changed[row][column] = cell
    then, now = record(rows), record(changed)
    difference, found = then.difference(now), then.match(now)
    same = changed[row] == list(rows[row])
    assert bool(str(difference)) == (not same)
    assert len(set(found) - {None}) == len([i for i in found if i is not None])  # each row of the record once
    if column != 4:
        assert (then.digest() != now.digest()) == (not same)
        assert difference.samples == (not same)
    equal_to_changed = [tuple(changed[row][:3]), tuple(rows[row][:3])]
    for i, one in enumerate(rows):
        # Rows equal to the changed one, before or after, can't be told from it; nor rows that share two of its three inputs with it.
        if i != row and all(sum(a != b for a, b in zip(one[:3], other, strict=True)) > 1 for other in equal_to_changed):
            assert found[i] is not None
            assert then.columns["split"][found[i]] == one[3]


@given(st.lists(ROW, min_size=2, max_size=8), st.data())
def test_any_row_that_is_gone_or_new_is_reported(rows, data):
    left_out = data.draw(st.integers(0, len(rows) - 1))
    fewer = [one for i, one in enumerate(rows) if i != left_out]
    all_rows, without = record(rows), record(fewer)
    assert "1 row is gone" in str(all_rows.difference(without))
    assert "1 row is new" in str(without.difference(all_rows))
    assert all_rows.digest() != without.digest()
    kept = [all_rows.columns["split"][i] for i in all_rows.match(without)]
    assert kept == [row[3] for row in fewer]


@given(st.lists(ROW, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_no_split_and_is_reported(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    then, now = record(rows), record([rows[i] for i in order])
    assert [then.columns["split"][i] for i in then.match(now)] == [rows[i][3] for i in order]
    contents = [rows[i] for i in order]
    assert bool(str(then.difference(now))) <= (contents != rows)


@given(st.lists(ROW.filter(lambda row: row[0]), min_size=1, max_size=6))
def test_any_changed_image_file_is_reported(rows):
    paths = sorted({f"/data/{row[0]}.png" for row in rows})
    then, now = record(rows, dict.fromkeys(paths, "one")), record(rows, {**dict.fromkeys(paths, "one"), paths[0]: "other"})
    assert "of a changed image file" in str(then.difference(now))
    assert then.digest() != now.digest()


def test_ids_that_were_numbered_anew_name_no_sample():
    rows = [(str(i), f"text {i}?", "x", "train" if i % 2 else "test", "") for i in range(20)]
    then = record(rows, ids=[str(i) for i in range(20)])
    shuffled = [(image, text.removesuffix("?"), label, split, note) for image, text, label, split, note in reversed(rows)]
    now = record(shuffled, ids=[str(i) for i in range(20)])
    assert then.match(now) == list(reversed(range(20)))


def test_ids_that_hold_name_a_sample_of_which_all_else_has_changed():
    rows = [(str(i), f"text {i}", "x", "train", "") for i in range(30)]
    ids = [f"s{i}" for i in range(30)]
    changed = [*rows[:29], ("new", "new", "y", "train", "")]
    assert record(rows, ids=ids).match(record(changed, ids=ids)) == list(range(30))


def test_a_changed_label_of_samples_without_images_is_reported_as_such():
    rows = [("", f"text {i}", "x", "test", "") for i in range(6)]
    changed = [("", f"text {i}", "y", "test", "") for i in range(6)]
    then, now = record(rows), record(changed)
    assert then.match(now) == list(range(6))
    assert str(then.difference(now)) == "6 rows are of another label (m.csv, row 2)"


def test_a_split_carved_out_of_train_is_no_change_of_the_table_that_gives_train():
    rows = [(f"{i}", f"{i}", "x", split, "") for i, split in enumerate(["train", "train", "val", "test"])]
    then, now = record(rows), record([(*row[:3], "train" if row[3] == "val" else row[3], "") for row in rows])
    assert "1 row is in another split" in str(then.difference(now))
    assert not str(then.difference(now, carved=True))
    moved = record([(*row[:3], {"val": "train", "test": "train"}.get(row[3], row[3]), "") for row in rows[:3]] + [rows[3]])
    assert not str(then.difference(moved, carved=True))
    swapped = record([(*row[:3], "test" if row[3] == "val" else row[3], "") for row in rows])
    assert "1 row is in another split" in str(then.difference(swapped, carved=True))
