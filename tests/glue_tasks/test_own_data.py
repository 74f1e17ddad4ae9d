"""What a user's files are found to be, and what is said where they are nothing."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glue_tasks.encoding import Classifier
from glue_tasks.own_data import OwnFiles, load_own_data
from glue_tasks.tables import read_table

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path, monkeypatch) -> Write:
    """`write("a.csv", "one line", "another")` returns the name of a file in the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, *lines: str) -> str:
        Path(name).write_text("\n".join(lines) + "\n" if lines else "", encoding="utf-8")
        return name

    return write


def load(write: Write, train: list[str], validation: list[str], classifier: Classifier | None = None, **said):
    """The task and splits of two csv files with the columns text and label, or whichever the lines begin with."""
    header = [] if said.pop("has_header", False) else ["text,label"]
    files = OwnFiles(train=write("a.csv", *header, *train), validation=write("b.csv", *header, *validation), **said)
    return load_own_data(files, classifier)


def test_names_are_classes_in_alphabetical_order(write):
    task, splits = load(write, ["one,good", "two,bad", '"three, with a comma",good'], ["four,bad"])
    assert (task.labels, task.problem_type) == (("bad", "good"), "single_label_classification")
    assert (task.metrics, task.shown_metric) == (("accuracy", "macro_f1"), "accuracy")
    assert splits["train"]["label"][:] == [1, 0, 1]
    assert splits["train"]["sentence1"][2] == "three, with a comma"
    assert set(splits) == {"train", "validation"}


def test_whole_numbers_are_classes_in_numerical_order(write):
    task, splits = load(write, ["one,10", "two,9", "three,-1"], ["four,9"])
    assert task.labels == ("-1", "9", "10")
    assert splits["validation"]["label"][:] == [1]


def test_a_whole_number_with_its_sign_is_a_class_too(write):
    task, splits = load(write, ["one,+1", "two,-1", "three,1"], ["four,+1"])
    assert (task.labels, task.problem_type) == (("-1", "1"), "single_label_classification")
    assert splits["train"]["label"][:] == [1, 0, 1]


def test_numbers_with_a_point_are_scores(write):
    task, splits = load(write, ["one,3", "two,0.5", "three,-1e2"], ["four,2"])
    assert (task.labels, task.problem_type, task.metrics) == (None, "regression", ("pearson", "spearmanr"))
    assert splits["train"]["label"][:] == [3.0, 0.5, -100.0]


def test_lists_are_several_labels_at_once(write):
    """As JSON writes them, or Python."""
    task, splits = load(write, ["one,\"['b', 'a']\"", "two,[]", 'three,"[""c""]"'], ['four,"[""a""]"'])
    assert (task.labels, task.problem_type) == (("a", "b", "c"), "multi_label_classification")
    assert task.metrics == ("micro_f1", "macro_f1", "subset_accuracy")
    assert splits["train"]["label"][:] == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_a_flag_decides_where_labels_could_be_several_things(write):
    stars = ["one,1", "two,2", "three,5"], ["four,2"]
    assert load(write, *stars, problem_type="regression")[0].labels is None
    tags = ["one,[spam]", "two,[ham]"], ["four,[ham]"]
    assert load(write, *tags, problem_type="single_label_classification")[0].labels == ("[ham]", "[spam]")
    versions = ["one,1.0", "two,two", "three,1.5"], ["four,two"]
    assert load(write, *versions, problem_type="single_label_classification")[0].labels == ("1.0", "1.5", "two")


def test_class_numbers_may_be_written_with_a_point_where_they_are_said_to_be_classes(write, caplog):
    gap = ["one,0.0", "two,1.0", "three,"], ["four,1"]
    task, splits = load(write, *gap, problem_type="single_label_classification")
    assert (task.labels, splits["train"]["label"][:], splits["validation"]["label"][:]) == (("0", "1"), [0, 1], [1])
    assert load(write, *gap, problem_type="regression")[0].labels is None
    stars = ["one,1.0", "two,2.0", "three,5.0"], ["four,2"]
    assert load(write, *stars)[0].labels is None and "It is taken for a score" in caplog.text


