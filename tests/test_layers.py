"""The import arrows: layers, pointing down only, without a circle; training and the integration layer import Transformers."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Top to bottom, by the first part of a module's name. A module may import modules of its own layer and of those below.
LAYERS = [
    {"__main__", "check_command", "training", "weight_files"},
    {"__init__", "doctor", "autoload", "hf", "patches"},
    {
        "dispatch",
        "decode",
        "latent",
        "flash_attn_api",
        "fp8",
        "torch_flash",
        "backends",
        "backend",
        "validation",
        "notices",
        "reference",
        "scalars",
    },
    {
        "ops",
        "decode_ops",
        "latent_ops",
        "latent_stream",
        "direct",
        "recompute_cache",
        "libraries",
        "torch_state",
        "host_memory",
        "nvidia_smi",
        "tested_releases",
    },
]
MAY_IMPORT_TRANSFORMERS = {
    "check_command", "training", "hf.fp8_cache", "hf.fp8_layers", "hf.masks", "hf.paged", "hf.register", "hf.transformers_private", "patches",
}  # fmt: skip


def modules():
    return {path.relative_to(ROOT / "flashmla_hf"): path for path in sorted((ROOT / "flashmla_hf").rglob("*.py"))}


def layer(name):
    for number, names in enumerate(LAYERS):
        if name.split(".")[0] in names:
            return number
    raise AssertionError(f"flashmla_hf/{name}.py stands in no layer: add it to LAYERS, or to another file")


def imported_modules(path):
    """(module, names) of every import statement in the file, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, tuple(alias.name for alias in node.names)


@pytest.mark.parametrize("module", modules(), ids=str)
def test_imports_point_down_only(module):
    name = ".".join(module.with_suffix("").parts)
    own = layer(name)
    for imported, names in imported_modules(modules()[module]):
        if imported == "flashmla_hf":
            targets = names
        elif imported.startswith("flashmla_hf."):
            targets = [imported.removeprefix("flashmla_hf.")]
        else:
            continue
        for target in targets:
            path = ROOT / "flashmla_hf" / target.split(".")[0]
            if path.is_dir() or path.with_suffix(".py").exists():
                assert own <= layer(target), f"{name} imports {target}, which stands above it"


def test_no_import_circle():
    named = {
        ".".join(module.with_suffix("").parts).removesuffix(".__init__"): path for module, path in modules().items()
    }
    arrows = {}
    for name, path in named.items():
        targets = set()
        for imported, names in imported_modules(path):
            if imported.split(".")[0] == "flashmla_hf":
                inner = imported.removeprefix("flashmla_hf").removeprefix(".")
                # "from package import module" needs the module; the package of a module may import it, too.
                submodules = {f"{inner}.{x}".removeprefix(".") for x in names} & named.keys()
                targets |= submodules or {inner}
        arrows[name] = targets
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name in arrows and name not in done:
            for target in arrows[name] - {name}:
                visit(target, [*path, name])
            done.add(name)

    for name in arrows:
        visit(name, [])


@pytest.mark.parametrize("module", modules(), ids=str)
def test_only_the_integration_layer_imports_transformers(module):
    imports = {imported.split(".")[0] for imported, _ in imported_modules(modules()[module])}
    parts = module.with_suffix("").parts
    assert "transformers" not in imports or {parts[0], ".".join(parts)} & MAY_IMPORT_TRANSFORMERS


KERNELS = [
    path
    for backend in ("cpu", "sm90")
    for path in sorted((ROOT / "csrc" / backend).rglob("*"))
    if path.suffix in {".h", ".inc", ".cpp", ".cu", ".cuh"}
]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_include_no_torch_headers(path):
    assert not re.findall(r"#include\s*[<\"](?:torch|ATen|c10)/", path.read_text())


# The modules beside the package itself that programs may use: what they train, plan and measure with.
PUBLIC_MODULES = ("flashmla_hf.training", "flashmla_hf.fp8", "flashmla_hf.host_memory", "flashmla_hf.nvidia_smi")


@pytest.mark.parametrize("directory", ["scripts", "benchmarks"])
def test_scripts_use_public_names_only(directory):
    for path in sorted((ROOT / directory).glob("*.py")):
        for imported, names in imported_modules(path):
            if imported.split(".")[0] == "flashmla_hf":
                is_public = imported == "flashmla_hf" or imported.startswith(PUBLIC_MODULES)
                assert is_public, f"{path.name} reaches into {imported}"
                assert not any(name.startswith("_") and not name.startswith("__") for name in names)


def test_no_file_is_named_utils_common_helpers_or_misc():
    forbidden = {"utils", "util", "common", "helpers", "misc"}
    for directory in ("flashmla_hf", "csrc", "scripts", "benchmarks", "tests"):
        for path in (ROOT / directory).rglob("*"):
            assert path.stem not in forbidden, path
