"""From a task's sentences and labels to what a model takes."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import DatasetDict
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from glue_tasks.loading import SENTENCES
from glue_tasks.tasks import Task

logger = logging.getLogger(__name__)


def encode(
    raw: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    max_length: int,
    pad_to_max_length: bool = False,
    sample_limit: Callable[[str], int | None] = lambda split: None,
    num_workers: int | None = None,
    learns_labels: bool = True,
) -> DatasetDict:
    """Tokenise every split of `load_task`; pairs are truncated longest first.

    Args:
        sample_limit: from the name of a split to the number of rows used at most.
        num_workers: processes that tokenise.
        learns_labels: whether the training learns from labels, and not from a teacher alone.

    Returns:
        The splits with only the tokenizer's columns and `label`.

    Raises:
        ValueError: `max_length` is more than the model or the tokenizer takes, the tokenizer makes ids that the model
            has no embedding for, `max_length` has no room for text, or the training rows that are used all have the
            same label.
    """
    limit = min(getattr(config, "max_position_embeddings", tokenizer.model_max_length), tokenizer.model_max_length)
    if max_length > limit:
        raise ValueError(f"--max_seq_length is {max_length}, but the model takes at most {limit} tokens.")
    texts = max(sum(name in split.column_names for name in SENTENCES) for split in raw.values())
    least = tokenizer.num_special_tokens_to_add(pair=texts > 1) + texts
    if max_length < least:
        raise ValueError(
            f"--max_seq_length {max_length} leaves no room for text beside the special tokens; give {least} or more."
        )

    def tokenize(batch: dict[str, list[str]]) -> Any:
        encoded = tokenizer(
            *(batch[name] for name in SENTENCES if name in batch),
            padding="max_length" if pad_to_max_length else False,
            truncation=True,
            max_length=max_length,
        )
        largest = max(max(ids, default=0) for ids in encoded["input_ids"])
        if largest >= config.vocab_size:
            raise ValueError(
                f"The tokenizer makes the token id {largest}, but the model has only {config.vocab_size} embeddings: "
                "tokenizer and model do not belong together."
            )
        return encoded

    splits = DatasetDict()
    for name, dataset in raw.items():
        used = dataset.take(sample_limit(name) or len(dataset))
        is_cut = name == "train" and 1 < len(used) < len(dataset)
        if learns_labels and is_cut and len(set(map(repr, used["label"]))) == 1:
            raise ValueError(
                f"The first {len(used):,} training rows all have the same label, so there is nothing to learn: "
                "shuffle the file, or use more of it (--max_train_samples)."
            )
        splits[name] = used.map(
            tokenize,
            batched=True,
            num_proc=num_workers,
            remove_columns=[column for column in dataset.column_names if column != "label"],
            desc=f"Tokenising {name}",
        )
    return splits


def label_fields(task: Task) -> dict[str, Any]:
    """The fields of a model's configuration that say what the task's labels are."""
    if task.labels is None:
        return {"num_labels": 1, "problem_type": task.problem_type}
    return {
        "id2label": dict(enumerate(task.labels)),
        "label2id": {label: number for number, label in enumerate(task.labels)},
        "problem_type": task.problem_type,
    }


@dataclass(frozen=True)
class Classifier:
    """What a checkpoint tells apart that is a sequence classifier already.

    Attributes:
        name: the checkpoint.
        labels: their names in class order; "LABEL_0", ... where they have none, as that of a score has not.
        problem_type: the kind of labels, if it is known.
    """

    name: str
    labels: tuple[str, ...]
    problem_type: str | None

    @property
    def is_unnamed(self) -> bool:
        return self.labels == tuple(f"LABEL_{number}" for number in range(len(self.labels)))

    def conflict(self, task: Task) -> str | None:
        """How its labels are not those of a task in their order; `None` if they are, or have no names."""
        wanted = task.labels or ("LABEL_0",)
        if _folded(self.labels) == _folded(wanted) or (self.is_unnamed and len(self.labels) == len(wanted)):
            return None
        asked = "a single score" if task.labels is None else f"{list(task.labels)} in this order"
        return f"{self.name} classifies {list(self.labels)}, but {task.name} asks for {asked}"


def _folded(labels: Sequence[str]) -> tuple[str, ...]:
    """Names without the difference of small and capital letters, where that tells no two of them apart."""
    folded = tuple(label.casefold() for label in labels)
    return folded if len(set(folded)) == len(labels) else tuple(labels)


def classifier_of(config: PreTrainedConfig) -> Classifier | None:
    """The classifier that the checkpoint of a configuration is; `None` of any other checkpoint."""
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        return None
    labels = tuple(config.id2label[number] for number in range(config.num_labels))
    return Classifier(config.name_or_path, labels, config.problem_type)


def check_labels(task: Task, config: PreTrainedConfig, trains: bool = True, refits: bool = False) -> None:
    """Refuse a checkpoint whose classifier says nothing of a task's labels.

    Args:
        trains: whether it is trained first. What is evaluated as it is has to be a classifier already.
        refits: whether a classifier of other labels is taken (`--ignore_mismatched_sizes`): one of another number of
            them to be made anew, one of the same number under the new names. One of the same names in another order
            never is: its answers would be taken for others.

    Raises:
        ValueError: it does not. The labels of a classifier without names never conflict with as many others.
    """
    classifier = classifier_of(config)
    if classifier is None:
        check_is_trained(task, config.name_or_path, trains)
        return
    conflict = classifier.conflict(task)
    wanted = task.labels or ("LABEL_0",)
    is_of_other_size = len(classifier.labels) != len(wanted)
    is_reordered = sorted(_folded(classifier.labels)) == sorted(_folded(wanted))
    if conflict is None and classifier.is_unnamed and task.labels and not trains:
        logger.warning(
            "%s does not name its classes; they are taken for %s, in this order.", classifier.name, ", ".join(wanted)
        )
    if conflict is None or (refits and not is_reordered and (trains or not is_of_other_size)):
        return
    ways = ["start from the checkpoint that it was fine-tuned from"]
    if is_of_other_size and trains:
        ways.append("give --ignore_mismatched_sizes to make its classifier anew")
    elif not is_of_other_size and not is_reordered:
        ways.append("give --ignore_mismatched_sizes to take its answers under the new names")
    raise ValueError(f"The checkpoint {conflict}; {', or '.join(ways)}.")


def check_is_trained(task: Task, name: str | None, trains: bool) -> None:
    """
    Raises:
        ValueError: a model that is no classifier would be evaluated without a training.
    """
    if not trains:
        raise ValueError(
            f"{name or 'A model from scratch'} is no classifier yet, so its scores of {task.name} would be those of "
            "random weights; name a checkpoint that was fine-tuned, or train (--do_train)."
        )
