"""Writes an article's first sentence from the rest of it: dense and spiking models, from scratch, ROUGE of each.

    python benchmarks/first_sentence.py --train_file TEXT --validation_file VALIDATION --output_dir RUNS

Every model is trained by run_summarization.py with the same budget, data and seeds. Beside them stands what copying the
first words of the rest scores.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import project  # noqa: F401
import yaml
from arguments import read_arguments
from cases import list_of
from datasets import Dataset
from report import Row, keep, print_table
from trainings import (
    Job,
    Training,
    TrainingsArguments,
    budget_note,
    device,
    ending_on_sigterm,
    over_seeds,
    report_failures,
    run_all,
    script,
    source_digest,
)

from pretraining_data.arguments import DataArguments
from pretraining_data.documents import load_documents
from text_to_text.scoring import ROUGE, load_score
from text_to_text.tokenizers import train_tokenizer

TITLE = "An article's first sentence from the rest: the same text, budget and seeds for every model"
COPIED_WORDS = 20
# What is written and what is left to read of an article that is used, in words.
SENTENCE_WORDS = range(6, 61)
LEAST_REST = 50
# The end of a sentence, but not that of a name's initial or of a short title (St., Dr., Mr.).
_END = re.compile(r"""(?<!\b[A-Z])(?<!\b[A-Z][a-z])(?<!\b[A-Z][a-z]{2})[.!?]["')\]]*\s+(?=["'(\[]?[A-Z])""")


@dataclass(kw_only=True)
class Arguments(TrainingsArguments):
    validation_file: str = field(metadata={"help": "Text whose articles the models are scored on."})
    sizes: str = field(
        default="d_model=256,encoder_layers=4,decoder_layers=4,encoder_attention_heads=4,decoder_attention_heads=4,"
        "encoder_ffn_dim=1024,decoder_ffn_dim=1024,max_position_embeddings=256,dropout=0.1,init_std=0.05",
        metadata={"help": "Fields of the configuration that all models have in common."},
    )
    pretrain_recipe: str = field(
        default="recipes/first_sentence.yaml",
        metadata={"help": "Budget of run_summarization.py, the same for all models."},
    )
    num_time_steps: list[int] = list_of(1, 4, help="Time steps T of the spiking models, beside the dense one.")
    fields: str = field(default="neuron=elastic", metadata={"help": "Further fields of the spiking models."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.num_time_steps) < 1:
            raise ValueError(f"--num_time_steps {min(self.num_time_steps)} is not possible; it must be at least 1.")
        self.num_time_steps = list(dict.fromkeys(self.num_time_steps))


class Pairs(NamedTuple):
    """Files of texts and first sentences, and the tokenizer that all models share."""

    train: Path
    validation: Path
    tokenizer: Path


@ending_on_sigterm()
def main() -> None:
    arguments = read_arguments(Arguments)
    pairs = prepare_pairs(arguments)
    variants = list_variants(arguments)
    trainings = [Training(*variant, seed) for seed in arguments.seeds for variant in variants]
    jobs = {training: job(training, arguments, pairs) for training in trainings}

    def table() -> tuple[list[Row], list[str]]:
        return build_table(variants, jobs, arguments, pairs)

    def keep_table() -> None:
        rows, notes = table()
        if arguments.output is not None:
            keep("first_sentence", TITLE, rows, device(), arguments.output, notes, arguments.path_names)

    # A sitting that is cut off leaves the table of what was finished.
    failed = run_all(jobs.values(), arguments.jobs, keep_table)
    print_table(TITLE, *table())
    report_failures(failed)


def first_sentence(text: str) -> tuple[str, str] | None:
    """The first sentence of an article and the rest; None where one of them is too short, or the former too long."""
    text = " ".join(text.split())
    end = _END.search(text)
    if end is None:
        return None
    sentence, rest = text[: end.end()].strip(), text[end.end() :]
    is_usable = len(sentence.split()) in SENTENCE_WORDS and len(rest.split()) >= LEAST_REST
    return (sentence, rest) if is_usable else None


def prepare_pairs(arguments: Arguments) -> Pairs:
    """Makes the pairs and the tokenizer once for all trainings; what was made before is not touched."""
    folder = Path(arguments.output_dir, f"pairs-{source_digest(arguments)}")
    pairs = Pairs(folder / "train.jsonl", folder / "validation.jsonl", folder / "tokenizer")
    if pairs.tokenizer.exists():
        return pairs
    data = DataArguments(train_file=[arguments.train_file], validation_file=[arguments.validation_file])
    documents = load_documents(data, seed=0)
    recipe = yaml.safe_load(Path(arguments.pretrain_recipe).read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    for split, path in (("train", pairs.train), ("validation", pairs.validation)):
        found = [pair for text in documents[split]["text"] if (pair := first_sentence(text)) is not None]
        # A word is a token at least, so nothing is lost of what a model reads.
        cut = [(sentence, " ".join(rest.split()[: recipe["max_source_length"]])) for sentence, rest in found]
        lines = [json.dumps({"text": rest, "summary": sentence}, ensure_ascii=False) for sentence, rest in cut]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = Dataset.from_list(read(pairs.train))
    # Last of all, so that it says that all is there.
    train_tokenizer(rows, recipe["vocab_size"], recipe["max_source_length"]).save_pretrained(pairs.tokenizer)
    return pairs


def read(path: Path) -> list[dict[str, str]]:
    # Only a line feed ends a line.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def list_variants(arguments: Arguments) -> list[tuple[str, tuple]]:
    """Model type and fields of every model."""
    fields = tuple(tuple(part.split("=", 1)) for part in arguments.fields.split(","))
    spiking = [("spikelm_bart", (*fields, ("num_time_steps", steps))) for steps in arguments.num_time_steps]
    return [("bart", ()), *spiking]


def job(training: Training, arguments: Arguments, pairs: Pairs) -> Job:
    folder = Path(arguments.output_dir, training.name)
    overrides = ",".join([arguments.sizes, *(f"{name}={value}" for name, value in training.fields)])
    command = script(
        *("run_summarization.py", arguments.pretrain_recipe),
        *("--train_file", pairs.train, "--validation_file", pairs.validation, "--tokenizer_name", pairs.tokenizer),
        *("--model_type", training.model_type, "--config_overrides", overrides, "--seed", training.seed),
        *("--do_train", "--do_eval", "--output_dir", folder / "trained"),
    )
    return Job(training.name, folder, (command,), (arguments.pretrain_recipe,))


def build_table(
    variants: Sequence[tuple[str, tuple]], jobs: dict[Training, Job], arguments: Arguments, pairs: Pairs
) -> tuple[list[Row], list[str]]:
    """A row for what copies, one for every model of which at least one seed has finished, and the notes."""
    recipe = yaml.safe_load(Path(arguments.pretrain_recipe).read_text(encoding="utf-8"))
    scored = read(pairs.validation)[: recipe.get("max_eval_samples")]
    copied = [" ".join(row["text"].split()[:COPIED_WORDS]) for row in scored]
    copying = load_score(None).compute(predictions=copied, references=[row["summary"] for row in scored])
    rows = [_row(f"the first {COPIED_WORDS} words of the rest", "", [copying])]
    for model_type, fields in variants:
        found = [
            json.loads((job.folder / "trained/results.json").read_text(encoding="utf-8"))["validation"]
            for training, job in jobs.items()
            if (training.model_type, training.fields) == (model_type, fields) and job.is_finished
        ]
        if found:
            steps = dict(fields).get("num_time_steps")
            rows.append(_row("dense BART" if steps is None else "spiking", "" if steps is None else str(steps), found))
    notes = [
        f"{len(read(pairs.train))} articles to learn from, {len(scored)} others to score. ROUGE: F1 times 100. Loss: "
        "nats per token. Firing rate and energy: counted on texts and their true first sentences, all layers, "
        "arithmetic by the 45 nm convention (docs/energy.md). Several seeds: mean (smallest .. largest).",
        f"All models: {arguments.sizes}; spiking ones: {arguments.fields}. " + budget_note([arguments.pretrain_recipe]),
    ]
    return rows, notes


def _row(model: str, steps: str, found: Sequence[dict[str, float]]) -> Row:
    def column(name: str, form: str) -> str | None:
        return over_seeds([figures.get(name) for figures in found], form)

    return {
        "model": model,
        "T": steps,
        **{name.replace("rouge", "ROUGE-"): column(name, ".1f") for name in ROUGE[:3]},
        "loss": column("loss", ".3f"),
        "tokens written": column("written_tokens", ".1f"),
        "firing rate": column("firing_rate", ".1%"),
        "energy of the layers, mJ": column("encoder_energy_mj", ".3f"),
        "dense / this": column("encoder_energy_ratio", ".2f"),
        "seeds": str(len(found)) if "loss" in found[0] else "",
    }


if __name__ == "__main__":
    main()
