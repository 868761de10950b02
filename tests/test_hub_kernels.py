"""`make kernels`: the folder's layout, and that the package `kernels` and Transformers load it by a name of the hub.

`make test-kernels` installs a release of kernels that Transformers takes; without one, what needs it is skipped.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from build_support import ROOT, load
from cpu_support import needs_cpu_library

import flashmla_hf

needs_kernels = pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="kernels is not installed")


@pytest.fixture(scope="module")
def make_kernels():
    return load(ROOT / "csrc/make_kernels.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package in place, with a stand-in for the Hopper library."""
    path = tmp_path_factory.mktemp("dist") / f"flashmla_hf-{flashmla_hf.__version__}-py3-none-manylinux_2_28_x86_64.whl"
    manifest = {**json.loads((ROOT / "flashmla_hf/_build.json").read_text()), "cuda": "12.9", "archs": ["90a"]}
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((ROOT / "flashmla_hf").rglob("*")):
            if file.suffix in (".py", ".so") and file.name != "libflashmla_sm90.so":
                archive.write(file, str(file.relative_to(ROOT)))
        archive.writestr("flashmla_hf/libflashmla_sm90.so", "a library")
        archive.writestr("flashmla_hf/_build.json", json.dumps(manifest))
        archive.writestr(f"flashmla_hf-{flashmla_hf.__version__}.dist-info/METADATA", "not a part of the kernel")
    return path


@pytest.fixture(scope="module")
def folder(make_kernels, wheel, tmp_path_factory):
    if not (ROOT / "flashmla_hf/_build.json").exists():
        pytest.skip("the package is not built in place")
    output = tmp_path_factory.mktemp("kernels") / "flashmla-hf"
    make_kernels.make(wheel, output)
    return output


def variants(folder):
    return sorted(path.name for path in (folder / "build").iterdir())


def test_one_wheel_becomes_a_variant_for_the_cpu_and_one_for_each_cuda(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "build"]
    assert variants(folder) == [f"torch-stable-abi210-{name}-x86_64-linux" for name in ("cpu", "cu129", "cu130")]
    for variant in (folder / "build").iterdir():
        held = {path.relative_to(variant).as_posix() for path in variant.rglob("*") if path.is_file()}
        assert {"__init__.py", "metadata.json", "flashmla_hf/__init__.py", "flashmla_hf/hf/register.py"} <= held
        assert ("flashmla_hf/libflashmla_sm90.so" in held) == ("-cpu-" not in variant.name)
        metadata = json.loads((variant / "metadata.json").read_text())
        assert set(metadata["digest"]["files"]) == held - {"metadata.json"}
        assert metadata["id"].isidentifier()


def test_a_second_run_replaces_the_first(make_kernels, wheel, folder):
    (folder / "build" / "torch-universal").mkdir()
    make_kernels.make(wheel, folder)
    assert len(variants(folder)) == 3


@pytest.mark.parametrize(
    ("compiler", "releases"),
    [("12.4", ["12.4", "13.0"]), ("13.2", ["12.4", "13.2"]), ("14.0", ["12.4", "13.0", "14.0"])],
)
def test_a_library_serves_every_major_release_of_cuda(make_kernels, compiler, releases):
    assert make_kernels.cuda_releases(compiler) == releases


@pytest.mark.parametrize("name", ["absent.whl", "flashmla_hf-1.0-cp311-none-win_amd64.whl"])
def test_what_is_no_wheel_of_ours_is_refused(make_kernels, tmp_path, name):
    if name != "absent.whl":
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match=f"{re.escape(name)}: expected a wheel of flashmla_hf"):
        make_kernels.make(tmp_path / name, tmp_path / "output")


def run(program, folder, directory, **environment):
    """A process that finds no flashmla_hf but the folder's."""
    kept = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place and Path(place) != ROOT]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(kept),
        "FLASHMLA_AUTOLOAD": "0",
        "HF_HUB_OFFLINE": "1",
        "LOCAL_KERNELS": f"owner/flashmla-hf={folder}",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=directory, env=environment
    )


