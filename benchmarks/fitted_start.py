"""What a student has before its first training step: calibrated, or fitted to its teacher by least squares as well.

    python benchmarks/fitted_start.py --teacher_name_or_path BERT --data_dir GLUE --train_file TEXT \
        --validation_file VALIDATION

Each of --fields is a student, each of --fit_tokens a fit of it, on that many tokens of text. Error: of hidden states,
on other text. Gap: of sentence similarity without fine-tuning (sentence_similarity.py).
"""

import time
from dataclasses import dataclass, field

import project  # noqa: F401
import torch
from arguments import read_arguments
from cases import list_of
from decoder import windows
from report import Row, keep, print_table
from sentence_similarity import measure, parse_fields
from trainings import PATH_NAMES, device
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from distillation.least_squares import fit_to_teacher
from distillation.losses import hidden_state_errors
from glue_tasks.loading import load_task
from glue_tasks.tasks import TASKS
from modeling_spikelm import SpikeLMModel

TITLE = "Before the first step: calibrated, and fitted by least squares"
BATCH_ROWS = 64
CALIBRATION_ROWS = 128


@dataclass
class Arguments:
    teacher_name_or_path: str = field(metadata={"help": "The BERT to convert."})
    data_dir: str = field(metadata={"help": "GLUE in its own layout, with STS-B/dev.tsv."})
    train_file: str = field(metadata={"help": "Text to calibrate on and to fit to: a file or a folder."})
    validation_file: str = field(metadata={"help": "Text to measure the error on."})
    fields: list[str] = list_of("neuron=thrifty,spike_cost=0.1,num_time_steps=1", help="Of the students.")
    fit_tokens: list[int] = list_of(0, 12_800, 51_200, help="Tokens of text; 0 is calibration alone.")
    length: int = field(default=32, metadata={"help": "Tokens of a row."})
    validation_rows: int = field(default=256, metadata={"help": "Rows to measure the error on."})
    output: str | None = field(default=None, metadata={"help": "Folder for the table, benchmarks/results."})

    def __post_init__(self) -> None:
        wrong = [tokens for tokens in self.fit_tokens if tokens < 0 or 0 < tokens < self.length]
        if wrong:
            raise ValueError(f"--fit_tokens {wrong[0]}: 0 is no fit, and else a row of {self.length} is the least.")


def main() -> None:
    arguments = read_arguments(Arguments)
    name = arguments.teacher_name_or_path
    teacher, tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    pairs = load_task(TASKS["stsb"], arguments.data_dir)["validation"]
    fits = [tokens // arguments.length for tokens in arguments.fit_tokens]
    most = max(CALIBRATION_ROWS, *fits)
    text = windows(arguments.train_file, tokenizer, arguments.length, most, "mlm")
    held_out = windows(arguments.validation_file, tokenizer, arguments.length, arguments.validation_rows, "mlm")
    if len(text) < most:
        raise SystemExit(
            f"{arguments.train_file} has {len(text)} rows of {arguments.length} tokens; {most} are asked for."
        )
    dense = measure(teacher, tokenizer, pairs).spearman
    rows: list[Row] = []
    for fields in arguments.fields:
        for number in fits:
            student = SpikeLMModel.from_pretrained(name, **parse_fields(fields)).eval()
            student.calibrate({"input_ids": text[:CALIBRATION_ROWS]})
            began = time.perf_counter()
            if number:
                fit_to_teacher(student, teacher, [{"input_ids": part} for part in text[:number].split(BATCH_ROWS)])
            seconds = time.perf_counter() - began
            found = measure(student, tokenizer, pairs)
            rows.append(
                {
                    "student": fields,
                    "tokens": f"{number * arguments.length:,}",
                    "seconds": f"{seconds:.0f}" if number else None,
                    "error of hidden states": f"{error(student, teacher, held_out):.3f}",
                    "gap": f"{dense - found.spearman:.1f}",
                    "firing rate": f"{found.firing_rate:.1%}",
                }
            )
            print(rows[-1], flush=True)
    notes = [
        f"Text in rows of {arguments.length} tokens. All students are calibrated on {CALIBRATION_ROWS} rows first. "
        "Error: in units of the variance of the teacher's layer, the mean over layers, on "
        f"{held_out.numel()} tokens of other text. Gap: {dense:.1f}, the dense model's Spearman correlation times 100 "
        "on STS-B (validation, no fine-tuning), less this model's.",
    ]
    print_table(TITLE, rows, notes)
    if arguments.output is not None:
        names = PATH_NAMES | {"--teacher_name_or_path": "BERT"}
        keep("fitted_start", TITLE, rows, device(), arguments.output, notes, names)


@torch.no_grad()
def error(student: PreTrainedModel, teacher: PreTrainedModel, rows: torch.Tensor) -> float:
    """Mean over the layers."""
    found, wished = (model(rows, output_hidden_states=True).hidden_states[1:] for model in (student, teacher))
    return hidden_state_errors(found, wished, torch.ones_like(rows, dtype=torch.bool)).mean().item()


if __name__ == "__main__":
    main()
