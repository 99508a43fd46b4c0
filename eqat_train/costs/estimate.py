"""The formulae. Constants in bytes a weight are what the code keeps; those of time are in :mod:`.machine`.

``w`` are a block's weights, ``t`` the tokens of a step on one GPU, ``f`` the numbers a token that enter or leave its
linears, ``h`` the hidden size, ``g`` the group size, ``b`` the bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from .machine import Machine
from .shapes import BlockShape, ModelShape

__all__ = [
    "Disk",
    "Work",
    "block_bytes",
    "block_seconds",
    "cpu_bytes",
    "disk",
    "e2e_bytes",
    "e2e_seconds",
    "packed_bytes",
    "qat_bytes",
]

# A Block-AP step on a GPU: fp32 weight and two moments, the dequantized weight in bf16, and a bit for scales and
# zero-points; and what autograd keeps, fitted to three measured blocks (docs/scaling.md).
GPU_WEIGHT_BYTES, GPU_FEATURE_BYTES = 15.0, 5.3
# On a CPU: fp32 weight, gradient and two moments; what is differentiated is fp32 and a linear at a time.
CPU_WEIGHT_BYTES, CPU_LARGEST_BYTES, CPU_FEATURE_BYTES = 16.0, 20.0, 12.0
PROCESS_BYTES = 640 * 2**20  # Python, torch and transformers, imported
HALF = 2  # bytes of a bf16 number


@dataclass(frozen=True)
class Work:
    """What a run is to do; defaults are the paper's.

    Attributes:
        bits: of the codes.
        group_size: of the codes.
        samples: windows of Block-AP.
        validation: windows of its validation.
        seq_len: tokens of a window.
        batch: windows a step, on all GPUs together.
        epochs: passes over the windows; 0 when Block-AP is not run.
        activation_bytes: of a number of the hidden states that are kept.
        e2e_samples: windows of E2E-QP; 0 when it is not run.
        e2e_seq_len: tokens of a window.
        e2e_batch: windows a step, on all GPUs together.
        e2e_micro_batch: windows a pass on one GPU.
        e2e_epochs: passes over the windows.
    """

    bits: int = 2
    group_size: int = 64
    samples: int = 4096
    validation: int = 64
    seq_len: int = 2048
    batch: int = 2
    epochs: int = 2
    activation_bytes: int = 4
    e2e_samples: int = 4096
    e2e_seq_len: int = 4096
    e2e_batch: int = 32
    e2e_micro_batch: int = 1
    e2e_epochs: int = 1

    def activations(self, hidden: int) -> int:
        """Bytes of the two streams of hidden states, on all GPUs together."""
        return 2 * (self.samples + self.validation) * self.seq_len * hidden * self.activation_bytes


def packed_bytes(weights: int, work: Work) -> float:
    """Bytes of packed weights: codes, and a zero-point and a 16-bit scale a group."""
    return weights * (work.bits / 8 + (work.bits / 8 + HALF) / work.group_size)


def block_bytes(block: BlockShape, tokens: int) -> float:
    """GPU bytes of training a block, hidden states elsewhere: ``15 w + 5.3 t f``."""
    return GPU_WEIGHT_BYTES * block.parameters + GPU_FEATURE_BYTES * tokens * block.features


def cpu_bytes(block: BlockShape, tokens: int, *, on_gpu: bool) -> float:
    """CPU bytes of a run besides hidden states.

    On a GPU two copies of a tensor on its way, 6 bytes for each weight of the largest linear; else the whole block.
    """
    if on_gpu:
        return PROCESS_BYTES + 6 * block.largest + packed_bytes(block.weights, Work(bits=8))
    trained = CPU_WEIGHT_BYTES * block.parameters + CPU_LARGEST_BYTES * block.largest
    return PROCESS_BYTES + trained + CPU_FEATURE_BYTES * tokens * block.features


def e2e_bytes(model: ModelShape, work: Work, *, ranks: int = 1, element: int = HALF) -> float:
    """Device bytes of E2E-QP, every layer but the last recomputed in backward.

    A weight takes its packed bits, its share of an fp32 scale and of two moments, ``(b + b/g)/8 + 12/g``; a layer keeps
    its input and its attention's output, ``4 t h``; the last one all, ``2 t f``; two dequantized linears and head
    and embeddings are there besides.

    Args:
        model: its shape.
        work: the windows.
        ranks: over which the packed codes are shared (``--e2e-share``); scales and moments are on each.
        element: bytes of a number computed with.
    """
    tokens = work.e2e_micro_batch * work.e2e_seq_len
    weight = work.bits / 8 / ranks + work.bits / work.group_size / 8 + 12 / work.group_size
    layers = model.weights * weight + len(model.blocks) * 2 * tokens * model.hidden * element
    last = model.largest
    return layers + element * (tokens * last.features + 2 * last.largest + model.outside)


def qat_bytes(parameters: int, weights: int, *, ranks: int = 1, share_teacher: bool = False) -> float:
    """Device bytes of E2E-QAT besides activations: ``16 w / n`` of the trained weights and ``2 w`` of the teacher's.

    A trained weight is kept in fp32 with its gradient and two moments, and in the teacher in 16 bits; what is not in
    trained layers is on every rank, in 32 and in 16 bits.

    Args:
        parameters: of the whole model.
        weights: of those, in trained layers.
        ranks: that share the trained weights.
        share_teacher: they share the teacher's too.
    """
    teacher = HALF * weights / (ranks if share_teacher else 1)
    return 16 * weights / ranks + teacher + (4 + HALF) * (parameters - weights)


def block_seconds(block: BlockShape, hidden: int, work: Work, machine: Machine, gpus: int = 1) -> float:
    """Time of one block: steps, two passes of each stream's tokens, and what every block costs.

    A step multiplies three times (``6 t w`` operations), goes once over each weight for AdamW (28 bytes) and over
    each feature for what lies between; its gradients, 2 bytes a weight, are reduced over the GPUs.
    """
    tokens = work.batch * work.seq_len / gpus
    step = 6 * tokens * block.active / machine.matmul + 28 * block.weights / machine.copy
    step += tokens * block.features * machine.seconds_a_feature + reduce_seconds(2 * block.weights, machine, gpus)
    every = (work.samples + work.validation) * work.seq_len / gpus
    passes = 2 * (2 * block.active / machine.matmul + block.features * machine.seconds_a_feature / 3)
    moved = 4 * hidden * work.activation_bytes / machine.link
    return work.epochs * work.samples / work.batch * step + every * (passes + moved) + machine.block_overhead


def e2e_seconds(model: ModelShape, work: Work, machine: Machine, gpus: int = 1) -> float:
    """Time of E2E-QP: forward, backward and forward again, 8 operations a weight and token, and the head's 4."""
    tokens = work.e2e_samples * work.e2e_epochs * work.e2e_seq_len / gpus
    active = sum(block.active for block in model.blocks)
    compute = tokens * (8 * active + 4 * model.head) / machine.e2e_matmul
    steps = work.e2e_samples * work.e2e_epochs / work.e2e_batch
    return compute + steps * reduce_seconds(4 * model.weights / work.group_size, machine, gpus)


