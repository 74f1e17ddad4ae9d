"""What SpikeLM does on one card, in at most four minutes: `python benchmarks/gpu.py --help`.

First comes what no card has measured since it changed: times and memory of the most time steps, and int8, against the
stock BERT. Then parity on every path, with the golden tensors and of every neuron with its oracle; then the compiled
SpikeLM of the most time steps, which may take all the time there is; then the rest. Needs torch, Triton and
transformers, and no network. All sides run in this process, one after the other. Each result is printed and written at
once; a side that fails says why in its row, and so does one that the time does not suffice for.
"""

import project  # isort:skip
import copy
import gc
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from cases import FAST_PATHS, HEADLINE, SHAPES, Case, list_of
from measuring import ResidentPeak, count_flops, matrix_product_rate, now
from report import Row, keep, print_table
from safetensors.torch import load_file
from sides import build_batch, build_model, calibrate, checkpoint_activations, inference, training_loss
from transformers import HfArgumentParser
from worker import TrainingStep

from configuration_spikelm.configuration_spiking import NEURONS
from modeling_spikelm import SpikeLMConfig, SpikeLMForPreTraining, convert_reference_state_dict, fast_paths
from modeling_spikelm.spike_kernels import runs_in_triton

Work = tuple[Row, Callable[[], Row]]
FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
MIB = 2**20
# In units of the largest value of a tensor: what the model's own tests allow, and what bfloat16 can hold.
BOUNDS = {"float32": (1e-5, 1e-4), "bf16_autocast": (2**-7, 2**-5)}


@dataclass
class Arguments:
    shape: list[str] = list_of("base", "small", choices=SHAPES, help="Sizes of the models; of the first, every row.")
    num_time_steps: list[int] = list_of(1, 4, help="Time steps T of the SpikeLMs.")
    batch_size: int = field(default=64, metadata={"help": "Sequences per batch; of the long ones, a quarter."})
    length: int = field(default=128, metadata={"help": "Tokens per sequence; of the long ones, four times as many."})
    repeats: int = field(default=5, metadata={"help": "Iterations of a timing, of which there are three."})
    seconds: float = field(
        default=240, metadata={"help": "When to stop, counted from the start; what is in progress then is given up."}
    )
    compiled: bool = field(default=True, metadata={"help": "Also compile, for as long as there is time."})
    device: Literal["cuda", "cpu"] = field(default="cuda", metadata={"help": "cpu is for trying the command."})
    output: str = field(default="benchmarks/results", metadata={"help": "Folder for gpu.json and gpu.md."})


def main() -> None:
    # Not as the other benchmarks: it runs where there is no accelerate.
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    end = project.STARTED + arguments.seconds
    device = arguments.device
    rate = matrix_product_rate(device, torch.bfloat16, arguments.shape[0])
    way = "in Triton" if runs_in_triton(torch.zeros(1, device=device)) else "in torch's own operations"
    product = f"product at {rate / 1e12:.3g} TFLOP/s"
    title = f"Time and memory, bf16 autocast, dropout 0.1, neurons {way}, {product}"
    of_bert: dict[tuple, float] = {}

    def work(cases: list[Case]) -> list[Work]:
        return timed_work(cases, arguments.repeats, rate, of_bert)

    new, others = timed_cases(arguments)
    rows = table(arguments, end, title, work(new))
    table(arguments, end, "Parity with the reference's numbers", parity_work(device))
    table(arguments, end, "Every neuron and its oracle, T = 4", oracle_work(device))
    if not arguments.compiled:
        table(arguments, end, title, work(others), rows)
        return
    title_compiled = f"Time and memory, compiled, bf16 autocast, {product}"
    new, others_compiled = compiled_cases(arguments)
    rows_compiled = table(arguments, end, title_compiled, work(new))
    table(arguments, end, title, work(others), rows)
    table(arguments, end, "Parity with the reference's numbers, compiled", compiled_parity_work(device))
    table(arguments, end, title_compiled, work(others_compiled), rows_compiled)


