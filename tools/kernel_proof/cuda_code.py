"""Compiles csrc/cuda for GPUs that are not there and reads every kernel's code: registers, spills, tensor cores, access widths.

What a parameter's bytes are is read from the structs in the sources, and held against the size that the compiler gave them.
Results lie under build/static by content, so that they are made once for all processes and repeats.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tools import build_native
from tools.build_native import BuildError  # noqa: F401 (for those who ask for rows)
from tools.kernel_proof import machine_code
from tools.kernel_proof.machine_code import Code
from tools.tree import ROOT

# The (B, N, D) tensors, by the names that the kernels' parameters have; such a parameter is a `Tokens`.
BIG = ("x", "x1", "branch", "h", "y", "dx", "dx1", "dbranch", "dh", "dy", "dq", "dk", "dv", "dpacked")
# Lists of tensors, one a weight and of its size; such a parameter is an array of addresses.
LISTS = ("weights", "gradients", "exp_avgs", "exp_avg_sqs", "averages", "copies")
SCALARS = {"int": 4, "float": 4, "double": 8, "bool": 1, "int64_t": 8, "ScalarType": 1}
FIELD = re.compile(r"([\w:]+(?:<.*>)?(?:, [\w:]+>)?)\s*(\*?)\s+(\w+(?:\s*=\s*[^,;]+)?(?:,\s*\w+(?:\s*=\s*[^,;]+)?)*)")
PARAMETER = re.compile(r"\[(\w+_param_0|%\w+)(?:\+(-?\d+))?\]")
TAKEN = re.compile(r"^\s*(mov|add)\.\w+\s+(%\w+),\s*(\w+_param_0|%\w+)(?:,\s*(-?\d+|%\w+))?;", re.M)


def why_not() -> str | None:
    """Why the kernels' code cannot be read here, or None if it can."""
    if build_native.find_nvcc() is None:
        return "nvcc is not here"
    if importlib.util.find_spec("torch") is None:
        return "torch is not here"
    missing = [name for name in ("cuobjdump", "c++filt") if machine_code.tool(name) is None]
    return f"{' and '.join(missing)} is not here" if missing else None


def rows(family: str, architecture: str, every: int = 1) -> list[dict[str, Any]]:
    """What is known of the kernels of csrc/cuda/<family>.cu, compiled for an architecture such as "90a".

    Args:
        every: 1 for all of them, n for a sample of every n-th.

    Returns:
        a row a kernel: ``kernel`` with its template arguments, ``family``, ``arch``, ``registers``, ``spills`` (accesses of local
        memory, bytes of stack and of local memory), ``static_shared_bytes``, ``threads`` (the most of a block), ``tf32``
        (instructions), ``wide`` (whether 128-bit accesses are promised), ``wide_fraction`` by tensor.

    Raises:
        build_native.BuildError: it does not compile.
    """
    source = build_native.CSRC / f"{family}.cu"
    folder = ROOT / "build/static" / _key(family, architecture, every)
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "rows.json"
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            ptx, cubin = _compiled(source, architecture, every, folder)
            made = [_row(code, family, architecture) for code in read(ptx, cubin, source)]
            done.with_suffix(".tmp").write_text(json.dumps(made, indent=1), encoding="utf-8")
            done.with_suffix(".tmp").replace(done)
    found: list[dict[str, Any]] = json.loads(done.read_text(encoding="utf-8"))
    return found


def _key(*asked: object) -> str:
    import torch

    key = hashlib.sha256(repr((asked, torch.__version__, build_native.find_nvcc())).encode())
    for file in (*sorted(build_native.CSRC.glob("*.*")), Path(__file__), Path(machine_code.__file__)):
        key.update(file.read_bytes())
    return key.hexdigest()[:16]


