"""What a call costs the host: microseconds of every op and of a whole DiT, kernels left out, beside plain PyTorch in the same run.

    python -m benchmarks.speed.host --json benchmarks/results/host.json

Tensors lie on the CPU and are so small that their arithmetic is nothing. Ours runs the Triton backend's own wrappers with the
launch alone replaced by nothing; plain PyTorch is the reference. A launch is timed apart: ours against Triton's own, each with a
driver that does nothing. Contenders take turns; a ratio is the median over the rounds of ours over plain, and below 1 the host is
faster.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import runpy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.speed import measure
from ditkernels import accelerate, ops, reference, use_backend
from ditkernels.models import DiT
from ditkernels.ops import _triton, dispatch
from tools.kernel_proof import stub_driver
from tools.tree import ROOT

BATCH, TOKENS, WIDTH = 2, 4, 64
# The letters of all declarations; H and W are an image's sides, P and Q a patch's, F and E the MLP's and the embedding's widths.
SIZES = {
    "B": BATCH,
    "N": TOKENS,
    "D": WIDTH,
    "V": 16,
    "C": 4,
    "H": 4,
    "W": 4,
    "P": 2,
    "Q": 2,
    "E": WIDTH,
    "F": WIDTH,
}
GRID = {"grid": (2, 2), "patch_size": 2}
CASES = {
    "modulate_norm": ("x shift scale", {}),
    "gated_residual": ("x branch gate", {}),
    "gated_residual_norm": ("x branch gate shift scale", {}),
    "bias_gelu": ("x bias", {}),
    "mlp": ("x fc1_weight fc1_bias fc2_weight", {}),
    "patch_embed": ("x weight bias", {}),
    "final_layer": ("x shift scale weight bias", GRID),
}

Run = Callable[[], Any]


def _nothing(*args: Any, **constants: Any) -> None:
    pass


@contextmanager
def without_kernels() -> Iterator[None]:
    """Lets the Triton backend take CPU tensors and launch nothing."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(_triton, "launch", _nothing))
        stack.enter_context(mock.patch.object(_triton, "device_reason", _nothing))
        stack.enter_context(use_backend("triton"))
        dispatch.forget()
        yield
    dispatch.forget()


def backward_of(run: Run, leaves: list[Tensor]) -> Run:
    """A forward and a backward to ``leaves``, by the engine itself: ``torch.autograd.grad`` checks for longer than an op takes."""
    engine = torch.autograd.Variable._execution_engine
    cotangents: list[Tensor] = []

    def both() -> None:
        outputs = run()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not cotangents:
            cotangents.extend(torch.ones_like(output) for output in outputs)
        engine.run_backward(outputs, tuple(cotangents), False, False, tuple(leaves), True, accumulate_grad=False)

    return both


def op_runs(name: str) -> dict[str, dict[str, Run]]:
    """By mode, then by contender, one call of an op."""
    names, options = CASES[name]
    declaration = dispatch.OPS[name].declaration
    shapes = declaration.shapes(SIZES, names.split())
    if name in ("patch_embed", "final_layer"):
        shapes["weight"] = {"patch_embed": (WIDTH, 4, 2, 2), "final_layer": (16, WIDTH)}[name]
        shapes["bias"] = (shapes["weight"][0],)
    tensors = {argument: torch.randn(shape) for argument, shape in shapes.items()}
    leaves = {argument: tensor.clone().requires_grad_() for argument, tensor in tensors.items()}
    made: dict[str, dict[str, Run]] = {"no gradients": {}, "forward and backward": {}}
    for contender, room in (("plain", reference), ("ours", ops)):
        function = getattr(room, name)
        made["no gradients"][contender] = lambda f=function: f(**tensors, **options)
        made["forward and backward"][contender] = backward_of(lambda f=function: f(**leaves, **options), list(leaves.values()))
    return made


def sizes(depth: int) -> dict[str, int]:
    """Of the whole models."""
    return {"input_size": 4, "patch_size": 2, "hidden_size": WIDTH, "depth": depth, "num_heads": 4, "num_classes": 10}


def own(depth: int) -> dict[str, torch.nn.Module]:
    """The reference's DiT and ours."""
    return {"plain": reference.DiT(**sizes(depth)).eval(), "ours": DiT(**sizes(depth)).eval()}


