"""Files that people have: nothing in them is lost without a word."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
from pathlib import Path

import pandas
import pytest

from obert_kernels.tasks.readers import load_text_data

HEAD = "text,label\n"
BODY = "".join(f"text number {index},{index % 2}\n" for index in range(60))
ROWS = [{"text": f"text number {index}", "label": index % 2} for index in range(60)]


def texts_of(path: Path, **columns: str) -> list[str]:
    data = load_text_data(str(path), **columns)
    return [*data.train.texts, *data.dev.texts, *data.test.texts]


def refused(path: Path, message: str, **columns: str) -> None:
    with pytest.raises((ValueError, OSError), match=message) as error:
        load_text_data(str(path), **columns)
    assert "\n" not in str(error.value) and path.name in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEAD + BODY + "a, b,1\n", "line 62 of .* has 3 fields, its first line 2 .*commas in quot"),
        (HEAD + BODY.replace("\n", ",\n"), "line 2 of .* has 3 fields"),
        (HEAD + BODY + "cut off", "line 62 of .* has 1 field, .*cut off"),
        (HEAD + '"open,1\n' + BODY, "line 62 of .* cannot be read .unexpected end of data"),
        (HEAD + '"Hello" he said,1\n' + BODY, "line 2 of .* cannot be read .*doubled inside"),
        (HEAD + BODY + '"open,1\n' + BODY + 'close",0\n' + BODY, "lines that look like rows"),
        (
            'label,text\n0,"open\n1,one\n0,two"\n' + "1,a\n0,b\n" * 30,
            "one field of several lines that look like rows, from '0,open'",
        ),
        (BODY, "columns text number 0, 0 in its first line; name it with --text-column"),
        ("text,text,label\n" + "a,b,1\n" * 9, "two columns named 'text': rename one"),
        ("text,Text,label\n" + "a,b,1\n" * 9, "two columns named 'text': rename one"),
        (HEAD + "a\0b,1\n", "zero bytes: it is no text, or text in UTF-16"),
        ("", "is empty"),
        (" \n\n", "is empty"),
    ],
)
def test_lines_that_would_lose_text_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    refused(path, message)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (HEAD + '"two\nlines, a",1\n' + BODY, "two\nlines, a"),
        (HEAD + '"one, more\nlines, a",1\n' + BODY, "one, more\nlines, a"),
        (HEAD + 'he said "hi",1\n' + BODY, 'he said "hi"'),
        (HEAD + "# 1 good,1\n" + BODY, "# 1 good"),
        (HEAD + "NA,1\nnull,0\nNone,1\nnan,0\n" + BODY, "NA"),
        (HEAD + "NA,1\nnull,0\nNone,1\nnan,0\n" + BODY, "null"),
        (HEAD + "007,1\n" + BODY, "007"),
        (HEAD + "1.50,1\n" + BODY, "1.50"),
        (HEAD + "y" * 200_000 + ",1\n" + BODY, "y" * 200_000),
        ("\n" + HEAD + "first,1\n" + BODY.replace("\n", "\n\n"), "first"),
        ((HEAD + "first,1\n" + BODY).replace("\n", "\r\n"), "first"),
        ((HEAD + "first,1\n" + BODY).replace("\n", "\r"), "first"),
        ((HEAD + "a. b,1\n" + BODY).replace(",", ";").replace(".", ","), "a, b"),
        ((HEAD + "a. b,1\n" + BODY).replace(",", "\t").replace(".", ","), "a, b"),
        (f"text, label\n{BODY}".replace(",", ", ") + "first, 1\n", "first"),
        ('"text", "label"\n"a, b", "1"\n' + BODY.replace(",", ", "), "a, b"),
        (" Text ,LABEL\nfirst,1\n" + BODY, "first"),
        ("x,x,sentence,label\n1,2,first,0\n1,2," + BODY[:-1].replace("\n", "\n1,2,"), "first"),
    ],
)  # fmt: skip
def test_texts_are_read_as_they_are(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content, newline="")
    assert text in texts_of(path)


def test_the_columns_named_by_the_user_tell_what_divides_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a;b\n" + BODY.replace(",", ";"))
    assert len(texts_of(path, text_column="a", label_column="b")) == 60
    refused(path, "no column looks like the text")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_encodings_that_say_so_are_read(tmp_path: Path, encoding: str, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    rows = [*ROWS, {"text": "café ☕", "label": 1}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines if ending == "jsonl" else f"{HEAD}café ☕,1\n{BODY}", encoding=encoding)
    assert "café ☕" in texts_of(path) and len(texts_of(path)) == 61


@pytest.mark.parametrize("ending", ["csv", "jsonl", "csv.gz"])
def test_other_encodings_are_named_with_the_line(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    content = b'{"text": "a", "label": 1}\n' * 7 + b'{"text": "caf\xe9"}\n'
    if "csv" in ending:
        content = (HEAD + BODY[: 16 * 6]).encode() + b"caf\xe9,1\n"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    refused(path, r"line 8 of .* is not in UTF-8 \(byte 0xe9\): save the file as UTF-8")


@pytest.mark.parametrize(
    "content",
    [
        "".join(json.dumps(row) + "\n" for row in ROWS),
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        pandas.DataFrame(ROWS).to_json(),
        json.dumps(pandas.DataFrame(ROWS).to_dict("list"), indent=2),
    ],
)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_json_is_told_by_its_content(tmp_path: Path, content: str, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text(content)
    assert sorted(texts_of(path)) == sorted(str(row["text"]) for row in ROWS)


def test_json_texts_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    odd = ["007", "NA", "a\u2028b", 12]
    rows = [*ROWS, *({"text": text, "label": 1} for text in odd)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert {"007", "NA", "a\u2028b", "12"} <= set(texts_of(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": 1}\n{"text": "cut', "line 2 of .* is not JSON"),
        ('{"text": oops}\n{"text": "a", "label": 1}', "line 1 of .* is not JSON"),
        ('["a", 1]\n["b", 0]\n', "line 2 of .* is not JSON"),
        ('{"text": "a"}\n{"text": "b", "text": "c"}', "line 2 of .* two values of one name"),
        ('{"text": "a"}\n{"text": 1' + "0" * 5000 + "}", "line 2 of .* is not JSON: Exceeds"),
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
        ('{"text": "a"}\n{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
        ("null", "does not hold rows"),
        ("[]", "does not hold rows"),
    ],
)
def test_damaged_json_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    refused(path, message)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ["a"], "label": 1}, "'text' holds a list where a text should be"),
        ({"text": "\ud800 a", "label": 1}, r"'text' holds half a character \('.ud800'\)"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, row: dict[str, object], message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*ROWS, row]))
    with pytest.raises(ValueError, match=message):
        load_text_data(str(path))


def test_compressed_files_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    whole = gzip.compress((HEAD + BODY).encode())
    path.write_bytes(whole)
    assert len(texts_of(path)) == 60
    for content in (whole[: len(whole) // 2], b"text,label\n"):
        path.write_bytes(content)
        refused(path, "cannot be unpacked")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("a.xlsx", "save the sheet as CSV in UTF-8"), ("a.txt", r"rename a table to \.csv or \.tsv"),
     ("a", r"rename a table to \.csv or \.tsv")],
)  # fmt: skip
def test_other_endings_name_the_remedy(tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / name).write_text(HEAD + BODY)
    refused(tmp_path / name, f"unknown ending: supported are .csv, .*{remedy}")


def test_an_ending_in_capitals_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "A.CSV").write_text(HEAD + BODY)
    assert len(texts_of(tmp_path / "A.CSV")) == 60


def test_names_of_classes_in_a_parquet_file_are_used(tmp_path: Path) -> None:
    """Numbers would be taken for the indices of a model that has another order."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["pos", "neg"])
    )
    columns = pandas.DataFrame(ROWS).to_dict("list")
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    data = load_text_data(str(path))
    assert data.label_names == ["pos", "neg"]
    numbers = {row["text"]: row["label"] for row in ROWS}
    assert data.train.labels == [numbers[text] for text in data.train.texts]


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    """A pipe would wait for a writer for ever, /dev/zero would never end."""
    os.mkfifo(tmp_path / "pipe.csv")
    refused(tmp_path / "pipe.csv", "is a named pipe, not a file")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.csv"))
        refused(tmp_path / "s.csv", "is a socket, not a file")
    for device in ("/dev/zero", "/dev/stdin"):
        with pytest.raises(OSError, match=f"{device} is a (device|named pipe), not a file"):
            load_text_data(device)
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    refused(tmp_path / "loop.csv", re.escape("cannot be read: Too many levels"))
    (tmp_path / "dangling.csv").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "dangling.csv", "is a link to nothing")
