"""Patch "loss": linear layer and cross-entropy without the logits.

With labels, the output embeddings return a promise instead of logits. The model's forward scales and caps it (Gemma, Granite,
Cohere), which the promise records, and hands it to its loss function, which computes loss and gradients over chunks of tokens:

``z = cap(h Wᵀ + b)``, ``loss = c Σᵢ (logsumexp(zᵢ) - zᵢ[yᵢ])``, ``dz = c (softmax(z) - onehot(y))``, c = 1 / number of labels.

The gradients are computed along with the loss (as in Liger's fused linear cross-entropy, arXiv 2410.10989): the logits of a
chunk exist once. fp32 statistics of logits rounded to the model's dtype, as ``transformers.loss.loss_utils.ForCausalLMLoss``.

Any other use of the promise raises. Without labels the logits are the model's own.
"""

from __future__ import annotations

import inspect
import threading
from functools import wraps

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from flashmla_hf.patches import gradients, structure, weights
from flashmla_hf.patches.replacements import Replacements

# Tokens per chunk: [2048, 128256] fp32 are 1 GiB, and a GPU's matrix products are at full speed.
CHUNK = 2048


class _State(threading.local):
    # Not as an attribute of the class: torch.compile guards the instance's dictionary, which the first assignment would change.
    def __init__(self):
        self.has_labels = False


_state = _State()


class _Named(type):
    def __repr__(cls):  # accelerate's error names the type alone, when Trainer gathers logits for metrics or predict()
        return (
            "PromisedLogits: flashmla_hf.patch: patch 'loss': no logits when labels are given. Leave it out: patches=[...] "
            "without 'loss', or evaluate with prediction_loss_only=True"
        )


class PromisedLogits(metaclass=_Named):
    """What logits [..., vocabulary] would be: hidden states [..., hidden], weight, bias and what is done to their product.

    ``steps``: ("scale", factor) or ("tanh", None), in order. Everything else raises.
    """

    def __init__(self, hidden, weight, bias, steps=()):
        self._parts = (hidden, weight, bias)
        self._steps = tuple(steps)

    def _then(self, *step):
        return PromisedLogits(*self._parts, (*self._steps, step))

    def __mul__(self, factor):
        return self._then("scale", float(factor)) if isinstance(factor, (int, float)) else self._refuse("* a tensor")

    __rmul__ = __mul__

    def __truediv__(self, divisor):
        return self._then("divide", float(divisor)) if isinstance(divisor, (int, float)) else self._refuse("/ a tensor")

    def tanh(self):
        return self._then("tanh", None)

    def float(self):
        return self  # the loss is computed in fp32 in any case

    def contiguous(self):
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.tanh, torch.Tensor.tanh) and not kwargs:
            return args[0].tanh()
        promise = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls))
        return promise._refuse(getattr(function, "__name__", repr(function)))

    def _refuse(self, what: str, kind: type[Exception] = RuntimeError):
        raise kind(
            f"flashmla_hf.patch: patch 'loss': logits are not computed when labels are given: expected them to be scaled, "
            f"capped by tanh and handed to the loss function only, got {what!r}. Call the model without labels for logits, "
            "or leave the patch out: patches=[...] without 'loss'"
        )

    def __getattr__(self, name: str):
        # An AttributeError: accelerate asks what a model returns whether it has a dtype, and leaves alone what has none.
        return self._refuse(name, AttributeError)

    def __getitem__(self, index):
        return self._refuse("[...]")

    def __iter__(self):
        return self._refuse("iteration")

    def __len__(self):
        return self._refuse("len")

    def __repr__(self):
        return "PromisedLogits(labels were given to a model with the patch 'loss': no logits)"


def patch_loss(model: nn.Module, replacements: Replacements, chunk: int | None) -> None:
    """``chunk``: tokens whose logits exist at a time; ``None`` is :data:`CHUNK`."""
    if inspect.unwrap(model.loss_function) is not ForCausalLMLoss:
        got = getattr(model.loss_function, "__name__", repr(model.loss_function))
        raise structure.refuse(model, "loss", "loss_function", "transformers' ForCausalLMLoss", got)
    head = structure.output_embeddings(model, "loss")
    if "labels" not in inspect.signature(model.forward).parameters:
        raise structure.refuse(model, "loss", "forward", "an argument 'labels'", "none")
    reason = weights.unreadable(head)
    if reason is None and "forward" in vars(head) and getattr(head, "_hf_hook", None) is None:
        reason = "a forward that somebody has set (it would not be called)"
    if reason is not None:
        raise structure.refuse(
            model, "loss", "get_output_embeddings()", "a torch.nn.Linear whose weights can be read in the loss", reason
        )
    head_forward, model_forward, chunk = head.forward, model.forward, chunk or CHUNK

    @wraps(head_forward)
    def promise(hidden_states):
        if torch.compiler.is_compiling() or not _state.has_labels:
            return head_forward(hidden_states)
        _refuse_unreadable(model, head, hidden_states)
        if getattr(head, "_hf_hook", None) is not None:  # one that moves the input to the weights
            hidden_states = hidden_states.to(head.weight.device)
        return PromisedLogits(hidden_states, head.weight, head.bias)

    signature = inspect.signature(model_forward)

    @wraps(model_forward)
    def forward(*args, **kwargs):
        if args and args[0] is model:  # accelerate's unwrap_model binds the function it finds
            args = args[1:]
        if torch.compiler.is_compiling():  # the logits are the model's own
            return model_forward(*args, **kwargs)
        before = _state.has_labels
        _state.has_labels = signature.bind_partial(*args, **kwargs).arguments.get("labels") is not None
        try:
            return model_forward(*args, **kwargs)
        finally:
            _state.has_labels = before

    def loss_function(
        logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
    ):
        """``ForCausalLMLoss`` for promised logits, and itself for any other."""
        if not isinstance(logits, PromisedLogits):
            return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        hidden, weight, bias = logits._parts
        _refuse_unreadable(model, head, hidden)  # again: a shard's weight is gone when the module's call is over
        if weight.shape[0] != vocab_size:
            raise structure.refuse(
                model, "loss", "vocab_size", f"{weight.shape[0]} (rows of the weight)", str(vocab_size)
            )
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if shift_labels.numel() != hidden.shape[:-1].numel():
            raise structure.PatchError(
                f"flashmla_hf.patch: patch 'loss': expected as many labels as hidden states, {hidden.shape[:-1].numel()}, got "
                f"{shift_labels.numel()} (logits_to_keep without labels cut to it)"
            )
        return linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), weight, bias, shift_labels.reshape(-1).to(hidden.device),
            num_items=num_items_in_batch, ignore_index=ignore_index, steps=logits._steps, chunk=chunk,
        )  # fmt: skip

    replacements.set(head, "forward", promise)
    replacements.set(model, "_loss_function", loss_function)
    replacements.set(model, "forward", forward)


