"""Texts without labels: a student learns from them what its teacher makes of them, and labels play no part."""

import pytest
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file

from glue_tasks.loading import load_task
from glue_tasks.tasks import TASKS
from glue_tasks.unlabelled import UNLABELLED, training_rows, with_unlabelled
from run_glue import main
from tests.glue_tasks.conftest import write_tasks
from tests.glue_tasks.test_run_glue import command, log_history

PAIRS = "premise\thypothesis\tlabel\none two\tthree\tyes\nfour\tfive six\tno\nseven\t\tno\n"


@pytest.fixture(scope="module")
def folder(tiny_bert, tmp_path_factory):
    """Tasks, a teacher of each, and files without (or with other) labels."""
    folder = tmp_path_factory.mktemp("unlabelled")
    data = write_tasks(folder / "glue", "CoLA", "RTE")
    (folder / "pairs.tsv").write_text(PAIRS)
    (folder / "both.csv").write_text("text,sentence\nfive,six\n")
    (folder / "blank.csv").write_text('text\n" "\n" "\n')
    (folder / "texts.csv").write_text("text\nfive\nsix seven\n")
    tasks = ("--task_name", "cola", "rte", "--num_train_epochs", "1", "--report_epoch", "last")
    main(command(tiny_bert, data, folder / "teachers", *tasks))
    return folder


def flags(folder, *more: str) -> list[str]:
    return ["--teacher_name_or_path", str(folder / "teachers"), "--label_weight", "0", "--report_epoch", "last", *more]


def test_texts_of_any_file_stand_beside_the_splits_and_rows_that_lack_one_are_dropped(folder):
    raw = load_task(TASKS["rte"], folder / "glue")
    splits = with_unlabelled(raw, [folder / "pairs.tsv", folder / "glue/RTE/train.tsv"])
    assert {name: splits[name] for name in raw} == dict(raw)
    assert splits[UNLABELLED].column_names == ["sentence1", "sentence2"]
    assert splits[UNLABELLED][:2] == {"sentence1": ["one two", "four"], "sentence2": ["three", "five six"]}
    assert len(splits[UNLABELLED]) == 2 + len(raw["train"])
    texts = with_unlabelled(load_task(TASKS["cola"], folder / "glue"), [folder / "texts.csv"])
    assert texts[UNLABELLED]["sentence1"][:] == ["five", "six seven"]


def test_with_them_nothing_that_is_trained_on_has_a_label():
    train = Dataset.from_dict({"input_ids": [[1], [2]], "label": [0, 1]})
    assert training_rows(DatasetDict({"train": train})) is train
    rows = training_rows(DatasetDict({"train": train, UNLABELLED: Dataset.from_dict({"input_ids": [[3]]})}))
    assert rows.to_dict() == {"input_ids": [[1], [2], [3]]}
    assert training_rows(DatasetDict()) is None


def test_a_student_learns_from_them_and_not_from_labels(folder, tiny_spikelm, tmp_path):
    more = flags(folder, "--task_name", "rte", "--unlabelled_file", str(folder / "pairs.tsv"), "--logging_steps", "1")
    main(command(tiny_spikelm, folder / "glue", tmp_path / "out", *more))
    steps = [entry for entry in log_history(tmp_path / "out/rte") if "loss" in entry]
    # Two epochs of 12 examples and 2 other texts, 4 a step.
    assert len(steps) == 2 * 4
    assert "12 examples, without labels, and 2 other texts" in (tmp_path / "out/rte/README.md").read_text()

    other = write_tasks(tmp_path / "glue", "RTE")
    file = other / "RTE/train.tsv"
    swapped = {"entailment": "not_entailment", "not_entailment": "entailment"}
    header, *rows = (line.split("\t") for line in file.read_text().splitlines())
    rows = [[*row[:-1], swapped[row[-1]]] for row in rows]
    file.write_text("\n".join("\t".join(row) for row in [header, *rows]) + "\n")
    main(command(tiny_spikelm, other, tmp_path / "swapped", *more))
    weights, others = (load_file(tmp_path / name / "rte/model.safetensors") for name in ("out", "swapped"))
    assert all(weights[name].equal(others[name]) for name in weights)

    main(command(tiny_spikelm, folder / "glue", tmp_path / "without", *flags(folder, "--task_name", "rte")))
    fewer = load_file(tmp_path / "without/rte/model.safetensors")
    assert not all(weights[name].equal(fewer[name]) for name in weights)


@pytest.mark.parametrize(
    ("task", "file", "more", "message"),
    [
        ("rte", "pairs.tsv", ("--label_weight", "0.1"), "--unlabelled_file has no labels for --label_weight 0.1"),
        ("rte", "texts.csv", (), r"the task has 2 texts a row, so the file needs one of .*sentence1 and sentence2"),
        ("cola", "pairs.tsv", (), "the task has 1 text a row, so the file needs one of text or sentence as columns"),
        ("cola", "both.csv", (), "has several columns that could be meant, text or sentence; leave one"),
        ("cola", "blank.csv", (), "none of its 2 rows has a text in every column"),
        ("rte", "nowhere.tsv", (), "There is no file .*nowhere.tsv"),
        ("rte", "pairs.tsv", ("--do_eval",), "only a student in training learns from texts without labels"),
    ],
)
def test_what_says_nothing_is_refused_in_one_line(folder, tiny_spikelm, tmp_path, task, file, more, message):
    given = flags(folder, "--task_name", task, "--unlabelled_file", str(folder / file), *more)
    with pytest.raises(SystemExit, match=message):
        main(command(tiny_spikelm, folder / "glue", tmp_path / "out", *given))
    assert not (tmp_path / "out").exists()


def test_without_a_teacher_there_is_nobody_to_ask(folder, tiny_spikelm, tmp_path):
    more = ("--task_name", "rte", "--unlabelled_file", str(folder / "pairs.tsv"))
    with pytest.raises(SystemExit, match="from a teacher; name one with --teacher_name_or_path"):
        main(command(tiny_spikelm, folder / "glue", tmp_path / "out", *more))
