"""Pre-trains a masked language model, SpikeLM or any other: text -> documents -> packed rows -> Trainer -> checkpoint.

    python run_mlm.py --train_file corpus.txt --output_dir runs/pretrain
    accelerate launch run_mlm.py recipes/pretrain_base_nominal.yaml --output_dir runs/base

`python run_mlm.py --help` lists every flag.
"""

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from experiment.arguments import ModelArguments, local_inputs, parse_arguments, say_unused
from experiment.best_model import set_direction
from experiment.calibration import calibrate_before_training
from experiment.folder_lock import unlocking_folders
from experiment.model_card import RunCard
from experiment.models import (
    load_config,
    load_model,
    load_tokenizer,
    longest_input,
    saved_by_run,
    weights_digest,
)
from experiment.precision import check_evaluation
from experiment.recorded_arguments import recorded_arguments
from experiment.reporting import full_disk_errors, input_errors, set_up_logging
from experiment.run_record import RunRecord
from experiment.training_run import TrainingRun
from experiment.whole_steps import WholeStepsTrainer
from experiment.written_files import is_output_folder, refuse_foreign
from pretraining_data.arguments import DataArguments
from pretraining_data.documents import load_documents
from pretraining_data.masking import EpochCallback, MaskingCollator
from pretraining_data.preparation import check_fit, check_rows, masked_data, pack, train_tokenizer
from pretraining_data.prepared import check_prepared_folder, prepared_tokenizer, save_prepared
from pretraining_data.rows import content_fingerprint, content_numbers
from pretraining_data.scoring import (
    MASKED_LM_GREATER_IS_BETTER,
    MASKED_LM_METRICS,
    masked_lm_losses,
    masked_lm_metrics,
    unigram_loss,
)
from pretraining_data.streams import OrderedStream, StreamPasses
from spike_metrics.callback import log_firing_rate
from spike_metrics.evaluation import FIGURES, SpikeArguments, evaluate_spikes

logger = logging.getLogger(__name__)


@dataclass
class ScriptArguments:
    prepare_only: bool = field(
        default=False,
        metadata={"help": "Only write the packed corpus into --output_dir, for later runs with --dataset_name."},
    )


@full_disk_errors(goes_on=True)
@unlocking_folders()
def main(argv: list[str] | None = None) -> None:
    # Whatever can be wrong with the command is found in here, before anything is written.
    with input_errors():
        script, model_arguments, data_arguments, spikes, training, given = parse_arguments(
            (ScriptArguments, ModelArguments, DataArguments, SpikeArguments, TrainingArguments),
            argv,
            phases=("do_train", "do_eval"),
        )
        set_up_logging(training)
        refuse_foreign(training.output_dir)
        check_streaming(script, data_arguments, training)
        check_objective(data_arguments, training, given)
        if script.prepare_only:
            check_prepared_folder(training.output_dir)
        set_seed(training.seed)
        with training.main_process_first(desc="reading and packing the corpus"):
            needs_training = training.do_train or script.prepare_only
            documents = load_documents(data_arguments, training.seed, needs_training, is_output_folder)
        tokenizer = prepared_tokenizer(data_arguments, load_tokenizer(model_arguments))
        if tokenizer is None:
            tokenizer = train_tokenizer(documents, data_arguments, training)
        else:
            say_unused(given, ("vocab_size", "lowercase"), "there is a tokenizer already")
        with training.main_process_first(desc="reading and packing the corpus"):
            splits = pack(documents, tokenizer, data_arguments, training)
        if script.prepare_only:
            if training.process_index == 0:
                save_prepared(splits, tokenizer, training.output_dir, data_arguments)
                flags = f"--dataset_name {training.output_dir} --max_seq_length {data_arguments.max_seq_length}"
                print(f"The packed corpus is in {training.output_dir}; train with {flags}")
            return

        config = load_config(
            model_arguments, training.do_train, **({} if model_arguments.model_name_or_path else vocabulary(tokenizer))
        )
        if config.is_encoder_decoder:
            raise ValueError(
                f"A model of type {config.model_type!r} writes: its decoder would be given the words that are masked. "
                "run_summarization.py trains it."
            )
        check_fit(config, tokenizer, data_arguments)
        check_evaluation(training, config)
        tokenizer.model_max_length = longest_input(config, tokenizer, seen=data_arguments.max_seq_length)
        splits = check_rows(splits, config, tokenizer, data_arguments)
        record = RunRecord(
            training.output_dir,
            recorded_arguments(model_arguments, data_arguments, spikes, training)
            | {"checkpoint_digest": weights_digest(model_arguments.model_name_or_path)},
            "+".join(content_fingerprint(split) for split in splits.values()),
            inputs=local_inputs(argv, model_arguments, data_arguments, training),
        )
        run = TrainingRun(record, training, model_arguments.overwrite_output_dir)
        if not run.is_left_to_do(config):
            return
        auto_class = AutoModelForPreTraining if data_arguments.objective == "mlm_nsp" else AutoModelForMaskedLM
        model = load_model(auto_class, saved_by_run(model_arguments, run.trained), config)
        inputs = inspect.signature(model.forward).parameters
        if data_arguments.objective == "mlm_nsp" and "next_sentence_label" not in inputs:
            raise ValueError(
                f"{type(model).__name__} has no next-sentence head; choose --objective mlm or another --model_type."
            )
        rows, validation, collator = masked_data(splits, tokenizer, inputs, data_arguments, training)
        make = partial(make_trainer, collator, rows, validation, tokenizer, model_arguments, spikes)
        run.claim(make, model, given)

    card = make_card(model, auto_class, training, documents["validation"], model_arguments, data_arguments, tokenizer)
    trainer = run.train(
        make, model, card, [EpochCallback(collator)], content_numbers if data_arguments.streaming else None
    )
    results = {}
    if training.do_eval:
        results = trainer.evaluate() | unigram_baseline(splits, validation, tokenizer, config)
        results |= evaluate_spikes(trainer, validation, spikes)
    run.finish(trainer, results)


