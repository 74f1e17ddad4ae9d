import json
import re

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from configuration_spikelm import SpikeLMConfig
from experiment.numerics import NotFiniteError, check_amplitudes, number_errors, stop_when_not_finite
from experiment.written_files import LIST_NAME
from modeling_spikelm import SpikeLMForMaskedLM, SpikeLMModel

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
FIRST_LAYER = "bert.encoder.layer.0"
SECOND_LAYER = "bert.encoder.layer.1"


@pytest.fixture
def model() -> SpikeLMForMaskedLM:
    torch.manual_seed(0)
    return SpikeLMForMaskedLM(SpikeLMConfig(**SIZES, num_time_steps=3))


@pytest.fixture
def rows() -> Dataset:
    ids = torch.randint(5, 60, (24, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


class From(TrainerCallback):
    """Does something to the model as a step begins, for the first time in step `step`."""

    def __init__(self, step, do):
        self.step, self.do, self.before = step, do, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.do(model)
            self.before = {name: value.clone() for name, value in model.state_dict().items()}


def make_trainer(model, rows, folder, *callbacks, **arguments) -> Trainer:
    training = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        **{"max_steps": 9, "per_device_train_batch_size": 4, "save_steps": 2} | arguments,
    )
    trainer = Trainer(model, training, train_dataset=rows, callbacks=list(callbacks))
    stop_when_not_finite(trainer)
    return trainer


def stopped(trainer: Trainer) -> str:
    with pytest.raises(NotFiniteError) as error:
        trainer.train()
    return str(error.value)


def spoil(name: str, value: float):
    """Sets one entry of a tensor of the model."""

    def change(model) -> None:
        with torch.no_grad():
            model.state_dict()[name].view(-1)[1] = value

    return change


def findings(folder) -> dict:
    return json.loads((folder / "findings-process-0.json").read_text())


def overflow_in(name: str):
    """Makes one feature in the output of a module infinite."""

    def change(model) -> None:
        def hook(module, args, output):
            return torch.where(torch.arange(output.shape[-1]) == 0, float("inf"), output)

        model.get_submodule(name).register_forward_hook(hook)

    return change


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            spoil(f"{SECOND_LAYER}.intermediate.neurons.amplitude", float("nan")),
            f"The neurons at fault: {SECOND_LAYER}.intermediate.neurons with amplitudes [",
        ),
        (
            spoil(f"{FIRST_LAYER}.output.dense.weight", float("inf")),
            f"Weights that are not finite: {FIRST_LAYER}.output.dense.weight. The neurons at fault: {SECOND_LAYER}."
            f"attention.self.neurons, whose inputs are not finite. What first was not finite: the output of "
            f"{FIRST_LAYER}.output.dense.",
        ),
        (
            overflow_in(f"{FIRST_LAYER}.intermediate.dense"),
            f"The neurons at fault: {FIRST_LAYER}.output.neurons, whose inputs are not finite. What first was not "
            f"finite: the output of {FIRST_LAYER}.intermediate.dense.",
        ),
    ],
    ids=["amplitude", "weight", "overflow"],
)
def test_a_bad_step_stops_the_training_and_names_the_neurons(model, rows, tmp_path, damage, told):
    message = stopped(make_trainer(model, rows, tmp_path, From(5, damage)))
    assert message.startswith("The training stopped in step 5, before it changed a weight: loss nan, norm of the ")
    assert told in message
    assert message.count("\n") == 0


def bad_gradient(model) -> None:
    model.get_parameter(f"{FIRST_LAYER}.output.dense.weight").register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            overflow_in(f"{FIRST_LAYER}.intermediate.dense"),
            f"What first was not finite: the output of {FIRST_LAYER}.intermediate.dense.",
        ),
        (bad_gradient, "the loss is not made by the model, so that nothing can be said of its gradients"),
    ],
    ids=["forward", "backward"],
)
def test_a_loss_that_the_trainer_makes_of_the_logits_is_looked_at_as_far_as_the_model_goes(
    model, rows, tmp_path, damage, told
):
    trainer = make_trainer(model, rows, tmp_path, From(2, damage), label_smoothing_factor=0.1)
    message = stopped(trainer)
    assert message.startswith("The training stopped in step 2, before it changed a weight: loss not known")
    assert told in message


