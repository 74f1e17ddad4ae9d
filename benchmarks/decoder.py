"""What a Llama loses when it becomes spiking: perplexity by neuron, by time steps and by place, and after distillation.

    python benchmarks/decoder.py --teacher_name_or_path LLAMA --train_file TEXT --validation_file VALIDATION \
        --output_dir RUNS --output benchmarks/results

Models are calibrated on a little of the text and not trained. `--changes` (decoder_changes.py) ask what it is that they
lack. With `--max_steps`, each of `--students` is then distilled by run_clm.py, and its curve of perplexity against
tokens is a table of its own. What is measured is kept in RUNS: the same command goes on where it was cut off.
"""

import gc
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import project  # noqa: F401
import torch
from arguments import read_arguments
from cases import list_of
from decoder_changes import CHANGES, PLACES, apply, parse
from report import Row, keep, print_table
from sentence_similarity import parse_fields
from trainings import PATH_NAMES, Job, budget_note, device, ending_on_sigterm, report_failures, run_all, script
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from experiment.models import weights_digest
from experiment.written_files import is_output_folder
from modeling_spikelm import SpikeLMLlamaForCausalLM
from modeling_spikelm.neurons import neuron_groups
from pretraining_data.arguments import TextArguments
from pretraining_data.documents import load_documents
from pretraining_data.packing import DOCUMENTS_PER_BATCH, pack_documents
from spike_metrics.counting import count

TITLE = "A Llama made spiking, calibrated and not trained"
CURVE_TITLE = "A Llama made spiking, distilled: perplexity against tokens"
DENSE = "dense"


@dataclass
class Arguments:
    teacher_name_or_path: str = field(metadata={"help": "The Llama to convert; also a .gguf file."})
    train_file: str = field(metadata={"help": "Text to calibrate on, and to distil on: a file or a folder."})
    validation_file: str = field(metadata={"help": "Text to measure on."})
    output_dir: str = field(metadata={"help": "Folder for points and trainings; the same command again goes on there."})
    variants: list[str] = list_of(
        "num_time_steps=1",
        "num_time_steps=4",
        "neuron=thrifty,num_time_steps=1",
        "neuron=thrifty,num_time_steps=4",
        help="Configurations to calibrate.",
    )
    changed: str = field(default="neuron=thrifty,num_time_steps=1", metadata={"help": "What --changes are made to."})
    changes: list[str] = list_of(
        *(f"only {place}" for place in PLACES),
        "all but mlp.down_neurons",
        "first 1 layers",
        "first 5 layers",
        "first token real",
        "rotated",
        "largest 0.05 real",
        *(f"{number} levels" for number in (3, 7, 15, 31, 127)),
        *(f"only mlp.down_neurons + {change}" for change in ("first token real", "rotated", "largest 0.05 real")),
        help="Changes to that configuration: " + ", ".join(CHANGES) + "; several at once with ' + ' between them.",
    )
    length: int = field(default=512, metadata={"help": "Tokens in a window."})
    windows: int = field(default=8, metadata={"help": "Windows to measure on."})
    calibration_windows: int = field(default=4, metadata={"help": "Windows to calibrate on."})
    students: list[str] = list_of("neuron=thrifty,num_time_steps=1", help="Configurations to distil.")
    max_steps: int = field(default=0, metadata={"help": "Steps of run_clm.py for each of them; 0 distils none."})
    recipe: str = field(default="recipes/convert_decoder.yaml", metadata={"help": "Budget of run_clm.py."})
    output: str | None = field(default=None, metadata={"help": "Folder for the tables, benchmarks/results."})

    def __post_init__(self) -> None:
        for change in self.changes:
            parse(change, head_size=1)


@ending_on_sigterm()
def main() -> None:
    arguments = read_arguments(Arguments)
    teacher = arguments.teacher_name_or_path
    if teacher.endswith(".gguf"):
        teacher = from_gguf(Path(teacher), Path(arguments.output_dir, "dense"))
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    held_out = windows(arguments.validation_file, tokenizer, arguments.length, arguments.windows)
    text = windows(arguments.train_file, tokenizer, arguments.length, arguments.calibration_windows)
    notes = [
        f"{held_out.numel()} tokens of held-out text in windows of {arguments.length}; calibrated on {text.numel()} "
        "tokens of other text. Loss in nats per token, of all but the first of a window. Firing rate: on one window.",
        "Changes: " + "; ".join(f"`{name}`, {what}" for name, what in CHANGES.items()) + ".",
    ]
    wanted = [(DENSE, ""), *((variant, "") for variant in arguments.variants)]
    wanted += [(arguments.changed, change) for change in arguments.changes]
    rows: list[Row] = []
    for variant, change in wanted:
        point = Point(variant, change, teacher)
        found = point.measured(held_out, text, Path(arguments.output_dir, "points"))
        rows.append({"model": variant, "change": change or None, **row_of(found)})
        print(rows[-1], flush=True)
    show(arguments, TITLE, rows, notes)
    if arguments.max_steps:
        jobs = {student: distillation(arguments, teacher, student) for student in arguments.students}
        failed = run_all(jobs.values(), 1, lambda: None)
        # What lies in the folder of one that failed may be of another text or budget.
        curves = [row for student, job in jobs.items() if job not in failed for row in curve(student, job)]
        if curves:
            show(arguments, CURVE_TITLE, curves, [notes[0], budget_note([arguments.recipe])])
        report_failures(failed)


