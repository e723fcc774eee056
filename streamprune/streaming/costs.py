"""Costs of work on a model: bytes held, moved and carried, FLOPs; and the formulas that all kinds of work share.

Everything comes from config.json and the shard headers. Bytes held are upper bounds of what tensors need at one time,
so of layers of different shapes the largest counts; FLOPs are sums over layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from streamprune.model.masking import output_matrices
from streamprune.model.saved import saved_bytes
from streamprune.model.skeleton import LOGITS_BYTES, Skeleton
from streamprune.paging.device import is_gpu
from streamprune.paging.hidden_states import PARTS, Place
from streamprune.streaming.masked import copied_weights, tried_together
from streamprune.streaming.statistics import passes_without
from streamprune.streaming.sweeper import Sweeper

Shape = tuple[int, int]  # sequences, and tokens of each
# What a GPU's libraries keep: cuBLAS on large cards 32 MiB for each of two threads, ours and autograd's. And all
# that is small: norms, positions, scores of lines.
LIBRARY_BYTES = (2 * 32 + 8) << 20


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Work in numbers.

    Attributes:
        device, host: bytes held there at the same time, by purpose; beside a CPU they are the same memory.
        scratch: bytes on the scratch disk. moved: bytes written there and read from there.
        up, down: bytes over the link to a GPU and back, without the layers that are read. staged: bytes that are copied
            within host memory on their way there and back.
        forward, backward: FLOPs of products of matrices.
        noise: weights that noise is drawn for. factors: FLOPs of triangular factors. updates: weights that SparseGPT
            goes through column by column. chosen: units of masks that are drawn and learnt from, by the host.
        carried: bytes of hidden states that a journal takes in at a commit.
    """

    device: Mapping[str, int] = field(default_factory=dict)
    host: Mapping[str, int] = field(default_factory=dict)
    scratch: int = 0
    moved: int = 0
    up: int = 0
    down: int = 0
    staged: int = 0
    forward: float = 0
    backward: float = 0
    noise: float = 0
    factors: float = 0
    updates: float = 0
    chosen: float = 0
    carried: int = 0


