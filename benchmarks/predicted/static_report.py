"""What is known of every kernel without a GPU: registers, spills, occupancy, access widths, and the bytes it moves.

    python -m benchmarks.predicted.static_report                                       both backends, S, B, L and XL, Hopper
    python -m benchmarks.predicted.static_report --archs 80,90,100 --json report.json  all three: many minutes, kept in build/static
    python -m benchmarks.predicted.static_report --backends triton --models XL --batch 32 --bandwidth 3350

A row a launch, forward and backward of each op of a model at 256 px, then one for all launches of the pass. And the update of all
weights of the model, with fp32 gradients and with bf16 gradients and copies: there a touch is one of every parameter.

Registers, spills and widths are read from the machine code; occupancy follows from registers, threads and shared memory. Traffic is
counted in Triton's interpreter and in the host emulation of the CUDA sources, at the real shapes, over the first, the middle and
the last program of each launch, and scaled to all of them, which is exact but for a last, shorter chunk of rows (0.1%). Of an
update it is the first and the last chunk of the weights of each size, which is exact:

    touch_ratio     touches of each element of a (B, N, D) tensor, a read or a write counted apart: 1 is one pass over it
    passes          reads and writes of whole (B, N, D) tensors
    floor_bytes     of these, every tensor once; for a whole pass what the op must move at least
    issued_bytes    all that is asked for: vectors, weights and partial sums too, most of which a cache serves. Of CUDA every
                    thread's loads, of Triton every element of a tile
    floor_ms        the floor at ``--bandwidth``: a bound, and no prediction
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

from benchmarks.speed import measure
from benchmarks.speed import ops as sites
from ditkernels.reference import SIZES
from tools.kernel_proof import cuda_code, emulated_cuda, launches, machine_code
from tools.kernel_proof.launches import Case

MODELS = {name.removeprefix("DiT-"): size["hidden_size"] for name, size in SIZES.items()}
ARCHITECTURES = {"80": "80", "90": "90a", "100": "100"}  # as Triton, and as nvcc calls them
FAMILIES = {
    "patch_embed": ("image",),
    "final_layer": ("image", "norm"),
    "unpatchify": ("image",),
    "bias_gelu": ("gelu",),
    "split_qkv": ("qkv",),
    "adamw_ema": ("optimizer",),
}
BACKENDS = ("triton", "cuda")
ALL = "all launches"


def why_not(backend: str) -> str | None:
    """Why a backend's kernels cannot be looked at here, or None if they can."""
    if backend == "cuda":
        return cuda_code.why_not() or emulated_cuda.why_not()
    from ditkernels.ops import _triton

    return _triton.MISSING


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All that is asked for; a note for a backend that cannot be looked at."""
    named = [
        (model, Case(op, MODELS[model], args.patch_size, args.batch, precision))
        for model in args.models
        for op in args.ops
        for precision in (launches.UPDATES if op == launches.UPDATE else args.precisions)
    ]
    for backend in args.backends:
        reason = why_not(backend)
        if reason is not None:
            yield {"backend": backend, "note": reason}
            continue
        cases = [case for _, case in named]
        moved = launches.traffic(backend, cases)
        for architecture in args.archs:
            codes = _codes(backend, architecture, cases, moved)
            made = [
                launch(cases[found["case"]], {**found, **code}, architecture, args.bandwidth)
                for found, code in zip(moved, codes, strict=True)
            ]
            for index, (model, case) in enumerate(named):
                common = {
                    "model": f"DiT-{model}/{args.patch_size}",
                    "backend": backend,
                    "arch": f"sm_{architecture}",
                }
                mine = [row for row, found in zip(made, moved) if found["case"] == index]
                for phase in launches.PASSES:
                    group = [{**common, **row} for row in mine if row["pass"] == phase]
                    yield from group
                    if group:
                        yield {**common, **whole(case, phase, group, args.bandwidth)}


def _codes(backend: str, architecture: str, cases: list[Case], moved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each launch was compiled to."""
    if backend == "triton":
        return launches.code(architecture, cases)
    target = ARCHITECTURES[architecture]
    known = {
        op: {row["kernel"]: row for family in families for row in cuda_code.rows(family, target)}
        for op, families in {case.op: FAMILIES.get(case.op, ("norm",)) for case in cases}.items()
    }
    found = []
    for row in moved:
        code = known[cases[row["case"]].op][row["kernel"]]
        static = declared_shared(code["static_shared_bytes"], architecture)
        big = cases[row["case"]].big()
        found.append(
            {
                **{name: code[name] for name in ("registers", "spills", "tf32")},
                "wide_fraction": {n: share for n, share in code["wide_fraction"].items() if n in big},
                "shared_bytes": row["shared_bytes"] + static,
            }
        )
    return found


