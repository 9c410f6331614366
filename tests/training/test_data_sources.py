"""Rows are the same from every format and place, and errors are named."""

from __future__ import annotations

import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import zstandard

from gptj import storage
from gptj.data import formats, json_rows
from gptj.data.sources import DataError, Row, check_apart, data_files, read_rows
from gptj_local.s3 import LocalS3

ROWS: list[dict[str, Any]] = [
    {"text": "plain", "label": 1},
    {"text": 'a "quoted", line\nand another\u2028one\x85', "label": 0},
    {"text": "Füße 日本語 👩‍👩‍👧‍👦", "label": 2},
    {"text": "007", "label": 1},  # text, whatever it looks like
]


LABELLED = ("text", "label")
ANSWERED = ("question", "context", "answers")


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".gz", ".zst"):
        content = write(rows, path.with_suffix("")).read_bytes()
        path.with_suffix("").unlink()
        packed = gzip.compress(content) if path.suffix == ".gz" else zstandard.compress(content)
        path.write_bytes(packed)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def values(
    address: object, columns: dict[str, str] | None = None, needed: tuple[str, ...] = ("text",)
) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(str(address), needed, columns)]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_written_rows(ending: str, tmp_path: Path) -> None:
    path = write(ROWS, tmp_path / f"data.{ending}")
    rows = list(read_rows(str(path), LABELLED))
    as_written = [{**row, "label": str(row["label"])} for row in ROWS] if ending == "csv" else ROWS
    assert [row.values for row in rows] == as_written
    assert {row.typed for row in rows} == {ending != "csv"}
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
        read_rows(f"s3://{s3.bucket}/sources/none-such.{ending}", ["text"])


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    """With line ends as in Python, and no byte order mark."""
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbffirst line\r\n\r\nlast\n")
    assert values(tmp_path / "one.txt") == [{"text": "first line\n\nlast\n"}]


def test_a_folder_is_read_in_name_order(tmp_path: Path) -> None:
    for name in ("b", "a/z", "c", "a/b"):
        write([{"text": name}], tmp_path / f"{name}.jsonl")
    for name in ("README.md", "_SUCCESS", ".b.jsonl", "_index.jsonl"):
        (tmp_path / name).write_text("not data")
    assert [row["text"] for row in values(tmp_path)] == ["a/b", "a/z", "b", "c"]


def test_a_star_matches_part_of_a_name(tmp_path: Path, monkeypatch: Any) -> None:
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
        read_rows("dev*.jsonl", ["text"])


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_columns_are_renamed_to_ours(ending: str, tmp_path: Path) -> None:
    path = write([{"review": "12", "text": "a title", "stars": 4}], tmp_path / f"data.{ending}")
    renamed = values(path, {"text": "review", "label": "stars"}, LABELLED)
    assert renamed == [{"text": "12", "label": "4" if ending == "csv" else 4}]
    assert values(path, {"label": "stars"}) == [{"text": "a title"}]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "csv.gz"])
def test_errors_name_the_missing_and_the_present_columns(ending: str, tmp_path: Path) -> None:
    path = write([{"review": "good", "stars": 4}], tmp_path / f"data.{ending}")
    place = f"{path}, row 1" if ending == "jsonl" else str(path)
    with pytest.raises(DataError) as error:
        values(path, {"text": "body"}, LABELLED)
    assert str(error.value).startswith(
        f"{place}: no column 'body' (for text) and no column 'label'; there are 'review', 'stars'"
    )
    assert str(error.value).endswith("remedy: data.columns.text=NAME data.columns.label=NAME")
    row = Row({"review": "good"}, "f.jsonl", 1)
    with pytest.raises(DataError, match=r"row 1, column 'text': is missing.*data.columns.text="):
        row.text("text")
    with pytest.raises(DataError, match="no column 'label'; there are 'text'; remedy"):
        (tmp_path / "a.txt").write_text("a text")
        values(tmp_path / "a.txt", needed=LABELLED)
    with pytest.raises(
        DataError, match=r"no column 'stars' .for label.; there are 'text', 'label'"
    ):
        values("sample://reviews", {"label": "stars"}, LABELLED)