def rows_of(name: str, rows: list[dict]) -> str:
    if name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(name)
    elif name.endswith(".json"):
        Path(name).write_text(json.dumps(rows))
    elif name.endswith(".jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        separator = "\t" if name.endswith(".tsv") else ","
        lines = [separator.join(map(str, row)) for row in [rows[0].keys(), *(row.values() for row in rows)]]
        Path(name).write_text("\n".join(lines))
    return name


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json", "rows[1].parquet"])
def test_every_format_gives_the_same_rows(name, write):
    rows = [{"premise": f"text {number}", "label": number % 2, "hypothesis": "a\u2028b"} for number in range(4)]
    validation = rows_of("other.jsonl", [row | {"premise": "new"} for row in rows])
    task, splits = load_own_data(OwnFiles(rows_of(name, rows), validation, test=validation))
    assert task.labels == ("0", "1")
    expected = [
        {"sentence1": row["premise"], "sentence2": "a\u2028b", "idx": number, "label": row["label"]}
        for number, row in enumerate(rows)
    ]
    assert splits["train"].to_list() == expected
    assert splits["test"].column_names == ["sentence1", "sentence2", "idx"]


def test_the_classes_of_a_parquet_file_of_datasets_have_their_names(write):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    for name, texts in (("a.parquet", ["one", "two", "three"]), ("b.parquet", ["four", "five", "six"])):
        Dataset.from_dict({"text": texts, "label": [1, 0, -1]}, features=features).to_parquet(name)
    task, splits = load_own_data(OwnFiles("a.parquet", "b.parquet"))
    assert (task.labels, splits["train"]["label"][:]) == (("no", "yes"), [1, 0])


@pytest.mark.parametrize(
    ("header", "said", "texts", "label"),
    [
        ("text,label", {}, ["text"], "label"),
        ("text,text_pair,class", {}, ["text", "text_pair"], "class"),
        ("id,question,sentence,score", {}, ["question", "sentence"], "score"),
        ("review,category", {}, ["review"], "category"),
        ("id,review,stars", {"text": "review", "label": "stars"}, ["review"], "stars"),
        ("text,title,label", {"text": "title", "text_pair": "text"}, ["title", "text"], "label"),
    ],
)
def test_columns_are_found_by_their_names_or_named(header, said, texts, label, write):
    names = header.split(",")
    rows = [",".join(str(row) if name == label else f"{name} {row}" for name in names) for row in (0, 1)]
    _, splits = load(write, [header, *rows], [header, ",".join("1" for _ in names)], has_header=True, **said)
    row = splits["train"][1]
    assert [row[name] for name in ("sentence1", "sentence2") if name in row] == [f"{name} 1" for name in texts]
    assert row["label"] == 1


def test_rows_without_a_label_or_a_text_are_left_out_and_counted_but_every_test_row_is_kept(write, caplog):
    caplog.set_level(logging.INFO)
    train = ["one,good", "two,", " ,bad", "three,bad"]
    files = OwnFiles(write("a.csv", "text,label", *train), write("b.csv", "text,label", "four,bad"))
    task, splits = load_own_data(OwnFiles(files.train, files.validation, write("c.csv", "text", "five", '""', "six")))
    assert splits["train"]["sentence1"][:] == ["one", "three"]
    dropped = "1 without a label (first: a.csv:3) and 1 without a text (first: a.csv:4)"
    assert f"a.csv: 4 rows read, 2 used, 2 dropped: {dropped}." in caplog.messages
    assert "b.csv: 1 rows read, 1 used, 0 dropped." in caplog.messages
    assert splits["test"]["sentence1"][:] == ["five", "", "six"]
    assert "c.csv: 1 of 3 rows have no text in column 'text' (first: c.csv:3)" in caplog.text


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_an_empty_line_is_a_cell_where_there_is_one_column_but_not_at_the_end(name, separator, write):
    table = read_table(write(name, "text", "", "one", "", "", "two", "", ""))
    assert table.columns == {"text": ["", "one", "", "", "two"]}
    assert table.places == [f"{name}:{line}" for line in range(2, 7)]
    two_columns = read_table(write(name, f"a{separator}b", "", f"c{separator}d"))
    assert two_columns.columns == {"a": ["c"], "b": ["d"]}


GOOD = ["text,label", "one,good", "two,bad"]
# What is wrong: the lines of a.csv, those of b.csv, what the message has to say, and the flags that were given.
BAD = {
    "column named": (
        ["words,label", "one,good"],
        GOOD,
        "a.csv has no column 'text'; its columns are words, label.",
        {"text": "text"},
    ),
    "column in the other": (
        GOOD,
        ["words,label", "three,good"],
        "b.csv has no column 'text', which a.csv has; its columns are words, label.",
    ),
    "no label column": (
        ["text,mood", "one,good"],
        GOOD,
        "Which column of a.csv holds the label? It has none of label, labels, score, class, category, target; its "
        "columns are text, mood. Name one with --label_column_name.",
    ),
    "two label columns": (["text,label,score", "a,b,1"], GOOD, "It has several that could (label, score); its"),
    "no text column": (
        ["a,b,label", "c,d,e"],
        GOOD,
        "Which column of a.csv holds the text? Its columns are a, b, label. Name it with --text_column_name, and "
        "--text_pair_column_name for pairs.",
    ),
    "two text columns": (["text,sentence,label", "c,d,e"], GOOD, "It could be text or sentence; its columns are"),
    "label is text": (GOOD, GOOD, "a.csv: the column 'label' cannot hold both the label and a text", {"text": "label"}),
    "column twice": (["text,text,label", "a,b,c"], GOOD, "a.csv has several columns 'text'; its columns are"),
    "unknown label": (
        GOOD,
        ["text,label", "three,fine"],
        "b.csv:2: the label 'fine' is none of those that a.csv has: bad, good. Correct it, leave the row out, or train "
        "on rows that have it.",
    ),
    "empty": ([], GOOD, "a.csv is empty: it holds no row."),
    "header only": (GOOD, ["text,label"], "b.csv is empty: it holds no row."),
    "numbers and text": (
        ["text,label", "one,1", "two,good"],
        GOOD,
        "a.csv: column 'label' mixes whole numbers (a.csv:2: 1) and text (a.csv:3: 'good'). Write all labels in one "
        "way, or give --problem_type single_label_classification to take each as the name of a class.",
    ),
    "NaN": (
        ["text,label", "one,1.5", "two,NaN"],
        GOOD,
        "a.csv:3: 'NaN' in column 'label' is no score. A score is a finite number; leave the cell empty where there is "
        "none, and the row is left out.",
    ),
    "infinite": (["text,label", "one,1.5", "two,1e999"], GOOD, "a.csv:3: inf in column 'label' is no score."),
    "text for a score": (["text,label", "a,1.5", "b,2"], ["text,label", "c,high"], "b.csv:2: 'high' in column 'label'"),
    "no label": (
        ["text,label", "one,", "two,"],
        GOOD,
        "a.csv holds no row to use: of 2 rows 2 without a label (first: a.csv:2).",
    ),
    "same texts": (GOOD, GOOD, "--train_file a.csv and --validation_file b.csv hold the same texts, so a score"),
    "one class": (
        ["text,label", "one,good", "two,good"],
        ["text,label", "three,good"],
        "a.csv: every row has the same label, 'good', so there is nothing to learn.",
    ),
    "one score": (["text,label", "a,2.5", "b,2.5"], ["text,label", "c,1.0"], "every row has the same label, 2.5"),
    "whole numbers with a point": (
        ["text,label", "one,0.0", "two,1.0"],
        ["text,label", "three,1"],
        "a.csv:2: 0.0 in column 'label' may be a score or, as programs write whole numbers beside an empty cell, the "
        "number of a class. Give --problem_type regression or single_label_classification.",
    ),
    "two numbers for one of two": (
        ["text,label", 'one,"[0, 1]"', 'two,"[1, 0]"'],
        ["text,label", 'three,"[0, 1]"'],
        "every row has the same label, [0, 1], so there is nothing to learn; write the labels that a row has, not 0",
    ),
    "broken list": (["text,label", "one,[1"], GOOD, 'a.csv:2: \'[1\' is no list such as ["a", "b"]'),
    "vector": (
        ["text,label", 'one,"[1, 0, 0]"', "two,[1]"],
        GOOD,
        "a.csv:2: [1, 0, 0] in column 'label' has a label twice; write the labels that a row has, not 0 and 1",
    ),
    "list for a name": (GOOD, ["text,label", "three,[]"], "b.csv:2: [] in column 'label' is a list, and a row has one"),
    "name for a list": (
        ["text,label", "a,[1]", "b,[2]"],
        ["text,label", "c,1"],
        "b.csv:2: 1 in column 'label' is no list",
    ),
    "comma": (
        ["text,label", "one,two,good"],
        GOOD,
        "a.csv:2: 3 cells, but the first line names 2 columns; a text with a comma in it has to stand in double quotes",
    ),
    "quote": (["text,label", 'one,"good'], GOOD, "a.csv:2 cannot be read: unexpected end of data."),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_one_line_that_names_it(what, write):
    train, validation, told, *said = BAD[what]
    with pytest.raises(ValueError) as error:
        load(write, train, validation, has_header=True, **(said[0] if said else {}))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.xlsx", "", r"a.xlsx has the unknown extension '.xlsx'; known are .csv, .tsv, .json, .jsonl, .parquet"),
        ("none.csv", None, "There is no file none.csv"),
        ("a.csv", b"text,label\ncaf\xe9,1\n", "a.csv is not UTF-8 text"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl:2 cannot be read: Expecting value"),
        ("a.jsonl", '{"text": "a", "text": "b"}', "a.jsonl:1 cannot be read: a column is there twice"),
        ("a.jsonl", '["a", "b"]', 'a.jsonl, row 1 is no JSON object with the row\'s columns, but "a"'),
        ("a.parquet", "nothing of the kind", "a.parquet cannot be read"),
    ],
    ids=["extension", "missing", "bytes", "json", "json-twice", "json-array", "parquet"],
)
def test_a_file_that_cannot_be_read_is_named(name, content, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        read_table(name)


CELLS = st.one_of(
    st.sampled_from(
        ["0", "1", "-0", "1e999", "nan", "", " ", '"', '""', "[", "['a']", "[[1]]", "[" * 300, "{}", "007", "a"]
    ),
    st.text(st.characters(codec="utf-8"), max_size=4),
).map(str.encode)
LINES = st.lists(st.tuples(CELLS, st.one_of(CELLS, st.just(b"\xff"))).map(b",".join), max_size=5).map(b"\n".join)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["a", "", "\ud800", "1"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["text", "label"]), inner)),
    max_leaves=8,
)
NEARLY_GOOD = {"text": st.sampled_from(["a", "b", "", None, "\ud800", 1]), "label": st.sampled_from([0, 1, None])}
ROWS = st.one_of(
    st.lists(st.one_of(JSON, st.fixed_dictionaries({"text": JSON, "label": JSON})), max_size=4),
    st.lists(st.fixed_dictionaries(NEARLY_GOOD), min_size=2, max_size=5),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(LINES, ROWS, st.binary(max_size=20)), separator=st.sampled_from([b",", b"\t"]))
