"""Forward and backward of every op on one backend, at the small and awkward shapes of `ditkernels check`: for compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m tools.kernel_proof.sanitize --backend cuda
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from ditkernels import ops
from ditkernels.diagnostics.check import CASES, PRECISIONS, Case, updated
from ditkernels.ops import dispatch
from ditkernels.runtime import resolve_device


def run(case: Case, inputs: dict[str, Tensor]) -> None:
    """One forward and backward, or one update."""
    function = getattr(ops, case.op)
    if case.updates:
        updated(function, case, inputs)
        return
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out = function(**leaves, **case.options)
    outputs = out if isinstance(out, tuple) else (out,)
    torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=dispatch.BACKENDS, required=True)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto is cuda if there is one")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    runs = 0
    with dispatch.use_backend(args.backend):
        for case in CASES:
            # Of split_qkv the backward alone is an op of the dispatch.
            op = dispatch.OPS.get(case.op) or dispatch.OPS.get(f"{case.op}_backward")
            if op is None or args.backend not in op.implementations:
                continue
            for precision in PRECISIONS:
                if precision.mixed and case.of_one_dtype:
                    continue
                try:
                    run(case, case.inputs(precision, device))
                except dispatch.BackendError as refusal:
                    print(f"left out: {refusal}")
                    continue
                runs += 1
    print(f"{runs} forwards and backwards on {args.backend}, {device}")


if __name__ == "__main__":
    main()