def from_gguf(file: Path, folder: Path) -> str:
    """The folder of the Llama in a .gguf file, float32, made if it is not there; transformers reads it with `gguf`."""
    if not (folder / "tokenizer.json").exists():
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        read = LlamaForCausalLM.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True))
        # What was read from such a file cannot be saved itself.
        dense = LlamaForCausalLM(LlamaConfig.from_pretrained(**source))
        dense.load_state_dict(read.state_dict())
        dense.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return str(folder)


def show(arguments: Arguments, title: str, rows: list[Row], notes: list[str]) -> None:
    print_table(title, rows, notes)
    if arguments.output is not None:
        names = PATH_NAMES | {"--teacher_name_or_path": "LLAMA"}
        keep("decoder", title, rows, device(), arguments.output, notes, names)


def windows(
    source: str, tokenizer: PreTrainedTokenizerBase, length: int, number: int, objective: str = "clm"
) -> torch.Tensor:
    """The first rows that run_clm.py (or with "mlm" run_mlm.py) makes of a text, `(number, length)`."""
    arguments = TextArguments(validation_file=[source], max_seq_length=length)
    documents = load_documents(arguments, seed=0, needs_training=False, is_passed_over=is_output_folder)["validation"]
    # What is packed together; whatever comes after them changes none of these rows.
    documents = documents.take(DOCUMENTS_PER_BATCH)
    rows = pack_documents(documents, tokenizer, length, objective)["input_ids"]
    return torch.tensor([row for row in rows if len(row) == length][:number])


@dataclass(frozen=True)
class Point:
    """A model to measure.

    Args:
        variant: `DENSE`, or fields of the configuration.
        change: one of decoder_changes.py, or none.
        teacher: the dense Llama.
    """

    variant: str
    change: str
    teacher: str

    def measured(self, held_out: torch.Tensor, text: torch.Tensor, folder: Path) -> dict[str, float | None]:
        """Loss and firing rate; of a point that has been measured before on the same text, what was found then."""
        identity = [self.variant, self.change, weights_digest(self.teacher), held_out.tolist(), text.tolist()]
        kept = folder / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}.json"
        if not kept.exists():
            model = self.make(text)
            found = {"loss": mean_loss(model, held_out), "firing_rate": self.firing_rate(model, held_out[:1])}
            folder.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({"variant": self.variant, "change": self.change, **found}), encoding="utf-8")
            del model
            gc.collect()
        return json.loads(kept.read_text(encoding="utf-8"))

    def make(self, text: torch.Tensor) -> PreTrainedModel:
        if self.variant == DENSE:
            return AutoModelForCausalLM.from_pretrained(self.teacher).eval().to(device())
        model = SpikeLMLlamaForCausalLM.from_pretrained(self.teacher, **parse_fields(self.variant)).eval().to(device())
        if self.change:
            apply(model, self.change)
        if neuron_groups(model):
            # Without its head, whose logits nobody looks at.
            model.model.calibrate({"input_ids": text})
        return model

    def firing_rate(self, model: PreTrainedModel, window: torch.Tensor) -> float | None:
        return None if self.variant == DENSE or self.change else count(model, [{"input_ids": window}]).firing_rate


@torch.no_grad()
def mean_loss(model: PreTrainedModel, held_out: torch.Tensor) -> float:
    """Nats per token, of every token but the first of its window; window by window, for memory's sake."""
    rows = [row[None].to(model.device) for row in held_out]
    losses = [model(input_ids=row, labels=row, use_cache=False).loss.item() for row in rows]
    return sum(losses) / len(losses)


def row_of(found: dict[str, Any]) -> Row:
    rate = found.get("firing_rate")
    perplexity = math.exp(found["loss"])
    return {
        "loss": f"{found['loss']:.3f}",
        "perplexity": f"{perplexity:.1f}" if perplexity < 1000 else f"{perplexity:.3g}",
        "firing rate": None if rate is None else f"{rate:.1%}",
    }


def distillation(arguments: Arguments, teacher: str, student: str) -> Job:
    folder = Path(arguments.output_dir, student)
    every = max(1, arguments.max_steps // 10)
    # More often than it is measured: where a training is cut off, little of it is run again.
    saved_every = max(1, every // 4)
    command = script(
        *("run_clm.py", arguments.recipe, "--teacher_name_or_path", teacher),
        *("--train_file", arguments.train_file, "--validation_file", arguments.validation_file),
        *("--max_seq_length", arguments.length, "--max_eval_samples", arguments.windows),
        *("--max_steps", arguments.max_steps, "--warmup_steps", arguments.max_steps // 20),
        *("--eval_strategy", "steps", "--eval_steps", every, "--save_steps", saved_every),
        *("--config_overrides", student),
        *("--output_dir", folder / "student"),
    )
    return Job(f"distilled, {student}", folder, (command,), (arguments.recipe,))


def curve(student: str, job: Job) -> list[Row]:
    """Perplexity after so many tokens, as a training that has ended has logged it."""
    folder = job.folder / "student"
    recorded = json.loads((folder / "run.json").read_text(encoding="utf-8"))["arguments"]
    tokens = recorded["sequences_per_step"] * recorded["max_seq_length"]
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [
        {"model": student, "tokens": f"{entry['step'] * tokens:,}", **row_of({"loss": entry["eval_loss"]})}
        for entry in log
        if "eval_loss" in entry
    ]


if __name__ == "__main__":
    main()
