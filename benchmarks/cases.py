"""What can be measured: shapes, sides, and `Case`, the order that a command gives to one worker process. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

SHAPES = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
    "small": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
VOCABULARY_SIZES = {"tiny": 128, "small": 30522, "base": 30522}
BATCH_SIZES = {"tiny": 2, "small": 8, "base": 4}

# The stock BERT of transformers, and what a command says about the other sides.
HEADLINE = "bert"
SIDES = {
    "bert": "stock transformers BERT, sdpa attention: the ratio's denominator",
    "bert-sparse": "the same BERT with masked-LM logits at the labels only: what of our gain is the sparse head",
    "bert-int8": "the same BERT under PyTorch's dynamic int8 quantisation (inference on the CPU)",
    "bert-onnx": "the same BERT in onnxruntime",
    "bert-int8-onnx": "the same BERT in onnxruntime, under its dynamic int8 quantisation",
    "spikelm": "SpikeLM; in training its logits at the labels only, as run_mlm.py trains it",
    "spikelm-dense": "SpikeLM with every logit in training, as the library has it unless told otherwise",
    "spikelm-int8": "SpikeLM after quantize_weights() (inference)",
    "spikelm-onnx": "SpikeLM in onnxruntime, as export_onnx.py exports it",
    "spikelm-int8-onnx": "SpikeLM after quantize_weights() in onnxruntime",
    "oracle": "SpikeLM with its step-by-step oracle neuron, dense logits and no fast path: our own strawman",
}
SPIKING_SIDES = ("spikelm", "spikelm-dense", "spikelm-int8", "spikelm-onnx", "spikelm-int8-onnx", "oracle")
TRAINED_SIDES = ("bert", "bert-sparse", "spikelm", "spikelm-dense", "oracle")
# Those that are calibrated, which have kernels and int8 counterparts.
TIMED_NEURONS = ("elastic", "learned", "thrifty")
# Of modeling_spikelm.fast_paths, which needs torch.
FAST_PATHS = (
    "fused_neurons",
    "cpu_neurons",
    "triton_neurons",
    "triton_dropout",
    "cpu_products",
    "cpu_dropout",
    "cpu_attention",
    "packed_spikes",
    "autocast_spikes",
)


@dataclass(frozen=True)
class Case:
    """One thing to measure in one process.

    `measure` is "training" or "inference" (times), "memory" (peak of training steps) or "loading" (peak of
    `from_pretrained`). A BERT has `num_time_steps` 1.
    """

    measure: str
    side: str
    shape: str
    batch_size: int
    num_time_steps: int = 1
    neuron: str = "elastic"
    length: int = 128
    dropout: float = 0.1
    dtype: str = "float32"
    device: str = "cpu"
    compile: bool = False
    warmup: int = 3
    gradient_checkpointing: bool = False
    with_optimizer: bool = False
    without: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        if self.side not in SPIKING_SIDES:
            return self.side
        neuron = [self.neuron] if self.neuron != "elastic" else []
        return " ".join([self.side, *neuron, f"T={self.num_time_steps}", *(f"-{name}" for name in self.without)])

    @property
    def is_int8(self) -> bool:
        return "int8" in self.side

    @property
    def runs_in_onnx(self) -> bool:
        return self.side.endswith("onnx")

    @property
    def setting(self) -> str:
        """What all sides of a table have in common."""
        compiled = ", compiled" if self.compile else ""
        return (
            f"{self.shape}, batch {self.batch_size} x {self.length} tokens, {self.dtype} on {self.device}{compiled}, "
            f"dropout {self.dropout}"
        )


def list_of(*default: object, choices: object = None, help: str) -> list:
    """A dataclass field that HfArgumentParser reads as a list."""
    metadata = {"help": help} if choices is None else {"help": help, "choices": list(choices)}
    return field(default_factory=lambda: list(default), metadata=metadata)


@dataclass
class CommonArguments:
    """Options that every benchmark has."""

    shape: list[str] = list_of("small", choices=SHAPES, help="Sizes of the models; tiny is for trying the command.")
    num_time_steps: list[int] = list_of(1, 4, help="Time steps T of the SpikeLMs.")
    batch_size: int | None = field(default=None, metadata={"help": f"Sequences per batch (default: {BATCH_SIZES})."})
    length: int = field(default=128, metadata={"help": "Tokens per sequence; no padding."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout of hidden states and attention while training."})
    dtype: Literal["float32", "bf16_autocast"] = field(default="float32", metadata={"help": "Arithmetic."})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "Where to run."})
    compile: bool = field(default=False, metadata={"help": "torch.compile every side."})
    without: list[str] = list_of(
        choices=FAST_PATHS, help="Fast paths that the SpikeLM sides do without (modeling_spikelm/fast_paths.py)."
    )
    rounds: int = field(default=3, metadata={"help": "Rounds; in each, every side has its turn."})
    keep_environment: bool = field(
        default=False, metadata={"help": "Leave the memory allocator's environment variables (MALLOC_*) alone."}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "Folder for the results, benchmarks/results; a repeated command replaces its own."},
    )

    def __post_init__(self) -> None:
        for name in ("length", "rounds", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} is not possible; it must be at least 1.")
        if min(self.num_time_steps) < 1:
            raise ValueError(f"--num_time_steps {min(self.num_time_steps)} is not possible; it must be at least 1.")

    def cases(
        self, measure: str, shape: str, sides: list[str], neurons: Sequence[str] = ("elastic",), **changes: object
    ) -> list[Case]:
        """The cases of a shape: a BERT side once, a SpikeLM side once for every neuron and number of time steps."""
        common = {
            "measure": measure,
            "shape": shape,
            "batch_size": self.batch_size or BATCH_SIZES[shape],
            "length": self.length,
            "dropout": self.dropout,
            "dtype": self.dtype,
            "device": self.device,
            "compile": self.compile,
        } | changes
        return [
            Case(
                side=side,
                num_time_steps=steps,
                neuron=neuron,
                without=tuple(self.without) if side in ("spikelm", "spikelm-dense") else (),
                **common,
            )
            for side in sides
            for neuron in (dict.fromkeys(neurons) if side in SPIKING_SIDES else ("elastic",))
            for steps in (self.num_time_steps if side in SPIKING_SIDES else [1])
        ]


@dataclass
class TimingArguments(CommonArguments):
    """Options of the benchmarks that measure time."""

    repeats: int = field(default=5, metadata={"help": "Timed iterations of a side in one round."})
    warmup: int = field(default=3, metadata={"help": "Iterations before the first round, not counted."})
