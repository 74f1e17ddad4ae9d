r"""Makes a SpikeLM out of a BERT in the minutes that a GPU is lent for: run_distill.py's losses, on packed text.

    python convert_packed.py recipes/convert_packed.yaml --teacher_name_or_path BERT \
        --packed_text text.npz --minutes 5 --output_dir out

It needs torch, transformers, accelerate and this project, and neither `datasets` nor a network: pack_text.py writes the
text elsewhere. The learning rate falls to 0 by the clock, so that it is done when the minutes are over.
"""

import copy
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from distillation.losses import LEAST_SEQUENCES
from distillation.packed_text import ROW_LENGTHS, PackedText
from distillation.teacher import Teacher, load_teacher, take_real_valued_parts
from distillation.trainer import DistillationTrainer
from distillation.weighted_terms import LossWeights
from experiment.arguments import ModelArguments, parse_arguments
from experiment.models import load_config, load_model, load_tokenizer
from experiment.numerics import NotFiniteError, number_errors
from experiment.reporting import full_disk_errors, input_errors
from experiment.trial_step import try_first_step

logger = logging.getLogger(__name__)

WARM_UP = 100
# How many steps several processes make by one look at the clock.
STEPS_BY_ONE_TIME = 10


@dataclass
class PackedArguments:
    teacher_name_or_path: str = field(metadata={"help": "The BERT to learn from, which the student starts as."})
    packed_text: str = field(metadata={"help": "A file of pack_text.py."})
    minutes: float = field(metadata={"help": "How long to train, the start of the process not counted."})
    student: str | None = field(default=None, metadata={"help": "A SpikeLM to start from, in place of the teacher."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Fields of the student's configuration; num_time_steps=4 goes on from one of T = 1."},
    )
    tokens_per_batch: int = field(default=16384, metadata={"help": "Tokens of a step, padding included."})
    sentence_share: float = field(default=0.45, metadata={"help": "Steps on single sentences, of all."})
    pair_share: float = field(
        default=0.0, metadata={"help": "Steps on pairs of sentences, of all; the others are on running text."}
    )
    sentence_weight: float = field(default=2.0, metadata={"help": "Weight of the error of a sentence's mean state."})
    attention_weight: float = field(
        default=0.0, metadata={"help": "Weight of the divergence of attention, the mean over layers."}
    )


class Clock(TrainerCallback):
    """Ends a training when its time is over.

    Attributes:
        share_left: how much of the time is left, 1 before the training and 0 at its end.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.began = 0.0
        self.share_left = 1.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Processes share their weights, so all go by the clock of the first: one rate for a step, one moment to stop.
        # To be told, they wait for their GPUs.
        if args.world_size > 1 and state.global_step % STEPS_BY_ONE_TIME:
            return
        left = [max(0.0, 1 - (time.monotonic() - self.began) / self.seconds)]
        (self.share_left,) = broadcast_object_list(left)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_training_stop = control.should_training_stop or self.share_left == 0
        return control


class FiniteLoss(TrainerCallback):
    """Ends a training whose loss is not finite. It looks where the loss is logged: every other look would wait for the
    device, and the minutes are counted."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in {"loss", "train_loss"} & (logs or {}).keys():
            if not math.isfinite(logs[name]):
                raise NotFiniteError(
                    f"The loss up to step {state.global_step} is {logs[name]}, and no model was saved; try a smaller "
                    "--learning_rate."
                )


class TimedTrainer(DistillationTrainer):
    """Its learning rate rises for `WARM_UP` steps and falls to 0, linearly, by a clock."""

    def __init__(self, *args: Any, clock: Clock, **kwargs: Any):
        super().__init__(*args, callbacks=[clock, FiniteLoss()], **kwargs)
        self.clock = clock

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * self.clock.share_left
        )
        return self.lr_scheduler


