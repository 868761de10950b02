"""The way past torch's dispatcher (csrc/direct/direct.cpp): it gives what the operators give, bit for bit, and stands back
wherever somebody watches, a tensor is not what it seems, or something is wrong."""

import contextlib
import subprocess
import sys

import gpu_support
import numpy
import pytest
import torch
from cases import CASES, Case
from numerics import run
from operator_names import OperatorNames
from torch.overrides import TorchFunctionMode

from flashmla_hf import attention, direct, libraries

pytestmark = pytest.mark.skipif(not direct.enabled, reason=str(libraries.unavailable.get("direct")))

ON_GPU = pytest.param(
    "cuda", marks=pytest.mark.skipif(gpu_support.sm90_missing() is not None, reason=str(gpu_support.sm90_missing()))
)
on_each_device = pytest.mark.parametrize("device", ["cpu", ON_GPU])
CASE = Case(batch=2, seqlen_q=40, heads_q=4, heads_kv=2, head_dim_qk=64, is_causal=True, has_sinks=True)


class Spy:
    """In the module's place: which of its functions computed something."""

    def __init__(self, module):
        self.module, self.done = module, []

    def __getattr__(self, name):
        def call(*arguments):
            result = getattr(self.module, name)(*arguments)
            if result is not None:
                self.done.append(name)
            return result

        return call


@pytest.fixture
def spy(monkeypatch):
    module = Spy(direct.module)
    monkeypatch.setattr(direct, "module", module)
    return module


@contextlib.contextmanager
def by_the_operator():
    direct.enabled = False
    try:
        yield
    finally:
        direct.enabled = True


def tensors(device="cpu", dtype=torch.bfloat16, requires_grad=False, case=CASE):
    t = case.inputs(dtype, device)
    leaves = {"q": t.q, "k": t.k, "v": t.v, "sinks": t.sinks}
    return {name: x.detach().clone().requires_grad_(requires_grad) for name, x in leaves.items()}


def deterministic(**arguments):
    return attention(**arguments, deterministic=True)


