"""A trained encoder becomes a small folder that two libraries load where nobody knows us."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors import safe_open
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer, TrainingArguments

import export_sentence_encoder
from deployment.sentence_encoder import similarity, write_modules
from experiment.model_card import RunCard
from modeling_spikelm import SpikeLMForMaskedLM, SpikeLMModel
from spike_metrics.evaluation import FIGURES
from tests.clean_machine import run_on_clean_machine
from tests.glue_tasks.conftest import write_tasks

WORDS = "row of train dev test question sentence mark and more".split()
SENTENCES = ["row of train", "question of dev test and more", "mark"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *map(str, range(10))]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), initializer_range=0.2, **sizes)).save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained(folder)
    write_modules(folder, 32, 32)
    return folder


@pytest.fixture(scope="module")
def trained(bert, tmp_path_factory) -> Path:
    """What run_distill.py leaves behind: a calibrated encoder, its tokenizer and its card."""
    folder = tmp_path_factory.mktemp("runs") / "converted"
    fields = {"neuron": "thrifty", "spike_cost": 0.1, "num_time_steps": 1}
    model, tokenizer = SpikeLMModel.from_pretrained(bert, **fields), AutoTokenizer.from_pretrained(bert)
    model.calibrate([tokenizer(SENTENCES, padding=True, return_tensors="pt")])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = (
        '# converted\n\nA SpikeLM.\n\n## How to load it\n\nfrom_pretrained("converted")\n\n## Training\n\nIt learned.\n'
    )
    (folder / "README.md").write_text(f"---\nlicense: apache-2.0\ntags:\n- spikelm\n---\n\n{text}")
    return folder


def test_both_libraries_load_it_where_nobody_knows_us(trained, tmp_path):
    export_sentence_encoder.main(["--model_name_or_path", str(trained), "--output_dir", str(tmp_path / "encoder")])
    done = run_on_clean_machine(f"""