def declared_shared(reported: int, architecture: str) -> int:
    """Bytes of a kernel's own shared memory: from sm_90 on the compiler adds what the driver reserves, in a file that uses any."""
    return max(0, reported - machine_code.SHARED_RESERVED) if int(architecture) >= 90 else reported


def launch(case: Case, found: dict[str, Any], architecture: str, bandwidth: float) -> dict[str, Any]:
    """The row of a launch, from its code and its traffic."""
    elements, big = math.prod(case.shape), case.big()
    touches = {
        f"{name} {way}": moved / (elements * big[name])
        for name, both in found["moved"].items()
        if name in big
        for way, moved in zip(("read", "written"), both)
        if moved
    }
    floor = elements * sum(big[touched.split()[0]] for touched in touches)
    shares = found["wide_fraction"]
    threads, registers, shared = found["threads"], found["registers"], found["shared_bytes"]
    return {
        "op": case.op,
        "pass": found["pass"],
        "kernel": found["kernel"],
        "shape": list(case.shape),
        "precision": case.precision,
        "programs": found["programs"],
        "threads": threads,
        "registers": registers,
        "spills": found["spills"],
        "shared_bytes": shared,
        "occupancy": machine_code.occupancy(int(architecture), registers, threads, shared),
        "tf32": found["tf32"],
        "wide_fraction": shares,
        "narrowest": min(shares.values()) if shares else None,
        "touches": touches,
        "touch_ratio": max(touches.values(), key=lambda times: abs(times - 1)) if touches else None,
        "passes": sum(touches.values()),
        "floor_bytes": floor or None,
        "issued_bytes": sum(map(sum, found["moved"].values())),
        "floor_ms": floor / bandwidth / 1e6 if floor else None,
    }


def whole(case: Case, phase: str, group: list[dict[str, Any]], bandwidth: float) -> dict[str, Any]:
    """The row of all launches of a pass."""
    floor = case.floor_bytes(phase)
    ratios = [row["touch_ratio"] for row in group if row["touch_ratio"] is not None]
    return {
        "op": case.op,
        "pass": phase,
        "kernel": ALL,
        "shape": list(case.shape),
        "precision": case.precision,
        "registers": max(row["registers"] for row in group),
        "spills": sum(row["spills"] for row in group),
        "touch_ratio": max(ratios, key=lambda times: abs(times - 1)) if ratios else None,
        "passes": sum(row["passes"] for row in group),
        "floor_bytes": floor,
        "issued_bytes": sum(row["issued_bytes"] for row in group),
        "floor_ms": floor / bandwidth / 1e6,
    }


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = measure.parser(__doc__)
    parser.set_defaults(device="cpu")
    parser.add_argument("--backends", type=measure.names_among(BACKENDS), default=list(BACKENDS))
    parser.add_argument("--models", type=measure.names_among(MODELS), default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--archs", type=measure.names_among(ARCHITECTURES), default=["90"], help=", ".join(ARCHITECTURES))
    parser.add_argument(
        "--ops",
        type=measure.names_among(launches.OPS),
        default=list(launches.OPS),
        help=", ".join(launches.OPS),
    )
    parser.add_argument("--precisions", type=measure.names_among(sites.PRECISIONS), default=["fp32+bf16"])
    parser.add_argument("--patch-size", type=int, choices=(2, 4, 8), default=2)
    parser.add_argument("--batch", type=measure.positive, default=256)
    parser.add_argument("--bandwidth", type=float, default=4300.0, help="GB/s of copying; assumed: an H200 reaches that")
    args = parser.parse_args(argv)
    columns = (
        *(
            "model",
            "backend",
            "arch",
            "op",
            "pass",
            "precision",
            "kernel",
            "registers",
            "spills",
            "occupancy",
            "narrowest",
        ),
        *("touch_ratio", "passes", "floor_bytes", "issued_bytes", "floor_ms", "note"),
    )
    try:
        measure.report("static_report", args, rows(args), columns)
    except cuda_code.BuildError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
