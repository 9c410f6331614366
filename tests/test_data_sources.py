"""Rows come out the same from every format and place, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from gptj import storage
from gptj.data.sources import DataError, Row, read_rows
from jobs.local_s3 import LocalS3

ROWS: list[dict[str, Any]] = [
    {"text": "plain", "label": 1},
    {"text": 'a "quoted", line\nand another\u2028one\x85', "label": 0},
    {"text": "Füße 日本語 👩‍👩‍👧‍👦", "label": 2},
    {"text": "007", "label": 1},  # text, whatever it looks like
]


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def values(address: object, columns: dict[str, str] | None = None) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(str(address), columns)]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_rows_that_were_written(ending: str, tmp_path: Path) -> None:
    path = write(ROWS, tmp_path / f"data.{ending}")
    rows = list(read_rows(str(path)))
    assert [row.values for row in rows] == ROWS
    assert [row.number for row in rows] == [1, 2, 3, 4]
    assert {row.source for row in rows} == {str(path)}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "txt"])
def test_s3_gives_the_rows_of_the_local_file(ending: str, tmp_path: Path, s3: LocalS3) -> None:
    path = write(ROWS, tmp_path / f"data.{ending}")
    folder = f"s3://{s3.bucket}/sources/{ending}"
    storage.upload(path, f"{folder}/one.{ending}")
    assert values(f"{folder}/one.{ending}") == values(path)
    assert values(folder) == values(path)
    assert values(f"{folder}/o*.{ending}") == values(path)
    with pytest.raises(storage.NotFoundError, match="none-such"):
        read_rows(f"s3://{s3.bucket}/sources/none-such.{ending}")


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbffirst line\r\n\r\nlast\n")
    assert values(tmp_path / "one.txt") == [{"text": "first line\r\n\r\nlast\n"}]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b", "a/z", "c", "a/b"):
        write([{"text": name}], tmp_path / f"{name}.jsonl")
    for name in ("README.md", "_SUCCESS", ".b.jsonl", "_index.jsonl"):
        (tmp_path / name).write_text("not data")
    assert [row["text"] for row in values(tmp_path)] == ["a/b", "a/z", "b", "c"]


def test_a_star_stands_for_a_part_of_a_name(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("train-1", "train-2", "test-1", "more/train-3", "train-[1]"):
        write([{"text": name}], tmp_path / f"{name}.jsonl")
    assert [r["text"] for r in values(tmp_path / "train-*.jsonl")] == [
        "train-1",
        "train-2",
        "train-[1]",
    ]
    assert [r["text"] for r in values(tmp_path / "*" / "*.jsonl")] == ["more/train-3"]
    assert [r["text"] for r in values(tmp_path / "train-[*].jsonl")] == ["train-[1]"]
    monkeypatch.chdir(tmp_path)
    assert [r["text"] for r in values("test*.jsonl")] == ["test-1"]
    with pytest.raises(storage.NotFoundError, match="dev"):
        read_rows("dev*.jsonl")


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_columns_are_renamed_to_ours(ending: str, tmp_path: Path) -> None:
    path = write([{"review": "12", "text": "a title", "stars": 4}], tmp_path / f"data.{ending}")
    renamed = values(path, {"text": "review", "label": "stars"})
    assert renamed == [{"text": "12", "label": 4}]


def test_a_missing_column_is_named_beside_those_that_are_there(tmp_path: Path) -> None:
    path = write([{"review": "good", "stars": 4}], tmp_path / "data.jsonl")
    with pytest.raises(DataError, match=r"data.jsonl, row 1: no column 'body' .*'review', 'stars'"):
        values(path, {"text": "body"})
    (row,) = read_rows(str(path))
    with pytest.raises(DataError, match=r"row 1, column 'text': is missing.*columns.text=NAME"):
        row.text("text")


def test_an_error_names_the_column_as_the_file_does(tmp_path: Path) -> None:
    path = write([{"review": "good"}, {"review": 5}], tmp_path / "data.jsonl")
    rows = list(read_rows(str(path), {"text": "review"}))
    with pytest.raises(DataError) as error:
        rows[1].text("text")
    assert str(error.value) == f"{path}, row 2, column 'review': must be text, got 5"
    assert str(Row({}, "x", 3).error("label", "why")) == "x, row 3, column 'label': why"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl, row 3: must be a JSON object"),
        ("b.json", b'[\n{"text": "a"}\n]\n', "b.json, row 1: must be a JSON object in one line"),
        ("c.jsonl", b'{"text": "a"}\n"b"\n', "c.jsonl, row 2: must be a JSON object"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "d.jsonl, after row 1.*utf-8"),
        ("e.txt", b"\xff\xfea\x00", "e.txt, after row 0.*utf-8"),
        ("f.parquet", b"PAR1 not really", "f.parquet, after row 0: cannot be read"),
        ("g.csv", b"text,label\na,1\nb,2,3\n", "g.csv, after row 0.*Expected 2 columns, got 3"),
        ("h.csv", b"", "h.csv, after row 0.*[Ee]mpty"),
        ("i.jsonl", b"\n\n", "i.jsonl has no rows"),
        ("j.csv", b"text,label\n", "j.csv has no rows"),
        ("k.xlsx", b"", "k.xlsx is none of .parquet, .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        values(tmp_path / name)


def test_an_address_without_data_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(storage.NotFoundError, match="none-such"):
        read_rows(str(tmp_path / "none-such"))
    (tmp_path / "notes.md").write_text("none")
    with pytest.raises(DataError, match="1 files, none of"):
        read_rows(str(tmp_path))
    write(ROWS, tmp_path / "a.jsonl")
    write(ROWS, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"several kinds \(.jsonl, .parquet\).*a pattern such as"):
        read_rows(str(tmp_path))
    with pytest.raises(DataError, match="sample://unheard.*sample://reviews"):
        read_rows("sample://unheard")


def test_a_large_file_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    """The first row is there although the file's end is damaged."""
    path = tmp_path / "large.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 10_000 + b"damaged")
    rows = read_rows(str(path))
    assert next(rows).values == {"text": "a"}
    with pytest.raises(DataError, match="row 10001"):
        list(rows)
