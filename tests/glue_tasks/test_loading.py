from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glue_tasks import loading
from glue_tasks.loading import fingerprint, load_task
from glue_tasks.tasks import TASKS

REAL_DATA = Path(__file__).parents[3] / "shared" / "data" / "glue"

TEXT = {  # the sentence columns as GLUE's files name them
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["#1 String", "#2 String"],
    "stsb": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "mnli": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
    "bigram_shift": ["sentence"],
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_read_from_its_own_layout(name, write_glue):
    task = TASKS[name]
    splits = load_task(task, write_glue(task.folder))
    assert set(splits) == {"train", *task.validation_splits, *task.test_splits}
    for split, dataset in splits.items():
        assert dataset.num_rows == (12 if split == "train" else 4 if split.startswith("test") else 6)
        assert dataset["idx"][:] == list(range(dataset.num_rows))
        assert ("label" in dataset.column_names) == (split not in task.test_splits)
        in_file = split.replace("validation", "dev")
        for number, column in enumerate(TEXT[name], start=1):
            assert dataset[3][f"sentence{number}"] == f"{column} of {in_file} row 3"
        assert ("sentence2" in dataset.column_names) == (len(TEXT[name]) == 2)
    expected = [0.0, 2.5, 5.0] if name == "stsb" else list(range(len(task.labels)))
    assert splits["train"]["label"][: len(expected)] == expected


def test_class_numbers_follow_the_label_order_of_the_hub(write_glue):
    data = write_glue("RTE", "MNLI", "QNLI", "WNLI", test=0)
    order = {name: load_task(TASKS[name], data)["train"].features["label"].names for name in ("rte", "mnli", "qnli")}
    assert order["rte"] == order["qnli"] == ["entailment", "not_entailment"]
    assert order["mnli"] == ["entailment", "neutral", "contradiction"]
    # WNLI's files number the classes: 1 is entailment.
    assert load_task(TASKS["wnli"], data)["train"].features["label"].names == ["not_entailment", "entailment"]


def test_without_test_files_there_are_no_test_splits(write_glue):
    assert set(load_task(TASKS["sst2"], write_glue("SST-2", test=0))) == {"train", "validation"}


_FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\t\n"), max_size=30)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(_FIELD, st.sampled_from("01")), min_size=1, max_size=8))
def test_any_text_survives_whatever_quotes_or_line_separators_it_holds(rows, tmp_path):
    folder = tmp_path / "SST-2"
    folder.mkdir(exist_ok=True)
    text = "sentence\tlabel\n" + "".join(f"{sentence}\t{label}\n" for sentence, label in rows)
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_bytes(text.encode())
    train = load_task(TASKS["sst2"], tmp_path)["train"]
    assert train["sentence1"][:] == [sentence for sentence, _ in rows]
    assert train["label"][:] == [int(label) for _, label in rows]


def test_windows_line_ends_and_a_missing_last_one_change_nothing(write_glue):
    data = write_glue("RTE", test=0)
    before = load_task(TASKS["rte"], data)["train"].to_list()
    path = data / "RTE" / "train.tsv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    assert load_task(TASKS["rte"], data)["train"].to_list() == before


def test_a_missing_folder_or_file_is_named(write_glue):
    data = write_glue("CoLA")
    with pytest.raises(FileNotFoundError, match=r"RTE.*rte"):
        load_task(TASKS["rte"], data)
    (data / "CoLA" / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"CoLA.dev\.tsv"):
        load_task(TASKS["cola"], data)


@pytest.mark.parametrize("content", ["", "sentence\tlabel\n"], ids=["nothing", "header-only"])
def test_an_empty_file_is_an_error(content, write_glue):
    data = write_glue("SST-2")
    (data / "SST-2" / "dev.tsv").write_text(content)
    with pytest.raises(ValueError, match=r"dev\.tsv is empty"):
        load_task(TASKS["sst2"], data)


def test_a_missing_column_is_named(write_glue):
    data = write_glue("MRPC")
    (data / "MRPC" / "train.tsv").write_text("Quality\t#1 String\tsecond\n1\ta\tb\n")
    with pytest.raises(ValueError, match=r"train\.tsv: no column '#2 String'.*'second'"):
        load_task(TASKS["mrpc"], data)


@pytest.mark.parametrize(
    ("name", "bad", "allowed"),
    [
        ("cola", "2", "0, 1"),
        ("rte", "1", "entailment, not_entailment"),
        ("mnli", "entails", "entailment, neutral, contradiction"),
        ("stsb", "5.001", "0 to 5"),
        ("stsb", "nan", "0 to 5"),
        ("stsb", "high", "0 to 5"),
    ],
)
def test_a_label_outside_the_label_set_is_shown_with_its_line(name, bad, allowed, write_glue):
    task = TASKS[name]
    data = write_glue(task.folder)
    path = data / task.folder / "train.tsv"
    lines = path.read_text().splitlines()
    fields = lines[4].split("\t")
    fields[1 if name == "cola" else -1] = bad
    lines[4] = "\t".join(fields)
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"train\.tsv:5: \w+ '{bad}' .*{allowed}"):
        load_task(task, data)


def test_a_broken_row_is_an_error_with_its_line(write_glue):
    data = write_glue("SST-2")
    path = data / "SST-2" / "train.tsv"
    lines = path.read_text().splitlines()
    lines[7] += "\tone more"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"train\.tsv:8: 3 tab-separated fields, expected 2"):
        load_task(TASKS["sst2"], data)


