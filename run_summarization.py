"""Trains a model that writes, SpikeLM in BART's form or any other: summaries of texts, or translations.

    python run_summarization.py --model_name_or_path facebook/bart-base --model_type spikelm_bart --dataset_name xsum \
        --output_dir runs/xsum
    python run_summarization.py --train_file a.csv --validation_file b.csv --output_dir OUT

Without --model_type a BART stays the BART it is, the yardstick. With --teacher_name_or_path a student learns from a
dense model as well. `python run_summarization.py --help` lists every flag.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)

from configuration_spikelm import SpikeLMBartConfig
from distillation.arguments import DistillationArguments
from distillation.first_fit import fit_before_training
from distillation.teacher import Teacher, begin_as_teacher
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
from experiment.run_record import RunRecord, save_metrics
from experiment.training_run import TrainingRun
from experiment.written_files import refuse_foreign
from pretraining_data.rows import content_fingerprint
from spike_metrics.callback import log_firing_rate
from spike_metrics.evaluation import DECODER_FIGURES, SpikeArguments, evaluate_spikes
from text_to_text.arguments import PairArguments, WritingTrainingArguments, tell
from text_to_text.encoding import PairCollator, check_fit, digest_of_targets, encode, set_languages, targets_of
from text_to_text.pairs import load_pairs
from text_to_text.results import hub_metrics, write_predictions, write_results
from text_to_text.scoring import by_row, directions, load_score, make_compute_metrics, without_prefix, written_texts
from text_to_text.tokenizers import train_tokenizer
from text_to_text.trainer import TaughtWritingTrainer, WritingTrainer, mean_token_loss

ARGUMENTS = (ModelArguments, PairArguments, DistillationArguments, SpikeArguments, WritingTrainingArguments)
# What a text begins and ends with, and what batches are filled up with.
NEEDED_TOKENS = ("pad", "eos")


@full_disk_errors(goes_on=True)
@unlocking_folders()
def main(argv: list[str] | None = None) -> None:
    # Whatever can be wrong with the command is found in here, before anything is written.
    with input_errors():
        model_arguments, arguments, teaching, spikes, training, given = parse_arguments(ARGUMENTS, argv)
        set_up_logging(training)
        refuse_foreign(training.output_dir)
        teaching.check_flags_of_a_writer(given)
        teaching.check_training(training)
        set_direction(training, given, directions(arguments.translates, training.predict_with_generate))
        set_seed(training.seed)
        start = start_of(model_arguments, teaching)
        with training.main_process_first(desc="reading and tokenising the texts"):
            pairs = load_pairs(arguments, arguments.splits(training, given), model_arguments.cache_dir)
        tokenizer = load_tokenizer(start, NEEDED_TOKENS)
        if tokenizer is None:
            tokenizer = new_tokenizer(pairs, arguments, training)
        else:
            say_unused(given, ("vocab_size",), "there is a tokenizer already")
        is_new = start.model_name_or_path is None
        config = load_config(start, training.do_train, **(vocabulary(tokenizer) if is_new else {}))
        writing = training.generation_fields()
        check_fit(config, tokenizer, arguments, training.generation_max_length)
        check_evaluation(training, config)
        tokenizer.model_max_length = longest_input(config, tokenizer, seen=arguments.max_source_length)
        writing |= set_languages(tokenizer, arguments)
        teacher = teaching.load(config, tokenizer, model_arguments)
        with training.main_process_first(desc="reading and tokenising the texts"):
            splits = encode(pairs, tokenizer, arguments)
        scored = []
        if training.predict_with_generate:
            scored = [rows for split, rows in pairs.items() if split != "train" and targets_of(rows)]
        if scored:
            load_score(arguments.target_lang)  # Some languages take a package.
        record = RunRecord(
            training.output_dir,
            recorded_arguments(start, arguments, teaching, spikes, training)
            | {"checkpoint_digest": weights_digest(start.model_name_or_path)}
            | {"teacher_digest": weights_digest(teaching.teacher_name_or_path)},
            "+".join([*(content_fingerprint(split) for split in splits.values()), *map(digest_of_targets, scored)]),
            inputs=local_inputs(argv, start, arguments, teaching, training),
        )
        run = TrainingRun(record, training, model_arguments.overwrite_output_dir)
        if not run.is_left_to_do(config):
            return
        model = load_model(AutoModelForSeq2SeqLM, saved_by_run(start, run.trained), config)
        # The checkpoint then writes as it was evaluated. What does not go together could not be saved.
        tell(model.generation_config, writing, arguments.max_target_length)
        if teacher is not None and training.do_train and not run.trained:
            begin_as_teacher(model, teacher, start, teaching.train_embeddings)
        make = partial(make_trainer, splits, pairs, tokenizer, start, arguments, teacher, teaching, spikes)
        run.claim(make, model, given)

    card = make_card(model, training, arguments, start, teaching)
    trainer = run.train(make, model, card)
    results, tested = {}, {}
    if training.do_eval:
        results = trainer.evaluate() | evaluate_spikes(trainer, splits["validation"], spikes)
    if "test" in splits:
        tested = predict(trainer, splits["test"], targets_of(pairs["test"]), tokenizer, arguments)
        if not training.do_eval and "labels" in splits["test"].column_names:
            # Otherwise counted on the validation split; and without summaries a decoder would be given the texts.
            tested |= evaluate_spikes(trainer, splits["test"], spikes, prefix="test_")
        save_metrics(trainer, "test", tested)
    rows = {"validation": without_prefix(results, "eval"), "test": without_prefix(tested, "test")}
    if training.do_eval and teacher is not None:
        # With the same batches, settings and metrics; the student's are on record by now, and trackers keep the last.
        untracked = replace(training, report_to=[])
        teacher.model.generation_config = model.generation_config
        taught_by = make_trainer(
            splits, pairs, tokenizer, start, arguments, None, teaching, spikes, teacher.model, untracked
        )
        rows["the teacher on validation"] = without_prefix(taught_by.evaluate(), "eval")
    write_results(trainer, rows)
    run.finish(trainer, results, tested)


def predict(
    trainer: Trainer,
    rows: Dataset,
    targets: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    arguments: PairArguments,
) -> dict[str, float]:
    """Writes of every text of the test split, keeps what was written, and returns its scores if there are targets."""
    trainer.compute_metrics = make_compute_metrics(tokenizer, targets, arguments.target_lang, writes=True)
    output = trainer.predict(rows)
    written, *_ = by_row(output)
    write_predictions(trainer, written_texts(written, tokenizer))
    return output.metrics


def start_of(arguments: ModelArguments, teaching: DistillationArguments) -> ModelArguments:
    """Where the model comes from: a student is a SpikeLM, and starts as its teacher unless a model is named."""
    if teaching.teacher_name_or_path:
        return teaching.student(arguments, SpikeLMBartConfig.model_type)
    if arguments.model_name_or_path or arguments.config_name:
        return arguments
    return replace(arguments, model_type=arguments.model_type or SpikeLMBartConfig.model_type)


def new_tokenizer(
    pairs: DatasetDict, arguments: PairArguments, training: WritingTrainingArguments
) -> PreTrainedTokenizerBase:
    """One of the training texts, trained by the main process and sent to the others."""
    if "train" not in pairs:
        raise ValueError(
            "There is no training data to make a tokenizer of; name a model with its tokenizer with "
            "--model_name_or_path, or a tokenizer with --tokenizer_name."
        )
    tokenizer = None
    if training.process_index == 0:
        tokenizer = train_tokenizer(pairs["train"], arguments.vocab_size, arguments.max_source_length)
    return broadcast_object_list([tokenizer])[0]


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the configuration of a new model says of it: as in a BART, a text begins after the token that ends one."""
    end = tokenizer.eos_token_id
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": end,
        "decoder_start_token_id": end,
        "forced_eos_token_id": end,
    }