def test_whatever_a_file_holds_are_rows_or_one_line_that_names_a_file(content, separator, write):
    name = "a.jsonl" if isinstance(content, list) else "a.csv" if separator == b"," else "a.tsv"
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content)).encode()
    else:
        content = (b"text,label\n" + content).replace(b",", separator)
    Path(name).write_bytes(content)
    try:
        task, splits = load_own_data(OwnFiles(name, write("b.csv", "text,label", "new,0")))
    except ValueError as error:
        assert ("a." in str(error) or "b.csv" in str(error)) and "\n" not in str(error)
        return
    assert task.labels is None or len(task.labels) > 0
    assert len(splits["train"]) > 0 and not splits["train"].data.table["label"].null_count


def test_rows_of_the_training_file_among_the_others_are_counted(write, caplog):
    load(write, GOOD[1:], ["two,bad", "three,good"])
    assert "1 of the 2 texts of b.csv are training texts as well" in caplog.text


MNLI = Classifier("runs/mnli", ("entailment", "neutral", "contradiction"), "single_label_classification")


def test_a_classifier_with_the_same_labels_gives_their_order(write):
    rows = [f"{name},{name}" for name in sorted(MNLI.labels)]
    task, splits = load(write, rows, ["new,neutral"], MNLI)
    assert task.labels == MNLI.labels
    assert splits["train"]["label"][:] == [2, 0, 1]
    assert load(write, rows[1:], ["new,neutral"], MNLI)[0].labels == ("entailment", "neutral")


