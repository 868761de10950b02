"""No number without a right answer: a slice of every timed implementation's result is compared with float64.

The slice is one kv head and its query heads; of the rows the first, middle and last; of a packed batch the first, the
longest and the last document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from peers import Peer
from shapes import DTYPES, Shape

# Largest relative error (Frobenius norm over 64 rows) of a right implementation: rounding of the inputs' dtype with
# some room. One key too many or too few in a window of 512 is an error of 4e-2, in a causal mask more.
TOLERANCES = {"fp32": (3e-5, 1e-4), "fp16": (2e-3, 6e-3), "bf16": (1e-2, 3e-2)}  # of the output, of the gradients
CHECKED_ROWS = 64


@dataclass
class Inputs:
    """Dense [batch, seqlen, heads, dim] or packed [batch * seqlen, heads, dim]. Of latents v is a view of k, and no leaf."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """What has a gradient: q, k, and v unless it is a view."""
        return tuple(x for x in (self.q, self.k, self.v) if x.is_leaf)

    @staticmethod
    def random(shape: Shape, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def normal(seqlen: int, heads: int, dim: int) -> torch.Tensor:
            rows = (shape.batch * seqlen,) if shape.is_packed else (shape.batch, seqlen)
            return torch.randn(*rows, heads, dim, generator=generator, device=device).to(DTYPES[shape.dtype])

        q = normal(shape.seqlen_q, shape.heads_q, shape.head_dim_qk).requires_grad_()
        k = normal(shape.seqlen_kv, shape.heads_kv, shape.head_dim_qk).requires_grad_()
        if shape.is_latent:
            v = k[..., : shape.head_dim_v]
        else:
            v = normal(shape.seqlen_kv, shape.heads_kv, shape.head_dim_v).requires_grad_()
        return Inputs(q, k, v, normal(shape.seqlen_q, shape.heads_q, shape.head_dim_v))

    def arranged(self, peer: Peer) -> Inputs:
        """The same memory in the order of dimensions that the peer takes."""
        if not peer.is_heads_first:
            return self
        q, k, *v = (x.detach().transpose(1, 2).requires_grad_() for x in self.leaves)
        return Inputs(q, k, v[0] if v else k[..., : self.v.shape[-1]], self.dout.transpose(1, 2))


def _blocks(seqlen: int) -> list[slice]:
    """The first, a middle and the last CHECKED_ROWS rows."""
    starts = {0, max(0, seqlen // 2 - CHECKED_ROWS // 2), max(0, seqlen - CHECKED_ROWS)}
    return [slice(start, min(start + CHECKED_ROWS, seqlen)) for start in sorted(starts)]


def _checked_documents(shape: Shape) -> list[int | slice]:
    """Indices into the first dimension of a tensor: the last batch entry; of a pack the first, longest and last."""
    if not shape.is_packed:
        return [-1]
    documents = shape.documents()
    longest = max(range(len(documents)), key=lambda i: documents[i].stop - documents[i].start)
    return [documents[i] for i in sorted({0, longest, len(documents) - 1})]


@dataclass
class Expected:
    """float64 results of one document and the last kv head: blocks of rows of O and dQ (of each query head in the
    group), and blocks of rows of dK and dV."""

    out: list[torch.Tensor]  # of [group, rows, head_dim_v]
    dq: list[torch.Tensor] | None
    dk: list[torch.Tensor] | None  # of [rows, head_dim_qk]
    dv: list[torch.Tensor] | None


@torch.no_grad()
def expected(shape: Shape, inputs: Inputs, needs_gradients: bool) -> list[Expected]:
    """Attention and its gradients on the slice of each checked document."""
    return [_expected(shape, inputs, index, needs_gradients) for index in _checked_documents(shape)]


def _expected(shape: Shape, inputs: Inputs, index: int | slice, needs_gradients: bool) -> Expected:
    """By the textbook formulas, a chunk of query rows at a time."""
    group = shape.heads_q // shape.heads_kv
    q = inputs.q[index][:, -group:].transpose(0, 1).double()  # [group, seqlen_q, head_dim_qk]
    dout = inputs.dout[index][:, -group:].transpose(0, 1).double()
    k, v = inputs.k[index][:, -1].double(), inputs.v[index][:, -1].double()  # [seqlen_kv, head_dim]
    seqlen_q, seqlen_kv = q.shape[1], k.shape[0]
    scale = shape.head_dim_qk**-0.5
    key = torch.arange(seqlen_kv, device=q.device)

    def rows(block: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """P, O and dS of some query rows: [group, rows, seqlen_kv], [group, rows, head_dim_v], as P."""
        s = scale * q[:, block] @ k.T
        if shape.is_causal:
            position = torch.arange(block.start, block.stop, device=q.device)[:, None] + seqlen_kv - seqlen_q
            visible = key <= position
            if shape.window is not None:
                visible &= key >= position - shape.window
            s.masked_fill_(~visible, -math.inf)
        p = torch.softmax(s, dim=-1).nan_to_num(0.0)  # a row that sees nothing is zero
        out = p @ v
        delta = (dout[:, block] * out).sum(-1, keepdim=True)
        ds = p * (dout[:, block] @ v.T - delta)  # FlashAttention-2 (arXiv 2307.08691), algorithm 2
        return p, out, ds

    some = [rows(block) for block in _blocks(seqlen_q)]
    result = Expected([out for _, out, _ in some], None, None, None)
    if not needs_gradients:
        return result
    result.dq = [scale * ds @ k for _, _, ds in some]
    kv_blocks = _blocks(seqlen_kv)
    result.dk = [torch.zeros_like(k[block]) for block in kv_blocks]
    result.dv = [torch.zeros_like(v[block]) for block in kv_blocks]
    chunk = max(16, 2**25 // (group * seqlen_kv))  # 256 MiB of float64 scores
    for start in range(0, seqlen_q, chunk):
        block = slice(start, min(start + chunk, seqlen_q))
        p, _, ds = rows(block)
        for i, kv_block in enumerate(kv_blocks):
            result.dk[i] += scale * torch.einsum("grk,grd->kd", ds[..., kv_block], q[:, block])
            result.dv[i] += torch.einsum("grk,grd->kd", p[..., kv_block], dout[:, block])
    if shape.is_latent:
        for dk, dv in zip(result.dk, result.dv, strict=True):
            dk[:, : shape.head_dim_v] += dv
    return result


def verdict(
    shape: Shape, peer: Peer, inputs: Inputs, truth: list[Expected], training: bool
) -> tuple[str | None, dict[str, float]]:
    """The mistake of ``peer`` on these inputs, or None, and the relative errors found.

    With ``training`` the gradients and their forward's output are compared, without it the output of a call without
    gradients.
    """
    group = shape.heads_q // shape.heads_kv
    tolerance_out, tolerance_grad = peer.tolerances or TOLERANCES[shape.dtype]
    mine = inputs.arranged(peer)
    q, k, v = (x if training else x.detach() for x in (mine.q, mine.k, mine.v))
    with peer.context():
        out = peer.run(q, k, v)
        if out.shape != mine.dout.shape:
            return f"the output has shape {tuple(out.shape)}, expected {tuple(mine.dout.shape)}", {}
        found = {"O": out.detach()}
        if training:
            gradients = torch.autograd.grad(out, mine.leaves, mine.dout)
            found |= dict(zip(("dQ", "dK", "dV"), gradients, strict=False))
    errors, problem = {}, None
    for name, tensor in found.items():
        if peer.is_heads_first:
            tensor = tensor.transpose(1, 2)
        tolerance, worst = tolerance_out if name == "O" else tolerance_grad, 0.0
        for index, right in zip(_checked_documents(shape), truth, strict=True):
            part = tensor[index]
            rows = part[:, -group:].transpose(0, 1) if name in ("O", "dQ") else part[:, -1]
            want = {"O": right.out, "dQ": right.dq, "dK": right.dk, "dV": right.dv}[name]
            for block, reference in zip(_blocks(part.shape[0]), want, strict=True):
                error = (rows[..., block, :].double() - reference).norm() / reference.norm().clamp(min=1e-30)
                worst = max(worst, float(error)) if torch.isfinite(error) else math.inf
        errors[name] = worst
        if problem is None and worst > tolerance:
            problem = f"{name} is off by {worst:.1e} (relative; allowed {tolerance:.0e})"
        # The slice does not see everything, but NaN and infinity elsewhere are found.
        if problem is None and not torch.isfinite(tensor).all():
            problem = f"{name} is not finite everywhere"
    return problem, errors
