"""Tables: columns to [-1, 1] and back, what is refused, and the splits."""

import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lowvar.data import Columns, load
from lowvar.data.columns import Category, Constant, Number
from lowvar.data.folder import split_of
from lowvar.errors import UserError
from lowvar.process.noise import Independent


def write(path: Path, columns: dict[str, list]) -> Path:
    lines = [",".join(columns)] + [",".join(str(v) for v in row) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def some(n: int = 120) -> dict[str, list]:
    u = Independent(3).uniform(range(n), (3,), dtype=torch.float64)
    return {
        "heavy": (1e-3 / u[:, 0] ** 3 - 7).tolist(),
        "count": (u[:, 1] ** 4 * 6).round().int().tolist(),
        "town": [("Bern", "Basel", "Chur")[int(v * 3)] for v in u[:, 2]],
        "unit": ["cm"] * n,
        "zero": [0.0] * n,
    }


def test_every_row_comes_back_in_its_own_unit(tmp_path: Path):
    table = some()
    data = load(write(tmp_path / "t.csv", table))
    assert data.columns is not None
    assert data.shape == (5,)  # heavy, count, three towns
    assert data.levels is None
    assert data.half_width == 0.0
    for k, split in enumerate((data.train, data.calibration, data.test)):
        rows = [i for i in range(120) if split_of(str(i), 0) == k]
        x = split.images(torch.arange(len(split)))
        assert bool((x.abs() <= 1).all())
        back = data.columns.decode(x)
        assert list(back) == list(table)
        for name in ("town", "unit", "zero", "count"):
            assert back[name] == [table[name][i] for i in rows]
        wanted = torch.tensor([table["heavy"][i] for i in rows], dtype=torch.float64)
        # float32 of x has 6e-8; the steepest piece of 1e-3 u^-3 spans its whole range in 1/95 of the axis
        assert (torch.tensor(back["heavy"], dtype=torch.float64) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_heavy_tail_becomes_nearly_uniform(tmp_path: Path):
    data = load(write(tmp_path / "t.csv", some(2000)))
    x = data.train.images(torch.arange(len(data.train)))[:, 0].double().sort().values
    assert (x - torch.linspace(-1, 1, len(x), dtype=torch.float64)).abs().max() < 0.02  # a knot's share is 1/128


@pytest.mark.parametrize("train", [[2.0], [2.0, 2.0, 2.0], [1.0, 9.0], [1.0, 2.0, 2.0, 2.0, 9.0], [1.0, 1.0, 1.0, 9.0]])
def test_knots_increase_strictly_whatever_the_training_rows(train: list[float]):
    values = torch.tensor([1.0, 2.0, 2.0, 4.5, 9.0])
    column = Number.fitted("a", values, torch.tensor(train))
    for numbers in (column.knots, column.shares):
        assert all(a < b for a, b in itertools.pairwise(numbers))
    assert column.shares[0] == 0.0
    assert column.shares[-1] == 1.0
    assert column.knots[0] == 1.0
    assert column.knots[-1] == 9.0
    assert column.decode(column.encode(values.tolist())) == pytest.approx(values.tolist(), abs=1e-12)
    assert column.decode(torch.tensor([[-3.0], [3.0]])) == [1.0, 9.0]  # beyond the ends: the ends


def test_repeated_values_share_a_knot_and_whole_numbers_are_rounded():
    column = Number.fitted("n", torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 2.0]))
    assert column.whole
    x = torch.linspace(-1, 1, 41)[:, None]
    assert set(column.decode(x)) == {0.0, 1.0, 2.0}
    assert column.decode(x) == sorted(column.decode(x))


def test_columns_survive_json():
    columns = Columns(
        (Number("a", (0.0, 0.5, 2.0), (0.0, 0.75, 1.0), whole=False), Category("b", ("x", "y")), Constant("c", 4.0)),
        ("no", "yes"),
    )
    assert Columns.restored(json.loads(json.dumps(columns.config()))) == columns
    x = torch.tensor([[0.5, -1.0, 1.0]])
    assert columns.decode(x) == {"a": [0.5], "b": ["y"], "c": [4.0]}
    assert columns.numbers(x).tolist() == [[0.5, 1.0, 4.0]]
    with pytest.raises(UserError, match="does not read"):
        Columns.restored({"columns": [{"kind": "picture"}], "classes": []})
    with pytest.raises(ValueError, match=r"need \(n, 3\)"):
        columns.decode(torch.zeros(2, 4))


