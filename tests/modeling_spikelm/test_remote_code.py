"""A checkpoint on a machine that has never heard of us: transformers, torch and the checkpoint, nothing else."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from configuration_spikelm.configuration_spikelm import AUTO_MAP
from modeling_spikelm import SpikeLMForMaskedLM
from tests.carried_code import BART_CODE, CODE, LLAMA_CODE
from tests.clean_machine import run_on_clean_machine
from tests.modeling_spikelm.test_bart import make_model as make_bart
from tests.modeling_spikelm.test_llama import make_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "capital", "of", "france", "is", "paris", "."]


@pytest.fixture
def checkpoint(config, tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    model = SpikeLMForMaskedLM(config)
    model.calibrate([{"input_ids": torch.randint(5, 12, (2, 9))}])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def clean_run(code: str) -> str:
    done = run_on_clean_machine(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_checkpoint_carries_its_code_byte_for_byte(checkpoint):
    carried = {path.name: path.read_bytes() for path in checkpoint.glob("*.py")}
    assert carried == {name: path.read_bytes() for name, path in CODE.items()}


def test_loads_saves_and_loads_again_without_us(checkpoint, tmp_path):
    again = tmp_path / "again"
    printed = clean_run(f"""
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
ids = torch.arange(5, 12).unsqueeze(0)
model = AutoModelForMaskedLM.from_pretrained({str(checkpoint)!r}, trust_remote_code=True).eval()
model.save_pretrained({str(again)!r})
AutoTokenizer.from_pretrained({str(checkpoint)!r}, trust_remote_code=True).save_pretrained({str(again)!r})
second = AutoModelForMaskedLM.from_pretrained({str(again)!r}, trust_remote_code=True).eval()
assert torch.equal(model(ids).logits, second(ids).logits)
classifier = AutoModelForSequenceClassification.from_pretrained({str(again)!r}, trust_remote_code=True, num_labels=3)
assert classifier(ids).logits.shape == (1, 3)
classifier.save_pretrained({str(tmp_path / "classifier")!r})
for change in ({{"amplitude_scale": 6.0}}, {{"num_time_steps": 1}}):
    other = AutoModelForMaskedLM.from_pretrained({str(checkpoint)!r}, trust_remote_code=True, **change)
    assert not any(buffer.any() for name, buffer in other.named_buffers() if name.endswith(".amplitude")), change
fill = pipeline("fill-mask", model={str(again)!r}, trust_remote_code=True)
print(type(model).__name__, len(fill("the capital of france is [MASK].")), model(ids).logits.sum().item())
""")
    name, suggestions, total = printed.split()
    assert (name, suggestions) == ("SpikeLMForMaskedLM", "5")
    ours = SpikeLMForMaskedLM.from_pretrained(checkpoint).eval()(torch.arange(5, 12).unsqueeze(0)).logits.sum().item()
    assert float(total) == pytest.approx(ours, rel=1e-5)
    for folder in (again, tmp_path / "classifier"):
        assert {path.name for path in folder.glob("*.py")} == CODE.keys()
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map == AUTO_MAP


def test_saved_again_by_us_it_still_loads_without_us(checkpoint, tmp_path):
    SpikeLMForMaskedLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "ours")
    clean_run(f"""
from transformers import AutoModel
print(AutoModel.from_pretrained({str(tmp_path / "ours")!r}, trust_remote_code=True).config.num_time_steps)
""")


def test_its_code_does_not_run_without_trust(checkpoint):
    done = run_on_clean_machine(f"""
from transformers import AutoModelForMaskedLM
AutoModelForMaskedLM.from_pretrained({str(checkpoint)!r}, trust_remote_code=False)
""")
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr


def test_trainer_checkpoint_loads_without_us(checkpoint, tmp_path):
    clean_run(f"""
import torch
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments
model = AutoModelForMaskedLM.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)
rows = [{{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}}] * 8
arguments = TrainingArguments({str(tmp_path / "trained")!r}, max_steps=2, save_steps=2, use_cpu=True, disable_tqdm=True)
Trainer(model, arguments, train_dataset=rows).train()
""")
    saved = tmp_path / "trained" / "checkpoint-2"
    assert {path.name for path in saved.glob("*.py")} == CODE.keys()
    clean_run(f"""
