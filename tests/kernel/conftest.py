"""What kernels must not do: read memory before they write it."""

from __future__ import annotations

import warnings

import pytest
import torch


@pytest.fixture
def uninitialised_memory_is_nan():
    """Whatever torch.empty makes holds NaN, so that a kernel which reads it before writing it shows."""
    # On a GPU some operations have no deterministic form (kthvalue, whose values do not depend on it).
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
        yield
    torch.use_deterministic_algorithms(False)
