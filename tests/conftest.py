"""Settings and fixtures that test files share, and the packages that each of them needs.

Hypothesis judges results, not how long a busy machine took; waiting threads do not spin.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings

# Read by OpenMP when torch is imported. Spinning threads make tests ten times slower where something else runs too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The processes of pytest-xdist share the cores, and so do the programs that their tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

# Before anything imports them: their assertions explain themselves as those of test files do.
SUPPORT = ("build", "cpu", "gpu_robust", "measure", "patches", "sm90", "training")
pytest.register_assert_rewrite("fresh_python", "forked_python", *(f"{name}_support" for name in SUPPORT))
ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Packages that test files import at their top, beside torch and what the tests alone need. A file is skipped without them.
NEEDS = {
    "test_hf_*.py": ("transformers",),
    "test_model_sweep.py": ("transformers",),
    "test_patches*.py": ("transformers",),
    "test_patches_lora.py": ("peft",),
    "test_patches_misuse.py": ("peft",),
    "test_patches_weights.py": ("accelerate",),
    "test_sharded_*.py": ("transformers", "peft"),
    "test_benchmark*.py": ("transformers", "matplotlib"),
    "test_bench_distributed.py": ("transformers", "accelerate", "peft", "matplotlib"),
    "test_readme.py": ("transformers", "matplotlib"),
    "test_finetune_gpu.py": ("transformers",),
    "test_examples.py": ("transformers", "accelerate", "datasets", "peft"),
    **dict.fromkeys(
        ("test_commands.py", "test_context_quality.py", "test_demo.py", "test_finetune.py", "test_finetune_mistakes.py",
         "test_finetune_resume.py", "test_ledger.py", "test_max_length.py", "test_documentation.py", "test_memory_report.py",
         "test_saved_models.py", "test_training_data.py", "test_engines.py", "test_ulysses.py", "test_launch.py"),
        ("transformers", "accelerate", "peft", "matplotlib"),
    ),
}  # fmt: skip


class FileWithoutItsPackages(pytest.Module):
    """A test file that is skipped before it is imported."""

    def collect(self):
        raise pytest.skip.Exception(f"not installed: {', '.join(_missing_packages(self.path))}")


def _missing_packages(path: Path) -> list[str]:
    needed = (name for pattern, names in NEEDS.items() if fnmatch(path.name, pattern) for name in names)
    return [name for name in dict.fromkeys(needed) if importlib.util.find_spec(name) is None]


def pytest_pycollect_makemodule(module_path, parent):
    return FileWithoutItsPackages.from_parent(parent, path=module_path) if _missing_packages(module_path) else None


def pytest_collection_finish():
    """Takes what imports made, millions of objects, out of the garbage collector's sight: a full collection, of which
    benchmarks make one before each measurement, then takes milliseconds instead of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _compilers_are_left_as_they_were():
    """A setting of torch's compilers that a file leaves behind changes what the tests of the next one compile."""
    yield
    for name in ("torch._functorch.config", "torch._dynamo.config"):
        config = sys.modules.get(name)
        if config is not None:
            changed = {
                key: value for key, value in config.get_config_copy().items() if value != config._config[key].default
            }
            assert not changed, f"{name} is left changed: {changed}"


@pytest.fixture(scope="module")
def recompile_limit_is_put_back():
    """Models of Transformers 5.17 set it."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield


# ---- Training: the tiny model, its corpus, accelerate's state --------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random two-layer Llama and a byte tokenizer; weights large enough for wrong attention to show."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the quick brown fox"], vocab_size=300, special_tokens=["<end>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>").save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=304,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of documents of very different length."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        words = [("alpha", "beta", "gamma", "delta")[(i + j) % 4] for j in range(10 + 40 * (i % 4))]
        (folder / f"{i:02}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture
def fresh_accelerate_state():
    """accelerate remembers mixed precision per process; each run here stands for a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


# ---- The build -------------------------------------------------------------------------------------------------------


@pytest.fixture
def build(monkeypatch):
    """What setup.py builds with (csrc/flashmla_build), and none of its settings in the environment."""
    import build_support

    for name in build_support.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    from flashmla_build import compiling, environment, sources, terminal, toolchain

    terminal.hidden_terminal.cache_clear()
    return SimpleNamespace(
        compiling=compiling, environment=environment, sources=sources, terminal=terminal, toolchain=toolchain
    )


@pytest.fixture
def package(tmp_path):
    """A package of two small sources, with a stand-in for nvcc."""
    import build_support

    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return build_support.Package(tmp_path)


@pytest.fixture
def headers(monkeypatch):
    """csrc/check_headers.py as a module."""
    import build_support

    monkeypatch.syspath_prepend(str(ROOT))
    return build_support.load(ROOT / "csrc/check_headers.py")


# ---- The error rule --------------------------------------------------------------------------------------------------

# How often the error rule needed its second look (tests/numerics.py), in this process and in those of pytest-xdist.


def _looks():
    numerics = sys.modules.get("numerics")  # not imported: nothing was judged
    return None if numerics is None else numerics.looks


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput") and _looks() is not None:
        session.config.workeroutput["looks"] = dataclasses.astuple(_looks())


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_testnodedown(node, error):
    if "looks" in getattr(node, "workeroutput", {}):
        import numerics

        numerics.looks = numerics.looks + numerics.Looks(*node.workeroutput["looks"])


def pytest_terminal_summary(terminalreporter):
    if _looks() is not None and _looks().calls:
        terminalreporter.write_line(str(_looks()))