import json, torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
folder, sentences = {str(tmp_path / "encoder")!r}, {SENTENCES!r}
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert model.embeddings.word_embeddings.int8_weight.dtype == torch.int8
encoder = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
print(json.dumps(encoder.encode(sentences).tolist()))
""")
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    model, tokenizer = SpikeLMModel.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    states, is_token = model.eval()(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    expected = torch.nn.functional.normalize((states * is_token).sum(1) / is_token.sum(1), dim=-1)
    # The mean over tokens of the float model, but for int8's rounding, which now and then moves a spike.
    assert (found * expected).sum(1).min() > 0.98
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


def test_its_card_keeps_how_it_was_trained_and_says_what_was_measured(trained, bert, tmp_path):
    flags = [
        "--data_dir",
        str(write_tasks(tmp_path / "glue", "STS-B")),
        "--base_model",
        "someone/bert",
        "--max_seq_length",
        "32",
    ]
    flags += ["--teacher_name_or_path", str(bert), "--output_dir", str(tmp_path / "mine")]
    export_sentence_encoder.main(["--model_name_or_path", str(trained), *flags])
    card = ModelCard.load(tmp_path / "mine/README.md")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "someone/bert")
    assert {"spikelm", "sentence-transformers"} <= set(card.data.tags)
    assert card.data.eval_results[0].metric_type == "spearmanr"
    assert card.text.lstrip().startswith("# mine\n") and 'from_pretrained("mine")' in card.text
    assert "converted" not in card.text and "## Training\n\nIt learned." in card.text
    for title in (
        "without fine-tuning | ",
        "the same of the dense model | ",
        "firing rate | ",
        "dense / this, encoder | ",
    ):
        assert f"{title}" in card.text
    assert "cut to 32 tokens" in card.text
    # What is exported once more has the section of its own export alone, where it was.
    flags = ["--model_name_or_path", str(tmp_path / "mine"), "--output_dir", str(tmp_path / "again")]
    export_sentence_encoder.main([*flags, "--max_seq_length", "16"])
    again = ModelCard.load(tmp_path / "again/README.md").text
    assert again.count("## Sentences") == again.count("cut to ") == 1 and "cut to 16 tokens" in again
    headings = [[line for line in text.splitlines() if line.startswith("#")] for text in (card.text, again)]
    assert headings[1] == [line.replace("mine", "again") for line in headings[0]]


def test_of_a_head_that_stays_behind_its_card_says_nothing(bert, tmp_path):
    model, tokenizer = SpikeLMForMaskedLM.from_pretrained(bert, num_time_steps=1), AutoTokenizer.from_pretrained(bert)
    model.calibrate([tokenizer(SENTENCES, padding=True, return_tensors="pt")])
    folder = tmp_path / "converted"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # As run_distill.py makes it, where the teacher has a masked-LM head.
    run = RunCard(
        model=model,
        training=TrainingArguments(str(folder), hub_model_id="someone/converted"),
        pipeline_tag="fill-mask",
        auto_class="AutoModelForMaskedLM",
        training_data="Learned from text.",
        dataset_for_results="the validation split",
        metrics={"hidden_error": "mse"},
        figures=FIGURES,
        started_from="someone/bert",
    )
    results = {"eval_hidden_error": 0.3, "eval_encoder_energy_mj": 2.0, "eval_model_energy_mj": 3.0}
    before = ModelCard.load(run.write(folder, results))
    flags = ["--model_name_or_path", str(folder), "--output_dir"]
    export_sentence_encoder.main([*flags, str(tmp_path / "mine")])
    card = ModelCard.load(tmp_path / "mine/README.md")
    for word in ("MaskedLM", "fill-mask", "pipeline(", "energy with pooler and heads", "someone/converted"):
        assert word in before.content and word not in card.content, word
    assert 'AutoModel.from_pretrained("mine", trust_remote_code=True)' in card.text
    assert "| architecture | SpikeLMModel |" in card.text
    # There was no pooler, and a new one would be noise.
    bare = SpikeLMModel.from_pretrained(folder, add_pooling_layer=False)
    assert f"| parameters | {bare.num_parameters():,} |" in card.text
    with safe_open(tmp_path / "mine/model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "pooler" in name]  # noqa: SIM118
    headings = [[line for line in each.text.splitlines() if line.startswith("## ")] for each in (before, card)]
    assert headings[1] == ["## Sentences", *headings[0]]
    assert "Measured before the weights were rounded to int8.\n" in card.text
    assert "| hidden_error | 0.3000 |" in card.text and "energy of the encoder, mJ per sequence | 2 |" in card.text
    # A BERT's licence is not known here.
    assert card.data.license is None and card.data.base_model == "someone/bert"
    export_sentence_encoder.main([*flags, str(tmp_path / "licensed"), "--license", "mit"])
    assert ModelCard.load(tmp_path / "licensed/README.md").data.license == "mit"
    # A perplexity is that of a head.
    run.metrics = {"perplexity": "perplexity"}
    run.write(folder, {"eval_perplexity": 9.0})
    export_sentence_encoder.main([*flags, str(tmp_path / "from_tokens")])
    card = ModelCard.load(tmp_path / "from_tokens/README.md")
    assert "perplexity" not in card.content and "## Training" in card.text and "## Limits" in card.text
    (folder / "README.md").unlink()
    export_sentence_encoder.main([*flags, str(tmp_path / "bare")])
    assert ModelCard.load(tmp_path / "bare/README.md").data.license is None


def test_float_weights_stay_what_they_are_if_that_is_asked_for(trained, tmp_path):
    flags = ["--output_dir", str(tmp_path / "float"), "--float_weights"]
    export_sentence_encoder.main(["--model_name_or_path", str(trained), *flags])
    weights = SpikeLMModel.from_pretrained(trained).state_dict()
    for name, value in SpikeLMModel.from_pretrained(tmp_path / "float").state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_text_is_cut_to_what_the_model_takes_and_the_cards_base_stays(trained, tmp_path):
    card = ModelCard.load(trained / "README.md")
    card.data.base_model = "someone/else"
    shutil.copytree(trained, tmp_path / "trained")
    card.save(tmp_path / "trained/README.md")
    flags = ["--model_name_or_path", str(tmp_path / "trained"), "--output_dir", str(tmp_path / "mine")]
    export_sentence_encoder.main([*flags, "--max_seq_length", "100000"])
    longest = SpikeLMModel.from_pretrained(trained).config.max_position_embeddings
    assert json.loads((tmp_path / "mine/sentence_bert_config.json").read_text())["max_seq_length"] == longest
    assert ModelCard.load(tmp_path / "mine/README.md").data.base_model == "someone/else"


def test_a_similarity_is_a_cosine_of_an_encoder_that_does_not_normalise_too(bert, tmp_path):
    texts = [" ".join(WORDS[number % 9 :: 1 + number % 4]) for number in range(12)]
    pairs = Dataset.from_dict({"sentence1": texts, "sentence2": texts[5:] + texts[:5], "label": [*range(12)]})
    model, tokenizer = BertModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    encoder = SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    one, other = (encoder.encode(pairs[column][:]) for column in ("sentence1", "sentence2"))
    products = (one * other).sum(1)
    by_product, by_cosine = (
        100 * spearmanr(values, pairs["label"][:]).statistic
        for values in (products, products / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1))
    )
    assert by_product != pytest.approx(by_cosine, abs=1)
    assert similarity(tmp_path / "bert", pairs) == pytest.approx(by_cosine)


@pytest.mark.parametrize("flags", [[], ["--float_weights"]])
def test_an_encoder_that_is_not_calibrated_is_refused(flags, bert, tmp_path):
    start = ["--model_name_or_path", str(bert), "--output_dir", str(tmp_path / "mine")]
    with pytest.raises(SystemExit, match="is not calibrated, or no SpikeLM"):
        export_sentence_encoder.main([*start, *flags])
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("flags", "damage", "message"),
    [
        (["--max_seq_length", "2"], None, "--max_seq_length 2 leaves no room for text; give 3 or more"),
        (["--teacher_name_or_path", "nowhere", "--data_dir", "GLUE"], None, "nowhere"),
        ([], ("model.safetensors", b"no weights"), "The weights of .* are damaged"),
        ([], ("README.md", b"---\ntags: [\n---\n"), "README.md is no model card"),
        ([], ("README.md", b"---\n\xff"), "README.md is no model card"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(flags, damage, message, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "trained")
    if damage:
        (tmp_path / "trained" / damage[0]).write_bytes(damage[1])
    command = ["--model_name_or_path", str(tmp_path / "trained"), "--output_dir", str(tmp_path / "out"), *flags]
    with pytest.raises(SystemExit, match=message):
        export_sentence_encoder.main(command)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_and_a_teacher_without_data_are_refused(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    start = ["--model_name_or_path", str(trained), "--output_dir"]
    with pytest.raises(SystemExit, match="is not empty; name another folder"):
        export_sentence_encoder.main([*start, str(tmp_path)])
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(SystemExit, match="measured on --data_dir"):
        export_sentence_encoder.main([*start, str(tmp_path / "new"), "--teacher_name_or_path", str(trained)])
    assert not (tmp_path / "new").exists()