@pytest.fixture(params=["compiled", "on several devices"])
def make_wrapped_trainer(request):
    """As `make_trainer`, with a model that the Trainer wraps."""

    def make(model, rows, folder, *callbacks) -> Trainer:
        if request.param == "compiled":
            compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
            return make_trainer(model, rows, folder, *callbacks, **compiled)
        trainer = make_trainer(model, rows, folder, *callbacks)
        trainer.args._n_gpu = 2  # nn.DataParallel, which goes on with one model where there is no GPU
        return trainer

    return make


def test_a_bad_step_of_a_wrapped_model_names_rows_and_neurons_as_well(make_wrapped_trainer, model, rows, tmp_path):
    hooks = []

    def change(model) -> None:
        hooks.append((len(trainer.model_wrapped._forward_hooks), len(model._forward_hooks)))
        spoil(f"{FIRST_LAYER}.output.dense.weight", float("inf"))(model)

    trainer = make_wrapped_trainer(model, rows, tmp_path, From(5, change))
    message = stopped(trainer)
    # On the model itself they would be compiled, or run once for every device.
    assert hooks == [(1, 0)]
    assert f"The neurons at fault: {SECOND_LAYER}.attention.self.neurons, whose inputs are not finite." in message
    numbers = [int(number) for number in re.search(r"Training rows: ([\d, ]+)\.", message)[1].split(", ")]
    saved = load_file(tmp_path / "not-finite-step-5" / "batch-0-process-0.safetensors")
    assert saved["input_ids"].tolist() == [rows[number]["input_ids"] for number in numbers]


def test_a_bad_gradient_of_a_wrapped_model_is_traced_as_well(make_wrapped_trainer, model, rows, tmp_path):
    name = f"{FIRST_LAYER}.output.dense.weight"

    def damage(model) -> None:
        model.get_parameter(name).register_hook(lambda gradient: gradient * float("inf"))

    message = stopped(make_wrapped_trainer(model, rows, tmp_path, From(3, damage)))
    assert "loss nan" not in message
    assert f"What first was not finite: the gradient of {name}." in message
    saved = load_file(tmp_path / "not-finite-step-3" / "batch-0-process-0.safetensors")
    assert saved["num_items_in_batch"].dim() == 0, "not the number for each of several devices"


def test_a_second_run_that_fails_costs_its_findings_and_nothing_else(model, rows, tmp_path):
    def break_second_run(model) -> None:
        def fail(module, args):
            if calls:
                raise RuntimeError("out of memory")
            calls.append(1)

        calls = []
        spoil("bert.embeddings.word_embeddings.weight", float("nan"))(model)
        model.get_submodule(SECOND_LAYER).register_forward_pre_hook(fail)

    message = stopped(make_trainer(model, rows, tmp_path, From(4, break_second_run)))
    assert "The step could not be run a second time to find more: out of memory." in message
    assert (tmp_path / "not-finite-step-4" / "model.safetensors").is_file()
    assert findings(tmp_path / "not-finite-step-4")["failure"] == "out of memory"


def test_an_attempt_that_ran_out_of_memory_leaves_no_hook(model, rows, tmp_path):
    attempts = []

    def run_out(model) -> None:
        attempts.append(len(model._forward_hooks))
        if len(attempts) == 1:
            raise RuntimeError("CUDA out of memory.")

    trainer = make_trainer(model, rows, tmp_path, From(1, run_out), auto_find_batch_size=True, max_steps=2)
    trainer.train()
    assert attempts == [1, 1]
    assert not model._forward_hooks


