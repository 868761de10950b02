"""How the tests decide: run a call with its gradients, and compare the errors against float64 with those of eager.

The rule, for the output, the lse and every gradient: the largest error is at most twice that of eager attention in the
same dtype, plus a floor (:func:`tolerance_floor`); infinities and NaNs stand in the same places.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import Case, Inputs

from flashmla_hf.dispatch import attention
from flashmla_hf.reference import repeated, visible_keys


@dataclass
class Looks:
    """How many calls :func:`check` has judged, and how many of them by a second look, at 25 more draws of eager."""

    calls: int = 0
    second: int = 0

    def __sub__(self, other: Looks) -> Looks:
        return Looks(self.calls - other.calls, self.second - other.second)

    def __add__(self, other: Looks) -> Looks:
        return Looks(self.calls + other.calls, self.second + other.second)

    def __str__(self) -> str:
        share = self.second / max(1, self.calls)
        return f"the 2x rule judged {self.calls} calls, {self.second} of them ({share:.2%}) by a second look"


looks = Looks()

# The rule is to decide by what eager does on the same values; more second looks than this would be another rule.
MOST_SECOND_LOOKS = 0.02


@dataclass(frozen=True)
class Result:
    """out, lse and the gradients by name ("q", "k", "v", "sinks"); shapes as in :func:`flashmla_hf.attention`."""

    out: torch.Tensor
    lse: torch.Tensor
    grads: dict[str, torch.Tensor]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {"out": self.out, "lse": self.lse, **{f"d{name}": grad for name, grad in self.grads.items()}}


def eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_kv: torch.Tensor | None = None,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as Transformers' eager functions compute it: matrix products in the input dtype, softmax in float32.

    Arguments and results as :func:`flashmla_hf.attention`. The yardstick: nobody can ask for less error than twice its.
    """
    if cu_seqlens_q is not None:
        outs, lses = [], []
        bounds_q, bounds_kv = cu_seqlens_q.tolist(), cu_seqlens_kv.tolist()
        for n in range(len(bounds_q) - 1):
            rows_q, rows_kv = slice(bounds_q[n], bounds_q[n + 1]), slice(bounds_kv[n], bounds_kv[n + 1])
            out, lse = eager(
                q[None, rows_q], k[None, rows_kv], v[None, rows_kv],
                scale=scale, is_causal=is_causal, window=window, softcap=softcap, sinks=sinks,
            )  # fmt: skip
            outs.append(out[0])
            lses.append(lse[0])
        rest = q.shape[0] - bounds_q[-1]
        outs.append(q.new_zeros(rest, q.shape[1], v.shape[2]))
        lses.append(q.new_full((q.shape[1], rest), -math.inf, dtype=torch.promote_types(torch.float32, q.dtype)))
        return torch.cat(outs), torch.cat(lses, dim=1)

    left, right = (-1 if bound is None else bound for bound in window or (None, None))
    query = q.transpose(1, 2)
    key, value = (repeated(x.transpose(1, 2), q.shape[2] // k.shape[2]) for x in (k, v))
    scores = torch.matmul(query, key.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0.0:
        scores = torch.tanh(scores / softcap) * softcap
    visible = visible_keys(q.shape[1], k.shape[1], left, 0 if is_causal else right, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    statistics = scores.to(torch.promote_types(torch.float32, q.dtype))
    if sinks is not None:
        statistics = torch.cat([statistics, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    lse = torch.logsumexp(statistics, dim=-1)
    weights = torch.exp(statistics - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(weights.to(q.dtype), value).transpose(1, 2), lse


def run(
    impl: str | Callable,
    case: Case,
    inputs: Inputs,
    *,
    wants: tuple[str, ...] = ("q", "k", "v", "sinks"),
    has_dout: bool = True,
    has_dlse: bool = True,
) -> Result:
    """One forward and backward of ``case``. ``impl`` is the name of an implementation, ``"eager"``, or a function with
    the arguments of :func:`flashmla_hf.attention` that returns ``(out, lse)``. ``wants`` names the wanted gradients. Values that
    are columns of k are a view of it, and have no gradient of their own."""
    leaves = {
        name: x.detach().requires_grad_(name in wants)
        for name in ("q", "k", "v", "sinks")
        if (x := getattr(inputs, name)) is not None
    }
    extra = {}
    if impl == "eager":
        function = eager
    elif callable(impl):
        function = impl
    else:
        function, extra = attention, {"impl": impl}
    views = {"v": leaves["k"][..., : case.head_dim_v]} if inputs.v is None else {}
    out, lse = function(
        **leaves,
        **views,
        cu_seqlens_q=inputs.cu_seqlens_q,
        cu_seqlens_kv=inputs.cu_seqlens_kv,
        return_lse=True,
        **case.options,
        **extra,
    )
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    loss = []
    if has_dout:
        loss.append((out * inputs.dout).sum())
    if has_dlse:
        # A row that sees nothing has lse -inf: its gradient is zero, and 0 * -inf would poison the sum.
        loss.append((lse.masked_fill(lse == -math.inf, 0.0) * inputs.dlse).sum())
    grads = {}
    if wanted and loss and sum(loss).requires_grad:
        found = torch.autograd.grad(sum(loss), list(wanted.values()), allow_unused=True)
        grads = {
            name: torch.zeros_like(x) if grad is None else grad
            for (name, x), grad in zip(wanted.items(), found, strict=True)
        }
    else:
        grads = {name: torch.zeros_like(x) for name, x in wanted.items()}
    return Result(out.detach(), lse.detach(), grads)


def reference64(case: Case, inputs: Inputs, **options) -> Result:
    """The truth: the oracle on the float64 twins of ``inputs``."""
    return run("reference", case, inputs.to(torch.float64), **options)


def tolerance_floor(dtype: torch.dtype, ref: torch.Tensor, largest_lse: float = 0.0) -> float:
    """One unit in the last place of ``dtype`` at the largest of ``ref``: half for rounding the result, half for rounding
    P before P V, which a kernel that streams divides by its sum only afterwards, so that P of a row's only key need not
    be 1 as it is in eager. Plus 32 float32 units: the order of float32 summation, where eager happens to be exact.

    For gradients, ``largest_lse`` adds what recomputing P = exp(S - lse) from a saved float32 lse must cost: a relative
    error of lse's own unit. Eager keeps P instead, in O(n²) memory.
    """
    largest = _largest(ref)
    fp32 = torch.finfo(torch.float32).eps
    if dtype == torch.float64:
        return 64 * torch.finfo(dtype).eps * max(1.0, largest)
    return torch.finfo(dtype).eps * largest + fp32 * (32 * max(1.0, largest) + 2 * largest_lse * largest)


def _largest(x: torch.Tensor) -> float:
    """The largest finite magnitude. Selecting the finite elements would take 25 times as long, and mostly all are."""
    largest = x.abs().max().item() if x.numel() else 0.0
    return largest if largest < math.inf else x.nan_to_num(0.0, 0.0, 0.0).abs().max().item()


def _is_finite(x: torch.Tensor) -> bool:
    """Of every element."""
    return x.numel() == 0 or x.abs().max().item() < math.inf


def largest_error(x: torch.Tensor, ref: torch.Tensor) -> float:
    """``max|x - ref|`` where both are finite; ref is float64."""
    return _largest(x.double() - ref)


def assert_within(name: str, got: torch.Tensor, like: torch.Tensor, ref: torch.Tensor, allowed: float) -> None:
    """``max|got - ref| <= allowed``; infinities and NaNs of ref at the same places; shape of ref, dtype of ``like``."""
    assert got.shape == ref.shape, f"{name}: shape {[*got.shape]}, expected {[*ref.shape]}"
    assert got.dtype == like.dtype, f"{name}: dtype {got.dtype}, expected {like.dtype}"
    got64 = got.double()
    if not (_is_finite(got64) and _is_finite(ref)):
        same_special = torch.where(ref.isfinite(), got64.isfinite(), (got64 == ref) | (got64.isnan() & ref.isnan()))
        assert same_special.all(), (
            f"{name}: infinities or NaNs at other places: {(~same_special).sum().item()} elements"
        )
    error = largest_error(got, ref)
    assert error <= allowed, f"{name}: error {error:.3e} against float64, allowed {allowed:.3e}"


def assert_close_to_reference(name: str, got: torch.Tensor, eager: torch.Tensor, ref: torch.Tensor) -> None:
    """The rule for one tensor: ref is float64, got and eager share a dtype."""
    assert_within(name, got, eager, ref, 2.0 * largest_error(eager, ref) + tolerance_floor(got.dtype, ref))


def check(
    impl: str | Callable,
    case: Case,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    grad_factor: float = 2.0,
    **options,
) -> Result:
    """Run ``case`` and hold its output, lse and gradients to the rule; ``options`` as in :func:`run`. ``grad_factor`` is
    for what is not ours to mend.

    Where few numbers are compared, eager's largest error is a matter of luck: a call that misses the rule is judged again
    by the worst that eager does, relative to the largest value, on 25 more draws of the same case; a gradient also by
    :func:`errors_of_delta`, which eager does not have.
    """
    inputs = case.inputs(dtype, device, seed)
    got = run(impl, case, inputs, **options)
    eager_result = run("eager", case, inputs, **options)
    truth = reference64(case, inputs, **options)
    assert got.grads.keys() == truth.grads.keys()
    largest_lse = _largest(truth.lse)
    others = None
    looks.calls += 1
    for name, ref in truth.tensors.items():
        is_grad = name in {f"d{x}" for x in truth.grads}
        # The fp32 gradient of the sinks is made from out and dout, which are rounded to the dtype of the call.
        precision = dtype if name == "dsinks" else got.tensors[name].dtype
        floor = tolerance_floor(precision, ref, largest_lse if is_grad else 0.0)
        eager_error = largest_error(eager_result.tensors[name], ref)
        if largest_error(got.tensors[name], ref) > 2.0 * eager_error + floor:
            if others is None:
                looks.second += 1
                others = [_relative_eager_errors(case, dtype, device, seed + n, options) for n in range(1, 26)]
                deltas = errors_of_delta(case, inputs, got.out, truth, options)
            eager_error = max(eager_error, deltas.get(name, 0.0), *(errors[name] * _largest(ref) for errors in others))
        allowed = (grad_factor if is_grad else 2.0) * eager_error + floor
        assert_within(f"{case.name or case} {name}", got.tensors[name], eager_result.tensors[name], ref, allowed)
    return got


def assert_rule_was_kept(failures: list[str], before: Looks, calls: int) -> None:
    """Of so many random calls, checked since :data:`looks` was ``before``: none failed, all were judged, few by a second look."""
    assert not failures, f"{len(failures)} calls break the rule:\n" + "\n".join(failures[:12])
    judged = looks - before
    assert judged.calls == calls
    assert judged.second <= max(2, MOST_SECOND_LOOKS * judged.calls), judged


def errors_of_delta(case: Case, inputs: Inputs, out: torch.Tensor, truth: Result, options: dict) -> dict[str, float]:
    """The largest errors that gradients ("dq", ...) get from delta, the row sums of dout times ``out``, if all else is exact.

    Any backward in linear memory that is given (q, k, v, out, lse) has them; eager keeps P. They show where little is left
    of dP - delta: in a row of one key, or in sinks under many keys. The error of ``out`` has a rule of its own. That of delta
    is a gradient of the lse with its sign turned, so autograd gives what comes of it.
    """
    if not truth.grads or not options.get("has_dout", True):
        return {}
    of_columns = (out.double() - truth.out) * inputs.dout.double()
    delta = of_columns.sum(-1).transpose(-1, -2)  # [batch, heads, seqlen], as lse
    # Both are sums of fp32, in orders of their own: a row of one key has an exact out, and yet dP - delta is not 0.
    magnitude = (truth.out * inputs.dout.double()).abs().sum(-1).transpose(-1, -2)
    delta = delta + torch.finfo(torch.float32).eps * magnitude.copysign(delta)
    only_delta = dataclasses.replace(inputs.to(torch.float64), dlse=-delta)
    errors = run("reference", case, only_delta, **options | {"has_dout": False, "has_dlse": True}).grads
    return {f"d{name}": _largest(error) for name, error in errors.items()}


def _relative_eager_errors(case, dtype, device, seed, options) -> dict[str, float]:
    inputs = case.inputs(dtype, device, seed)
    found, truth = run("eager", case, inputs, **options), reference64(case, inputs, **options)
    return {
        name: largest_error(found.tensors[name], ref) / max(_largest(ref), torch.finfo(torch.float32).tiny)
        for name, ref in truth.tensors.items()
    }
