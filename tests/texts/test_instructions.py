"""Examples to train on: what the loss counts of instructions, conversations and texts, and data without the field."""

import csv
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cli_runner import parquet
from transformers import AutoTokenizer

from streamprune.errors import CalibrationError, UsageError
from streamprune.texts.instructions import IGNORED, Examples, open_examples
from streamprune.texts.sources import open_documents
from streamprune.texts.tokenizer import chat_renderer

RECORDS = [
    {"instruction": "Say yes.", "input": "", "output": "Yes."},
    {"instruction": "Add them.", "input": "1, 2", "output": "3"},
]
MESSAGES = [
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Bye."},
    {"role": "assistant", "content": "So long."},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def lines(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture
def read(tiny_llama: Path) -> Callable[..., Examples]:
    return lambda file, **options: open_examples(tiny_llama, file, **{"cutoff": 1000, **options})


def said(model: Path, examples: Examples) -> list[tuple[str, str]]:
    """The text of each example, and what of it is counted."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        (tokenizer.decode(each.ids), tokenizer.decode(each.labels[each.labels != IGNORED])) for each in examples.found
    ]


def test_of_instructions_the_answer_and_its_end_are_counted(read: Any, tiny_llama: Path, tmp_path: Path) -> None:
    first, second = said(tiny_llama, read(lines(tmp_path / "data.jsonl", RECORDS)))
    assert first[1] == "Yes.</s>" and second[1] == "3</s>"
    assert first[0].endswith("### Instruction:\nSay yes.\n\n### Response:\nYes.</s>")
    assert second[0].endswith("### Instruction:\nAdd them.\n\n### Input:\n1, 2\n\n### Response:\n3</s>")
    assert "provides further context" in second[0] and "provides further context" not in first[0]


def test_every_format_of_records_gives_the_same_examples(read: Any, tiny_llama: Path, tmp_path: Path) -> None:
    expected = said(tiny_llama, read(lines(tmp_path / "data.jsonl", RECORDS)))
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    with (tmp_path / "data.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(RECORDS[0]))
        writer.writeheader()
        writer.writerows(RECORDS)
    columns = {name: [record[name] for record in RECORDS] for name in RECORDS[0]}
    files = [tmp_path / "data.json", tmp_path / "data.csv", parquet(tmp_path / "data.parquet", **columns)]
    assert all(said(tiny_llama, read(file)) == expected for file in files)


def test_a_data_set_that_was_saved_to_disk_gives_the_same_examples(read: Any, tiny_llama: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "set")
    expected = said(tiny_llama, read(lines(tmp_path / "data.jsonl", RECORDS)))
    assert said(tiny_llama, read(tmp_path / "set")) == expected


def test_of_conversations_the_assistant_s_turns_are_counted(read: Any, model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    for name, messages in (
        ("messages", MESSAGES),
        ("conversations", [{"from": m["role"], "value": m["content"]} for m in MESSAGES]),
    ):
        found = open_examples(model, lines(tmp_path / "chat.jsonl", [{name: messages}]), cutoff=1000)
        assert said(model, found) == [
            (
                "<user>Hello?</s><assistant>Yes.</s><user>Bye.</s><assistant>So long.</s>",
                "Yes.</s>So long.</s>",
            )
        ]


def test_of_conversations_what_nobody_asked_for_is_not_counted(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    # As templates are: of no messages they make nothing, which transformers refuses before.
    tokenizer.chat_template = "{{ messages[0]['role'] }}: " + TEMPLATE
    tokenizer.save_pretrained(model)
    found = open_examples(model, lines(tmp_path / "chat.jsonl", [{"messages": MESSAGES[1:]}]), cutoff=1000)
    (example,) = said(model, found)
    assert example == ("assistant: <assistant>Yes.</s><user>Bye.</s><assistant>So long.</s>", "So long.</s>")


def test_a_template_that_writes_the_date_gives_the_same_on_another_day(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "Today: {{ strftime_now('%d %B %Y') }}\n" + TEMPLATE
    tokenizer.save_pretrained(model)
    file, days = lines(tmp_path / "chat.jsonl", [{"messages": MESSAGES}]), set()
    for day in (1, 2):

        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None, day: int = day) -> datetime:
                return datetime(2026, 1, day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        days.add(tokenizer.apply_chat_template(MESSAGES, tokenize=False))
        ((text, _),) = said(model, open_examples(model, file, cutoff=1000))
        assert text.startswith("Today: 01 January 2025\n<user>Hello?</s>")
        calibration = open_documents(file, "messages", chat_renderer(tokenizer))
        assert next(iter(calibration.records())) == text
    assert len(days) == 2, "the day is the template's otherwise"


def test_a_conversation_that_the_template_refuses_is_found(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'x' %}{{ raise_exception('role') }}{% endif %}{% endfor %}"
        + TEMPLATE
    )
    tokenizer.save_pretrained(model)
    bad = [{"role": "x", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = lines(tmp_path / "chat.jsonl", [{"messages": MESSAGES}, {"messages": bad}])
    with pytest.raises(CalibrationError, match=r"chat\.jsonl:2: the chat template cannot take it \(role\)"):
        open_examples(model, file)
    with pytest.raises(CalibrationError, match=r"chat\.jsonl:2: the chat template cannot take it \(role\)"):
        list(open_documents(file, "messages", chat_renderer(tokenizer)).records())
    with pytest.raises(UsageError, match="--bos never: the chat template says"):
        open_examples(model, file, bos="never")


def test_a_template_that_rewrites_earlier_turns_is_refused(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    tokenizer.save_pretrained(model)
    with pytest.raises(CalibrationError, match="answers cannot be told"):
        open_examples(model, lines(tmp_path / "chat.jsonl", [{"messages": MESSAGES}]), cutoff=1000)


@pytest.mark.parametrize("name", ["text", "body"])
def test_of_texts_every_token_is_counted_in_sequences_of_the_cutoff(read: Any, tmp_path: Path, name: str) -> None:
    file = lines(tmp_path / "data.jsonl", [{name: "a" * 30}, {name: "b" * 30}])
    found = read(file, cutoff=16, field=None if name == "text" else name)
    assert found.layout == "text" and [len(each.ids) for each in found.found] == [16] * 3
    assert all(each.ids.equal(each.labels) and each.counted == 15 for each in found.found)
    (tmp_path / "prose.txt").write_text("a" * 30 + "\n\n" + "b" * 30)
    assert all(
        one.ids.equal(other.ids)
        for one, other in zip(found.found, read(tmp_path / "prose.txt", cutoff=16).found, strict=True)
    )


def test_what_is_longer_is_cut_off_and_what_has_no_answer_then_is_left_out(read: Any, tmp_path: Path) -> None:
    long = {"instruction": "x" * 500, "output": "never seen"}
    found = read(
        lines(tmp_path / "data.jsonl", [*RECORDS, long, {"instruction": "Count.", "output": "1" * 900}]), cutoff=400
    )
    assert [len(each.ids) for each in found.found][-1] == 400
    assert len(found.found) == 3 and (found.cut, found.dropped) == (2, 1)
    assert "2 were longer and are cut off; 1 have no answer" in found.describe()


@pytest.mark.parametrize(
    ("records", "field", "message"),
    [
        (
            [{"prompt": "a", "answer": "b"}],
            None,
            "it has prompt, answer: name that of a text or of messages with --field",
        ),
        ([{"text": "a"}], "body", "no field 'body'; it has text"),
        ([RECORDS[0], {"instruction": "b"}], None, "data.jsonl:2 has no text under 'output'; it has instruction"),
        ([RECORDS[0], {"instruction": 3, "output": "b"}], None, "no text under 'instruction'"),
        ([{"messages": MESSAGES[:2]}, {"messages": "no"}], None, "data.jsonl:2 has no messages under 'messages'"),
        ([{"text": "a" * 20}, {"text": MESSAGES}], None, "holds messages, where the first record has a text"),
        ([], None, "has 0 tokens"),
        ([{"instruction": "x" * 2000, "output": "b"}], None, "has 1 records, none of which has an answer within"),
    ],
)
def test_data_without_the_field_and_empty_data_are_refused(
    model: Path, tmp_path: Path, records: list[Any], field: str | None, message: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    with pytest.raises(CalibrationError) as refused:
        open_examples(model, lines(tmp_path / "data.jsonl", records), field=field, cutoff=300)
    assert message in str(refused.value)
