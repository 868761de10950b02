"""Every way to ask for the attention, what is refused, what is reported, and registration without an import."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import families
import forked_python
import fresh_python
import hf_support
import pytest
import torch
import transformers
from counting import counted_calls
from families import FAMILY
from hf_support import DEVICE, close, kernel_calls, needs_kernel

import flashmla_hf
from flashmla_hf import notices

ROOT = Path(__file__).parent.parent


def tiny_llama(attn_implementation="flashmla"):
    return families.build(FAMILY["Llama"], attn_implementation, DEVICE)


def uses_kernel(model, **batch) -> bool:
    batch = batch or {"input_ids": torch.arange(3, 15, device=DEVICE)[None]}
    with counted_calls() as calls, torch.no_grad():
        model(**batch)
    return kernel_calls(calls) > 0 and kernel_calls(calls) == sum(calls.values())


@needs_kernel
def test_every_route_to_the_implementation_reaches_the_kernel(tmp_path):
    model = tiny_llama("eager")
    assert not uses_kernel(model)
    model.save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert uses_kernel(load(tmp_path, attn_implementation="flashmla").to(DEVICE))
    assert uses_kernel(load(tmp_path, attn_implementation="fmla").to(DEVICE))
    assert uses_kernel(load(tmp_path, attn_implementation={"": "flashmla"}).to(DEVICE))
    assert not uses_kernel(load(tmp_path).to(DEVICE)), "the implementation is not saved with the model"
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert uses_kernel(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="flashmla").to(DEVICE))
    config = transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation="flashmla")
    assert uses_kernel(transformers.AutoModelForCausalLM.from_config(config).to(DEVICE))
    model.set_attn_implementation("flashmla")
    assert uses_kernel(model)
    model.set_attn_implementation("eager")
    assert not uses_kernel(model)


@needs_kernel
def test_a_submodel_can_be_chosen_by_a_dictionary():
    family = FAMILY["Qwen2-VL"]
    model = families.build(family, "eager", DEVICE)
    batch = families.inputs(family, "none", DEVICE)
    want = model(**batch).logits
    for chosen in ({"text_config": "flashmla"}, {"vision_config": "flashmla", "text_config": "eager"}):
        model.set_attn_implementation(chosen)
        with counted_calls() as calls, torch.no_grad():
            got = model(**batch).logits
        assert kernel_calls(calls) == 2
        assert close(got, want)


def test_register_twice_changes_nothing():
    from transformers import modeling_flash_attention_utils, modeling_utils

    before = (
        modeling_flash_attention_utils._lazy_imports,
        modeling_utils.PreTrainedModel._check_and_adjust_attn_implementation,
    )
    flashmla_hf.register()
    after = (
        modeling_flash_attention_utils._lazy_imports,
        modeling_utils.PreTrainedModel._check_and_adjust_attn_implementation,
    )
    assert before == after
    assert not hasattr(before[0]._flashmla_wraps, "_flashmla_wraps")


def test_other_flash_names_still_go_to_transformers():
    with pytest.raises((ImportError, ValueError)):
        tiny_llama("flash_attention_3")
    with pytest.raises(ValueError, match="not supported"):
        tiny_llama("flashmla2")


def test_an_unknown_argument_raises_with_the_models_and_the_arguments_name():
    model = tiny_llama()
    ids = torch.arange(3, 15, device=DEVICE)[None]
    with pytest.raises(
        ValueError, match=r"LlamaAttention of model type 'llama' passed an unsupported argument 'indices'"
    ):
        model(ids, indices=torch.zeros(1, device=DEVICE))
    with pytest.raises(ValueError, match="block_indices"):
        model(ids, block_indices=torch.zeros(1, device=DEVICE))


def test_a_mask_of_three_dimensions_raises():
    from flashmla_hf.hf import forward

    x = torch.randn(1, 2, 4, 8, device=DEVICE)
    with pytest.raises(ValueError, match="attention_mask: expected None or 2 or 4 dimensions, got 3"):
        forward.attention_forward(torch.nn.Module(), x, x, x, torch.ones(1, 4, 4, device=DEVICE))
    with pytest.raises(ValueError, match=r"attention_mask: expected None or 2 or 4 dimensions, got 3: \[1, 12, 12\]"):
        tiny_llama()(torch.arange(3, 15, device=DEVICE)[None], attention_mask=torch.ones(1, 12, 12, device=DEVICE))


@pytest.mark.parametrize("given", ["cu_seq_lens_q", "cu_seq_lens_k"])
def test_half_of_the_boundaries_raises(given):
    missing = {"cu_seq_lens_q": "cu_seq_lens_k", "cu_seq_lens_k": "cu_seq_lens_q"}[given]
    boundaries = torch.tensor([0, 5, 12], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=f"{missing}: expected a tensor, since {given} is given"):
        tiny_llama()(torch.arange(3, 15, device=DEVICE)[None], **{given: boundaries})


def test_lists_of_compatible_kernels_get_our_name_also_for_classes_defined_later():
    GptOss = transformers.GptOssForCausalLM

    class DefinedLater(GptOss):
        _compatible_flash_implementations = ["somebody/kernel"]  # noqa: RUF012

    model = DefinedLater._from_config(FAMILY["GPT-OSS"].config(), attn_implementation="flashmla")
    assert model.config._attn_implementation == "flashmla"
    assert DefinedLater._compatible_flash_implementations == ["somebody/kernel", "flashmla", "flashmla_fp8"]


def bloom(attn_implementation="flashmla"):
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM._from_config(config, attn_implementation=attn_implementation)


def test_a_model_that_never_asks_for_an_implementation_warns_at_load(monkeypatch):

    monkeypatch.setattr(notices, "_warned", set())
    with pytest.warns(UserWarning, match="BloomForCausalLM compute attention by themselves"):
        bloom()
    monkeypatch.setattr(notices, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_llama()
        bloom("eager")


BIG_BIRD = {**families.BART, "attention_type": "original_full"}
GPT_NEO = {
    "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48, "window_size": 6,
    "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128,
}  # fmt: skip
OWN_ATTENTION = {
    "Bloom": ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "MPT": ("MptForCausalLM", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "GPTNeo": ("GPTNeoForCausalLM", GPT_NEO),
    "BigBirdPegasus": ("BigBirdPegasusForConditionalGeneration", BIG_BIRD),
}


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_with_attention_of_their_own_stay_exact(name):
    """Under our masks, which are not made for them, Bloom is silently not causal, BigBird-Pegasus silently wrong. CodeGen
    calls us from Transformers 5.24 on."""
    model, options = OWN_ATTENTION[name]
    config = getattr(transformers, {"MPT": "MptConfig"}.get(name, f"{name}Config"))
    built = []
    for implementation in ("eager", "flashmla"):
        cls = getattr(transformers, model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built.append(cls._from_config(config(**options), attn_implementation=implementation))
    eager, ours = (m.to(DEVICE).eval() for m in built)
    families._spread(eager)
    ours.load_state_dict(eager.state_dict())
    family = families.Family(name, model, None, inputs="seq2seq" if name == "BigBirdPegasus" else "text")
    asks_us = bool(flashmla_hf.check(ours))
    assert asks_us == (name == "CodeGen" and "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(ours).__module__]))
    for padding in ("none", "left"):
        batch = families.inputs(family, padding, DEVICE)
        shown = batch["attention_mask"][..., None] if asks_us else 1
        with torch.no_grad():
            got, want = (m(**batch).logits * shown for m in (ours, eager))
        assert close(got, want) if asks_us else torch.equal(got, want)
    ids = batch["input_ids"][:, :4]
    if family.inputs == "text":
        assert close(ours(ids).logits, eager(ids).logits)


def test_check_tells_which_layers_use_the_kernel_and_why_not():
    report = flashmla_hf.check(tiny_llama())
    assert report
    assert [layer.name for layer in report.layers] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert "2 of 2 attention layers use the flashmla kernel" in str(report)

    report = flashmla_hf.check(tiny_llama("sdpa"))
    assert not report
    assert "its attn_implementation is 'sdpa'" in str(report)

    report = flashmla_hf.check(bloom())
    assert not report
    assert "0 of 2" in str(report)
    assert "2 x BloomAttention" in str(report)
    assert "computes attention by itself" in str(report)

    report = flashmla_hf.check(families.build(FAMILY["T5"], "flashmla", DEVICE))
    assert not report
    assert "position_bias" in str(report)

    for name, layers in (("BERT", 2), ("BART", 6), ("Qwen2-VL", 4), ("Falcon", 2), ("GPT-2", 2), ("DeepSeek-V3", 2)):
        report = flashmla_hf.check(families.build(FAMILY[name], "flashmla", DEVICE))
        assert report, str(report)
        assert len(report.layers) == layers, str(report)


def test_active_context_parallelism_raises(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.experimental import context_parallel

    from flashmla_hf.hf import forward

    if not dist.is_available():
        pytest.skip("torch without distributed")
    model, ids = tiny_llama().cpu(), torch.arange(3, 15)[None]
    if DEVICE.type != "cpu":
        pytest.skip("needs a process group on the CPU")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        with (
            context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]),
            pytest.raises(NotImplementedError, match="sdpa"),
        ):
            model(ids)
        with torch.no_grad():
            if hf_support.is_built():
                model(ids)  # and not afterwards
        x = DTensor.from_local(torch.randn(1, 2, 4, 8), mesh, [Replicate()])
        with pytest.raises(NotImplementedError, match="DTensor"):
            forward.attention_forward(torch.nn.Module(), x, x, x)
    finally:
        dist.destroy_process_group()


def _run(script: str, tmp_path, is_fresh: bool = False, **environment) -> str:
    """Runs a script that never imports this package, with its entry point installed (as a .dist-info of its own). ``is_fresh``:
    in a process of its own, otherwise in a fork that imports all but torch (forked_python.py); with a GPU always in its own."""
    path = [fresh_python.entry_point_folder(tmp_path), str(ROOT)]
    env = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"} | environment
    script = textwrap.dedent(script)
    if is_fresh or DEVICE.type != "cpu":
        env["PYTHONPATH"] = os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        code, said, errors = done.returncode, done.stdout, done.stderr
    else:
        process = forked_python.Process(script, tmp_path, path, env)
        code, (said, errors) = process.wait(), process.output()
    assert code == 0, errors
    return said


LOAD = """
    import torch, sys, warnings
    warnings.simplefilter("error")
    from transformers import AutoModelForCausalLM, LlamaConfig
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1)

    def load():
        try:
            AutoModelForCausalLM.from_config(config, attn_implementation="flashmla")
            return "loaded"
        except ValueError as error:
            return "unknown" if "is not supported" in str(error) else error

    print(load(), any("flashmla_hf" in type(finder).__module__ for finder in sys.meta_path))
