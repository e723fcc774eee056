"""Hooks on the Linears of a layer, for as long as a block runs."""

from __future__ import annotations


class SeenEnough(Exception):
    """Raised by a hook that has seen all it wants: what comes after it in the layer is not computed."""