@full_disk_errors()
def main(argv: list[str] | None = None) -> None:
    with input_errors():
        arguments, training, given = parse_arguments((PackedArguments, TrainingArguments), argv, phases=("do_train",))
        if not 0 < arguments.minutes < float("inf"):
            raise ValueError(f"--minutes {arguments.minutes} is not possible; it must be above 0.")
        if given.get("per_device_train_batch_size", 1) != 1:
            raise ValueError(
                "--per_device_train_batch_size: a step takes --tokens_per_batch tokens; leave the flag out."
            )
        for name in ("resume_from_checkpoint", "warmup_steps", "lr_scheduler_type"):
            if name in given:
                raise ValueError(f"--{name}: the rate follows a clock, from the beginning; leave the flag out.")
        if training.eval_strategy != "no":
            raise ValueError("--eval_strategy: there is no data to evaluate on here; leave the flag out.")
        if training.eval_on_start:
            raise ValueError("--eval_on_start: there is no data to evaluate on here; leave the flag out.")
        if Path(training.output_dir).is_file():
            raise ValueError(f"--output_dir {training.output_dir} is a file; name a folder.")
        if Path(training.output_dir, "config.json").exists():
            raise ValueError(
                f"--output_dir {training.output_dir} holds a model, which would be overwritten; name another folder."
            )
        training.do_eval = False
        # A "row" of the data is a whole batch.
        training.per_device_train_batch_size = 1
        if training.max_steps < 0:
            # More than there is time for, unless a step took less than a millisecond.
            training.max_steps = int(arguments.minutes * 60_000)
        student = ModelArguments(
            model_name_or_path=arguments.student or arguments.teacher_name_or_path,
            model_type="spikelm",
            config_overrides=arguments.config_overrides,
        )
        config = load_config(student, trains=True)
        tokenizer = load_tokenizer(student)
        teacher = load_teacher(arguments.teacher_name_or_path, config, is_classifier=False, tokenizer=tokenizer)
        text = PackedText(
            arguments.packed_text,
            arguments.tokens_per_batch,
            training.max_steps * training.gradient_accumulation_steps * training.world_size,
            arguments.sentence_share,
            training.seed,
            arguments.pair_share,
        )
        if text.longest > config.max_position_embeddings:
            raise ValueError(
                f"{arguments.packed_text} has rows of {text.longest} tokens, and {student.model_name_or_path} "
                f"takes {config.max_position_embeddings}; it is for a BERT that takes {max(ROW_LENGTHS)}."
            )
        rows = arguments.tokens_per_batch // text.longest
        if arguments.sentence_weight and rows < LEAST_SEQUENCES:
            logger.warning(
                "--sentence_weight says nothing in batches of fewer than %d rows, and --tokens_per_batch %d has room "
                "for %d of the longest.",
                LEAST_SEQUENCES,
                arguments.tokens_per_batch,
                rows,
            )
        model = load_model(AutoModel, student, config)
        # A student that was made of another BERT, or of the same one before it was fine-tuned, has other embeddings.
        take_real_valued_parts(model, teacher)
        text.check_vocabulary(tokenizer)
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
        make = partial(make_trainer, arguments, text, teacher, tokenizer)
        try_first_step(make, copy.deepcopy(model), training, given)
    trainer = make(model, training)
    with number_errors():
        trainer.train()
    trainer.save_model()
    trainer.save_state()


def make_trainer(
    arguments: PackedArguments,
    text: PackedText,
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    training: TrainingArguments,
) -> TimedTrainer:
    return TimedTrainer(
        model=model,
        args=training,
        teacher=teacher,
        weights=LossWeights(
            sentence=arguments.sentence_weight, attention=arguments.attention_weight, logits=0.0, label=0.0
        ),
        data_collator=the_batch,
        train_dataset=text,
        processing_class=tokenizer,
        clock=Clock(60 * arguments.minutes),
    )


def the_batch(batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What the data holds is batches already, of which a loader takes one at a time."""
    (batch,) = batches
    return batch


if __name__ == "__main__":
    main()
