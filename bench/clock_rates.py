"""Rates of machines that the virtual clock knows, each with where it is from. None is fitted to a run's time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamprune.planning.cards import CARDS

# Of the sheet's dense half-precision peak: 681 of 989 TFLOP/s were measured on an H100 of a product of a layer's size,
# 4096 x 4096 over 2048 tokens, and 791 of the largest ones, which layers do not have.
PRODUCT_SHARE = 681 / 989
# FlashAttention-2, which torch has: 50-73 % of an A100's peak (2307.08691), 35 % of an H100's (2407.08608).
ATTENTION_SHARE = {"h100": 0.35}
OTHER_ATTENTION_SHARE = 0.5
GRAD_NORM_SHARE = 0.4  # of the library's product: bench/README.md, 37-41 %
MEMORY_SHARE = 0.9  # of the sheet's memory: 3.0 of 3.35 TB/s by `perturb` on an H100 (bench/README.md)
# TFLOP/s of float32 outside tensor cores and GB/s of memory, from the makers' sheets.
SHEETS = {
    "rtx3090": (35.6, 936),
    "rtx4090": (82.6, 1008),
    "a6000": (38.7, 768),
    "l4": (30.3, 300),
    "a100": (19.5, 2039),
    "h100": (66.9, 3350),
}
# Pageable memory in copies of 64 MiB, measured on an RTX 4090's host over PCIe 4 (NVlabs/cuda-oxide, pull request 976):
# 12.9 GB/s up, where it was 18.4 of 16 MiB, which fit into the processor's cache. Down 12.3 of 16 MiB; of 64 MiB by the
# same proportion.
PAGEABLE_UP, PAGEABLE_DOWN = 12.9e9, 12.3e9 * 12.9 / 18.4
FRESH = 1.4e9  # down into memory that the system gives out page by page (pytorch/pytorch, pull request 138018)
PINNING = 1.6e9  # measured on an H100's host, of a large allocation
REGISTERING = 14e9  # the same of large pages, touched by torch's threads first (paging/device.py; an H200's host)
PAGE_CACHE = 4e9  # a thread, into pinned chunks: four of them 16 GB/s on an H100's host (bench/README.md, Overlap)
DISK = 3e9  # an NVMe drive on PCIe 4
HOST_MEMORY = 20e9  # a pass over host memory by torch's threads
# Seconds of the host for one operation: 24 layers on 128 tokens, which the host's work alone limits, took 0.03 s on an
# H100 (bench/results/overlap-h100.json), at some 65 operations a layer.
LAUNCH = 0.03 / 24 / 65


@dataclass(frozen=True)
class Machine:
    """Machine: FLOP/s of half and of float32 products, bytes/s of everything else, and seconds of a launch.

    Attributes:
        attention, grad_norm: FLOP/s of attention, and of the kernel of that name.
        memory: of the device. link_up, link_down: of pinned memory to the device and back.
        pageable_up, pageable_down: of other memory. fresh: of memory that is written for the first time.
        pinning: taking pinned memory. registering: memory of large pages. page_cache: reading from it, by one
            thread. disk: reading, by all.
    """

    half: float
    single: float
    attention: float
    grad_norm: float
    memory: float
    link_up: float
    link_down: float
    pageable_up: float = PAGEABLE_UP
    pageable_down: float = PAGEABLE_DOWN
    fresh: float = FRESH
    pinning: float = PINNING
    registering: float = REGISTERING
    page_cache: float = PAGE_CACHE
    disk: float = DISK
    host_memory: float = HOST_MEMORY
    launch: float = LAUNCH

    def products(self, dtype: torch.dtype) -> float:
        """FLOP/s of products of operands of a dtype."""
        return self.half if dtype.itemsize == 2 else self.single


def machine_of(card: str, **other: float) -> Machine:
    """The machine of a card of the planner's table, with `other` rates than it has by default."""
    peak, (single, memory), link = CARDS[card].tflops * 1e12, SHEETS[card], CARDS[card].link * 1e9
    rates = {
        "half": peak * PRODUCT_SHARE,
        "single": single * 1e12,
        "attention": peak * ATTENTION_SHARE.get(card, OTHER_ATTENTION_SHARE),
        "grad_norm": peak * PRODUCT_SHARE * GRAD_NORM_SHARE,
        "memory": memory * 1e9 * MEMORY_SHARE,
        "link_up": link,
        "link_down": link,
    }
    return Machine(**rates | other)
