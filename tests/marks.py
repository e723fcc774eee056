"""What is left to `make test-slow`."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case of a parametrized test that is as right as its neighbours, and takes long."""
    return pytest.param(*values, marks=pytest.mark.slow)
