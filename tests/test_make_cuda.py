"""`make cuda` (csrc/sm90/check_build.py) prints a table of registers, and fails on what ptxas or a compiler reports."""

import re
import shlex
from pathlib import Path

import pytest
from build_support import PTXAS, ROOT, toolkit


def test_make_cuda_shows_a_table_and_checks_what_is_up_to_date(package):
    for _ in range(2):
        stdout = package.run("csrc/sm90/check_build.py")
        assert package.exit_code == 0, stdout + package.stderr
        assert "csrc/sm90/kernel.cu: " in stdout
        assert re.search(r"\n  tiny<64> +168 +0 +0 +1024 +16\n", stdout), stdout


def test_make_cuda_takes_what_make_cuda_objects_compiled_beside_other_targets(package):
    """By the Makefile's own command; it leaves nothing in place that another target might be using."""
    recipe = re.search(r"^cuda-objects:.*\n\t(\w+=cuda) \$\(RUN\) (.*)$", (ROOT / "Makefile").read_text(), re.M)
    command = shlex.split(recipe[2].replace("$(CURDIR)", str(package.directory.resolve())))
    before = sorted(package.directory.glob("flashmla_hf/*"))
    assert package.build(*command[1:], FLASHMLA_BUILD=recipe[1].partition("=")[2]) != set()
    assert sorted(package.directory.glob("flashmla_hf/*")) == before
    stdout = package.run("csrc/sm90/check_build.py")
    assert package.exit_code == 0, stdout + package.stderr
    assert " -c " not in stdout
    assert (package.directory / "flashmla_hf/libflashmla_sm90.so").exists()


@pytest.mark.parametrize(
    ("ptxas", "sentence"),
    [
        (PTXAS.replace("0 bytes spill stores", "8 bytes spill stores"), "tiny<64> spills 8 bytes of registers: expected 0"),
        (
            PTXAS + "\nptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x",
            "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x",
        ),
        ("", "ptxas reported no kernel: expected -Xptxas -v among the flags of sources.json"),
    ],
)  # fmt: skip
def test_make_cuda_fails_on_what_ptxas_reports(package, tmp_path, ptxas, sentence):
    toolkit(tmp_path, ptxas=ptxas)
    for _ in range(2):  # the second time the object is up to date
        package.run("csrc/sm90/check_build.py")
        assert package.exit_code == 1
        assert re.search(rf"flashmla_hf: csrc/sm90/kernel.cu: .*{re.escape(sentence)}\n", package.stderr)


@pytest.mark.parametrize(
    ("name", "text", "warning"),
    [
        ("csrc/cpu/cpu.cpp", "static int spare() { return 0; }\n", r"csrc/cpu/cpu.cpp: csrc/cpu/cpu.cpp:3:12: warning: .*spare"),
        ("csrc/direct.h", "#warning old\n", r"csrc/direct/direct.cpp: csrc/direct.h:1:2: warning: #warning old"),
        ("csrc/sm90/host.cpp", "#warning old\n", r"csrc/sm90/host.cpp: csrc/sm90/host.cpp:2:2: warning: #warning old"),
    ],
)  # fmt: skip
def test_make_cuda_fails_on_a_warning_of_the_host_compiler_in_csrc(package, name, text, warning):
    if name == "csrc/direct.h":
        with (package.directory / "csrc/direct/direct.cpp").open("a") as file:
            file.write('#include "direct.h"\n')
    with (package.directory / name).open("a") as file:
        file.write(text)
    for _ in range(2):  # the second time the object is up to date
        package.run("csrc/sm90/check_build.py")
        assert package.exit_code == 1
        assert re.search(rf"flashmla_hf: {warning}", package.stderr), package.stderr


@pytest.mark.parametrize(
    ("said", "failure"),
    [
        ("{csrc}/sm90/kernel.cuh(71): warning #20050-D: inline qualifier ignored", "csrc/sm90/kernel.cuh(71): warning #20050-D: inline qualifier ignored (2 times)"),
        ("{csrc}/sm90/kernel.cuh(71): remark #1-D: that line", "csrc/sm90/kernel.cuh(71): remark #1-D: that line (2 times)"),
        ("ptxas warning : Value of threads per SM is out of range", "ptxas warning : Value of threads per SM is out of range (2 times)"),
        ("nvcc warning : that option", "nvcc warning : that option (2 times)"),
        ("/elsewhere/cute/tensor.hpp(71): warning #20050-D: inline qualifier ignored", None),
    ],
)  # fmt: skip
def test_make_cuda_fails_on_a_warning_of_nvcc_unless_another_project_s_file_has_it(package, tmp_path, said, failure):
    said = said.format(csrc=package.directory.resolve() / "csrc")
    toolkit(tmp_path, ptxas=f"{PTXAS}\n{said}\n{said}")
    package.run("csrc/sm90/check_build.py")
    assert package.exit_code == (failure is not None), package.stderr
    assert failure is None or f"flashmla_hf: csrc/sm90/kernel.cu: {failure}\n" in package.stderr


def test_headers_of_other_projects_do_not_warn(package):
    """Of CUTLASS, of torch and of Python, whose include directories come after -isystem."""
    (Path(package.defaults["FLASHMLA_CUTLASS_DIR"]) / "include/cutlass/cutlass.h").write_text(
        "inline int theirs() { return 1 / 0; }\n"
    )
    with (package.directory / "csrc/sm90/kernel.cu").open("a") as file:
        file.write("#include <cutlass/cutlass.h>\n")
    stdout = package.run("csrc/sm90/check_build.py")
    assert package.exit_code == 0, stdout + package.stderr
    assert "theirs" not in stdout
