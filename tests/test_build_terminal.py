"""What a user sees of a build under pip and uv, which keep what a build prints to themselves."""

import os
import pty
import re
import subprocess
import sys

import pytest
from build_support import environment_of_a_build


@pytest.mark.parametrize(
    ("line", "hides"),
    [
        ("/env/bin/python /env/bin/pip install .", True),
        ("/usr/bin/python3 -m pip install --no-deps .", True),
        ("/usr/bin/pip3.11 wheel .", True),
        ("uv pip install .", True),
        ("/opt/uv sync", True),
        ("uv run pytest", False),
        ("python -m pip install -v .", False),
        ("python -m pip install -vv .", False),
        ("python -m pip install -q -e .", False),
        ("uv pip install --verbose .", False),
        ("python setup.py build_ext --inplace", False),
        ("python -m build --wheel", False),
        ("make test", False),
    ],
)
def test_only_an_installer_that_shows_nothing_hides_a_build(build, line, hides):
    words = [*line.split(), ""]
    assert build.terminal.hides_builds(words, {}) == hides
    assert not build.terminal.hides_builds(words, {"PIP_QUIET": "1"})


def on_a_terminal(command, environment, directory):
    """(exit code, what a terminal shows) of the command, which leads a session of its own."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(directory)
        os.execvpe(command[0], command, environment)
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # the end, on Linux
            break
        if not piece:
            break
        shown += piece
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.decode(errors="replace")


def pip_wheel(directory):
    words = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    return [sys.executable, *words, "--wheel-dir", str(directory / "out"), "."]


@pytest.mark.parametrize("option", [None, "-v", "-q"])
def test_pip_install_shows_progress_and_what_was_built_on_a_terminal(package, tmp_path, option):
    command = pip_wheel(tmp_path)
    environment = environment_of_a_build(**{**package.defaults, "FLASHMLA_BUILD": "cuda", "TERM": "dumb"})
    code, shown = on_a_terminal([*command, *([option] if option else [])], environment, package.directory)
    assert code == 0, shown
    times = 0 if option == "-q" else 1
    assert len(re.findall("flashmla_hf: compiling 4 sources", shown)) == times
    assert len(re.findall(r"flashmla_hf: \d of 4 sources compiled", shown)) == 4 * times
    assert (
        len(re.findall(r"flashmla_hf: built libflashmla_cpu.so, .* in \d+ s, with CUDA 12.4 for Hopper", shown))
        == times
    )
    assert ("kernel.cu -o" in shown) == (option == "-v")  # the commands are for -v


def test_without_a_terminal_pip_is_as_silent_as_ever(package, tmp_path):
    command = pip_wheel(tmp_path)
    result = subprocess.run(
        command, cwd=package.directory, capture_output=True, text=True, start_new_session=True,
        env=environment_of_a_build(**package.defaults),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not re.search("flashmla_hf: (?:compiling|built)", result.stdout + result.stderr)


@pytest.mark.parametrize(
    ("line", "variables", "first"),
    [
        ("uv pip install .", {"VIRTUAL_ENV": "/env"}, "/env"),
        ("/opt/uv pip install --python /other/bin/python .", {"VIRTUAL_ENV": "/env"}, "/other"),
        ("uv pip install --python=/other .", {}, "/other"),
        ("uv pip install -p 3.12 .", {}, "{here}/.venv"),
        ("/env/bin/python -m pip install .", {"VIRTUAL_ENV": "/env"}, None),
    ],
)
def test_a_build_under_uv_looks_for_torch_where_uv_does(build, tmp_path, line, variables, first):
    (tmp_path / "cmdline").write_bytes("\0".join([*line.split(), ""]).encode())
    (tmp_path / "environ").write_bytes("".join(f"{key}={value}\0" for key, value in variables.items()).encode())
    (tmp_path / "cwd").symlink_to(tmp_path)
    found = [str(path) for path in build.environment.prefixes_of_uv(tmp_path)]
    assert found[:1] == ([first.format(here=tmp_path)] if first else [])
