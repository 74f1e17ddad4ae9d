"""What SpikeLM does on one card, in at most four minutes: `python benchmarks/gpu.py --help`.

First parity with the golden tensors on every path, then times and memory against the stock BERT. Needs torch,
Triton and transformers, and no network. All sides run in this process, one after the other. Results are
written after each; one that fails says why in its row, and what the time does not suffice for is left out.
"""

import project  # noqa: F401  isort:skip
import gc
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from cases import FAST_PATHS, SHAPES, Case, list_of
from measuring import ResidentPeak, count_flops, matrix_product_rate, now
from report import Row, keep, print_table
from safetensors.torch import load_file
from sides import build_batch, build_model, calibrate, inference
from transformers import HfArgumentParser
from worker import TrainingStep

from modeling_spikelm import SpikeLMConfig, SpikeLMForPreTraining, convert_reference_state_dict, fast_paths

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
MIB = 2**20
# In units of the largest value of a tensor.
FORWARD, GRADIENT = 1e-5, 1e-4


@dataclass
class Arguments:
    shape: list[str] = list_of("base", "small", choices=SHAPES, help="Sizes of the models; of the first, every row.")
    num_time_steps: list[int] = list_of(1, 4, help="Time steps T of the SpikeLMs.")
    batch_size: int = field(default=64, metadata={"help": "Sequences per batch; of the long ones, a quarter."})
    length: int = field(default=128, metadata={"help": "Tokens per sequence; of the long ones, four times as many."})
    repeats: int = field(default=5, metadata={"help": "Iterations of a timing, of which there are three."})
    seconds: float = field(default=240, metadata={"help": "When to stop; what is in progress then is given up."})
    compiled: bool = field(default=True, metadata={"help": "Also compile, last of all, for as long as there is time."})
    device: Literal["cuda", "cpu"] = field(default="cuda", metadata={"help": "cpu is for trying the command."})
    output: str = field(default="benchmarks/results", metadata={"help": "Folder for gpu.json and gpu.md."})


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    end = time.monotonic() + arguments.seconds
    table(arguments, end, "Parity with the reference's numbers", parity_work(arguments))
    rate = matrix_product_rate(arguments.device, torch.bfloat16)
    work = [(labels(case), lambda case=case: figures(case, arguments.repeats, rate)) for case in timed_cases(arguments)]
    table(arguments, end, f"Time and memory, bf16 autocast, dropout 0.1, product at {rate / 1e12:.3g} TFLOP/s", work)


def table(arguments: Arguments, end: float, title: str, work: list[tuple[Row, Callable[[], Row]]]) -> None:
    """Does one piece of work after the other, each of which fills a row, and keeps the rows that are there."""
    rows: list[Row] = []
    for names, fill in work:
        row = names | {"note": None}
        rows.append(row)
        try:
            with time_limit(end - time.monotonic()):
                row |= fill()
        except Exception as error:  # whatever it is, the other rows can do without this one
            row["note"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        free_memory()
        columns = dict.fromkeys(name for row in rows for name in row)
        # The note stands last.
        columns["note"] = columns.pop("note")
        rows = [{name: row.get(name) for name in columns} for row in rows]
        keep("gpu", title, rows, arguments.device, arguments.output)
    print_table(title, rows)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in here after so many seconds; at once where there are none."""

    def stop(*_: object) -> None:
        raise TimeoutError("no time left")

    if seconds <= 0:
        stop()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
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


def parity_work(arguments: Arguments) -> list[tuple[Row, Callable[[], Row]]]:
    paths: dict[str, tuple[str, ...]] = {"default": (), **{f"-{name}": (name,) for name in FAST_PATHS}}
    return [
        (
            {"path": path, "T": steps, "attention": attention},
            lambda steps=steps, attention=attention, off=off: parity(steps, attention, off, arguments.device),
        )
        for steps in (4, 1)
        for attention in ("sdpa", "eager")
        for path, off in (paths | {"oracle": FAST_PATHS}).items()
        # Attention makes no difference to what the neurons do.
        if attention == "sdpa" or path == "default"
    ]


def parity(steps: int, attention: str, without: tuple[str, ...], device: str) -> Row:
    """Largest errors of two training steps from the golden tensors, in units of each tensor's largest value."""
    for name in without:
        setattr(fast_paths.FAST_PATHS, name, False)
    facts = json.loads((FIXTURES / f"official_T{steps}.json").read_text())
    del facts["encoder_hidden_act"]
    config = SpikeLMConfig(**facts, attn_implementation=attention)
    tensors = load_file(FIXTURES / f"official_T{steps}.safetensors", device=device)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    model = SpikeLMForPreTraining(config).to(device)
    model.load_state_dict(convert_reference_state_dict(part("state."), config))
    model.reset_calibration()
    model.train()
    forward, gradient = 0.0, 0.0
    for number in (0, 1):
        model.zero_grad()
        output = model(**part(f"step{number}.in."))
        output.loss.backward()
        expected = part(f"step{number}.")
        names = ("loss", "prediction_logits", "seq_relationship_logits")
        forward = max(forward, *(error(output[name], expected[name]) for name in names))
        parameters = dict(model.named_parameters())
        wanted = part(f"step{number}.grad.")
        gradient = max(gradient, *(error(parameters[name].grad, value) for name, value in wanted.items()))
    holds = forward <= FORWARD and gradient <= GRADIENT
    return {"forward error": forward, "gradient error": gradient, "holds": "yes" if holds else "NO"}


def timed_cases(arguments: Arguments) -> list[Case]:
    """Training and inference of every shape; of the first also what leaves something out, long texts, and compiled."""
    times, first = arguments.num_time_steps, arguments.shape[0]

    def sides(measure: str, shape: str, **changes: object) -> list[Case]:
        common = {
            "batch_size": arguments.batch_size,
            "length": arguments.length,
            "dtype": "bf16_autocast",
            "device": arguments.device,
        } | changes
        spiking = [Case(measure, "spikelm", shape, num_time_steps=steps, **common) for steps in times]
        return [Case(measure, "bert", shape, **common), *spiking]

    training = sides("training", first)
    most = training[-1]
    cases = [
        *training,
        replaced(most, without=("triton_neurons",)),
        replaced(most, side="oracle"),
        *sides("inference", first),
        *sides("inference", first, batch_size=1),
        *sides("training", first, gradient_checkpointing=True),
        *sides("training", first, batch_size=max(1, arguments.batch_size // 4), length=4 * arguments.length),
        *(case for shape in arguments.shape[1:] for case in sides("training", shape)),
    ]
    return [*cases, *sides("training", first, compile=True)] if arguments.compiled else cases


def replaced(case: Case, **changes: object) -> Case:
    return Case(**{each.name: getattr(case, each.name) for each in fields(case)} | changes)


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
        forward = inference(case, model)
        flops = count_flops(lambda: forward(batch))

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
        "share of matrix-product peak": flops / seconds_each / rate,
        "first s": first,
    }


if __name__ == "__main__":
    main()
