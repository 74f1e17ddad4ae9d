import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from configuration_spikelm import SpikeLMConfig
from configuration_spikelm.configuration_spiking import NEURONS
from modeling_spikelm import SpikeLMForMaskedLM
from spike_metrics.callback import FiringRateCallback, log_firing_rate
from spike_metrics.counting import count
from tests.spike_metrics.conftest import SIZES


class Rows(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, number):
        ids = torch.randint(5, 60, (8,), generator=torch.Generator().manual_seed(number))
        mask = torch.ones(8, dtype=torch.long)
        mask[8 - number % 3 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids}


class Seen(TrainerCallback):
    """What a callback that sends logs somewhere is shown."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def train(model, folder, every=None, **arguments):
    training = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        **{"max_steps": 4, "logging_steps": 1} | arguments,
    )
    seen = Seen()
    trainer = Trainer(model, training, train_dataset=Rows(), callbacks=[seen])
    if every is not None:
        log_firing_rate(trainer, every)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return trainer, [entry.get("firing_rate") for entry in history], seen.logs


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_training_is_the_same_to_the_bit(model, tmp_path, accumulation):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    weights = []
    for every in (None, 1):
        model.load_state_dict(start)
        train(model, tmp_path, every, gradient_accumulation_steps=accumulation)
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    assert any(not torch.equal(value, start[name]) for name, value in weights[0].items())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("neuron", NEURONS)
def test_layers_that_run_again_for_their_gradient_are_watched_in_one_run_alone(neuron, batch, tmp_path):
    torch.manual_seed(0)
    model = SpikeLMForMaskedLM(SpikeLMConfig(**SIZES, num_time_steps=2, neuron=neuron))
    model.calibrate([batch])
    start, found = copy.deepcopy(model.state_dict()), []
    for checkpointing in (False, True):
        model.load_state_dict(start)
        _, rates, _ = train(model, tmp_path, 1, gradient_checkpointing=checkpointing)
        found.append((rates, copy.deepcopy(model.state_dict())))
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], msg=name)


def test_the_rate_is_that_of_the_batch_and_reaches_every_log(model, tmp_path):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.attention_dropout = 0.0
    batches = []
    hook = model.register_forward_pre_hook(lambda m, args, kwargs: batches.append(dict(kwargs)), with_kwargs=True)
    trainer, rates, logs = train(model, tmp_path, 1, learning_rate=0.0)
    hook.remove()
    expected = [count(model, [batch]).firing_rate for batch in batches]
    assert rates == expected and len(set(rates)) == 4
    assert [entry["firing_rate"] for entry in logs if "loss" in entry] == rates
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dead_and_saturated_neurons_are_logged(model, tmp_path):
    neurons = 2 * (5 * 16 + 24)
    assert 0 <= train(model, tmp_path, 1)[2][0]["dead_neurons"] < 16 / neurons
    # Without a membrane, which grows with the amplitude until it fires; and without dropout in front.
    model.bert.encoder.layer[1].attention.self.value_neurons.set_amplitude(torch.full((3,), 1e6))
    model.bert.encoder.layer[0].intermediate.neurons.set_amplitude(torch.full((3,), 1e-6))
    trainer, _, logs = train(model, tmp_path, 1, learning_rate=0.0)
    for entries in (logs, trainer.state.log_history):
        shown = [(entry["dead_neurons"], entry["saturated_neurons"]) for entry in entries if "loss" in entry]
        assert len(shown) == 4
        assert all(dead >= 16 / neurons and saturated >= 16 / neurons for dead, saturated in shown)


def test_it_is_sampled(model, tmp_path):
    runs = 0

    def note(*_):
        nonlocal runs
        # A group is watched where it has a hook besides this one.
        runs += len(neurons._forward_hooks) > 1

    neurons = model.bert.encoder.layer[0].intermediate.neurons
    neurons.register_forward_hook(note)
    _, rates, _ = train(model, tmp_path, every=2, max_steps=12, logging_steps=3)
    assert [rate is not None for rate in rates] == [False, True, False, True]
    assert runs == 2


def test_a_forward_that_fails_leaves_no_hook_and_compiled_models_compiled(model, tmp_path):
    def fail(*_):
        raise RuntimeError("no memory")

    failing = model.bert.encoder.layer[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        train(model, tmp_path, 1)
    failing.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert _stance() == "default"


def _stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


def test_once_an_epoch(model, tmp_path):
    _, rates, _ = train(model, tmp_path, 1, max_steps=-1, num_train_epochs=2, logging_strategy="epoch")
    assert len(rates) == 2 and None not in rates


def test_a_dense_model_has_no_rate(bert, tmp_path):
    assert train(bert, tmp_path, 1)[1] == [None] * 4


def test_every_below_one_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        FiringRateCallback(0)


def test_a_step_that_cannot_be_counted_is_trained_and_said(model, tmp_path, caplog):
    """In float16 a forward that overflows is one to be left out, and not the end of a run."""
    model.bert.embeddings.register_forward_hook(lambda module, args, output: output * torch.nan)
    trainer, rates, _ = train(model, tmp_path, 1)
    assert trainer.state.global_step == 4 and rates == [None] * 4
    assert "No firing rate of this step: " in caplog.text and "emits NaN" in caplog.text
