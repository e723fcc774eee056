"""`streamprune eval --tasks` scores as lm-eval itself does, on data from a directory, and refuses what it cannot."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_runner import cells, check_refusal, parquet, snapshot
from tiny_models import save_tiny
from whole_models import load

pytest.importorskip("lm_eval")

import datasets
import lm_eval
from lm_eval.models.huggingface import HFLM

from streamprune import UsageError, evaluate_tasks
from streamprune.errors import TaskError
from streamprune.tasks import loading
from streamprune.tasks.loading import load_tasks
from streamprune.tasks.local_data import local_dataset, read_split
from streamprune.tasks.suites import SUITES, tasks_of
from streamprune.texts.tokenizer import load_tokenizer

QUESTIONS = 12
Row = dict[str, Any]


def sentence(draw: random.Random, count: int = 3) -> str:
    return " ".join(draw.choice(["the", "cat", "sat", "on", "mats", "far", "away"]) for _ in range(count))


def piqa(draw: random.Random) -> Row:
    return {"goal": sentence(draw), "sol1": sentence(draw), "sol2": sentence(draw), "label": draw.randrange(2)}


def winogrande(draw: random.Random) -> Row:
    said = f"{sentence(draw)} _ {sentence(draw, 2)}"
    return {"sentence": said, "option1": "cat", "option2": "the mat", "answer": str(draw.randrange(2) + 1)}


def arc(draw: random.Random) -> Row:
    choices = {"text": [sentence(draw, 1 + number) for number in range(4)], "label": list("ABCD")}
    return {"question": sentence(draw), "choices": choices, "answerKey": draw.choice("ABCD")}


def boolq(draw: random.Random) -> Row:
    return {"passage": sentence(draw, 5), "question": sentence(draw), "answer": bool(draw.randrange(2))}


def write_lines(file: Path, make: Any, seed: int = 0) -> Path:
    draw = random.Random(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(make(draw)) + "\n" for _ in range(QUESTIONS)))
    return file


@pytest.fixture
def data(tmp_path):
    """Data of four tasks, in each of the forms that are read."""
    place = tmp_path / "data"
    write_lines(place / "piqa" / "train.jsonl", piqa, seed=1)
    write_lines(place / "piqa" / "validation.jsonl", piqa)
    rows = write_lines(place / "rows.jsonl", arc)
    (place / "allenai" / "ai2_arc" / "ARC-Easy").mkdir(parents=True)
    easy = datasets.Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()])
    easy.to_parquet(place / "allenai" / "ai2_arc" / "ARC-Easy" / "test-00000-of-00001.parquet")
    draw = random.Random(0)
    saved = datasets.Dataset.from_list([winogrande(draw) for _ in range(QUESTIONS)])
    saved.save_to_disk(place / "winogrande" / "winogrande_xl" / "validation")
    write_lines(place / "boolq" / "none" / "validation.jsonl", boolq)
    return place


TASKS = ("piqa", "arc_easy", "winogrande", "boolq")


def test_scores_are_those_of_lm_eval_itself(tiny_llama, data):
    before = snapshot(data)
    found = evaluate_tasks(tiny_llama, TASKS, task_data=data, dtype="float32")
    theirs = HFLM(pretrained=load(tiny_llama, torch.float32), tokenizer=load_tokenizer(tiny_llama), batch_size=4)
    expected = lm_eval.evaluate(theirs, {"tasks": load_tasks(TASKS, data)}, log_samples=False)
    assert expected is not None
    assert [each.task for each in found.scores if each.main] == list(TASKS)
    for each in found.scores:
        result = expected["results"][each.task]
        assert each.value == result[f"{each.metric},none"] and each.n == QUESTIONS
        assert each.stderr == pytest.approx(result[f"{each.metric}_stderr,none"])
        assert each.main == (each.metric == ("acc" if each.task in ("winogrande", "boolq") else "acc_norm"))
    mains = [each for each in found.scores if each.main]
    assert found.mean == pytest.approx(sum(each.value for each in mains) / 4)
    assert found.mean_stderr == pytest.approx(sum((each.stderr or 0) ** 2 for each in mains) ** 0.5 / 4)
    assert len({each.value for each in mains}) > 1 and snapshot(data) == before


def test_labels_of_a_data_set_by_itself_are_understood(data):
    rows = [json.loads(line) for line in (data / "boolq" / "none" / "validation.jsonl").read_text().splitlines()]
    task = load_tasks(["boolq"], data)["boolq"]
    assert [task.doc_to_target(row) for row in task.eval_docs] == [int(row["answer"]) for row in rows]


def test_examples_come_from_the_training_split(tiny_llama, data):
    tasks = load_tasks(["piqa"], data, num_fewshot=2)
    tasks["piqa"].build_all_requests(limit=2)
    examples = [json.loads(line)["goal"] for line in (data / "piqa" / "train.jsonl").read_text().splitlines()]
    context = tasks["piqa"].instances[0].args[0]
    assert context.count("Question: ") == 3
    assert sum(f"Question: {goal}\n" in context for goal in set(examples)) >= 2


def test_a_missing_test_split_gives_its_place_to_validation_and_is_said(data):
    folder = data / "allenai" / "ai2_arc" / "ARC-Easy"
    (folder / "test-00000-of-00001.parquet").rename(folder / "validation.parquet")
    said: list[str] = []
    task = load_tasks(["arc_easy"], data, say=said.append)["arc_easy"]
    assert len(task.eval_docs) == QUESTIONS
    assert said == [f"arc_easy: measured on validation; {folder} holds no test"]


def test_a_task_that_generates_is_scored(streamprune, tmp_path):
    write_lines(tmp_path / "nq_open" / "validation.jsonl", lambda draw: {"question": "where", "answer": ["at sea"]})
    for positions in (64, 512):
        save_tiny(tmp_path / f"{positions}", "llama", max_position_embeddings=positions)
    options = ("--tasks", "nq_open", "--task-data", tmp_path, "--limit", "2", "--num-fewshot", "0", "--quiet")
    result = streamprune("eval", "--model", tmp_path / "512", *options)
    assert cells(result.out, "nq_open")[-3:] == ["0.0000", "0.0000", "2"]
    check_refusal(streamprune("eval", "--model", tmp_path / "64", *options), 1, ("nq_open", "256", "64"))


# The command.


def test_the_command_prints_a_table_and_writes_the_scores(streamprune, tiny_llama, data, tmp_path):
    options = ("--model", tiny_llama, "--tasks", "piqa,boolq", "--task-data", data, "--limit", "5")
    result = streamprune("eval", *options, "--json", tmp_path / "scores.json")
    assert result.code == 0, result.err
    found = evaluate_tasks(tiny_llama, ["piqa", "boolq"], task_data=data, limit=5)
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["mean"] == found.mean and len(written["scores"]) == len(found.scores)
    boolq = next(each for each in found.scores if each.task == "boolq")
    assert cells(result.out, "boolq") == ["acc", f"{boolq.value:.4f}", f"{boolq.stderr:.4f}", "5"]
    assert f"{found.mean:.4f}" in next(line for line in result.out.splitlines() if line.startswith("mean"))
    assert "tasks: " in result.err and "lm_eval" not in result.err and "it/s" not in result.err


@pytest.mark.parametrize(
    ("options", "code", "names"),
    [
        (("--tasks", ","), 2, ("--tasks", "moreau, gblm, bernoulli")),
        (("--tasks", "piqa", "--text", "a.txt"), 2, ("--text", "--tasks")),
        (("--limit", "3"), 2, ("--limit", "--tasks")),
        (("--tasks", "piqa", "--limit", "0"), 2, ("--limit 0",)),
        (("--tasks", "piqa", "--num-fewshot", "-1"), 2, ("--num-fewshot -1",)),
        (("--tasks", "piqa", "--task-data", "nowhere"), 2, ("--task-data nowhere",)),
        (("--tasks", "piqa", "--json", "{data}"), 1, ("--json", "{data}")),
        (("--tasks", "hellaswag", "--task-data", "{data}"), 1, ("hellaswag", "boolq, piqa, winogrande")),
        (("--tasks", "winogrande", "--task-data", "{data}", "--num-fewshot", "2"), 1, ("winogrande", "train")),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(options, code, names, streamprune, tiny_llama, data):
    options = [each.format(data=data) for each in options]
    result = streamprune("eval", "--model", tiny_llama, "--quiet", *options)
    names = tuple(each.format(data=data) for each in names)
    check_refusal(result, code, names, remedy=r"\b(write|give|leave|make|name|[Pp]ut|ask|choose)\b")


def test_an_unknown_task_is_refused_with_those_near_it(streamprune, tiny_llama, data, monkeypatch):
    # Of all that lm-eval has, which take half a minute to look through, these are enough.
    few = Path(lm_eval.tasks.__file__).parent / "piqa"
    all_tasks = partial(loading.TaskManager, include_path=str(few), include_defaults=False)
    monkeypatch.setattr(loading, "TaskManager", all_tasks)
    result = streamprune("eval", "--model", tiny_llama, "--tasks", "piqua", "--task-data", data, "--quiet")
    check_refusal(result, 2, ("piqua", "near it are piqa", "moreau"))


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (f'{json.dumps(piqa(random.Random(0)))}\n{{"goal": "a", "label": 7}}\n', ("piqa",)),
        ("no json\n", ("validation.jsonl", "line 1")),
        ("", ("validation.jsonl", "no questions")),
        ('{"goal": "a", "sol1": "b", "sol2": "c"}\n', ("goal, sol1, sol2", "label")),
        ('{"label": 1, "sol1": "b", "sol2": "c"}\n', ("piqa", "goal")),
    ],
)
def test_damaged_data_are_named(content, names, data, streamprune, tiny_llama):
    (data / "piqa" / "validation.jsonl").write_text(content)
    result = streamprune("eval", "--model", tiny_llama, "--tasks", "piqa", "--task-data", data, "--quiet")
    check_refusal(result, 1, names, remedy=r"\b(write|name|fetch|look)\b")


def test_lines_may_begin_with_a_mark_and_have_fields_that_the_first_has_not(tmp_path):
    file = tmp_path / "validation.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2, "b": "x"}\n')
    split = read_split([file])
    assert split.column_names == ["a", "b"] and split.to_list() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


def test_a_task_that_takes_no_examples_needs_no_split_of_them(data, tmp_path):
    """A task whose own number is 0 stays at it."""
    config = SimpleNamespace(task="piqa", dataset_path="piqa", dataset_name=None, num_fewshot=0, process_docs=None)
    config.training_split, config.validation_split, config.test_split = "train", "validation", None
    config.fewshot_config = SimpleNamespace(split=None, samples=None)
    config.doc_to_text = config.doc_to_target = None
    (data / "piqa" / "train.jsonl").unlink()
    assert list(local_dataset(data, config, 5, print)) == ["validation"]
    config.training_split, config.num_fewshot = "train", None
    with pytest.raises(TaskError, match="the examples of piqa come from train"):
        local_dataset(data, config, 5, print)


def test_a_damaged_table_is_named(data, streamprune, tiny_llama):
    file = data / "allenai" / "ai2_arc" / "ARC-Easy" / "test-00000-of-00001.parquet"
    file.write_bytes(b"PAR1")
    result = streamprune("eval", "--model", tiny_llama, "--tasks", "arc_easy", "--task-data", data, "--quiet")
    check_refusal(result, 1, (str(file),), remedy="fetch")


def test_a_directory_without_the_split_that_is_measured_is_refused(data, streamprune, tiny_llama):
    (data / "piqa" / "validation.jsonl").unlink()
    result = streamprune("eval", "--model", tiny_llama, "--tasks", "piqa", "--task-data", data, "--quiet")
    check_refusal(result, 1, ("holds train", "validation"), remedy="put")


def test_a_split_in_two_formats_is_refused_and_a_name_that_goes_on_is_another(data, streamprune, tiny_llama):
    extra = data / "piqa" / "validation2.jsonl"
    extra.write_text("no json\n")
    parquet(data / "piqa" / "validation.parquet", goal=["a"], sol1=["b"], sol2=["c"], label=[0])
    result = streamprune("eval", "--model", tiny_llama, "--tasks", "piqa", "--task-data", data, "--quiet")
    check_refusal(result, 1, ("validation.jsonl and validation.parquet",), remedy="leave")


def test_the_data_of_a_set_itself_are_not_one_configuration_s(data, tiny_llama, streamprune):
    shutil.rmtree(data / "allenai")
    write_lines(data / "ai2_arc" / "test.jsonl", piqa)
    result = streamprune("eval", "--model", tiny_llama, "--tasks", "arc_easy", "--task-data", data, "--quiet")
    check_refusal(result, 1, ("no data of arc_easy",), remedy="Put")


def test_another_configuration_of_a_set_is_not_taken(data, tiny_llama, streamprune):
    shutil.rmtree(data / "boolq")
    write_lines(data / "super_glue" / "copa" / "validation.jsonl", boolq)
    result = streamprune("eval", "--model", tiny_llama, "--tasks", "boolq", "--task-data", data, "--quiet")
    check_refusal(result, 1, ("no data of boolq", "super_glue"), remedy="Put")


def test_a_hub_that_does_not_answer_is_said_at_once(monkeypatch, streamprune, tiny_llama):
    class Unreachable:
        def head(self, address: str, timeout: float) -> None:
            raise ConnectionError("no route")

    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading, "get_session", Unreachable)
    result = streamprune("eval", "--model", tiny_llama, "--tasks", "piqa", "--quiet")
    check_refusal(result, 1, ("no route", "--task-data", "HF_HUB_OFFLINE=1"))


def test_what_an_offline_hub_has_not_kept_is_refused(monkeypatch, streamprune, tiny_llama):
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    result = streamprune("eval", "--model", tiny_llama, "--tasks", "piqa", "--quiet")
    check_refusal(result, 1, ("piqa", "the hub"), remedy="give")


def test_a_missing_package_is_named(monkeypatch, streamprune, tiny_llama):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    result = streamprune("eval", "--model", tiny_llama, "--tasks", "piqa", "--quiet")
    check_refusal(result, 2, ("pip install 'streamprune[tasks]'",), remedy="install")


# Suites.


def test_suites_stand_for_tasks_that_lm_eval_has():
    names = {task for tasks in SUITES.values() for task in tasks}
    assert names <= loading._index(sorted(names), pytest.fail).keys()  # without looking through all


@pytest.mark.parametrize("name", ["gsm8k", "lambada_openai", "truthfulqa_mc2"])
def test_most_tasks_are_found_without_looking_through_all(name):
    assert loading._index([name], pytest.fail)[name].name == name


def test_what_is_typed_leads_to_no_other_folder(tmp_path):
    root = Path(lm_eval.tasks.__file__).parent
    assert loading._folder(root, "arc_easy") == root / "arc" and loading._folder(root, "rte") == root / "glue" / "rte"
    assert [loading._folder(root, name) for name in (str(tmp_path), "/", ".", "..", "../tasks", "", "_")] == [None] * 7


def test_a_group_may_have_members_anywhere_so_all_are_looked_through():
    class Looked(Exception):
        pass

    def said(line: str) -> None:
        raise Looked

    with pytest.raises(Looked):
        loading._index(["piqa", "mmlu"], said)


def test_names_and_suites_are_mixed_and_each_task_is_meant_once():
    assert tasks_of("piqa, moreau,piqa") == ("piqa", *(task for task in SUITES["moreau"] if task != "piqa"))
    assert tasks_of(["gblm"]) == SUITES["gblm"]
    with pytest.raises(UsageError):
        tasks_of([])
