import logging
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from spike_metrics import evaluation
from spike_metrics.counting import count
from spike_metrics.energy import compute_energy
from spike_metrics.evaluation import FIGURES, SpikeArguments, evaluate_spikes, spike_figures

LENGTHS = (9, 4, 7, 2, 8, 6, 3, 5, 9)


@pytest.fixture
def rows() -> Dataset:
    """Nine rows of unequal lengths, with a column that no forward takes."""
    return Dataset.from_list([{"input_ids": [5 + (7 * n) % 20] * n, "weight": 0.5} for n in LENGTHS])


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    def make(model, *callbacks: TrainerCallback) -> Trainer:
        training = TrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True
        )
        return Trainer(model, training, data_collator=DataCollatorWithPadding(tokenizer), callbacks=list(callbacks))

    return make


def first_batches(rows: Dataset, number: int) -> list[dict[str, torch.Tensor]]:
    """Batches of two rows, padded with 0 as `pad_token_id` is, which the mask hides anyway."""
    pairs = [rows["input_ids"][i : i + 2] for i in range(0, min(2 * number, len(rows)), 2)]
    return [
        {
            "input_ids": torch.tensor([ids + [0] * (max(map(len, pair)) - len(ids)) for ids in pair]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (max(map(len, pair)) - len(ids)) for ids in pair]),
        }
        for pair in pairs
    ]


@pytest.mark.parametrize(("batches", "sequences"), [(1, 2), (3, 6), (8, 9)])
def test_the_first_batches_are_counted_and_no_more(model, rows, make_trainer, batches, sequences):
    given: set[str] = set()
    hook = model.register_forward_pre_hook(lambda m, args, kwargs: given.update(kwargs), with_kwargs=True)
    figures = evaluate_spikes(make_trainer(model), rows, SpikeArguments(spike_batches=batches), prefix="")
    hook.remove()
    assert "input_ids" in given and "weight" not in given
    assert figures["counted_sequences"] == sequences
    assert figures == spike_figures(count(model, first_batches(rows, batches)))


def test_the_figures_are_those_of_the_count(model, batch):
    counted = count(model, [batch])
    own, dense = compute_energy(counted), compute_energy(counted, dense=True)
    encoder, dense_encoder = compute_energy(counted.encoder), compute_energy(counted.encoder, dense=True)
    figures = spike_figures(counted)
    assert list(figures) == list(FIGURES)
    assert figures == {
        "firing_rate": counted.firing_rate,
        "dead_neurons": counted.dead_neurons,
        "saturated_neurons": counted.saturated_neurons,
        "encoder_energy_mj": encoder.convention,
        "encoder_dense_energy_mj": dense_encoder.convention,
        "encoder_energy_ratio": dense_encoder.convention / encoder.convention,
        "model_energy_mj": own.convention,
        "model_dense_energy_mj": dense.convention,
        "model_energy_ratio": dense.convention / own.convention,
        "counted_sequences": 3,
    }
    assert 1 < figures["model_energy_ratio"] < figures["encoder_energy_ratio"]  # the head stays dense


def test_a_dense_model_has_its_energy_and_no_firing_rate(bert, rows, make_trainer):
    figures = evaluate_spikes(make_trainer(bert), rows, SpikeArguments())
    assert "eval_firing_rate" not in figures
    assert figures["eval_model_energy_mj"] == figures["eval_model_dense_energy_mj"] > 0
    assert figures["eval_model_energy_ratio"] == figures["eval_encoder_energy_ratio"] == 1


def test_the_figures_are_logged_under_their_prefix(model, rows, make_trainer):
    class Seen(TrainerCallback):
        logs: list[dict] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(dict(logs))

    figures = evaluate_spikes(make_trainer(model, Seen()), rows, SpikeArguments(), prefix="eval_matched_")
    assert figures and all(name.startswith("eval_matched_") for name in figures)
    (logged,) = Seen.logs
    assert figures.items() <= logged.items()


@contextmanager
def warnings_of_evaluation(caplog, monkeypatch):
    """Caught even if an earlier test has raised transformers' verbosity, or said the same already."""
    logging.Logger.warning_once.cache_clear()
    monkeypatch.setattr(evaluation.logger, "disabled", False)
    monkeypatch.setattr(evaluation.logger, "propagate", False)
    evaluation.logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, logger=evaluation.logger.name):
        yield
    evaluation.logger.removeHandler(caplog.handler)


def test_groups_with_dead_and_saturated_neurons_are_named(model, rows, make_trainer, caplog, monkeypatch):
    dead, saturated = "bert.encoder.layer.1.attention.self.value_neurons", "bert.encoder.layer.0.intermediate.neurons"
    model.get_submodule(dead).set_amplitude(torch.full((3,), 1e6))
    model.get_submodule(saturated).set_amplitude(torch.full((3,), 1e-6))
    with warnings_of_evaluation(caplog, monkeypatch):
        figures = evaluate_spikes(make_trainer(model), rows, SpikeArguments())
    assert figures["eval_dead_neurons"] >= 16 / 208 and figures["eval_saturated_neurons"] >= 16 / 208
    never, always = (message for message in caplog.messages if message.startswith("Neurons that"))
    assert f"Neurons that never fired, in {sum(LENGTHS)} tokens: " in never and f"16 of 16 in {dead}" in never
    assert f"Neurons that fired at every token, in {sum(LENGTHS)} tokens: 16 of 16 in {saturated}" in always


def test_a_model_that_the_counter_does_not_know_has_no_figures_and_that_is_said_once(
    rows, make_trainer, caplog, monkeypatch
):
    """Without its attention, which has other names than BERT's, the energy would be too low."""
    sizes = {"vocab_size": 60, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 32}
    trainer = make_trainer(DistilBertForMaskedLM(DistilBertConfig(**sizes)))
    with warnings_of_evaluation(caplog, monkeypatch):
        assert [evaluate_spikes(trainer, rows, SpikeArguments()) for _ in range(2)] == [{}, {}]
    said = [record.getMessage() for record in caplog.records if "firing rate" in record.getMessage()]
    assert len(said) == 1 and "DistilBertForMaskedLM: its layers have no attention" in said[0]


def test_zero_batches_run_nothing(model, rows, make_trainer):
    forwards: list[object] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    assert evaluate_spikes(make_trainer(model), rows, SpikeArguments(spike_batches=0)) == {}
    assert not forwards
    with pytest.raises(ValueError, match="--spike_batches has to be at least 0, got -1"):
        SpikeArguments(spike_batches=-1)


@pytest.mark.parametrize("kind", ["Transposed", "PackedLinear"])
def test_an_unknown_module_with_weights_makes_a_count_incomplete(kind, bert, batch):
    count(bert, [batch]).check_is_complete()
    bert.bert.encoder.layer[1].output.dense = {"Transposed": Transposed, "PackedLinear": PackedLinear}[kind](24, 16)
    with pytest.raises(ValueError, match=r"no rule for the work of bert\.encoder\.layer\.1\.output\.dense"):
        count(bert, [batch]).check_is_complete()


class Transposed(torch.nn.Module):
    """A matrix product that is no nn.Linear."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(inputs, outputs))

    def forward(self, hidden):
        return hidden @ self.weight


class PackedLinear(torch.nn.Module):
    """As libraries for quantised weights have it: without a parameter."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(inputs, outputs, dtype=torch.int8))

    def forward(self, hidden):
        return hidden @ self.weight.to(hidden.dtype)