def test_whole_numbers_may_be_a_classifiers_class_numbers_and_that_is_said(write, caplog):
    caplog.set_level(logging.INFO)
    task, splits = load(write, ["one,2", "two,0", "three,1"], ["four,2"], MNLI)
    assert (task.labels, splits["train"]["label"][:]) == (MNLI.labels, [2, 0, 1])
    said = "class numbers of runs/mnli: 0 = entailment, 1 = neutral, 2 = contradiction."
    assert f"The labels are taken for the {said}" in caplog.messages
    # From 1 on they are names of something else.
    assert load(write, ["one,3", "two,1", "three,2"], ["four,2"], MNLI)[0].labels == ("1", "2", "3")


def test_whole_numbers_are_no_class_numbers_of_a_classifier_that_has_one_as_a_name(write):
    stars = Classifier("runs/stars", ("1", "2", "3"), "single_label_classification")
    task, splits = load(write, ["one,2", "two,0", "three,1"], ["four,2"], stars)
    assert (task.labels, splits["train"]["label"][:]) == (("0", "1", "2"), [2, 0, 1])


def test_without_training_data_the_labels_are_the_classifiers(write):
    files = OwnFiles(validation=write("b.csv", "text,label", "one,neutral"), test=write("c.csv", "text", "two"))
    task, splits = load_own_data(files, MNLI)
    assert (task.labels, splits["validation"]["label"][:]) == (MNLI.labels, [1])
    with pytest.raises(
        ValueError, match="Without a training the labels are those of the checkpoint, and it is no class"
    ):
        load_own_data(files)
    score = Classifier("runs/stsb", ("LABEL_0",), "regression")
    with pytest.raises(ValueError, match=r"b.csv:2: 'neutral' in column 'label' is no score"):
        load_own_data(files, score)
    stars = OwnFiles(validation=write("e.csv", "text,label", "one,4"))
    assert load_own_data(stars, score)[1]["validation"]["label"][:] == [4.0]
    alone = load_own_data(OwnFiles(test=write("d.csv", "review,label", "two,neutral")), MNLI)[1]
    assert alone["test"]["sentence1"][:] == ["two"]
