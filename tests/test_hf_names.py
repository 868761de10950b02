"""The name shaped like a hub kernel's passes the checks of Transformers, its server, accelerate and DeepSpeed; models that
choose a class; registration that fails, and registration by many threads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import forked_python
import hf_support
import pytest
import torch
import transformers
from counting import counted_calls
from hf_support import DEVICE, SHAPED, build_causal_lm, close, kernel_calls, random_ids
from transformers import modeling_utils
from transformers.integrations import hub_kernels
from transformers.utils.generic import is_flash_attention_requested

import flashmla_hf
from flashmla_hf import notices
from flashmla_hf.hf import check, names

pytestmark = [
    hf_support.needs_kernel,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # the paged| prefix after 5.17
]
ROOT = Path(__file__).parent.parent


@pytest.fixture(params=[False, True], ids=["without kernels", "with kernels"])
def no_hub(request, monkeypatch):
    """Any look at the hub fails the test, whether the package ``kernels`` is installed or not."""

    def download(*args, **kwargs):
        raise AssertionError(f"a kernel is looked up on the hub: {args} {kwargs}")

    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *args, **kwargs: request.param)
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda *args, **kwargs: request.param, raising=False)
    for name in ("get_kernel", "load_and_register_attn_kernel"):
        monkeypatch.setattr(hub_kernels, name, download)


def test_the_shaped_name_has_the_shape_that_others_look_for():
    assert names.KERNEL_NAME == SHAPED
    assert hub_kernels.is_kernel(SHAPED)
    assert is_flash_attention_requested(requested_attention_implementation=SHAPED, version=3)
    assert not hub_kernels.is_kernel("flashmla")


def test_the_hub_is_asked_for_names_of_others_only(no_hub):
    with pytest.raises(AssertionError, match="looked up"):
        build_causal_lm("somebody/flash-attn3")
    build_causal_lm(SHAPED)


def test_every_route_takes_the_shaped_name_without_a_look_at_the_hub(no_hub, tmp_path):
    x = random_ids(2, 9)
    eager = build_causal_lm("eager")
    eager.save_pretrained(tmp_path)
    switched = build_causal_lm("eager")
    switched.set_attn_implementation(SHAPED)
    load = transformers.AutoModelForCausalLM.from_pretrained
    routes = [
        build_causal_lm(SHAPED), switched, load(tmp_path, attn_implementation=SHAPED), load(tmp_path, attn_implementation={"": SHAPED}),
        transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation=SHAPED)
        ),
    ]  # fmt: skip
    for model in routes:
        assert model.config._attn_implementation == SHAPED
        model.to(DEVICE).eval().load_state_dict(eager.state_dict())
        with counted_calls() as calls, torch.no_grad():
            assert close(model(x).logits, eager(x).logits)
        assert kernel_calls(calls) == 2
        assert flashmla_hf.check(model)
    paged = build_causal_lm("eager")
    paged.set_attn_implementation(f"paged|{SHAPED}")
    assert paged.config._attn_implementation.removeprefix("paged|") == SHAPED


def test_a_saved_model_holds_no_name(tmp_path):
    build_causal_lm(SHAPED).save_pretrained(tmp_path)
    assert "flash" not in (tmp_path / "config.json").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.filterwarnings("ignore:flashmla. attention layers of MiniMax")
def test_models_that_list_their_kernels_take_the_shaped_name(no_hub):
    """GPT-OSS and its kin replace other flash names by a kernel from the hub."""
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if "_compatible_flash_implementations = [" not in path.read_text():
            continue
        module = __import__(f"transformers.models.{path.parent.name}.{path.stem}", fromlist=["x"])
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__dict__.get("_compatible_flash_implementations"):
                bare = cls.__new__(cls)
                torch.nn.Module.__init__(bare)
                bare.config = transformers.LlamaConfig()
                chosen = cls._check_and_adjust_attn_implementation(bare, SHAPED)
                assert chosen in (SHAPED, "eager"), cls  # eager: MiniMax-M3 selects keys
                found.append((cls.__name__, chosen))
    assert ("GptOssPreTrainedModel", SHAPED) in found


# ---- Checks of other packages ------------------------------------------------------------------------------------------


def test_transformers_serve_takes_the_shaped_name_only():
    manager = pytest.importorskip("transformers.cli.serving.model_manager")
    assert manager.ModelManager(attn_implementation=SHAPED).attn_implementation == SHAPED
    with pytest.raises(ValueError, match="Unsupported attention implementation: 'flashmla'"):
        manager.ModelManager(attn_implementation="flashmla")


def test_accelerates_sequence_parallelism_takes_the_shaped_name_only():
    config = pytest.importorskip("accelerate.utils").DeepSpeedSequenceParallelConfig
    assert config(sp_seq_length_is_variable=True, sp_attn_implementation=SHAPED).sp_attn_implementation == SHAPED
    with pytest.raises(ValueError, match="Invalid sp_attn_implementation: flashmla"):
        config(sp_seq_length_is_variable=True, sp_attn_implementation="flashmla")


ULYSSES = """
    import os, sys, torch
    rank = int(sys.argv[1])
    os.environ.update(RANK=sys.argv[1], LOCAL_RANK=sys.argv[1], WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=sys.argv[2], DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    import flashmla_hf, transformers, deepspeed
    # DeepSpeed compiles a shared-memory operator at this point; gloo does without.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    def build(implementation):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                          num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
        return transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation)

    eager, ours = build("eager"), build("flashmla/flash-attn3")
    torch.manual_seed(1)
    x, part = torch.randint(3, 90, (1, 16)), slice(rank * 8, rank * 8 + 8)
    rows = [torch.arange(16)[None], torch.cat([torch.arange(6), torch.arange(10)])[None]]  # one sequence, two packed
    want = []
    for positions in rows:
        logits = eager(x, position_ids=positions, use_cache=False).logits
        eager.zero_grad()
        logits.square().sum().backward()
        want.append((logits.detach(), eager.model.embed_tokens.weight.grad.clone()))
    UlyssesSPAttentionHF.register_with_transformers(ours, "flashmla/flash-attn3", 2, 1, seq_length_is_variable=True)
    for positions, (logits, gradient) in zip(rows, want):
        ours.zero_grad()
        got = ours(x[:, part], position_ids=positions[:, part], use_cache=False).logits
        got.square().sum().backward()
        total = ours.model.embed_tokens.weight.grad
        torch.distributed.all_reduce(total)
        torch.testing.assert_close(got.detach(), logits[:, part], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(total, gradient, atol=1e-3 * float(gradient.abs().max()), rtol=1e-3)
    print("equal", flush=True)
    os._exit(0)
"""


def test_deepspeeds_ulysses_attention_calls_ours():
    """Two processes hold half of a sequence each; logits and gradients are those of eager on all of it."""
    if DEVICE.type != "cpu":
        pytest.skip("runs its processes on the CPU")
    pytest.importorskip("einops")
    pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [start(ULYSSES, str(rank), port) for rank in range(2)]
    outs = [process.communicate(timeout=240) for process in processes]
    assert [out.split()[-1:] for out, _ in outs] == [["equal"]] * 2, outs[0][1] + outs[1][1]


def start(script: str, *arguments: str, **environment) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def forked(script: str, folder: Path) -> tuple[str, str]:
    """Standard output and error of ``script``, in a fork that has torch's modules."""
    return forked_python.Process(textwrap.dedent(script), folder, [str(ROOT)], dict(os.environ)).output()


# ---- models that choose a class, and submodels ---------------------------------------------------------------------


@pytest.mark.parametrize("name", names.NAMES)
def test_sam_chooses_its_own_class_and_stays_exact(name):
    config = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
        "output_channels": 16, "num_pos_feats": 8, "mlp_dim": 96, "window_size": 2, "global_attn_indexes": [1],
        "initializer_range": 0.3,
    }  # fmt: skip
    built = []
    for implementation in ("eager", name):
        torch.manual_seed(0)
        cls = transformers.SamVisionModel
        built.append(
            cls._from_config(transformers.SamVisionConfig(**config), attn_implementation=implementation).eval()
        )
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert close(built[1](pixels).last_hidden_state, built[0](pixels).last_hidden_state)
    assert not flashmla_hf.check(built[1])


