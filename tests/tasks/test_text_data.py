"""Labelled texts: reading, columns, duplicates, splits."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from obert_kernels.tasks import downloads, readers, text_data
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


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    doubled = [*rows(), *rows()[:7], {"text": rows()[8]["text"].upper(), "label": "red"}]
    empty = [{"text": " ", "label": "red"}, {"text": "of no class", "label": ""}]
    data = load_text_data(write(tmp_path, "a.csv", pandas.DataFrame(doubled + empty)))
    assert data.notes == (
        "2 rows without a text or a class left out",
        "8 duplicates dropped: every text is used once",
        "1 dropped text had another class than the one kept",
    )
    assert load_text_data(write(tmp_path, "b.csv", pandas.DataFrame(rows()))).notes == ()


def test_a_folder_of_parts_is_read_as_its_files_are(tmp_path: Path) -> None:
    """And a text of the test stays there, though it is among those to train, too."""
    frame = pandas.DataFrame(rows())
    write(tmp_path, "train.csv", frame[:40].assign(extra="NA"))
    test = frame[38:].assign(label=["violet", *frame["label"][39:]])
    write(tmp_path, "test.jsonl", test)
    write(tmp_path, "Validation.TSV", frame[:0])
    (tmp_path / "Validation.TSV").write_text("text\tlabel\nheld back\tred\n")
    data = load_text_data(str(tmp_path))
    assert (len(data.train), len(data.dev), len(data.test)) == (38, 1, 22)
    assert data.test.texts == list(frame["text"][38:]) and data.dev.texts == ["held back"]
    assert data.notes == (
        "2 texts dropped from train or held back: in a part that comes later as well",
        "1 dropped text had another class than the one kept",
        "no text to train has the class violet",
    )
    write(tmp_path, "train.json", frame)
    with pytest.raises(ValueError, match=r"both train\.csv and train\.json"):
        load_text_data(str(tmp_path))
    (tmp_path / "train.json").unlink()
    write(tmp_path, "dev.csv", frame)
    with pytest.raises(ValueError, match=r"both Validation\.TSV and dev\.csv"):
        load_text_data(str(tmp_path))
    (tmp_path / "dev.csv").unlink()
    (tmp_path / "test.jsonl").write_text('{"sentence": "a", "label": "red"}\n')
    with pytest.raises(ValueError, match="has no column 'text', as other parts have: it has sente"):
        load_text_data(str(tmp_path))


def test_parts_that_leave_nothing_say_why(tmp_path: Path) -> None:
    frame = pandas.DataFrame(rows())
    write(tmp_path, "train.csv", frame)
    write(tmp_path, "test.csv", frame[:0])
    note = f"the part test of {tmp_path} holds no rows: it is left out"
    assert load_text_data(str(tmp_path)).notes == (note,)
    write(tmp_path, "test.csv", frame)
    with pytest.raises(ValueError, match="0 texts to train and 60 to test on; 60 texts dropped"):
        load_text_data(str(tmp_path))


def test_numbers_are_the_same_classes_in_every_part(tmp_path: Path) -> None:
    """A missing label made floats of one part, and the parts begin with different classes."""
    numbers = [str(index % 12) for index in range(120)]
    frame = pandas.DataFrame({"text": [f"t {i}" for i in range(120)], "label": numbers})
    write(tmp_path, "train.csv", frame[:90])
    test = frame[90:].assign(label=[f"{number}.0" for number in reversed(numbers[90:])])
    write(tmp_path, "test.csv", test)
    data = load_text_data(str(tmp_path))
    assert data.label_names == [str(index) for index in range(12)]
    assert data.test.labels == [int(number) for number in reversed(numbers[90:])]


def test_saved_data_sets_are_read_from_their_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=list(COLOURS))
    )
    columns = pandas.DataFrame(rows()).to_dict("list")
    whole = datasets.Dataset.from_dict(columns, features=features)
    parts = datasets.DatasetDict(train=whole.select(range(40)), test=whole.select(range(40, 60)))
    for name, saved in (("whole", whole), ("parts", parts)):
        saved.save_to_disk(str(tmp_path / name))
        data = load_text_data(str(tmp_path / name))
        assert data.label_names == list(COLOURS) and len(all_texts(data)) == 60
    assert data.test.labels == [index % 3 for index in range(40, 60)]


def test_fewer_test_texts_are_the_same_in_any_order(tmp_path: Path) -> None:
    frame = pandas.DataFrame(rows(400))
    data = load_text_data(write(tmp_path, "a.csv", frame))
    few = data.with_fewer_tests(10)
    assert len(few.test) == 10 and (few.train, few.dev) == (data.train, data.dev)
    assert few.notes == (f"accuracies are on 10 of the {len(data.test)} test texts: "
                         "--max-test-texts",)  # fmt: skip
    shuffled = load_text_data(write(tmp_path, "b.csv", frame.sample(frac=1, random_state=1)))
    assert set(shuffled.with_fewer_tests(10).test.texts) == set(few.test.texts)
    assert set(few.test.texts) < set(data.with_fewer_tests(20).test.texts), "more are added"
    labels = dict(zip(data.test.texts, data.test.labels, strict=True))
    assert few.test.labels == [labels[text] for text in few.test.texts]
    for count in (None, len(data.test), 10_000):
        assert data.with_fewer_tests(count) is data
    with pytest.raises(ValueError, match="--max-test-texts must be at least 1"):
        data.with_fewer_tests(0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the name of the data is empty"),
        (" ", "the name of the data is empty"),
        ("FOLDER", "is a folder without data: give a file, or a folder with files such as train"),
        ("MODEL", "it is a model's folder, and the model comes first"),
        ("FOLDER/train", "there is no file .*train: check the path"),
        ("./train", "there is no file"),
        ("~/train", "there is no file /.*train"),
        ("data/sets/train", "there is no file"),
        ("train.csv.gz", "there is no file"),
    ],
)
def test_what_looks_like_a_path_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name))
    (tmp_path / "folder").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for word in ("FOLDER", "MODEL"):
        name = name.replace(word, str(tmp_path / word.lower()))
    with pytest.raises((ValueError, OSError), match=message) as error:
        load_text_data(name)
    assert "\n" not in str(error.value) and not asked


def test_failures_of_the_library_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: object) -> None:
        raise datasets.exceptions.DatasetGenerationError("went wrong\nsomewhere")

    monkeypatch.setattr(readers, "hub_problem", lambda: "")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FileNotFoundError, match=r"could be loaded \(went wrong\): check"):
        load_text_data("owner/name")


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
    more = data.with_label_order(["violet", *COLOURS])
    assert [more.label_names[label] for label in more.test.labels] == [
        data.label_names[label] for label in data.test.labels
    ]


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