def test_a_process_with_another_release_refuses_the_kernel(folder, tmp_path):
    (tmp_path / "flashmla_hf").mkdir()
    (tmp_path / "flashmla_hf" / "__init__.py").write_text("__version__ = '9.9'\n")
    loader = folder / "build" / variants(folder)[0] / "__init__.py"
    result = run(f"import flashmla_hf, runpy; runpy.run_path({str(loader)!r})", folder, tmp_path)
    assert result.returncode == 1
    assert (
        f"is flashmla_hf {flashmla_hf.__version__}, and flashmla_hf 9.9 of {tmp_path}/flashmla_hf is" in result.stderr
    )
    assert "Uninstall that one (pip uninstall flashmla_hf), or use it without the kernel" in result.stderr


@needs_kernels
@pytest.mark.parametrize(
    ("backend", "chosen"), [("cpu", "cpu"), ("cu129", "cu129"), ("cu132", "cu130"), ("cu126", None), ("rocm70", None)]
)
def test_kernels_chooses_the_variant_of_a_system(folder, backend, chosen):
    from kernels import backends
    from kernels import variants as theirs
    from packaging.version import Version

    found, trace = theirs._resolve_variant_for_system(
        variants=[theirs.parse_variant(name) for name in variants(folder)],
        selected_backend=backends.parse_backend(backend), cpu="x86_64", os="linux", torch_version=Version("2.13"),
        torch_cxx11_abi=True, tvm_ffi_version=None,
    )  # fmt: skip
    assert [variant.variant_str for variant in found] == (
        [f"torch-stable-abi210-{chosen}-x86_64-linux"] if chosen else []
    )
    assert len(trace) == 3


@needs_kernels
@needs_cpu_library
def test_kernels_loads_the_folder(folder, tmp_path):
    program = (
        "import kernels, torch\n"
        "kernel = kernels.get_kernel('owner/flashmla-hf', version=1, backend='cpu')\n"
        "import flashmla_hf\n"
        "print(flashmla_hf.__file__)\n"
        "q = torch.randn(2, 9, 2, 8)\n"
        "expected = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, is_causal=True)\n"
        "torch.testing.assert_close(kernel.flash_attn_func(q, q, q, causal=True), expected.transpose(1, 2))\n"
        "(loaded,) = kernels.get_loaded_kernels()\n"
        "print(loaded.metadata.name, loaded.metadata.version)\n"
    )
    result = run(program, folder, tmp_path)
    assert result.returncode == 0, result.stderr
    file, name = result.stdout.splitlines()
    assert file.startswith(str(folder))
    assert name == "flashmla-hf 1"


TRANSFORMERS = """
import sys, torch, transformers
from transformers.utils import import_utils
if not import_utils.is_kernels_available():
    import kernels
    sys.exit(f"skip: Transformers {transformers.__version__} takes kernels >= {import_utils.KERNELS_MIN_VERSION} and < "
             f"{import_utils.KERNELS_MAX_VERSION}, and {kernels.__version__} is installed")
config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, vocab_size=64, initializer_range=0.3, use_cache=False)
ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids)
mask[1, :6] = 0
def outcome(implementation):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    logits = model(ids, attention_mask=mask).logits[mask.bool()]
    logits.logsumexp(-1).sum().backward()
    return model, [logits, *(parameter.grad for parameter in model.parameters())]
_, expected = outcome("eager")
model, got = outcome("owner/flashmla-hf")
for one, other in zip(got, expected, strict=True):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
import flashmla_hf
print(model.config._attn_implementation, flashmla_hf.__file__)
"""


@needs_kernels
@needs_cpu_library
def test_transformers_trains_with_the_folder_under_a_name_of_the_hub(folder, tmp_path):
    """A packaged kernel takes Transformers' own way to flash attention: padding is unpacked before our function."""
    pytest.importorskip("transformers")
    result = run(TRANSFORMERS, folder, tmp_path)
    if "skip: " in result.stderr:
        pytest.skip(result.stderr.strip().splitlines()[-1].removeprefix("skip: "))
    assert result.returncode == 0, result.stderr
    name, file = result.stdout.split()
    assert name == "owner/flashmla-hf"
    assert file.startswith(str(folder))
