"""What a decoder loses, and what the changes to it are: exact on tiny models, and one real command that goes on."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import run_clm
from pretraining_data.tokenizers import train_byte_pairs
from tests.corpus import write_corpus
from tests.modeling_spikelm.test_llama import make_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import decoder
import decoder_changes
from decoder_changes import apply, parse

TOKENS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def changed(change: str):
    model = make_model(1, calibrated=False)
    apply(model, change)
    model.model.calibrate({"input_ids": TOKENS})
    return model


def inputs_of(model, name: str, layer: int = 0) -> torch.Tensor:
    seen = []
    hook = model.model.layers[layer].get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(TOKENS, use_cache=False)
    hook.remove()
    return seen[0].flatten(0, -2)


def values(inputs: torch.Tensor) -> int:
    return len(inputs.unique())


def test_one_place_alone_spikes_or_all_but_one():
    assert values(inputs_of(changed("only mlp.neurons"), "mlp.up_proj")) <= 3
    assert values(inputs_of(changed("only mlp.neurons"), "mlp.down_proj")) > 100
    assert values(inputs_of(changed("all but mlp.neurons"), "mlp.up_proj")) > 100
    assert values(inputs_of(changed("all but mlp.neurons"), "mlp.down_proj")) <= 3
    first = changed("first 1 layers")
    assert values(inputs_of(first, "mlp.up_proj", 0)) <= 3 and values(inputs_of(first, "mlp.up_proj", 1)) > 100


def test_a_rotation_is_turned_back_and_what_is_between_spikes():
    model = changed("rotated")
    turned = [module for module in model.modules() if isinstance(module, decoder_changes.Rotated)]
    spikes = []
    hook = turned[0].neurons.register_forward_hook(lambda _, args, output: spikes.append(output))
    model(TOKENS, use_cache=False)
    hook.remove()
    assert values(spikes[0]) <= 3
    for module in turned:
        module.neurons = torch.nn.Identity()
    dense = make_model(1, calibrated=False)
    apply(dense, "first 0 layers")
    found, wanted = (m(TOKENS, use_cache=False).logits for m in (model, dense))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_the_largest_channels_are_real_and_a_finer_alphabet_has_its_levels():
    inputs = inputs_of(changed("largest 0.1 real"), "mlp.down_proj")
    per_channel = [values(channel) for channel in inputs.T]
    assert sum(number > 3 for number in per_channel) == round(0.1 * len(per_channel))
    model = make_model(1, calibrated=False)
    apply(model, "7 levels")
    levels = inputs_of(model, "mlp.up_proj")
    assert max(values(token) for token in levels) <= 7
    assert values(levels) > 7


def test_the_first_token_alone_is_real():
    inputs = inputs_of(changed("first token real"), "mlp.up_proj").unflatten(0, TOKENS.shape)
    assert values(inputs[:, 1:]) <= 3 < values(inputs[:, 0])
    both = changed("first token real + only mlp.down_neurons")
    assert values(inputs_of(both, "mlp.up_proj").unflatten(0, TOKENS.shape)[:, 1:]) > 100
    inputs = inputs_of(both, "mlp.down_proj").unflatten(0, TOKENS.shape)
    assert values(inputs[:, 1:]) <= 3 < values(inputs[:, 0])


@pytest.mark.parametrize("change", ["only mlp", "largest 5 real", "2 levels", "nonsense"])
def test_a_change_that_there_is_not_is_refused_with_those_that_there_are(change):
    with pytest.raises(ValueError, match=f"no change '{change}'. There are: 'only PLACE'"):
        parse(change, 8)


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")]


def run_here(jobs, at_a_time, after_each) -> list:
    """The commands of jobs, run_clm.py's, in this process, which has imported all that they need."""
    for job in jobs:
        for python, script, *arguments in job.commands:
            assert (python, Path(script).name) == (sys.executable, "run_clm.py")
            run_clm.main(arguments)
    return []


def test_the_command_measures_distils_and_goes_on(tmp_path, monkeypatch, capsys):
    text = write_corpus(tmp_path / "text.txt", 8)
    tokenizer = train_byte_pairs(Dataset.from_dict({"text": text.read_text().split("\n\n")}), 300)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)).eval()
    dense.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "recipe.yaml").write_text("per_device_train_batch_size: 2\nuse_cpu: true\nspike_batches: 0\n")
    flags = {
        "teacher_name_or_path": tmp_path / "llama",
        "train_file": text,
        "validation_file": text,
        "output_dir": tmp_path / "runs",
        "variants": "num_time_steps=1",
        "changes": "15 levels",
        "length": 16,
        "windows": 3,
        "max_steps": 2,
        "recipe": tmp_path / "recipe.yaml",
        "output": tmp_path / "results",
    }
    command = [decoder.__file__, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(decoder, "run_all", run_here)
    decoder.main()
    table, curve = json.loads((tmp_path / "results/decoder.json").read_text())
    assert [(row["model"], row["change"]) for row in table["rows"]] == [
        ("dense", None),
        ("num_time_steps=1", None),
        ("neuron=thrifty,num_time_steps=1", "15 levels"),
    ]
    rows = decoder.windows(str(text), tokenizer, 16, 3)
    with torch.no_grad():
        loss = dense(rows, labels=rows).loss.item()
    assert float(table["rows"][0]["loss"]) == pytest.approx(loss, abs=1e-3)
    assert float(table["rows"][0]["perplexity"]) == pytest.approx(math.exp(loss), abs=0.06)
    assert [row["tokens"] for row in curve["rows"]] == ["32", "64"]
    # What was measured once is not measured again: header and three rows, as before.
    printed = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", command[: command.index("--max_steps")])
    monkeypatch.setattr(decoder, "mean_loss", None)
    decoder.main()
    assert table_lines(capsys.readouterr().out) == table_lines(printed)[:5]
