"""What the tests of tasks share: lm-eval's own model of transformers', questions, and data written on the spot."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from streamprune.pipeline.source import Source
from streamprune.tasks.streamed_lm import StreamedLM
from streamprune.texts.tokenizer import load_tokenizer
from transformers import AutoModelForCausalLM

WORDS = "the a cat dog sat on mat ran far away from home and then it was gone again".split()
