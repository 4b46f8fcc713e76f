"""`ditkernels info`: tells what is here, which backend serves and why the others do not."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ditkernels
from ditkernels import cli
from ditkernels.diagnostics import info
from ditkernels.ops import _native, _triton, dispatch
from tests.helpers.native_cpu import SERVING

# The fixture below replaces it.
DRIVER_VERSION = info.driver_version


def shown(capsys, *flags):
    assert cli.main(["info", *flags]) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def no_driver(monkeypatch):
    monkeypatch.setattr(info, "driver_version", lambda: None)


def test_it_names_machine_versions_and_every_backend(capsys):
    text = shown(capsys, "--device", "cpu")
    assert f"torch {torch.__version__}" in text
    for name in (*dispatch.BACKENDS, *dispatch.ATTENTION_BACKENDS):
        assert f"{name}: " in text or f"-> {name}" in text


def test_every_op_is_listed_once(capsys):
    text = shown(capsys, "--device", "cpu").replace(",", " ")
    words = text[text.index("Ops ") : text.index("Attention ")].split()
    assert [words.count(name) for name in dispatch.OPS] == [1] * len(dispatch.OPS)


def test_without_a_gpu_what_serves_a_cpu_is_chosen_and_the_others_say_why_not(capsys):
    text = shown(capsys, "--device", "cpu")
    assert f"-> {SERVING}\n" in text
    assert "-> triton" not in text
    assert "cudnn: it needs a CUDA device, and the tensors are on cpu" in text
    assert "flash_attn_2: untested" in text


def test_a_backend_that_the_environment_forces_is_seen(capsys, monkeypatch):
    monkeypatch.setenv("DITKERNELS_ATTENTION_BACKEND", "plain")
    text = shown(capsys, "--device", "cpu")
    assert "DITKERNELS_ATTENTION_BACKEND=plain" in text
    assert "training -> plain" in text


def test_a_forced_backend_that_cannot_serve_is_seen(capsys, monkeypatch):
    monkeypatch.setenv("DITKERNELS_BACKEND", "cuda")
    monkeypatch.setenv("DITKERNELS_ATTENTION_BACKEND", "cudnn")
    text = shown(capsys, "--device", "cpu")
    assert f"-> {SERVING}" not in text
    assert f"{SERVING}: can serve" in text
    assert "sampling -> NONE: the backend that the environment asks for cannot serve" in text


TITLES = ["Machine", "Packages", "Environment", "Ops, bf16", "C++ kernels", "Attention, bf16"]


def raising(*args):
    raise AttributeError("this driver\nhas no such function")


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (info, "driver_version"),
        (info, "_version"),
        (_triton, "cache_reason"),
        (info, "recorded_calls"),
        (_native, "cpu_library"),
        (info, "choose"),
    ],
)
def test_a_section_that_fails_says_why_and_the_others_follow(capsys, monkeypatch, place, name):
    monkeypatch.setattr(place, name, raising)
    assert cli.main(["info", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if not line.startswith(" ")]
    assert all(title in line for line, title in zip(found, TITLES, strict=True)), found
    assert lines.count("  this section ends here: AttributeError: this driver has no such function") == 1


def test_an_unknown_forced_backend_is_told_where_it_is_in_the_way(capsys, monkeypatch):
    monkeypatch.setenv("DITKERNELS_BACKEND", "tpu")
    assert cli.main(["info", "--device", "cpu"]) == 1
    assert "this section ends here: ValueError: DITKERNELS_BACKEND: unknown backend 'tpu'" in capsys.readouterr().out


# ---- Which copy this is ----------------------------------------------------------------------------------------------


def installed(site, version="0.0.1", **direct_url):
    """A folder with a package installed in it, or in ``direct_url``'s tree."""
    (site / "ditkernels").mkdir(parents=True)
    about = site / f"ditkernels-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ditkernels\nVersion: {version}\n", encoding="utf-8")
    if direct_url:
        (about / "direct_url.json").write_text(json.dumps(direct_url), encoding="utf-8")
    return site


def told_of_copies(monkeypatch, *sites):
    monkeypatch.setattr(sys, "path", [str(site) for site in sites])
    return list(info._copies())


def test_a_clone_that_hides_an_installed_copy_names_it(monkeypatch, tmp_path):
    here = Path(ditkernels.__file__).parent
    site = installed(tmp_path / "site packages")
    first, second = told_of_copies(monkeypatch, here.parent, site)
    assert first == f"loaded from {here}"
    assert second.startswith(f"THIS HIDES THE COPY INSTALLED IN {site}/ditkernels: ")


