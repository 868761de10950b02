"""How calls in fp8 are judged: float64 decides, and the yardstick is what anybody would write first.

The rule: the largest error of the output, the lse and every gradient is at most twice that of :func:`straightforward` on the same
values, plus a floor of the output's dtype. Where few numbers are compared, a largest error is luck: a call that misses is judged again by
the root mean square of the largest errors of 9 draws, and if it misses again of 49. Head dims below 8 are left out of the random
calls: a scale of exactly amax / 448, as the yardstick's, makes the largest number of a block exact, and blocks of one or two
numbers with it; ours are powers of two.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numerics
import torch
from cases import Case, random_case

from flashmla_hf import attention, reference

E4M3 = torch.float8_e4m3fn
LOOKS = (9, 49)
SUM_EPS = 2.0**-13  # Hopper sums products of e4m3 to about 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)


@dataclass
class Looks:
    calls: int = 0
    second: int = 0


looks = Looks()


class _Rounded(torch.autograd.Function):
    """x in units of ``largest / 448``, to e4m3 and back, saturated."""

    @staticmethod
    def forward(ctx, x, largest):
        return (x / largest * 448.0).clamp(-448.0, 448.0).float().to(E4M3).double() / 448.0 * largest

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _round(x: torch.Tensor) -> torch.Tensor:
    """x [batch, seqlen, heads, dim] with one factor amax / 448 for each sequence and head."""
    if x.numel() == 0:
        return x
    largest = x.detach().abs().amax(dim=(1, 3), keepdim=True).clamp(min=1e-300)
    return _Rounded.apply(x, largest)


def straightforward(
    q, k, v, *, scale=None, is_causal=False, window=None, softcap=0.0, sinks=None, cu_seqlens_q=None, cu_seqlens_kv=None,
    return_lse=True,
):  # fmt: skip
    """Attention with q, k and v in fp8, a factor for each sequence and head, no rotation; P rounded once its row is known; all
    else in float64. Straight-through gradients."""
    if cu_seqlens_q is not None:
        outs, lses = [], []
        bounds_q, bounds_kv = cu_seqlens_q.tolist(), cu_seqlens_kv.tolist()
        for n in range(len(bounds_q) - 1):
            rows_q, rows_kv = slice(bounds_q[n], bounds_q[n + 1]), slice(bounds_kv[n], bounds_kv[n + 1])
            out, lse = straightforward(
                q[None, rows_q], k[None, rows_kv], v[None, rows_kv], scale=scale, is_causal=is_causal, window=window,
                softcap=softcap, sinks=sinks,
            )  # fmt: skip
            outs.append(out[0])
            lses.append(lse[0])
        rest = q.shape[0] - bounds_q[-1]
        outs.append(q.new_zeros(rest, q.shape[1], v.shape[2]))
        lses.append(torch.full((q.shape[1], rest), -math.inf, device=q.device))
        return torch.cat(outs), torch.cat(lses, dim=1)
    dtype, group = q.dtype, q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (_round(x.double()).transpose(1, 2) for x in (q, k, v))
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.mT * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    left, right = (-1 if bound is None else bound for bound in window or (None, None))
    visible = reference.visible_keys(q.shape[1], k.shape[1], left, 0 if is_causal else right, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    column = scores.new_full((1, 1, 1, 1), -math.inf) if sinks is None else sinks.double()[None, :, None, None]
    scores = torch.cat([scores, column.expand(*scores.shape[:3], 1)], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    dead = (lse == -math.inf)[..., None]
    weights = torch.exp(scores - lse[..., None].masked_fill(dead, 0.0))[..., :-1].masked_fill(dead, 0.0)
    if weights.numel():
        weights = _Rounded.apply(weights, weights.detach().amax(dim=-1, keepdim=True).clamp(min=1e-300))
    return (weights @ value).transpose(1, 2).to(dtype), lse.float()


def fp8(impl: str):
    """``attention(precision="fp8")`` as a function that numerics.run calls."""
    return lambda **arguments: attention(precision="fp8", impl=impl, **arguments)


def on_gpu(**arguments):
    """``attention(precision="fp8")`` of tensors that are on a CPU, by the GPU's kernel: their truth is cheaper there."""
    placed = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    out, lse = attention(precision="fp8", **placed)
    return out.cpu(), lse.cpu()


