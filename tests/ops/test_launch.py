"""Our launcher of Triton kernels against Triton's own, on a driver that launches nothing."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from ditkernels.ops import _launch
from ditkernels.ops._launch import launch
from ditkernels.ops._triton import Tile

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import jit  # noqa: E402

from tools.kernel_proof import stub_driver  # noqa: E402
from tools.kernel_proof.stub_driver import Driver  # noqa: E402

CPU = torch.device("cpu")
MI300 = GPUTarget("hip", "gfx942", 64)
TILE = Tile(1, 4)


@triton.jit
def small(x, n, WIDTH: tl.constexpr, FLAG: tl.constexpr = False):  # type: ignore[no-untyped-def]
    if n is not None:
        tl.store(x + tl.arange(0, WIDTH), 1)


@triton.jit
def large(  # type: ignore[no-untyped-def]
    a, b, c, d, e, f, g, h, n, s0, s1, s2, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr
):
    tl.store(a + tl.arange(0, WIDTH), eps)


@pytest.fixture
def driver() -> Iterator[Driver]:
    with stub_driver.installed() as stub:
        yield stub


def run(*args: Any, programs: int = 3, tile: Tile = TILE, kernel: Any = small, **constants: Any) -> None:
    launch(kernel, programs, tile, CPU, args, constants or {"WIDTH": 16})


# ---- The key ---------------------------------------------------------------------------------------------------------


class Found(Exception):
    """Triton's key, thrown before it compiles."""


