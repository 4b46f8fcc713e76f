"""What an op is, said once: its declaration, and all that follows from it.

    inputs     "x: BND, branch: BND, index: BN? = int"           tensors: name, axes, ? where it may be None, int for integers
    options    "norm: str, eps: float, out_dtype: ScalarType"    all else, in types of torch's schema language
    outputs    "x1: BND = x, stats: BNS = wide if keep"          tensors: name, axes, whose dtype, and the option it hangs on

A letter is an axis and stands for one size. The first tensor that has the axis settles its size, and a later one must agree; those
that may be None come after the others. ``sizes`` settles axes that follow from options. After the ``=`` stands an input, an option
of type ScalarType, or ``wide``, the dtype of the arithmetic. An output with ``if keep`` is for the backward alone: the option
``keep`` comes last in the schema, and the public function does not return such an output.

From a declaration come the schema, the checks with their messages, the empty outputs of the fake kernel, how DTensors are sharded,
what the backward saves, and the declaration of the backward op. The backward op takes the gradients of the outputs, what it reads,
some options, and ``wanted``: for each gradient it could give the dtype that is asked for, as torch's number of the dtype, or -1
for none.

What is absent is None to a kernel and (0,) to torch's schema language, which has no optional result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ditkernels.reference import NORMS, same_size

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64,)
# c10::ScalarType's numbers, which compiled libraries share.
_CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
_DTYPES = {code: dtype for dtype, code in _CODES.items()} | {-1: None}

Given = Mapping[str, Any]
Sizes = dict[str, int]
Wanted = tuple["torch.dtype | None", ...]
# Placements of torch.distributed.tensor on one axis of a mesh: of the outputs, and of the tensors among the arguments.
Rule = tuple["list[Any]", "list[Any]"]


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, of row statistics and of all sums: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def encoded(wanted: Wanted) -> list[int]:
    """``wanted`` as the schema has it."""
    return [-1 if dtype is None else _CODES[dtype] for dtype in wanted]


def decoded(codes: Sequence[int]) -> Wanted:
    """``wanted`` as a Python kernel has it."""
    return tuple(_DTYPES[code] for code in codes)


# ---- Checks. Every message names the argument, what came and what is allowed. ----------------------------------------


def check_dtype(name: str, value: torch.dtype, among: Sequence[torch.dtype] = DTYPES) -> None:
    if value not in among:
        allowed = ", ".join(str(d) for d in among)
        raise TypeError(f"{name}: got dtype {value}, allowed are {allowed}")


def check_tensor(
    name: str, value: Tensor, shape: tuple[int | None, ...], like: Tensor, among: Sequence[torch.dtype] = DTYPES
) -> None:
    """Checks dtype, device and shape; None stands for any size."""
    check_dtype(name, value.dtype, among)
    if value.device != like.device:
        raise ValueError(f"{name}: got device {value.device}, but the first argument is on {like.device}")
    same_rank = value.dim() == len(shape)
    if not same_rank or any(want is not None and not same_size(got, want) for got, want in zip(value.shape, shape)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({expected})")


def check_not_empty(name: str, value: Tensor, axis: int) -> None:
    if value.shape[axis] < 1:
        which = {0: "first", -1: "last"}[axis]
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; the {which} axis must not be empty")


def check_norm(given: Given) -> None:
    """The options of a norm, as far as they are there."""
    if given["norm"] not in NORMS:
        raise ValueError(f"norm: got {given['norm']!r}, allowed are {', '.join(NORMS)}")
    check_eps("eps", given.get("eps", 0.0))


def check_eps(name: str, eps: float) -> None:
    if not eps >= 0:
        raise ValueError(f"{name}: got {eps}, allowed is 0 or more")


def check_comes_with(given: Given, name: str, needed: str) -> None:
    """That an argument comes only together with another."""
    if given[name] is not None and given[needed] is None:
        raise ValueError(f"{name}: given without {needed}")


# ---- Declarations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    name: str
    axes: str
    optional: bool
    integer: bool = False


@dataclass(frozen=True)
class Option:
    name: str
    type: str


@dataclass(frozen=True)
class Output:
    """``dtype`` names whose dtype it has; ``kept`` says whether it is for the backward alone."""

    name: str
    axes: str
    dtype: str
    kept: bool


@dataclass(frozen=True)
class Gradient:
    """How an op is differentiated.

    Attributes:
        reads: what the backward op reads besides, in the order of its arguments: inputs and outputs of the op.
        gives: inputs whose gradients the backward op gives, in order; empty: all.
        options: of the op's, those that the backward op takes.
        needs: which gradients need which of ``reads``, as in {"x scale": "x1 stats"}; the rest is not saved.
        formula: (call, grads, read, options, wanted) -> gradients of all inputs; ``call(grads, read, wanted)`` runs the
            backward op. By default it is called as it is.
        by_op: whether there is a backward op; without one the formula is made of other ops.
        flops: of the backward op, as those of a declaration.
    """

    reads: str
    needs: Mapping[str, str]
    gives: str = ""
    options: str = ""
    formula: Callable[..., Sequence[Tensor | None]] | None = None
    by_op: bool = True
    flops: Callable[[Given], int] | None = None


@dataclass(frozen=True)
class Example:
    """A call that ``check``, the tests and the benchmarks make.

    Attributes:
        sizes: of all axes.
        options: of the public function.
        present: the optional inputs that are there; None: all.
    """

    sizes: Sizes
    options: Mapping[str, Any] = field(default_factory=dict)
    present: str | None = None


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _input(text: str) -> Input:
    name, axes, optional, integer = re.fullmatch(r"(\w+): (\w+)(\?)?( = int)?", text).groups()  # type: ignore[union-attr]
    return Input(name, axes, optional is not None, integer is not None)


def _output(text: str) -> Output:
    name, axes, dtype, keep = re.fullmatch(r"(\w+): (\w+) = (\w+)( if keep)?", text).groups()  # type: ignore[union-attr]
    return Output(name, axes, dtype, keep is not None)


def _no_sizes(given: Given, sizes: Sizes) -> Sizes:
    return {}


def _no_check(given: Given) -> None:
    pass


def _takes_all(tensors: Sequence[Tensor | None]) -> None:
    return None


@dataclass(frozen=True)
class Declaration:
    """An op as it is declared; see the top of this file.

    Attributes:
        sizes: (arguments by name, sizes of the inputs' axes) -> sizes of further axes.
        check: raises on what the axes do not say; runs after their checks.
        row: the axis that a program of a kernel holds whole, so that its size is limited; "" for none.
        shards: the axes whose indices are computed apart from each other; an output that lacks such an axis is the sum over it.
        meaning: the op in plain PyTorch, of inputs and options by name; runs under transforms of torch.func and in an ONNX export.
        kept: its outputs that are for the backward, in plain PyTorch and out of place, of the same arguments.
        called: the public function that calls the op, where it has another name.
        wider: (tensors) -> what makes a call of tensors beyond the axes of calls within them, or None for a call within them.
            It takes tensors, options and the forced backend, "auto" for none.
        examples: awkward calls: odd sizes, several samples, every optional input and none.
        flops: (arguments by name, with shapes in place of tensors) -> 2 for each multiply-add of the products inside.
    """

    name: str
    inputs: tuple[Input, ...]
    options: tuple[Option, ...]
    outputs: tuple[Output, ...]
    sizes: Callable[[Given, Sizes], Sizes] = _no_sizes
    check: Callable[[Given], None] = _no_check
    row: str = ""
    shards: str = ""
    flops: Callable[[Given], int] | None = None
    gradient: Gradient | None = None
    meaning: Callable[..., Any] | None = None
    kept: Callable[..., tuple[Tensor, ...]] | None = None
    called: str = ""
    wider: Callable[[Sequence[Tensor | None]], Callable[..., Any] | None] = _takes_all
    examples: tuple[Example, ...] = ()
    is_backward: bool = False

    @classmethod
    def parse(cls, name: str, inputs: str, options: str, outputs: str, **rest: Any) -> Declaration:
        made = tuple(map(_output, _words(outputs)))
        chosen = [Option(*word.split(": ")) for word in _words(options)]
        if any(output.kept for output in made):
            chosen.append(Option("keep", "bool"))
        return cls(name, tuple(map(_input, _words(inputs))), tuple(chosen), made, **rest)

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """The names of inputs and options, in the order of the schema."""
        return (*[i.name for i in self.inputs], *[option.name for option in self.options])

    @cached_property
    def keeps(self) -> bool:
        """Whether outputs hang on ``keep``."""
        return any(output.kept for output in self.outputs)

    @cached_property
    def returned(self) -> int:
        """How many outputs the public function returns; they come first."""
        return sum(not output.kept for output in self.outputs)

    @cached_property
    def public(self) -> slice | int | None:
        """Which of several outputs the public function returns, as an index; None where there is one output."""
        if len(self.outputs) == 1:
            return None
        return slice(self.returned) if self.returned > 1 else 0

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The names of inputs, then of outputs."""
        return (*[i.name for i in self.inputs], *[output.name for output in self.outputs])

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The names of what backward reads."""
        return tuple(self.gradient.reads.split()) if self.gradient else ()

    @cached_property
    def gradient_options(self) -> tuple[str, ...]:
        """The names of the options that backward takes."""
        return tuple(self.gradient.options.split()) if self.gradient else ()

    @cached_property
    def schema(self) -> str:
        arguments = [f"Tensor{'?' if i.optional else ''} {i.name}" for i in self.inputs]
        arguments += [f"{option.type} {option.name}" for option in self.options]
        one = len(self.outputs) == 1
        results = "Tensor" if one else f"({', '.join(f'Tensor {o.name}' for o in self.outputs)})"
        return f"({', '.join(arguments)}) -> {results}"

    def shapes(self, sizes: Sizes, present: Sequence[str] | None = None) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs by name, for tests and benchmarks; of the optional ones those ``present``, by default all."""
        return {
            i.name: tuple(sizes[axis] for axis in i.axes)
            for i in self.inputs
            if not i.optional or present is None or i.name in present
        }

    # ---------------------------------------------------------------------------------------------- checks and fakes

    def given(self, args: Sequence[Any]) -> Given:
        return dict(zip(self.arguments, args))

    def checked(self, args: Sequence[Any]) -> Sizes:
        """Raises ValueError or TypeError on arguments that no backend can take; returns the sizes of all axes."""
        given = self.given(args)
        like = next(value for value in args if isinstance(value, Tensor))
        sizes: Sizes = {}
        # An optional tensor must agree with those that are always there.
        for declared, value in sorted(zip(self.inputs, args), key=lambda pair: pair[0].optional):
            if value is None:
                continue
            axes = declared.axes
            among = INTEGERS if declared.integer else DTYPES
            check_tensor(declared.name, value, tuple(sizes.get(axis) for axis in axes), like, among)
            sizes.update(zip(axes, value.shape))
            if "D" in axes:
                check_not_empty(declared.name, value, -1 if axes.endswith("D") else 0)
        for option in self.options:
            if option.type == "ScalarType":
                check_dtype(option.name, given[option.name])
        self.check(given)
        return sizes | self.sizes(given, sizes)

    def size_of_row(self, args: Sequence[Any]) -> int:
        """The size of the axis that a program holds whole; 1 for none."""
        found = (
            value.shape[i.axes.index(self.row)]
            for i, value in zip(self.inputs, args)
            if self.row and self.row in i.axes and value is not None
        )
        return next(found, 1)

    def dtypes(self, args: Sequence[Any]) -> list[torch.dtype]:
        """Of all tensors but those of integers, and of the options that are dtypes."""
        found = [v.dtype if isinstance(v, Tensor) else v for v in args if isinstance(v, (Tensor, torch.dtype))]
        return [dtype for dtype in found if dtype not in INTEGERS]

    def fake(self, *args: Any) -> Any:
        """Checks the arguments and returns empty outputs of the right shape, dtype and device."""
        sizes, given = self.checked(args), self.given(args)
        like = next(value for value in args if isinstance(value, Tensor))
        made = [self._empty(output, given, sizes, like) for output in self.outputs]
        return made[0] if len(made) == 1 else tuple(made)

    def _empty(self, output: Output, given: Given, sizes: Sizes, like: Tensor) -> Tensor:
        dtype = _dtype_of(output.dtype, given, like)
        shape = (0,) if _is_absent(output, given) else tuple(sizes[axis] for axis in output.axes)
        return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)

    # ----------------------------------------------------------------------------------------------------- DTensors

    def rules(self, given: Given) -> list[Rule]:
        """How a call may be placed on an axis of a mesh, of arguments with ``placements``: replicated, or along one of ``shards``.

        Only axes count that some input comes sharded along. What comes sharded along another is gathered, as by torch's norms, and
        not sharded anew along an axis of torch's choice.
        """
        from torch.distributed.tensor import Partial, Replicate, Shard

        inputs = [i for i in self.inputs if given[i.name] is not None]
        found = {i.axes[p.dim] for i in inputs for p in given[i.name].placements if isinstance(p, Shard)}

        def along(axis: str) -> Rule:
            def placed(axes: str, otherwise: Any) -> Any:
                return Shard(axes.index(axis)) if axis in axes else otherwise

            made = [Replicate() if _is_absent(o, given) else placed(o.axes, Partial()) for o in self.outputs]
            return made, [placed(i.axes, Replicate()) for i in inputs]

        replicated = [Replicate()] * len(self.outputs), [Replicate()] * len(inputs)
        return [replicated, *[along(axis) for axis in self.shards if axis in found]]

    # ----------------------------------------------------------------------------------------------------- backward

    @cached_property
    def backward(self) -> Declaration:
        """The declaration of the backward op."""
        assert self.gradient is not None
        g = self.gradient
        gradients = [Input(f"d{o.name}", o.axes, self.returned > 1) for o in self.outputs if not o.kept]
        axes = {i.name: i.axes for i in self.inputs} | {o.name: o.axes for o in self.outputs}
        gives = g.gives.split() or [i.name for i in self.inputs if not i.integer]
        integers = {i.name for i in self.inputs if i.integer}
        read = [Input(name, axes[name], True, name in integers) for name in self.reads]
        options = [option for option in self.options if option.name in self.gradient_options]
        return Declaration(
            f"{self.name}_backward",
            (*gradients, *read),
            (*options, Option("wanted", "int[]")),
            tuple(Output(f"d{name}", axes[name], f"wanted:{at}", False) for at, name in enumerate(gives)),
            sizes=self.sizes,
            row=self.row,
            shards=self.shards,
            flops=g.flops,
            is_backward=True,
        )

    def saved(self, needed: Sequence[bool]) -> tuple[str, ...]:
        """The names of what backward saves where these inputs need gradients: of ``reads``, what some wanted gradient needs."""
        assert self.gradient is not None
        wanted = {i.name for i, need in zip(self.inputs, needed) if need}
        needs = {
            name for gradients, names in self.gradient.needs.items() if wanted & set(gradients.split()) for name in names.split()
        }
        return tuple(name for name in self.reads if name in needs)


def _is_absent(output: Output, given: Given) -> bool:
    """Whether the output is not kept, or is a gradient that is not wanted."""
    if output.kept:
        return not given["keep"]
    return output.dtype.startswith("wanted:") and _wanted(output.dtype, given) is None


def _wanted(source: str, given: Given) -> torch.dtype | None:
    return _DTYPES[given["wanted"][int(source.removeprefix("wanted:"))]]


def _dtype_of(source: str, given: Given, like: Tensor) -> torch.dtype | None:
    """The dtype that an output's declaration names; None for a gradient that is not wanted."""
    if source == "wide":
        return accumulator(like)
    if source.startswith("wanted:"):
        return _wanted(source, given)
    value = given[source]
    return value.dtype if isinstance(value, Tensor) else value