def table(arguments: Arguments, end: float, title: str, work: list[Work], rows: Sequence[Row] = ()) -> list[Row]:
    """Does one piece of work after the other, each of which fills a row, and keeps all rows that there are.

    Args:
        rows: those that the table has.
    """
    rows = list(rows)
    for names, fill in work:
        row = names | {"note": None}
        rows.append(row)
        try:
            with time_limit(end - time.monotonic()):
                row |= fill()
        except Exception as error:  # whatever it is, the other rows can do without this one
            row["note"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        # Whoever ends this process leaves what has been printed.
        print(json.dumps(row), flush=True)
        free_memory()
        columns = dict.fromkeys(name for row in rows for name in row)
        # The note stands last.
        columns["note"] = columns.pop("note")
        rows = [{name: row.get(name) for name in columns} for row in rows]
        keep("gpu", title, rows, arguments.device, arguments.output)
    print_table(title, rows)
    return rows


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in here after so many seconds; at once where there are none.

    It is raised again every two seconds, for what runs at that moment may swallow it, as a finalizer does.
    """

    def stop(*_: object) -> None:
        raise TimeoutError("no time left")

    if seconds <= 0:
        stop()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def free_memory() -> None:
    """Leaves nothing of a side to the next one."""
    for switch in fields(fast_paths.FastPaths):
        setattr(fast_paths.FAST_PATHS, switch.name, True)
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def parity_work(device: str) -> list[Work]:
    # Those for a CPU serve no other device.
    switches = [name for name in FAST_PATHS if device == "cpu" or not name.startswith("cpu_")]
    paths = {"default": (), **{f"-{name}": (name,) for name in switches}, "oracle": FAST_PATHS, "checkpointing": ()}
    return [
        (
            {"path": path, "T": steps, "attention": attention},
            lambda steps=steps, attention=attention, path=path, off=off: parity(
                steps, attention, off, device, checkpoints=path == "checkpointing"
            ),
        )
        for steps in (4, 1)
        for attention in ("sdpa", "eager")
        for path, off in paths.items()
        # Attention makes no difference to what the neurons do.
        if attention == "sdpa" or path == "default"
    ]


def compiled_parity_work(device: str) -> list[Work]:
    return [({"path": "fullgraph", "T": 4}, lambda: parity(4, "sdpa", (), device, compiles=True))]


def parity(
    steps: int,
    attention: str,
    without: tuple[str, ...],
    device: str,
    checkpoints: bool = False,
    compiles: bool = False,
) -> Row:
    """Largest errors of two training steps from the golden tensors, in units of each tensor's largest value."""
    switch_off(without)
    facts = json.loads((FIXTURES / f"official_T{steps}.json").read_text())
    del facts["encoder_hidden_act"]
    config = SpikeLMConfig(**facts, attn_implementation=attention)
    tensors = load_file(FIXTURES / f"official_T{steps}.safetensors", device=device)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    model = SpikeLMForPreTraining(config).to(device)
    model.load_state_dict(convert_reference_state_dict(part("state."), config))
    model.reset_calibration()
    model.train()
    if checkpoints:
        checkpoint_activations(model)
    # As TrainingStep has it.
    torch._functorch.config.donated_buffer = not compiles
    # The first batch calibrates, which is nothing to be compiled.
    run = torch.compile(model, fullgraph=True) if compiles else model
    errors = []
    for number, step in enumerate((model, run)):
        model.zero_grad()
        output = step(**part(f"step{number}.in."))
        output.loss.backward()
        expected = part(f"step{number}.")
        names = ("loss", "prediction_logits", "seq_relationship_logits")
        forward = max(error(output[name], expected[name]) for name in names)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        wanted = part(f"step{number}.grad.")
        errors.append((forward, max(error(gradients[name], value) for name, value in wanted.items())))
    return verdict(*map(max, zip(*errors, strict=True)), "float32")


def oracle_work(device: str) -> list[Work]:
    return [
        ({"neuron": neuron, "dtype": dtype}, lambda neuron=neuron, dtype=dtype: beside_oracle(neuron, dtype, device))
        for dtype in BOUNDS
        for neuron in NEURONS
    ]


def beside_oracle(neuron: str, dtype: str, device: str) -> Row:
    """Largest differences of a training step from that of the same model with every switch off but attention's.

    In 16 bits a CPU's attention has other roundings, which would hide the neuron's where a gradient is 0 but for them.
    """
    settings = {"num_time_steps": 4, "neuron": neuron, "dropout": 0.0, "dtype": dtype}
    case = Case("training", "spikelm-dense", "tiny", 4, device=device, **settings)
    model, batch = build_model(case), build_batch(case)
    calibrate(model, batch)
    oracle = copy.deepcopy(model)
    loss = training_loss(case, model)(batch)
    loss.backward()
    switch_off(tuple(name for name in FAST_PATHS if name != "cpu_attention"))
    expected = training_loss(case, oracle)(batch)
    expected.backward()
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), oracle.parameters(), strict=True)]
    wanted = [theirs for _, theirs in pairs if theirs is not None]
    # The gradient of a shift of all keys is 0, but for rounding: softmax does not see it.
    least = 1e-6 * max(gradient.abs().max().item() for gradient in wanted)
    gradient = max(error(ours, theirs, least) for ours, theirs in pairs if theirs is not None)
    return verdict(error(loss, expected), gradient, dtype)


