"""Build script; the metadata is in pyproject.toml.

Where there is nvcc and torch can be imported, so under pip install --no-build-isolation, the CUDA library is built:
csrc/cuda -> ditkernels/_C.so. Otherwise the install is pure Python and `ditkernels info` says why. Settings:

    DITKERNELS_BUILD_CUDA=1    it is an error if the library cannot be built;  0: it is not built
    TORCH_CUDA_ARCH_LIST       architectures, as in "8.0;9.0a;10.0+PTX"
    CUDA_HOME                  the toolkit;  MAX_JOBS: compilers at a time
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SWITCH = "DITKERNELS_BUILD_CUDA"
RECORD = "_cuda_build.json"
NO_BUILD = f"{SWITCH}=0 installs without the CUDA library"


def build_rules() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "tools/build_native.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rules = build_rules()


def why_not() -> str | None:
    """Why the CUDA library is not built, or None if it is.

    Raises:
        RuntimeError: it was asked for and cannot be, or the switch is neither 0 nor 1.
    """
    asked = os.environ.get(SWITCH, "")
    if asked not in ("", "0", "1"):
        raise RuntimeError(f"{SWITCH}: got {asked!r}, allowed are 0 and 1")
    if asked == "0":
        return f"{SWITCH}=0 was set at installation"
    reason = missing()
    if reason and asked == "1":
        raise RuntimeError(f"{SWITCH}=1, but {reason}; {NO_BUILD}")
    return reason


def missing() -> str | None:
    """What the build lacks here, or None."""
    if rules.find_nvcc() is None:
        return "no nvcc was found at installation (looked in CUDA_HOME, the PATH and /usr/local/cuda)"
    try:
        import torch
    except ImportError as error:
        return f"torch could not be imported at installation ({error}); pip hides it without --no-build-isolation"
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < rules.OLDEST_TORCH:
        return f"torch {torch.__version__} was found at installation, the library needs 2.10"
    return None


class BuildPython(build_py):
    """Notes beside the modules why there is no library, for `ditkernels info`."""

    def run(self) -> None:
        super().run()
        package = ROOT / "ditkernels" if self.editable_mode else Path(self.build_lib) / "ditkernels"
        package.mkdir(parents=True, exist_ok=True)
        (package / RECORD).write_text(json.dumps({"absent": REASON}) + "\n")
        if REASON is not None:
            (package / rules.LIBRARY).unlink(missing_ok=True)


class BuildLibrary(build_ext):
    """Compiles csrc/cuda; the library fits every Python, so its name carries no ABI."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        import torch

        try:
            targets = rules.architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"))
            tools = rules.Toolchain(rules.find_nvcc(), Path(torch.__file__).parent)
            built = rules.build_library(Path(self.build_temp).resolve() / "csrc", tools, targets)
        except rules.BuildError as error:
            raise RuntimeError(f"the CUDA library cannot be built: {error}; {NO_BUILD}") from error
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)


class BuildWheel(bdist_wheel):
    """One wheel for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform


REASON = why_not()
options: dict[str, Any] = {"cmdclass": {"build_py": BuildPython}}
if REASON is None:
    extension = Extension("ditkernels._C", [str(p.relative_to(ROOT)) for p in rules.sources()])
    options["ext_modules"] = [extension]
    options["cmdclass"] |= {"build_ext": BuildLibrary, "bdist_wheel": BuildWheel}
setup(**options)
