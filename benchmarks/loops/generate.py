"""Greedy decoding at batch 1 of a Llama-2-7B-shaped model, packed beside its own fp16 self, in the same loop.

Both sides have the same numbers: random packed layers, and their dequantized weights in fp16. Both run the same code
between the linears, the same cache and the same CUDA graph; a token's time is the whole loop's, end to end. Before
anything is timed, logits of the packed model are compared with the dequantized model in float32.

    python -m benchmarks.loops.generate [--bits 2] [--group 64] [--new 256] [--loops llama model]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, Row, Timing, write
from eqat_train.inference.decoder import Decoder, GraphedDecoder, ModelDecoder
from eqat_train.inference.generate import generate
from eqat_train.inference.llama_decoder import LlamaDecoder
from eqat_train.inference.packed_linear import PackedLinear
from eqat_train.inference.sampling import Sampler
from eqat_train.models.loading import build_skeleton, persistent_tensors
from eqat_train.ops.dequant import dequant
from eqat_train.ops.tolerances import relative_error
from formats import QuantScheme

DEVICE, DTYPE = torch.device("cuda"), torch.float16
LOOPS: dict[str, Callable[[nn.Module, int], Decoder]] = {"llama": LlamaDecoder, "model": ModelDecoder}
NAMES = {"llama": "own block kernels", "model": "transformers' forward"}
# Two fp16 computations of the same logits may differ from float32 by this ratio: the packed one rounds elsewhere.
WORSE = 1.5


def llama_2_7b(layers: int) -> object:
    """Its configuration, with as many layers as asked for."""
    from transformers import LlamaConfig  # noqa: PLC0415

    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def random_packed(module: nn.Linear, scheme: QuantScheme, generator: torch.Generator) -> PackedLinear:
    """Packed words of random codes and zero-points; weights have a standard deviation of about 0.02."""
    with DEVICE:
        packed = PackedLinear.empty(
            scheme, module.out_features, module.in_features, scale_dtype=torch.float16, g_idx=False
        )
    used = 32 // scheme.bits * scheme.bits  # 3 bits leave two bits of a word unused
    for words in (packed.qweight, packed.qzeros):
        values = torch.randint(0, 2**used, words.shape, generator=generator, device=DEVICE)
        words.copy_((values & 0xFFFFFFFF).to(torch.int32))
    packed.scales.uniform_(0.5, 1.5, generator=generator).mul_(0.03 / 2**scheme.bits)
    return packed


def packed_model(config: object, scheme: QuantScheme) -> nn.Module:
    """A model with random packed linears, directly on the GPU."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    model = build_skeleton(config, DTYPE)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, random_packed(module, scheme, generator))
    for owner, local, _ in list(persistent_tensors(model)):
        tensor = getattr(owner, local)
        if tensor.device.type == "meta":
            value = torch.ones(tensor.shape, dtype=DTYPE, device=DEVICE)
            if tensor.dim() == 2:
                value.normal_(0, 0.02, generator=generator)
            owner._parameters[local] = nn.Parameter(value, requires_grad=False)
    return model.to(DEVICE)


def dense_twin(model: nn.Module, config: object, dtype: torch.dtype) -> nn.Module:
    """The same numbers in full precision; what is not a linear is shared where the dtype is the same."""
    twin = build_skeleton(config, dtype)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            weight = dequant(module.packed_weight(), module.scales.float(), DTYPE).to(dtype)
            twin.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    for owner, local, full in list(persistent_tensors(twin)):
        if getattr(owner, local).device.type == "meta":
            owner._parameters[local] = nn.Parameter(model.get_parameter(full).to(dtype), requires_grad=False)
    return twin.to(DEVICE)


