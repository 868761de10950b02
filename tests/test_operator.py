"""The operator contract of ``torch.ops.flashmla``: opcheck, autograd, torch.compile, checkpointing, selective saving."""

import functools

import pytest
import torch
from cases import CASES, Case, named
from numerics import check, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flashmla_hf import attention

FORWARD = torch.ops.flashmla.flash_attn_forward.default
BACKWARD = torch.ops.flashmla.flash_attn_backward.default


class CountCalls(TorchDispatchMode):
    """Counts the calls of the two operators as they reach a backend."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is FORWARD
        self.backward += func is BACKWARD
        return func(*args, **(kwargs or {}))


def operator_arguments(case, dtype=torch.float32, requires_grad=True):
    t = case.inputs(dtype)
    for x in (t.q, t.k, t.v, t.sinks):
        if x is not None:
            x.requires_grad_(requires_grad)
    return (
        t.q, t.k, t.v, t.sinks, t.cu_seqlens_q, t.cu_seqlens_kv, t.q.shape[-3], t.k.shape[-3], 0.3,
        *((-1, 0) if case.is_causal else (-1, -1)), case.softcap, False,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_case_keeps_the_error_rule(case, dtype):
    check("cpu", case, dtype)


@pytest.mark.parametrize(
    "case", named("causal gqa", "sinks, softcap, window", "packed, ragged, empty, rest"), ids=lambda case: case.name
)
def test_opcheck_accepts_the_operator(case):
    arguments = operator_arguments(case)
    torch.library.opcheck(FORWARD, arguments)
    q, k, v, sinks, *options = (x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    out, lse = FORWARD(q, k, v, sinks, *options)
    for needs in ((True, True, True, sinks is not None), (True, False, True, False), (False, True, False, False)):
        torch.library.opcheck(
            BACKWARD,
            (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, sinks, *options, *needs),
            # There is no second derivative, and saying so is autograd's default.
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(
    "wants", [(), ("q",), ("k",), ("v",), ("q", "v"), ("k", "v"), ("sinks",), ("q", "k", "v", "sinks")]
)
def test_unneeded_gradients_are_not_computed_and_the_others_are_right(wants):
    case = Case(batch=2, seqlen_q=40, heads_q=4, heads_kv=2, head_dim_qk=16, is_causal=True, has_sinks=True)
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is BACKWARD:
                seen.append(tuple(grad.numel() > 0 for grad in result))
            return result

    with Spy():
        check("cpu", case, torch.float32, wants=wants)
    assert seen == ([tuple(name in wants for name in ("q", "k", "v", "sinks"))] if wants else [])


@pytest.mark.parametrize(("has_dout", "has_dlse"), [(True, False), (False, True), (True, True)])
def test_gradients_flow_through_the_output_the_lse_or_both(has_dout, has_dlse):
    check("cpu", named("sinks, softcap, window")[0], torch.float32, has_dout=has_dout, has_dlse=has_dlse)


def test_a_gradient_of_any_strides_is_accepted():
    case = Case(seqlen_q=30, head_dim_qk=8)
    q, k, v = (x.requires_grad_() for x in (case.inputs(torch.float32).q, *[case.inputs(torch.float32, seed=1).q] * 2))
    expanded = torch.autograd.grad(attention(q, k, v).sum(), q)[0]  # dout has strides 0
    dense = torch.autograd.grad((attention(q, k, v) * torch.ones(1, 30, 2, 8)).sum(), q)[0]
    transposed = torch.autograd.grad((attention(q, k, v).transpose(1, 3) * torch.ones(1, 8, 2, 30)).sum(), q)[0]
    assert torch.equal(expanded, dense)
    assert torch.equal(transposed, dense)


def test_the_second_derivative_is_refused_not_zero():
    q = torch.randn(1, 5, 1, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attn_backward: has no derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["causal gqa", "sinks, softcap, window", "packed, ragged, empty, rest"])
def test_torch_compile_has_no_graph_breaks_and_the_same_results(name):
    (case,) = named(name)
    inputs = case.inputs(torch.float32)
    compiled = torch.compile(functools.partial(attention, impl="cpu"), fullgraph=True, backend="aot_eager")
    mine, expected = run(compiled, case, inputs), run("cpu", case, inputs)
    for key, value in expected.tensors.items():
        assert torch.equal(mine.tensors[key], value), key


def test_torch_compile_with_dynamic_shapes_compiles_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=counter)
    for seqlen in (17, 33, 70):
        q = torch.randn(2, seqlen, 4, 8)
        torch.testing.assert_close(compiled(q, q, q, is_causal=True), attention(q, q, q, is_causal=True))
    assert counter.frame_count == 1


def test_torch_compile_with_dynamic_shapes_takes_masks():
    torch._dynamo.reset()

    def masked(q, k):
        return attention(q, k, k, attn_mask=torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril())

    compiled = torch.compile(masked, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen, heads in ((17, 4), (33, 2)):
        q, k = torch.randn(2, seqlen, heads, 8), torch.randn(2, seqlen, 2, 8)
        torch.testing.assert_close(compiled(q, k), masked(q, k))


def block(x, weight):
    q = (x @ weight).view(1, -1, 4, 8)
    return attention(q, q, q, is_causal=True).reshape(x.shape)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant):
    x, weight = torch.randn(1, 50, 32, requires_grad=True), torch.randn(32, 32, requires_grad=True)
    expected = torch.autograd.grad(block(x, weight).square().sum(), (x, weight))
    checkpoint(block, x, weight, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close((x.grad, weight.grad), expected, rtol=0, atol=0)


@pytest.mark.parametrize("saves", [True, False])
def test_selective_checkpointing_keeps_the_output_instead_of_recomputing_it(saves):
    def policy(context, operator, *args, **kwargs):
        # How TRL recognises an attention operator.
        wanted = saves and "flash_attn" in str(operator)
        return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE

    x, weight = torch.randn(1, 50, 32, requires_grad=True), torch.randn(32, 32, requires_grad=True)
    expected = torch.autograd.grad(block(x, weight).square().sum(), (x, weight))
    with CountCalls() as calls:
        out = checkpoint(
            block,
            x,
            weight,
            use_reentrant=False,
            context_fn=functools.partial(create_selective_checkpoint_contexts, policy),
        )
        grads = torch.autograd.grad(out.square().sum(), (x, weight))
    assert (calls.forward, calls.backward) == (1 if saves else 2, 1)
    torch.testing.assert_close(grads, expected, rtol=0, atol=0)


def test_meta_tensors_give_shapes():
    q, k, v = (
        torch.empty(2, 7, 4, 8, device="meta"),
        torch.empty(2, 9, 2, 8, device="meta"),
        torch.empty(2, 9, 2, 6, device="meta"),
    )
    out, lse = attention(q, k, v, return_lse=True)
    assert (out.shape, lse.shape) == ((2, 7, 4, 6), (2, 4, 7))


def test_autocast_and_inference_mode_reach_the_kernel():
    q = torch.randn(1, 5, 1, 8)
    with torch.inference_mode():
        assert torch.equal(attention(q, q, q), attention(q.clone(), q, q))
