"""Trains a causal language model, SpikeLM or any other: text -> documents -> whole rows -> Trainer -> checkpoint.

    python run_clm.py --train_file corpus.txt --output_dir runs/decoder
    python run_clm.py --teacher_name_or_path HuggingFaceTB/SmolLM2-135M --train_file corpus.txt --output_dir out

With a teacher, a Llama, the student is a SpikeLM that starts with its weights and learns its hidden states and logits.
`python run_clm.py --help` lists every flag.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from configuration_spikelm import SpikeLMLlamaConfig
from distillation.arguments import DistillationArguments
from distillation.causal import CausalTermsTrainer
from distillation.first_fit import fit_before_training
from distillation.teacher import Teacher, begin_as_teacher
from experiment.arguments import ModelArguments, local_inputs, parse_arguments, say_unused
from experiment.best_model import set_direction
from experiment.calibration import calibrate_before_training
from experiment.folder_lock import unlocking_folders
from experiment.model_card import RunCard
from experiment.models import (
    CAUSAL_TOKENS,
    check_is_causal,
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
from pretraining_data.arguments import TextArguments
from pretraining_data.causal import CausalCollator
from pretraining_data.documents import load_documents
from pretraining_data.preparation import causal_data, check_fit, check_rows, pack, train_tokenizer
from pretraining_data.prepared import prepared_tokenizer
from pretraining_data.rows import content_fingerprint, content_numbers
from pretraining_data.scoring import (
    CAUSAL_LM_GREATER_IS_BETTER,
    CAUSAL_LM_METRICS,
    next_token_losses,
    next_token_metrics,
)
from pretraining_data.streams import OrderedStream, StreamPasses
from spike_metrics.callback import log_firing_rate
from spike_metrics.evaluation import DECODER_FIGURES, SpikeArguments, evaluate_spikes


@full_disk_errors(goes_on=True)
@unlocking_folders()
def main(argv: list[str] | None = None) -> None:
    # Whatever can be wrong with the command is found in here, before anything is written.
    with input_errors():
        model_arguments, data_arguments, teaching, spikes, training, given = parse_arguments(
            (ModelArguments, TextArguments, DistillationArguments, SpikeArguments, TrainingArguments),
            argv,
            phases=("do_train", "do_eval"),
        )
        set_up_logging(training)
        refuse_foreign(training.output_dir)
        check_flags(data_arguments, teaching, training, given)
        if teaching.teacher_name_or_path:
            model_arguments = teaching.student(model_arguments, SpikeLMLlamaConfig.model_type)
        set_seed(training.seed)
        with training.main_process_first(desc="reading and packing the corpus"):
            documents = load_documents(data_arguments, training.seed, training.do_train, is_output_folder)
        tokenizer = prepared_tokenizer(data_arguments, load_tokenizer(model_arguments, CAUSAL_TOKENS))
        if tokenizer is None:
            tokenizer = train_tokenizer(documents, data_arguments, training)
        else:
            say_unused(given, ("vocab_size",), "there is a tokenizer already")
        fields = {} if model_arguments.model_name_or_path else vocabulary(tokenizer)
        config = load_config(model_arguments, training.do_train, new=SpikeLMLlamaConfig, **fields)
        check_fit(config, tokenizer, data_arguments)
        check_evaluation(training, config)
        teacher = teaching.load(config, tokenizer, model_arguments)
        with training.main_process_first(desc="reading and packing the corpus"):
            splits = pack(documents, tokenizer, data_arguments, training)
        tokenizer.model_max_length = longest_input(config, tokenizer, seen=data_arguments.max_seq_length)
        splits = check_rows(splits, config, tokenizer, data_arguments)
        record = RunRecord(
            training.output_dir,
            recorded_arguments(model_arguments, data_arguments, teaching, spikes, training)
            | {"checkpoint_digest": weights_digest(model_arguments.model_name_or_path)}
            | {"teacher_digest": weights_digest(teaching.teacher_name_or_path)},
            "+".join(content_fingerprint(split) for split in splits.values()),
            inputs=local_inputs(argv, model_arguments, data_arguments, teaching, training),
        )
        run = TrainingRun(record, training, model_arguments.overwrite_output_dir)
        if not run.is_left_to_do(config):
            return
        model = load_model(AutoModelForCausalLM, saved_by_run(model_arguments, run.trained), config)
        check_is_causal(model)
        if teacher is not None and training.do_train and not run.trained:
            begin_as_teacher(model, teacher, model_arguments, teaching.train_embeddings)
        rows, validation, collator = causal_data(splits, tokenizer, data_arguments, training)
        make = partial(make_trainer, collator, rows, validation, tokenizer, model_arguments, teacher, teaching, spikes)
        run.claim(make, model, given)

    card = make_card(model, training, documents["validation"], model_arguments, data_arguments, teaching)
    trainer = run.train(make, model, card, row_numbers=content_numbers if data_arguments.streaming else None)
    results = {}
    if training.do_eval:
        results = trainer.evaluate() | evaluate_spikes(trainer, validation, spikes)
    run.finish(trainer, results)


def check_flags(
    data: TextArguments, teaching: DistillationArguments, training: TrainingArguments, given: Mapping[str, Any]
) -> None:
    """Refuses flags that say nothing here."""
    teaching.check_flags_of_a_writer(given)
    teaching.check_training(training)
    data.check_stream(training)
    if training.label_smoothing_factor:
        raise ValueError(
            "--label_smoothing_factor: the Trainer smooths labels as an encoder has them, not those of the next token; "
            "leave the flag out."
        )
    set_direction(training, given, CAUSAL_LM_GREATER_IS_BETTER)


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    special_ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return {"vocab_size": len(tokenizer), **special_ids}


def make_trainer(
    collator: CausalCollator,
    rows: Dataset | StreamPasses | None,
    validation: Dataset | OrderedStream,
    tokenizer: PreTrainedTokenizerBase,
    model_arguments: ModelArguments,
    teacher: Teacher | None,
    teaching: DistillationArguments,
    spikes: SpikeArguments,
    model: PreTrainedModel,
    training: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    kind = partial(CausalTermsTrainer, **teaching.options(teacher)) if teacher else WholeStepsTrainer
    trainer = kind(
        model=model,
        args=training,
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=next_token_metrics,
        preprocess_logits_for_metrics=next_token_losses,
        callbacks=list(callbacks),
    )
    if model_arguments.model_name_or_path:
        calibrate_before_training(trainer, model_arguments.calibration_batches)
    if teacher is not None:
        fit_before_training(trainer, teaching.fit_tokens)
    if spikes.spike_batches:
        log_firing_rate(trainer)
    return trainer


def make_card(
    model: PreTrainedModel,
    training: TrainingArguments,
    validation: Dataset | IterableDataset,
    model_arguments: ModelArguments,
    data_arguments: TextArguments,
    teaching: DistillationArguments,
) -> RunCard:
    is_taught = teaching.teacher and teaching.lessons()
    learned = f"Learned the {teaching.lessons()} of {teaching.teacher}" if is_taught else "Trained"
    return RunCard(
        model=model,
        training=training,
        pipeline_tag="text-generation",
        auto_class=AutoModelForCausalLM.__name__,
        training_data=(
            f"{learned} to predict the next token on {data_arguments.sources}, in {data_arguments.rows_in_words}."
        ),
        datasets=data_arguments.hub_datasets,
        metrics=CAUSAL_LM_METRICS,
        figures=DECODER_FIGURES,
        dataset_for_results="the validation split",
        **data_arguments.origin_of_results(validation.split, CAUSAL_LM_METRICS),
        started_from=model_arguments.model_name_or_path,
    )


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
