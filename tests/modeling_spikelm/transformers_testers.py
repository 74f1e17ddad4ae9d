"""Every class of ours, given to transformers' own tests of a model; for test_transformers_tests.py, which fetches them.

What they want of a model's author is a maker of small configurations and batches, and the classes by their tasks.
"""

import copy
import os
import unittest

import torch
from transformers.models.auto import modeling_auto
from transformers_tests import test_modeling_common as common
from transformers_tests.test_configuration_common import ConfigTester

from modeling_spikelm import (
    SpikeLMBartConfig,
    SpikeLMBartForConditionalGeneration,
    SpikeLMBartModel,
    SpikeLMConfig,
    SpikeLMForMaskedLM,
    SpikeLMForMultipleChoice,
    SpikeLMForPreTraining,
    SpikeLMForQuestionAnswering,
    SpikeLMForSequenceClassification,
    SpikeLMForTokenClassification,
    SpikeLMLlamaConfig,
    SpikeLMLlamaForCausalLM,
    SpikeLMLlamaModel,
    SpikeLMModel,
)

NEURONS = {"num_time_steps": int(os.environ["NUM_TIME_STEPS"])}
BATCH, LENGTH, VOCABULARY = 13, 7, 99

# By these the tests know which labels a class takes.
for mapping, model_class in (
    ("MODEL", SpikeLMModel),
    ("MODEL_FOR_MASKED_LM", SpikeLMForMaskedLM),
    ("MODEL_FOR_PRETRAINING", SpikeLMForPreTraining),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION", SpikeLMForSequenceClassification),
    ("MODEL_FOR_TOKEN_CLASSIFICATION", SpikeLMForTokenClassification),
    ("MODEL_FOR_QUESTION_ANSWERING", SpikeLMForQuestionAnswering),
    ("MODEL_FOR_MULTIPLE_CHOICE", SpikeLMForMultipleChoice),
    ("MODEL", SpikeLMBartModel),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", SpikeLMBartForConditionalGeneration),
    ("MODEL", SpikeLMLlamaModel),
    ("MODEL_FOR_CAUSAL_LM", SpikeLMLlamaForCausalLM),
):
    getattr(modeling_auto, f"{mapping}_MAPPING_NAMES")[model_class.config_class.model_type] = model_class.__name__


class ModelTester:
    """
    Args:
        config: a small one.
        vocabularies: of each input of token ids, how many there are.
    """

    batch_size, num_choices, is_training = BATCH, 4, True
    seq_length = encoder_seq_length = decoder_seq_length = key_length = LENGTH

    def __init__(self, config, vocabularies):
        self.config, self.vocabularies = config, vocabularies
        self.num_hidden_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        self.num_attention_heads = config.num_attention_heads

    def get_config(self):
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        inputs = {name: common.ids_tensor([BATCH, LENGTH], size) for name, size in self.vocabularies.items()}
        return self.get_config(), inputs | {"attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}


def calibrated_with_large_norms(model):
    """A model as tests of equal outputs want it: what is not calibrated depends on what else is in the batch."""
    with_large_norms(model)
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % VOCABULARY
    has_choices = isinstance(model, SpikeLMForMultipleChoice)
    model.calibrate({"input_ids": ids[:, None].expand(-1, ModelTester.num_choices, -1) if has_choices else ids})


with_large_norms = common.set_model_for_less_flaky_test
common.set_model_for_less_flaky_test = calibrated_with_large_norms


class ModelTests(common.ModelTesterMixin):
    pipeline_model_mapping: dict = {}

    def test_config(self):
        self.config_tester.run_common_tests()


class SpikeLMTest(ModelTests, unittest.TestCase):
    all_model_classes = (
        SpikeLMModel,
        SpikeLMForMaskedLM,
        SpikeLMForPreTraining,
        SpikeLMForSequenceClassification,
        SpikeLMForTokenClassification,
        SpikeLMForQuestionAnswering,
        SpikeLMForMultipleChoice,
    )

    def setUp(self):
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = SpikeLMConfig(intermediate_size=37, type_vocab_size=16, **sizes, **NEURONS)
        self.model_tester = ModelTester(config, {"input_ids": VOCABULARY, "token_type_ids": 16})
        self.config_tester = ConfigTester(self, config_class=SpikeLMConfig, hidden_size=36)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is SpikeLMForPreTraining:
            inputs["labels"] = torch.zeros(BATCH, LENGTH, dtype=torch.long)
            inputs["next_sentence_label"] = torch.zeros(BATCH, dtype=torch.long)
        return inputs


class SpikeLMBartTest(ModelTests, unittest.TestCase):
    all_model_classes = (SpikeLMBartModel, SpikeLMBartForConditionalGeneration)
    is_encoder_decoder = True

    def setUp(self):
        layers = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        widths = {"d_model": 16, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 50}
        config = SpikeLMBartConfig(vocab_size=VOCABULARY, forced_eos_token_id=None, **layers, **widths, **NEURONS)
        self.model_tester = ModelTester(config, {"input_ids": VOCABULARY, "decoder_input_ids": VOCABULARY})
        self.config_tester = ConfigTester(self, config_class=SpikeLMBartConfig)


class SpikeLMLlamaTest(ModelTests, unittest.TestCase):
    all_model_classes = (SpikeLMLlamaModel, SpikeLMLlamaForCausalLM)

    def setUp(self):
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = SpikeLMLlamaConfig(num_key_value_heads=2, intermediate_size=37, **sizes, **NEURONS)
        self.model_tester = ModelTester(config, {"input_ids": VOCABULARY})
        self.config_tester = ConfigTester(self, config_class=SpikeLMLlamaConfig, hidden_size=64)
