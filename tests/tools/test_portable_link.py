"""A library that older systems load: linked against a glibc that is named, with the C++ runtime inside and nothing to be seen."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tools import build_native

COMPILER = build_native.find_cxx()
needs_cxx = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
PACKAGE = Path(torch.__file__).parent

# It throws and catches, keeps references, and calls what glibc 2.29 has anew.
SOURCE = """
#include <cmath>
#include <memory>
#include <sstream>
#include <stdexcept>
extern "C" __attribute__((visibility("default"))) double ditkernels_tried(double x) {
  auto shared = std::make_shared<std::ostringstream>();
  *shared << x;
  try {
    if (shared->str() == "2") throw std::runtime_error("two");
  } catch (const std::exception& error) {
    return std::pow(x, 10.0);
  }
  return 0;
}
"""


def objects(folder: Path) -> list[Path]:
    assert COMPILER is not None
    (folder / "a.cpp").write_text(SOURCE, encoding="utf-8")
    subprocess.run([COMPILER, "-O2", "-fPIC", "-c", str(folder / "a.cpp"), "-o", str(folder / "a.o")], check=True)
    return [folder / "a.o"]


@needs_cxx
def test_without_zig_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build_native.BuildError, match=r"DITKERNELS_GLIBC=2.28 links by Zig: pip install ziglang"):
        build_native.link_portably(tmp_path / "a.so", "2.28", str(COMPILER), objects(tmp_path), [], PACKAGE)


@pytest.mark.slow
@needs_cxx
def test_a_library_asks_for_no_newer_glibc_and_shows_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    assert shutil.which("objdump"), "needs objdump"
    library = tmp_path / "a.so"
    build_native.link_portably(library, "2.28", str(COMPILER), objects(tmp_path), [], PACKAGE)
    listed = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    versions = {tuple(map(int, found.split("."))) for found in re.findall(r"GLIBC_([\d.]+)", listed)}
    assert max(versions) <= (2, 28)
    assert "GLIBCXX" not in listed
    assert not [line for line in listed.splitlines() if re.match(r"[0-9a-f]{16}", line) and "*UND*" not in line]


@pytest.mark.slow
@needs_cxx
def test_it_throws_and_catches_beside_torchs_own_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ziglang")
    # One name is left to be seen, to be called.
    write = Path.write_text

    def with_one_name(path: Path, text: str, **options: str) -> int:
        return write(path, text.replace("local: *", "global: ditkernels_tried; local: *"), **options)

    monkeypatch.setattr(Path, "write_text", with_one_name)
    library = tmp_path / "a.so"
    build_native.link_portably(library, "2.28", str(COMPILER), objects(tmp_path), [], PACKAGE)
    tried = ctypes.CDLL(str(library), mode=os.RTLD_NOW).ditkernels_tried
    tried.restype, tried.argtypes = ctypes.c_double, [ctypes.c_double]
    assert (tried(2.0), tried(3.0)) == (1024.0, 0.0)
