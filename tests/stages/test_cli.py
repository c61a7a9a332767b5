"""The command line: help in one style, exit codes, one line for an error, bars only on a terminal."""

import fcntl
import importlib
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pipeline.core.errors import PipelineWarning
from pipeline.core.provenance import ROOT
from stages.cli import EXIT_CODES, errors_in_one_line
from tests.support.files import finish, make_project, run_stage, start_stage, write_params

NAMES = sorted(path.stem for path in (ROOT / "stages").glob("[a-z]*.py") if path.stem != "cli")


def commands():
    """(how it is called, the command) of all commands and their subcommands."""
    for name in NAMES:
        main = importlib.import_module(f"stages.{name}").main
        yield f"python -m stages.{name}", main
        if isinstance(main, click.Group):
            for sub in sorted(main.commands):
                yield f"python -m stages.{name} {sub}", main.commands[sub]


COMMANDS = dict(commands())


def help_of(call):
    """The text of --help, as on a terminal of 80 columns."""
    _, _, name, *sub = call.split()
    main = importlib.import_module(name).main
    result = CliRunner().invoke(main, [*sub, "--help"], prog_name=f"python -m {name}", terminal_width=80)
    assert result.exit_code == 0
    return result.output


def examples_in(text):
    """The command lines after `Example:`."""
    found = re.search(r"Example: (.*?)\n\n", text, re.DOTALL)
    return [line.strip() for line in found[1].splitlines()] if found else []


def test_a_warning_of_the_library_is_one_line_and_said_once(tmp_path, monkeypatch):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)

    def broken(network):
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr("torch.fx.experimental.optimization.fuse", broken)
    result = run_stage("attack")
    assert result.exit_code == 0, result.output
    (told,) = (line for line in result.stderr.splitlines() if "warn" in line.lower())
    what = "network 'resnet8w2': its batch norms are not folded, searches take longer"
    assert told == f"warning: {what} (RuntimeError: no such thing)"


def test_other_warnings_are_shown_as_ever():
    @click.command()
    @errors_in_one_line
    def command():
        for _ in range(2):
            warnings.warn("slow", PipelineWarning, stacklevel=1)
            with warnings.catch_warnings():  # others change the filters, and Python forgets what it has shown
                warnings.warn("slow", PipelineWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="something else") as others:
        result = CliRunner().invoke(command)
    assert result.stderr.splitlines() == ["warning: slow"]
    assert len(others) == 1


def test_every_command_is_here():
    assert {"python -m stages.attack", "python -m stages.doctor", "python -m stages.shards verify"} < set(COMMANDS)
    assert len(COMMANDS) == len(NAMES) + 7


@pytest.mark.parametrize("call", COMMANDS)
def test_help_is_in_one_style(call):
    command, text = COMMANDS[call], help_of(call)
    assert text.startswith(f"Usage: {call} ")
    assert text.rstrip().endswith(EXIT_CODES)
    assert max(map(len, text.splitlines())) <= 80
    assert command.help.split("\n\n")[0].replace("\n", " ").rstrip().endswith(".")
    if not (isinstance(command, click.Group) and not command.invoke_without_command):
        assert examples_in(text), "no example"
        assert "--debug" in text
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name
            assert option.help[0].isupper(), option.name
            assert option.help.endswith((".", "]")), option.name
            if isinstance(option.default, str | int | Path) and not option.is_flag:
                assert option.show_default, option.name


@pytest.mark.parametrize("call", COMMANDS)
def test_commands_in_a_list_have_a_whole_sentence(call):
    assert not re.search(r"\.\.\.$", help_of(call).partition("Commands:")[2], re.MULTILINE)


@pytest.mark.parametrize("call", [call for call in COMMANDS if examples_in(help_of(call))])
def test_examples_are_commands_that_there_are(call):
    for example in examples_in(help_of(call)):
        words = shlex.split(example)
        if words[0] == "dvc":
            continue
        assert example.startswith(call), example
        rest = words[len(call.split()) :]
        with COMMANDS[call].make_context(call, rest, resilient_parsing=False) as context:
            assert context is not None


def test_exit_codes_are_those_that_are_told(tmp_path, monkeypatch):
    make_project(tmp_path, {"attack.views": 1})
    for arguments, expected in (
        (("attack",), 0),
        (("attack", "--teacher", "missing.safetensors"), 1),
        (("attack", "--unknown"), 2),
        (("attack", "--params", "missing.yaml"), 2),
    ):
        code, _, stderr = finish(start_stage(tmp_path, *arguments))
        assert code == expected, stderr
        assert "Traceback" not in stderr
    write_params(tmp_path / "params.yaml", {"attack.views": 100_000})
    process = start_stage(tmp_path, "attack")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".work/shards/*/*view-0000[1-9]*")) and time.monotonic() < deadline:
        if len(list(tmp_path.glob(".work/shards/*/*.sha256"))) > 4:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


def test_debug_shows_the_traceback(tmp_path):
    for debug in ((), ("--debug",)):
        code, _, stderr = finish(start_stage(tmp_path, "prepare", *debug))
        assert code == (1 if debug else 2)
        assert ("Traceback" in stderr) == bool(debug)
        assert "params.yaml" in stderr


def in_terminal(directory, name):
    """What a stage prints where its standard error is a terminal."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", f"stages.{name}"],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=follower,
    )
    os.close(follower)
    text = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the last process with the terminal has ended
            break
        if not chunk:
            break
        text += chunk
    os.close(leader)
    process.communicate(timeout=60)
    assert process.returncode == 0, text
    return text.decode()


@pytest.mark.parametrize(("name", "unit"), [("prepare", "image/s"), ("attack", "view/s")])
def test_bars_have_a_rate_and_are_for_terminals_alone(tmp_path, name, unit):
    make_project(tmp_path, {"attack.views": 60, "runtime.workers": 1})
    shown = in_terminal(tmp_path, name)
    assert unit in shown
    assert re.search(r"\d+%", shown)
    code, _, stderr = finish(start_stage(tmp_path, name))
    assert (code, stderr) == (0, "")
