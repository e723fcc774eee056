"""Form of 2:4 weights in compressed-tensors' sparse-24-bitmask: two values and four bits for every four weights.

No other module knows that package, which is imported when it is needed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprune.errors import CheckpointError, StreampruneError, UsageError
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import module_of
from streamprune.output.stock import StockForm
from streamprune.storage.checkpoint import INDEX_FILE, Checkpoint, read_config
from streamprune.storage.directory import check_space, temporary_sibling, write_json
from streamprune.storage.shards import ShardedWriter, TensorSpec

PACKAGE, FORMAT = "compressed-tensors", "sparse-24-bitmask"
INSTALL = "install one with pip install 'streamprune[compressed]'"
READ_BY = (
    f"{FORMAT} is read by transformers 4 with {PACKAGE} 0.13 or 0.14 (tried: 4.57), by vLLM before 0.19 on Hopper GPUs "
    "(not tried) and by streamprune eval and verify; transformers 5 refuses it, and with "
    f"{PACKAGE} 0.15 or newer it only warns and leaves those weights random"
)
MAX_SHARD_SIZE = 5_000_000_000  # of the temporary dense copy


class Sparse24Form(StockForm):
    """Prunable layers' 2:4 matrices stored as what is not zero and where that is; everything else as always."""

    stored_as = FORMAT
    read_by = READ_BY
    loading = (f'# pip install "transformers<5" "{PACKAGE}>=0.13,<0.15"',)

    @classmethod
    def check_machine(cls) -> None:
        try:
            library()
        except StreampruneError as error:
            raise UsageError(f"--compress: {error}, or leave --compress out") from error

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {PACKAGE: version()}

    @classmethod
    @contextmanager
    def readable(cls, directory: Path) -> Iterator[Path]:
        with decompressed(directory) as dense:
            yield dense

    def check(self) -> None:
        if "per_layer_config" in self.skeleton.checkpoint.config:
            raise UsageError("--compress: no reader of it knows layers of different widths; leave it out")
        super().check()
        assert self.nbytes < self.skeleton.checkpoint.nbytes, "compressed weights take less"

    def config(self, zeros: float = 0.0) -> dict[str, Any]:
        return super().config(zeros) | config_fields(self.packed.values(), zeros)

    @cached_property
    def packed(self) -> dict[str, str]:
        """Stored names of the compressed matrices, and the names of their modules in the model."""
        return matrices(self.skeleton, self.layers)

    def store_specs(self, name: str, spec: TensorSpec) -> list[TensorSpec]:
        return specs(spec) if name in self.packed else [spec]

    def store(self, name: str, target: str, tensor: Tensor) -> dict[str, Tensor]:
        return parts(target, tensor) if name in self.packed else {target: tensor}


def library() -> Any:
    """Import compressed-tensors' class of a compressed matrix.

    Raises:
        StreampruneError: no such package, or one that has lost the format (0.15).
    """
    try:
        from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import Sparse24BitMaskTensor
    except ImportError as error:
        raise StreampruneError(f"{FORMAT} needs {PACKAGE} from 0.13 on, before 0.15; {INSTALL}") from error
    return Sparse24BitMaskTensor


def version() -> str:
    """Return the version of compressed-tensors that is installed."""
    return importlib.metadata.version(PACKAGE)


def matrices(skeleton: Skeleton, layers: Iterable[int]) -> dict[str, str]:
    """Name what is compressed: the stored name of each matrix of `layers`, and its module's name in the model.

    Raises:
        UsageError: a matrix is stored transposed, so the format's rows are not those of 2:4.
    """
    names = {}
    for layer in layers:
        for name, transposed in skeleton.matrices(layer).items():
            if transposed:
                raise UsageError(
                    f"--compress stores rows of weights, {skeleton.family.model_type} has them as columns; "
                    "leave --compress out"
                )
            # The prefix of the model, also where the checkpoint's names lack it: readers look for modules.
            names[skeleton.layer_prefix(layer) + name] = f"{skeleton.family.layers}.{layer}.{module_of(name)}"
    return names


