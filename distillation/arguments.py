"""The flags of distillation that the scripts share."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from experiment.arguments import ModelArguments
from experiment.model_card import shown_name
from experiment.task_checkpoints import checkpoint_of_task, is_folder_of_tasks

from .losses import LEAST_SEQUENCES
from .teacher import Teacher, load_teacher
from .weighted_terms import LossWeights

# Terms that are about a sentence, or an encoder's last layer.
_OF_ENCODERS = ("sentence_weight", "first_token_weight", "attention_weight", "value_relation_weight")

# What a student has learned by a term, for people.
_LESSONS = {
    "hidden": "hidden states",
    "sentence": "sentence vectors",
    "first_token": "first token's states",
    "logits": "logits",
    "attention": "attention",
    "value_relation": "value relations",
}


@dataclass
class DistillationArguments:
    """From which teacher, and what each term of the loss weighs."""

    teacher_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The dense model to learn from, on disk or on the Hub: the student's vocabulary, width and number "
            "of layers. For run_glue.py also a folder of run_glue.py with one teacher for every task."
        },
    )
    teacher_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of --teacher_name_or_path on the Hub."}
    )
    fit_tokens: int = field(
        default=0,
        metadata={
            "help": "Before the first step, fit the student's weights to the teacher's layers, one after another, by "
            "least squares on so many tokens of the training data; 0 for not at all. It takes forward passes only, and "
            "sets the neurons' levels anew."
        },
    )
    hidden_weight: float = field(
        default=LossWeights.hidden,
        metadata={"help": "Weight of the hidden states' error, the mean over layers, in units of their variance."},
    )
    sentence_weight: float = field(
        default=LossWeights.sentence,
        metadata={"help": "Weight of the error of the mean over a sequence's last hidden states, in the same units."},
    )
    first_token_weight: float = field(
        default=LossWeights.first_token,
        metadata={"help": "Weight of the error of the last layer's first token, which a classifier reads, likewise."},
    )
    logits_weight: float = field(
        default=LossWeights.logits,
        metadata={"help": "Weight of the logits' divergence: at every token if the teacher has a head for tokens."},
    )
    attention_weight: float = field(
        default=LossWeights.attention,
        metadata={"help": "Weight of the divergence of attention, the mean over layers: where a token looks."},
    )
    value_relation_weight: float = field(
        default=LossWeights.value_relation,
        metadata={"help": "Weight of the divergence of value relations in the last layer (MiniLM)."},
    )
    label_weight: float = field(
        default=LossWeights.label,
        metadata={"help": "Weight of the loss that the student has on labels without a teacher."},
    )
    train_embeddings: bool = field(
        default=False,
        metadata={"help": "Train the student's embeddings as well; otherwise they are the teacher's, and stay so."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits of teacher and student."})
    loss_diagnostics: bool = field(
        default=False,
        metadata={
            "help": "Log of every term its weighted value, the norm of its gradient and its cosines with the others, "
            "on the last batch of the step that the first process has; costs a backward pass for each term at every "
            "logging step."
        },
    )

    def __post_init__(self) -> None:
        for entry in fields(LossWeights):
            value = getattr(self, f"{entry.name}_weight")
            if not 0 <= value < float("inf"):
                raise ValueError(f"--{entry.name}_weight is {value}; it has to be a number of at least 0.")
        if self.fit_tokens < 0:
            raise ValueError(f"--fit_tokens is {self.fit_tokens}; it has to be a number of tokens, or 0 for none.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature is {self.temperature}; it has to be a number above 0.")
        if self.temperature != 1 and not self.logits_weight:
            raise ValueError(
                f"--temperature {self.temperature:g} with --logits_weight 0 says nothing: it divides logits. Leave it "
                "out, or give them a weight."
            )

    @property
    def teacher(self) -> str | None:
        """The teacher for people: a folder by its name, for the rest of its path says nothing to a stranger."""
        return shown_name(self.teacher_name_or_path)

    @property
    def weights(self) -> LossWeights:
        return LossWeights(**{entry.name: getattr(self, f"{entry.name}_weight") for entry in fields(LossWeights)})

    def lessons(self, has_logits: bool = True) -> str:
        """What a student learns of its teacher, for people: "hidden states and logits"; "" if all of it weighs 0."""
        terms = [term for term in _LESSONS if getattr(self.weights, term) and (has_logits or term != "logits")]
        *others, last = [_LESSONS[term] for term in terms] or [""]
        return f"{', '.join(others)} and {last}" if others else last

    def load(
        self,
        student: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        options: ModelArguments,
        name: str | None = None,
        is_classifier: bool = False,
    ) -> Teacher | None:
        """The teacher of a student of that configuration, if there is to be one.

        Args:
            tokenizer: the student's.
            options: how models are loaded.
            name: of the teacher, where there is one for each task; by default the one named.
            is_classifier: see `load_teacher`.

        Raises:
            ValueError: as there.
        """
        name = name or self.teacher_name_or_path
        if name is None:
            return None
        return load_teacher(
            name,
            student,
            is_classifier=is_classifier,
            tokenizer=tokenizer,
            revision=self.teacher_revision,
            cache_dir=options.cache_dir,
            attn_implementation=options.attn_implementation,
        )

    def options(self, teacher: Teacher) -> dict[str, Any]:
        """What a `DistillationTrainer` takes beside a Trainer's own arguments."""
        return {
            "teacher": teacher,
            "weights": self.weights,
            "temperature": self.temperature,
            "trains_embeddings": self.train_embeddings,
            "diagnoses": self.loss_diagnostics,
        }

    def student(self, arguments: ModelArguments, model_type: str) -> ModelArguments:
        """The arguments of the student: the model named, or else the teacher, in either case as a SpikeLM.

        Args:
            model_type: of the SpikeLM.

        Raises:
            ValueError: a model from scratch, or of another type, is asked for.
        """
        if arguments.config_name or arguments.model_type not in (None, model_type):
            flag = "config_name" if arguments.config_name else "model_type"
            raise ValueError(
                f"--{flag} {getattr(arguments, flag)}: the student is a SpikeLM that starts with the weights of "
                "--model_name_or_path, or of its teacher; leave the flag out (--config_overrides sets single fields)."
            )
        if arguments.model_name_or_path is None:
            name, revision = self.teacher_name_or_path, self.teacher_revision
            arguments = replace(arguments, model_name_or_path=name, model_revision=revision)
        return replace(arguments, model_type=model_type)

    def check_flags(self, given: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: a flag was given that says nothing without a teacher.
        """
        idle = sorted(given.keys() & {entry.name for entry in fields(self)})
        if idle and self.teacher_name_or_path is None:
            raise ValueError(
                f"--{idle[0]} is about learning from a teacher; name one with --teacher_name_or_path, or leave the "
                "flag out."
            )

    def check_training(self, training: TrainingArguments) -> None:
        """
        Raises:
            ValueError: labels are to be smoothed; a device's batch is too small for a term in units of what sequences
                differ by; a term would have no gradient; or what it logs would be of no step.
        """
        if self.teacher_name_or_path is None or not training.do_train:
            return
        if training.label_smoothing_factor:
            raise ValueError("--label_smoothing_factor: a teacher's logits are smooth as they are; leave the flag out.")
        size = training.per_device_train_batch_size
        for name in ("sentence_weight", "first_token_weight"):
            if getattr(self, name) and size < LEAST_SEQUENCES:
                raise ValueError(
                    f"--{name} {getattr(self, name):g} with --per_device_train_batch_size {size}: the unit of this "
                    f"term is what the sequences of a batch differ by, so it takes {LEAST_SEQUENCES} or more. Give a "
                    f"larger batch, or --{name} 0."
                )
        is_reentrant = (training.activation_checkpointing_kwargs or {}).get("use_reentrant")
        for name in ("attention_weight", "value_relation_weight", "loss_diagnostics"):
            if getattr(self, name) and training.activation_checkpointing and is_reentrant:
                raise ValueError(
                    f"--{name} with use_reentrant in --activation_checkpointing_kwargs: that way its gradients cannot "
                    f"be had. Leave use_reentrant out, or --{name}."
                )
        if self.loss_diagnostics and training.logging_strategy != IntervalStrategy.STEPS:
            raise ValueError(
                f"--loss_diagnostics with --logging_strategy {training.logging_strategy.value} shows nothing: it is "
                "about single steps. Log by steps, or leave it out."
            )
        if self.loss_diagnostics and 0 < training.max_steps < training.logging_steps:
            raise ValueError(
                f"--loss_diagnostics shows nothing in --max_steps {training.max_steps} with --logging_steps "
                f"{training.logging_steps:g}; give a smaller --logging_steps."
            )

    def check_head(self, teacher: Teacher, given: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: a flag was given that is about a head, and the teacher has none.
        """
        for name in ("logits_weight", "label_weight", "temperature", "mlm_probability"):
            if given.get(name) and not teacher.kind:
                raise ValueError(
                    f"--{name} {given[name]:g} is about a masked-LM head, and --teacher_name_or_path "
                    f"{self.teacher_name_or_path} has none; leave the flag out, or name a teacher with its head."
                )

    def check_flags_of_a_writer(self, given: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: a flag was given that says nothing without a teacher, or to a student that writes.
        """
        self.check_flags(given)
        for name in _OF_ENCODERS if self.teacher_name_or_path else ():
            if getattr(self, name):
                raise ValueError(f"--{name} is about an encoder alone; leave it out.")

    def teacher_of(self, task: str) -> str | None:
        """The teacher of a GLUE task: its folder, where `run_glue.py` has written one for each task, or the one named.

        Raises:
            ValueError: the folder has teachers for other tasks only.
        """
        name = self.teacher_name_or_path
        return checkpoint_of_task(name, task, "teacher_name_or_path") if is_folder_of_tasks(name) else name
