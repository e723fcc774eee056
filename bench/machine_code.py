"""Compiles the kernels ahead of time, for cards that are not there, and reads what came out.

Triton's wheel carries ptxas, cuobjdump and nvdisasm. A kernel is compiled exactly as a launch on that card would do:
the same types, the same constants, arguments that are 1 or divisible by 16 specialised as the runtime does.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from streamprune.kernels.launch import Launch

# Per multiprocessor: registers, threads, shared memory (bytes), programs (CUDA C++ Programming Guide, table of
# technical specifications per compute capability).
MULTIPROCESSOR = {
    80: (65536, 2048, 164 << 10, 32),
    86: (65536, 1536, 100 << 10, 16),
    89: (65536, 1536, 100 << 10, 24),
    90: (65536, 2048, 228 << 10, 32),
}
TARGETS = (*(f"sm_{capability}" for capability in MULTIPROCESSOR), *(["gfx942"] if "amd" in backends else []))
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class MachineCode:
    """What the compiler made of one launch for one compute capability.

    Attributes:
        registers: per thread. local: bytes of local memory per thread, stack and spills together.
        shared: bytes per program. occupancy: most threads resident, as a share of what the card can hold.
        loads: instructions that read global memory, by width in bits, copies to shared memory among them.
        stores: the same for writing. tensor_cores, async_copies, local_accesses: instructions of that kind.
    """

    registers: int
    local: int
    shared: int
    occupancy: float
    loads: dict[int, int]
    stores: dict[int, int]
    tensor_cores: int
    async_copies: int
    local_accesses: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Triton's compiled kernel of a launch whose tensors may be on "meta"."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    unspecialised = set(launch.kernel.do_not_specialize or ())
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            aligned = True  # torch's allocations are
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        elif value == 1 and name not in unspecialised:
            signature[name], constants[name] = "constexpr", 1
            continue
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            aligned = value % 16 == 0 and name not in unspecialised
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


def nvidia(launch: Launch, capability: int) -> MachineCode:
    """Machine code of a launch for a compute capability such as 86."""
    compiled = compile_launch(launch, GPUTarget("cuda", capability, 32))
    usage, sass = _disassembled(compiled.asm["cubin"])
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    threads = 32 * compiled.metadata.num_warps
    return MachineCode(
        registers=used["REG"],
        local=used["STACK"] + used["LOCAL"],
        shared=compiled.metadata.shared,
        occupancy=_occupancy(capability, used["REG"], threads, compiled.metadata.shared),
        loads=_widths(sass, r"LDGSTS|LDG"),
        stores=_widths(sass, r"STG"),
        tensor_cores=len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA)\.", sass)),
        async_copies=len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", sass)),
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
    )


def amd(launch: Launch, architecture: str) -> MachineCode:
    """Machine code of a launch for an AMD architecture such as gfx942."""
    # As `most_warps` and `gram` have it there.
    there = replace(launch, num_warps=min(16, launch.num_warps), num_stages=min(3, launch.num_stages))
    compiled = compile_launch(there, GPUTarget("hip", architecture, 64))
    text = compiled.asm["amdgcn"]
    found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text))
    registers, threads = int(found["vgpr_count"]), 64 * compiled.metadata.num_warps
    loads: dict[int, int] = {}
    for width in re.findall(r"\b(?:global|buffer)_load_(dwordx\d|dword|u?short|ubyte)", text):
        bits = {"ubyte": 8, "short": 16, "ushort": 16, "dword": 32}.get(width) or 32 * int(width[-1])
        loads[bits] = loads.get(bits, 0) + 1
    # 512 registers per lane of a SIMD, at most 8 waves; a CU has 4 SIMDs.
    waves = min(8, 512 // max(1, -(-registers // 8) * 8))
    return MachineCode(
        registers=registers,
        local=int(found["private_segment_fixed_size"]),
        shared=compiled.metadata.shared,
        occupancy=min(1.0, waves * 4 // (threads // 64) * (threads // 64) / 32),
        loads=dict(sorted(loads.items())),
        stores={},
        tensor_cores=len(re.findall(r"\bv_mfma_", text)),
        async_copies=0,
        local_accesses=len(re.findall(r"\bscratch_(?:load|store)", text)),
    )


@cache
def _disassembled(cubin: bytes) -> tuple[str, str]:
    """Resources and instructions; of most kernels all models' matrices have the same."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("cuobjdump", "--dump-resource-usage", file.name), _tool("nvdisasm", "-c", file.name)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def _widths(sass: str, instruction: str) -> dict[int, int]:
    """Instructions by the bits that each thread moves; without a width in their name they move 32."""
    widths: dict[int, int] = {}
    for modifiers in re.findall(rf"\b(?:{instruction})(?![A-Z])((?:\.\w+)*)", sass):
        named = [int(part) for part in re.findall(r"\.(?:[US])?(8|16|32|64|128)\b", modifiers)]
        width = named[-1] if named else 32
        widths[width] = widths.get(width, 0) + 1
    return dict(sorted(widths.items()))


def _occupancy(capability: int, registers: int, threads: int, shared: int) -> float:
    """Resident threads / most resident threads; registers are given out to warps in units of 256."""
    most_registers, most_threads, most_shared, most_programs = MULTIPROCESSOR[capability]
    per_program = -(-registers * 32 // 256) * 256 * (threads // 32)
    programs = min(most_programs, most_threads // threads, most_registers // per_program)
    if shared:
        programs = min(programs, most_shared // (shared + 1024))  # 1 KiB of each program is the system's
    return programs * threads / most_threads