def test_broken_rows_of_qqp_are_dropped_and_counted_but_never_those_of_its_test_file(write_glue, caplog):
    data = write_glue("QQP")
    path = data / "QQP" / "train.tsv"
    lines = path.read_text().splitlines()
    lines[3], lines[6] = "broken", "also\tbroken"
    path.write_text("\n".join(lines))
    train = load_task(TASKS["qqp"], data)["train"]
    assert "12 rows read, 10 used, 2 dropped: 2 malformed (first at line 4)" in caplog.text
    assert train["idx"][:] == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]
    assert train[2]["sentence1"] == "question1 of train row 3"
    test = data / "QQP" / "test.tsv"
    test.write_text(test.read_text() + "broken\n")
    with pytest.raises(ValueError, match=r"test\.tsv:6: 1 tab-separated fields, expected 3"):
        load_task(TASKS["qqp"], data)


def test_rows_of_mnli_without_a_gold_label_are_dropped_and_counted(write_glue, caplog):
    data = write_glue("MNLI")
    path = data / "MNLI" / "dev_matched.tsv"
    lines = path.read_text().splitlines()
    lines[2] = lines[2].rsplit("\t", 1)[0] + "\t-"
    path.write_text("\n".join(lines))
    assert load_task(TASKS["mnli"], data)["validation_matched"].num_rows == 5
    assert "6 rows read, 5 used, 1 dropped: 1 without a gold label" in caplog.text


def test_a_file_that_is_not_utf8_is_an_error(write_glue):
    data = write_glue("SST-2")
    (data / "SST-2" / "dev.tsv").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(ValueError, match=r"dev\.tsv is not UTF-8"):
        load_task(TASKS["sst2"], data)


def test_a_test_index_that_is_no_number_is_an_error(write_glue):
    data = write_glue("CoLA")
    (data / "CoLA" / "test.tsv").write_text("index\tsentence\n0\ta\nx\tb\n")
    with pytest.raises(ValueError, match=r"test\.tsv:3: the row index 'x'"):
        load_task(TASKS["cola"], data)


def test_the_fingerprint_is_of_the_content(write_glue):
    data = write_glue("RTE")
    first, again = (fingerprint(load_task(TASKS["rte"], data)) for _ in range(2))
    path = data / "RTE" / "dev.tsv"
    path.write_text(path.read_text().replace("row 2", "row two"))
    assert first == again
    assert fingerprint(load_task(TASKS["rte"], data)) != first
    # The rows hold the numbers of classes.
    digests = {fingerprint(load_task(TASKS["rte"], data), labels) for labels in ((), ("yes", "no"), ("no", "yes"))}
    assert len(digests) == 3


def _hub_folder(root: Path, name: str, text: list[str], labels: list[str]) -> Path:
    """A dataset folder as the Hub stores `nyu-mll/glue`: parquet files by configuration, -1 as label of test rows."""
    strings = dict.fromkeys(text, Value("string"))
    features = Features({**strings, "label": ClassLabel(names=labels), "idx": Value("int32")})
    header = ["---", "configs:", f"- config_name: {name}", "  data_files:"]
    for split, label in (("train", 1), ("validation", 0), ("test", -1)):
        rows = {**{column: [f"{column} of {split}"] for column in text}, "label": [label], "idx": [7]}
        path = root / name / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(path)
        header += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (root / "README.md").write_text("\n".join([*header, "---", ""]))
    return root


def test_the_hub_layout_gives_the_same_columns(tmp_path, monkeypatch):
    hub = _hub_folder(tmp_path / "hub", "qnli", ["question", "sentence"], ["entailment", "not_entailment"])
    monkeypatch.setattr(loading, "HUB_DATASET", str(hub))
    splits = load_task(TASKS["qnli"], cache_dir=str(tmp_path / "cache"))
    row = {"sentence1": "question of train", "sentence2": "sentence of train", "label": 1, "idx": 7}
    assert splits["train"].to_list() == [row]
    assert splits["test"].column_names == ["sentence1", "sentence2", "idx"]


def test_hub_labels_in_another_order_are_an_error(tmp_path, monkeypatch):
    hub = _hub_folder(tmp_path / "hub", "qnli", ["question", "sentence"], ["not_entailment", "entailment"])
    monkeypatch.setattr(loading, "HUB_DATASET", str(hub))
    with pytest.raises(ValueError, match=r"qnli.*has the labels \['not_entailment', 'entailment'\]"):
        load_task(TASKS["qnli"], cache_dir=str(tmp_path / "cache"))


def test_the_probe_is_not_looked_for_on_the_hub():
    with pytest.raises(ValueError, match=r"bigram_shift is not on the Hub: .*BigramShift"):
        load_task(TASKS["bigram_shift"])


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real GLUE files are not here")
@pytest.mark.parametrize(
    ("name", "train", "dev"),
    [("cola", 8551, 1043), ("sst2", 67349, 872), ("mrpc", 3668, 408), ("stsb", 5749, 1500), ("rte", 2490, 277)],
)
def test_the_official_files_are_read_whole(name, train, dev):
    splits = load_task(TASKS[name], REAL_DATA)
    assert (splits["train"].num_rows, splits["validation"].num_rows) == (train, dev)