def check(
    impl: str | Callable, case: Case, dtype: torch.dtype, seed: int = 0, gradients: torch.dtype | None = None, **options
) -> numerics.Result:
    """Runs ``case`` in fp8 and holds it to the rule. ``impl``: a name, or a function with the arguments of ``attention``.
    ``gradients``: the dtype that a kernel computes these in, if it is narrower than ``dtype``; P is then recomputed from an lse
    whose scores were summed by Hopper's fp8 products."""
    function = fp8(impl) if isinstance(impl, str) else impl
    draws = [_draw(function, case, dtype, seed, **options)]
    got, yardstick, truth = draws[0]
    looks.calls += 1
    for name, ref in truth.tensors.items():
        x, like = got.tensors[name], yardstick.tensors[name]
        error = numerics.largest_error(x, ref)
        is_gradient = gradients is not None and name in ("dq", "dk", "dv")
        floor = _floor(gradients if is_gradient else x.dtype, ref, truth)
        if is_gradient:
            floor += 2.0 * SUM_EPS * numerics._largest(truth.lse) * numerics._largest(ref)
        allowed = 2.0 * numerics.largest_error(like, ref) + floor
        if error > allowed:
            looks.second += len(draws) == 1
            for most in LOOKS:
                draws += [_draw(function, case, dtype, seed + n, **options) for n in range(len(draws), most)]
                ours, theirs = (_typical_error(draws, i, name) for i in (0, 1))
                if ours <= 2.0 * theirs + floor:
                    break
            else:
                raise AssertionError(
                    f"{case} {name}: error {ours:.3e} in {len(draws)} draws, the yardstick's is {theirs:.3e}"
                )
            allowed = error
        numerics.assert_within(f"{case} {name}", x, like, ref, allowed)
    return got


def _draw(function, case, dtype, seed, **options) -> tuple[numerics.Result, numerics.Result, numerics.Result]:
    inputs = case.inputs(dtype, seed=seed)
    runs = (numerics.run(f, case, inputs, **options) for f in (function, straightforward))
    return (*runs, numerics.reference64(case, inputs, **options))


def _floor(dtype: torch.dtype, ref: torch.Tensor, truth: numerics.Result) -> float:
    return numerics.tolerance_floor(dtype, ref, numerics._largest(truth.lse))


def _typical_error(draws, i: int, name: str) -> float:
    """The root mean square over the draws of the largest error of ours (0) or the yardstick's (1)."""
    errors = [numerics.largest_error(draw[i].tensors[name], draw[2].tensors[name]) for draw in draws]
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def random_cases(count: int, seed: int) -> list[tuple[Case, int]]:
    """(case, seed of its values): small, dense in corners; some longer than two blocks."""
    source, cases = random.Random(seed), []
    for _ in range(count):
        longest = source.choice([80, 80, 300])
        case = random_case(source.randint, source.choice, max_seqlen=longest, max_head_dim=72, max_scores=60_000)
        dims = {name: max(8, getattr(case, name)) for name in ("head_dim_qk", "head_dim_v")}
        cases.append((replace(case, **dims), source.randint(0, 2**31)))
    return cases


def kernel_cases(count: int, seed: int) -> list[tuple[Case, int]]:
    """As :func:`random_cases`, of head dims that the Hopper kernel takes: multiples of 8, parts of them up to 128 and 256."""
    source, cases = random.Random(f"kernel {seed}"), []
    for case, values in random_cases(count, seed):
        wider = source.choice([0, 0, 56, 184])
        dims = {name: -(-getattr(case, name) // 8) * 8 + wider for name in ("head_dim_qk", "head_dim_v")}
        cases.append((replace(case, **dims), values))
    return cases