def reduce_seconds(nbytes: float, machine: Machine, gpus: int) -> float:
    """A ring all-reduce: every GPU sends and receives ``2 (n - 1) / n`` of the bytes."""
    network = machine.network if gpus <= machine.gpus_a_node else machine.between_nodes
    return 2 * (gpus - 1) / gpus * nbytes / network


@dataclass(frozen=True)
class Disk:
    """Bytes on disk at the moment with most of them.

    Attributes:
        activations: 0 when they are kept in memory.
        blocks: finished blocks.
        block_ap: Block-AP's checkpoint, before E2E-QP.
        state: of E2E-QP, the new one beside the old.
        output: the checkpoint.
    """

    activations: float
    blocks: float
    block_ap: float
    state: float
    output: float

    @property
    def peak(self) -> float:
        """The most at one time; a stage's files go when its checkpoint is there."""
        training = self.activations + self.blocks
        return max(training, self.blocks + (self.block_ap or self.output), self.block_ap + self.state + self.output)


def disk(model: ModelShape, work: Work, *, on_disk: bool) -> Disk:
    """Of a whole run; parameters outside of blocks are stored in 16 bits."""
    packed = packed_bytes(model.weights, work)
    whole = packed + HALF * (model.parameters - model.weights)
    both = work.epochs > 0 and work.e2e_samples > 0
    return Disk(
        activations=work.activations(model.hidden) if on_disk and work.epochs else 0,
        blocks=packed,
        block_ap=whole if both else 0,
        state=2 * 12 * model.weights / work.group_size if work.e2e_samples else 0,
        output=whole,
    )