def test_nothing_changed_and_the_saved_step_can_be_looked_at(model, rows, tmp_path):
    spoiled = From(5, spoil(f"{FIRST_LAYER}.attention.self.neurons.amplitude", float("inf")))
    message = stopped(make_trainer(model, rows, tmp_path, spoiled))
    folder = tmp_path / "not-finite-step-5"
    assert str(folder) in message
    saved = SpikeLMForMaskedLM.from_pretrained(folder)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, spoiled.before[name], rtol=0, atol=0, equal_nan=True, msg=name)
        torch.testing.assert_close(saved.state_dict()[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    told = re.search(r"Training rows: ([\d, ]+)\.", message)[1]
    numbers = [int(number) for number in told.split(", ")]
    batch = load_file(folder / "batch-0-process-0.safetensors")
    assert batch["input_ids"].tolist() == rows[numbers]["input_ids"] and len(set(numbers)) == 4
    assert findings(folder)["rows"] == [numbers]
    groups = findings(folder)["groups"]
    assert list(groups)[0] == f"{FIRST_LAYER}.attention.self.neurons" and len(groups) == 12
    assert not [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]


def test_the_saved_random_numbers_give_the_same_loss_again(model, rows, tmp_path):
    """Dropout included: what was seen can be seen again."""
    bad = From(2, lambda model: model.register_forward_hook(keep_and_spoil))
    losses = []

    def keep_and_spoil(module, args, output):
        losses.append(output.loss.item())
        output.loss = output.loss * float("inf")
        return output

    stopped(make_trainer(model, rows, tmp_path, bad))
    folder = tmp_path / "not-finite-step-2"
    batch = load_file(folder / "batch-0-process-0.safetensors")
    again = SpikeLMForMaskedLM.from_pretrained(folder).train()
    torch.set_rng_state(batch.pop("random_state"))
    batch.pop("random_state_of_device", None)
    assert again(**batch).loss.item() == losses[0] == losses[1]
    torch.manual_seed(1)
    assert again(**batch).loss.item() != losses[0]


def test_the_folder_is_no_checkpoint_to_resume_from(model, rows, tmp_path):
    stopped(make_trainer(model, rows, tmp_path, From(5, spoil(f"{FIRST_LAYER}.output.dense.bias", float("nan")))))
    assert get_last_checkpoint(str(tmp_path)).endswith("checkpoint-4")
    assert not (tmp_path / "not-finite-step-5" / "trainer_state.json").exists()
    left = sorted(path.name for path in tmp_path.iterdir() if path.name != LIST_NAME)
    assert left == ["checkpoint-2", "checkpoint-4", "not-finite-step-5"]


def test_all_batches_of_an_accumulated_step_are_kept_and_named(model, rows, tmp_path):
    bad = From(3, spoil(f"{FIRST_LAYER}.output.dense.bias", float("nan")))
    stopped(make_trainer(model, rows, tmp_path, bad, gradient_accumulation_steps=2, per_device_train_batch_size=3))
    folder = tmp_path / "not-finite-step-3"
    assert len(findings(folder)["losses"]) == 2
    for number, numbers in enumerate(findings(folder)["rows"]):
        batch = load_file(folder / f"batch-{number}-process-0.safetensors")
        assert batch["input_ids"].tolist() == rows[numbers]["input_ids"]


def test_rows_are_known_in_a_later_epoch_and_after_resuming(model, rows, tmp_path):
    make_trainer(model, rows, tmp_path, max_steps=8).train()
    trainer = make_trainer(model, rows, tmp_path, From(9, spoil(f"{FIRST_LAYER}.output.dense.bias", float("nan"))))
    with pytest.raises(NotFiniteError):
        trainer.train(resume_from_checkpoint=True)
    folder = tmp_path / "not-finite-step-9"
    batch = load_file(folder / "batch-0-process-0.safetensors")
    assert batch["input_ids"].tolist() == rows[findings(folder)["rows"][0]]["input_ids"]


def test_a_gradient_that_overflows_behind_a_finite_loss_is_traced_to_its_module(model, rows, tmp_path):
    name = f"{FIRST_LAYER}.intermediate.dense"

    def damage(model) -> None:
        def hook(module, args, output):
            output.register_hook(lambda gradient: gradient * float("inf"))

        model.get_submodule(name).register_forward_hook(hook)

    message = stopped(make_trainer(model, rows, tmp_path, From(3, damage)))
    assert "loss nan" not in message
    assert f"What first was not finite: the gradient of the output of {name}." in message
    assert "The neurons at fault" not in message


def test_a_loss_that_is_infinite_while_the_gradient_is_finite_stops_too(model, rows, tmp_path):
    def damage(model) -> None:
        def hook(module, args, output):
            output.loss = output.loss + torch.tensor(float("inf"))
            return output

        model.register_forward_hook(hook, prepend=True)

    message = stopped(make_trainer(model, rows, tmp_path, From(3, damage)))
    assert "step 3, before it changed a weight: loss inf" in message


def test_amplitudes_that_lost_touch_with_their_inputs_are_named(model, rows, tmp_path):
    name = f"{FIRST_LAYER}.output.neurons"
    bad = From(3, lambda model: (model.get_submodule(name).amplitude.mul_(1e4), overflow_in("cls")(model)))
    message = stopped(make_trainer(model, rows, tmp_path, bad))
    assert f"The neurons at fault: {name} with amplitudes [" in message and "where this batch would set [" in message


def test_a_first_batch_that_is_not_finite_is_found_although_it_calibrates(model, rows, tmp_path):
    message = stopped(
        make_trainer(model, rows, tmp_path, From(1, spoil("bert.embeddings.LayerNorm.bias", float("nan"))))
    )
    assert "step 1" in message and "Weights that are not finite: bert.embeddings.LayerNorm.bias." in message


def test_a_dense_model_stops_as_well(rows, tmp_path):
    bert = BertForMaskedLM(BertConfig(**SIZES))
    message = stopped(
        make_trainer(bert, rows, tmp_path, From(2, spoil(f"{FIRST_LAYER}.output.dense.bias", float("nan"))))
    )
    assert f"What first was not finite: the output of {FIRST_LAYER}.output.dense." in message


def test_a_healthy_training_is_the_same_to_the_bit_and_leaves_no_hook(model, rows, tmp_path):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    weights = []
    for watched in (True, False):
        model.load_state_dict(start)
        trainer = make_trainer(model, rows, tmp_path, save_strategy="no")
        if not watched:
            trainer.callback_handler.callbacks.pop()
        trainer.train()
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not torch.equal(weights[0]["cls.predictions.bias"], start["cls.predictions.bias"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_without_a_loss_of_the_models_own_fp16_leaves_nothing_to_look_at(model, rows, tmp_path):
    """The loss scaling, which a CPU has not, looks at the gradients; the Trainer has made the loss."""
    trainer = make_trainer(model, rows, tmp_path)
    (numbers,) = (each for each in trainer.callback_handler.callbacks if hasattr(each, "row_numbers"))
    trainer.accelerator.scaler = object()
    numbers.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)


def test_a_healthy_step_runs_forward_once(model, rows, tmp_path):
    runs = []
    model.bert.register_forward_hook(lambda *_: runs.append(1))
    make_trainer(model, rows, tmp_path, save_strategy="no").train()
    assert len(runs) == 9


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 1e-9])
def test_amplitudes_that_no_calibration_sets_are_refused_before_the_first_step(model, rows, tmp_path, value):
    neurons = model.bert.encoder.layer[1].output.neurons
    neurons.set_amplitude(torch.tensor([0.5, value, 0.5]))
    with pytest.raises(NotFiniteError, match=f"spike amplitudes of {SECOND_LAYER}.output.neurons are"):
        make_trainer(model, rows, tmp_path).train()
    assert not list(tmp_path.iterdir())


def test_learned_amplitudes_below_the_floor_are_the_floor_and_no_fault():
    learned = SpikeLMModel(SpikeLMConfig(**SIZES, neuron="learned", num_time_steps=3))
    amplitude = learned.encoder.layer[0].output.neurons.amplitude
    with torch.no_grad():
        amplitude[:] = torch.tensor([0.5, 1e-6, -0.5])
    check_amplitudes(learned)
    with torch.no_grad():
        amplitude[1] = float("nan")
    with pytest.raises(NotFiniteError, match="spike amplitudes of encoder.layer.0.output.neurons are"):
        check_amplitudes(learned)


def test_not_calibrated_is_no_fault(model):
    check_amplitudes(model)


def test_a_script_ends_with_one_line_and_a_code():
    with pytest.raises(SystemExit, match="^error: the reason$"), number_errors():
        raise NotFiniteError("the reason")
