"""Which teachers are taken, with which head, and that they stay what they are."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer

from configuration_spikelm import SpikeLMConfig
from distillation.arguments import DistillationArguments
from distillation.teacher import load_teacher
from tests.distillation.conftest import SIZES

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@pytest.mark.parametrize(
    "saved, is_classifier, kind",
    [("tokens", False, "tokens"), ("", False, ""), ("labels", True, "labels"), ("labels", False, "")],
)
def test_the_head_that_the_checkpoint_has_says_what_is_taught(save_teacher, saved, is_classifier, kind):
    teacher = load_teacher(save_teacher(saved), SpikeLMConfig(**SIZES), is_classifier=is_classifier)
    assert teacher.kind == kind


def test_a_teacher_is_frozen_and_never_drops(save_teacher):
    teacher = load_teacher(save_teacher("tokens"), SpikeLMConfig(**SIZES), is_classifier=False).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    batch = {"input_ids": torch.tensor([[2, 5, 7]])}
    assert torch.equal(teacher(**batch).last_hidden_state, teacher(**batch).last_hidden_state)


def test_a_teacher_is_given_all_that_a_bert_reads(save_teacher):
    teacher = load_teacher(save_teacher(""), SpikeLMConfig(**SIZES), is_classifier=False)
    ids = torch.tensor([[2, 5, 3, 7, 3, 0]])
    batch = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 0]]),
    }
    wanted = teacher.model(**batch).last_hidden_state
    assert torch.equal(teacher(**batch, labels=ids).last_hidden_state, wanted)
    for name in ("attention_mask", "token_type_ids"):
        assert not torch.allclose(teacher.model(**batch | {name: None}).last_hidden_state, wanted)


def test_a_teacher_in_half_precision_is_loaded_in_float32(save_teacher, tmp_path):
    from transformers import AutoModel

    AutoModel.from_pretrained(save_teacher("")).bfloat16().save_pretrained(tmp_path / "half")
    teacher = load_teacher(str(tmp_path / "half"), SpikeLMConfig(**SIZES), is_classifier=False)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}


def test_a_damaged_teacher_is_refused_in_one_line(save_teacher):
    folder = save_teacher("tokens")
    weights = Path(folder, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ValueError, match="The weights of --teacher_name_or_path .* are damaged"):
        load_teacher(folder, SpikeLMConfig(**SIZES), is_classifier=False)


def test_a_teacher_that_lacks_what_it_is_read_with_is_refused(save_teacher):
    folder = Path(save_teacher("labels"))
    weights = load_file(folder / "model.safetensors")

    def without(part: str) -> None:
        kept = {name: value for name, value in weights.items() if part not in name}
        assert len(kept) < len(weights)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    for part in (".layer.1.", ".word_embeddings."):
        without(part)
        for is_classifier in (True, False):
            with pytest.raises(ValueError, match=f"are not those of a model of type 'bert'.*{re.escape(part)}"):
                load_teacher(str(folder), SpikeLMConfig(**SIZES), is_classifier=is_classifier)
    without(".pooler.")
    with pytest.raises(ValueError, match="are not those of a model of type 'bert'.*pooler"):
        load_teacher(str(folder), SpikeLMConfig(**SIZES), is_classifier=True)
    assert load_teacher(str(folder), SpikeLMConfig(**SIZES), is_classifier=False).kind == ""


def test_a_teacher_whose_weights_or_attention_cannot_be_had_is_refused_in_one_line(save_teacher, monkeypatch):
    folder = save_teacher("tokens")
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match="--teacher_name_or_path .* cannot be had as asked for"):
        load_teacher(folder, SpikeLMConfig(**SIZES), is_classifier=False, attn_implementation="flash_attention_2")
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ValueError, match="--teacher_name_or_path .* do not fit its configuration: "):
        load_teacher(folder, SpikeLMConfig(**SIZES), is_classifier=False)


def test_a_quantised_teacher_is_refused_in_one_line(save_teacher):
    folder = save_teacher("", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ValueError, match="are quantised .by bitsandbytes"):
        load_teacher(folder, SpikeLMConfig(**SIZES), is_classifier=False)


@pytest.mark.parametrize("field, other", [("vocab_size", 61), ("hidden_size", 32), ("num_hidden_layers", 3)])
def test_another_shape_is_refused_in_one_line(save_teacher, field, other):
    folder = save_teacher("", **{field: other})
    with pytest.raises(ValueError, match=f"has {field}={other}, but the student has {field}={SIZES[field]}") as error:
        load_teacher(folder, SpikeLMConfig(**SIZES), is_classifier=False)
    assert "\n" not in str(error.value)


def words(*tokens: str) -> BertTokenizer:
    return BertTokenizer(vocab={token: number for number, token in enumerate([*SPECIAL, *tokens])})


def test_ids_have_to_be_the_same_words_to_teacher_and_student(save_teacher, caplog):
    folder = save_teacher("tokens")

    def load(*tokens: str) -> None:
        load_teacher(folder, SpikeLMConfig(**SIZES), is_classifier=False, tokenizer=words(*tokens))

    load("yes", "no")  # of a teacher without a tokenizer nothing is known
    words("yes", "no").save_pretrained(folder)
    for same in (("yes", "no"), ("yes", "no", "more"), ("yes",), ("yes", "renamed")):
        load(*same)
    assert "not known" not in caplog.text
    with pytest.raises(ValueError, match="another vocabulary: 'no' is 6 there and 5 in the student's") as error:
        load("no", "yes")
    assert "\n" not in str(error.value)
    words(*map(str, range(20))).save_pretrained(folder)
    with pytest.raises(ValueError, match="another vocabulary: they have 5 tokens in common"):
        load(*(f"word {number}" for number in range(20)))


def test_a_teacher_whose_tokenizer_cannot_be_loaded_is_taken_and_that_is_said(save_teacher, caplog):
    folder = save_teacher("")
    # Its class is code of its own, which nobody has said to trust.
    content = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(content))
    load_teacher(folder, SpikeLMConfig(**SIZES), is_classifier=False, tokenizer=words("yes"))
    assert "Whether the student's ids mean the same" in caplog.text


def test_a_teacher_of_the_task_has_a_trained_classifier_with_the_students_labels(save_teacher):
    with pytest.raises(ValueError, match="has no trained classifier"):
        load_teacher(save_teacher("tokens"), SpikeLMConfig(**SIZES), is_classifier=True)
    with pytest.raises(ValueError, match="has num_labels=2, but the student has num_labels=3"):
        load_teacher(save_teacher("labels"), SpikeLMConfig(**SIZES, num_labels=3), is_classifier=True)


def test_what_is_no_bert_is_refused(tmp_path):
    from transformers import RobertaConfig, RobertaModel

    RobertaModel(RobertaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of type 'roberta'"):
        load_teacher(str(tmp_path), SpikeLMConfig(**SIZES), is_classifier=False)
    with pytest.raises(ValueError, match="does not exist; name a folder"):
        load_teacher(str(tmp_path / "nothing"), SpikeLMConfig(**SIZES), is_classifier=False)


def test_a_folder_of_teachers_has_one_for_each_task(tmp_path):
    for task in ("cola", "rte"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "config.json").write_text("{}")
    arguments = DistillationArguments(teacher_name_or_path=str(tmp_path))
    assert arguments.teacher_of("rte") == str(tmp_path / "rte")
    with pytest.raises(ValueError, match=r"teacher_name_or_path .* no checkpoint for mrpc, only for cola, rte"):
        arguments.teacher_of("mrpc")
    # One teacher for whatever task is named.
    assert DistillationArguments(teacher_name_or_path=str(tmp_path / "rte")).teacher_of("mrpc") == str(tmp_path / "rte")
    assert DistillationArguments(teacher_name_or_path="someone/bert").teacher_of("mrpc") == "someone/bert"
    assert DistillationArguments().teacher_of("mrpc") is None


@pytest.mark.parametrize(
    "weights, has_logits, lessons",
    [
        ({}, True, "hidden states and logits"),
        ({}, False, "hidden states"),
        ({"hidden_weight": 0.0}, True, "logits"),
        ({"sentence_weight": 1.0}, True, "hidden states, sentence vectors and logits"),
        ({"hidden_weight": 0.0, "logits_weight": 0.0}, True, ""),
    ],
)
def test_only_terms_that_weigh_something_are_lessons(weights, has_logits, lessons):
    assert DistillationArguments(**weights).lessons(has_logits) == lessons


@pytest.mark.parametrize("flag, value", [("hidden_weight", -1.0), ("temperature", 0.0), ("label_weight", float("nan"))])
def test_weights_that_make_no_sense_are_refused(flag, value):
    with pytest.raises(ValueError, match=f"--{flag} is"):
        DistillationArguments(**{flag: value})
