"""`ditkernels info`: tells what is here, which backend serves and why the others do not."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from native_cpu import SERVING

from ditkernels import cli, info
from ditkernels.ops import _native, dispatch

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


def test_an_unknown_forced_backend_is_an_error(capsys, monkeypatch):
    monkeypatch.setenv("DITKERNELS_BACKEND", "tpu")
    assert cli.main(["info"]) == 2
    assert "DITKERNELS_BACKEND: unknown backend 'tpu'" in capsys.readouterr().err


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
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert DRIVER_VERSION() == version


def test_without_nvidia_smi_there_is_no_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert DRIVER_VERSION() is None


def test_importing_it_initialises_no_cuda_and_asks_no_driver():
    code = "import torch, ditkernels.info, ditkernels.check; print(torch.cuda.is_initialized())"
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