def _compiled(source: Path, architecture: str, every: int, folder: Path) -> tuple[Path, Path]:
    import torch

    compiler = build_native.find_nvcc()
    assert compiler is not None
    tools = build_native.Toolchain(compiler, Path(torch.__file__).parent)
    ptx, cubin = folder / "code.ptx", folder / "code.cubin"
    build_native.compile_ptx(tools, source, architecture, ptx)
    entries = list(_entries(ptx.read_text(encoding="utf-8")))[::every] if every > 1 else ()
    build_native.assemble(tools, ptx, architecture, cubin, entries)
    return ptx, cubin


def _row(code: Code, family: str, architecture: str) -> dict[str, Any]:
    wide = promised_wide(code.name)
    threads = re.search(r"\.maxntid (\d+)", code.ptx)
    return {
        "kernel": re.sub(r"\(.*", "", code.name),
        "backend": "cuda",
        "family": family,
        "arch": f"sm_{architecture}",
        "registers": code.resources["REG"],
        "spills": code.spills,
        "static_shared_bytes": code.resources["SHARED"],
        "threads": int(threads.group(1)) if threads else None,
        "tf32": sum("TF32" in opcode for opcode in code.opcodes),
        "wide": wide,
        "wide_fraction": machine_code.wide_shares(code, (*BIG, *LISTS)) if wide else {},
    }


def promised_wide(kernel: str) -> bool:
    """Whether a kernel of this name moves big tensors by 128-bit accesses: the first truth among its template arguments says so.

    Kernels without template arguments own no big tensor.
    """
    arguments = re.search(r"<(.*)>", kernel)
    truths = re.findall(r"\b(true|false)\b", arguments.group(1)) if arguments else []
    return bool(truths) and truths[0] == "true"


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read(ptx: Path, cubin: Path, source: Path) -> list[Code]:
    """Every kernel of a compiled file that was assembled."""
    usage, sass = _usage(cubin), _functions(cubin)
    entries = {entry: text for entry, text in _entries(ptx.read_text(encoding="utf-8")).items() if entry in sass}
    names = dict(zip(entries, demangled(entries)))
    structs = _structs(source)
    return [Code(names[e], text, sass[e], usage[e], _arguments(text, names[e], structs)) for e, text in entries.items()]


def demangled(names: Iterable[str]) -> list[str]:
    """Kernels as ``forward_rows<float, BFloat16, 384, true>(Forward<float, BFloat16>)``."""
    filter_ = machine_code.tool("c++filt")
    assert filter_ is not None
    done = subprocess.run([filter_], input="\n".join(names), capture_output=True, text=True, check=True)
    text = re.sub(r"ditkernels::|\(anonymous namespace\)::|c10::|torch::headeronly::", "", done.stdout)
    # The demangler knows no names of enumerators, by which launches are recorded.
    known = _enumerators()
    text = re.sub(r"\((\w+)\)(\d+)", lambda m: f"{m[1]}::{known[m[1]][int(m[2])]}" if m[1] in known else m[0], text)
    return [re.sub(r"^void ", "", line) for line in text.splitlines()]


