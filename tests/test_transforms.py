"""torch.func and its relatives: every transform gives the gradients of a plain loop, or a refusal; none is dropped."""

import copy
import functools
import warnings

import pytest
import torch
from numerics import eager
from torch import func
from torch.fx.experimental.proxy_tensor import make_fx

from flashmla_hf import attention, direct, libraries
from flashmla_hf.backends import sm90
from flashmla_hf.validation import validate

pytestmark = pytest.mark.filterwarnings("ignore:flashmla attention. ")

COPIES = 3
PACKED = {"cu_seqlens_q": torch.tensor([0, 3, 3, 8], dtype=torch.int32),
          "cu_seqlens_kv": torch.tensor([0, 2, 4, 8], dtype=torch.int32)}  # fmt: skip


def make(names="q k v sinks", copies="q k v sinks", is_packed=False, seed=0):
    """Tensors by name; those in ``copies`` have COPIES of themselves in dimension 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = (9,) if is_packed else (2, 7)
    shapes = {"q": (*rows, 4, 8), "k": (*rows, 2, 8), "v": (*rows, 2, 6), "sinks": (4,)}
    return {
        name: torch.randn(*((COPIES,) if name in copies.split() else ()), *shapes[name], generator=generator)
        for name in names.split()
    }


def of(way, names, is_packed, **options):
    """(tensors in the order of ``names``) -> (out, lse), by ``way``, with options that touch everything."""
    options = {"is_causal": True, "softcap": 3.0, **(PACKED if is_packed else {}), **options}
    return lambda *tensors: way(**dict(zip(names, tensors, strict=True)), return_lse=True, **options)


def loss(way, names, is_packed):
    function = of(way, names, is_packed)

    def total(*tensors):
        out, lse = function(*tensors)
        return out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()

    return total


def ours(**arguments):
    return attention(impl="cpu", **arguments)


def assert_same(found, expected, **tolerance):
    found, expected = (x if isinstance(x, (tuple, list)) else (x,) for x in (found, expected))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, **tolerance)


SUBSETS = ["q k v sinks", "q k v", "q", "k", "v", "k v", "sinks", "q sinks"]
on_both_layouts = pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])


@on_both_layouts
@pytest.mark.parametrize("copies", SUBSETS)
def test_vmap_over_any_of_the_tensors_is_a_loop(copies, is_packed):
    for names in ("q k v sinks", "q k v"):
        if not set(copies.split()) <= set(names.split()):
            continue
        tensors = make(names, copies, is_packed)
        for x in tensors.values():
            x.requires_grad_()
        dims = tuple(0 if name in copies.split() else None for name in tensors)
        function = of(ours, tensors, is_packed)

        def rows(n, tensors=tensors, dims=dims):
            return (x if dim is None else x[n] for x, dim in zip(tensors.values(), dims, strict=True))

        loop = [torch.stack(x) for x in zip(*(function(*rows(n)) for n in range(COPIES)), strict=True)]
        found = torch.vmap(function, in_dims=dims)(*tensors.values())
        assert_same(found, loop)
        weights = [torch.randn_like(x).masked_fill(x.isinf(), 0.0) for x in loop]
        gradients = [
            torch.autograd.grad(
                sum((x.masked_fill(x.isinf(), 0.0) * w).sum() for x, w in zip(outputs, weights, strict=True)),
                list(tensors.values()),
            )
            for outputs in (found, loop)
        ]
        assert all(x.abs().max() > 0 for x in gradients[1])
        assert_same(*gradients)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, -1])
def test_vmap_over_any_dimension_gives_the_same(dim):
    tensors = make("q k v")
    expected = torch.vmap(of(ours, tensors, False))(*tensors.values())
    moved = [x.movedim(0, dim) for x in tensors.values()]
    assert_same(torch.vmap(of(ours, tensors, False), in_dims=dim)(*moved), expected)
    chunks = torch.vmap(of(ours, tensors, False), in_dims=dim, chunk_size=2, out_dims=1)(*moved)
    assert_same([x.movedim(1, 0) for x in chunks], expected)


TRANSFORMS = {
    "grad": lambda f, n: func.grad(f, argnums=tuple(range(n))),
    "vjp": lambda f, n: lambda *x: func.vjp(f, *x)[1](torch.tensor(0.5)),
    "jacrev": lambda f, n: func.jacrev(f, argnums=tuple(range(n))),
    "grad of functionalize": lambda f, n: func.grad(func.functionalize(f), argnums=tuple(range(n))),
    "functionalize of grad": lambda f, n: func.functionalize(func.grad(f, argnums=tuple(range(n)))),
    "make_fx of grad": lambda f, n: lambda *x: make_fx(func.grad(f, argnums=tuple(range(n))))(*x)(*x),
    "per-sample gradients": lambda f, n: torch.vmap(func.grad(f, argnums=tuple(range(n)))),
    "per-sample gradients of a part": lambda f, n: (
        lambda *x: torch.vmap(func.grad(f, argnums=tuple(range(n))), in_dims=(0, *(None,) * (n - 1)))(
            x[0], *(y[0] for y in x[1:])
        )
    ),
    "grad of vmap": lambda f, n: func.grad(lambda *x: torch.vmap(f)(*x).sum(), argnums=tuple(range(n))),
    "vmap of vmap of grad": lambda f, n: (
        lambda *x: torch.vmap(torch.vmap(func.grad(f, argnums=tuple(range(n)))))(*(y[None] for y in x))
    ),
    "vmap of grad of vmap": lambda f, n: (
        lambda *x: torch.vmap(func.grad(lambda *y: torch.vmap(f)(*y).sum(), argnums=tuple(range(n))))(
            *(y[None] for y in x)
        )
    ),
}
OF_COPIES = {name for name in TRANSFORMS if "vmap" in name or "per-sample" in name}


@on_both_layouts
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("names", ["q k v sinks", "q k v"])
def test_transforms_give_the_gradients_of_eager(transform, names, is_packed):
    tensors = make(names, names if transform in OF_COPIES else "", is_packed)
    make_transform = TRANSFORMS[transform]
    # Eager reads boundaries, which is fine: they have no copies.
    found = make_transform(loss(ours, tensors, is_packed), len(tensors))(*tensors.values())
    expected = make_transform(loss(eager, tensors, is_packed), len(tensors))(*tensors.values())
    assert all(x.abs().max() > 0 for x in expected)
    assert_same(found, expected)


@pytest.mark.parametrize("transform", ["grad", "per-sample gradients", "grad of vmap", "jacrev"])
def test_compiled_transforms_give_the_same(transform):
    torch._dynamo.reset()
    tensors = make("q k v", "q k v" if transform in OF_COPIES else "")
    function = TRANSFORMS[transform](loss(ours, tensors, False), 3)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(compiled(*tensors.values()), function(*tensors.values()))


def test_compiled_vmap_keeps_gradients():
    torch._dynamo.reset()
    tensors = [x.requires_grad_() for x in make("q k v").values()]
    function = torch.vmap(of(ours, "qkv", False))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = [torch.autograd.grad(call(*tensors)[0].square().sum(), tensors) for call in (compiled, function)]
    assert_same(*results)


def test_the_operators_themselves_take_transforms():
    q, k, v = make("q k v", "").values()

    def total(q, k, v):
        return torch.ops.flashmla.flash_attn_forward(q, k, v, None, None, None, 7, 7, 0.3, -1, 0, 0.0, False)[0].sum()

    expected = func.grad(lambda q, k, v: attention(q, k, v, scale=0.3, is_causal=True).sum(), argnums=(0, 1, 2))
    assert_same(func.grad(total, argnums=(0, 1, 2))(q, k, v), expected(q, k, v))


def test_batched_gradients_equal_a_loop():
    tensors = [x.requires_grad_() for x in make("q k v sinks", "").values()]
    out, lse = of(ours, ("q", "k", "v", "sinks"), False)(*tensors)
    dout, dlse = torch.randn(COPIES, *out.shape), torch.randn(COPIES, *lse.shape)
    for outputs, gradients in (((out,), (dout,)), ((out, lse), (dout, dlse))):
        found = torch.autograd.grad(outputs, tensors, gradients, is_grads_batched=True, retain_graph=True)
        loop = [
            torch.autograd.grad(outputs, tensors, [x[n] for x in gradients], retain_graph=True) for n in range(COPIES)
        ]
        assert_same(found, [torch.stack(x) for x in zip(*loop, strict=True)])


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).unbind(2)
        return self.out(attention(q, k, v, is_causal=True).flatten(2))


def test_an_ensemble_trains_as_its_members_do():
    members = [Layer() for _ in range(COPIES)]
    x = torch.randn(4, 6, 16)
    parameters, buffers = func.stack_module_state(members)
    base = copy.deepcopy(members[0])
    out = torch.vmap(lambda p, b: func.functional_call(base, (p, b), (x,)))(parameters, buffers)
    out.square().sum().backward()
    for n, member in enumerate(members):
        member(x).square().sum().backward()
        for name, parameter in member.named_parameters():
            torch.testing.assert_close(parameters[name].grad[n], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["cpu", "sdpa", "reference"])
def test_functionalize_keeps_gradients(impl):
    q, k, v = (x.requires_grad_() for x in make("q k v", "").values())
    function = functools.partial(attention, impl=impl)
    expected = torch.autograd.grad(function(q, k, v).square().sum(), (q, k, v))
    assert_same(torch.autograd.grad(func.functionalize(function)(q, k, v).square().sum(), (q, k, v)), expected)


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize("transform", ["grad", "per-sample gradients", "grad of vmap", "vmap of vmap of grad"])
@pytest.mark.parametrize("kind", ["bool", "bias", "none"])
def test_masks_go_through_transforms(impl, transform, kind):
    mask = {"bool": torch.rand(7, 7) > 0.4, "bias": torch.randn(7, 7), "none": None}[kind]
    tensors = make("q k v", "q k v" if transform in OF_COPIES else "")
    function = TRANSFORMS[transform](lambda *x: attention(*x, attn_mask=mask, impl=impl).square().sum(), 3)

    def truth(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
        scores = q @ k.transpose(-1, -2) * 8**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if kind == "bool" else scores + mask
        return (scores.softmax(-1).nan_to_num(0.0) @ v).square().sum()

    if kind == "bool":
        mask[:, 0] = True  # softmax of nothing has no gradient in eager
    assert_same(function(*tensors.values()), TRANSFORMS[transform](truth, 3)(*tensors.values()))


def test_boundaries_that_differ_between_vmap_copies_are_refused():
    q, k, v = make("q k v", "q k v", is_packed=True).values()
    boundaries = PACKED["cu_seqlens_q"].expand(COPIES, -1)

    def function(q, k, v, cu):
        return attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_kv=cu)

    with pytest.raises(RuntimeError, match=r"cu_seqlens_q: expected boundaries shared by all copies of torch\.vmap"):
        torch.vmap(function)(q, k, v, boundaries)


def test_vmap_over_no_copies_is_refused():
    with pytest.raises(
        RuntimeError, match=r"q: expected at least one copy in torch\.vmap, got a vmapped dimension of size 0"
    ):
        torch.vmap(attention)(*(torch.ones(0, 1, 5, 2, 8) for _ in range(3)))


FORWARD_MODE = {
    "jvp": lambda f, x: func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "hessian": lambda f, x: func.hessian(f)(x),
    "vmap of jvp": lambda f, x: torch.vmap(lambda t: func.jvp(f, (x,), (t,)))(torch.ones(2, *x.shape)),
    "jvp of vmap": lambda f, x: func.jvp(torch.vmap(f), (x[None],), (torch.ones_like(x[None]),)),
    "jvp of grad": lambda f, x: func.jvp(func.grad(f), (x,), (torch.ones_like(x),)),
}


@pytest.mark.parametrize("transform", FORWARD_MODE)
def test_forward_mode_is_refused_by_the_kernels_and_right_by_the_reference(transform):
    x = torch.randn(1, 3, 1, 4)

    def by(way):
        return lambda x: way(x, x * 2, x.sin()).square().sum()

    with pytest.raises(RuntimeError, match=r"expected no tangent, got a dual tensor.*impl='reference'"):
        FORWARD_MODE[transform](by(attention), x)
    mine = FORWARD_MODE[transform](by(functools.partial(attention, impl="reference")), x)
    assert_same(mine, FORWARD_MODE[transform](by(lambda *x: eager(*x)[0]), x))


def test_second_derivatives_are_refused_under_transforms_too():
    x = torch.randn(1, 3, 1, 4)

    def total(x):
        return attention(x, x * 2, x.sin()).square().sum()

    for twice in (
        lambda: func.grad(lambda x: func.grad(total)(x).square().sum())(x),
        lambda: func.jacrev(func.jacrev(total))(x),
        lambda: torch.vmap(func.grad(lambda x: func.grad(total)(x).square().sum()))(x[None]),
        lambda: func.grad(lambda x: torch.vmap(func.grad(total))(x[None]).square().sum())(x),
    ):
        with pytest.raises(RuntimeError, match="flash_attn_backward: has no derivative"):
            twice()


def test_dropout_under_vmap_follows_its_randomness():
    q = torch.randn(COPIES, 1, 16, 2, 8)

    def function(q):
        return attention(q, q, q, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(function)(q)
    same = torch.vmap(function, randomness="same")(q[:1].expand_as(q))
    assert torch.equal(same[0], same[1])
    different = torch.vmap(function, randomness="different")(q[:1].expand_as(q))
    assert not torch.equal(different[0], different[1])


def test_vmap_computes_all_copies_in_one_call(monkeypatch):
    tensors = make("q k v")
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.name())
            return func(*args, **(kwargs or {}))

    with warnings.catch_warnings(), Count():
        warnings.simplefilter("error")  # torch's, that it loops
        torch.vmap(of(ours, tensors, False))(*tensors.values())
    assert calls.count("flashmla::flash_attn_forward") == 1


def test_alignment_can_be_read_under_transforms():
    """What the Hopper kernels need; here that the look itself does no harm."""
    seen = []

    def function(q):
        call = validate(q, q, q, None, False, None, 0.0, None, 0.0, None, None, None, None, False, None, False, None)
        seen.append(sm90.unaligned(call))
        return q.sum()

    torch.vmap(function)(torch.randn(3, 1, 4, 2, 8))
    func.grad(function)(torch.randn(1, 4, 2, 8))
    assert seen == [[], []]


def test_direct_calls_leave_transforms_to_the_operators(monkeypatch):
    class Never:
        def __getattr__(self, name):
            def call(*arguments):
                result = getattr(module, name)(*arguments)
                assert result is None
                return result

            return call

    module = direct.module
    if module is None:
        pytest.skip(libraries.unavailable["direct"])
    monkeypatch.setattr(direct, "module", Never())
    tensors = make("q k v")
    torch.vmap(of(ours, tensors, False))(*tensors.values())
    func.grad(lambda *x: attention(*(y[0] for y in x)).sum())(*tensors.values())
    func.functionalize(lambda *x: attention(*(y[0] for y in x)))(*tensors.values())
