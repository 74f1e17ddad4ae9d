"""A training whose numbers stop being finite stops too, before they reach the weights, and says where it began.

After every backward pass, and before the optimizer moves a weight, the losses of the step and the norm of its gradient
are looked at. That is no forward more; it is a norm over the gradients and one number read back to the host (what
fp16's loss scaling reads as well, and the stock data loader waits for the device at every batch anyway). Only when the
number is bad is the step run a second time, with the same weights, batch and random numbers, to find the place. It is
not compiled then; compiled dropout draws other numbers, so that an overflow that hangs on them may not come again.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from modeling_spikelm.fitting import AMPLITUDE_FLOOR

from .written_files import WrittenFiles

FOLDER_PREFIX = "not-finite-step-"
# With an amplitude so many times what the batch would set, at most 1 % of the neurons can spike (Markov's inequality);
# with one so many times smaller nearly all do.
AMPLITUDE_RATIO = 100.0

Batch = dict[str, Any]
RowNumbers = Callable[[Batch], list[int]]


class NotFiniteError(ArithmeticError):
    """A loss or a gradient is infinite or no number, or an amplitude is none that neurons can have."""


@dataclass
class Findings:
    """What a step that went wrong looked like on one process; the content of the report, as JSON.

    Args:
        step: the optimizer step, counted from 1.
        process: the rank.
        losses: of the batches that make up the step.
        gradient_norm: after clipping, over all processes.
        rows: numbers of the training rows in each of these batches, None where they are not known.
        weights: parameters that were not finite before the step, or with `has_stepped` after it.
        neurons: the group at fault and why; None where all groups are in order.
        first: where the forward, or else the backward, first was not finite.
        failure: why the second run of the step did not come to its end; what it had found until then is kept.
        groups: of every group of neurons its amplitude, the one that the batch would set, and the largest input.
        has_stepped: whether the weights are those after the step, which DeepSpeed makes in its backward pass.
    """

    step: int
    process: int
    losses: list[float]
    gradient_norm: float
    rows: list[list[int]] | None = None
    weights: list[str] = field(default_factory=list)
    neurons: str | None = None
    first: str | None = None
    failure: str | None = None
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    has_stepped: bool = False

    @property
    def is_at_fault(self) -> bool:
        """Whether something went wrong on this process, and not only in the gradients of another."""
        return bool(self.weights or self.neurons or self.first)


def stop_when_not_finite(trainer: Trainer, row_numbers: RowNumbers | None = None) -> None:
    """Makes a trainer stop, with a `NotFiniteError`, in the step whose loss or gradient is not finite.

    The output folder then holds `not-finite-step-N`: the model as it was before step N and, of every process, the
    batches (with the state of the random numbers before them) and the `Findings`. It is no checkpoint of the Trainer
    and never resumed from. With fp16 the loss scaling takes care of gradients, and only losses are looked at.

    Args:
        trainer: every process has to call.
        row_numbers: the rows of a batch, for data that has no row numbers of its own (a stream).
    """
    trainer.add_callback(_NumbersCallback(trainer, row_numbers))


@contextmanager
def number_errors() -> Iterator[None]:
    """Around a training: ends the program with one line, on the main process, where `stop_when_not_finite` stopped it.

    Raises:
        SystemExit: code 1, instead of a NotFiniteError.
    """
    try:
        yield
    except NotFiniteError as error:
        sys.exit(f"error: {error}" if PartialState().is_main_process else 1)


def check_amplitudes(model: nn.Module) -> None:
    """Refuses amplitudes that neither calibration nor training sets; 0, not calibrated, is one that it will.

    Learned ones can be any finite number: the neurons take what is below the floor for the floor.

    Raises:
        NotFiniteError: names the group.
    """
    for name, amplitude in _amplitudes(model).items():
        if not _is_amplitude(amplitude) and amplitude.any():
            raise NotFiniteError(
                f"The spike amplitudes of {name} are {amplitude.tolist()}, but have to be finite and at least "
                f"{AMPLITUDE_FLOOR:g}. Start from a checkpoint that is whole, or calibrate the model anew."
            )


class _NumbersCallback(TrainerCallback):
    def __init__(self, trainer: Trainer, row_numbers: RowNumbers | None) -> None:
        self.trainer = trainer
        self.row_numbers = row_numbers
        self._batches: list[Batch] = []
        self._losses: list[torch.Tensor] = []
        self._random_state: dict[str, torch.Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_amplitudes(self._bare_model())
        self._remove_hooks()  # of an attempt that --auto_find_batch_size gave up
        # Outside of what torch.compile would take for a part of the model, and of the replicas of several devices.
        outermost = self.trainer.model_wrapped
        self._hooks = [
            outermost.register_forward_pre_hook(self._keep_batch, with_kwargs=True),
            outermost.register_forward_hook(self._keep_loss),
        ]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._batches, self._losses = [], []
        self._random_state = _random_state(args.device)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        numbers = list(self._losses)
        # Of fp16 the loss scaling looks at gradients: accelerate's, or DeepSpeed's own.
        if self.trainer.accelerator.mixed_precision != "fp16":
            numbers.append(self._gradient_norm())
        if not numbers:
            return  # the Trainer makes the loss itself
        is_bad = (~torch.stack(numbers).isfinite()).any().float()
        if args.world_size > 1:
            dist.all_reduce(is_bad, dist.ReduceOp.MAX)  # all stop, or none
        if is_bad.item():
            self._stop(args, state, kwargs["train_dataloader"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove_hooks()

    def _bare_model(self) -> nn.Module:
        # With FSDP the Trainer's own model can be the compiled one. That one has to be called, but its names differ.
        return self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _keep_batch(self, model: nn.Module, args: tuple[Any, ...], inputs: Batch) -> None:
        if not model.training:
            return
        count = inputs.get("num_items_in_batch")
        if isinstance(count, torch.Tensor) and count.dim():
            # The same number for each of several devices, where the second run has one.
            inputs = inputs | {"num_items_in_batch": count.flatten()[0]}
        self._batches.append(inputs)

    def _keep_loss(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        # With label smoothing the Trainer computes the loss itself; a bad one still shows in the gradient.
        if model.training and isinstance(outputs, dict) and outputs.get("loss") is not None:
            self._losses.append(outputs["loss"].detach().float().mean())  # of several devices, as the Trainer does

    def _gradient_norm(self) -> torch.Tensor:
        if self.trainer.is_deepspeed_enabled:
            norm = self.trainer.accelerator.deepspeed_engine_wrapped.get_global_grad_norm() or 0.0
            # DeepSpeed has a negative number for one that is not finite.
            return torch.tensor(norm if norm >= 0 else math.inf, device=self.trainer.args.device)
        norm = nn.utils.get_total_norm([p.grad for p in self.trainer.model.parameters() if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return norm.to(self.trainer.args.device, torch.float32)

    def _stop(self, args: TrainingArguments, state: TrainerState, dataloader: Any) -> None:
        self._remove_hooks()
        model = self._bare_model()
        findings = Findings(
            step=state.global_step + 1,
            process=args.process_index,
            losses=[loss.item() for loss in self._losses],
            gradient_norm=self._gradient_norm().item(),
            rows=self._rows(state, dataloader),
            weights=[name for name, value in model.named_parameters() if not _is_finite(value)],
            has_stepped=self._has_stepped(),
        )
        model.zero_grad()  # makes room for the second run
        with _random_numbers_from(self._random_state, args.device), torch.compiler.set_stance("force_eager"):
            try:
                is_sharded = self.trainer.is_fsdp_enabled
                for batch in self._batches:
                    # Where weights are shared out, each process waits for the others in every layer.
                    if is_sharded:
                        _trace(self.trainer.model, model, batch, findings, with_gradients=False)
                    elif findings.first is None:
                        _trace(self.trainer.model, model, batch, findings)
                if is_sharded and findings.first is None:
                    findings.failure = "its forward is finite, and the backward of sharded weights is not run again"
            except RuntimeError as error:  # out of memory, for instance; what is known already must not be lost
                findings.failure = str(error)
        folder = self._save(args, findings)
        everyone = [Findings(**entry) for entry in gather_object([asdict(findings)])]
        told = next((entry for entry in everyone if entry.is_at_fault), findings)
        raise NotFiniteError(_message(told, folder, args.world_size))

    def _has_stepped(self) -> bool:
        if not self.trainer.is_deepspeed_enabled:
            return False
        # It leaves out the step where it finds a gradient that is not finite.
        engine = self.trainer.accelerator.deepspeed_engine_wrapped.engine
        return not getattr(engine.optimizer, "overflow", False)

    def _rows(self, state: TrainerState, dataloader: Any) -> list[list[int]] | None:
        """The rows of this step's batches: those that the sampler names once more, if they make the same batches."""
        if self.row_numbers is not None:
            return [self.row_numbers(batch) for batch in self._batches]
        sampler, dataset = getattr(dataloader, "batch_sampler", None), self.trainer.train_dataset
        if sampler is None or not hasattr(dataset, "__getitem__"):
            return None
        epoch = int(state.epoch or 0)
        dataloader.set_epoch(epoch)
        begin = round(((state.epoch or 0) - epoch) * len(dataloader))
        rows = [list(numbers) for numbers in islice(sampler, begin, begin + len(self._batches))]
        for batch, numbers in zip(self._batches, rows, strict=True):
            again = dataloader.collate_fn([dataset[number] for number in numbers])
            if not torch.equal(again["input_ids"], batch["input_ids"].cpu()):
                return None
        return rows

    def _save(self, args: TrainingArguments, findings: Findings) -> Path:
        """Writes the folder, which appears only when it is complete; every process adds its batches."""
        folder = Path(args.output_dir, f"{FOLDER_PREFIX}{findings.step}")
        staging = folder.with_name(f".{folder.name}")
        accelerator = self.trainer.accelerator
        if args.process_index == 0:
            WrittenFiles(args.output_dir).claim(folder.name, staging.name)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        accelerator.wait_for_everyone()
        self.trainer.save_model(str(staging), _internal_call=True)
        for number, batch in enumerate(self._batches):
            tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
            contents = {name: value.cpu().contiguous() for name, value in (tensors | self._random_state).items()}
            save_file(contents, staging / f"batch-{number}-process-{findings.process}.safetensors")
        report = staging / f"findings-process-{findings.process}.json"
        report.write_text(json.dumps(asdict(findings), indent=2) + "\n", encoding="utf-8")
        accelerator.wait_for_everyone()
        if args.process_index == 0:
            (staging / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(staging, folder)
            WrittenFiles(args.output_dir).forget(staging.name)
        accelerator.wait_for_everyone()
        return folder


def _message(findings: Findings, folder: Path, processes: int) -> str:
    losses = ", ".join(f"{loss:g}" for loss in findings.losses) or "not known"
    where = f" on process {findings.process}" if processes > 1 else ""
    when = "after" if findings.has_stepped else "before"
    sentences = [
        f"The training stopped in step {findings.step}, {when} it changed a weight: loss {losses}{where}, norm of the "
        f"gradient {findings.gradient_norm:g}.",
        f"Weights that are not finite: {_listed(findings.weights)}." if findings.weights else "",
        f"The neurons at fault: {findings.neurons}." if findings.neurons else "",
        f"What first was not finite: {findings.first}." if findings.first else "",
        f"The step could not be run a second time to find more: {findings.failure}." if findings.failure else "",
        f"Training rows{where}: {_listed([str(row) for rows in findings.rows for row in rows], 64)}."
        if findings.rows
        else "",
        f"The model {when} this step, the batch and what was found are in {folder}. The same command would come to "
        "the same step: go on from a checkpoint with --resume_from_checkpoint and, for instance, a smaller "
        "--learning_rate.",
    ]
    return " ".join(filter(None, sentences))


def _listed(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _trace(
    model: nn.Module, bare_model: nn.Module, batch: Batch, findings: Findings, with_gradients: bool = True
) -> None:
    """Runs a batch again and notes where its numbers first are not finite, and what every group of neurons sees.

    Args:
        model: to call.
        bare_model: to name the parts by; what `model` is, or what it wraps.
        batch: the arguments of the call.
        findings: what is found is added here, unless something was found before.
        with_gradients: look at the backward pass as well, if the forward has nothing to show.
    """
    # What was seen, in this order, and whether it was finite.
    forward: list[tuple[str, bool]] = []
    backward: list[tuple[str, bool]] = []
    hooks: list[RemovableHandle] = []

    def watch(name: str, module: nn.Module) -> None:
        def arrived(gradient: torch.Tensor) -> None:
            backward.append((f"the gradient of the output of {name}", _is_finite(gradient)))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for tensor in _tensors(output):
                forward.append((f"the output of {name}", _is_finite(tensor)))
                if tensor.requires_grad:
                    tensor.register_hook(arrived)

        hooks.append(module.register_forward_hook(after))

    def watch_neurons(name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs = args[0].detach()
            forward.append((f"the inputs of {name}", _is_finite(inputs)))
            steps = inputs.unflatten(0, (len(module.amplitude), -1))
            findings.groups[name] = {
                "amplitude": _at_work(module.amplitude).tolist(),
                "amplitude_of_batch": module.batch_amplitude(steps).tolist(),
                "largest_input": steps.abs().amax().item(),
            }

        hooks.append(module.register_forward_pre_hook(before))

    groups = dict.fromkeys(_amplitudes(bare_model))
    for name, module in bare_model.named_modules():
        if name in groups:
            watch_neurons(name, module)
        if name:
            watch(name, module)
    try:
        # With label smoothing, for instance, the Trainer makes the loss itself, of what the model gives.
        loss = model(**batch).get("loss")
    finally:
        for hook in hooks:
            hook.remove()
    forward += [] if loss is None else [("the loss", _is_finite(loss))]
    findings.neurons = findings.neurons or _neurons_at_fault(findings.groups)
    findings.first = findings.first or next((what for what, is_finite in forward if not is_finite), None)
    if not with_gradients:
        return
    if findings.first is None and loss is None:
        findings.failure = "the loss is not made by the model, so that nothing can be said of its gradients"
    elif findings.first is None:
        named = [(name, value) for name, value in bare_model.named_parameters() if value.requires_grad]
        gradients = torch.autograd.grad(loss, [value for _, value in named], allow_unused=True)
        backward += [
            (f"the gradient of {name}", _is_finite(gradient))
            for (name, _), gradient in zip(named, gradients, strict=True)
            if gradient is not None
        ]
        findings.first = next((what for what, is_finite in backward if not is_finite), None)


def _neurons_at_fault(groups: dict[str, dict[str, Any]]) -> str | None:
    """The first group, in the order of execution, whose amplitude is none or whose inputs are not finite; or else the
    first whose amplitude has lost touch with its inputs."""
    for name, group in groups.items():
        if not _is_amplitude(torch.tensor(group["amplitude"])):
            return (
                f"{name} with amplitudes {group['amplitude']}, which have to be finite and at least {AMPLITUDE_FLOOR:g}"
            )
        if not math.isfinite(group["largest_input"]):
            return f"{name}, whose inputs are not finite"
    for name, group in groups.items():
        ratios = [a / b for a, b in zip(group["amplitude"], group["amplitude_of_batch"], strict=True)]
        if not all(1 / AMPLITUDE_RATIO <= ratio <= AMPLITUDE_RATIO for ratio in ratios):
            return (
                f"{name} with amplitudes {group['amplitude']}, where this batch would set {group['amplitude_of_batch']}"
            )
    return None


def _amplitudes(model: nn.Module) -> dict[str, torch.Tensor]:
    """The amplitudes of every group of neurons by the group's name; a checkpoint's own code has classes of its own."""
    tensors = chain(model.named_buffers(), model.named_parameters())  # learned ones are parameters
    return {name.removesuffix(".amplitude"): _at_work(value) for name, value in tensors if name.endswith(".amplitude")}


def _at_work(amplitude: torch.Tensor) -> torch.Tensor:
    """As neurons take it: what an optimizer has made smaller than the floor is the floor."""
    is_learned = isinstance(amplitude, nn.Parameter)
    return amplitude.detach().clamp(min=AMPLITUDE_FLOOR) if is_learned else amplitude.detach()


def _is_amplitude(amplitude: torch.Tensor) -> bool:
    # Of a float32 just at the floor.
    return bool((amplitude.isfinite() & (amplitude >= 0.99 * AMPLITUDE_FLOOR)).all())


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors in the output of a module."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict | tuple | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors(entry)


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"random_state": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_state_of_device"] = torch.cuda.get_rng_state(device)
    return state


@contextmanager
def _random_numbers_from(state: dict[str, torch.Tensor], device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state["random_state"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["random_state_of_device"], device)
        yield