def make_trainer(
    splits: DatasetDict,
    pairs: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    start: ModelArguments,
    arguments: PairArguments,
    teacher: Teacher | None,
    teaching: DistillationArguments,
    spikes: SpikeArguments,
    model: PreTrainedModel,
    training: WritingTrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    if teacher is None:
        loss = partial(mean_token_loss, label_smoothing=training.label_smoothing_factor)
        trainer_class = partial(WritingTrainer, compute_loss_func=loss)
    else:
        trainer_class = partial(TaughtWritingTrainer, **teaching.options(teacher))
    targets = targets_of(pairs["validation"]) if "validation" in pairs else []
    trainer = trainer_class(
        model=model,
        args=training,
        data_collator=PairCollator(tokenizer, model),
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        compute_metrics=make_compute_metrics(tokenizer, targets, arguments.target_lang, training.predict_with_generate),
        callbacks=list(callbacks),
    )
    if start.model_name_or_path:
        calibrate_before_training(trainer, start.calibration_batches)
    if teacher is not None:
        fit_before_training(trainer, teaching.fit_tokens)
    if spikes.spike_batches:
        log_firing_rate(trainer)
    return trainer


def make_card(
    model: PreTrainedModel,
    training: WritingTrainingArguments,
    arguments: PairArguments,
    start: ModelArguments,
    teaching: DistillationArguments,
) -> RunCard:
    metrics, dataset = hub_metrics(arguments.translates), arguments.hub_dataset
    return RunCard(
        model=model,
        training=training,
        pipeline_tag="translation" if arguments.translates else "summarization",
        auto_class="AutoModelForSeq2SeqLM",
        training_data=describe(arguments, teaching),
        datasets=[dataset.name] if dataset else [],
        metrics=metrics | {f"test_{name}": kind for name, kind in metrics.items()},
        figures=DECODER_FIGURES,
        dataset_for_results="the validation split (names with test_: the test split)",
        results_dataset=dataset.name if dataset else None,
        results_config=dataset.config if dataset else None,
        results_splits=dict.fromkeys(metrics, "validation") | {f"test_{name}": "test" for name in metrics},
        started_from=start.model_name_or_path,
        language=dataset.language if dataset else None,
    )


def describe(arguments: PairArguments, teaching: DistillationArguments) -> str:
    """One sentence or two for the card."""
    task = (
        f"translate from {arguments.source_lang} into {arguments.target_lang}" if arguments.translates else "summarise"
    )
    taught = ""
    if teaching.teacher and teaching.lessons():
        taught = f" It learned the {teaching.lessons()} of {teaching.teacher} as well."
    return (
        f"Learned to {task} from {arguments.source}: texts of up to {arguments.max_source_length} tokens, and up to "
        f"{arguments.max_target_length} to write.{taught}"
    )


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