@torch.inference_mode()
def read(decoder: Decoder, ids: Tensor, prompt: int) -> Tensor:
    """Logits after the prompt and after each further token of ids ``[1, length]``."""
    logits = [decoder.prefill(ids[:, :prompt]).clone()]
    logits += [decoder.step(ids[:, i : i + 1]).clone() for i in range(prompt, ids.shape[1])]
    return torch.stack(logits)


def check(config: object, scheme: QuantScheme, loop: str, ids: Tensor) -> None:
    """Ends the benchmark unless packed logits are as close to float32's as those of the fp16 model."""
    model = packed_model(config, scheme)
    twin, exact = dense_twin(model, config, DTYPE), dense_twin(model, config, torch.float32)
    with torch.inference_mode():
        expected = exact(input_ids=ids).logits[0, 7:]
    del exact
    errors = [
        relative_error(read(GraphedDecoder(LOOPS[loop](side, ids.shape[1])), ids, 8), expected)
        for side in (model, twin)
    ]
    print(f"{NAMES[loop]}: relative error of logits to float32's: packed {errors[0]:.2e}, fp16 {errors[1]:.2e}")
    if not errors[0] <= WORSE * errors[1]:
        sys.exit(f"wrong, so not timed: the packed model is more than {WORSE} times as far off as fp16")


def time_loop(decoder: Decoder, prompt: Tensor, new: int, runs: int) -> tuple[Timing, float]:
    """Microseconds a token of whole runs of the generating loop, and of the first run, which compiles and captures."""
    times = []
    for _ in range(runs + 1):
        torch.cuda.synchronize()
        tokens = generate(decoder, prompt, Sampler(0.0, 1.0, 0, DEVICE), new)
        next(tokens)  # the prompt
        started = time.perf_counter()
        count = sum(1 for _ in tokens)
        times.append((time.perf_counter() - started) / count * 1e6)
    deciles = statistics.quantiles(times[1:], n=10, method="inclusive")
    return Timing(deciles[1], statistics.median(times[1:]), deciles[7]), times[0]


def weight_bytes(model: nn.Module) -> int:
    """Bytes that every token has to read: all but the embedding."""
    embedding = model.get_input_embeddings().weight
    tensors = [*model.parameters(), *(buffer for _, buffer in model.named_buffers())]
    return sum(tensor.nbytes for tensor in tensors if tensor is not embedding)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--loops", nargs="+", choices=list(LOOPS), default=["llama", "model"])
    given = parser.parse_args()
    scheme, config = QuantScheme(given.bits, given.group), llama_2_7b(given.layers)
    generator = torch.Generator(DEVICE).manual_seed(1)
    ids = torch.randint(0, 32000, (1, max(given.prompt, 16)), generator=generator, device=DEVICE)
    for loop in given.loops:
        rows = []
        check(config, scheme, loop, ids[:, :16])
        for packed in (False, True):
            model = packed_model(config, scheme)
            model = model if packed else dense_twin(model, config, DTYPE)
            nbytes = weight_bytes(model)
            decoder = GraphedDecoder(LOOPS[loop](model, given.prompt + given.new))
            del model
            torch.cuda.reset_peak_memory_stats()
            timing, first = time_loop(decoder, ids[:, : given.prompt], given.new, given.runs)
            rows.append(
                Row(
                    "generate",
                    f"{'eqat' if packed else 'fp16'}, {NAMES[loop]}",
                    f"Llama-2-7B {given.prompt}+{given.new}",
                    given.bits if packed else 0,
                    given.group if packed else 0,
                    "float16",
                    timing,
                    bytes=nbytes,
                    peak_mib=torch.cuda.max_memory_allocated() / 2**20,
                    note=f"{1e6 / timing.p50:.0f} tokens/s; first run {first:.0f} us a token",
                )
            )
            del decoder
            torch.cuda.empty_cache()
        write(rows, RESULTS / "generate.csv")
        print(f"{rows[1].impl}: {rows[0].time.p50 / rows[1].time.p50:.2f} times as fast as fp16")


if __name__ == "__main__":
    main()