def accelerated(depth: int) -> dict[str, torch.nn.Module]:
    """The public DiT, as it was written and accelerated. Call it where kernels run, since parts are proven by what they compute."""
    public = runpy.run_path(str(ROOT / "examples" / "public_models.py"))["DiT"]
    plain = public(**sizes(depth)).eval()
    ours = copy.deepcopy(plain)
    accelerate(ours, file=io.StringIO())
    return {"plain": plain, "ours": ours}


def model_runs(models: dict[str, torch.nn.Module]) -> dict[str, dict[str, Run]]:
    """As :func:`op_runs`, of whole models, in fp32 and under autocast."""
    made: dict[str, dict[str, Run]] = {}
    x, t, y = torch.randn(BATCH, 4, 4, 4), torch.tensor([3, 500]), torch.tensor([1, 7])
    for precision in ("fp32", "autocast"):
        for contender, model in models.items():
            leaves = [p for p in model.parameters() if p.requires_grad]

            def forward(model: torch.nn.Module = model, lowered: bool = precision == "autocast") -> Tensor:
                with torch.autocast("cpu", dtype=torch.bfloat16) if lowered else nullcontext():
                    return model(x, t, y)

            def sampled(forward: Run = forward) -> Tensor:
                with torch.no_grad():
                    return forward()

            made.setdefault(f"{precision}, no gradients", {})[contender] = sampled
            made.setdefault(f"{precision}, forward and backward", {})[contender] = backward_of(forward, leaves)
    return made


def microseconds(run: Run, calls: int) -> float:
    """Processor time of one call, the mean over ``calls``: other processes on the machine do not count."""
    start = time.thread_time()
    for _ in range(calls):
        run()
    return 1e6 * (time.thread_time() - start) / calls


def row(unit: str, mode: str, runs: dict[str, Run], rounds: int, calls: int) -> dict[str, Any]:
    """What was found of one unit in one mode; contenders take turns in each round."""
    taken: dict[str, list[float]] = {contender: [] for contender in runs}
    grads = torch.enable_grad if "backward" in mode else torch.no_grad
    with grads():
        for run in runs.values():
            microseconds(run, max(2, calls // 10))
        gc.collect()
        gc.disable()
        try:
            for _ in range(rounds):
                for contender, run in runs.items():
                    taken[contender].append(microseconds(run, calls))
        finally:
            gc.enable()
    ratios = [ours / plain for ours, plain in zip(taken["ours"], taken["plain"])]
    medians = {f"{contender}_us": statistics.median(times) for contender, times in taken.items()}
    return {"unit": unit, "mode": mode, **medians, "ratio": statistics.median(ratios)}


def recorded_launch() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``_triton.launch`` in a forward of ``gated_residual_norm``."""
    launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    with without_kernels(), mock.patch.object(_triton, "launch", lambda *a, **c: launches.append((a, c))):
        op_runs("gated_residual_norm")["no gradients"]["ours"]()
    return launches[0]


def launch_runs() -> dict[str, Run]:
    """One launch: by ``_triton.launch``, and by Triton's own ``kernel[grid](...)``."""
    recorded, constants = recorded_launch()
    kernel, programs, tile, _, *args = recorded

    def plain() -> None:
        kernel[(programs,)](*args, **constants, **tile.options)

    return {"plain": plain, "ours": lambda: _triton.launch(*recorded, **constants)}


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of all units."""
    models = {"DiT": own(args.depth), "accelerated public DiT": accelerated(args.depth)}
    with without_kernels():
        for name in args.ops:
            for mode, runs in op_runs(name).items():
                yield row(name, mode, runs, args.rounds, args.calls)
        for name, pair in models.items():
            for mode, runs in model_runs(pair).items():
                yield row(f"{name}, depth {args.depth}", mode, runs, args.rounds, max(1, args.calls // 100))
    if _triton.MISSING is None:
        with stub_driver.installed():
            yield row("a launch", "of Triton's own", launch_runs(), args.rounds, args.calls)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.set_defaults(device="cpu", rounds=21)
    parser.add_argument("--calls", type=measure.positive, default=500, help="of an op in a round; a model gets a hundredth")
    parser.add_argument("--depth", type=measure.positive, default=28, help="of the model")
    parser.add_argument("--ops", type=measure.names_among(CASES), default=list(CASES))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    # Outputs that no kernel wrote may hold denormals, which slow products down.
    torch.set_flush_denormal(True)
    measure.report("host", args, list(rows(args)), ["unit", "mode", "plain_us", "ours_us", "ratio"])


if __name__ == "__main__":
    main()
