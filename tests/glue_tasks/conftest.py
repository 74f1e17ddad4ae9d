"""Small data in GLUE's own layout, header for header as in the official archives."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizer, set_seed

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMForMaskedLM

_STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]
_PARSES = ["sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"]
_MNLI = ["index", "promptID", "pairID", "genre", *_PARSES, "sentence1", "sentence2"]

# Task: {split kind: header}; a column is filled with its own name and the row number unless `_LABELS` or an index.
HEADERS: dict[str, dict[str, list[str]]] = {
    "CoLA": {"train": ["source", "label", "mark", "sentence"], "test": ["index", "sentence"]},
    "SST-2": {"train": ["sentence", "label"], "test": ["index", "sentence"]},
    "MRPC": {
        "train": ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        "test": ["index", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    },
    "STS-B": {"train": [*_STSB, "score"], "test": _STSB},
    "QQP": {
        "train": ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        "test": ["id", "question1", "question2"],
    },
    "MNLI": {
        "train": [*_MNLI, "label1", "gold_label"],
        "dev": [*_MNLI, *(f"label{number}" for number in range(1, 6)), "gold_label"],
        "test": _MNLI,
    },
    "QNLI": {"train": ["index", "question", "sentence", "label"], "test": ["index", "question", "sentence"]},
    "RTE": {"train": ["index", "sentence1", "sentence2", "label"], "test": ["index", "sentence1", "sentence2"]},
    "WNLI": {"train": ["index", "sentence1", "sentence2", "label"], "test": ["index", "sentence1", "sentence2"]},
    "BigramShift": {"train": ["sentence", "label"], "test": ["index", "sentence"]},
}

_BINARY = ("0", "1")
_LABELS: dict[str, tuple[str, ...]] = {
    "MRPC": _BINARY,
    "STS-B": ("0.000", "2.500", "5.000"),
    "MNLI": ("entailment", "neutral", "contradiction"),
    "QNLI": ("entailment", "not_entailment"),
    "RTE": ("entailment", "not_entailment"),
}


def _write(folder: Path, split: str, rows: int) -> None:
    kind, task = split.split("_")[0], folder.name
    header = HEADERS[task].get(kind) or HEADERS[task]["train"]
    labels = _LABELS.get(task, _BINARY)
    label_column = {"MRPC": "Quality", "STS-B": "score", "QQP": "is_duplicate", "MNLI": "gold_label"}.get(task, "label")
    lines = []
    for row in range(rows):
        fields = {name: f"{name} of {split} row {row}" for name in header}
        fields |= {name: str(row) for name in ("index", "id") if name in header}
        if label_column in header:
            fields[label_column] = labels[row % len(labels)]
        lines.append("\t".join(fields.values()))
    if task != "CoLA" or kind == "test":
        lines.insert(0, "\t".join(header))
    mark = "\ufeff" if (task, split) == ("MRPC", "dev") else ""
    (folder / f"{split}.tsv").write_text(mark + "\n".join(lines) + "\n", encoding="utf-8")


def write_tasks(data: Path, *tasks: str, train: int = 12, dev: int = 6, test: int = 4) -> Path:
    """Writes those tasks, or all, into a new folder, and returns it."""
    for task in tasks or HEADERS:
        folder = data / task
        folder.mkdir(parents=True)
        endings = ("_matched", "_mismatched") if task == "MNLI" else ("",)
        _write(folder, "train", train)
        for ending in endings:
            _write(folder, f"dev{ending}", dev)
            if test:
                _write(folder, f"test{ending}", test)
    return data


@pytest.fixture
def write_glue(tmp_path: Path) -> Callable[..., Path]:
    """`write_glue(folder_name, ..., train=12, dev=6, test=4)` writes those tasks and returns the data folder."""
    return partial(write_tasks, tmp_path / "glue")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 2 layers x 16 whose tokenizer knows the words of `write_glue`, saved with its masked LM head."""
    folder = tmp_path_factory.mktemp("bert")
    words = "of row train dev test matched mismatched sentence question label string source mark".split()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *map(str, range(10)), "_", "#"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_spikelm(tiny_bert, tmp_path_factory) -> Path:
    """A calibrated SpikeLM with its masked LM head, of the size and with the tokenizer of `tiny_bert`."""
    folder = tmp_path_factory.mktemp("spikelm")
    bert = AutoConfig.from_pretrained(tiny_bert).to_dict()
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = SpikeLMConfig(num_time_steps=2, max_position_embeddings=64, **{name: bert[name] for name in kept})
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    model = SpikeLMForMaskedLM(config)
    model.calibrate([dict(tokenizer(["row of train", "sentence of test row"], padding=True, return_tensors="pt"))])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
