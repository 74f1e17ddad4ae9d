"""Writes a SpikeLM as an ONNX graph for onnxruntime, which needs no torch, and compares the two on real sentences.

    python export_onnx.py --model_name_or_path checkpoints/spikelm-minilm-l6 --output_dir my-onnx

The folder has `model.onnx`, any number of sequences by any length, and `tokenizer.json`, which pads and cuts by itself.
`docs/deploy.md` has the ten lines that run them; `python export_onnx.py --help` lists every flag.
"""

from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import transformers
from transformers import HfArgumentParser, PreTrainedTokenizerBase

from configuration_spikelm.configuration_spikelm import AUTO_MAP
from deployment.comparison import SENTENCES, batches, compare
from deployment.folders import filled, refuse_used
from deployment.onnx_graph import OPSET, OUTPUTS, output_names, to_onnx
from experiment.arguments import ModelArguments
from experiment.models import load_config, load_model, load_tokenizer, longest_input
from experiment.reporting import full_disk_errors, input_errors
from modeling_spikelm import SpikeLMConfig
from modeling_spikelm.modeling_spikelm import SpikeLMPreTrainedModel

NEEDED = ("onnx", "onnxscript", "onnxruntime")
GRAPH, TOKENIZER = "model.onnx", "tokenizer.json"


@dataclass
class ExportArguments:
    model_name_or_path: str = field(metadata={"help": "A calibrated SpikeLM, on disk or on the Hub."})
    output_dir: str = field(metadata={"help": "Where the graph goes; must not exist or be empty."})
    weights: Literal["saved", "float32", "int8"] = field(
        default="saved",
        metadata={"help": "saved: as the checkpoint has them; int8 rounds those of a float checkpoint first."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(ExportArguments, allow_abbrev=False).parse_args_into_dataclasses(
        argv, look_for_args_file=False
    )
    output = Path(arguments.output_dir)
    transformers.utils.logging.disable_progress_bar()
    with input_errors(), full_disk_errors():
        missing = [name for name in NEEDED if find_spec(name) is None]
        if missing:
            raise ValueError(f'An export needs {", ".join(missing)}: pip install ".[scripts,onnx]"')
        refuse_used(output)
        model, tokenizer = load(arguments)
        names = output_names(model)
        longest = longest_input(model.config, tokenizer)
        given = batches(tokenizer, longest)
        with filled(output) as folder:
            to_onnx(model, given[0]).save(folder / GRAPH)
            save_tokenizer(tokenizer, longest, folder / TOKENIZER)
            comparisons = compare(model, folder / GRAPH, given)
    weights = "int8" if model.config.int8_weights else "float32"
    size = (output / GRAPH).stat().st_size
    print(
        f"{output / GRAPH}: {type(model).__name__}, {weights}, {size / 1e6:.1f} MB, opset {OPSET}, {', '.join(names)}"
    )
    print(
        f"onnxruntime {version('onnxruntime')} against torch {version('torch')}, {len(SENTENCES)} sentences, alone and "
        "in one batch, norm of the difference over the norm:"
    )
    for comparison in comparisons:
        print(f"  {comparison}")


def load(arguments: ExportArguments) -> tuple[SpikeLMPreTrainedModel, PreTrainedTokenizerBase]:
    """The model, as the class that it was saved as, with the weights that are asked for, and its tokenizer.

    Raises:
        ValueError: there is no export for it, or it cannot be loaded or made int8.
    """
    source = ModelArguments(model_name_or_path=arguments.model_name_or_path, model_revision=arguments.model_revision)
    config = load_config(source)
    model = load_model(auto_class_of(config, arguments.model_name_or_path), source, config)
    if arguments.weights == "int8" and not config.int8_weights:
        model.quantize_weights(embeddings=model.get_output_embeddings() is None)
    if arguments.weights == "float32" and config.int8_weights:
        model.dequantize_weights()
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None  # a checkpoint is always named
    return model.eval(), tokenizer


def auto_class_of(config: transformers.PreTrainedConfig, name: str) -> Any:
    """The Auto class of a checkpoint that can be exported.

    Raises:
        ValueError: it is none.
    """
    saved_as, *_ = config.architectures or ["a model without a class"]
    kinds = [kind.__name__ for kind in OUTPUTS]
    if config.model_type != SpikeLMConfig.model_type or saved_as not in kinds:
        raise ValueError(
            f"{name} is a {saved_as}, which cannot be exported; {', '.join(kinds[:-1])} and {kinds[-1]} can."
        )
    (auto_class,) = [key for key, value in AUTO_MAP.items() if value.endswith(f".{saved_as}")]
    return getattr(transformers, auto_class)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, longest: int, path: Path) -> None:
    """What the library `tokenizers` reads; it then pads batches, and cuts texts longer than the model takes."""
    backend = tokenizer.backend_tokenizer
    backend.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    backend.enable_truncation(longest)
    backend.save(str(path))


if __name__ == "__main__":
    main()
