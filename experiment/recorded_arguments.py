"""Which arguments are part of a run's result: run.json records these, and a run is resumed only where they are equal.

What decides the sequence of batches, learning rates and optimizer states, or the figures at the end, is recorded as
what it is: the sequences of a step, not how they are split into devices, accumulation and processes (although a
student's loss is a mean over the batch of a device). Where a run lies, how it is watched and how it is spread over
machines is not recorded. The tables below say of every field which it is; a test holds that no field of the installed
transformers and accelerate is missing. A field in no table is recorded.
"""

import json
import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from accelerate import ParallelismConfig
from transformers import TrainingArguments

# For people, and for the test, which asks that somebody has looked at every new field.
RECORDED = frozenset(
    """
    model_name_or_path model_type config_name config_overrides tokenizer_name model_revision trust_remote_code
    attn_implementation calibration_batches

    dataset_name dataset_config_name dataset_weights dataset_revision rows_per_document train_file validation_file
    text_column_name train_split_name validation_split_name validation_split_percentage max_seq_length objective
    one_document_per_row mlm_probability streaming shuffle_buffer_size max_train_samples max_eval_samples
    pad_to_multiple_of vocab_size lowercase

    teacher_name_or_path teacher_revision hidden_weight sentence_weight first_token_weight logits_weight
    attention_weight value_relation_weight label_weight temperature train_embeddings fit_tokens

    test_file unlabelled_file text_pair_column_name label_column_name problem_type ignore_mismatched_sizes
    task_name data_dir pad_to_max_length task_epochs report_epoch num_seeds max_predict_samples spike_batches

    summary_column_name source_lang target_lang max_source_length max_target_length
    predict_with_generate generation_max_length generation_num_beams generation_min_length generation_length_penalty

    do_train do_eval do_predict seed data_seed full_determinism
    num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    label_smoothing_factor neftune_noise_alpha train_sampling_strategy length_column_name
    load_best_model_at_end metric_for_best_model greater_is_better
    """.split()
)

# Recorded too, for a reason that is not obvious.
RECORDED_BECAUSE = {
    "average_tokens_across_devices": "whether a token or a process has the same weight in the loss",
    "dataloader_drop_last": "whether an epoch's rest is left out or filled up to a whole step",
    "eval_strategy": "beginning an evaluation draws from the random numbers that dropout uses next",
    "eval_steps": "likewise; and they decide which models compete for the best",
    "eval_delay": "likewise",
    "eval_on_start": "likewise",
    "per_device_eval_batch_size": "firing rate and energy are counted on --spike_batches of them",
    "bf16_full_eval": "rounds the weights that the last evaluation is of",
    "fp16_full_eval": "likewise",
    "tf32": "rounds every product",
    "use_cpu": "another kind of device draws other dropout from the same seed",
    "use_liger_kernel": "other kernels round otherwise",
    "liger_kernel_config": "likewise",
    "activation_checkpointing_kwargs": "preserve_rng_state=False would draw other dropout in the backward pass",
}

# Not as they are, but as the value that counts.
RECORDED_AS = {
    "per_device_train_batch_size": "sequences_per_step",
    "gradient_accumulation_steps": "sequences_per_step",
    "parallelism_config": "sequences_per_step",
    "accelerator_config.split_batches": "sequences_per_step",
    "accelerator_config.gradient_accumulation_kwargs": "sequences_per_step",
    "bf16": "mixed_precision",
    "fp16": "mixed_precision",
    "torch_compile": "compiler",
    "torch_compile_backend": "compiler",
    "torch_compile_mode": "compiler",
    "deepspeed": "deepspeed_config",
    "fsdp": "optimizer_sharding",
    "save_strategy": "saved_for_best",
    "save_steps": "saved_for_best",
}

