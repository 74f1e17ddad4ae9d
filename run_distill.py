"""Makes a SpikeLM out of a BERT: the student learns, from plain text, to have its teacher's hidden states and logits.

    python run_distill.py --teacher_name_or_path google-bert/bert-base-uncased --train_file corpus.txt --output_dir out

Without --model_name_or_path the student is a SpikeLM of the teacher's shape that starts with the teacher's weights.
`python run_distill.py --help` lists every flag.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from configuration_spikelm import SpikeLMConfig
from distillation.arguments import DistillationArguments
from distillation.first_fit import fit_before_training
from distillation.teacher import Teacher, begin_as_teacher
from distillation.trainer import DistillationTrainer, hidden_state_metrics
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
from experiment.written_files import is_output_folder, refuse_foreign
from pretraining_data.arguments import DataArguments
from pretraining_data.documents import load_documents
from pretraining_data.masking import EpochCallback, MaskingCollator
from pretraining_data.preparation import check_fit, check_rows, masked_data, pack
from pretraining_data.prepared import prepared_tokenizer
from pretraining_data.rows import content_fingerprint, content_numbers
from pretraining_data.streams import OrderedStream, StreamPasses
from spike_metrics.callback import log_firing_rate
from spike_metrics.evaluation import FIGURES, SpikeArguments, evaluate_spikes

METRICS = {"hidden_error": "mse"}


@full_disk_errors(goes_on=True)
@unlocking_folders()
def main(argv: list[str] | None = None) -> None:
    # Whatever can be wrong with the command is found in here, before anything is written.
    with input_errors():
        model_arguments, data_arguments, teaching, spikes, training, given = parse_arguments(
            (ModelArguments, DataArguments, DistillationArguments, SpikeArguments, TrainingArguments),
            argv,
            phases=("do_train", "do_eval"),
        )
        set_up_logging(training)
        refuse_foreign(training.output_dir)
        check_flags(data_arguments, teaching, training, given)
        student_arguments = teaching.student(model_arguments, SpikeLMConfig.model_type)
        set_seed(training.seed)
        with training.main_process_first(desc="reading and packing the corpus"):
            documents = load_documents(data_arguments, training.seed, training.do_train, is_output_folder)
        tokenizer = prepared_tokenizer(data_arguments, load_tokenizer(student_arguments))
        say_unused(given, ("vocab_size", "lowercase"), "there is a tokenizer already")
        config = load_config(student_arguments, training.do_train)
        teacher = teaching.load(config, tokenizer, model_arguments)
        teaching.check_head(teacher, given)
        with training.main_process_first(desc="reading and packing the corpus"):
            splits = pack(documents, tokenizer, data_arguments, training)
        check_fit(config, tokenizer, data_arguments)
        check_evaluation(training, config)
        tokenizer.model_max_length = longest_input(config, tokenizer, seen=data_arguments.max_seq_length)
        splits = check_rows(splits, config, tokenizer, data_arguments)
        record = RunRecord(
            training.output_dir,
            recorded_arguments(student_arguments, data_arguments, teaching, spikes, training)
            | {"checkpoint_digest": weights_digest(student_arguments.model_name_or_path)}
            | {"teacher_digest": weights_digest(teaching.teacher_name_or_path)},
            "+".join(content_fingerprint(split) for split in splits.values()),
            inputs=local_inputs(argv, student_arguments, data_arguments, teaching, training),
        )
        run = TrainingRun(record, training, model_arguments.overwrite_output_dir)
        if not run.is_left_to_do(config):
            return
        auto_class = AutoModelForMaskedLM if teacher.kind == "tokens" else AutoModel
        model = load_model(auto_class, saved_by_run(student_arguments, run.trained), config)
        if training.do_train and not run.trained:
            # One that was made of another BERT, or of the same one before it was fine-tuned, has other embeddings.
            begin_as_teacher(model, teacher, student_arguments, teaching.train_embeddings)
        inputs = inspect.signature(model.forward).parameters
        rows, validation, collator = masked_data(splits, tokenizer, inputs, data_arguments, training)
        make = partial(make_trainer, collator, rows, validation, tokenizer, model_arguments, teacher, teaching, spikes)
        run.claim(make, model, given)

    card = make_card(
        model,
        auto_class,
        training,
        documents["validation"],
        data_arguments,
        student_arguments,
        teaching,
        tokenizer,
    )
    trainer = run.train(
        make, model, card, [EpochCallback(collator)], content_numbers if data_arguments.streaming else None
    )
    results = {}
    if training.do_eval:
        results = trainer.evaluate() | evaluate_spikes(trainer, validation, spikes)
    run.finish(trainer, results)


def check_flags(
    data: DataArguments, teaching: DistillationArguments, training: TrainingArguments, given: Mapping[str, Any]
) -> None:
    """Refuses flags that say nothing here, and a command without a teacher."""
    if teaching.teacher_name_or_path is None:
        raise ValueError("--teacher_name_or_path is missing: the BERT to learn from, a folder or a name on the Hub.")
    data.check_stream(training)
    teaching.check_training(training)
    set_direction(training, given, {"loss": False, "hidden_error": False})


def make_trainer(
    collator: MaskingCollator,
    rows: Dataset | StreamPasses | None,
    validation: Dataset | OrderedStream,
    tokenizer: PreTrainedTokenizerBase,
    model_arguments: ModelArguments,
    teacher: Teacher,
    teaching: DistillationArguments,
    spikes: SpikeArguments,
    model: PreTrainedModel,
    training: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    trainer = DistillationTrainer(
        model=model,
        args=training,
        **teaching.options(teacher),
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=hidden_state_metrics,
        callbacks=list(callbacks),
    )
    calibrate_before_training(trainer, model_arguments.calibration_batches)
    fit_before_training(trainer, teaching.fit_tokens)
    if spikes.spike_batches:
        log_firing_rate(trainer)
    return trainer


def make_card(
    model: PreTrainedModel,
    auto_class: type,
    training: TrainingArguments,
    validation: Dataset | IterableDataset,
    data_arguments: DataArguments,
    student_arguments: ModelArguments,
    teaching: DistillationArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> RunCard:
    lessons = teaching.lessons(has_logits=auto_class is AutoModelForMaskedLM)
    learned = f"Learned the {lessons} of {teaching.teacher} from" if lessons else "Trained on"
    return RunCard(
        model=model,
        training=training,
        pipeline_tag="fill-mask" if auto_class is AutoModelForMaskedLM else "feature-extraction",
        auto_class=auto_class.__name__,
        training_data=f"{learned} the text of {data_arguments.sources}, in {data_arguments.rows_in_words}.",
        datasets=data_arguments.hub_datasets,
        metrics=METRICS,
        figures=FIGURES,
        dataset_for_results="the validation split",
        **data_arguments.origin_of_results(validation.split, METRICS),
        started_from=student_arguments.model_name_or_path,
        mask_token=tokenizer.mask_token,
    )


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