def test_a_submodel_that_computes_attention_itself_goes_to_eager_when_its_model_is_switched():
    """``set_attn_implementation`` asks submodels through another method than the model itself."""
    bloom = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    inner = transformers.BloomForCausalLM._from_config(bloom, attn_implementation="eager")
    notices._warned.clear()
    with pytest.warns(UserWarning, match="compute attention by themselves"):
        assert inner.get_correct_attn_implementation("flashmla") == "eager"


# ---- registration --------------------------------------------------------------------------------------------------

FAILED = """
    import sys, torch, warnings
    warnings.simplefilter("ignore")
    sys.modules["flashmla_hf.hf.register"] = None  # any import of it fails
    import flashmla_hf, transformers
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.set_attn_implementation(attn_implementation="eager")

    def built(name):
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name)

    def switched(name):
        model.set_attn_implementation(name)

    def by_part(name):
        model.set_attn_implementation({"": name})

    for ask in (built, switched, by_part):
        for name in ("flashmla", "fmla", "flashmla/flash-attn3"):
            try:
                ask(name)
            except ImportError as error:
                print(type(error.__cause__).__name__, "did not register" in str(error), "sdpa" in str(error))
"""


def test_a_name_that_could_not_be_registered_raises_with_the_reason(tmp_path):
    out, errors = forked(FAILED, tmp_path)
    assert out.splitlines() == ["ModuleNotFoundError True True"] * 9, errors


