"""What a visitor of the repository meets: workflows, templates, metadata. They are checked here by what can be."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

import ditkernels
from tools.tree import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(file for file in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if file.name != "config.yml")
PERMISSIVE = re.compile(r"BSD|MIT|Apache|MPL|PSF|HPND|ISC|Zlib|CC0", re.IGNORECASE)


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def pinned() -> dict[str, str]:
    """The versions of requirements/dev.txt."""
    lines = (ROOT / "requirements/dev.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def passes(*command: str) -> None:
    done = subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_files_of_github_are_as_their_schemas_say() -> None:
    check = ("check-jsonschema", "--builtin-schema")
    passes(*check, "vendor.github-workflows", *map(str, WORKFLOWS))
    passes(*check, "vendor.github-issue-forms", *map(str, FORMS))
    passes(*check, "vendor.github-issue-config", str(GITHUB / "ISSUE_TEMPLATE/config.yml"))


def test_the_workflows_give_nothing_away() -> None:
    passes("zizmor", "--offline", "--config", str(GITHUB / "zizmor.yml"), *map(str, WORKFLOWS))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_runs_is_there(workflow: Path) -> None:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {target for line in lines for target in re.findall(r"\bmake (\w+)", line)} <= targets
    paths = {path for line in lines for path in re.findall(r"\b(?:tests|requirements|tools)/[\w./]+", line)}
    assert not [path for path in paths if not (ROOT / path).exists()]
    assert not [line for line in lines if "http" in line or "index-url" in line]


def test_the_stacks_of_the_workflow_are_those_of_the_requirements() -> None:
    suite = yaml.safe_load((GITHUB / "workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]["suite"]
    stacks = {row["torch"] for row in suite["strategy"]["matrix"]["include"]}
    assert stacks == {file.stem.removeprefix("torch-") for file in (ROOT / "requirements").glob("torch-*.txt")}


def test_the_version_stands_in_one_place_and_the_others_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == ditkernels.__version__
    assert citation["license"] == project()["license"]
    assert f"\n## {ditkernels.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_address_stands_in_one_place() -> None:
    address = project()["urls"]["Repository"].removeprefix("https://")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    texts = [file for file in files if file.endswith((".md", ".py", ".yml", ".yaml", ".cff", ".toml", ".cfg", ".txt"))]
    found = [file for file in texts if address in (ROOT / file).read_text(encoding="utf-8", errors="ignore")]
    assert found in ([], ["pyproject.toml"])  # a copy of the tree without its history lists nothing


def test_hooks_run_the_versions_of_the_suite() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    versions = {hook["id"].partition("-")[0]: repository["rev"] for repository in hooks for hook in repository["hooks"]}
    assert versions == {"ruff": f"v{pinned()['ruff']}", "clang": f"v{pinned()['clang-format']}"}


def test_every_dependency_has_a_lower_bound_and_a_permissive_licence() -> None:
    for requirement in project()["dependencies"]:
        name, bound = re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement).groups()  # type: ignore[union-attr]
        about = metadata.metadata(name)
        told = [about.get("License-Expression") or about.get("License") or "", *(about.get_all("Classifier") or ())]
        assert PERMISSIVE.search(" ".join(text for text in told if "License" in text or text in told[:1])), name
        assert bound


def test_neither_import_nor_use_asks_the_network() -> None:
    program = (
        "import socket\n"
        "def refused(*args): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refused\n"
        "import torch, ditkernels\n"
        "model = ditkernels.DiT(input_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3)\n"
        "diffusion = ditkernels.create_diffusion('')\n"
        "t = torch.tensor([1, 2])\n"
        "diffusion.training_losses(model, torch.randn(2, 1, 4, 4), t, {'y': t})['loss'].mean().backward()\n"
        "ditkernels.sample(model.eval(), [0, 1], steps=2, vae='none')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert "the network was asked" not in done.stderr
    assert done.returncode == 0, done.stderr
