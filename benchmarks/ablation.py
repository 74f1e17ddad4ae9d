"""The paper's ablation on any text: dense BERT, LIF, bi-spiking and elastic spikes, each trained from scratch.

    python benchmarks/ablation.py --train_file TEXT --validation_file VALIDATION --data_dir GLUE --output_dir RUNS

Every model is pre-trained by run_mlm.py and fine-tuned by run_glue.py with the same budget, data and seeds.
"""

from dataclasses import dataclass, field

import project  # noqa: F401
from arguments import read_arguments
from cases import list_of
from report import Row, keep, print_table
from trainings import (
    Job,
    Scores,
    Training,
    TrainingsArguments,
    budget_note,
    device,
    ending_on_sigterm,
    job,
    over_seeds,
    prepare_corpus,
    read_scores,
    report_failures,
    run_all,
)

from configuration_spikelm.configuration_spiking import NEURONS

DENSE = "dense"
PUBLISHED = (DENSE, "lif", "bi-spiking", "elastic")
TITLES = {DENSE: "dense BERT", "lif": "LIF", "elastic": "elastic bi-spiking"}  # all others have their own names
RESETS = ("reference", "symmetric")
# With spikes of 0 and 1 both rules say the same.
RESETS_OF_LIF = RESETS[:1]
TABLE_TITLE = "Ablation: the same text, budget and seeds for every neuron"


@dataclass(kw_only=True)
class Arguments(TrainingsArguments):
    data_dir: str = field(metadata={"help": "GLUE in its own layout (SST-2/train.tsv, ...)."})
    glue_recipe: str = field(
        default="recipes/ablation_glue.yaml", metadata={"help": "Budget of run_glue.py, the same for all models."}
    )
    task_name: list[str] = list_of("sst2", "stsb", help="GLUE tasks.")
    neurons: list[str] = list_of(*PUBLISHED, choices=(DENSE, *NEURONS), help="The models to train.")
    num_time_steps: list[int] = list_of(1, 2, 4, help="Time steps T of the spiking models.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.num_time_steps) < 1:
            raise ValueError(f"--num_time_steps {min(self.num_time_steps)} is not possible; it must be at least 1.")
        self.neurons, self.num_time_steps = map(list, map(dict.fromkeys, (self.neurons, self.num_time_steps)))


@ending_on_sigterm()
def main() -> None:
    arguments = read_arguments(Arguments)
    corpus = prepare_corpus(arguments)
    variants = list_variants(arguments.neurons, arguments.num_time_steps)
    # Many steps first, so that the cores end together; every model has its first seed before any has a second.
    trainings = [
        Training(*variant, seed)
        for seed in arguments.seeds
        for variant in sorted(variants, key=lambda variant: -Training(*variant, seed).cost)
    ]
    jobs = {training: job(training, arguments, corpus, arguments.task_name) for training in trainings}

    def keep_table() -> None:
        rows, notes = build_table(variants, jobs, arguments)
        if rows and arguments.output is not None:
            keep("ablation", TABLE_TITLE, rows, device(), arguments.output, notes, arguments.path_names)

    # A sitting that is cut off leaves the table of what was finished.
    failed = run_all(jobs.values(), arguments.jobs, keep_table)
    rows, notes = build_table(variants, jobs, arguments)
    if rows:
        print_table(TABLE_TITLE, rows, notes)
    report_failures(failed)


def list_variants(neurons: list[str], num_time_steps: list[int]) -> list[tuple[str, tuple]]:
    """Model type and fields of every model that differs from the others.

    At T = 1 there is no step before whose membrane a reset could change, so each neuron is there once.
    """
    variants: list[tuple[str, tuple]] = []
    for neuron in neurons:
        if neuron == DENSE:
            variants.append(("bert", ()))
            continue
        for steps in num_time_steps:
            resets = RESETS_OF_LIF if neuron == "lif" or steps == 1 else RESETS
            for reset in resets:
                fields = (("neuron", neuron), ("num_time_steps", steps), ("membrane_reset", reset))
                variants.append(("spikelm", fields))
    return variants


def build_table(
    variants: list[tuple[str, tuple]], jobs: dict[Training, Job], arguments: Arguments
) -> tuple[list[Row], list[str]]:
    """A row for every model of which at least one seed has finished, and what there is to say below the table."""
    found = {training: read_scores(job, arguments.task_name) for training, job in jobs.items()}
    finished = {training: scores for training, scores in found.items() if scores is not None}
    rows = []
    for variant in variants:
        scores = [one for training, one in finished.items() if (training.model_type, training.fields) == variant]
        if scores:
            rows.append(_row(dict(variant[1]), scores))
    return rows, _notes([scores.unigram_loss for scores in finished.values()], arguments)


def _row(fields: dict, scores: list[Scores]) -> Row:
    neuron, steps = fields.get("neuron", DENSE), fields.get("num_time_steps")
    has_choice = steps is not None and steps > 1 and neuron != "lif"
    return {
        "model": TITLES.get(neuron, neuron),
        "T": "" if steps is None else str(steps),
        "reset": fields["membrane_reset"] if has_choice else "",
        "masked-LM loss": over_seeds([found.loss for found in scores], ".3f"),
        **{column: over_seeds([found.glue[column] for found in scores], ".1f") for column in scores[0].glue},
        "firing rate": over_seeds([found.firing_rate for found in scores], ".1%"),
        "energy of the encoder, mJ": over_seeds([found.energy for found in scores], ".4f"),
        "dense / this": over_seeds([found.energy_ratio for found in scores], ".2f"),
        "seeds": str(len(scores)),
    }


def _notes(unigram_losses: list[float | None], arguments: Arguments) -> list[str]:
    unigram = f" A unigram model of the training text has {unigram_losses[0]:.3f}." if any(unigram_losses[:1]) else ""
    return [
        f"Loss: nats per masked token of the held-out text.{unigram} Scores: GLUE's times 100, validation sets. "
        "Firing rate and energy: counted on the held-out text, the encoder alone, arithmetic by the 45 nm convention "
        "(docs/energy.md). Several seeds: mean (smallest .. largest).",
        "Rows without a reset: at T = 1 there is no step before, and of spikes 0 and 1 both rules say the same.",
        f"All models: {arguments.sizes}; the dense one is BERT, with BERT's masked-LM head. "
        + budget_note([arguments.pretrain_recipe, arguments.glue_recipe]),
    ]


if __name__ == "__main__":
    main()
