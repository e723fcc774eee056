"""GPUs as their makers describe them, for plans of a card that is not there."""

from __future__ import annotations

# Dense bfloat16 with float32 accumulation in TFLOP/s, and GiB: NVIDIA's whitepapers on GA102, GA100, AD102 and GH100,
# and the data sheet of the L4.
CARDS = {
    "rtx3090": (71.0, 24),
    "rtx4090": (165.2, 24),
    "a6000": (154.8, 48),
    "l4": (121.0, 24),
    "a100": (312.0, 80),
    "h100": (989.4, 80),
}