def _enumerators() -> dict[str, list[str]]:
    """The enumerators of every scoped enumeration of the sources."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(build_native.CSRC.glob("*.cu*")))
    return {
        name: re.findall(r"\w+", inside) for name, inside in re.findall(r"^enum class (\w+) \{ ([\w, ]+) \};", text, flags=re.M)
    }


def _entries(ptx: str) -> dict[str, str]:
    """The text of each kernel, by its mangled name."""
    parts = re.split(r"^(?:\.visible |\.weak )?\.entry (\w+)", ptx, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def _dumped(cubin: Path, *flags: str) -> str:
    dump = machine_code.tool("cuobjdump")
    assert dump is not None
    return subprocess.run([dump, *flags, str(cubin)], capture_output=True, text=True, check=True).stdout


def _usage(cubin: Path) -> dict[str, dict[str, int]]:
    found = re.findall(r"^ Function (\w+):\n(.*REG:.*)$", _dumped(cubin, "-res-usage"), flags=re.M)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)} for name, line in found}


def _functions(cubin: Path) -> dict[str, str]:
    parts = re.split(r"^\s*Function : (\w+)$", _dumped(cubin, "-sass"), flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2]))


# ---- Parameters ------------------------------------------------------------------------------------------------------


class Field(NamedTuple):
    """A member of a struct; ``count`` is None for one that is no array."""

    kind: str
    pointer: bool
    name: str
    count: int | None


Structs = dict[str, list[Field]]


def _structs(source: Path) -> Structs:
    """The fields of every struct of a file and its headers, as far as they can be read."""
    text = "".join(p.read_text(encoding="utf-8") for p in (*sorted(build_native.CSRC.glob("*.cuh")), source))
    constants = dict(re.findall(r"^constexpr int (\w+) = (\d+);", text, flags=re.M))
    found = {}
    for name, body in re.findall(r"^struct (?:alignas\(\d+\) )?(\w+) \{\n(.*?)^\};", text, flags=re.M | re.S):
        fields = []
        for statement in re.sub(r"//.*", "", body).split(";"):
            pointer = "*" in statement
            counts = {n: int(constants.get(c, c)) for n, c in re.findall(r"(\w+)\[(\w+)\]", statement)}
            match = FIELD.fullmatch(re.sub(r"\*|\[\w+\]|^const ", "", statement.strip()))
            if match is None:
                break
            names = re.findall(r"(\w+)(?:\s*=\s*[^,]+)?(?:,|$)", match.group(3))
            kind = re.sub(r"<.*", "", match.group(1))
            fields += [Field(kind, pointer, each, counts.get(each)) for each in names]
        found[name] = fields
    return found


def layout(struct: str, structs: Structs, prefix: str = "", start: int = 0) -> tuple[dict[int, str], int, int]:
    """By byte offset the names of a struct's scalars, its size and its alignment.

    The elements of an array bear its name, and those of one of addresses the name that a tensor's address has.
    """
    at, alignment, places = start, 1, {}
    for kind, pointer, name, count in structs[struct]:
        if pointer or kind in SCALARS:
            size = align = 8 if pointer else SCALARS[kind]
            at = -(-at // align) * align
            for element in range(count or 1):
                places[at + element * size] = prefix + name + (".data" if pointer and count else "")
            size *= count or 1
        else:
            align = layout(kind, structs)[2]
            at = -(-at // align) * align
            inner, size, _ = layout(kind, structs, f"{prefix}{name}.", at)
            places |= inner
        at, alignment = at + size, max(alignment, align)
    return places, -(-at // alignment) * alignment - start, alignment


def _arguments(ptx: str, name: str, structs: Structs) -> Any:
    """Which tensor's pointer an operand reads from the one parameter, a struct, of a kernel."""
    struct = re.search(r"\((\w+)[^()]*\)$", name)
    assert struct is not None, name
    places, size, _ = layout(struct.group(1), structs)
    declared = re.search(r"param_0\[(\d+)\]", ptx)
    if declared is None or int(declared.group(1)) != size:
        raise ValueError(f"{name}: {struct.group(1)} was read as {size} bytes, the compiler says otherwise")
    bases = _bases(ptx)

    def argument(operands: str) -> str | None:
        match = PARAMETER.search(operands)
        if match is None or not (match.group(1) in bases or match.group(1).endswith("_param_0")):
            return None
        place = places.get(bases.get(match.group(1), 0) + int(match.group(2) or 0), "")
        return place.removesuffix(".data") if place.endswith(".data") else None

    return argument


def _bases(ptx: str) -> dict[str, int]:
    """Registers that hold an address within the parameter, and its offset; of an element of an array, that of the first."""
    bases: dict[str, int] = {}
    for kind, target, source, added in TAKEN.findall(ptx):
        if source.endswith("_param_0"):
            bases[target] = 0
        elif source in bases and (kind == "mov" or added):
            bases[target] = bases[source] + (0 if added.startswith("%") else int(added or 0))
        elif added in bases:
            bases[target] = bases[added]
    return bases
