"""The command line: options into a dataclass, errors in one line with exit code 2, help at once and without JAX."""

import os
import pty
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from jaxopt_lab import cli, data


@dataclass(frozen=True)
class Options:
    """Compresses a network.

    In two paragraphs.
    """

    dataset: Literal["digits", "mnist"] = "digits"
    """Which data."""
    data_dir: Path | None = None
    """Where they lie."""
    steps: int = 10


def test_parse():
    assert cli.parse(Options, []) == Options()
    assert cli.parse(Options, ["--data-dir", "a/b", "--steps", "3", "--debug"]) == Options(data_dir=Path("a/b"), steps=3)


def test_parse_reads_the_programs_own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study.py", "--steps", "4"])
    assert cli.parse(Options).steps == 4


def test_help_names_the_options_and_their_docs(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Options, ["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    for words in ("Compresses a network.", "In two paragraphs.", "--data-dir", "Where they lie.", "JAXOPT_LAB_DEBUG"):
        assert words in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--stps", "3"], "Unrecognized options: --stps, 3; perhaps you meant --steps INT"),
        (["--steps", "x"], "--steps: invalid literal for int() with base 10: 'x'"),
        (["--steps"], "Missing value for argument '--steps'"),
        (["--dataset", "cifar"], "invalid choice 'cifar' for argument '--dataset'"),
        (["extra"], "Unrecognized options: extra"),
    ],
)
def test_a_wrong_argument_is_one_line_and_code_2(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Options, argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert err.endswith("; --help lists the options\n")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_wrong_argument_is_one_plain_line_on_a_terminal_too(encoding):
    outer, inner = pty.openpty()
    try:
        program = "import test_cli; test_cli.cli.parse(test_cli.Options, ['--dataset', 'cifar'])"
        tests = Path(__file__).parent
        path = {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
        environment = {**os.environ, **path, "PYTHONIOENCODING": encoding, "TERM": "xterm", "COLUMNS": "40"}
        done = subprocess.run([sys.executable, "-c", program], stdout=inner, stderr=subprocess.PIPE, env=environment, check=False)
    finally:
        os.close(inner)
        os.close(outer)
    assert done.returncode == 2
    assert done.stderr.decode() == (
        "error: invalid choice 'cifar' for argument '--dataset'. Expected one of ('digits', 'mnist'); --help lists the options\n"
    )


def ours(_):
    raise ValueError("steps=1\n  is bad")


def of_the_package(_):
    data.load("cifar")


def missing_file(_):
    Path("/no/such/file").read_bytes()


@pytest.mark.parametrize(
    ("study", "line"),
    [
        (ours, "error: steps=1 is bad\n"),
        (of_the_package, "error: unknown data set 'cifar'; there are digits, mnist, mnist1d\n"),
        (missing_file, "error: /no/such/file: No such file or directory\n"),
    ],
)
def test_an_error_that_a_user_can_mend_is_one_line(capsys, monkeypatch, study, line):
    monkeypatch.delenv("JAXOPT_LAB_DEBUG", raising=False)
    assert cli.main(study, Options, []) == 2
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_debug_shows_the_traceback(capsys, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("JAXOPT_LAB_DEBUG", "1")
    assert cli.main(ours, Options, ["--debug"] if how == "argument" else []) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "in ours" in err


def test_a_fault_of_the_program_keeps_its_traceback():
    def fault(_):
        raise KeyError("x")

    # Compiled elsewhere: the frame that raises belongs to neither the package nor the study.
    elsewhere: dict = {"__name__": "elsewhere"}
    exec("def deep():\n    raise ValueError('inner')", elsewhere)

    def study(_):
        elsewhere["deep"]()

    with pytest.raises(ValueError, match="inner"):
        cli.main(study, Options, [])
    with pytest.raises(KeyError):
        cli.main(fault, Options, [])


def test_an_interrupt_is_code_130(capsys):
    def study(_):
        raise KeyboardInterrupt

    assert cli.main(study, Options, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_data_directory_is_the_option_or_the_environment(monkeypatch):
    monkeypatch.setenv("JAXOPT_LAB_DATA", "/from/environment")
    assert cli.data_directory(Path("given")) == Path("given")
    assert cli.data_directory(None) == Path("/from/environment")
    monkeypatch.setenv("JAXOPT_LAB_DATA", "")
    assert cli.data_directory(None) is None
    monkeypatch.delenv("JAXOPT_LAB_DATA")
    assert cli.data_directory(None) is None


def test_help_answers_at_once_and_without_jax(tmp_path):
    program = tmp_path / "study.py"
    program.write_text(
        "import sys\n"
        "from dataclasses import dataclass\n"
        "from jaxopt_lab import cli\n"
        "@dataclass(frozen=True)\n"
        "class Options:\n"
        "    '''A study.'''\n"
        "    steps: int = 10\n"
        "try:\n"
        "    cli.parse(Options, ['--help'])\n"
        "finally:\n"
        "    assert not {'jax', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begin)
        assert "A study." in done.stdout
    # Half a second is the aim on a quiet machine; the suite runs two at a time.
    assert min(seconds) < 1.0
