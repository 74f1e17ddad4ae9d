import copy

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

from configuration_spikelm import SpikeLMConfig
from experiment.arguments import ModelArguments
from experiment.calibration import BATCH_ROWS, calibrate_before_training
from modeling_spikelm import SpikeLMForMaskedLM, SpikingNeurons

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 50}


def rows_of(count: int) -> list[dict[str, torch.Tensor]]:
    """Of two to nine tokens, none like another."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 50, (2 + number % 8,), generator=generator) for number in range(count)]
    return [{"input_ids": row} for row in ids]


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row["input_ids"], (0, width - len(row["input_ids"]))) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids}


@pytest.fixture
def model() -> SpikeLMForMaskedLM:
    torch.manual_seed(0)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return SpikeLMForMaskedLM(SpikeLMConfig(**SIZES, **no_dropout, num_time_steps=2))


def amplitudes(model) -> torch.Tensor:
    return torch.stack([m.amplitude for m in model.modules() if isinstance(m, SpikingNeurons)])


def first_step(model, rows, folder, batches: int, batch_size: int = 4) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", max_steps=1,
        remove_unused_columns=False, per_device_train_batch_size=batch_size,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    calibrate_before_training(trainer, batches)
    trainer.train()
    return trainer


@pytest.mark.parametrize("batch_size", [1, 5])
def test_amplitudes_are_those_of_rows_all_over_the_data_whatever_the_batch_size(batch_size, model, tmp_path):
    rows, expected = rows_of(40), copy.deepcopy(model)
    first_step(model, rows, tmp_path, batches=2, batch_size=batch_size)
    chosen = [rows[n] for n in (0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37)]
    expected.calibrate([collate(chosen[:8]), collate(chosen[8:])])
    assert torch.equal(amplitudes(model), amplitudes(expected))


@pytest.mark.parametrize("count", [3, 11])
def test_data_of_fewer_rows_is_used_whole(count, model, tmp_path):
    rows, expected = rows_of(count), copy.deepcopy(model)
    first_step(model, rows, tmp_path, batches=16)
    expected.calibrate([collate(rows[start : start + BATCH_ROWS]) for start in range(0, count, BATCH_ROWS)])
    assert torch.equal(amplitudes(model), amplitudes(expected))


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from rows_of(40)


def test_of_a_stream_the_first_rows_are_used_and_trained_on_all_the_same(model, tmp_path):
    expected = copy.deepcopy(model)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["input_ids"]) if module.training else None, with_kwargs=True
    )
    first_step(model, Endless(), tmp_path, batches=1)
    expected.calibrate(collate(rows_of(40)[:8]))
    assert torch.equal(amplitudes(model), amplitudes(expected))
    assert torch.equal(seen[0], collate(rows_of(40)[:4])["input_ids"])


def test_a_calibrated_model_stays_as_it_is(model, tmp_path):
    model.calibrate(collate(rows_of(2)))
    before = amplitudes(model)
    first_step(model, rows_of(40), tmp_path, batches=2)
    assert torch.equal(amplitudes(model), before)


def test_without_batches_the_first_of_the_training_calibrates_with_its_padding(model, tmp_path):
    expected = copy.deepcopy(model)
    rows = rows_of(3)
    first_step(model, rows, tmp_path, batches=0)
    expected.calibrate(collate(rows), include_padding=True)
    torch.testing.assert_close(amplitudes(model), amplitudes(expected))


def test_it_draws_no_random_number(model, tmp_path):
    """Rows and dropout of the training are those of a run that started calibrated."""
    model.bert.embeddings.dropout.p = 0.5
    states = []
    for batches in (0, 2):
        trainer = first_step(copy.deepcopy(model), rows_of(40), tmp_path, batches)
        states.append(torch.get_rng_state())
    assert trainer.state.global_step == 1 and torch.equal(*states)


def test_other_models_are_left_alone(tmp_path):
    trainer = first_step(BertForMaskedLM(BertConfig(**SIZES)), rows_of(4), tmp_path, batches=2)
    assert trainer.state.global_step == 1


def test_a_negative_number_of_batches_is_refused():
    with pytest.raises(ValueError, match="--calibration_batches has to be at least 0, got -1"):
        ModelArguments(calibration_batches=-1)
