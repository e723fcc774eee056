"""GPUs as their makers describe them, for plans of a card that is not there."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """Card: dense bfloat16 with float32 accumulation in TFLOP/s, memory in GiB, link to the host in GB/s each way."""

    tflops: float
    gib: int
    link: float


# What copies of pinned memory get out of 16 lanes of PCIe 4 and 5 (32 and 63 GB/s): nvbandwidth gives 24.8 GB/s on an
# A100 and 52.8 on an H100, where 55 were measured too. Of PCIe 3 it would be 12.
PCIE_4, PCIE_5 = 25.0, 55.0
# NVIDIA's whitepapers on GA102, GA100, AD102 and GH100, and the data sheet of the L4.
CARDS = {
    "rtx3090": Card(71.0, 24, PCIE_4),
    "rtx4090": Card(165.2, 24, PCIE_4),
    "a6000": Card(154.8, 48, PCIE_4),
    "l4": Card(121.0, 24, PCIE_4),
    "a100": Card(312.0, 80, PCIE_4),
    "h100": Card(989.4, 80, PCIE_5),
}