def check_streaming(script: ScriptArguments, arguments: DataArguments, training: TrainingArguments) -> None:
    """Refuses what makes no sense for a stream, which has no length and is never written as a whole."""
    if arguments.streaming and script.prepare_only:
        raise ValueError("--prepare_only writes the whole corpus; leave out --streaming.")
    arguments.check_stream(training)


def check_objective(arguments: DataArguments, training: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Refuses what the labels of the objective do not have: a metric to choose the best model by, a smoothed loss."""
    metrics = MASKED_LM_GREATER_IS_BETTER.copy()
    if arguments.objective == "mlm":
        del metrics["next_sentence_accuracy"]
    elif training.label_smoothing_factor:
        raise ValueError(
            "--label_smoothing_factor smooths one kind of label, and --objective mlm_nsp has two. Leave it out, or "
            "choose --objective mlm."
        )
    set_direction(training, given, metrics)


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}


def make_trainer(
    collator: MaskingCollator,
    rows: Dataset | StreamPasses | None,
    validation: Dataset | OrderedStream,
    tokenizer: PreTrainedTokenizerBase,
    model_arguments: ModelArguments,
    spikes: SpikeArguments,
    model: PreTrainedModel,
    training: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    trainer = WholeStepsTrainer(
        model=model,
        args=training,
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=masked_lm_metrics,
        preprocess_logits_for_metrics=partial(masked_lm_losses, label_smoothing=training.label_smoothing_factor),
        callbacks=list(callbacks),
    )
    if model_arguments.model_name_or_path:
        calibrate_before_training(trainer, model_arguments.calibration_batches)
    if spikes.spike_batches:
        log_firing_rate(trainer)
    return trainer


def unigram_baseline(splits, validation, tokenizer: PreTrainedTokenizerBase, config) -> dict[str, float]:
    """The loss of a unigram model of the training rows; nothing where they cannot be counted, and that is said."""
    if not isinstance(splits.get("train"), Dataset):
        logger.warning("No unigram baseline: it needs training data, and not as a stream.")
        return {}
    loss = unigram_loss(splits["train"], validation, config.vocab_size, tokenizer.all_special_ids)
    return {"eval_unigram_loss": loss}


def make_card(
    model: PreTrainedModel,
    auto_class: type,
    training: TrainingArguments,
    validation: Dataset | IterableDataset,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> RunCard:
    return RunCard(
        model=model,
        training=training,
        pipeline_tag="fill-mask",
        auto_class=auto_class.__name__,
        training_data=describe(data_arguments),
        datasets=data_arguments.hub_datasets,
        metrics=MASKED_LM_METRICS,
        figures=FIGURES,
        dataset_for_results="the validation split",
        **data_arguments.origin_of_results(validation.split, MASKED_LM_METRICS),
        started_from=model_arguments.model_name_or_path,
        mask_token=tokenizer.mask_token,
    )


def describe(arguments: DataArguments) -> str:
    """One sentence for the card."""
    task = (
        "masked language modelling and next-sentence prediction"
        if arguments.objective == "mlm_nsp"
        else ("masked language modelling")
    )
    return (
        f"Trained by {task} ({arguments.mlm_probability:.0%} of the tokens) on {arguments.sources}, in "
        f"{arguments.rows_in_words}."
    )


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
