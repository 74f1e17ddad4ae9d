"""SpikeLM for Transformers. Importing this package registers every class with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_spikelm import SpikeLMConfig
from .modeling_spikelm import (
    SpikeLMForMaskedLM,
    SpikeLMForMultipleChoice,
    SpikeLMForPreTraining,
    SpikeLMForPreTrainingOutput,
    SpikeLMForQuestionAnswering,
    SpikeLMForSequenceClassification,
    SpikeLMForTokenClassification,
    SpikeLMModel,
    SpikeLMPreTrainedModel,
)
from .neurons import SpikingNeurons
from .reference_checkpoint import convert_reference_state_dict

AutoConfig.register("spikelm", SpikeLMConfig)
SpikeLMConfig.register_for_auto_class()
for _auto_class, _model_class in (
    (AutoModel, SpikeLMModel),
    (AutoModelForPreTraining, SpikeLMForPreTraining),
    (AutoModelForMaskedLM, SpikeLMForMaskedLM),
    (AutoModelForSequenceClassification, SpikeLMForSequenceClassification),
    (AutoModelForTokenClassification, SpikeLMForTokenClassification),
    (AutoModelForQuestionAnswering, SpikeLMForQuestionAnswering),
    (AutoModelForMultipleChoice, SpikeLMForMultipleChoice),
):
    _auto_class.register(SpikeLMConfig, _model_class)
    _model_class.register_for_auto_class(_auto_class.__name__)

__all__ = [
    "SpikeLMConfig",
    "SpikeLMForMaskedLM",
    "SpikeLMForMultipleChoice",
    "SpikeLMForPreTraining",
    "SpikeLMForPreTrainingOutput",
    "SpikeLMForQuestionAnswering",
    "SpikeLMForSequenceClassification",
    "SpikeLMForTokenClassification",
    "SpikeLMModel",
    "SpikeLMPreTrainedModel",
    "SpikingNeurons",
    "convert_reference_state_dict",
]
