"""What a machine does in a second, measured; see docs/results.md and docs/scaling.md for the runs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["H200", "Machine"]


@dataclass(frozen=True)
class Machine:
    """A GPU and what is around it.

    Attributes:
        name: for tables.
        memory: bytes of a GPU.
        matmul: operations a second of Block-AP's matmuls.
        e2e_matmul: of E2E-QP's passes as a whole, attention and dequantization included.
        copy: bytes a second, of AdamW's pass over the weights.
        seconds_a_feature: for what lies between matmuls, for a number that enters or leaves a linear.
        link: bytes a second between GPU and CPU memory, one way.
        network: bytes a second of an all-reduce, within a node.
        between_nodes: the same, over nodes.
        gpus_a_node: in one node.
        block_overhead: seconds a block for reading, packing, writing and capturing.
    """

    name: str
    memory: int
    matmul: float
    e2e_matmul: float
    copy: float
    seconds_a_feature: float
    link: float
    network: float
    between_nodes: float
    gpus_a_node: int
    block_overhead: float


# 739 TFLOP/s and 87 % of 4.30 TB/s: docs/results.md. Time a feature: what is left of the compiled 7B step. E2E-QP's
# rate: a layer of 13B and of 70B. Link and networks: half of the nominal rates (PCIe 5, NVLink 4, 400 Gbit/s a GPU).
H200 = Machine(
    name="H200",
    memory=141 * 10**9,
    matmul=7.39e14,
    e2e_matmul=6.0e14,
    copy=3.74e12,
    seconds_a_feature=5.4e-12,
    link=28e9,
    network=225e9,
    between_nodes=25e9,
    gpus_a_node=8,
    block_overhead=0.5,
)