"""


def test_a_script_that_never_imports_us_can_name_us(tmp_path):
    assert _run(LOAD, tmp_path, True).split() == ["loaded", "False"], "loaded, and the import hook is gone"


def test_autoload_can_be_turned_off_and_an_import_still_registers(tmp_path):
    late = textwrap.dedent(LOAD) + "import flashmla_hf\nprint(load())"
    assert _run(late, tmp_path, FLASHMLA_AUTOLOAD="0").split() == ["unknown", "False", "loaded"]
    early = "from flashmla_hf.dispatch import attention\nimport torch, flashmla_hf\n" + textwrap.dedent(LOAD)
    assert _run(early, tmp_path, FLASHMLA_AUTOLOAD="0").split() == ["loaded", "False"]


@pytest.mark.any_release
@pytest.mark.parametrize("switch", ["0", "1"])
@pytest.mark.parametrize("first", ["import torch", "import flashmla_hf", "from flashmla_hf.dispatch import attention"])
def test_any_order_of_imports_works(tmp_path, first, switch):
    script = f"{first}\nimport torch, flashmla_hf\nfrom flashmla_hf import attention\nprint(callable(attention))"
    assert _run(script, tmp_path, switch == "1", FLASHMLA_AUTOLOAD=switch).split() == ["True"]


@pytest.mark.parametrize(
    "first",
    [
        "import transformers.modeling_utils",
        "from transformers import PreTrainedModel",
        "from transformers import AttentionInterface",
        "from transformers import Trainer",
        "from transformers import AutoModelForCausalLM",
        "from transformers import pipeline",
        "import transformers.modeling_outputs, transformers.modeling_utils",
        "import accelerate",
        "import peft",
    ],
)
def test_whatever_a_program_imports_first_our_names_are_known(first, tmp_path):
    # One that torch's import ends in, and one whose module is being imported by then; the fork is compared with them.
    is_fresh = first in ("import transformers.modeling_utils", "from transformers import Trainer")
    for fresh in {is_fresh, False}:
        assert _run(f"{first}\n{textwrap.dedent(LOAD)}", tmp_path, fresh).split() == ["loaded", "False"]


@pytest.mark.parametrize("module", ["patches.linear", "hf.masks", "hf.register", "training.model"])
def test_a_module_of_ours_that_imports_transformers_may_come_first(tmp_path, module):
    script = f"""
    import flashmla_hf.{module}
    from transformers import AttentionInterface
    print("flashmla" in AttentionInterface().valid_keys())
    """
    assert _run(
        f"import warnings\nwarnings.simplefilter('error', UserWarning)\n{textwrap.dedent(script)}", tmp_path
    ).split() == ["True"]


def test_an_import_of_transformers_that_fails_may_be_tried_again(tmp_path):
    """The first try fails after torch was imported by it, the second one registers."""
    first = """
    import sys
    sys.modules["safetensors.torch"] = None
    try:
        import transformers.modeling_utils
    except ImportError:
        print("failed")
    del sys.modules["safetensors.torch"]
    """
    assert _run(textwrap.dedent(first) + textwrap.dedent(LOAD), tmp_path).split() == ["failed", "loaded", "False"]


@pytest.mark.any_release
def test_import_torch_loads_nothing_of_us_but_the_hook(tmp_path):
    out = _run(
        """
        import sys, torch
        print(sorted(name for name in sys.modules if name.startswith(("flashmla_hf", "transformers"))))
        print(any("flashmla_hf" in type(finder).__module__ for finder in sys.meta_path))
        """,
        tmp_path,
        is_fresh=True,
    )
    assert out.splitlines() == ["['flashmla_hf', 'flashmla_hf.autoload']", "True"]


def test_a_failure_to_register_does_not_break_transformers(tmp_path):
    out = _run(
        """
        import sys, torch
        sys.modules["flashmla_hf.hf.register"] = None  # any import of it fails
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import transformers.modeling_utils
        print([w for w in caught if "did not register" in str(w.message)] != [])
        """,
        tmp_path,
    )
    assert "True" in out


@pytest.mark.any_release
def test_without_transformers_the_import_does_nothing(tmp_path):
    out = _run(
        """
        import sys
        sys.modules["transformers"] = None  # as if it were not installed
        import flashmla_hf, torch
        q = torch.randn(1, 4, 2, 8)
        print(flashmla_hf.attention(q, q, q, impl="reference").shape)
        from flashmla_hf import attention, flash_attn_func, flash_attn_varlen_func, __version__
        print(callable(attention))
        """,
        tmp_path,
    )
    assert "True" in out


@pytest.mark.parametrize("what", ["tiny", None])
def test_check_of_what_is_no_model_says_so(what):
    with pytest.raises(TypeError) as error:
        flashmla_hf.check(what)
    assert str(error.value) == f"check: model: expected a torch.nn.Module, got {type(what).__name__}; load it first"