def assert_same(mine, other):
    for name, x in mine.tensors.items():
        torch.testing.assert_close(
            x, other.tensors[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- What it computes ------------------------------------------------------------------------------------------------


# On a GPU those that sm90 computes.
EVERY_CASE = [pytest.param(case, "cpu", id=f"{case.name}-cpu") for case in CASES]
EVERY_CASE += [
    pytest.param(case, *ON_GPU.values, marks=ON_GPU.marks, id=f"{case.name}-cuda") for case in CASES if case.sm90_row
]


@pytest.mark.parametrize(("case", "device"), EVERY_CASE)
def test_direct_calls_equal_the_operators_bit_for_bit(case, device, spy):
    inputs = case.inputs(torch.bfloat16, device)
    mine = run(deterministic, case, inputs)
    assert spy.done == ["attend", "backward"]
    with by_the_operator():
        assert_same(mine, run(deterministic, case, inputs))


@on_each_device
@pytest.mark.parametrize("wants", [("q",), ("k",), ("v",), ("k", "v"), ("sinks",), ("q", "k", "v", "sinks")])
@pytest.mark.parametrize("flows", [("dout",), ("dlse",), ("dout", "dlse")], ids="+".join)
def test_gradients_of_every_subset(wants, flows, device, spy):
    inputs = CASE.inputs(torch.bfloat16, device)
    options = {"wants": wants, "has_dout": "dout" in flows, "has_dlse": "dlse" in flows}
    mine = run(deterministic, CASE, inputs, **options)
    assert spy.done == ["attend", "backward"]
    with by_the_operator():
        assert_same(mine, run(deterministic, CASE, inputs, **options))


@on_each_device
def test_a_call_without_gradients_gives_the_same_with_and_without_lse(device, spy):
    arguments = tensors(device)
    out = attention(**arguments, is_causal=True)
    out_too, lse = attention(**arguments, is_causal=True, return_lse=True)
    assert spy.done == ["attend", "attend"]
    assert torch.equal(out, out_too)
    assert lse.shape == (2, 4, 40)
    assert lse.dtype == torch.float32


@on_each_device
def test_parameters_are_computed_directly_with_and_without_gradients(device, spy):
    arguments = {name: torch.nn.Parameter(x) for name, x in tensors(device).items()}
    with torch.no_grad():
        out = attention(**arguments)
    assert spy.done == ["attend"]
    assert out.grad_fn is None
    assert attention(**arguments).grad_fn is not None
    assert spy.done == ["attend", "attend"]


@on_each_device
def test_an_explicit_implementation_is_that_or_refused(device, spy):
    arguments = tensors(device)
    attention(**arguments, impl={"cpu": "cpu", "cuda": "sm90"}[device])
    assert spy.done == ["attend"]
    attention(**arguments, impl="reference")
    assert spy.done == ["attend"]
    with pytest.raises(RuntimeError, match="cannot compute this call"):
        attention(**arguments, impl={"cpu": "sm90", "cuda": "cpu"}[device])
    with pytest.raises(ValueError, match="impl: expected one of"):
        attention(**arguments, impl="gpu")


# ---- Where it stands back --------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def negated(x):
    """A view that says it is -x."""
    return torch._neg_view(x)


NOT_PLAIN = {
    "subclass": lambda t: {**t, "k": t["k"].as_subclass(Subclass)},
    "negative view": lambda t: {**t, "k": negated(t["k"])},
    "float64": lambda t: {name: x.double() for name, x in t.items()},
    "half sinks": lambda t: {**t, "sinks": t["sinks"].bfloat16()},
    "numpy window": lambda t: {**t, "window": (numpy.int64(3), numpy.int64(0))},
    "list window": lambda t: {**t, "window": [3, 0]},
    "numpy scale": lambda t: {**t, "scale": numpy.float64(0.3)},
    "dropout 0.0": lambda t: {**t, "dropout_p": numpy.float64(0.0)},
    "attn_mask": lambda t: {**t, "attn_mask": torch.ones(40, 40, dtype=torch.bool)},
}


@pytest.mark.filterwarnings("ignore:flashmla attention. attn_mask")
@pytest.mark.parametrize("change", NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
def test_calls_that_are_not_plain_take_the_operators_and_are_right(change, spy):
    arguments = change(tensors(dtype=torch.float32))
    # By the reference the sinks come with float64.
    options = {"impl": "reference"} if arguments["q"].dtype == torch.float64 else {}
    out = attention(**arguments, **options)
    assert spy.done == []
    expected = attention(**{n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                            for n, x in arguments.items()}, impl="reference")  # fmt: skip
    torch.testing.assert_close(
        out.double().as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-5
    )


def profiler():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


@pytest.mark.parametrize("watch", [OperatorNames, SeesFunctions, profiler])
def test_torch_modes_see_the_operators_forward_and_backward(watch, spy):
    arguments = tensors(requires_grad=True)
    with watch() as watcher:
        attention(**arguments).float().sum().backward()
    # Of a function mode backward is one function; what is inside is not seen by it anyhow.
    assert spy.done == (["backward"] if watch is SeesFunctions else [])
    if watch is OperatorNames:
        assert {"flashmla::flash_attn_forward", "flashmla::flash_attn_backward"} <= set(watcher.names)
    if watch is profiler:
        names = {event.key for event in watcher.key_averages()}
        assert {"flashmla::flash_attn_forward", "flashmla::flash_attn_backward"} <= names


def test_a_mode_around_backward_alone_sees_the_operator(spy):
    out = attention(**tensors(requires_grad=True))
    with OperatorNames() as watcher:
        out.float().sum().backward()
    assert "flashmla::flash_attn_backward" in watcher.names
    assert "backward" not in spy.done


def test_torch_func_uses_the_operators(spy):
    q, k, v, _ = tensors(dtype=torch.float32).values()
    found = torch.func.grad(lambda q: attention(q, k, v).square().sum())(q)
    assert spy.done == []
    q.requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(attention(q, k, v).square().sum(), q)[0])


@pytest.mark.parametrize("name", ["q", "k", "v", "sinks"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused_and_not_dropped(name, requires_grad, spy):
    arguments = tensors(dtype=torch.float32, requires_grad=requires_grad)
    with torch.autograd.forward_ad.dual_level():
        x = arguments[name]
        dual = {**arguments, name: torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))}
        with pytest.raises(RuntimeError, match=f"flash_attn_forward: {name}: expected no tangent"):
            attention(**dual)
        assert attention(**arguments).shape == arguments["q"].shape
    assert spy.done == []


def test_batched_gradients_equal_a_loop_over_the_operators(spy):
    arguments = tensors(dtype=torch.float32, requires_grad=True)
    out = attention(**arguments)
    dout = torch.randn(3, *out.shape)
    with by_the_operator():
        expected = [torch.autograd.grad(out, arguments["q"], d, retain_graph=True)[0] for d in dout]
    (found,) = torch.autograd.grad(out, arguments["q"], dout, is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_gradient_of_zeros_without_memory(spy):
    arguments = tensors(dtype=torch.float32, requires_grad=True)
    out = attention(**arguments)
    with pytest.raises(RuntimeError, match="dout: expected a contiguous last dimension"):
        torch.autograd.grad(out, arguments["q"], torch._efficientzerotensor(out.shape))


@on_each_device
def test_gradients_of_unaligned_layouts_are_copied_first(device, spy):
    """A gradient that is expanded, transposed or unaligned."""
    arguments = tensors(device, requires_grad=True)
    out = deterministic(**arguments, is_causal=True)
    wide = torch.randn(*out.shape[:-1], 65, device=device).to(out.dtype)
    for dout in (torch.ones((), device=device, dtype=out.dtype).expand(out.shape), wide[..., 1:], wide[..., :64]):
        found = torch.autograd.grad(out, list(arguments.values()), dout, retain_graph=True)
        expected = torch.autograd.grad(out, list(arguments.values()), dout.contiguous(), retain_graph=True)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


def test_hooks_on_saved_tensors_may_hand_over_anything(spy):
    arguments = tensors(requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.as_subclass(Subclass)):
        out = attention(**arguments)
    found = torch.autograd.grad(out, list(arguments.values()), torch.ones_like(out))
    assert "backward" not in spy.done
    with by_the_operator():
        out = attention(**arguments)
        expected = torch.autograd.grad(out, list(arguments.values()), torch.ones_like(out))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.as_subclass(torch.Tensor), y)


def test_a_second_derivative_is_refused(spy):
    arguments = tensors(dtype=torch.float32, requires_grad=True)
    (dq,) = torch.autograd.grad(attention(**arguments).sum(), arguments["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attn_backward: has no derivative"):
        dq.sum().backward()


# ---- What is wrong ---------------------------------------------------------------------------------------------------


def shrunken(x):
    x = x.clone()
    x.untyped_storage().resize_(x.untyped_storage().nbytes() // 2)
    return x


WRONG = {
    "no tensor": lambda t: {**t, "q": [1.0, 2.0]},
    "none": lambda t: {**t, "k": None},
    "sparse": lambda t: {**t, "v": t["v"].to_sparse()},
    "too few dimensions": lambda t: {**t, "q": t["q"][0]},
    "too many dimensions": lambda t: {**t, "q": t["q"].reshape(2, 1, 1, 1, 1, 1, 1, 1, 1, 40, 4, 64)},
    "dtype": lambda t: {**t, "k": t["k"].half()},
    "integers": lambda t: {name: x.int() for name, x in t.items()},
    "heads": lambda t: {**t, "k": t["k"][:, :, :1].expand(-1, -1, 3, -1)},
    "batch": lambda t: {**t, "k": t["k"][:1]},
    "width": lambda t: {**t, "k": t["k"][..., :32]},
    "stride": lambda t: {**t, "q": t["q"].transpose(2, 3).contiguous().transpose(2, 3)},
    "storage": lambda t: {**t, "k": shrunken(t["k"])},
    "sinks": lambda t: {**t, "sinks": t["sinks"][:2]},
    "sinks, no tensor": lambda t: {**t, "sinks": 0.0},
    "scale": lambda t: {**t, "scale": float("nan")},
    "a huge scale": lambda t: {**t, "scale": 10**400},
    "scale, a bool": lambda t: {**t, "scale": True},
    "softcap": lambda t: {**t, "softcap": -1.0},
    "softcap, none": lambda t: {**t, "softcap": None},
    "dropout": lambda t: {**t, "dropout_p": 1.5},
    "window": lambda t: {**t, "window": (-2, 0)},
    "window, one": lambda t: {**t, "window": (1,)},
    "window, a float": lambda t: {**t, "window": (1.0, 0)},
    "window, a bool": lambda t: {**t, "window": (True, 0)},
    "max_seqlen": lambda t: {**t, "max_seqlen_q": 40},
    "cu_seqlens, a list": lambda t: {**t, "q": t["q"][0], "k": t["k"][0], "v": t["v"][0],
                                     "cu_seqlens_q": [0, 40], "cu_seqlens_kv": [0, 40]},
    "cu_seqlens, one": lambda t: {**t, "q": t["q"][0], "k": t["k"][0], "v": t["v"][0],
                                  "cu_seqlens_q": torch.tensor([0, 40], dtype=torch.int32)},
    "cu_seqlens, int64": lambda t: {**t, "q": t["q"][0], "k": t["k"][0], "v": t["v"][0],
                                    "cu_seqlens_q": torch.tensor([0, 40]), "cu_seqlens_kv": torch.tensor([0, 40])},
}  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_wrong_calls_are_refused_by_the_operators(change, requires_grad, spy):
    def failure():
        arguments = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in change(tensors()).items()}
        if requires_grad and isinstance(arguments["v"], torch.Tensor) and arguments["v"].is_floating_point():
            arguments["v"].requires_grad_()
        with pytest.raises(Exception) as error:
            attention(**arguments)
        return type(error.value), str(error.value)

    mine = failure()
    assert spy.done == []
    with by_the_operator():
        assert failure() == mine


def test_window_bounds_beyond_64_bits_give_what_the_operators_give(spy):
    """An int has no largest value in Python."""
    arguments = tensors()

    def outcome():
        try:
            return attention(**arguments, window=(2**70, 0))
        except Exception as error:
            return type(error), str(error)

    mine = outcome()
    assert spy.done == []
    with by_the_operator():
        other = outcome()
    assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def test_a_library_of_another_build_is_not_called():
    """Its types may have another layout."""
    program = (
        "from flashmla_hf import _direct\n"
        "try:\n"
        "    _direct.set_up(None, ((0, 'cpu', _direct.__file__),))\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "it and a backend's library are of different builds: build or install them together"