def parts(name: str, matrix: Tensor) -> dict[str, Tensor]:
    """Compress a 2:4 matrix [d_out, d_in] into the tensors that are stored, on the CPU, or on meta if it is there.

    Args:
        name: the matrix's, which ends in ".weight".

    Returns:
        By name, in the place of ".weight": ".shape" int64 [2, 1], ".compressed" [d_out, d_in / 2] in the matrix's
        dtype, ".bitmask" uint8 [d_out, ⌈d_in / 8⌉].
    """
    stored = library().from_dense(matrix.detach().contiguous())
    if not matrix.is_meta:
        # The package keeps the two largest of four, whatever the others are.
        assert torch.count_nonzero(stored.compressed) == torch.count_nonzero(matrix).cpu(), f"{name} is not 2:4"
    return stored.dict(name_prefix=name, device="meta" if matrix.is_meta else "cpu")


def specs(spec: TensorSpec) -> list[TensorSpec]:
    """List the tensors that are announced to the writer in the place of a matrix."""
    made = parts(spec.name, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()]


def config_fields(modules: Iterable[str], sparsity: float) -> dict[str, Any]:
    """Make the fields of config.json by which readers find the compressed modules.

    Every one is named: whatever else the model has, and layers that are not pruned, is stored as always.

    Args:
        sparsity: zeros over all parameters.
    """
    from compressed_tensors.config import Sparse24BitMaskConfig

    sparse = Sparse24BitMaskConfig(targets=list(modules), ignore=[], global_sparsity=sparsity)
    fields = {"quant_method": PACKAGE, "version": version(), "sparsity_config": sparse.model_dump()}
    return {"quantization_config": fields}


def is_compressed(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is of compressed weights."""
    fields = config.get("quantization_config")
    sparse = fields.get("sparsity_config") if isinstance(fields, dict) else None
    return isinstance(sparse, dict) and sparse.get("format") == FORMAT


@contextmanager
def decompressed(directory: Path) -> Iterator[Path]:
    """Give `directory` itself, or a dense copy for as long as the block runs if its weights are compressed.

    The copy is made one tensor at a time, in a `temporary_sibling`. What is not weights is linked.

    Raises:
        StreampruneError: the package is missing, the disk is full.
        CheckpointError: damaged weights.
    """
    config = read_config(directory)
    if not is_compressed(config):
        yield directory
        return
    matrix_class = library()
    with temporary_sibling(directory) as dense:
        with Checkpoint(directory) as source:
            _write_dense(source, matrix_class, dense)
        for file in directory.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name not in ("config.json", INDEX_FILE):
                (dense / file.name).symlink_to(file.absolute())
        write_json(dense / "config.json", {k: v for k, v in config.items() if k != "quantization_config"})
        yield dense


def _write_dense(source: Checkpoint, matrix_class: Any, dense: Path) -> None:
    """Write all tensors of `source`, each compressed one as the matrix that it stands for."""
    dense_specs, prefixes = [], {}
    for name, entry in source.tensors.items():
        prefix, _, part = name.rpartition(".")
        if part == "compressed" and f"{prefix}.bitmask" in source.tensors and len(entry.shape) == 2:
            shape = (entry.shape[0], 2 * entry.shape[1])
            dense_specs.append(TensorSpec(f"{prefix}.weight", entry.dtype, shape))
            prefixes[f"{prefix}.weight"] = prefix
        elif part not in ("bitmask", "shape") or f"{prefix}.compressed" not in source.tensors:
            dense_specs.append(TensorSpec(name, entry.dtype, entry.shape))
    check_space(dense, sum(spec.nbytes for spec in dense_specs))
    with ShardedWriter(dense, dense_specs, MAX_SHARD_SIZE) as writer:
        for spec in dense_specs:
            if spec.name not in prefixes:
                writer.write(spec.name, source.read(spec.name))
                continue
            stored = [source.read(f"{prefixes[spec.name]}.{part}") for part in ("compressed", "bitmask")]
            try:
                matrix = matrix_class.from_compressed_data(list(spec.shape), *stored).decompress()
            except (RuntimeError, IndexError, ValueError) as error:
                raise CheckpointError(f"{source.path}: {spec.name} cannot be decompressed; prune again") from error
            writer.write(spec.name, matrix)
