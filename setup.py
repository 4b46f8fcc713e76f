"""Build script; the metadata is in pyproject.toml.

Where torch can be imported, so under pip install --no-build-isolation, the compiled libraries are built: csrc/cuda ->
ditkernels/_C.so if there is nvcc, csrc/cpu -> ditkernels/_cpu.so if there is a C++ compiler. Without them the install is pure
Python, and `ditkernels info` says why. Settings:

    DITKERNELS_BUILD_CUDA=1    it is an error if the CUDA library cannot be built;  0: it is not built
    DITKERNELS_BUILD_CPU       the same for the CPU library
    TORCH_CUDA_ARCH_LIST       architectures, as in "8.0;9.0a;10.0+PTX", "Hopper" or "native"
    DITKERNELS_GLIBC=2.28      links against that glibc by Zig (pip install ziglang), so that older systems load the libraries too
    CUDA_HOME                  the toolkit;  CXX: the C++ compiler, for nvcc too;  MAX_JOBS: compilers at a time
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

import setuptools

# Before anything that an old one has not: the licence in pyproject.toml is written as setuptools 77 learnt it.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"setuptools {setuptools.__version__} was found, ditkernels needs 77: pip install 'setuptools>=77', "
        "or leave out --no-build-isolation"
    )

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
        lacking: gives the sentence that says that there is none.
    """

    kind: str
    file: str
    sources: tuple[Path, ...]
    compiler: Callable[[], str | None]
    lacking: Callable[[], str]

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
        reason = self.lacking() if self.compiler() is None else torch_missing()
        if reason and asked == "1":
            raise RuntimeError(f"{self.switch}=1, but {reason}; {self.no_build}")
        return reason and f"at installation {reason}"

    def leave_out(self, package: Path, reason: str) -> None:
        """Notes beside the modules why there is no library, for `ditkernels info`, and removes one that an earlier build left."""
        package.mkdir(parents=True, exist_ok=True)
        (package / self.file).unlink(missing_ok=True)
        rules.record_of(package / self.file, self.kind).write_text(json.dumps({"absent": reason}) + "\n", encoding="utf-8")

    def leave_alone(self, package: Path, reason: str) -> None:
        """In a tree that is used as it lies: a library that was built there stays, with its record."""
        if (package / self.file).exists():
            print(f"{package / self.file} stays as it is: no other is built, since {reason}", file=sys.stderr)
        else:
            self.leave_out(package, reason)


def torch_missing() -> str | None:
    """Why torch cannot be built against, or None."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a library that torch needs may be broken or missing
        return f"torch could not be imported ({error}); pip hides it without --no-build-isolation"
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < rules.OLDEST_TORCH:
        return f"torch {torch.__version__} was found, the library needs 2.10"
    return None


CUDA = Library("CUDA", rules.LIBRARY, tuple(rules.sources()), rules.find_nvcc, rules.nvcc_lacking)
CPU = Library("CPU", rules.CPU_LIBRARY, tuple(rules.cpu_sources()), rules.find_cxx, rules.cxx_lacking)
REASONS = {library: library.why_not() for library in (CUDA, CPU)}


class BuildPython(build_py):
    """Notes beside the modules why a library is missing."""

    def run(self) -> None:
        package = ROOT / "ditkernels" if self.editable_mode else Path(self.build_lib) / "ditkernels"
        if not self.editable_mode:  # a module that was deleted since the last build must not come along
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        for library, reason in REASONS.items():
            if reason is not None:
                (library.leave_alone if self.editable_mode else library.leave_out)(package, reason)


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
            rules.install(rules.build(library.kind, out, Path(torch.__file__).parent), target, library.kind)
        except rules.BuildError as error:
            if library is CUDA or os.environ.get(library.switch) == "1":
                raise RuntimeError(f"the {library.kind} library cannot be built: {error}; {library.no_build}") from error
            reason = f"at installation {library.compiler()} failed; CXX names another compiler, {library.switch}=1 shows its errors"
            print(f"the {library.kind} library is left out: {reason}\n{error}", file=sys.stderr)
            library.leave_out(target.parent, reason)

    def get_outputs(self) -> list[str]:
        made = [Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions]
        both = [file for path, ext in zip(made, self.extensions) for file in (path, rules.record_of(path, ext.library.kind))]
        return [str(file) for file in both if file.exists()]

    def copy_extensions_to_source(self) -> None:
        """Puts what was built into the tree; a library that could not be built leaves an older one there."""
        for ext in self.extensions:
            # Not get_ext_fullpath, which names the tree by now.
            built, target = Path(self.build_lib) / self.get_ext_filename(ext.name), ROOT / "ditkernels" / ext.library.file
            if built.exists():
                rules.install(built, target, ext.library.kind)
            elif not target.exists():
                shutil.copyfile(*(rules.record_of(path, ext.library.kind) for path in (built, target)))


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
