"""Fills the template model_card.md from a run."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel, TrainerState, TrainingArguments

from .models import is_spiking
from .precision import describe_precision
from .recorded_arguments import sequences_per_step

TEMPLATE = Path(__file__).resolve().parent.parent / "model_card.md"
# What the card calls a model of each of our families.
FORMS = {
    "spikelm": "a BERT-shaped encoder",
    "spikelm_bart": "an encoder and a decoder in BART's form",
    "spikelm_llama": "a causal decoder in Llama's form",
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class RunCard:
    """The card of one run: what is known when it starts, and `write` for what is known later.

    Args:
        model: the model that is trained.
        training: the Trainer's arguments.
        pipeline_tag: the Hub's name of the task, "fill-mask" or "text-classification" for instance.
        auto_class: the Auto class that loads the model.
        training_data: one sentence on the data, for people.
        datasets: Hub names of the data sets.
        metrics: names of the metrics, from result key (without "eval_") to the Hub's metric type.
        figures: title and format of what is shown besides, firing rate and energy, for result keys (without "eval_").
        dataset_for_results: name of the data that the results are on, for people.
        results_dataset: its name on the Hub, if it is there.
        results_config: the configuration of that.
        results_splits: the splits of that, for the keys of `metrics`.
        started_from: the checkpoint the model started from, if any.
        mask_token: what stands for a masked word.
        language: code of the data's language, where it is known.
    """

    model: PreTrainedModel
    training: TrainingArguments
    pipeline_tag: str
    auto_class: str
    training_data: str
    dataset_for_results: str
    datasets: list[str] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    figures: dict[str, tuple[str, str]] = field(default_factory=dict)
    results_dataset: str | None = None
    results_config: str | None = None
    results_splits: dict[str, str] = field(default_factory=dict)
    started_from: str | None = None
    mask_token: str = "[MASK]"
    language: str | None = None

    @property
    def model_id(self) -> str:
        """The Hub id the model goes to, or the name of the output folder."""
        return self.training.hub_model_id or Path(self.training.output_dir).name

    def write(self, folder: str | Path, results: dict[str, float], state: TrainerState | None = None) -> Path:
        """Writes README.md into a checkpoint's folder.

        Args:
            folder: the checkpoint.
            results: evaluation results, keys with or without "eval_"; empty before the first evaluation.
            state: the Trainer's state at this checkpoint.

        Returns:
            The card's path.
        """
        results = {name.removeprefix("eval_"): value for name, value in results.items()}
        model_name = self.model_id.rsplit("/", 1)[-1]
        config = self.model.config
        spiking = is_spiking(config)
        data = ModelCardData(
            language=self.language,
            # What began with another's weights has the licence of those, which a Llama's need not be this one.
            license="apache-2.0" if spiking and self.started_from is None else None,
            library_name="transformers",
            pipeline_tag=self.pipeline_tag,
            tags=["spikelm", "spiking-neural-network", "custom_code"] if spiking else [config.model_type],
            datasets=self.datasets or None,
            metrics=sorted(set(self.metrics.values())) or None,
            base_model=self._base_model(),
            model_name=model_name,
            eval_results=[
                EvalResult(
                    task_type=self.pipeline_tag,
                    dataset_type=self.results_dataset or "custom",
                    dataset_name=self.dataset_for_results,
                    dataset_config=self.results_config,
                    dataset_split=self.results_splits.get(name),
                    metric_type=metric,
                    metric_name=name,
                    metric_value=round(float(results[name]), 4),
                )
                for name, metric in self.metrics.items()
                if name in results
            ]
            or None,
        )
        shown = {name: f"{value:.4f}" for name, value in results.items() if name in self.metrics}
        card = ModelCard.from_template(
            data,
            template_path=str(TEMPLATE),
            model_name=model_name,
            model_id=self.model_id,
            spiking=spiking,
            form=FORMS.get(config.model_type),
            layers=_layers(config),
            config=config,
            auto_class=self.auto_class,
            pipeline_tag=self.pipeline_tag,
            mask_token=self.mask_token,
            # FSDP2 gives a model a class of its own while it trains.
            architecture=type(self.model).__name__.removeprefix("FSDP"),
            num_parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            started_from=shown_name(self.started_from),
            training_data=self.training_data,
            language=self.language,
            hyperparameters=self._hyperparameters(),
            progress=_progress(state),
            results=shown,
            figures={
                title: format(results[name], form) for name, (title, form) in self.figures.items() if name in results
            },
            results_heading=f"On {self.dataset_for_results}:",
        )
        path = Path(folder) / "README.md"
        card.save(path)
        return path

    def _base_model(self) -> str | None:
        # The Hub refuses a card whose base model is a path.
        name = self.started_from
        return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None

    def _hyperparameters(self) -> dict[str, Any]:
        training = self.training
        scheduler = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
        return {
            "learning rate, schedule": f"{training.learning_rate}, {scheduler}, {training.warmup_steps} warm-up",
            "sequences per step": sequences_per_step(training),
            "weight decay": training.weight_decay,
            "gradient clipping": training.max_grad_norm or "none",
            "seed": training.seed,
            "precision": describe_precision(training),
        }


def shown_name(name: str | None) -> str | None:
    """A Hub id as it is, a folder by its name: the rest of its path is nobody's business."""
    return Path(name).resolve().name if name and Path(name).exists() else name


def _layers(config: PreTrainedConfig) -> str:
    """How many layers, "4", or of an encoder and a decoder "4 + 4"."""
    decoder = getattr(config, "decoder_layers", None)
    return f"{config.num_hidden_layers} + {decoder}" if decoder else str(config.num_hidden_layers)


def _progress(state: TrainerState | None) -> dict[str, Any]:
    if state is None:
        return {}
    return {"steps": state.global_step, "epochs": f"{state.epoch or 0:.2f}"}
