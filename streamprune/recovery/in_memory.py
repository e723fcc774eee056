"""LoRA of a model in memory: PEFT's adapters and transformers' Trainer, which do all the work."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from streamprune.errors import CheckpointError, JournalError, OutputError
from streamprune.logs import quiet
from streamprune.model.skeleton import Skeleton
from streamprune.paging.device import is_gpu
from streamprune.recovery.course import MAX_NORM, Course, Note, Trained, TrainingStep, check_step, objective_of, padded
from streamprune.recovery.distillation import TeacherLogits
from streamprune.recovery.lora import Adapter, peft_config, peft_name, peft_tensors
from streamprune.texts.instructions import IGNORED, Example

SAVED_EVERY = 20  # steps, where a run can be resumed
LAST_FILE = "trainer_state.json"  # the last file of a checkpoint that the Trainer writes


class _Order(Dataset[int]):
    """Numbers of the examples in the order in which a course takes them."""

    def __init__(self, order: Sequence[int]) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at: int) -> int:
        return self.order[at]


class _Trainer(Trainer):
    """Trainer that goes through the data in order, with the loss of `course.objective_of`.

    Raises:
        JournalError: the checkpoint that it goes on from is damaged.
    """

    loss_is_scaled_for_ga = True  # the loss is divided by the tokens of the whole batch

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        order: Any = self.train_dataset
        return SequentialSampler(order)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute a micro-batch's part of the mean loss over the batch's counted tokens."""
        _drop_in_adapters_only(model)
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        teacher = (inputs["values"], inputs["tokens"]) if "values" in inputs else None
        objective = objective_of(inputs["labels"], logits.device, teacher)
        return objective(logits, slice(None), slice(None)) / num_items_in_batch

    def _load_from_checkpoint(self, *given: Any, **more: Any) -> None:
        with self._told():
            super()._load_from_checkpoint(*given, **more)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        with self._told():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: Any) -> None:
        with self._told():
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: Any) -> None:
        with self._told():
            super()._load_rng_state(checkpoint)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn whatever torch says of a damaged file inside the block into a JournalError that names the directory."""
        try:
            yield
        except (OSError, EOFError, RuntimeError, ValueError, LookupError, UnpicklingError, SafetensorError) as error:
            reason, directory = str(error).partition("\n")[0], self.args.output_dir
            raise JournalError(f"{directory} is damaged ({reason}); remove it and start again") from error


@contextmanager
def _naming_the_disk(directory: Path | None) -> Iterator[None]:
    """Turn a checkpoint that cannot be written, of which torch tells with a plain error, into one that says where."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if directory is None or not any(sign in str(error) for sign in ("inline_container", "os error ")):
            raise
        reason = f"{directory}: a checkpoint cannot be written ({' '.join(str(error).split())[:100]})"
        raise OutputError(f"{reason}; make room, and repeat the command to go on from the one before") from error


def _drop_in_adapters_only(model: Any) -> None:
    """Let the model compute as where it is streamed, which drops nothing of its own: the Trainer turns all of it on."""
    model.eval()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train()


class _Teller(TrainerCallback):
    """Callback that tells each step."""

    def __init__(self, note: Note) -> None:
        self.note = note

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        """Tell what the Trainer logs of a step."""
        if logs and "loss" in logs:
            step = _step(state.global_step, logs)
            check_step(step)  # before the Trainer saves anything of it
            self.note(step)


def _step(number: Any, logs: Any) -> TrainingStep:
    return TrainingStep(number, float(logs["loss"]), float(logs["learning_rate"]))


