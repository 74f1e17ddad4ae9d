"""Makes a trained SpikeLM encoder ready to be handed out: int8 weights, sentence embeddings, card, in the Hub's layout.

    python export_sentence_encoder.py --model_name_or_path runs/converted --output_dir my-encoder

What comes out loads with AutoModel and, as a model with mean pooling, with sentence-transformers. With --data_dir its
card says how well it finds similar sentences, with --teacher_name_or_path next to the dense model that it learned from.
"""

from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

from deployment.folders import filled, refuse_used
from deployment.sentence_encoder import (
    CARD,
    ExportArguments,
    card_of,
    card_of_training,
    of_bare_encoder,
    of_rounded_weights,
    write_modules,
)
from experiment.reporting import full_disk_errors, input_errors
from glue_tasks.loading import load_task
from glue_tasks.tasks import TASKS
from modeling_spikelm import SpikeLMModel
from modeling_spikelm.neurons import neuron_groups


@full_disk_errors()
def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(ExportArguments).parse_args_into_dataclasses(argv, look_for_args_file=False)
    output = Path(arguments.output_dir)
    with input_errors():
        refuse_used(output)
        if arguments.teacher_name_or_path and not arguments.data_dir:
            raise ValueError("--teacher_name_or_path is measured on --data_dir; name that as well, or leave it out.")
        if arguments.teacher_name_or_path:
            try:
                AutoConfig.from_pretrained(arguments.teacher_name_or_path)  # its weights are read at the very end
            except (OSError, ValueError) as error:
                raise ValueError(f"--teacher_name_or_path {arguments.teacher_name_or_path}: {error}") from error
        pairs = load_task(TASKS["stsb"], arguments.data_dir)["validation"] if arguments.data_dir else None
        model = load_encoder(arguments.model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
        least = tokenizer.num_special_tokens_to_add() + 1
        if arguments.max_seq_length < least:
            raise ValueError(
                f"--max_seq_length {arguments.max_seq_length} leaves no room for text; give {least} or more."
            )
        # A longer text would be an error of the encoder, where the card says that it is cut.
        arguments.max_seq_length = min(arguments.max_seq_length, model.config.max_position_embeddings)
        trained = card_of_training(arguments.model_name_or_path)
        if trained is not None:
            trained.text = of_bare_encoder(trained.text, model)
        if not arguments.float_weights and not model.config.int8_weights:
            model.quantize_weights(embeddings=True)
            if trained is not None:
                trained.text = of_rounded_weights(trained.text)
    with input_errors(), filled(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_modules(folder, model.config.hidden_size, arguments.max_seq_length)
        card_of(arguments, trained, model, tokenizer, folder, pairs).save(folder / CARD)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {size / 1e6:.1f} MB, {model.num_parameters():,} float parameters")


def load_encoder(name: str) -> SpikeLMModel:
    """The encoder, with a pooler if the checkpoint has one.

    Raises:
        ValueError: its weights are damaged, or its neurons not calibrated, so that vectors would depend on what is
            encoded first.
    """
    try:
        model, found = SpikeLMModel.from_pretrained(name, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"The weights of {name} are damaged ({error}); copy the checkpoint again.") from error
    if any(key.startswith("pooler.") for key in found["missing_keys"]):
        model.pooler = None
    if not all(neurons.is_calibrated for neurons in neuron_groups(model)):
        raise ValueError(f"{name} is not calibrated, or no SpikeLM: call model.calibrate(batches) and save it first.")
    return model


if __name__ == "__main__":
    main()