def _refuse_unreadable(model: nn.Module, head: nn.Module, hidden: torch.Tensor) -> None:
    reason = weights.unreadable(head, hidden)
    if reason is None and type(head) is not nn.Linear:
        reason = type(head).__name__
    if reason is None and (head._backward_hooks or head._backward_pre_hooks):
        reason = "a backward hook, which needs logits"
    if reason is not None:
        raise structure.refuse(
            model, "loss", "get_output_embeddings()", "a torch.nn.Linear whose weights can be read in the loss", reason
        )


def linear_cross_entropy(
    hidden, weight, bias, labels, *, num_items=None, ignore_index=-100, steps=(), chunk=CHUNK
) -> torch.Tensor:
    """Cross-entropy of ``steps(hidden weightᵀ + bias)`` against labels, fp32 scalar, logits in chunks.

    hidden [tokens, hidden], weight [vocabulary, hidden], bias [vocabulary] or ``None``, labels [tokens], ``ignore_index``
    where there is none. The sum over tokens is divided by ``num_items``, or by the number of labels where that is ``None``.
    Under autocast the product is in autocast's dtype. Gradients in hidden, weight and bias, once (no ``retain_graph``).
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if hidden.dtype == torch.float16:
        raise structure.PatchError(
            "flashmla_hf.patch: patch 'loss': gradients are computed before a gradient scaler multiplies the loss, and would "
            "vanish in float16: expected bfloat16 or float32. Leave it out: patches=[...] without 'loss'"
        )
    if num_items is None:
        num_items = (labels != ignore_index).sum()
    elif isinstance(num_items, torch.Tensor):
        num_items = num_items.to(hidden.device)
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, labels, num_items, ignore_index, steps, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, num_items, ignore_index, steps, chunk):
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs = needs_hidden or needs_weight or needs_bias
        # The parameters' gradients are sums over all tokens: fp32, whatever the model's dtype.
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = nn.functional.linear(hidden[rows], weight, bias)
            logits, derivatives = _apply(steps, logits, needs)
            is_label = labels[rows] != ignore_index
            y = labels[rows].masked_fill(~is_label, 0)[:, None]
            p = torch.log_softmax(logits, dim=1, dtype=torch.float32)
            loss -= p.gather(1, y).masked_fill_(~is_label[:, None], 0.0).sum()
            if not needs:
                continue
            # Zero where there is no label: also where there is none at all, and the loss 0 / 0.
            factor = (is_label / num_items).masked_fill_(~is_label, 0.0)[:, None]
            p.exp_().mul_(factor)
            p.scatter_add_(1, y, -factor)
            dtype = logits.dtype
            del logits
            grad = _apply_backward(derivatives, p.to(dtype))
            del p, derivatives
            if needs_hidden:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if needs_weight:
                grad_weight += grad.t() @ hidden[rows]
            if needs_bias:
                grad_bias += grad.sum(dim=0, dtype=wide)
        grads = (grad_hidden, grad_weight, grad_bias)
        ctx.grads = [g if g is None else g.to(x.dtype) for g, x in zip(grads, (hidden, weight, bias), strict=True)]
        return loss / num_items

    @staticmethod
    @gradients.first_derivatives
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError(
                "flashmla_hf.patch: patch 'loss': expected one backward pass, got a second (retain_graph=True)"
            )
        grads, ctx.grads = ctx.grads, None
        return (*(g if g is None else g.mul_(grad) for g in grads), *(None,) * 5)


def _apply(steps, logits, needs):
    """``steps`` on logits [tokens, vocabulary], in place; and what their derivative needs."""
    derivatives = []
    for name, number in steps:
        if name == "scale":
            logits.mul_(number)
        elif name == "divide":
            logits.div_(number)
        else:
            logits = logits.tanh_()
            number = logits.clone() if needs else None
        derivatives.append((name, number))
    return logits, derivatives


def _apply_backward(derivatives, grad):
    for name, number in reversed(derivatives):
        if name == "scale":
            grad.mul_(number)
        elif name == "divide":
            grad.div_(number)
        else:
            grad = torch.ops.aten.tanh_backward(grad, number)
    return grad
