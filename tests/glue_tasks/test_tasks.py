import pytest

from glue_tasks.tasks import GLUE_AVERAGE_COLUMNS, GLUE_TASKS, TASKS, resolve_task_names

PAPER_EPOCHS = {"cola": 50, "mnli": 5, "mrpc": 20, "sst2": 10, "stsb": 20, "qqp": 5, "qnli": 10, "rte": 20}


def test_the_tasks_are_the_nine_of_glue_and_the_probe():
    assert set(GLUE_TASKS) == {*PAPER_EPOCHS, "wnli"}
    assert set(TASKS) - set(GLUE_TASKS) == {"bigram_shift"}


def test_published_epochs_are_those_of_the_paper():
    published = {name: task.published_epochs for name, task in TASKS.items() if task.published_epochs is not None}
    assert published == PAPER_EPOCHS


def test_the_average_has_every_column_but_wnli_and_the_probe():
    columns = {column for name in GLUE_TASKS for column in TASKS[name].columns}
    assert set(GLUE_AVERAGE_COLUMNS) == columns - {"WNLI"}
    assert len(GLUE_AVERAGE_COLUMNS) == 9


@pytest.mark.parametrize(
    ("task", "first", "shown"),
    [
        ("mrpc", "accuracy", "f1"),
        ("qqp", "accuracy", "f1"),
        ("cola", "matthews_correlation", "matthews_correlation"),
        ("stsb", "pearson", "pearson"),
        ("mnli", "accuracy", "accuracy"),
    ],
)
def test_the_best_epoch_is_chosen_by_the_first_metric_and_the_paper_shows_another(task, first, shown):
    assert TASKS[task].metrics[0] == first
    assert TASKS[task].shown_metric == shown
    assert all(task.shown_metric in task.metrics for task in TASKS.values())


def test_mnli_has_two_of_every_split_and_the_others_one():
    mnli = TASKS["mnli"]
    assert mnli.validation_splits == ("validation_matched", "validation_mismatched")
    assert mnli.test_splits == ("test_matched", "test_mismatched")
    assert TASKS["sst2"].validation_splits == ("validation",)


def test_all_stands_for_the_nine_and_a_task_is_named_once():
    assert [task.name for task in resolve_task_names(["all"])] == list(GLUE_TASKS)
    assert [task.name for task in resolve_task_names(["RTE", "cola", "rte"])] == ["rte", "cola"]
    assert [task.name for task in resolve_task_names(["bigram_shift", "all"])] == ["bigram_shift", *GLUE_TASKS]


@pytest.mark.parametrize("names", [["colla"], ["cola", "sst-3"], []])
def test_an_unknown_or_missing_name_lists_the_known_ones(names):
    with pytest.raises(ValueError, match="known are: cola, sst2, mrpc, .*bigram_shift") as error:
        resolve_task_names(names)
    assert all(repr(name) in str(error.value) for name in names if name not in TASKS)