NOT_RECORDED = {
    "output_dir": "where the run lies",
    "cache_dir": "where what comes from the Hub lies",
    "overwrite_output_dir": "what to do with an earlier run",
    "overwrite_cache": "the same data, prepared again",
    "preprocessing_num_workers": "rows are the same for any number",
    "prepare_only": "no run",
    "loss_diagnostics": "what is logged",
    "resume_from_checkpoint": "where to go on",
    # What the scripts set themselves, see `arguments.NOT_TAKEN`.
    "remove_unused_columns": "set by the scripts",
    "logging_nan_inf_filter": "set by the scripts",
    "prediction_loss_only": "set by the scripts",
    "include_for_metrics": "set by the scripts",
    "batch_eval_metrics": "set by the scripts",
    "eval_do_concat_batches": "set by the scripts",
    "label_names": "set by the scripts",
    "enable_jit_checkpoint": "set by the scripts",
    "sortish_sampler": "set by the scripts",
    "generation_config": "set by the scripts",
    # How the run is watched.
    "logging_strategy": "what is logged",
    "logging_steps": "what is logged (it is the default of eval_steps, which is recorded by its value)",
    "logging_first_step": "what is logged",
    "log_on_each_node": "what is logged",
    "log_level": "what is logged",
    "log_level_replica": "what is logged",
    "include_num_input_tokens_seen": "what is logged",
    "skip_memory_metrics": "what is logged",
    "disable_tqdm": "what is shown",
    "debug": "looks for infinities and changes none",
    "report_to": "who is told",
    "run_name": "who is told",
    "project": "who is told",
    "trackio_space_id": "who is told",
    "trackio_bucket_id": "who is told",
    "trackio_static_space_id": "who is told",
    # What is kept and where.
    "save_total_limit": "how many checkpoints are kept; the best always is",
    "save_on_each_node": "who writes",
    "push_to_hub": "where the result goes",
    "hub_token": "where the result goes",
    "hub_private_repo": "where the result goes",
    "hub_model_id": "where the result goes",
    "hub_strategy": "where the result goes",
    "hub_always_push": "where the result goes",
    "hub_revision": "where the result goes",
    "restore_callback_states_from_checkpoint": "no callback of the scripts has a state",
    # How the same batches get to the same model.
    "dataloader_num_workers": "the order of rows is the same for any number, that of a stream too",
    "dataloader_pin_memory": "how batches get to the device",
    "dataloader_persistent_workers": "how batches get to the device",
    "dataloader_prefetch_factor": "how batches get to the device",
    "dataloader_multiprocessing_context": "how workers are started",
    "accelerator_config.dispatch_batches": "which process reads the rows, not which rows",
    "accelerator_config.even_batches": "every step is whole, so there is nothing to make even",
    "accelerator_config.non_blocking": "how batches get to the device",
    "accelerator_config.use_configured_state": "there is none before the arguments",
    "eval_accumulation_steps": "where predictions wait",
    "eval_use_gather_object": "how predictions are collected",
    "torch_empty_cache_steps": "when memory is given back",
    "use_cache": "keys kept for generation, which training does not do",
    # The same numbers, computed once more.
    "activation_checkpointing": "the same numbers, computed twice",
    "gradient_checkpointing": "the earlier name of activation_checkpointing",
    "gradient_checkpointing_kwargs": "the earlier name of activation_checkpointing_kwargs",
    # How processes find each other and sum.
    "local_rank": "which process this is",
    "ddp_find_unused_parameters": "how gradients are summed",
    "ddp_bucket_cap_mb": "how gradients are summed",
    "ddp_broadcast_buffers": "amplitudes are equal on all processes by themselves",
    "ddp_static_graph": "how gradients are summed",
    "ddp_backend": "how gradients are summed",
    "ddp_timeout": "how long processes wait",
    "fsdp_config": "how weights are sharded",
}

# A value that would make a resumed run another one, what it would do, and what to do instead.
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "save_only_model": (
        bool,
        "saves checkpoints that nothing can be resumed from: optimizer and schedule would begin anew. Leave it out and "
        "save space with --save_total_limit 1; the finished model in --output_dir has no optimizer beside it.",
    ),
    "ignore_data_skip": (
        bool,
        "makes a resumed run train on the first rows again and leave out the last. Leave it out.",
    ),
    "auto_find_batch_size": (
        bool,
        "changes the sequences of a step and begins anew with weights that are trained already. Where memory is short, "
        "halve --per_device_train_batch_size and double --gradient_accumulation_steps: every step keeps its rows.",
    ),
    "dataloader_in_order": (
        lambda value: not value,
        "gives batches in another order every time, so that no run can be resumed. Leave it out.",
    ),
    "train_sampling_strategy": (
        lambda value: value == "batch_rebalance",
        "draws an order that a resumed run cannot draw again. Take group_by_length, or random, the default.",
    ),
    "accelerator_config.use_seedable_sampler": (
        lambda value: not value,
        "draws an order that a resumed run cannot draw again. Leave it out.",
    ),
}

