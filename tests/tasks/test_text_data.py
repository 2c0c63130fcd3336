"""Labelled texts: reading, columns, duplicates, splits."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from obert_kernels.tasks import downloads, text_data
from obert_kernels.tasks.readers import load_text_data

COLOURS = ("red", "green", "blue")
QUOTES = ("", '"', "'", '""')


def rows(count: int = 60) -> list[dict[str, str]]:
    return [
        {"text": f"text number {index}, with a comma", "label": COLOURS[index % 3]}
        for index in range(count)
    ]


def write(folder: Path, name: str, frame: pandas.DataFrame) -> str:
    path = folder / name
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".tsv":
            frame.to_csv(path, index=False, sep="\t")
        case ".jsonl":
            frame.to_json(path, orient="records", lines=True)
        case ".json":
            frame.to_json(path, orient="records")
        case ".parquet":
            frame.to_parquet(path)
    return str(path)


def all_texts(data: text_data.TextData) -> list[str]:
    return [*data.train.texts, *data.dev.texts, *data.test.texts]


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_task(tmp_path: Path, ending: str) -> None:
    frame = pandas.DataFrame(rows())
    data = load_text_data(write(tmp_path, f"data.{ending}", frame))
    expected = load_text_data(write(tmp_path, "expected.csv", frame))
    assert (data.train, data.dev, data.test) == (expected.train, expected.dev, expected.test)
    assert data.label_names == ["blue", "green", "red"]
    assert sorted(all_texts(data)) == sorted(row["text"] for row in rows())
    by_text = {row["text"]: row["label"] for row in rows()}
    for text, label in zip(data.train.texts, data.train.labels, strict=True):
        assert data.label_names[label] == by_text[text]


def test_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    frame = pandas.DataFrame(rows(2000))
    data = load_text_data(write(tmp_path, "a.csv", frame))
    shares = [len(part) / 2000 for part in (data.train, data.dev, data.test)]
    assert shares == pytest.approx([0.75, 0.10, 0.15], abs=0.03)
    shuffled = frame.sample(frac=1, random_state=1).iloc[:1500]
    other = load_text_data(write(tmp_path, "b.csv", shuffled))
    assert set(other.train.texts) <= set(data.train.texts)
    assert set(other.test.texts) <= set(data.test.texts)


def test_duplicates_are_removed(tmp_path: Path) -> None:
    doubled = rows() + [{**row, "text": f"  {row['text'].upper()} "} for row in rows()]
    data = load_text_data(write(tmp_path, "a.csv", pandas.DataFrame(doubled)))
    assert len(all_texts(data)) == 60


def test_rows_without_text_or_label_are_left_out(tmp_path: Path) -> None:
    holes = [*rows(), {"text": "", "label": "red"}, {"text": "no label", "label": None}]
    data = load_text_data(write(tmp_path, "a.jsonl", pandas.DataFrame(holes)))
    assert len(all_texts(data)) == 60


def test_what_marks_a_missing_value_does_not_matter(tmp_path: Path) -> None:
    """pandas' own NA, which is neither equal to itself nor not, in text, pair or label."""
    holes = [{"text": None, "label": "red"}, {"text": "no label", "label": None}]
    frame = pandas.DataFrame(rows() + holes).assign(number=[*range(3)] * 20 + [None, None])
    frame["number"] = frame["number"].astype("Int64")
    path = write(tmp_path, "a.parquet", frame.convert_dtypes())
    for column in ("label", "number"):
        data = load_text_data(path, label_column=column)
        assert len(all_texts(data)) == 60 and len(data.label_names) == 3


def test_quotation_marks_of_a_tsv_file_may_be_text(tmp_path: Path) -> None:
    texts = [f'{mark}a {index} "great" film{mark[::-1]}' for index in range(10) for mark in QUOTES]
    path = tmp_path / "plain.tsv"
    lines = [f"{text}\t{index % 2}\n" for index, text in enumerate(texts)]
    path.write_text("".join(["text\tlabel\n", *lines, "\n"]))
    assert sorted(all_texts(load_text_data(str(path)))) == sorted(texts)
    # Where they are quoted as in a CSV file they are read as such.
    frame = pandas.DataFrame({"text": [*texts, "two\nlines"], "label": [*range(2)] * 20 + [1]})
    quoted = load_text_data(write(tmp_path, "quoted.tsv", frame))
    assert sorted(all_texts(quoted)) == sorted([*texts, "two\nlines"])
    quoted = load_text_data(write(tmp_path, "no_breaks.tsv", frame[:-1]))
    assert sorted(all_texts(quoted)) == sorted(texts)
    # Not one of them is wrong as a mark, but they join lines.
    path.write_text("".join(["text\tlabel\n", *(f'"a {index}\t1\nfine {index}"\t0\n'
                                                 for index in range(30))]))  # fmt: skip
    assert len(all_texts(load_text_data(str(path)))) == 60
    # What a lone mark joins may be longer than a field can be.
    path.write_text("".join(["text\tlabel\n", *(f'"{index} {"x" * 5000}\t{index % 2}\n'
                                                 for index in range(60))]))  # fmt: skip
    assert len(all_texts(load_text_data(str(path)))) == 60


def test_classes_named_by_numbers_keep_their_order(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"text": [f"t {i}" for i in range(120)], "label": range(120)})
    frame["label"] %= 12
    assert load_text_data(write(tmp_path, "a.csv", frame)).label_names == [
        str(index) for index in range(12)
    ]


