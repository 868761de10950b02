"""The build looks for nvcc, Hopper and CUTLASS, and ends with one sentence if one is missing."""

import re
from pathlib import Path

import pytest
from build_support import cutlass, refusal, toolkit


@pytest.mark.parametrize("listed", ["9.0", "9.0a", "9.0+PTX", "Hopper", " 9.0a; ", ""])
def test_an_architecture_list_with_hopper_is_silent(build, monkeypatch, capsys, listed):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    build.toolchain.check_arch_list()
    assert capsys.readouterr().out == ""


def test_other_architectures_beside_hopper_are_named(build, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 10.0+PTX")
    build.toolchain.check_arch_list()
    assert capsys.readouterr().out == (
        "flashmla_hf: TORCH_CUDA_ARCH_LIST: 8.0, 10.0+PTX ignored, the CUDA library is for Hopper (9.0) alone.\n"
    )


def test_an_architecture_list_without_hopper_is_named_as_the_reason(build, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;8.6")
    assert refusal(build, build.toolchain.check_arch_list) == (
        "TORCH_CUDA_ARCH_LIST: expected 9.0 among the entries, got '8.0 8.6', and the library is for Hopper GPUs alone: "
        "add 9.0, or unset it."
    )


def test_nvcc_is_taken_from_cuda_home(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", toolkit(tmp_path))
    assert build.toolchain.find_nvcc() == (str(tmp_path / "toolkit/bin/nvcc"), "12.4")


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("release 12.3, V12.3.107", "nvcc 12.3 is too old: expected CUDA >= 12.4; install a newer toolkit, or name one in CUDA_HOME."),
        ("nothing", "nvcc --version: expected a line with its release, got 'nothing': reinstall the toolkit."),
    ],
)  # fmt: skip
def test_an_old_or_broken_nvcc_is_named_as_the_reason(build, monkeypatch, tmp_path, version, sentence):
    monkeypatch.setenv("CUDA_HOME", toolkit(tmp_path, version))
    assert refusal(build, build.toolchain.find_nvcc).endswith(sentence)


def test_a_cuda_home_without_nvcc_is_named_as_the_reason(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert refusal(build, build.toolchain.find_nvcc) == (
        f"CUDA_HOME: expected the directory of a CUDA toolkit, got {str(tmp_path)!r}, which has no bin/nvcc."
    )


def test_a_missing_nvcc_is_named_as_the_reason(build, monkeypatch):
    monkeypatch.setattr(build.toolchain.shutil, "which", lambda *_, **__: None)
    assert refusal(build, build.toolchain.find_nvcc) == (
        "nvcc was not found: put a CUDA toolkit >= 12.4 on PATH, or name its directory in CUDA_HOME."
    )


def test_cutlass_is_taken_from_its_variable_whatever_its_version(build, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHMLA_CUTLASS_DIR", str(tmp_path))
    assert refusal(build, build.toolchain.find_cutlass, tmp_path / "downloads") == (
        "FLASHMLA_CUTLASS_DIR: expected a CUTLASS checkout, which holds include/cutlass/cutlass.h, got "
        f"{str(tmp_path)!r}, which does not."
    )
    include = cutlass(tmp_path / "include", "4.3.1")
    assert build.toolchain.find_cutlass(tmp_path / "downloads") == include


INSIDE = Path("cutlass_library/source/include")


def test_an_installed_cutlass_of_the_pinned_release_is_used(build, monkeypatch, tmp_path):
    cutlass(tmp_path / "other" / INSIDE, "3.9.0")
    wanted = cutlass(tmp_path / "wanted" / INSIDE)
    monkeypatch.setattr(
        build.toolchain, "site_packages", lambda: iter([tmp_path / "none", tmp_path / "other", tmp_path / "wanted"])
    )
    assert build.toolchain.find_cutlass(tmp_path / "downloads") == wanted


def test_cutlass_is_downloaded_once_without_its_dependencies(build, monkeypatch, tmp_path):
    commands = []

    def install(command, **_):
        commands.append(command)
        target = Path(command[command.index("--target") + 1])
        assert re.fullmatch(
            r"nvidia-cutlass==4\.2\.0\.0 --hash=sha256:[0-9a-f]{64}\n", (target / "requirement.txt").read_text()
        )
        cutlass(target / INSIDE)

    monkeypatch.setattr(build.toolchain, "site_packages", lambda: iter(()))
    monkeypatch.setattr(build.toolchain.subprocess, "run", install)
    for _ in range(2):
        assert build.toolchain.find_cutlass(tmp_path) == tmp_path / "cutlass-4.2.0.0" / INSIDE
    assert len(commands) == 1
    assert {"--no-deps", "--require-hashes"} <= set(commands[0])


def test_a_failed_download_of_cutlass_names_the_remedies(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build.toolchain, "site_packages", lambda: iter(()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("UV_OFFLINE", "1")
    sentence = refusal(build, build.toolchain.find_cutlass, tmp_path)
    assert sentence.startswith("CUTLASS's headers could not be downloaded (")
    assert sentence.endswith(
        "): install them into this environment (pip install --no-deps nvidia-cutlass==4.2.0.0), or name a CUTLASS checkout "
        "in FLASHMLA_CUTLASS_DIR."
    )
