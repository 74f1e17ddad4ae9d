"""The model card of a run: the task it was fine-tuned on, and its scores as the Hub names them."""

from transformers import PreTrainedModel

from experiment.model_card import RunCard
from glue_tasks.arguments import GlueTrainingArguments
from glue_tasks.loading import HUB_DATASET
from glue_tasks.own_data import OwnTask
from glue_tasks.preparing import TaskData
from glue_tasks.scoring import metric_key
from glue_tasks.unlabelled import UNLABELLED
from spike_metrics.evaluation import FIGURES

HUB_METRICS = {"pearson": "pearsonr", "macro_f1": "f1", "micro_f1": "f1", "subset_accuracy": "accuracy"}


def make_card(data: TaskData, run: GlueTrainingArguments, model: PreTrainedModel) -> RunCard:
    """The card of a model that is trained on a task, still without its scores."""
    task = data.task
    examples = f"{len(data.splits.get('train', ()))} examples"
    if UNLABELLED in data.splits:
        examples += f", without labels, and {len(data.splits[UNLABELLED])} other texts"
    chosen_by = str(run.metric_for_best_model).removeprefix("eval_")
    kept = f"the best by {chosen_by} on the validation set" if run.load_best_model_at_end else "the last"
    shown = {
        metric_key(task, split, metric).removeprefix("eval_"): (metric, split)
        for split in task.validation_splits
        for metric in task.metrics
    }
    return RunCard(
        model=model,
        training=run,
        pipeline_tag="text-classification",
        auto_class="AutoModelForSequenceClassification",
        training_data=f"Fine-tuned on {task.title} ({examples}); the epoch kept is {kept}.",
        dataset_for_results=task.validation_title,
        datasets=[HUB_DATASET] if task.hub_config else [],
        figures={
            metric_key(task, split, name).removeprefix("eval_"): (f"{column}: {title}", form)
            for split, column in zip(task.validation_splits, task.columns, strict=True)
            for name, (title, form) in FIGURES.items()
        },
        metrics={key: HUB_METRICS.get(metric, metric) for key, (metric, _) in shown.items()},
        results_dataset=HUB_DATASET if task.hub_config else None,
        results_config=task.hub_config,
        results_splits={key: split for key, (_, split) in shown.items()},
        started_from=data.model.model_name_or_path,
        language=None if isinstance(task, OwnTask) else "en",
    )