def error(ours: torch.Tensor, theirs: torch.Tensor, least: float = 0.0) -> float:
    """The largest, in units of the largest value, or of `least` where that is more."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=least)).item()


def verdict(forward: float, gradient: float, dtype: str) -> Row:
    of_forward, of_gradient = BOUNDS[dtype]
    holds = forward <= of_forward and gradient <= of_gradient
    return {"forward error": forward, "gradient error": gradient, "holds": "yes" if holds else "NO"}


def switch_off(names: tuple[str, ...]) -> None:
    for name in names:
        setattr(fast_paths.FAST_PATHS, name, False)


def timed_cases(arguments: Arguments) -> tuple[list[Case], list[Case]]:
    """What has changed since a card measured it, and the rest.

    Training and inference of every shape; of the first also what leaves something out, int8, and long texts.
    """
    first = arguments.shape[0]
    long = {"batch_size": max(1, arguments.batch_size // 4), "length": 4 * arguments.length}
    training, checkpointed, of_long = (
        sides(arguments, "training", first, **changes) for changes in ({}, {"gradient_checkpointing": True}, long)
    )
    inferring = [
        case for size in (arguments.batch_size, 1) for case in sides(arguments, "inference", first, batch_size=size)
    ]
    new = [
        *training,
        replace(training[-1], without=("triton_dropout",)),
        *inferring,
        *(replace(case, side="spikelm-int8") for case in inferring if case.side != HEADLINE),
        *(case for cases in (checkpointed, of_long) for case in (cases[0], cases[-1])),
    ]
    others = [
        *(case for cases in (checkpointed, of_long) for case in cases[1:-1]),
        *(case for shape in arguments.shape[1:] for case in sides(arguments, "training", shape)),
        replace(training[-1], without=("triton_neurons",)),
        replace(training[-1], side="oracle"),
    ]
    return new, others


def compiled_cases(arguments: Arguments) -> tuple[list[Case], list[Case]]:
    """The most time steps, and the rest. That BERT compiles needs no proof."""
    first = arguments.shape[0]
    training = sides(arguments, "training", first, compile=True)
    inferring = sides(arguments, "inference", first, compile=True)
    return [training[-1], inferring[-1]], [*training[:-1], *inferring[:-1]]


def sides(arguments: Arguments, measure: str, shape: str, **changes: object) -> list[Case]:
    """BERT, and a SpikeLM of every number of time steps."""
    common = {
        "batch_size": arguments.batch_size,
        "length": arguments.length,
        "dtype": "bf16_autocast",
        "device": arguments.device,
    } | changes
    spiking = [Case(measure, "spikelm", shape, num_time_steps=steps, **common) for steps in arguments.num_time_steps]
    return [Case(measure, HEADLINE, shape, **common), *spiking]


def timed_work(cases: list[Case], repeats: int, rate: float, of_bert: dict[tuple, float]) -> list[Work]:
    """
    Args:
        of_bert: BERT's milliseconds, by what all sides of a comparison have in common; its rows add them.
    """

    def fill(case: Case) -> Row:
        setting = tuple(labels(case).values())[:-1]
        found = figures(case, repeats, rate)
        if case.side == HEADLINE:
            of_bert[setting] = found["ms"]
        return found | {"ratio to bert": found["ms"] / of_bert[setting] if setting in of_bert else None}

    return [(labels(case), lambda case=case: fill(case)) for case in cases]


def labels(case: Case) -> Row:
    extras = {"checkpointing": case.gradient_checkpointing, "compiled": case.compile}
    work = ", ".join([case.measure, *(name for name, is_on in extras.items() if is_on)])
    return {"shape": case.shape, "work": work, "batch": f"{case.batch_size} x {case.length}", "side": case.label}


def figures(case: Case, repeats: int, rate: float) -> Row:
    """The median of three timings, each of `repeats` iterations without a pause, and what else a row says."""
    batch = build_batch(case)
    if case.measure == "training":
        training = TrainingStep(case)
        calibrate(training.model, batch)
        flops = count_flops(lambda: training.eager_loss(batch).backward())

        def work() -> None:
            training.loss(batch).backward()
            training.optimizer.step()
            training.optimizer.zero_grad(set_to_none=True)

    else:
        model = build_model(case)
        calibrate(model, batch)
        eager = inference(case, model)
        forward = torch.compile(eager) if case.compile else eager
        # Products of int8 numbers are no FLOP, and the counter does not know them.
        flops = 0 if case.is_int8 else count_flops(lambda: eager(batch))

        def work() -> None:
            forward(batch)

    start = now(case.device)
    work()
    first = now(case.device) - start
    for _ in range(2):
        work()
    peak = ResidentPeak(case.device)
    seconds = []
    for _ in range(3):
        start = now(case.device)
        for _ in range(repeats):
            work()
        seconds.append((now(case.device) - start) / repeats)
    seconds_each = median(seconds)
    return {
        "ms": seconds_each * 1e3,
        "tokens per s": case.batch_size * case.length / seconds_each,
        "peak MiB": peak.above_start() / MIB,
        "share of matrix-product peak": flops / seconds_each / rate or None,
        "first s": first,
    }


if __name__ == "__main__":
    main()