def train_in_memory(
    skeleton: Skeleton,
    adapter: Adapter,
    examples: Sequence[Example],
    course: Course,
    *,
    micro_batch: int,
    dropout: float,
    teacher: TeacherLogits | None = None,
    directory: Path | None = None,
    trust_remote_code: bool = False,
    note: Note = lambda step: None,
) -> Trained:
    """Train an adapter with the whole model in memory.

    Args:
        skeleton: says where the model is and how it is computed.
        adapter: to begin with. examples: `course` says when each is taken.
        micro_batch: sequences computed at once, a divisor of the batch.
        directory: of the Trainer's checkpoints, from the last of which it goes on; by default none are kept.
        note: is told each step.

    Raises:
        CheckpointError: transformers does not find all weights, whose names the streamed training understands.
    """
    set_seed(course.seed)  # of dropout
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        skeleton.checkpoint.path,
        dtype=skeleton.dtype,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(f"{skeleton.checkpoint.path}: transformers finds no {missing[0]} in it; pass --streamed")
    config = peft_config(skeleton, adapter, None, dropout)
    config.inference_mode = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that transformers changes, which PEFT still uses
        model = get_peft_model(model, config)
    set_peft_model_state_dict(model, peft_tensors(skeleton, adapter))
    # What it warns of, such as the dates of checkpoints, decides nothing here.
    with tempfile.TemporaryDirectory(prefix="streamprune-trainer-") as temporary, quiet("transformers", logging.ERROR):
        arguments = _arguments(skeleton, course, micro_batch, directory, Path(temporary))
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=_Order(course.order()),
            data_collator=_collator(examples, skeleton.positions, teacher),
            callbacks=[_Teller(note)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.model_accepts_loss_kwargs = True  # so that it counts the tokens of a batch
        with _naming_the_disk(directory):
            trainer.train(resume_from_checkpoint=None if directory is None else _last_checkpoint(directory))
    trained = get_peft_model_state_dict(model)
    names = {key: f"{peft_name(skeleton, key)}.lora_" for key in adapter.pairs}
    pairs = {
        key: (trained[f"{name}A.weight"].detach().cpu(), trained[f"{name}B.weight"].detach().cpu())
        for key, name in names.items()
    }
    steps = [_step(logs["step"], logs) for logs in trainer.state.log_history if "loss" in logs]
    return Trained(Adapter(adapter.alpha, pairs), steps)


def _arguments(
    skeleton: Skeleton, course: Course, micro_batch: int, directory: Path | None, temporary: Path
) -> TrainingArguments:
    if is_gpu(skeleton.device) and skeleton.device.index is not None:
        torch.cuda.set_device(skeleton.device)  # the Trainer takes the current one
    arguments = TrainingArguments(
        output_dir=str(directory or temporary),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=course.batch // micro_batch,
        max_steps=course.steps,
        learning_rate=course.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=course.warmup,
        optim="adamw_torch",
        max_grad_norm=MAX_NORM,
        fp16=skeleton.dtype == torch.float16,
        seed=course.seed,
        save_strategy="no" if directory is None else "steps",
        save_steps=SAVED_EVERY,
        save_total_limit=2,  # a kill may come while the newer is written
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=not is_gpu(skeleton.device),
        dataloader_pin_memory=is_gpu(skeleton.device),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # more would each get a copy of the model
    return arguments


def _collator(examples: Sequence[Example], positions: int, teacher: TeacherLogits | None) -> Any:
    def collate(numbers: Sequence[int]) -> dict[str, Tensor]:
        ids, labels = padded([examples[number] for number in numbers], positions)
        labels[:, 0] = IGNORED  # of some models the Trainer counts the first labels too
        batch = {"input_ids": ids, "labels": labels}
        if teacher is not None:
            batch["values"], batch["tokens"] = teacher.get(numbers)
        return batch

    return collate


def _last_checkpoint(directory: Path) -> str | None:
    """Find the newest checkpoint of the Trainer that is whole."""
    whole = [each.parent for each in directory.glob(f"checkpoint-*/{LAST_FILE}") if _is_whole(each)]
    return str(max(whole, key=_steps_of)) if whole else None


def saved_steps(directory: Path) -> int:
    """Return the steps that the Trainer's newest checkpoint in a directory holds; 0 without one."""
    last = _last_checkpoint(directory)
    return 0 if last is None else _steps_of(Path(last))


def _steps_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(state: Path) -> bool:
    return state.read_text(encoding="utf-8").rstrip().endswith("}")
