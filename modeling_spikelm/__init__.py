"""SpikeLM for Transformers. Importing this package registers every class with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_spikelm import SpikeLMConfig
from .configuration_spikelm_bart import SpikeLMBartConfig
from .configuration_spikelm_llama import SpikeLMLlamaConfig
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
from .modeling_spikelm_bart import (
    SpikeLMBartForConditionalGeneration,
    SpikeLMBartModel,
    SpikeLMBartPreTrainedModel,
)
from .modeling_spikelm_llama import SpikeLMLlamaForCausalLM, SpikeLMLlamaModel, SpikeLMLlamaPreTrainedModel
from .neurons import SpikingNeurons
from .reference_checkpoint import convert_reference_state_dict

for _config_class, _auto_class, _model_class in (
    (SpikeLMConfig, AutoModel, SpikeLMModel),
    (SpikeLMConfig, AutoModelForPreTraining, SpikeLMForPreTraining),
    (SpikeLMConfig, AutoModelForMaskedLM, SpikeLMForMaskedLM),
    (SpikeLMConfig, AutoModelForSequenceClassification, SpikeLMForSequenceClassification),
    (SpikeLMConfig, AutoModelForTokenClassification, SpikeLMForTokenClassification),
    (SpikeLMConfig, AutoModelForQuestionAnswering, SpikeLMForQuestionAnswering),
    (SpikeLMConfig, AutoModelForMultipleChoice, SpikeLMForMultipleChoice),
    (SpikeLMBartConfig, AutoModel, SpikeLMBartModel),
    (SpikeLMBartConfig, AutoModelForMaskedLM, SpikeLMBartForConditionalGeneration),
    (SpikeLMBartConfig, AutoModelForSeq2SeqLM, SpikeLMBartForConditionalGeneration),
    (SpikeLMLlamaConfig, AutoModel, SpikeLMLlamaModel),
    (SpikeLMLlamaConfig, AutoModelForCausalLM, SpikeLMLlamaForCausalLM),
):
    _auto_class.register(_config_class, _model_class)
    _model_class.register_for_auto_class(_auto_class.__name__)
for _config_class in (SpikeLMConfig, SpikeLMBartConfig, SpikeLMLlamaConfig):
    AutoConfig.register(_config_class.model_type, _config_class)
    _config_class.register_for_auto_class()

__all__ = [
    "SpikeLMBartConfig",
    "SpikeLMBartForConditionalGeneration",
    "SpikeLMBartModel",
    "SpikeLMBartPreTrainedModel",
    "SpikeLMConfig",
    "SpikeLMForMaskedLM",
    "SpikeLMForMultipleChoice",
    "SpikeLMForPreTraining",
    "SpikeLMForPreTrainingOutput",
    "SpikeLMForQuestionAnswering",
    "SpikeLMForSequenceClassification",
    "SpikeLMForTokenClassification",
    "SpikeLMLlamaConfig",
    "SpikeLMLlamaForCausalLM",
    "SpikeLMLlamaModel",
    "SpikeLMLlamaPreTrainedModel",
    "SpikeLMModel",
    "SpikeLMPreTrainedModel",
    "SpikingNeurons",
    "convert_reference_state_dict",
]
