"""What a SpikeLM encoder is handed out with: the modules that sentence-transformers reads, and a card."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMModel
from spike_metrics.counting import count
from spike_metrics.evaluation import FIGURES, spike_figures

CARD = "README.md"
HEADING = "## Sentences"
SPEARMAN = "Spearman, STS-B validation, without fine-tuning"
COUNTED_SENTENCES = 64
# The Hub's names of what a model without a head can be measured at.
OF_ENCODERS = ("feature-extraction", "sentence-similarity")
# What run_distill.py reports, of hidden states, whether there is a head or not.
HIDDEN_ERROR = "hidden_error"
# As every release of sentence-transformers reads them, of which the newest writes others.
MODULES = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}


@dataclass
class ExportArguments:
    model_name_or_path: str = field(metadata={"help": "The encoder: a folder of run_distill.py, or a name on the Hub."})
    output_dir: str = field(metadata={"help": "Where it goes; must not exist or be empty."})
    float_weights: bool = field(
        default=False, metadata={"help": "Keep float32 weights; otherwise weights and embeddings become int8."}
    )
    max_seq_length: int = field(default=256, metadata={"help": "Longer texts are cut to so many tokens."})
    base_model: str | None = field(default=None, metadata={"help": "For the card: the dense model's name on the Hub."})
    license: str | None = field(
        default=None,
        metadata={
            "help": "For the card: the weights' licence, such as apache-2.0 (default: what the training's card says. "
            "Of a model that began as another it says nothing: name that one's)."
        },
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "For the card: GLUE in its own layout, of which STS-B/dev.tsv is measured."}
    )
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "For the card: the dense model, measured in the same way."}
    )


def write_modules(folder: Path, width: int, max_seq_length: int) -> None:
    """Tells sentence-transformers what it makes of the encoder: the mean over tokens, of unit length."""
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(MODULES.items())
    ]
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    pooling |= {f"pooling_mode_{mode}": False for mode in ("cls_token", "max_tokens", "mean_sqrt_len_tokens")}
    for name, content in (
        ("modules.json", modules),
        ("sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False}),
        ("config_sentence_transformers.json", {"similarity_fn_name": "cosine"}),
        ("1_Pooling/config.json", pooling),
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def similarity(name: str | Path, pairs: Dataset) -> float:
    """Spearman's correlation, times 100, of the cosine with the people's scores of STS-B."""
    encoder = SentenceTransformer(str(name), device="cpu")
    texts = (list(pairs[column]) for column in ("sentence1", "sentence2"))
    one, other = (encoder.encode(each, normalize_embeddings=True) for each in texts)
    return 100 * spearmanr((one * other).sum(1), pairs["label"]).statistic


def card_of_training(name: str) -> ModelCard | None:
    """The card that lies beside an encoder, on disk or on the Hub; None if there is none.

    Raises:
        ValueError: the file on disk is no card.
    """
    if Path(name).exists():
        path = Path(name, CARD)
        try:
            return ModelCard(path.read_text(encoding="utf-8")) if path.is_file() else None
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is no model card: {error}") from error
    try:
        return ModelCard.load(name)
    except EntryNotFoundError:
        return None


def of_bare_encoder(text: str, model: SpikeLMModel) -> str:
    """A card's text without what it says of a head, which stays behind: its class, its weights and how to ask it.

    Of int8 weights the number of parameters stays as it is: what was counted were floats.
    """
    begin, heading, rest = text.partition("## How to load it\n")
    loading, following, others = rest.partition("\n## ")
    loading = re.sub(r"```python\nfrom transformers import pipeline\n.*?```\n", "", loading, flags=re.DOTALL)
    loading = re.sub(r"AutoModelFor\w+", "AutoModel", loading).rstrip() + "\n"
    text = "".join([begin, heading, loading, following, others]) if heading else text
    text = re.sub(r"^\| architecture \| .*$", f"| architecture | {type(model).__name__} |", text, flags=re.MULTILINE)
    of_heads = "|".join(re.escape(FIGURES[key][0]) for key in FIGURES if key.startswith("model_"))
    text = re.sub(rf"^\| ({of_heads}) \| .*\n", "", text, flags=re.MULTILINE)
    if not model.config.int8_weights:
        count = f"| parameters | {model.num_parameters():,} |"
        text = re.sub(r"^\| parameters \| .*$", count, text, flags=re.MULTILINE)
    return text


def of_rounded_weights(text: str) -> str:
    """A card's text that says which weights its results are of, now that others are handed out."""
    said = "## Results\n\nMeasured before the weights were rounded to int8.\n"
    return re.sub(r"^## Results\n(?!\n*No evaluation)", said, text, flags=re.MULTILINE)