def test_errors_name_columns_as_in_the_file(tmp_path: Path) -> None:
    path = write([{"review": "good"}, {"review": 5}], tmp_path / "data.jsonl")
    rows = list(read_rows(str(path), ["text"], {"text": "review"}))
    with pytest.raises(DataError) as error:
        rows[1].text("text")
    assert str(error.value) == f"{path}, row 2, column 'review': must be text, got 5"
    assert str(Row({}, "x", 3).error("label", "why")) == "x, row 3, column 'label': why"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl, row 3: must be a JSON object"),
        ("b.json", b'[\n{"text": "a"}\n', "b.json, row 2: expected ',' of the array, got ''"),
        ("b.json", b'["a"]', "b.json, row 1: must be a JSON object, one per line or in an arr"),
        ("b.json", b'{"text": "a"}, {"text": "b"}', "b.json, row 1: must be .*Extra data"),
        ("b.json", b'[{"text": "a"}, {"text" "b"}]', "row 2: must be .* got .*Expecting ':'"),
        ("b.json", b'[{"text": "a"}] {"text": "b"}', "row 2: follows the end of the array"),
        ("b.json", b'[{"text": "a"} {"text": "b"}]', "row 2: expected ',' of the array"),
        ("b.json", b'[{"text": "a"},]', "row 2: must be a JSON object"),
        ("b.json", b"[]", "b.json has no rows"),
        ("b.json", b'{\n"text": "a"\n}', "b.json, row 1: must be a JSON object"),
        ("c.jsonl", b'{"text": "a"}\n"b"\n', "c.jsonl, row 2: must be a JSON object"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "d.jsonl, row 2: is not UTF-8"),
        ("e.txt", b"\xff\xfea\x00", "e.txt, row 1, column 'text': is not UTF-8"),
        ("f.parquet", b"PAR1 not really", "f.parquet, after row 0: cannot be read"),
        ("g.csv", b"text,label\na,1\nb,2,3\n", "g.csv, row 2: has 3 cells but the first line 2"),
        ("h.csv", b"", "h.csv is empty: it has no header"),
        ("i.jsonl", b"\n\n", "i.jsonl has no rows"),
        ("j.csv", b"text,label\n", "j.csv has no rows"),
        ("k.xlsx", b"", "k.xlsx is none of .parquet, .jsonl"),
    ],
)
def test_an_unreadable_file_is_named(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        values(tmp_path / name)


def test_an_address_without_data_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(storage.NotFoundError, match="none-such"):
        read_rows(str(tmp_path / "none-such"), ["text"])
    (tmp_path / "notes.md").write_text("none")
    with pytest.raises(DataError, match="1 files, none of"):
        read_rows(str(tmp_path), ["text"])
    write(ROWS, tmp_path / "a.jsonl")
    write(ROWS, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"several kinds \(.jsonl, .parquet\).*a pattern such as"):
        read_rows(str(tmp_path), ["text"])
    with pytest.raises(DataError, match=r"sample://unheard.*sample://reviews"):
        read_rows("sample://unheard", ["text"])


def test_a_large_file_is_read_lazily(tmp_path: Path) -> None:
    """The first row is there although the file's end is damaged."""
    path = tmp_path / "large.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 10_000 + b"damaged")
    rows = read_rows(str(path), ["text"])
    assert next(rows).values == {"text": "a"}
    with pytest.raises(DataError, match="row 10001"):
        list(rows)


@pytest.mark.parametrize("ending", ["jsonl.gz", "json.zst", "csv.gz", "csv.zst", "txt.gz"])
def test_compressed_files_are_read_and_their_damage_is_detected(
    ending: str, tmp_path: Path, s3: LocalS3
) -> None:
    """Also several streams one after the other, as `cat a.gz b.gz` makes them."""
    rows = [{"text": f"row {number} {'🙂' * (number % 50)}"} for number in range(2000)]
    path = write(rows, tmp_path / f"data.{ending}")
    plain = values(write(rows, tmp_path / f"data.{ending.partition('.')[0]}"))
    assert values(path) == plain
    storage.upload(path, f"s3://{s3.bucket}/{ending}/data.{ending}")
    assert values(f"s3://{s3.bucket}/{ending}") == plain
    content = path.read_bytes()
    if "json" in ending:
        path.write_bytes(content * 2)
        assert values(path) == plain * 2
    for damaged in (content[:-5], content[: len(content) // 2], content[:-20] + b"x" * 20):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"data.{ending}, after row .*cannot be read"):
            values(path)
    (tmp_path / "data.parquet.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"data.parquet.gz is none of .parquet, .*with .gz or .zst"):
        values(tmp_path / "data.parquet.gz")


def test_a_folder_may_mix_compressed_and_plain_files(tmp_path: Path) -> None:
    write([{"text": "a"}], tmp_path / "a.csv")
    write([{"text": "b"}], tmp_path / "b.csv.gz")
    (tmp_path / "c.tsv").write_text("id\ttext\n1\tc\n")
    assert [row["text"] for row in values(tmp_path)] == ["a", "b", "c"]
    write([{"text": "d"}], tmp_path / "d.jsonl.zst")
    with pytest.raises(DataError, match=r"several kinds \(.csv, .csv.gz, .jsonl.zst, .tsv\)"):
        values(tmp_path)


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_objects_is_read_element_by_element(
    indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"row {n}, {{[" + "ü" * (n % 40), "more": [{"a": n}] * 3} for n in range(300)]
    path = tmp_path / "data.json"
    path.write_text("\ufeff " + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n")
    for chunk in (1, 7, 100, 2**20):  # every place where a piece can end
        monkeypatch.setattr(json_rows, "CHUNK", chunk)
        read = list(read_rows(str(path), ["text"]))
        assert [row.values["text"] for row in read] == [row["text"] for row in rows]
        assert [row.number for row in read] == list(range(1, 301))
    path.write_bytes(path.read_bytes()[:2000] + b"damaged")
    read_until = read_rows(str(path), ["text"])
    assert next(read_until).values["text"] == rows[0]["text"]
    with pytest.raises(DataError, match=r"data.json, row "):
        list(read_until)


@pytest.mark.parametrize("indent", [None, 2])
def test_squads_own_file_gives_a_row_per_question(indent: int | None, tmp_path: Path) -> None:
    def paragraph(context: str, *answers: str) -> dict[str, Any]:
        return {
            "context": context,
            "qas": [
                {
                    "id": answer,
                    "question": f"What is {answer}?",
                    "answers": [{"text": answer, "answer_start": context.find(answer)}],
                    "is_impossible": False,
                }
                for answer in answers
            ],
        }

    document = {
        "version": "1.1",
        "data": [
            {"title": "A", "paragraphs": [paragraph("one two", "one", "two")]},
            {"title": "B", "paragraphs": [paragraph("no questions"), paragraph("three", "three")]},
        ],
    }
    document["data"][1]["paragraphs"][1]["qas"][0]["answers"] = []  # type: ignore[index]
    path = tmp_path / "train-v1.1.json"
    path.write_text(json.dumps(document, indent=indent))
    rows = list(read_rows(str(path), ANSWERED))
    assert [(row.number, row.values["question"], row.values["context"]) for row in rows] == [
        (1, "What is one?", "one two"),
        (2, "What is two?", "one two"),
        (3, "What is three?", "three"),
    ]
    assert rows[1].values["answers"] == [{"text": "two", "answer_start": 4}]
    assert rows[2].values["answers"] == []
    assert [r["text"] for r in values(path, {"text": "context"})] == ["one two"] * 2 + ["three"]
    del document["data"][0]["paragraphs"][0]["qas"][1]["answers"]  # type: ignore[index]
    path.write_text(json.dumps(document, indent=indent))
    with pytest.raises(DataError, match=r"train-v1.1.json, row 2: no column 'answers'; there are"):
        values(path, needed=ANSWERED)
    document["data"][0]["paragraphs"] = [{"text": "?"}]  # type: ignore[index]
    path.write_text(json.dumps(document, indent=indent))
    with pytest.raises(DataError, match="row 1: SQuAD's paragraphs have a context and qas, got"):
        values(path, needed=ANSWERED)


def squad(articles: int, paragraphs: int = 2) -> dict[str, Any]:
    """SQuAD's form: articles of some kilobytes, a question for each paragraph."""
    context = "it is a long way " * 60
    return {
        "data": [
            {
                "title": f"article {a}",
                "paragraphs": [
                    {
                        "context": f"{context}{a}",
                        "qas": [{"question": f"what is {a}.{p}?", "answers": []}],
                    }
                    for p in range(paragraphs)
                ],
            }
            for a in range(articles)
        ],
        "version": 1.1,
    }


@pytest.mark.parametrize("indent", [None, 2])
def test_squads_own_file_is_read_article_by_article(
    indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory holds an article, however many there are; every place where a piece can end."""
    path = tmp_path / "train.json"
    document = squad(3)
    first = {"version": document["version"], "data": document["data"]}
    questions = [f"what is {a}.{p}?" for a in range(3) for p in range(2)]
    for chunk, whole in ((1, document), (7, {**first, "version": "v2.0"}), (2**20, document)):
        monkeypatch.setattr(json_rows, "CHUNK", chunk)
        path.write_text(json.dumps(whole, indent=indent))
        assert [row["question"] for row in values(path, needed=ANSWERED)] == questions

    def peak(articles: int) -> int:
        path.write_text(json.dumps(squad(articles), indent=indent))
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_rows(str(path), ANSWERED)) == 2 * articles
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    monkeypatch.setattr(json_rows, "CHUNK", 1000)
    peak(2)
    assert peak(400) < peak(40) + 200_000  # of a million


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('}], "version"', '} "version"'), "row 7: expected ',' of the array, got"),
        (
            ('"version": 1.1}', '"version" 1.1}'),
            "row 7: expected ':' of SQuAD's object, got '1.1}'",
        ),
        (('"version": 1.1}', '"version": 1.1'), "row 7: expected ',' of SQuAD's object, got ''"),
        (("1.1}", '1.1}\n{"data": []}'), "row 7: SQuAD's object must be all of the file"),
        (('"what is 1.0?"', "what is 1.0?"), "row 3: must be a JSON object.*Expecting value"),
        (('{"title": "article 2", "paragraphs": [', '{"b": ['), "row 5: SQuAD's paragraphs must"),
    ],
)
def test_what_is_wrong_in_squads_own_file_is_named(
    change: tuple[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "train.json"
    text = json.dumps(squad(3))
    assert change[0] in text
    path.write_text(change[1].join(text.rsplit(change[0], 1)))
    with pytest.raises(DataError, match=message):
        values(path, needed=ANSWERED)


def test_another_object_over_several_lines_is_read_at_once_up_to_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as SQuAD's with what others have put before its data."""
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"about": "us", **squad(3)}, indent=1))
    assert len(values(path, needed=ANSWERED)) == 6
    monkeypatch.setattr(json_rows, "AT_ONCE", 2000)
    with pytest.raises(DataError, match=r"row 1: is an object of more than .* over several lines"):
        values(path, needed=ANSWERED)


@pytest.mark.parametrize("at_once", [4, 40, 2**26])
def test_an_unfinished_first_line_costs_no_other_row(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It might be the first of an object over several lines, for which the rest is read."""
    monkeypatch.setattr(json_rows, "AT_ONCE", at_once)
    path = tmp_path / "data.jsonl"
    path.write_text('{"text":\n' + "".join(f'{{"text": "row {n}"}}\n' for n in range(5)))
    with pytest.raises(DataError, match="row 1: must be a JSON object"):
        list(read_rows(str(path), ["text"]))
    errors: list[DataError] = []
    rows = list(read_rows(str(path), ["text"], on_bad=errors.append))
    assert [row.values["text"] for row in rows] == [f"row {n}" for n in range(5)]
    assert [row.number for row in rows] == [2, 3, 4, 5, 6]
    assert [error.number for error in errors] == [1]


def test_rows_that_begin_like_squads_own_file_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"data": [{"title": "a \\"b\\"", "n": 1}], "text": "c"}\n' * 2)
    assert [row["text"] for row in values(path)] == ["c", "c"]


@pytest.mark.slow
def test_numbers_of_squads_own_file_may_lie_at_any_border(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(squad(1)).replace("1.1}", "-1.25e-3}"))
    for chunk in range(1, path.stat().st_size):
        monkeypatch.setattr(json_rows, "CHUNK", chunk)
        assert len(values(path, needed=ANSWERED)) == 2


BACKSLASH_U = "\\u"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f'{{"text": "a{BACKSLASH_U}d800b"}}', "row 2, column 'text': has an invalid character"),
        (f'{{"text": ["{BACKSLASH_U}DFFF"]}}', "row 2, column 'text': has an invalid character"),
        ('{"text": ' + "7" * 5000 + "}", "row 2: must be a JSON object.*4300"),
        ('{"text": ' + "[" * 100_000, "row 2: .*nested too deeply"),
        ('{"text": "a", "text": "b"}', "row 2: has the key 'text' twice"),
        ('{"text": "a\xff"}', "row 2.*is not UTF-8|row 2.*bytes that are not UTF-8"),
    ],
)
@pytest.mark.parametrize("form", ["lines", "array"])
def test_unusable_json_is_named(form: str, line: str, message: str, tmp_path: Path) -> None:
    other = f'{{"text": "{BACKSLASH_U}d800", "a": 1, "a": 2}}'  # in a column that nobody reads
    fine = f'{{"text": "fine {BACKSLASH_U}d83d{BACKSLASH_U}de00", "other": {other}}}'
    path = tmp_path / "data.json"
    text = f"{fine}\n{line}\n" if form == "lines" else f"[{fine},\n{line}]"
    path.write_bytes(text.encode("latin-1"))
    rows = read_rows(str(path), ["text"])
    assert next(rows).values["text"] == "fine 😀"
    with pytest.raises(DataError, match=f"data.json, {message}"):
        list(rows)


def csv_file(folder: Path, content: str | bytes, name: str = "data.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_cells_may_be_large(tmp_path: Path) -> None:
    """2.5 MB in one, and line breaks across 0.9 MB in two of one row."""
    lines = "a line\n" * 130_000
    path = csv_file(tmp_path, f'text,label\n{"x" * 2_500_000},a\n"{lines}","{lines}"\nlast,b\n')
    read = values(path, needed=LABELLED)
    assert [len(row["text"]) for row in read] == [2_500_000, len(lines), 4]
    assert read[1]["label"] == lines


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    """Whatever those before look like, and whatever is in columns that nobody needs."""
    labels = ["001", "10:30", "2024-01-31", "1e5", "true", "", "NA", "0"]
    rows = [f"{n},text {n},{labels[n % 8]}" for n in range(40_000)]
    rows[30_000] = "a7,text 30000,unknown"
    path = csv_file(tmp_path, "id,text,label\r\n" + "\r\n".join(rows) + "\r\n\r\n")
    assert path.stat().st_size > 2**20 / 2
    read = values(path, needed=LABELLED)
    assert [row["label"] for row in read[:8]] == labels
    assert read[30_000] == {"text": "text 30000", "label": "unknown"}
    assert len(read) == 40_000


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "^"])
def test_a_csvs_delimiter_is_detected_or_set(delimiter: str, tmp_path: Path) -> None:
    header = delimiter.join(["id", "a; b, c | d", "text", '"label"'])
    cells = delimiter.join(["1", "2", '"one; two, three|four\t""five"" ^"', '"a\nb"'])
    path = csv_file(tmp_path, f"\ufeff\n{header}\n{cells}\n".replace("a; b, c | d", "x"))
    expected = [{"text": 'one; two, three|four\t"five" ^', "label": "a\nb"}]
    given = delimiter if delimiter == "^" else None
    read = [row.values for row in read_rows(str(path), LABELLED, delimiter=given)]
    assert read == expected
    if given:
        with pytest.raises(
            DataError, match=r"no column 'text'.*split at ','; data.delimiter= sets"
        ):
            values(path, needed=LABELLED)
    with pytest.raises(DataError, match=r"data.delimiter='x' is for CSV"):
        read_rows(str(write(ROWS, tmp_path / "a.jsonl")), LABELLED, delimiter="x")


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_csv_without_a_header_is_read_by_position(delimiter: str, tmp_path: Path) -> None:
    """AG News's own files: the class from 1 to 4, the title, the description."""
    rows = [["3", "Wall St. Bears", "Short-sellers, again"], ["1", "x", "_c0 of y"]]
    lines = [delimiter.join(f'"{cell}"' for cell in row) for row in rows]
    path = csv_file(tmp_path, "\n".join(lines) + "\n")
    columns = {"text": "_c2", "label": "_c0"}
    found = list(read_rows(str(path), LABELLED, columns))
    assert [row.values for row in found] == [{"text": row[2], "label": row[0]} for row in rows]
    assert [row.number for row in found] == [1, 2]
    with pytest.raises(
        DataError, match=r"no column '_c3' \(for label\); there are '_c0', '_c1', '_c2'"
    ):
        list(read_rows(str(path), LABELLED, {"text": "_c2", "label": "_c3"}))
    with pytest.raises(DataError, match=r"row 2: has 1 cells but the first line 3"):
        path.write_text(lines[0] + "\nalone\n")
        list(read_rows(str(path), LABELLED, columns))


def test_a_header_may_have_names_like_positions(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "_c1,_c0\na,b\n")
    found = values(path, columns={"text": "_c0", "label": "_c1"}, needed=LABELLED)
    assert found == [{"text": "b", "label": "a"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label,text\na,b,c\n", "data.csv has the column 'text' twice; remedy"),
        ("id,text,id\na,b,c\n", "data.csv has the column 'id' twice"),
        ('text\na\n"b\nc\n', "data.csv, row 2: unexpected end of data"),
        ('text,label\na,b\n"a" b,c\n', "data.csv, row 2: ',' expected after '\"'; remedy: quote"),
        (b"text,label\na,b\nb\xff,c\n", "data.csv, row 2, column 'text': is not UTF-8"),
        ("text\n".encode("utf-16"), "data.csv is not UTF-8.*remedy: save it as UTF-8"),
        ("text,label\na\n", "data.csv, row 1: has 1 cells but the first line 2"),
        ("\n\n", "data.csv is empty"),
    ],
)
def test_an_invalid_csv_is_named(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        values(csv_file(tmp_path, content))


def test_unnamed_and_damaged_cells_do_not_matter_in_columns_that_are_not_needed(
    tmp_path: Path,
) -> None:
    path = csv_file(tmp_path, b"note,text,,\n\xff,a,,\n")
    assert values(path) == [{"text": "a"}]


def test_parquet_reads_only_the_needed_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in bytes of a file whose other column has 20 MB."""
    path = tmp_path / "data.parquet"
    table = pa.table(
        {
            "text": [f"row {number}" for number in range(200)],
            "image": [os.urandom(100_000) for _ in range(200)],
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=50)
    counted = 0

    class Counting(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            nonlocal counted
            count = super().readinto(buffer)
            counted += count
            return count

    @contextmanager
    def opened(address: str) -> Iterator[Any]:
        with io.BufferedReader(Counting(address)) as file:
            yield file

    monkeypatch.setattr(storage, "open_read", opened)
    assert [row["text"] for row in values(path)] == table.column("text").to_pylist()
    assert counted < 1_000_000 < path.stat().st_size


def test_parquet_types_become_json_types(tmp_path: Path) -> None:
    """Dates beyond Python's last one, which is the year 9999, too."""
    year_10000 = 253_402_300_800
    columns = {
        "day": pa.array([year_10000 // 86400, None], pa.int32()).cast(pa.date32()),
        "instant": pa.array([year_10000 * 10**6, 0], pa.timestamp("us")),
        "time": pa.array([37_800, 0], pa.time32("s")),
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "rating": pa.array([Decimal("4.5"), Decimal("1.0")]),
        "number": pa.array([Decimal("4"), Decimal("1")]),
        "half": pa.array([0.5, 1.5], pa.float16()),
        "list": pa.array([[1, 0], []]),
    }
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"], **columns}), path)
    assert [row["text"] for row in values(path)] == ["a", "b"]
    (row, _) = values(path, needed=tuple(columns))
    assert row.pop("day") in ("10000-01-01", "+10000-01-01")
    assert row.pop("instant").removeprefix("+").startswith("10000-01-01 00:00:00")
    assert row.pop("time").startswith("10:30:00")
    assert row == {"kind": "a", "rating": 4.5, "number": 4, "half": 0.5, "list": [1, 0]}
    assert type(row["number"]) is int


def test_damaged_text_and_duplicate_columns_of_parquet_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    good, bad = pa.array(["a", "b", "c"]), pa.array([b"a", b"\xff", b"c"])
    bad = pa.Array.from_buffers(pa.string(), 3, bad.buffers())
    pyarrow.parquet.write_table(pa.table({"text": bad, "other": good}), path)
    with pytest.raises(
        DataError, match=r"data.parquet, row 2, column 'text': cannot be read.*utf-8"
    ):
        values(path)
    assert len(values(path, {"text": "other"})) == 3
    pyarrow.parquet.write_table(pa.Table.from_arrays([good, good], ["text", "text"]), path)
    with pytest.raises(DataError, match=r"data.parquet has the column 'text' twice"):
        values(path)


def test_a_large_text_is_several_documents_cut_at_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the line ends of Windows, and a byte order mark."""
    monkeypatch.setattr(formats, "TEXT_CHARACTERS", 50)
    lines = [f"line {n} {'ü' * (n % 9)}" for n in range(60)]
    text = "\n".join(lines)
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    rows = list(read_rows(str(path), ["text"]))
    assert "".join(row.values["text"] for row in rows) == text
    assert [row.number for row in rows] == list(range(1, len(rows) + 1)) and len(rows) > 8
    assert all(row.values["text"].endswith("\n") for row in rows[:-1])
    path.write_bytes(text.encode() + b"\xff\n" + b"good\n" * 40)
    bad: list[DataError] = []
    found = list(read_rows(str(path), ["text"], on_bad=bad.append))
    assert len(bad) == 1 and "is not UTF-8" in str(bad[0])
    assert found[-1].values["text"].startswith("good")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv"])
def test_line_ends_and_a_byte_order_mark_do_not_matter(
    form: str, mark: bytes, ending: str, tmp_path: Path
) -> None:
    texts = {
        "jsonl": '{"text": "a", "label": 1}\n\n{"text": "b", "label": 2}\n',
        "json": '[\n{"text": "a", "label": 1},\n{"text": "b", "label": 2}\n]\n',
        "csv": "text,label\na,1\n\nb,2\n",
        "tsv": "text\tlabel\na\t1\nb\t2\n",
    }
    path = tmp_path / f"rows.{form}"
    path.write_bytes(mark + texts[form].replace("\n", ending).encode())
    assert [row["text"] for row in values(path, needed=LABELLED)] == ["a", "b"]


def test_hidden_folders_are_ignored(tmp_path: Path) -> None:
    write([{"text": "a"}], tmp_path / "a.jsonl")
    for name in (".cache", "_temporary"):
        write([{"text": "hidden"}], tmp_path / name / "b.jsonl")
    assert [row["text"] for row in values(tmp_path)] == ["a"]
    (tmp_path / "a.jsonl").rename(tmp_path / "_a.jsonl")
    with pytest.raises(DataError, match=r"begin with \. or _.*; remedy: rename them"):
        values(tmp_path)


def test_what_an_address_leaves_out_is_not_read(tmp_path: Path, monkeypatch: Any) -> None:
    """Broken links here; other users' folders, such as systemd's in /tmp, are like them."""
    for name in ("a", "deep/er/b"):
        write([{"text": name}], tmp_path / f"{name}.jsonl")
    nowhere = tmp_path / "not" / "mounted"
    for name in (".#a.jsonl", ".git/hook", "_old/b.jsonl", "deep/er/still/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(nowhere)
    assert [row["text"] for row in values(tmp_path / "*.jsonl")] == ["a"]
    assert [row["text"] for row in values(tmp_path / "*" / "er" / "*.jsonl")] == ["deep/er/b"]
    looked, scandir = [], os.scandir
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda path: looked.append(Path(path)) or scandir(path))
        values(tmp_path / "*.jsonl")
        assert looked == [tmp_path]
    with pytest.raises(storage.StorageError, match="broken link"):
        values(tmp_path / "deep")
    (tmp_path / "deep/er/still/c.jsonl").unlink()
    assert [row["text"] for row in values(tmp_path)] == ["a", "deep/er/b"]
    (tmp_path / "part.jsonl").symlink_to(nowhere)
    with pytest.raises(storage.StorageError, match=r"part\.jsonl is a broken link"):
        values(tmp_path / "*.jsonl")


def test_null_and_nested_columns_of_parquet_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    columns = {"null": [None, None], "nested": [{"a": 1}, {"a": 2}], "bytes": [b"a", b"b"]}
    pyarrow.parquet.write_table(pa.table(columns), path)
    for name, shown in (("null", "None"), ("nested", "{'a': 1}"), ("bytes", "b'a'")):
        row = next(read_rows(str(path), ["text"], {"text": name}))
        with pytest.raises(DataError, match=f"row 1, column '{name}': must be text, got {shown}"):
            row.text("text")


@pytest.mark.parametrize(
    ("data", "folder", "is_read"),
    [
        ("data", "data", True),
        ("data", "data/out", True),
        ("data", "data/a/out", True),
        ("data", "data/_out", False),
        ("data", "data/.out/a", False),
        ("data", "data-out", False),
        ("data", "out", False),
        ("data/a", "data", False),
        ("data/a", "data/a/b", True),
        ("data/*.jsonl", "data", True),
        ("data/*.jsonl", "data/out", False),
        ("data/ro*.jsonl", "data", False),
        ("data/*/*.jsonl", "data/out", True),
        ("data/*/*.jsonl", "data/a", True),
        ("data/rows.jsonl", "data", False),
        ("data/rows.jsonl", "data/out", False),
        ("*/*.jsonl", "data", True),
    ],
)
@pytest.mark.parametrize("place", ["relative", "absolute", "mixed", "linked", "s3"])
def test_a_folder_whose_files_would_be_read_as_data_is_refused(
    data: str,
    folder: str,
    is_read: bool,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Of these files exactly, as reading the data after they are written tells."""
    monkeypatch.chdir(tmp_path)
    root = str(tmp_path)
    if place == "s3":
        request.getfixturevalue("s3")
        root = f"s3://gptj/apart/{tmp_path.name}"
    given, output = (storage.join(root, each) for each in (data, folder))
    if place == "linked":
        (tmp_path / "links").symlink_to(tmp_path)
        output = f"links/{folder}"
    elif place in ("relative", "mixed"):
        given = data
        output = folder if place == "relative" else output
    for name in ("data/rows.jsonl", "data/a/rows.jsonl"):
        storage.write_bytes(storage.join(root, name), b'{"text": "x"}\n')
    names = ["output-0.jsonl", "notes.md", "unfinished/plan.json"]
    before = data_files(given)
    if is_read:
        with pytest.raises(DataError, match=r"output-0\.jsonl, would be read as data when the job"):
            check_apart(given, output, names)
    else:
        check_apart(given, output, names)
    for name in names[:2]:
        storage.write_bytes(storage.join(root, folder, name), b'{"text": "y"}\n')
    assert (data_files(given) != before) == is_read


def test_built_in_data_are_apart_from_any_folder() -> None:
    check_apart("sample://causal-lm", "sample", ["index.json"])
    check_apart("hf://datasets/a/b", ".", ["index.json"])