from transformers import AutoModelForMaskedLM
AutoModelForMaskedLM.from_pretrained({str(saved)!r}, trust_remote_code=True)
""")


def test_a_stock_fine_tuning_script_takes_the_checkpoint_without_us(checkpoint, tmp_path):
    """The calls of a GLUE script with --trust_remote_code: configuration, tokenizer, classifier, Trainer, saving."""
    saved = tmp_path / "classifier"
    printed = clean_run(f"""
from datasets import Dataset
from transformers import (AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding,
                          Trainer, TrainingArguments)
name = {str(checkpoint)!r}
config = AutoConfig.from_pretrained(name, num_labels=2, finetuning_task="rte", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(name, config=config, trust_remote_code=True,
                                                           ignore_mismatched_sizes=True)
model.config.label2id, model.config.id2label = {{"yes": 0, "no": 1}}, {{0: "yes", 1: "no"}}
sentences = ["the capital of france", "is paris ."] * 4
rows = Dataset.from_dict({{"sentence": sentences, "label": [0, 1] * 4, "idx": range(8)}})
rows = rows.map(lambda row: tokenizer(row["sentence"], truncation=True, max_length=32))
trainer = Trainer(
    model,
    TrainingArguments({str(saved)!r}, max_steps=2, use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=2),
    train_dataset=rows,
    eval_dataset=rows,
    processing_class=tokenizer,
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=lambda p: {{"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}},
)
trainer.train()
metrics = trainer.evaluate()
assert trainer.predict(rows.remove_columns("label")).predictions.shape == (8, 2)
trainer.save_model()
print("accuracy", metrics["eval_accuracy"])
""")
    assert "accuracy" in printed.splitlines()[-1]
    assert {path.name for path in saved.glob("*.py")} == CODE.keys()
    assert json.loads((saved / "config.json").read_text())["label2id"] == {"no": 1, "yes": 0}


def test_a_decoder_carries_its_code_and_writes_without_us(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "decoder")
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    tokenizer.save_pretrained(tmp_path / "decoder")
    carried = {path.name: path.read_bytes() for path in (tmp_path / "decoder").glob("*.py")}
    assert carried == {name: path.read_bytes() for name, path in LLAMA_CODE.items()}
    printed = clean_run(f"""
import torch
from transformers import AutoModelForCausalLM, pipeline
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "decoder")!r}, trust_remote_code=True)
model.save_pretrained({str(tmp_path / "again")!r})
write = pipeline("text-generation", model={str(tmp_path / "decoder")!r}, trust_remote_code=True)
assert write("the capital of", max_new_tokens=3)[0]["generated_text"].startswith("the capital of")
print("tokens", *model.generate(torch.arange(5, 12).unsqueeze(0), max_new_tokens=5, do_sample=False)[0].tolist())
""")
    ours = model.generate(torch.arange(5, 12).unsqueeze(0), max_new_tokens=5, do_sample=False)[0].tolist()
    assert " ".join(map(str, ["tokens", *ours])) in printed.splitlines()
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == LLAMA_CODE.keys()


def test_an_encoder_and_decoder_carries_its_code_and_writes_without_us(tmp_path):
    model = make_bart(max_position_embeddings=64)
    model.save_pretrained(tmp_path / "writer")
    carried = {path.name: path.read_bytes() for path in (tmp_path / "writer").glob("*.py")}
    assert carried == {name: path.read_bytes() for name, path in BART_CODE.items()}
    printed = clean_run(f"""
import torch
from transformers import AutoModel, AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained({str(tmp_path / "writer")!r}, trust_remote_code=True)
model.save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForSeq2SeqLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
base = AutoModel.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
print(type(base).__name__, type(again).__name__)
print("tokens", *again.generate(torch.arange(5, 12).unsqueeze(0), max_new_tokens=5)[0].tolist())
""")
    lines = printed.splitlines()
    assert "SpikeLMBartModel SpikeLMBartForConditionalGeneration" in lines
    ours = model.generate(torch.arange(5, 12).unsqueeze(0), max_new_tokens=5)[0].tolist()
    assert " ".join(map(str, ["tokens", *ours])) in lines
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == BART_CODE.keys()
