"""lm-eval's language model on forward sweeps: one pass of the layers answers many questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import GenerationConfig

from streamprune.errors import TaskError
from streamprune.pipeline.progress import Progress
from streamprune.streaming.lengths import last_states, log_probabilities, plan_passes
from streamprune.streaming.sweeper import Sweeper
from streamprune.tasks.continuation import Continuation
from streamprune.texts.tokenizer import beginning

Request = tuple[Any, list[int], list[int]]  # what lm-eval asked, tokens of the context, and of what is scored


class StreamedLM(TemplateLM):
    """Language model as lm-eval asks one, computed layer by layer; contexts and texts are encoded as its HFLM does.

    Args:
        sweeper: computes the hidden states.
        tokenizer: the model's.
        bos: begin texts with BOS: "auto" as the tokenizer does by default, "always", or "never".
        micro_batch: sequences that a layer computes on at once; by default by their tokens.
        progress: is told of each pass.

    Raises:
        TaskError: the tokenizer has neither BOS nor EOS.
    """

    def __init__(
        self,
        sweeper: Sweeper,
        tokenizer: Any,
        *,
        bos: str = "auto",
        micro_batch: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self.sweeper, self.tokenizer, self.micro_batch = sweeper, tokenizer, micro_batch
        self.progress = progress or Progress(quiet=True)
        self.max_length = resolve_max_length(sweeper.skeleton.config, tokenizer)
        if self.prefix_token_id is None:
            raise TaskError(
                "the tokenizer has no BOS and no EOS to begin a text with; name one in its tokenizer_config.json"
            )
        self._beginning = None if bos == "auto" else list(beginning(tokenizer, bos))

    @property
    def eot_token_id(self) -> int | None:
        """Token that ends a text; None where the tokenizer has none."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """Token that stands before a text without a context: BOS, or the end of another text."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text, with the tokens that begin it unless it has BOS already or none are to be added."""
        begun = add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        plain = begun or add_special_tokens is False
        if self._beginning is None and not plain:
            return self.tokenizer.encode(string, verbose=False)
        before = [] if plain or self._beginning is None else self._beginning
        return [*before, *self.tokenizer.encode(string, add_special_tokens=False, verbose=False)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the likeliest at every token."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each whole text, in windows as long as the model takes."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (found, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += found
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the greedy continuation of each context, up to what it is to stop at.

        All go on together, a token each pass of the layers; what is done is no longer computed.

        Raises:
            TaskError: a task asks for samples, or for more tokens than the model takes.
        """
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        texts = [
            Continuation(str(request.task_name), self._context(self.tok_encode(context)), wishes, self.max_length, eos)
            for request in requests
            for context, wishes in [request.args]
        ]
        ends, most = self._ends(), max((each.most for each in texts), default=0)
        with self.progress.stage("generating", most * self.sweeper.pager.layer_bytes()):
            while going := [each for each in texts if not each.done]:
                for row, token in self._next_tokens([each.ids for each in going]):
                    going[row].add(token, ends, self.tokenizer)
        return [each.text(self.tokenizer) for each in texts]

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_options: Any) -> list[tuple[float, bool]]:
        """Score continuations: a sequence is computed once for all whose tokens it begins with."""
        for asked, _, scored in requests:
            if not 0 < len(scored) <= self.max_length:
                raise TaskError(
                    f"a task scores {len(scored)} tokens at once ({str(asked)[:60]}); the model takes 1 to "
                    f"{self.max_length}"
                )
        # The last token is only predicted. What is too long loses its beginning.
        whole = [self._context(context) + scored for _, context, scored in requests]
        inputs = [each[-(self.max_length + 1) :][:-1] for each in whole]
        sequences, places = computed_once(inputs)
        askers: list[list[int]] = [[] for _ in sequences]
        for number, place in enumerate(places):
            askers[place].append(number)
        divided = plan_passes(self.sweeper, [len(each) for each in sequences], self.max_length, self.micro_batch)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with self.progress.stage("tasks", len(divided) * self.sweeper.pager.layer_bytes()):
            for batches in divided:
                for batch, hidden in last_states(self.sweeper, sequences, batches):
                    numbers = [(at, number) for at, row in enumerate(batch.rows) for number in askers[row]]
                    ends = [(at, len(inputs[number]), requests[number][2]) for at, number in numbers]
                    for (_, number), score in zip(numbers, self._scored(hidden, ends), strict=True):
                        found[number] = score
        return found

    def _context(self, tokens: list[int]) -> list[int]:
        """Return a context's tokens: of white space alone a tokenizer may make none, and a text needs a beginning."""
        beginning = self.prefix_token_id
        assert beginning is not None, "refused otherwise"
        return tokens or [beginning]

    def _scored(self, hidden: Tensor, ends: Sequence[tuple[int, int, list[int]]]) -> list[tuple[float, bool]]:
        """Score continuations from the last hidden states [n, length, d] of a batch.

        Args:
            ends: of each, its row, where the last of the tokens that predict it ends, and its tokens.
        """
        rows = torch.tensor([row for row, _, scored in ends for _ in scored])
        columns = torch.cat([torch.arange(end - len(scored), end) for _, end, scored in ends])
        targets = torch.tensor([token for _, _, scored in ends for token in scored], device=hidden.device)
        likelihoods = torch.empty(len(targets), dtype=torch.float64, device=hidden.device)
        likeliest = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
        for part, block in log_probabilities(self.sweeper, hidden[rows.to(hidden.device), columns.to(hidden.device)]):
            likelihoods[part] = block.gather(1, targets[part].unsqueeze(1)).squeeze(1).double()
            likeliest[part] = block.argmax(dim=1) == targets[part]
        sizes = [len(scored) for _, _, scored in ends]
        return [
            (float(each.sum()), bool(all_of_it.all()))
            for each, all_of_it in zip(likelihoods.cpu().split(sizes), likeliest.cpu().split(sizes), strict=True)
        ]

    def _next_tokens(self, sequences: Sequence[list[int]]) -> Iterator[tuple[int, int]]:
        """Yield the likeliest next token of each sequence, with its number, after as many passes as they need."""
        for batches in plan_passes(self.sweeper, [len(each) for each in sequences], self.max_length, self.micro_batch):
            for batch, hidden in last_states(self.sweeper, sequences, batches):
                rows = torch.arange(len(batch.rows), device=hidden.device)
                lasts = torch.tensor([len(sequences[row]) - 1 for row in batch.rows], device=hidden.device)
                tokens = [block.argmax(dim=1) for _, block in log_probabilities(self.sweeper, hidden[rows, lasts])]
                yield from zip(batch.rows, torch.cat(tokens).tolist(), strict=True)

    def _ends(self) -> set[int]:
        """Return the tokens that end a text: by the model's generation config, else by its config."""
        skeleton = self.sweeper.skeleton
        try:
            generation = GenerationConfig.from_pretrained(skeleton.checkpoint.path)
        except OSError:  # there is no such file
            generation = GenerationConfig.from_model_config(skeleton.config)
        ends = generation.eos_token_id
        return {self.eot_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def computed_once(inputs: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Return the sequences that have to be computed, and in which of them each input is: as it, or as its beginning.

    A causal model's hidden states of a beginning are the same whatever follows.
    """
    distinct = sorted({tuple(each) for each in inputs})  # what begins with another follows it directly
    sequences: list[tuple[int, ...]] = []
    place: dict[tuple[int, ...], int] = {}
    for each in reversed(distinct):
        if not sequences or sequences[-1][: len(each)] != each:
            sequences.append(each)
        place[each] = len(sequences) - 1
    return sequences, [place[tuple(each)] for each in inputs]