def most_held(each: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    """Return the one that holds most, of bytes by purpose."""
    return max(each, key=lambda held: sum(held.values()))


def one_after_another(costs: Sequence[Cost]) -> Cost:
    """Add up costs of works that follow one another: the largest of what each holds, and the work of all."""
    added = ("moved", "up", "down", "staged", "forward", "backward", "noise", "factors", "updates", "chosen")
    return Cost(
        device=most_held(cost.device for cost in costs),
        host=most_held(cost.host for cost in costs),
        scratch=max(cost.scratch for cost in costs),
        carried=max(cost.carried for cost in costs),
        **{name: sum(getattr(cost, name) for cost in costs) for name in added},
    )


@dataclass(frozen=True)
class LayerSizes:
    """Shapes of a layer, as far as costs depend on them.

    Attributes:
        matrices: those that are watched and scored.
        passed: those that a token passes: of [experts, d_out, d_in], as many as its router takes.
        inputs: widths of the inputs that its matrices share: one for the matrices that begin a kind of unit, one for
            its last.
        mixed: width of attention's values when they are mixed: all its heads together.
        normed: width of all that its norms are given.
        stored: bytes of its tensors in the checkpoint, the largest first.
    """

    matrices: tuple[torch.Size, ...]
    passed: tuple[torch.Size, ...]
    inputs: tuple[int, ...]
    mixed: int
    normed: int
    stored: tuple[int, ...]

    @property
    def weights(self) -> int:
        """Number of elements of all matrices."""
        return sum(map(torch.Size.numel, self.matrices))

    @property
    def largest(self) -> int:
        """Number of elements of the largest matrix."""
        return max(map(torch.Size.numel, self.matrices))

    @property
    def widest(self) -> int:
        """Longest side of the matrices that a token passes."""
        return max(max(shape) for shape in self.passed)


def _sizes_of(skeleton: Skeleton, layer: int) -> LayerSizes:
    shapes, passed = skeleton.shapes(layer), list[torch.Size]()
    for shape in shapes.values():
        if len(shape) == 3:
            passed += [torch.Size(shape[1:])] * skeleton.config.num_experts_per_tok
        elif len(shape) == 2:
            passed.append(shape)
    hidden, ends = skeleton.config.hidden_size, output_matrices(skeleton, layer)
    last = [shapes[member.tensor][member.dim] for member in ends]
    return LayerSizes(
        tuple(shapes[name] for name in skeleton.matrices(layer)),
        tuple(passed),
        (*last, *[hidden] * len(last)),
        next((width for member, width in zip(ends, last, strict=True) if member.kind != "channel"), hidden),
        _normed(shapes),
        tuple(sorted((entry.nbytes for entry in skeleton.entries[layer].values()), reverse=True)),
    )


def _normed(shapes: Mapping[str, torch.Size]) -> int:
    # q_norm norms what q_proj puts out, be it all of it together or head by head.
    norms = [name for name in shapes if "norm" in name and name.endswith("weight")]
    return sum(shapes.get(name.replace("_norm", "_proj"), shapes[name])[0] for name in norms)


class Sizes:
    """Shapes of a sweeper's layers, looked at once; layers of the same shapes are asked once."""

    def __init__(self, sweeper: Sweeper) -> None:
        self.sweeper = sweeper
        self._saved: dict[Shape, int | None] = {}

    @cached_property
    def _kinds(self) -> tuple[list[LayerSizes], list[int]]:
        """Different sizes that layers have, and for each layer the number of its own among them."""
        found: dict[LayerSizes, int] = {}
        layers = (_sizes_of(self.sweeper.skeleton, layer) for layer in range(self.sweeper.n_layers))
        numbers = [found.setdefault(sizes, len(found)) for sizes in layers]
        return list(found), numbers

    def most(self, of: Callable[[LayerSizes], int], layers: Iterable[int]) -> int:
        """Return the largest value of `of` over `layers`: for what is held for one layer at a time."""
        kinds, numbers = self._kinds
        return max((of(kinds[number]) for number in {numbers[layer] for layer in layers}), default=0)

    def total(self, of: Callable[[LayerSizes], float], layers: Iterable[int]) -> float:
        """Return the sum of `of` over `layers`: for what is done in each."""
        kinds, numbers = self._kinds
        return sum(times * of(kinds[number]) for number, times in Counter(numbers[layer] for layer in layers).items())

    def saved(self, n: int, seq: int) -> int | None:
        """Count the bytes that a layer's graph holds of a micro-batch [n, seq]; None where that depends on numbers."""
        if (n, seq) not in self._saved:
            firsts = map(self._kinds[1].index, range(len(self._kinds[0])))
            try:
                self._saved[n, seq] = max(saved_bytes(self.sweeper.skeleton, layer, n, seq) for layer in firsts)
            except Exception:  # experts that numbers choose, kernels that run on a GPU alone
                self._saved[n, seq] = None
        return self._saved[n, seq]

    @property
    def commonest(self) -> int:
        """First of the layers that have the most frequent shapes."""
        _, numbers = self._kinds
        return numbers.index(Counter(numbers).most_common(1)[0][0])


@dataclass(frozen=True)
class Task:
    """Sequences that go through a model, and how: what the cost of work depends on.

    Attributes:
        sizes: shapes of the model's layers.
        shape: sequences, and tokens of each; (0, 0) where no text is read.
        micro_batch: sequences per layer call. where: hidden states stay.
        layers: the prunable ones. sweeps: forward-and-backward sweeps that a method takes over them.
        sums: gradients, or powers of them, that are summed of a weight.
        graphs: layers whose graphs stay for the backward sweep.
        prunes: weights go as they are scored, so a layer runs again with what is left of it.
        apart: what the method keeps is not in memory as it is used: a tensor of it comes there, in float32, on its way.
        trials: passes with masks, how many in each, and sequences of each of these. cuts: masks are of units.
        fills: what masks take of inputs is filled in.
    """

    sizes: Sizes
    shape: Shape
    micro_batch: int = 1
    where: Place = "device"
    layers: Sequence[int] = ()
    sweeps: int = 1
    sums: int = 1
    graphs: int = 0
    prunes: bool = False
    apart: bool = False
    trials: tuple[int, int, int] | None = None
    cuts: bool = True
    fills: bool = False

    @property
    def sweeper(self) -> Sweeper:
        """Sweeper of the model."""
        return self.sizes.sweeper

    @property
    def mask_copies(self) -> int:
        """Bytes of weights that a mask of units copies of a layer."""
        tokens = self.trials[2] * self.shape[1] if self.trials else 0
        return self.itemsize * copied_weights(self.sweeper.skeleton, self.layers, tokens, filled=self.fills)

    def tries_together(self, tokens: int) -> bool:
        """Tell whether masks of so many tokens are computed several at once."""
        return tried_together(self.sweeper.skeleton, self.whole[self.layers[0] :], tokens)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return self.sweeper.skeleton.dtype.itemsize

    @property
    def gpu(self) -> bool:
        """Tell whether the device has memory of its own."""
        return is_gpu(self.sweeper.skeleton.device)

    @property
    def sums_halves(self) -> bool:
        """Tell whether products of halves are summed in float32 as they are."""
        return self.gpu and self.itemsize == 2

    @property
    def sum_itemsize(self) -> int:
        """Bytes of a number in sums, factors and gradients: float32, float64 in float64 runs."""
        return max(self.itemsize, 4)

    @property
    def whole(self) -> range:
        """Range of all layers."""
        return range(self.sweeper.n_layers)

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return self.shape[0] * self.shape[1]

    @property
    def tokens_at_once(self) -> int:
        """Number of tokens of a micro-batch."""
        return min(self.micro_batch, self.shape[0]) * self.shape[1]

    @property
    def hidden_bytes(self) -> int:
        """Bytes of hidden states [n, seq, d]."""
        return self.tokens * self.sweeper.skeleton.config.hidden_size * self.itemsize

    @property
    def left_out(self) -> list[tuple[int, Sequence[int]]]:
        """Passes of a sweep with each layer left out in turn: where each begins, and the layers left out in it."""
        return passes_without(self.layers, self.hidden_bytes)

    @property
    def attention_columns(self) -> int:
        """Number of a token's attention scores where they exist as a whole, as where they are capped; else 0."""
        eager = self.sweeper.skeleton.config._attn_implementation == "eager"
        return self.shape[1] * self.sweeper.skeleton.geometry.heads if eager else 0

    def logits(self, *, backwards: bool) -> int:
        """Count bytes of logits of the tokens that go through the head together, their softmax, and both gradients."""
        skeleton = self.sweeper.skeleton
        each = min(LOGITS_BYTES, self.tokens * skeleton.head_width * 4)
        capped = bool(getattr(skeleton.config, "final_logit_softcapping", None))  # what the cap saves
        return ((4 if backwards else 2) + capped) * each

    @property
    def always(self) -> dict[str, int]:
        """Bytes that the device holds whatever is done, by purpose."""
        libraries = {"libraries": LIBRARY_BYTES} if self.gpu else {}
        return {"embeddings and head": self.sweeper.skeleton.resident_bytes, **libraries}

    def in_turn(self, *phases: Mapping[str, int]) -> Mapping[str, int]:
        """Join what is held in phases that follow one another: of a GPU what holds most.

        A CPU's heap may keep what a phase has let go of, in small pieces, so beside it all of them count.
        """
        if self.gpu:
            return most_held(phases)
        names = {name for phase in phases for name in phase}
        return {name: max(phase.get(name, 0) for phase in phases) for name in sorted(names)}

    def scores(self, *, backwards: bool) -> int:
        """Count bytes of a micro-batch's attention scores.

        A softmax in float32 stands between its input, or backwards two gradients, and what the values are mixed by.
        """
        each = (12 if backwards else 8) + self.itemsize
        return each * self.attention_columns * self.tokens_at_once

    def forward_activations(self, layers: Iterable[int]) -> int:
        """Count bytes of a micro-batch without gradients: an MLP's product beside its factors, attention's inputs."""
        widest = self.sizes.most(lambda layer: layer.widest, layers)
        running = (3 * widest + 4 * self.sweeper.skeleton.config.hidden_size) * self.tokens_at_once * self.itemsize
        return running + self.scores(backwards=False)

    def flops(self, layers: Iterable[int]) -> float:
        """Count FLOPs of a forward pass through layers: matrices, attention's scores and mixing."""

        def per_token(layer: LayerSizes) -> int:
            # Two products over all tokens of the sequence, of two FLOPs each: scores, and the mixing of values.
            return 2 * sum(map(torch.Size.numel, layer.passed)) + 4 * self.shape[1] * layer.mixed

        return float(self.tokens * self.sizes.total(per_token, layers))

    @property
    def head_flops(self) -> float:
        """FLOPs of the head, forwards."""
        config = self.sweeper.skeleton.config
        return 2.0 * config.vocab_size * config.hidden_size * self.tokens

    def gram_flops(self, widths: Iterable[int]) -> float:
        """Count FLOPs of Σ x xᵀ over all tokens, for inputs of these widths."""
        return float(sum(2 * self.tokens * width**2 for width in widths))

    def cost(
        self,
        *,
        states: int = 0,
        brought: int = 0,
        taken: int = 0,
        carries: int = 1,
        own: bool = False,
        device: Mapping[str, int] | None = None,
        host: Mapping[str, int] | None = None,
        **work: float,
    ) -> Cost:
        """Make the cost of a stage: what every stage holds, all hidden states `states` times, and what is given here.

        Args:
            brought, taken: times that all hidden states come to the device and go from it, where they stay elsewhere.
            carries: times all hidden states that a commit carries, where the run can be resumed.
            own: weights are copied to be moved or changed.
            device, host: bytes by purpose. work: the other fields of a `Cost`.
        """
        pager, binder = self.sweeper.pager, self.sweeper.binder
        base = {
            "slots": 2 * pager.slot_bytes,
            "bound layer": binder.buffer_bytes if own or binder.copies else 0,
            **self.always,
        }
        on_device, on_host, scratch = self._states(states)
        elsewhere = self.hidden_bytes if self.where != "device" else 0
        link = elsewhere if self.gpu else 0
        return Cost(
            device={**base, **on_device, **(device or {})},
            host={**on_host, **(host or {})},
            scratch=scratch,
            moved=(brought + taken) * elsewhere if self.where == "scratch" else 0,
            up=brought * link,
            down=taken * link,
            staged=(brought + taken) * link if self._staged else 0,
            carried=carries * self.hidden_bytes,
            **work,
        )

    @property
    def _staged(self) -> bool:
        """Tell whether hidden states that stay on the host go by way of pinned memory."""
        return self.where == "host" and not self.sweeper.pager.device.registers

    def _states(self, count: int) -> tuple[dict[str, int], dict[str, int], int]:
        """Count bytes of `count` times all hidden states: on the device, on the host, on scratch."""
        if not count:
            return {}, {}, 0
        nbytes = self.hidden_bytes
        if self.where == "device":
            return {"hidden states": count * nbytes}, {}, 0
        part = self.tokens_at_once * self.sweeper.skeleton.config.hidden_size * self.itemsize
        host = {}
        if self.gpu:
            host["hidden states"] = count * nbytes if self.where == "host" else 0
            host["staging of hidden states"] = _pinned(part) if self.where == "scratch" or self._staged else 0
        return {"hidden states": PARTS * part}, host, count * nbytes if self.where == "scratch" else 0


def _pinned(nbytes: int) -> int:
    """Return the bytes that pinned memory of `nbytes` takes: torch rounds them up to a power of two."""
    return 1 << (nbytes - 1).bit_length()