def test_pairs_are_found_by_name_and_by_option(tmp_path: Path) -> None:
    frame = pandas.DataFrame(rows()).rename(columns={"text": "premise"})
    frame["hypothesis"] = "because " + frame["premise"]
    path = write(tmp_path, "a.csv", frame)
    for data in (load_text_data(path), load_text_data(path, "premise", "hypothesis")):
        assert data.test.pairs == ["because " + text for text in data.test.texts]
    assert load_text_data(path, text_column="premise").test.pairs is None


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"text": "a"}, {}, "looks like the text.*columns a, label.*--text-column"),
        ({"label": "b"}, {}, "looks like the label.*columns text, b.*--label-column"),
        ({}, {"label_column": "c"}, "no column 'c' for --label-column.*text, label"),
        ({}, {"text_column": "label", "label_column": "label"}, "different columns"),
        ({}, {"label_column": "text", "text_column": "label"}, "no classification task"),
    ],
)
def test_wrong_columns_are_named(
    tmp_path: Path, change: dict[str, str], options: dict[str, str], message: str
) -> None:
    path = write(tmp_path, "a.csv", pandas.DataFrame(rows()).rename(columns=change))
    with pytest.raises(ValueError, match=message):
        load_text_data(path, **options)


def test_a_class_may_be_minus_one(tmp_path: Path) -> None:
    """Which marks what is hidden in data sets of the hub alone."""
    frame = pandas.DataFrame(rows()).assign(label=[index % 3 - 1 for index in range(60)])
    data = load_text_data(write(tmp_path, "a.csv", frame))
    assert data.label_names == ["-1", "0", "1"]
    assert len(data.train) + len(data.dev) + len(data.test) == 60


def test_a_score_is_no_class(tmp_path: Path) -> None:
    frame = pandas.DataFrame(rows()).assign(label=[index / 7 for index in range(60)])
    with pytest.raises(ValueError, match="only classes are supported"):
        load_text_data(write(tmp_path, "a.csv", frame))


def test_unusable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*missing\.csv"):
        load_text_data(str(tmp_path / "missing.csv"))
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(ValueError, match=r"unknown ending: supported are \.csv"):
        load_text_data(str(tmp_path / "a.doc"))
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as PARQUET"):
        load_text_data(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="no rows with a text and a class"):
        load_text_data(write(tmp_path, "a.csv", pandas.DataFrame(rows(1)[:1]).assign(text="")))
    with pytest.raises(ValueError, match="no classification task"):
        load_text_data(write(tmp_path, "a.csv", pandas.DataFrame(rows(1))))
    with pytest.raises(ValueError, match="choose trec or mr"):
        load_text_data("demo:imdb")


def test_parts_of_a_hub_data_set_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=list(COLOURS))
    )

    def part(name: str, label: str | int) -> object:
        texts = [f"{name} {index}" for index in range(30)]
        labels = [COLOURS[index % 3] if label == "known" else label for index in range(30)]
        labels += [None] * (name == "gaps")
        texts += ["of no class"] * (name == "gaps")
        return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)

    hub = {
        "set": {name: part(name, "known") for name in ("train", "validation", "test")},
        "hidden": {"train": part("a", "known"), "validation": part("b", "known"),
                   "test": part("c", -1)},
        "gaps": {"train": part("gaps", "known"), "test": part("b", "known")},
    }  # fmt: skip
    monkeypatch.setattr(datasets, "load_dataset", lambda name, _: datasets.DatasetDict(hub[name]))
    data = load_text_data("set")
    assert (len(data.train), len(data.dev), len(data.test)) == (30, 30, 30)
    assert data.test.texts == [f"test {index}" for index in range(30)]
    assert data.label_names == list(COLOURS), "in the order that models were fitted in"
    assert data.test.labels == [index % 3 for index in range(30)]
    hidden = load_text_data("hidden")
    assert hidden.test.texts == [f"b {index}" for index in range(30)]
    assert len(hidden.train) + len(hidden.dev) == 30
    gaps = load_text_data("gaps")
    assert (len(gaps.train) + len(gaps.dev), len(gaps.test)) == (30, 30)


def test_label_order_can_be_changed(tmp_path: Path) -> None:
    data = load_text_data(write(tmp_path, "a.csv", pandas.DataFrame(rows())))
    changed = data.with_label_order(COLOURS)
    assert [COLOURS[label] for label in changed.test.labels] == [
        data.label_names[label] for label in data.test.labels
    ]
    with pytest.raises(ValueError, match="the classes are"):
        data.with_label_order(["red", "green"])


@pytest.mark.skipif(
    not any(downloads.cache_folder().glob(f"{downloads.TEXTS_PACKAGE.name}*")),
    reason="the demo's texts are not in the cache: run `obert-prune demo` once",
)
@pytest.mark.parametrize(("name", "classes", "texts"), [("trec", 6, 5380), ("mr", 2, 10040)])
def test_demo_sets(name: str, classes: int, texts: int) -> None:
    data = load_text_data(f"demo:{name}")
    assert len(data.label_names) == classes
    assert len(all_texts(data)) == pytest.approx(texts, abs=5)
    assert set(data.train.texts).isdisjoint(data.test.texts)
