import pytest
import torch
from transformers import TrainingArguments

from experiment.whole_steps import WholeStepsTrainer

ROWS, SEQUENCES = 10, 4


@pytest.fixture
def epochs(tmp_path):
    """The rows of two epochs, step by step."""

    def epochs(batch: int, accumulation: int, rows: int = ROWS, **changes) -> list[list[int]]:
        factors = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = WholeStepsTrainer(
            model=torch.nn.Linear(1, 1),
            args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **factors, **changes),
            train_dataset=list(range(rows)),
            data_collator=list,
        )
        loader = trainer.get_train_dataloader()
        found = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            found.append([row for batch in loader for row in batch])
            assert len(found[-1]) == len(loader) * batch
        return found

    return epochs


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_rows_of_every_step_depend_on_the_product_of_the_factors_alone(epochs, drop_last):
    first, *others = (epochs(batch, SEQUENCES // batch, dataloader_drop_last=drop_last) for batch in (4, 2, 1))
    assert first == others[0] == others[1]
    for rows in first:
        assert len(rows) == (8 if drop_last else 12)
        assert len(set(rows[:ROWS])) == len(rows[:ROWS])
    assert first[0] != first[1]


def test_rows_in_their_own_order_begin_again_where_they_end(epochs):
    rows = [*range(ROWS), 0, 1]
    assert epochs(2, 2, train_sampling_strategy="sequential") == [rows, rows]


def test_accumulation_steps_that_are_accelerates_count(epochs):
    config = {"gradient_accumulation_kwargs": {"num_steps": 2}}
    assert epochs(2, 1, accelerator_config=config) == epochs(2, 2)


def test_fewer_rows_than_a_step_has_are_taken_several_times(epochs):
    for rows in epochs(4, 2, rows=3):
        assert len(rows) == 8 and all(rows.count(row) >= 2 for row in range(3))


def test_an_epoch_of_which_nothing_is_left_is_refused(epochs):
    with pytest.raises(ValueError, match="a step has 4 sequences .*, and there are 3 rows"):
        epochs(2, 2, rows=3, dataloader_drop_last=True)
