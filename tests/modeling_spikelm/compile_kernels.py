"""Compiles every kernel for a card that is not there: `TRITON_INTERPRET=0 python compile_kernels.py`, for a test.

Models run on a CPU with tensors that pass for those of a GPU. What a launch is given is what is compiled, for compute
capability 9.0; nothing is launched, so what comes out has no meaning. Prints one line of JSON for each kernel and kind
of arguments: its name, how its code reads and writes a card's memory, how it divides, and how wide its offsets are.
"""

import json
import re
from collections import Counter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_spikelm import (
    SpikeLMConfig,
    SpikeLMModel,
    attention,
    int8_modules,
    launching,
    seeded_dropout,
    spike_kernels,
)
from modeling_spikelm.fast_paths import FAST_PATHS

CARD = GPUTarget("cuda", 90, 32)
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "i8", "int32": "i32", "int64": "i64"}
compiled = set()


def compile_only(kernel, like, tensors, settings, plan):
    _, sizes = plan(like)
    signature, constants, attributes = {}, {}, {}
    for place, (parameter, value) in enumerate(zip(kernel.params, (*tensors, *settings, *sizes), strict=True)):
        is_aligned = False
        if value is None or parameter.is_constexpr or (type(value) is int and value == 1):
            kind, constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            kind = f"*{DTYPES[str(value.dtype).removeprefix('torch.')]}"
            is_aligned = not parameter.do_not_specialize_on_alignment
        else:
            kind = "fp32" if isinstance(value, float) else "i32"
            is_aligned = isinstance(value, int) and value % 16 == 0
        signature[parameter.name] = kind
        if is_aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    key = json.dumps([kernel.fn.__name__, signature, sorted(map(str, constants.items())), sorted(attributes)])
    if key in compiled:
        return
    compiled.add(key)
    code = ASTSource(kernel, signature, constants, attributes)
    forms = triton.compile(code, target=CARD, options={"enable_fp_fusion": False}).asm
    assembly = forms["ptx"]
    accesses = Counter(re.findall(r"((?:ld|st)\.global\S*)", assembly))
    # By an approximation of a quotient other spikes would fire than on a CPU.
    quotients = Counter(re.findall(r"div\.\w+", assembly))
    # Where the values of a tile lie, whose tensor may have more than 2^31; a channel's number is none of these.
    tile = r"tt\.addptr.* tensor<(?:\d+x\d+|\d{4,})x!tt\.ptr<\w+>>, tensor<[\dx]+x(\w+)>"
    offsets = Counter(re.findall(tile, forms["ttir"]))
    found = {"accesses": accesses, "quotients": quotients, "offsets": offsets}
    print(json.dumps({"kernel": kernel.fn.__name__, **found}))


def make_model(neuron, **fields):
    config = SpikeLMConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        neuron=neuron,
        num_time_steps=4,
        **fields,
    )
    model = SpikeLMModel(config, add_pooling_layer=False)
    FAST_PATHS.triton_neurons = False
    model.calibrate([{"input_ids": torch.arange(20).view(2, 10)}])
    FAST_PATHS.triton_neurons = True
    return model


def forward(model):
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=torch.arange(20).view(2, 10)).last_hidden_state


def main():
    for module in (launching, attention):
        module.is_eager_on_gpu = lambda tensor: True
    launching._triton_works = lambda device: True
    for module in (spike_kernels, seeded_dropout, launching):
        module.launch = compile_only
    seeded_dropout.LEAST_VALUES = 1
    int8_modules.has_tensor_cores = lambda device: True
    int8_modules.has_int8_kernel = lambda device: False
    kinds = {"elastic": {}, "learned": {"membrane_reset": "symmetric"}, "thrifty": {"spike_cost": 0.1}, "lif": {}}
    for neuron, fields in kinds.items():
        model = make_model(neuron, **fields)
        forward(model.train()).sum().backward()
        if neuron in ("elastic", "thrifty"):
            model.eval().quantize_weights()
            with torch.no_grad():
                forward(model)
    number = torch.zeros(1)
    launching.launch(launching._trial, number, (number,), (), lambda _: ((1, 1, 1), ()))


if __name__ == "__main__":
    main()
