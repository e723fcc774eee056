"""What the tests of trainings share."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Instructions with short answers."""
    file = tmp_path / "data.jsonl"
    records = ({"instruction": f"{n}?", "output": "the boats lay still " * 2} for n in range(24))
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file