THREADS = """
    import sys, threading, torch
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    go, results = threading.Barrier(8), []

    def work(number):
        go.wait()
        import flashmla_hf
        flashmla_hf.register()
        import transformers
        name = ("flashmla", "fmla", "flashmla/flash-attn3")[number % 3]
        def build(cls, implementation, **options):
            config = getattr(transformers, cls + "Config")(vocab_size=96, hidden_size=64, num_hidden_layers=2,
                                                           num_attention_heads=4, **options)
            return getattr(transformers, cls + "ForCausalLM")._from_config(config, attn_implementation=implementation)
        for cls, options in (("Llama", {"intermediate_size": 96}), ("Falcon", {})):
            eager, ours = build(cls, "eager", **options).eval(), build(cls, name, **options).eval()
            ours.load_state_dict(eager.state_dict())
            x, mask = torch.randint(3, 90, (2, 12)), torch.ones(2, 12, dtype=torch.long)
            mask[0, :number] = 0
            with torch.no_grad():
                got, want = (m(x, attention_mask=mask).logits * mask[..., None] for m in (ours, eager))
            assert (got - want).abs().max() < 1e-3, (name, cls)
        results.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    print(sorted(results))
"""


def test_a_modules_classes_are_found_while_names_are_added_to_it(monkeypatch):
    """As another thread does that loads a model; here looking at a class does it."""
    module = types.ModuleType("a_module_that_grows")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Grows(type):
        @property
        def __module__(cls):
            setattr(module, f"added_{len(vars(module))}", None)
            return module.__name__

    layers = {f"Attention{n}": Grows(f"Attention{n}", (torch.nn.Module,), {}) for n in range(20)}
    vars(module).update(layers)
    assert check._attention_classes(module.__name__) == list(layers.values())


def test_eight_threads_import_register_and_run_their_first_forward_at_once(tmp_path):
    if DEVICE.type != "cpu":
        pytest.skip("runs on the CPU")
    out, errors = forked(THREADS, tmp_path)
    assert out.split("\n")[-2:-1] == [str(list(range(8)))], errors