def card_of(
    arguments: ExportArguments,
    trained: ModelCard | None,
    model: SpikeLMModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    pairs: Dataset | None,
) -> ModelCard:
    """The card of the run that trained the encoder, completed by what it is now, or a short one where there is none."""
    name = Path(arguments.output_dir).resolve().name
    card = trained or ModelCard(f"---\ntags: []\n---\n\n# {name}\n")
    if arguments.license is not None:
        card.data.license = arguments.license
    # Those of a head are not this model's.
    results = card.data.eval_results or []
    card.data.eval_results = [result for result in results if result.task_type in OF_ENCODERS] or None
    if any(result.task_type not in OF_ENCODERS and result.metric_name != HIDDEN_ERROR for result in results):
        card.data.metrics = None
        card.text = re.sub(r"^## Results$.*?(?=^## |\Z)", "", card.text, flags=re.MULTILINE | re.DOTALL)
    card.data.pipeline_tag, card.data.library_name = "sentence-similarity", "sentence-transformers"
    card.data.tags = sorted({*(card.data.tags or []), "sentence-transformers", "sentence-similarity"})
    card.data.model_name = name
    # Otherwise what the training's card says stays.
    if arguments.base_model is not None:
        card.data.base_model = arguments.base_model
    figures = figures_of(arguments, model, tokenizer, folder, pairs) if pairs is not None else {}
    if figures:
        card.data.eval_results = [
            EvalResult(
                task_type="sentence-similarity",
                dataset_type="nyu-mll/glue",
                dataset_name="STS-B, validation, without fine-tuning",
                dataset_config="stsb",
                dataset_split="validation",
                metric_type="spearmanr",
                metric_value=float(figures[SPEARMAN]),
            )
        ]
    card.text = _with_section(card.text, name, section(name, arguments, model.config, figures))
    return card


def figures_of(
    arguments: ExportArguments,
    model: SpikeLMModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    pairs: Dataset,
) -> dict[str, str]:
    """For the card: title and value of everything that is measured."""
    found = {SPEARMAN: f"{similarity(folder, pairs):.1f}"}
    if arguments.teacher_name_or_path:
        found["the same of the dense model"] = f"{similarity(arguments.teacher_name_or_path, pairs):.1f}"
    texts = list(pairs["sentence1"][:COUNTED_SENTENCES])
    batch = tokenizer(texts, padding=True, truncation=True, max_length=arguments.max_seq_length, return_tensors="pt")
    counted = spike_figures(count(model, [batch]))
    shown = ("firing_rate", "encoder_energy_mj", "encoder_dense_energy_mj", "encoder_energy_ratio")
    return found | {FIGURES[key][0]: format(counted[key], FIGURES[key][1]) for key in shown}


def section(name: str, arguments: ExportArguments, config: SpikeLMConfig, figures: dict[str, str]) -> str:
    """How to use it, what its weights are, and what was measured."""
    weights = "Weights and embeddings are int8" if config.int8_weights else "Weights are float32"
    trained_on = (
        ": products of spikes and weights are exact integer sums. `model.dequantize_weights()` gives float32 weights, "
        "which can be trained on; `run_glue.py --model_name_or_path` does so by itself"
        if config.int8_weights
        else ""
    )
    table = "".join(f"| {title} | {value} |\n" for title, value in figures.items())
    return (
        f"{HEADING}\n\n```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        "# the name on the Hub, or the folder\n"
        f'encoder = SentenceTransformer("{name}", trust_remote_code=True)\n'
        'vectors = encoder.encode(["A man is playing a guitar.", "Someone plays an instrument."])\n'
        "print(encoder.similarity(vectors, vectors))\n```\n\n"
        f"A sentence's vector is the mean over its tokens, of unit length; texts are cut to {arguments.max_seq_length} "
        f"tokens. {weights}{trained_on}.\n\n" + (f"| | |\n|---|---|\n{table}\n" if figures else "")
    )


def _with_section(text: str, name: str, section: str) -> str:
    """The card's text under the new name, with the section after its first paragraph, in place of one that it has."""
    lines = re.sub(rf"^{HEADING}$.*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL).strip().splitlines()
    old = lines[0].removeprefix("# ")
    # Also where code loads it from somebody's account on the Hub.
    quoted = re.compile(rf'"([\w.-]+/)?{re.escape(old)}"')
    renamed = "\n".join([f"# {name}", *(quoted.sub(f'"{name}"', line) for line in lines[1:])])
    begin, heading, rest = renamed.partition("\n## ")
    return f"{begin.rstrip()}\n\n{section}{heading.lstrip()}{rest}\n" if heading else f"{begin.rstrip()}\n\n{section}"