# Sections of a DeepSpeed file that are about memory, logs, or what the arguments say already (DeepSpeed's own sizes of
# a batch have to agree with them). Every other one is recorded: optimizer, scheduler, gradient_clipping, bf16, ...
DEEPSPEED_NOT_RECORDED = frozenset(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps
    zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer activation_checkpointing aio checkpoint
    steps_per_print wall_clock_breakdown dump_state flops_profiler comms_logger tensorboard wandb csv_monitor
    """.split()
)

# What a refusal says beside a name that is not a flag.
EXPLANATIONS = {
    "sequences_per_step": "--per_device_train_batch_size x --gradient_accumulation_steps x processes",
    "optimizer_sharding": "the optimizer's state is saved in another form",
    "saved_for_best": "--save_strategy and --save_steps decide which models compete for the best",
}


def recorded_arguments(*arguments: Any) -> dict[str, Any]:
    """The fields of argument dataclasses that decide what a run computes, as JSON values."""
    values: dict[str, Any] = {}
    for group in arguments:
        as_dict = group.to_dict() if isinstance(group, TrainingArguments) else vars(group)
        for entry in fields(group):
            is_left_out = entry.name in NOT_RECORDED or entry.name in RECORDED_AS or entry.name == "accelerator_config"
            if entry.init and not is_left_out:
                values[entry.name] = as_dict.get(entry.name)
        if isinstance(group, TrainingArguments):
            values |= _derived(group)
    return json.loads(json.dumps(values, default=str))


def refuse_inexact_resuming(training: TrainingArguments) -> None:
    """Refuses arguments with which a resumed run would silently be another one.

    Raises:
        ValueError: names the first of them and says what to use instead.
    """
    for name, (is_refused, reason) in REFUSED.items():
        argument, _, entry = name.partition(".")
        value = getattr(training, argument)
        if entry:
            value = getattr(value, entry)
        if is_refused(value):
            given = f'--{argument} {{"{entry}": {json.dumps(value)}}}' if entry else f"--{argument} {value}"
            raise ValueError(f"{given} {reason}")


def sequences_per_step(training: TrainingArguments) -> int:
    """How many sequences an optimizer step sees, all accumulation steps and processes together.

    Args:
        training: processes that share a sequence or a layer (tensor, context and sequence parallelism) count once; with
            accelerate's `split_batches` the batch of a device is that of all of them.
    """
    accelerator = training.accelerator_config
    # One of the two is 1: the Trainer moves accelerate's number to its own.
    accumulation = training.gradient_accumulation_steps
    accumulation *= (accelerator.gradient_accumulation_kwargs or {}).get("num_steps", 1)
    processes = 1 if accelerator.split_batches else training.world_size // _processes_per_sequence(training)
    return training.train_batch_size * accumulation * processes


def _processes_per_sequence(training: TrainingArguments) -> int:
    parallelism = training.parallelism_config
    if parallelism is None and _is_switched_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        parallelism = ParallelismConfig()  # from a launch file
    return parallelism.non_data_parallel_size if parallelism else 1


def _derived(training: TrainingArguments) -> dict[str, Any]:
    """The values of `RECORDED_AS`."""
    deepspeed = training.deepspeed_plugin
    is_fsdp = training.fsdp or _is_switched_on("ACCELERATE_USE_FSDP")
    sections = deepspeed.hf_ds_config.config.items() if deepspeed else ()
    return {
        "sequences_per_step": sequences_per_step(training),
        "mixed_precision": training.mixed_precision,
        "compiler": _compiler(training),
        "deepspeed_config": {name: value for name, value in sections if name not in DEEPSPEED_NOT_RECORDED} or None,
        # ZeRO's optimizer states are read by as many processes as wrote them.
        "optimizer_sharding": f"DeepSpeed, {training.world_size} processes"
        if deepspeed
        else "FSDP"
        if is_fsdp
        else None,
        "saved_for_best": [training.save_strategy, training.save_steps] if training.load_best_model_at_end else None,
    }


def _compiler(training: TrainingArguments) -> list[str | None] | None:
    """Backend and mode of torch.compile, by a flag or a launch file: it rounds otherwise and draws other dropout."""
    if training.torch_compile:
        return [training.torch_compile_backend, training.torch_compile_mode]
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    return None if backend == "no" else [backend, os.environ.get("ACCELERATE_DYNAMO_MODE")]


def _is_switched_on(variable: str) -> bool:
    """As accelerate reads its environment."""
    return os.environ.get(variable, "false").lower() == "true"
