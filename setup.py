"""Build script; the metadata is in pyproject.toml.

Where torch can be imported, so under pip install --no-build-isolation, the compiled libraries are built: csrc/cuda ->
ditkernels/_C.so if there is nvcc, csrc/cpu -> ditkernels/_cpu.so if there is a C++ compiler. Without them the install is pure
Python, and `ditkernels info` says why. Settings:

    DITKERNELS_BUILD_CUDA=1    it is an error if the CUDA library cannot be built;  0: it is not built
    DITKERNELS_BUILD_CPU       the same for the CPU library
    TORCH_CUDA_ARCH_LIST       architectures, as in "8.0;9.0a;10.0+PTX"
    CUDA_HOME                  the toolkit;  CXX: the C++ compiler;  MAX_JOBS: compilers at a time
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def build_rules() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "tools/build_native.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rules = build_rules()


class Library(NamedTuple):
    """A library that an install may hold.

    Attributes:
        kind: "CUDA" or "CPU".
        file: its name in the package.
        sources: what it is made of.
        compiler: finds the compiler, or None.
        lacking: the sentence that says that there is none.
        build: (folder, compiler, folder of torch) -> the built library.
    """

    kind: str
    file: str
    sources: tuple[Path, ...]
    compiler: Callable[[], str | None]
    lacking: str
    build: Callable[[Path, str, Path], Path]

    @property
    def switch(self) -> str:
        return f"DITKERNELS_BUILD_{self.kind}"

    @property
    def no_build(self) -> str:
        return f"{self.switch}=0 installs without the {self.kind} library"

    def why_not(self) -> str | None:
        """Why the library is not built, or None if it is.

        Raises:
            RuntimeError: it was asked for and cannot be, or the switch is neither 0 nor 1.
        """
        asked = os.environ.get(self.switch, "")
        if asked not in ("", "0", "1"):
            raise RuntimeError(f"{self.switch}: got {asked!r}, allowed are 0 and 1")
        if asked == "0":
            return f"{self.switch}=0 was set at installation"
        reason = self.lacking if self.compiler() is None else torch_missing()
        if reason and asked == "1":
            raise RuntimeError(f"{self.switch}=1, but {reason}; {self.no_build}")
        return reason

    def record(self, package: Path, reason: str | None) -> None:
        """Notes beside the modules why there is no library, for `ditkernels info`."""
        package.mkdir(parents=True, exist_ok=True)
        (package / f"_{self.kind.lower()}_build.json").write_text(json.dumps({"absent": reason}) + "\n")


def torch_missing() -> str | None:
    """Why torch cannot be built against, or None."""
    try:
        import torch
    except ImportError as error:
        return f"torch could not be imported at installation ({error}); pip hides it without --no-build-isolation"
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < rules.OLDEST_TORCH:
        return f"torch {torch.__version__} was found at installation, the library needs 2.10"
    return None


def build_cuda(out: Path, nvcc: str, torch: Path) -> Path:
    targets = rules.architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"))
    built: Path = rules.build_library(out, rules.Toolchain(nvcc, torch), targets)
    return built


CUDA = Library(
    "CUDA",
    rules.LIBRARY,
    tuple(rules.sources()),
    rules.find_nvcc,
    "no nvcc was found at installation (looked in CUDA_HOME, the PATH and /usr/local/cuda)",
    build_cuda,
)
CPU = Library(
    "CPU",
    rules.CPU_LIBRARY,
    tuple(rules.cpu_sources()),
    rules.find_cxx,
    "no C++ compiler was found at installation (looked for CXX, c++, g++ and clang++ on the PATH)",
    rules.build_cpu_library,
)
REASONS = {library: library.why_not() for library in (CUDA, CPU)}


class BuildPython(build_py):
    """Notes beside the modules which libraries there are."""

    def run(self) -> None:
        super().run()
        package = ROOT / "ditkernels" if self.editable_mode else Path(self.build_lib) / "ditkernels"
        for library, reason in REASONS.items():
            library.record(package, reason)
            if reason is not None and not self.editable_mode:  # one that an earlier build left
                (package / library.file).unlink(missing_ok=True)


class NativeExtension(Extension):
    """A library as setuptools sees it."""

    def __init__(self, library: Library) -> None:
        super().__init__(f"ditkernels.{Path(library.file).stem}", [str(p.relative_to(ROOT)) for p in library.sources])
        self.library = library


class BuildLibraries(build_ext):
    """Compiles the libraries; each fits every Python, so its name carries no ABI."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: NativeExtension) -> None:
        import torch

        library = ext.library
        target = Path(self.get_ext_fullpath(ext.name))
        out = Path(self.build_temp).resolve() / library.kind
        try:
            built = library.build(out, library.compiler(), Path(torch.__file__).parent)
        except rules.BuildError as error:
            if library is CUDA or os.environ.get(library.switch) == "1":
                raise RuntimeError(f"the {library.kind} library cannot be built: {error}; {library.no_build}") from error
            reason = f"{library.compiler()} failed at installation; CXX names another compiler, {library.switch}=1 shows its errors"
            print(f"the {library.kind} library is left out: {reason}\n{error}", file=sys.stderr)
            library.record(target.parent, reason)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)

    def get_outputs(self) -> list[str]:
        return [output for output in super().get_outputs() if Path(output).exists()]

    def copy_extensions_to_source(self) -> None:
        self.extensions = [ext for ext in self.extensions if Path(self.get_ext_fullpath(ext.name)).exists()]
        super().copy_extensions_to_source()


class BuildWheel(bdist_wheel):
    """One wheel for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform


options: dict[str, Any] = {"cmdclass": {"build_py": BuildPython}}
extensions = [NativeExtension(library) for library, reason in REASONS.items() if reason is None]
if extensions:
    options["ext_modules"] = extensions
    options["cmdclass"] |= {"build_ext": BuildLibraries, "bdist_wheel": BuildWheel}
setup(**options)