def test_the_label_column_is_the_class_and_no_feature(tmp_path: Path):
    table = some() | {"label": [("mild", "hot", "cold")[i % 3] for i in range(120)]}
    data = load(write(tmp_path / "t.csv", table), seed=4)
    assert data.columns is not None
    assert data.shape == (5,)
    assert data.columns.classes == ("cold", "hot", "mild")
    rows = [i for i in range(120) if split_of(str(i), 4) == 1]
    assert data.calibration.labels is not None
    assert data.calibration.labels.tolist() == [{0: 2, 1: 1, 2: 0}[i % 3] for i in rows]
    numbers = load(write(tmp_path / "n.csv", some() | {"label": [10 + i % 3 for i in range(120)]}))
    assert numbers.columns is not None
    assert numbers.columns.classes == ("10", "11", "12")


def test_parquet_and_tsv_are_the_same_table(tmp_path: Path):
    table = some()
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    file = write(tmp_path / "t.csv", table)
    (tmp_path / "t.tsv").write_text(file.read_text().replace(",", "\t"))
    prints = {load(tmp_path / f"t.{kind}").fingerprint for kind in ("csv", "tsv", "parquet")}
    assert len(prints) == 1
    assert load(file, seed=1).fingerprint not in prints


@pytest.mark.parametrize("value", ["", "NaN", "nan"])
def test_a_missing_value_is_refused_by_column_and_row(tmp_path: Path, value: str):
    table = some()
    table["heavy"][6] = value
    with pytest.raises(UserError, match=r"column 'heavy' of .*t\.csv has no value in row 7 \(.*\); fill it in or take"):
        load(write(tmp_path / "t.csv", table))


def test_other_columns_and_files_are_refused_in_a_sentence(tmp_path: Path):
    def refused(change: dict[str, list], match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            load(write(tmp_path / "t.csv", some() | change))
        assert "\n" not in str(caught.value)

    refused({"town": [""] * 5 + ["Bern"] * 115}, "'town' .* no value in row 1 ")
    refused({"count": [1.0] * 119 + ["inf"]}, "'count' .* an infinite value in row 120 ")
    refused({"name": [f"n{i}" for i in range(120)]}, "'name' .* 120 different texts, and at most 64")
    refused({"day": ["2020-01-02"] * 60 + ["2020-01-03"] * 60}, "'day' .* numbers or text")
    refused({"label": [0.5] * 120}, "'label' .* whole numbers or text")
    refused({"empty": [""] * 120}, "no value in any row of the column 'empty'")
    with pytest.raises(UserError, match="no column that varies"):
        load(write(tmp_path / "c.csv", {"a": [1.0] * 50}))
    with pytest.raises(UserError, match="4 rows, of which"):
        load(write(tmp_path / "few.csv", {"a": [1.0, 2.0, 3.0, 4.0]}))
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    with pytest.raises(UserError, match="two columns called 'a'"):
        load(tmp_path / "twice.csv")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(UserError, match="cannot read the table"):
        load(tmp_path / "ragged.csv")
    (tmp_path / "head.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="no rows"):
        load(tmp_path / "head.csv")
    (tmp_path / "semicolons.csv").write_text("a;b\n" + "1;2\n3;4\n" * 30)
    with pytest.raises(UserError, match="one column, called 'a;b'; columns are separated by commas here"):
        load(tmp_path / "semicolons.csv")
    (tmp_path / "old.csv").write_bytes("a,b\n1,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"column 'b' of .* holds text that is not UTF-8"):
        load(tmp_path / "old.csv")
    refused({"count": [-1.7e308, 1.7e308] * 60}, "'count' .* a range that no number holds; give it another unit")
    with pytest.raises(UserError, match=r"size is 8, and .* is a table"):
        load(write(tmp_path / "t.csv", some()), size=8)


def test_an_empty_cell_is_named_before_the_number_of_rows(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("a,b\n1,2\n,3\n4,5\n")
    with pytest.raises(UserError, match=r"the column 'a' of .* has no value in row 2"):
        load(file)
