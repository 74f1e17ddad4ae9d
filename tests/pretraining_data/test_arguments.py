import pytest
from transformers import HfArgumentParser

from pretraining_data.arguments import DataArguments


def test_flags_are_read():
    (arguments,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(
        ["--dataset_name", "a/b", "c", "--dataset_weights", "3", "1", "--objective", "mlm_nsp", "--streaming"]
    )
    assert arguments.dataset_name == ["a/b", "c"]
    assert arguments.dataset_weights == [3.0, 1.0]
    assert arguments.objective == "mlm_nsp"
    assert arguments.streaming


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset_name": ["b"]}, "exactly one of"),
        ({"dataset_weights": [1.0]}, "needs --dataset_name"),
        ({"train_file": None, "dataset_name": ["a", "b"], "dataset_weights": [1.0]}, "1 value.s. for 2"),
        ({"train_file": None, "dataset_name": ["a", "b"], "dataset_config_name": ["x"]}, "1 value.s. for 2"),
        ({"train_file": None, "dataset_name": ["a"], "dataset_weights": [0.0]}, "positive"),
        ({"train_file": None}, "--validation_file alone"),
        ({"dataset_revision": ["main"]}, "--dataset_revision needs"),
        ({"rows_per_document": [8]}, "--rows_per_document needs"),
        ({"train_file": None, "dataset_name": ["a", "b"], "dataset_revision": ["main"]}, "1 value.s. for 2"),
        (
            {"train_file": None, "dataset_name": ["a"], "rows_per_document": [0]},
            "rows_per_document.*at least 1",
        ),
        ({"validation_split_percentage": 0.0}, "between 0 and 100"),
        ({"objective": "clm"}, "'clm'"),
        ({"objective": "mlm_nsp", "one_document_per_row": True}, "--one_document_per_row is for --objective mlm"),
        ({"mlm_probability": 0.0}, "mlm_probability"),
        ({"max_seq_length": 4}, "at least 5"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**{"train_file": ["a.txt"], **values})