def test_an_editable_copy_hides_nothing_but_in_another_tree(monkeypatch, tmp_path):
    tree = Path(ditkernels.__file__).parents[1]
    own = installed(tmp_path / "own", url=tree.as_uri(), dir_info={"editable": True})
    assert len(told_of_copies(monkeypatch, own)) == 1
    elsewhere = installed(tmp_path / "another clone")
    other = installed(tmp_path / "other", url=elsewhere.as_uri(), dir_info={"editable": True})
    assert f"INSTALLED IN {elsewhere}/ditkernels: " in told_of_copies(monkeypatch, other)[1]


# ---- Triton's cache --------------------------------------------------------------------------------------------------


def cache_below_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))


def read_only_home(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(_triton.os, "access", lambda path, mode: path != str(tmp_path))


@pytest.mark.skipif(_triton.MISSING is not None, reason="Triton is missing")
@pytest.mark.parametrize("spoil", [cache_below_a_file, read_only_home])
def test_a_cache_of_triton_that_cannot_be_written_to_is_a_reason(capsys, monkeypatch, tmp_path, spoil):
    monkeypatch.setattr(_triton, "_capability_reason", lambda device: None)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    cuda = torch.device("cuda")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not yet" / "there"))
    assert _triton.device_reason(cuda) is None
    spoil(monkeypatch, tmp_path)
    reason = _triton.device_reason(cuda)
    assert reason.startswith(f"Triton's cache, {tmp_path}/")
    assert reason.endswith("/cache, cannot be written to; TRITON_CACHE_DIR names another folder")
    assert f"  {reason}\n" in shown(capsys, "--device", "cpu")


@pytest.mark.usefixtures("other_default")
def test_the_processs_defaults_change_nothing(capsys):
    assert "this section ends here" not in shown(capsys, "--device", "cpu")


@pytest.mark.parametrize(
    ("cuda", "driver", "line"),
    [
        (None, None, "torch is built without CUDA"),
        ("13.0", None, "torch is built for CUDA 13.0, which needs NVIDIA driver 580 or newer; there is none"),
        (
            "13.0",
            "580.65.06",
            "torch is built for CUDA 13.0, which needs NVIDIA driver 580 or newer; here is 580.65.06",
        ),
        (
            "12.8",
            "520.61",
            "torch is built for CUDA 12.8, which needs NVIDIA driver 525 or newer; here is 520.61: TOO OLD",
        ),
        ("99.0", "580.65.06", "torch is built for CUDA 99.0; here is 580.65.06"),
    ],
)
def test_the_driver_is_held_against_its_floor(cuda, driver, line):
    assert info._cuda_line(cuda, driver) == line


@pytest.mark.parametrize(
    ("script", "version"),
    [
        ("echo 580.65.06; echo 580.65.06", "580.65.06"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", None),
        ("echo 580.65.06; exit 9", None),
        ("echo No devices were found", None),
    ],
)
def test_the_driver_is_what_nvidia_smi_says(monkeypatch, tmp_path, script, version):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert DRIVER_VERSION() == version


def test_without_nvidia_smi_there_is_no_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert DRIVER_VERSION() is None


def test_importing_it_initialises_no_cuda_and_asks_no_driver():
    code = "import torch, ditkernels.diagnostics.info, ditkernels.diagnostics.check; print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_without_a_gpu_it_says_why_there_are_no_registers_to_show(capsys):
    text = shown(capsys, "--device", "cpu")
    assert f"CUDA library: {_native.cuda_library()}" in text
    assert "registers, spills and occupancy: only a GPU tells them, and cpu is none" in text


def test_a_device_tells_registers_spills_shared_memory_and_occupancy(monkeypatch):
    table = torch.tensor([[168, 0, 1024, 144, 2, 90], [255, 8, 99328, 256, 1, 90], [168, 0, 1024, 144, 2, 90]])
    op = SimpleNamespace(cuda_kernel_attributes=lambda index: (table, "backward_rows<float>\nwide\nbackward_rows<float>"))
    monkeypatch.setattr(torch.ops, "ditkernels", op)
    monkeypatch.setattr(_native.CUDA, "absence", None)
    monkeypatch.setattr(_native, "architectures", lambda: "9.0a")
    properties = SimpleNamespace(max_threads_per_multi_processor=2048)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    library, of_cpu, _, *lines = info._kernels(torch.device("cuda:0"))
    assert library.endswith("built for 9.0a")
    assert of_cpu.startswith("CPU library: ")
    assert lines == [
        "backward_rows<float>: 168 registers, 0 B spilled, 1024 B shared, 144 threads, occupancy 14%, sm_90",
        "wide: 255 registers, 8 B spilled, 99328 B shared, 256 threads, occupancy 12%, sm_90",
    ]
