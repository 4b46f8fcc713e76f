"""The command line: finds commands, imports only the one asked for, tells user errors in one line."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

import ditkernels
from ditkernels import BackendError, __version__, cli
from ditkernels.commands import counted


def add_command(monkeypatch, name, run, add_arguments=lambda parser: None):
    module = types.ModuleType(f"ditkernels.commands.{name}")
    module.run, module.add_arguments = run, add_arguments
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, name, f"what {name} does")


def raising(error):
    def run(args):
        raise error

    return run


def test_a_command_gets_its_arguments_and_gives_the_exit_status(monkeypatch):
    seen = []

    def run(args):
        seen.append((args.count, args.name))
        return 7

    def add_arguments(parser):
        parser.add_argument("--count", type=int)
        parser.add_argument("name")

    add_command(monkeypatch, "greet", run, add_arguments)
    assert cli.main(["greet", "--count", "3", "you"]) == 7
    assert seen == [(3, "you")]


def test_one_is_no_plural():
    assert [counted(count, "shard") for count in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]


def test_only_the_command_asked_for_is_imported(monkeypatch):
    add_command(monkeypatch, "wanted", lambda args: 0)
    monkeypatch.setitem(cli.COMMANDS, "broken", "")
    assert cli.main(["wanted"]) == 0
    assert cli.main(["broken"]) == 2


def test_help_lists_every_command_without_importing_one(monkeypatch, capsys):
    add_command(monkeypatch, "wanted", lambda args: 0)
    monkeypatch.setitem(cli.COMMANDS, "broken", "is not there")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name, summary in cli.COMMANDS.items():
        assert name in shown
        assert summary.split(",")[0] in " ".join(shown.split())


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == 2
    assert "demo" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["frobnicate"], ["frobnicate", "--help"], ["--verbose"]])
def test_what_is_unknown_is_an_error_of_one_line(argv, capsys):
    assert cli.main(argv) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("ditkernels: error: ")
    assert argv[0] in shown
    assert shown.count("\n") == 1


def test_an_unknown_command_lists_what_exists(capsys):
    cli.main(["frobnicate"])
    assert f"allowed are {', '.join(cli.COMMANDS)}" in capsys.readouterr().err


def test_a_flags_wrong_value_is_named(monkeypatch, capsys):
    add_command(monkeypatch, "greet", lambda args: 0, lambda parser: parser.add_argument("--count", type=int))
    assert cli.main(["greet", "--count", "many"]) == 2
    shown = capsys.readouterr().err
    assert "--count" in shown
    assert "'many'" in shown
    assert "see 'ditkernels greet --help'" in shown


@pytest.mark.parametrize(
    "error",
    [
        ValueError("steps: got 0,\n    allowed is 1 or more"),
        FileNotFoundError(2, "No such file or directory", "/nowhere"),
        FloatingPointError("the loss became nan at step 3"),
        BackendError("modulate_norm: triton cannot serve"),
        ImportError("the demo needs matplotlib: pip install ditkernels[demo]"),
    ],
)
def test_the_users_errors_are_one_line_and_exit_2(monkeypatch, capsys, error):
    add_command(monkeypatch, "fail", raising(error))
    assert cli.main(["fail"]) == 2
    shown = capsys.readouterr().err
    assert shown == f"ditkernels: error: {' '.join(str(error).split())}\n"


def test_the_users_errors_can_be_traced(monkeypatch):
    add_command(monkeypatch, "fail", raising(ValueError("bad")))
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="bad"):
        cli.main(["fail"])


@pytest.mark.parametrize("no", ["0", ""])
def test_no_means_no_traceback(monkeypatch, no):
    add_command(monkeypatch, "fail", raising(ValueError("bad")))
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, no)
    assert cli.main(["fail"]) == 2


@pytest.mark.parametrize("error", [TypeError("a bug"), RuntimeError("a bug"), AssertionError("a bug")])
def test_our_own_errors_keep_their_traceback(monkeypatch, error):
    add_command(monkeypatch, "fail", raising(error))
    with pytest.raises(type(error), match="a bug"):
        cli.main(["fail"])


def test_an_interrupt_exits_130(monkeypatch, capsys):
    add_command(monkeypatch, "wait", raising(KeyboardInterrupt()))
    assert cli.main(["wait"]) == 130
    assert capsys.readouterr().err == "ditkernels: interrupted\n"


WORDY = """
import sys
from ditkernels import cli

def add_arguments(parser):
    pass

def run(args):
    print("word " * 10**6)
    return 0

cli.COMMANDS["wordy"] = "talks"
sys.modules["ditkernels.commands.wordy"] = sys.modules["__main__"]
sys.exit(cli.main(["wordy"]))
"""


def test_a_reader_that_leaves_is_no_error():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WORDY], **pipes) as process:
        assert process.stdout.read(4) == b"word"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "ditkernels"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120)
    assert (version.returncode, version.stdout) == (0, f"ditkernels {__version__}\n")
    unknown = subprocess.run([*command, "frobnicate"], capture_output=True, text=True, timeout=120)
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("ditkernels: error: ")
    assert "Traceback" not in unknown.stderr


# ---- A file of the package as a script -------------------------------------------------------------------------------

PACKAGE = Path(ditkernels.__file__).parent
FILES = {f"commands/{name}.py": name for name in cli.COMMANDS}
FILES |= {"cli.py": "COMMAND", "__main__.py": "COMMAND", "": "COMMAND"}
OTHERS = ["models.py", "rng.py", "training/trainer.py", "ops/norm/triton.py", "accelerate/plans.py"]


def as_script(*command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("file", FILES)
def test_a_commands_file_says_how_it_is_run(file):
    name = FILES[file]
    also = f" or `torchrun -m ditkernels {name} ...`" if name in ("train", "sample", "encode") else ""
    told = f"ditkernels: error: run `python -m ditkernels {name} ...`{also}\n"
    assert as_script(PACKAGE / file) == (2, told)


@pytest.mark.parametrize("file", [file if file == "models.py" else pytest.param(file, marks=pytest.mark.slow) for file in OTHERS])
def test_another_file_says_that_it_is_no_script(file):
    told = f"{Path(file).name} is a part of a package; `python -m ditkernels --help` shows what can be run"
    assert as_script(PACKAGE / file) == (2, f"ditkernels: error: {told}\n")


@pytest.mark.parametrize("module", ["commands.flops", "flops", "models", "cli"])
def test_a_module_says_how_it_is_run(module):
    status, told = as_script("-m", f"ditkernels.{module}")
    how = "run `python -m ditkernels flops ...`" if "flops" in module else "`python -m ditkernels --help` shows what can be run"
    assert (status, told.splitlines()[-1].endswith(how)) == (2, True)


@pytest.mark.slow
def test_torchrun_of_a_file_says_how_it_is_run():
    status, told = as_script("-m", "torch.distributed.run", "--standalone", PACKAGE / "commands/train.py")
    assert status != 0
    assert "run `python -m ditkernels train ...` or `torchrun -m ditkernels train ...`" in told
    assert "ImportError" not in told


def test_python_in_the_packages_folder_finds_its_own_modules(monkeypatch):
    monkeypatch.chdir(PACKAGE)
    assert as_script("-c", "import tempfile, random; random.random()") == (0, "")


def test_flags_are_never_cut_short(capsys):
    for command in ("train", "encode", "sample"):
        assert cli.main([command, *(["x"] if command == "sample" else []), "--devic", "cpu"]) == 2
        assert "unrecognized arguments: --devic" in capsys.readouterr().err
