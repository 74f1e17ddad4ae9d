"""One side in one process: `python worker.py CASE_AS_JSON`, started by the commands, not by hand.

It answers in lines of JSON on standard output: first one about the case, then, for a case that measures time, one for
every line "n" on standard input, with the seconds of n iterations.
"""

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import Case
from measuring import ResidentPeak, allocated_peak, count_flops, matrix_product_rate, now
from sides import build_batch, build_model, calibrate, inference, training_loss
from transformers import AutoModelForMaskedLM

Answer = Callable[[Any], None]
TINY_BATCH = {"batch_size": 1, "length": 8}


class TrainingStep:
    """Training steps on one batch; a step that has been taken leaves no gradients behind."""

    def __init__(self, case: Case):
        self.case = case
        self.model = build_model(case)
        self.eager_loss = training_loss(case, self.model)
        if case.compile:
            # As the scripts have it, so that one compiled layer serves all (modeling_spikelm/compiled_layers.py).
            torch._functorch.config.donated_buffer = False
        self.loss = torch.compile(self.eager_loss) if case.compile else self.eager_loss
        # The optimizer that the Trainer takes by default.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def __call__(self, batch: dict[str, torch.Tensor], with_optimizer: bool = True) -> dict[str, float]:
        """Seconds from the start of the step to the end of each of its parts."""
        device = self.case.device
        start = now(device)
        loss = self.loss(batch)
        forward = now(device)
        loss.backward()
        backward = now(device)
        if with_optimizer:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        end = now(device)
        return {"forward": forward - start, "forward_backward": backward - start, "step": end - start}


def serve_training(case: Case, answer: Answer) -> None:
    step = TrainingStep(case)
    batch = build_batch(case)
    calibrate(step.model, batch)
    flops = count_flops(lambda: step.eager_loss(batch).backward())
    step.optimizer.zero_grad(set_to_none=True)
    serve(case, lambda: step(batch), flops, answer)


def serve_inference(case: Case, answer: Answer) -> None:
    model = build_model(case)
    batch = build_batch(case)
    calibrate(model, batch)
    eager = inference(case, model)
    function = torch.compile(eager) if case.compile else eager

    def forward() -> dict[str, float]:
        start = now(case.device)
        function(batch)
        return {"forward": now(case.device) - start}

    # Products of int8 numbers are no FLOP, and the counter does not know them, nor what is not torch's.
    serve(case, forward, 0 if case.is_int8 or case.runs_in_onnx else count_flops(lambda: eager(batch)), answer)


def serve(case: Case, work: Callable[[], dict[str, float]], flops: int, answer: Answer) -> None:
    """Warms up, tells what the work and the machine are worth in FLOP, then times as often as it is asked to."""
    for _ in range(case.warmup):
        work()
    dtype = torch.bfloat16 if case.dtype == "bf16_autocast" else torch.float32
    answer({"flops": flops, "matrix_product_rate": matrix_product_rate(case.device, dtype, case.shape)})
    for line in sys.stdin:
        work()  # caches and cores are cold after the other sides' turns
        answer([work() for _ in range(int(line))])


def measure_memory(case: Case, answer: Answer) -> None:
    """Peak of training above the loaded model, two ways. An optimizer's state counts, so then two steps are taken."""
    step = TrainingStep(case)
    # Starts thread pools, loads libraries and calibrates, on a batch whose activations are next to nothing.
    step(build_batch(case, **TINY_BATCH), with_optimizer=False)
    batch = build_batch(case)

    def train() -> None:
        for _ in range(2 if case.with_optimizer else 1):
            step(batch, case.with_optimizer)

    resident = ResidentPeak(case.device)
    train()
    result = {"peak_bytes": resident.above_start()}
    if case.device == "cpu":
        step.optimizer.state.clear()
        result["allocated_peak_bytes"] = allocated_peak(train)
    answer(result)


def measure_loading(case: Case, answer: Answer) -> None:
    """Peak of `from_pretrained` and of reading every weight once, above the running process, beside the weights' size.

    They are read because a loaded weight can be a page of the checkpoint file that is not in memory yet.
    """
    loaded = []

    def load() -> None:
        loaded.append(AutoModelForMaskedLM.from_pretrained(folder))
        for weight in loaded[0].parameters():
            weight.detach().max()

    with tempfile.TemporaryDirectory() as folder:
        build_model(case).save_pretrained(folder)
        weights = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        # This load, the first, also imports what loading needs.
        allocated = allocated_peak(load)
        loaded.clear()
        gc.collect()
        resident = ResidentPeak("cpu")
        load()
        peak = resident.above_start()
    answer({"weights_bytes": weights, "peak_bytes": peak, "allocated_peak_bytes": allocated})


MEASURES = {
    "training": serve_training,
    "inference": serve_inference,
    "memory": measure_memory,
    "loading": measure_loading,
}


def main() -> None:
    # Answers have the standard output for themselves; whatever else is printed goes to the standard error.
    answers = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr
    case = Case(**json.loads(sys.argv[1]))
    MEASURES[case.measure](case, lambda answer: print(json.dumps(answer), file=answers, flush=True))


if __name__ == "__main__":
    main()
