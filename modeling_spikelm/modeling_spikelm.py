"""SpikeLM: a BERT encoder whose matrix products see ternary spikes (arXiv:2406.03287).

Shapes: B sequences of L tokens, T time steps, width H. The embeddings `(B, L, H)` are repeated T times, the encoder
works on `(T * B, L, H)`, time step major, and its output is averaged over the T steps. Module and parameter names are
BERT's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import mask_for_all_layers
from .compiled_layers import run_layers
from .configuration_spikelm import SpikeLMConfig
from .fast_paths import is_eager_on_cpu, is_transformed
from .int8_modules import make_embedding
from .layers import SpikeLMLayer, SpikeLMSelfAttention
from .packing import packing
from .pretrained import SpikingPreTrainedModel
from .quantization import QuantizedLayer
from .quick_layers import quick
from .steps import SpikeLMStepMean, check_boundaries, repeat_mask, repeat_steps


class SpikeLMEmbeddings(nn.Module):
    """BERT's embeddings, real-valued: `(B, L)` token ids to `(B, L, H)`."""

    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.word_embeddings = make_embedding(config, config.vocab_size, padding_idx=config.pad_token_id)
        self.position_embeddings = make_embedding(config, config.max_position_embeddings)
        self.token_type_embeddings = make_embedding(config, config.type_vocab_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        batch_size, length = inputs_embeds.shape[:2]
        if position_ids is None:
            if length > self.position_embeddings.num_embeddings:
                raise ValueError(
                    f"The input is {length} tokens long, but this model has "
                    f"max_position_embeddings={self.position_embeddings.num_embeddings}; truncate or split it."
                )
            position_ids = torch.arange(length, device=inputs_embeds.device).unsqueeze(0)
        if token_type_ids is None:
            token_type_ids = torch.zeros(batch_size, length, dtype=torch.long, device=inputs_embeds.device)
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return quick(self.dropout, self.LayerNorm(embeddings))


class SpikeLMEncoder(nn.Module):
    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.config = config
        layer_class = QuantizedLayer if config.int8_weights else SpikeLMLayer
        self.layer = nn.ModuleList([layer_class(config) for _ in range(config.num_hidden_layers)])
        self.step_mean = SpikeLMStepMean(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`(T * B, L, H)` to `(B, L, H)`, the mean over the T steps."""
        layers = [(layer, (attention_mask,)) for layer in self.layer]
        return run_layers(self.config, layers, hidden_states, self.step_mean, **kwargs)


class SpikeLMPooler(nn.Module):
    """`tanh(W x[:, 0] + b)`, `(B, L, H)` to `(B, H)`."""

    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


class SpikeLMPredictionHeadTransform(nn.Module):
    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = ACT2FN[config.mlm_transform_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.transform_act_fn(quick(self.dense, hidden_states)))


class SpikeLMLMPredictionHead(nn.Module):
    """Masked-LM logits `(..., vocab_size)`; the decoder shares the word embeddings' weight.

    Its bias is one parameter in one module, for FSDP2 refuses one that BERT's way of sharing puts into two. It has the
    name that BERT's checkpoints have for it: `bias`, or `decoder.bias` where `config.tie_word_embeddings` is False.
    """

    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        is_tied = config.tie_word_embeddings
        if is_tied and config.int8_embeddings:
            raise ValueError(
                "A masked-LM head shares its weight with the embeddings, which are int8 here (int8_embeddings=True). "
                "Load the encoder with AutoModel, call dequantize_weights() and save it: that takes such a head."
            )
        self.transform = SpikeLMPredictionHeadTransform(config)
        # Not called by `quick`: oneDNN copies the weight, which here is the largest, at the peak of memory.
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=not is_tied)
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(config.vocab_size)) if is_tied else None
        self.register_load_state_dict_pre_hook(_keep_one_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.decoder(self.transform(hidden_states))
        # In place: a second tensor of this size would be the largest of a training step.
        return logits if self.bias is None else logits.add_(self.bias)

    def set_decoder(self, decoder: nn.Linear) -> None:
        """Exchanges the decoder; a bias that it brings becomes the head's where the head keeps it."""
        if self.bias is not None and decoder.bias is not None:
            self.bias, decoder.bias = decoder.bias, None  # type: ignore[assignment]  # as in Linear(bias=False)
        self.decoder = decoder

    def resize_bias(self, size: int, with_mean: bool) -> None:
        """Cuts a bias that the head keeps to `size`, or appends its mean (or 0) to it."""
        if self.bias is None or len(self.bias) == size:
            return
        old = self.bias.detach()
        fill = old.float().mean().item() if with_mean else 0.0
        resized = nn.functional.pad(old, (0, size - len(old)), value=fill)
        self.bias = nn.Parameter(resized, requires_grad=self.bias.requires_grad)


def _keep_one_bias(head: SpikeLMLMPredictionHead, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """State dicts of BERT have the bias under both names; what counts there is the decoder's."""
    decoder_bias = state_dict.get(f"{prefix}decoder.bias")
    if decoder_bias is None:
        return
    if head.bias is None:
        state_dict.pop(f"{prefix}bias", None)
    else:
        state_dict[f"{prefix}bias"] = state_dict.pop(f"{prefix}decoder.bias")


class SpikeLMOnlyMLMHead(nn.Module):
    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.predictions = SpikeLMLMPredictionHead(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.predictions(hidden_states)


class SpikeLMPreTrainingHeads(SpikeLMOnlyMLMHead):
    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class SpikeLMPreTrainedModel(SpikingPreTrainedModel):
    """What every class of this family shares, beside what `SpikingPreTrainedModel` does: warm start is from BERT."""

    config: SpikeLMConfig
    base_model_prefix = "bert"
    _no_split_modules = ["SpikeLMEmbeddings", "SpikeLMLayer", "QuantizedLayer"]
    _can_record_outputs = {
        # The embeddings are the state before the first layer; both recorders see `(B, L, H)`, never the T copies.
        "hidden_states": [
            OutputRecorder(SpikeLMEmbeddings, capture_initial_hidden_state=False),
            OutputRecorder(
                SpikeLMStepMean, index=1, layer_name="encoder.step_mean", capture_initial_hidden_state=False
            ),
        ],
        "attentions": OutputRecorder(SpikeLMSelfAttention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SpikeLMLMPredictionHead) and module.bias is not None:
            init.zeros_(module.bias)


class SpikeLMModel(SpikeLMPreTrainedModel):
    """The encoder: `(B, L)` token ids to `(B, L, H)` hidden states and, with the pooler, a `(B, H)` output."""

    def __init__(self, config: SpikeLMConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = SpikeLMEmbeddings(config)
        self.encoder = SpikeLMEncoder(config)
        self.pooler = SpikeLMPooler(config) if add_pooling_layer else None
        self.post_init()

    def _build_options(self) -> dict[str, Any]:
        return {"add_pooling_layer": self.pooler is not None}

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value  # type: ignore[assignment]  # the base class says Module

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Args:
            input_ids: `(B, L)` token ids, or instead of them
            inputs_embeds: `(B, L, H)` word embeddings.
            attention_mask: `(B, L)`, 1 for tokens and 0 for padding; or a 4D mask as attention takes it.
            token_type_ids, position_ids: `(B, L)`; by default zeros, and 0 .. L-1.

        `hidden_states` `(B, L, H)` and `attentions` `(B, heads, L, L)`, if asked for, are means over the T steps.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, more tokens than position embeddings, or
                `cu_seq_lens_q` of several rows; or the configuration has other time steps by now than the model was
                built with.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        self.check_is_ready(self.encoder.step_mean.num_time_steps)
        steps = self.config.num_time_steps
        embeddings = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        check_boundaries(kwargs, embeddings.shape[0])
        hidden_states = repeat_steps(embeddings, steps)
        if attention_mask is not None:
            attention_mask = repeat_mask(attention_mask, steps)
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            # Where nothing is padding no mask is needed, but a device would have to be waited for to know, and
            # torch.vmap asks several rows at a time.
            allow_is_bidirectional_skip=attention_mask is None
            or (attention_mask.is_cpu and not is_transformed(hidden_states)),
        )
        mask = mask_for_all_layers(mask, hidden_states, self.config)
        with packing(hidden_states, self.config.num_time_steps):
            last_hidden_state = self.encoder(hidden_states, mask, **kwargs)
        pooled = self.pooler(last_hidden_state) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=pooled)


@dataclass
class SpikeLMForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss: scalar, masked-LM loss + next-sentence loss (each a mean), when both kinds of labels are given.
        prediction_logits: `(B, L, vocab_size)`, before the softmax.
        seq_relationship_logits: `(B, 2)`, before the softmax.
        hidden_states: `(B, L, H)` each, the mean over T: the embeddings, then every layer's output.
        attentions: `(B, heads, L, L)` each, the mean over T.
    """

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    seq_relationship_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class SpikeLMWithMLMHead(SpikeLMPreTrainedModel):
    """A SpikeLM whose `cls.predictions.decoder` is tied to the word embeddings."""

    cls: "SpikeLMOnlyMLMHead"

    _tied_weights_keys = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    # BERT's second name for the bias, or, where nothing is tied, a parameter that BERT has and does not use.
    _keys_to_ignore_on_load_unexpected = [r"^cls\.predictions\.(decoder\.)?bias$"]

    def predict_tokens(
        self, hidden_states: torch.Tensor, labels: torch.Tensor | None, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits `(B, L, vocab_size)` and labels `(B, L)`.

        In training mode, with `(B, C)` positions or `config.sparse_prediction`, only those at the positions, or without
        any and on a CPU at all that have a label: `(N, vocab_size)` and `(N,)`.
        """
        is_sparse = positions is not None or self.config.sparse_prediction
        if labels is not None and self.training and is_sparse:
            if positions is None or is_eager_on_cpu(labels):
                # A device would have to be asked how many there are.
                is_predicted = labels != -100
                hidden_states, labels = hidden_states[is_predicted], labels[is_predicted]
            else:
                hidden_states = hidden_states.take_along_dim(positions.unsqueeze(-1), 1).flatten(0, 1)
                labels = labels.take_along_dim(positions, 1).flatten()
        return self.cls(hidden_states), labels

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.set_decoder(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.cls.predictions.resize_bias(embeddings.num_embeddings, mean_resizing)
        return embeddings


class SpikeLMForPreTraining(SpikeLMWithMLMHead):
    """BERT's two pre-training objectives: masked tokens and next sentence."""

    # The next-sentence loss is a mean over the batch, so the Trainer has to average over accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.bert = SpikeLMModel(config)
        self.cls: SpikeLMPreTrainingHeads = SpikeLMPreTrainingHeads(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        masked_lm_positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SpikeLMForPreTrainingOutput:
        """
        Args:
            labels: `(B, L)` token ids to predict, -100 where nothing is.
            next_sentence_label: `(B,)`, 0 where the second segment follows the first, 1 where it is a random one.
            masked_lm_positions: `(B, C)`, optional: distinct positions in each row, every one that has a label among
                them. In training mode it asks for logits there alone, `(N, vocab_size)`, as `config.sparse_prediction`
                does, but with an N that is known beforehand: torch.compile gets by without a graph break, a GPU is not
                waited for.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        prediction_logits, labels = self.predict_tokens(outputs.last_hidden_state, labels, masked_lm_positions)
        seq_relationship_logits = self.cls.seq_relationship(outputs.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            scores = prediction_logits.float().view(-1, self.config.vocab_size)
            loss = nn.functional.cross_entropy(scores, labels.view(-1))
            loss = loss + nn.functional.cross_entropy(seq_relationship_logits.float(), next_sentence_label.flatten())
        return SpikeLMForPreTrainingOutput(
            loss=loss,
            prediction_logits=prediction_logits,
            seq_relationship_logits=seq_relationship_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SpikeLMForMaskedLM(SpikeLMWithMLMHead):
    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.bert = SpikeLMModel(config, add_pooling_layer=False)
        self.cls = SpikeLMOnlyMLMHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        masked_lm_positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MaskedLMOutput:
        """
        Args:
            labels: `(B, L)` token ids to predict, -100 where nothing is.
            masked_lm_positions: `(B, C)` as for `SpikeLMForPreTraining`.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits, labels = self.predict_tokens(outputs.last_hidden_state, labels, masked_lm_positions)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _classifier_dropout(config: SpikeLMConfig) -> nn.Dropout:
    return nn.Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


class SpikeLMForSequenceClassification(SpikeLMPreTrainedModel):
    # The loss is a mean over the batch, so the Trainer has to average over accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.bert = SpikeLMModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SequenceClassifierOutput:
        """
        Args:
            labels: `(B,)` class numbers, `(B,)` or `(B, num_labels)` floats for a regression, `(B, num_labels)` floats
                0 or 1 for several labels at once; `config.problem_type` decides, or if it is None the labels' form.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SpikeLMForTokenClassification(SpikeLMPreTrainedModel):
    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.bert = SpikeLMModel(config, add_pooling_layer=False)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TokenClassifierOutput:
        """
        Args:
            labels: `(B, L)` class numbers, -100 where a token has none.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SpikeLMForQuestionAnswering(SpikeLMPreTrainedModel):
    # The loss is a mean over the batch, so the Trainer has to average over accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.bert = SpikeLMModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | QuestionAnsweringModelOutput:
        """
        Args:
            start_positions, end_positions: `(B,)` first and last token of the answer; positions beyond L are ignored.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SpikeLMForMultipleChoice(SpikeLMPreTrainedModel):
    # The loss is a mean over the batch, so the Trainer has to average over accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.bert = SpikeLMModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MultipleChoiceModelOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids, position_ids: `(B, choices, L)`.
            inputs_embeds: `(B, choices, L, H)`.
            labels: `(B,)` number of the right choice.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        num_choices = given.shape[1]

        def flatten(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.flatten(0, 1)

        outputs = self.bert(
            flatten(input_ids),
            attention_mask=flatten(attention_mask),
            token_type_ids=flatten(token_type_ids),
            position_ids=flatten(position_ids),
            inputs_embeds=flatten(inputs_embeds),
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output)).unflatten(0, (-1, num_choices)).squeeze(-1)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "SpikeLMForMaskedLM",
    "SpikeLMForMultipleChoice",
    "SpikeLMForPreTraining",
    "SpikeLMForPreTrainingOutput",
    "SpikeLMForQuestionAnswering",
    "SpikeLMForSequenceClassification",
    "SpikeLMForTokenClassification",
    "SpikeLMModel",
    "SpikeLMPreTrainedModel",
]
