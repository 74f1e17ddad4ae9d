import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from configuration_spikelm import SpikeLMConfig
from experiment.whole_steps import WholeStepsTrainer
from modeling_spikelm import SpikeLMForMaskedLM

ROWS, SEQUENCES = 10, 4
LENGTHS = [7 * row % 100 + 1 for row in range(100)]


@pytest.fixture
def epochs(tmp_path):
    """The rows of two epochs, step by step."""

    def epochs(batch: int, accumulation: int, rows: int = ROWS, **changes) -> list[list[int]]:
        factors = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "remove_unused_columns": False}
        trainer = WholeStepsTrainer(
            model=torch.nn.Linear(1, 1),
            args=TrainingArguments(**settings, **factors, **changes),
            train_dataset=[{"input_ids": [row] * LENGTHS[row]} for row in range(rows)],
            data_collator=lambda rows: [row["input_ids"][0] for row in rows],
        )
        loader = trainer.get_train_dataloader()
        found = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            found.append([row for batch in loader for row in batch])
            assert len(found[-1]) == len(loader) * batch
        return found

    return epochs


@pytest.mark.parametrize("compiles", [True, False])
def test_a_training_that_is_compiled_keeps_what_layers_that_share_a_graph_still_need(compiles, tmp_path):
    before = torch._functorch.config.donated_buffer
    assert before, "torch has it on, and then compiles every layer for itself"
    settings = {"use_cpu": True, "report_to": "none", "torch_compile": compiles}
    WholeStepsTrainer(model=torch.nn.Linear(1, 1), args=TrainingArguments(str(tmp_path), **settings))
    assert torch._functorch.config.donated_buffer is not compiles


def test_levels_of_neurons_do_not_decay(tmp_path):
    config = SpikeLMConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, neuron="thrifty"
    )
    model = SpikeLMForMaskedLM(config)
    trainer = WholeStepsTrainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    decay = trainer.get_decay_parameter_names(model)
    assert sum(name.endswith("neurons.amplitude") for name, _ in model.named_parameters()) == 6
    assert not [name for name in decay if "neurons" in name]
    # Everything else as the Trainer has it.
    assert "bert.encoder.layer.0.attention.self.query.weight" in decay and "cls.predictions.bias" not in decay


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_rows_of_every_step_depend_on_the_product_of_the_factors_alone(epochs, drop_last, sampling):
    how = {"dataloader_drop_last": drop_last, "train_sampling_strategy": sampling}
    first, *others = (epochs(batch, SEQUENCES // batch, **how) for batch in (4, 2, 1))
    assert first == others[0] == others[1]
    for rows in first:
        assert len(rows) == (8 if drop_last else 12)
        assert len(set(rows)) == min(len(rows), ROWS)
    assert first[0] != first[1]


def test_rows_of_a_step_are_of_about_the_same_length(epochs):
    def padding(sampling: str) -> int:
        rows = epochs(4, 1, rows=100, train_sampling_strategy=sampling)[0]
        steps = [[LENGTHS[row] for row in rows[start : start + 4]] for start in range(0, 100, 4)]
        return sum(4 * max(lengths) - sum(lengths) for lengths in steps)

    assert padding("group_by_length") < padding("random") / 3


def test_the_order_by_length_hangs_on_the_seed_and_not_on_what_was_drawn_before(epochs):
    found = []
    for seed, drawn in ((1, 0), (1, 5), (2, 0)):
        torch.rand(drawn)
        found.append(epochs(2, 1, train_sampling_strategy="group_by_length", data_seed=seed))
    assert found[0] == found[1] != found[2]


def test_a_stream_cannot_be_grouped_by_length(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield {"input_ids": [0]}

    training = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=1, train_sampling_strategy="group_by_length", report_to="none"
    )
    trainer = WholeStepsTrainer(model=torch.nn.Linear(1, 1), args=training, train_dataset=Stream())
    with pytest.raises(ValueError, match="a stream has none before they are read"):
        trainer.train()


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


@pytest.mark.parametrize("rows", [3, 6])
def test_an_evaluation_is_of_all_rows_though_training_drops_some(rows, tmp_path):
    training = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", dataloader_drop_last=True, per_device_eval_batch_size=4
    )
    trainer = WholeStepsTrainer(
        model=torch.nn.Linear(1, 1), args=training, eval_dataset=list(range(rows)), data_collator=list
    )
    for loader in (trainer.get_eval_dataloader(), trainer.get_test_dataloader(list(range(rows)))):
        assert [row for batch in loader for row in batch] == list(range(rows))
    assert training.dataloader_drop_last
