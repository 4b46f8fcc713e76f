"""Writes the ops as a kernel of the Hugging Face hub: python -m tools.hub_kernel FOLDER

A universal kernel has no binary: ``build/torch-cuda``, ``build/torch-rocm`` and ``build/torch-cpu`` hold the same Python, the ops
and their reference from this tree. Three things differ from the package. Imports are relative, since a kernel is loaded under a
name of its own. Ops are declared under that name, so that a kernel and the package live in one process, as do two versions of
the kernel. And the package's other rooms are not there. ``tools/hub`` holds the layers and the page of the repository.

metadata.json is as the package ``kernels`` 0.17 reads it (github.com/huggingface/kernels): identity, dependencies, backend, and the
SHA-256 of every file beside it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ditkernels._version import __version__
from tools.tree import ROOT

PACKAGE = ROOT / "ditkernels"
HUB = ROOT / "tools/hub"
BACKENDS = ("cuda", "rocm", "cpu")
# Of the kernel, which counts what its users must change for.
VERSION = 1
INIT = '''"""Fused ops for Diffusion Transformers; ``ops`` holds them, ``layers`` what takes the place of diffusers' layers."""

from . import layers, ops
from .ops import _native

_native.CPU.told = True  # on a CPU this kernel has plain PyTorch alone, and says so on its page

__all__ = ["layers", "ops"]
'''


def sources() -> Iterator[tuple[str, str]]:
    """Every file of the kernel before it is moved: its path inside, and its text."""
    files = [*(PACKAGE / "ops").rglob("*.py"), PACKAGE / "ops/schemas.txt", PACKAGE / "reference.py", PACKAGE / "_version.py"]
    for file in sorted(files):
        yield file.relative_to(PACKAGE).as_posix(), file.read_text(encoding="utf-8")
    yield "layers.py", (HUB / "layers.py").read_text(encoding="utf-8")
    yield "__init__.py", INIT


def moved(path: str, text: str, name: str) -> str:
    """The text of a file where the package is called ``name``: imports relative, ops under that name."""
    if not path.endswith(".py"):
        return text
    here = "." * (path.count("/") + 1)

    def relative(found: re.Match[str]) -> str:
        return f"{found[1]}from {here}{found[2].removeprefix('.')} import"

    text = re.sub(r"^(\s*)from ditkernels(\.[\w.]+|) import", relative, text, flags=re.MULTILINE)
    text = re.sub(r"\btorch\.ops\.ditkernels\b", f"torch.ops.{name}", text)
    text = re.sub(r"(?<=[\"'])ditkernels(?=::)", name, text)
    return text.replace('Library("ditkernels", ', f'Library("{name}", ')


def name_of(backend: str, files: dict[str, str]) -> str:
    """An identity that no other content has: it is a module's name and a namespace of ops."""
    digest = hashlib.sha256(json.dumps([backend, sorted(files.items())]).encode()).hexdigest()
    return f"_ditkernels_{backend}_{digest[:12]}"


def write(folder: Path) -> None:
    """Writes the repository; what was in ``folder/build`` is replaced."""
    shutil.rmtree(folder / "build", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HUB / "README.md", folder / "README.md")
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    files = dict(sources())
    for backend in BACKENDS:
        name = name_of(backend, files)
        contents = {path: moved(path, text, name).encode() for path, text in files.items()}
        digests = {path: base64.b64encode(hashlib.sha256(content).digest()).decode() for path, content in contents.items()}
        metadata = {
            "id": name,
            "name": "ditkernels",
            "version": VERSION,
            "license": "Apache-2.0",
            "upstream-version": __version__,
            "python-depends": [],
            "kernels-minver": "0.17.0",
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests},
        }
        contents["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()
        for path, content in contents.items():
            file = folder / "build" / f"torch-{backend}" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the repository is written")
    write(parser.parse_args().folder)