def key_of_triton(stub: Driver, tile: Tile, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    real = jit.compute_cache_key

    def found(*inner: Any) -> None:
        raise Found(real(*inner))

    with mock.patch.object(jit, "compute_cache_key", found), pytest.raises(Found) as raised:
        small[(1,)](*args, **constants, **_launch._options(tile))
    return stub.device, raised.value.args[0]


def both_keys(stub: Driver, *args: Any, tile: Tile = TILE, constants: dict[str, Any] | None = None) -> tuple[Any, Any]:
    constants = constants or {"WIDTH": 16}
    ours = _launch._key(small, tile, stub, stub.device, args, constants)
    return ours, key_of_triton(stub, tile, args, constants)


def classes(pairs: list[tuple[Any, Any]]) -> int:
    """How many keys there are, if ours and Triton's tell the same launches apart."""
    ours, theirs = ({pair[i] for pair in pairs} for i in (0, 1))
    together = set(pairs)
    assert len(together) == len(theirs), "one launch to Triton is several to us, or the other way round"
    assert len(together) == len(ours), "our key is coarser than Triton's"
    return len(together)


def tensors() -> list[torch.Tensor]:
    """Of every dtype, each at three addresses divisible by 16 and at three that are not."""
    found = []
    for dtype in (
        *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    ):
        storage = torch.zeros(65, dtype=dtype)
        assert storage.data_ptr() % 16 == 0
        found += [storage[begin:] for begin in (0, 16, 32, 1, 17, 3)]
    return found


EDGES = (0, 2**31, 2**32, 2**63, -(2**31), -(2**63))
INTS = (
    *(1, 2, 3, 15, 16, 17, 48, 1152, -1, -2, -16, 2**40, 2**40 + 1, -(2**40), -(2**40) - 1, 2**64 - 1),
    *(edge + near for edge in EDGES for near in (-16, -1, 0, 1, 16) if -(2**63) <= edge + near < 2**64),
)
NUMBERS = (*INTS, True, False, 0.0, 1.0, 16.0, 1e-6, None)


def test_the_key_tells_the_same_arguments_apart_as_triton(driver: Driver) -> None:
    values = (*tensors(), *NUMBERS)
    few = (*tensors()[:6], 1, 3, 16, 17, 2**31, 2**40 + 1, True, 1.0, None)
    pairs = [both_keys(driver, *args) for args in itertools.product(values, few)]
    # By value: 10 dtypes aligned or not; 1; i32, i64 and u64, divisible by 16 or not; bool, float, None.
    assert classes(pairs) == (20 + 1 + 6 + 3) * (2 + 1 + 4 + 3)


def test_the_key_tells_tiles_constants_devices_and_settings_apart_as_triton(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(16)
    pairs = []
    settings = (16, True), (1, 2, 4, 8), (1, 2), (None, 64, 128), (2000, 2001), (False, True), ("", "fpsan")
    for width, warps, stages, registers, device, debug, mode in itertools.product(*settings):
        driver.device = device
        monkeypatch.setattr(knobs.runtime, "debug", debug)
        monkeypatch.setattr(knobs.compilation, "instrumentation_mode", mode)
        tile = Tile(1, warps, stages, registers)
        pairs.append(both_keys(driver, x, 3, tile=tile, constants={"WIDTH": width}))
    assert classes(pairs) == len(pairs) == 2 * 4 * 2 * 3 * 2 * 2 * 2


def test_the_key_is_finer_for_parameters_rows_and_the_order_of_constants_alone(driver: Driver) -> None:
    x, swapped = torch.zeros(16), torch.nn.Parameter(torch.zeros(16))
    plain = both_keys(driver, x, 3)
    for other in (both_keys(driver, swapped, 3), both_keys(driver, x, 3, tile=Tile(2, 4))):
        assert other[0] != plain[0]
        assert other[1] == plain[1]
    forward, backward = {"WIDTH": 16, "FLAG": True}, {"FLAG": True, "WIDTH": 16}
    one, two = (both_keys(driver, x, 3, constants=constants) for constants in (forward, backward))
    assert one[0] != two[0]
    assert one[1] == two[1]


def test_two_constants_that_change_places_are_others(driver: Driver) -> None:
    exchanged = ({"WIDTH": 16, "FLAG": 8}, {"FLAG": 16, "WIDTH": 8})
    assert classes([both_keys(driver, 3, 3, constants=constants) for constants in exchanged]) == 2


def test_two_drivers_and_two_kernels_have_two_keys(driver: Driver) -> None:
    def key(kernel: Any, stub: Driver) -> Any:
        return _launch._key(kernel, TILE, stub, 0, (), {})

    assert len({key(small, driver), key(large, driver), key(small, Driver(driver.target))}) == 3


def test_on_rocm_the_key_holds_whether_a_storage_is_below_2_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(_launch, "_readers", {})
    storages = [torch.empty(size, dtype=torch.uint8) for size in (64, 2**31 - 1, 2**31)]  # never touched
    pieces = [storage[begin : begin + 16] for storage in storages for begin in (0, 1)]
    with stub_driver.installed(MI300) as stub:
        assert classes([both_keys(stub, piece, 3) for piece in pieces]) == 4


@pytest.mark.parametrize("argument", [(1, 2), "x", torch.float32])
def test_an_argument_that_a_kernel_cannot_take_is_refused(driver: Driver, argument: Any) -> None:
    with pytest.raises(TypeError, match="tensors, numbers and None, got " + type(argument).__name__):
        run(torch.zeros(16), argument)


def test_only_constants_are_given_by_name(driver: Driver) -> None:
    with pytest.raises(AssertionError, match="small takes all but its constants by position"):
        run(torch.zeros(16), n=3, WIDTH=16)


# ---- The launch ------------------------------------------------------------------------------------------------------


def test_a_direct_launch_passes_what_triton_passes(driver: Driver) -> None:
    x = torch.zeros(16)
    flagged = {"FLAG": True, "WIDTH": 16}
    for args, constants in (((x, 3), {"WIDTH": 16}), ((x, None), {"WIDTH": 16}), ((x, 3), flagged)):
        small[(5,)](*args, **constants, **TILE.options)
        of_triton = driver.last
        for _ in range(2):
            run(*args, programs=5, **constants)
            assert driver.last[:6] == of_triton[:6]
            assert all(ours is theirs for ours, theirs in zip(driver.last[6:], of_triton[6:], strict=True))


def test_a_direct_launch_goes_around_triton_and_to_the_current_stream(driver: Driver) -> None:
    run(torch.zeros(16), 3)
    with mock.patch.object(jit.JITFunction, "run", side_effect=AssertionError("the slow way")):
        for stream in (7, 8):
            driver.stream = stream
            run(torch.zeros(16), 5)
            assert driver.last[3] == stream
    assert driver.launches == 3


def test_a_changed_constant_or_option_compiles_another_kernel(driver: Driver) -> None:
    x = torch.zeros(16)
    kinds: list[dict[str, Any]] = [
        {},
        {"WIDTH": 8},
        {"tile": Tile(1, 2)},
        {"tile": Tile(1, 4, 2)},
        {"tile": Tile(1, 4, 1, 64)},
    ]
    functions = []
    for _ in range(2):
        for kind in kinds:
            run(x, 3, **kind)
            functions.append(driver.last[4])
    assert len(driver.utils.loaded) == len(set(functions)) == len(kinds)
    assert functions[: len(kinds)] == functions[len(kinds) :]


def test_zero_programs_launch_nothing(driver: Driver) -> None:
    run(torch.zeros(16), 3, programs=0)
    assert driver.launches == 0
    assert not driver.utils.loaded
    run(torch.zeros(16), 3)
    run(torch.zeros(16), 3, programs=0)
    assert driver.launches == 1


def test_the_launch_hooks_of_a_profiler_are_called_while_they_are_set(driver: Driver) -> None:
    calls: list[str] = []

    def enter(metadata: Any) -> None:
        calls.append("enter " + metadata.get()["name"])

    def leave(metadata: Any) -> None:
        calls.append("exit " + metadata.get()["name"])

    runtime = knobs.runtime
    for chain, hook in ((runtime.launch_enter_hook, enter), (runtime.launch_exit_hook, leave)):
        run(torch.zeros(16), 3)
        calls.clear()
        chain.add(hook)
        try:
            run(torch.zeros(16), 3)
        finally:
            chain.remove(hook)
        run(torch.zeros(16), 3)
        assert calls == ["enter small" if hook is enter else "exit small"]
    with mock.patch.object(runtime, "launch_enter_hook", enter):  # set, not added
        run(torch.zeros(16), 3)
    assert calls[-1] == "enter small"
    with mock.patch.object(runtime, "launch_enter_hook", None):
        run(torch.zeros(16), 3)


def test_the_other_hooks_of_triton_are_called(driver: Driver) -> None:
    seen: list[str] = []
    run(torch.zeros(16), 3)
    with mock.patch.object(small, "pre_run_hooks", [lambda *args, **options: seen.append("before a run")]):
        run(torch.zeros(16), 3)
    assert seen == ["before a run"]
    vetoes = mock.Mock(return_value=True)
    with mock.patch.object(knobs.runtime, "jit_cache_hook", vetoes):
        for _ in range(2):
            run(torch.zeros(16), 16)
    assert vetoes.call_count == 2
    assert driver.launches == 2
    run(torch.zeros(16), 16)
    assert driver.launches == 3


def test_a_hook_into_the_compilers_stages_keeps_its_kernels_to_itself(driver: Driver) -> None:
    run(torch.zeros(16), 3)
    known = dict(_launch._known)
    with mock.patch.object(knobs.runtime, "add_stages_inspection_hook", mock.Mock()):
        assert _launch._watched(small)
    assert not _launch._watched(small)
    assert known == _launch._known


def test_a_tensor_of_another_device_runs_there(driver: Driver) -> None:
    seen = []
    driver.device = 100

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        before, driver.device = driver.device, device.index
        seen.append(device.index)
        yield
        driver.device = before

    def there(index: int) -> Any:
        launch(small, 1, TILE, torch.device("cuda", index), (torch.zeros(16), 3), {"WIDTH": 16})
        return driver.last[4]

    with mock.patch("torch.cuda.device", on):
        functions = [there(index) for index in (100, 101, 101, 100)]
    assert seen == [101, 101]
    assert driver.device == 100
    assert functions == [1, 2, 2, 1], "each device has its own copy of the code"


class Interpreted:
    """What stands for a kernel in the interpreter: it only takes the plain way."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *args, **options: self.got.append((grid, args, options))


def test_the_interpreter_keeps_its_own_way() -> None:
    kernel = Interpreted()
    run(3, programs=4, tile=Tile(1, 2, 3, 64), kernel=kernel)
    options = {"WIDTH": 16, "num_warps": 2, "num_stages": 3, "maxnreg": 64}
    assert kernel.got == [((4,), (3,), options)]


def test_rocm_is_not_told_of_maxnreg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    kernel = Interpreted()
    run(3, tile=Tile(1, 2, 3, 64), kernel=kernel)
    assert kernel.got[0][2] == {"WIDTH": 16, "num_warps": 2, "num_stages": 3}


# ---- What it costs ---------------------------------------------------------------------------------------------------


def paired(ours: Callable[[], None], theirs: Callable[[], Any], turns: int = 31, calls: int = 50) -> float:
    """The median of ours over theirs, timed in turns."""

    def seconds(call: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - begin

    return statistics.median(seconds(ours) / seconds(theirs) for _ in range(turns))


X = torch.zeros(16)
LAUNCHES = {
    "small": (small, (X, 3), {"WIDTH": 16}),
    "large": (
        large,
        (X, X, X, None, X, None, X, X, 1152, 64, 1152, 1, 1e-6),
        {"WIDTH": 16, "ROWS": 2, "RMS": False},
    ),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_costs_at_most_half_of_tritons_own(driver: Driver, name: str) -> None:
    kernel, args, constants = LAUNCHES[name]

    def ours() -> None:
        launch(kernel, 3, TILE, CPU, args, constants)

    def theirs() -> None:
        kernel[(3,)](*args, **constants, **TILE.options)

    ours(), theirs()
    ratios: list[float] = []
    while len(ratios) < 5 and min(ratios, default=1.0) > 0.5:
        ratios.append(paired(ours, theirs))
    assert min(ratios) <= 0.5, ratios
    print(f"{name}: {min(ratios):.2f}")
