"""Patch "loss" computes linear layer and cross-entropy without storing the logits.

With labels, the output embeddings return a promise instead of logits. The model's forward scales and caps it (Gemma, Granite,
Cohere), which the promise records, and passes it to its loss function, which computes loss and gradients over chunks of tokens:

``z = cap(h Wᵀ + b)``, ``loss = c Σᵢ (logsumexp(zᵢ) - zᵢ[yᵢ])``, ``dz = c (softmax(z) - onehot(y))``, c = 1 / number of labels.

The gradients are computed along with the loss (as in Liger's fused linear cross-entropy, arXiv 2410.10989), so the logits of a
chunk exist once. The statistics are in fp32, of logits rounded to the model's dtype, as in
``transformers.loss.loss_utils.ForCausalLMLoss``.

Any other use of the promise raises an error. Without labels the model computes its own logits.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from flashmla_hf.patches import forwards, gradients, structure, weights
from flashmla_hf.patches.replacements import Replacements
from flashmla_hf.torch_state import is_traced_or_transformed

# Tokens per chunk: [2048, 128256] fp32 are 1 GiB, and a GPU's matrix products are at full speed.
CHUNK = 2048

_SCALED_TOO_LATE = "gradients are computed before a gradient scaler multiplies the loss, and would vanish"

# The methods of logits that a promise of them has.
PROMISED = {"float", "contiguous", "tanh"}

# One operation on the logits: ("scale", factor), ("divide", divisor) or ("tanh", None).
Step = tuple[str, float | None]


class _State(threading.local):
    # Not an attribute of the class: torch.compile guards the instance's dictionary, which a first assignment would change.
    def __init__(self) -> None:
        self.has_labels = False
        self.loss_of: Callable[[torch.Tensor], torch.Tensor] | None = None


_state = _State()


class _MessageAsName(type):
    """Gives :class:`PromisedLogits` a repr that is an error message.

    Trainer gathers logits for metrics and for predict(). ``recursively_apply`` (accelerate/utils/operations.py) then raises
    ``TypeError(f"Unsupported types ({type(data)}) passed to ...")``: only the repr of the type can tell the user what to do.
    """

    def __repr__(cls) -> str:
        return (
            "PromisedLogits: flashmla_hf.patch: patch 'loss': logits are not computed when labels are given. Evaluate with "
            "prediction_loss_only=True, or exclude the patch: flashmla_hf.patch(model, exclude=['loss'])"
        )


class PromisedLogits(metaclass=_MessageAsName):
    """Stands for logits [..., vocabulary]: hidden states [..., hidden], and the steps applied to their product with the head.

    Scaling by a number and tanh are recorded as :data:`Step` in order. Every other use raises.
    """

    def __init__(self, hidden: torch.Tensor, steps: Sequence[Step] = ()) -> None:
        self._hidden = hidden
        self._steps = tuple(steps)

    def _with_step(self, step: Step) -> PromisedLogits:
        return PromisedLogits(self._hidden, (*self._steps, step))

    def __mul__(self, factor: object) -> PromisedLogits:
        if isinstance(factor, (int, float)):
            return self._with_step(("scale", float(factor)))
        self._refuse("* a tensor")

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> PromisedLogits:
        if isinstance(divisor, (int, float)):
            return self._with_step(("divide", float(divisor)))
        self._refuse("/ a tensor")

    def tanh(self) -> PromisedLogits:
        return self._with_step(("tanh", None))

    def float(self) -> PromisedLogits:
        return self  # the loss is computed in fp32 in any case

    def contiguous(self) -> PromisedLogits:
        return self

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> PromisedLogits:
        if function in (torch.tanh, torch.Tensor.tanh) and not kwargs:
            return args[0].tanh()
        promise = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls))
        promise._refuse(getattr(function, "__name__", repr(function)))

    def _refuse(self, use: str, kind: type[Exception] = RuntimeError) -> NoReturn:
        raise kind(
            f"flashmla_hf.patch: patch 'loss': logits are not computed when labels are given: expected the model to scale "
            f"them, cap them by tanh and pass them to its loss function, got {use!r}. Call the model without labels for "
            "logits, or exclude the patch: flashmla_hf.patch(model, exclude=['loss'])"
        )

    def __getattr__(self, name: str) -> NoReturn:
        # An AttributeError: accelerate asks whether a model's output has a dtype, and leaves it alone if not.
        self._refuse(name, AttributeError)

    def __getitem__(self, index: object) -> NoReturn:
        self._refuse("[...]")

    def __iter__(self) -> Iterator[Any]:
        self._refuse("iteration")

    def __len__(self) -> int:
        self._refuse("len")

    def __repr__(self) -> str:
        return "PromisedLogits(the patch 'loss' computes no logits when labels are given)"


def _supported_head(model: Any) -> nn.Linear:
    """The output embeddings of ``model``, which computes its loss as the patch does. Raises UnsupportedPatch if it does not."""
    head = structure.output_embeddings(model, "loss")
    if inspect.unwrap(model.loss_function) is not ForCausalLMLoss:
        got = getattr(model.loss_function, "__name__", repr(model.loss_function))
        raise structure.refuse(model, "loss", "loss_function", "transformers' ForCausalLMLoss", got)
    if "labels" not in inspect.signature(model.forward).parameters:
        raise structure.refuse(model, "loss", "forward", "an argument 'labels'", "none")
    forward_with_loss = forwards.that_names(type(model), "loss_function")
    if forward_with_loss is None:
        got = "one that computes the loss from logits itself"
        raise structure.refuse(model, "loss", "forward", "a call of self.loss_function", got)
    name = next((name for name, module in model.named_children() if module is head), None)
    use = None if name is None else forwards.attribute_of_result(forward_with_loss, name, PROMISED)
    if use is not None:
        expected = "logits that go into self.loss_function scaled or capped"
        raise structure.refuse(model, "loss", "forward", expected, use)
    reason = weights.unreadable(head, is_gathered=True)
    if reason is None and "forward" in vars(head) and getattr(head, "_hf_hook", None) is None:
        reason = "a forward of its own instance (it would not be called)"
    if reason is not None:
        raise structure.refuse(
            model, "loss", "get_output_embeddings()", "a torch.nn.Linear whose weights can be read in the loss", reason
        )
    if head.weight.dtype == torch.float16:
        got = f"float16: {_SCALED_TOO_LATE}"
        raise structure.refuse(model, "loss", "get_output_embeddings()", "weights in bfloat16 or float32", got)
    return head


def patch_loss(model: Any, replacements: Replacements, chunk: int | None) -> None:
    """Replaces the forward of ``model`` and of its output embeddings, and its loss function.

    ``chunk`` is the number of tokens whose logits exist at a time; ``None`` is :data:`CHUNK`.
    """
    head = _supported_head(model)
    head_forward, model_forward, chunk = head.forward, model.forward, chunk or CHUNK

    @wraps(head_forward)
    def promise(hidden_states: torch.Tensor) -> torch.Tensor | PromisedLogits:
        if _state.loss_of is not None:
            return _state.loss_of(hidden_states)
        if is_traced_or_transformed() or not _state.has_labels:
            return head_forward(hidden_states)
        _refuse_unreadable(model, head, hidden_states)
        if getattr(head, "_hf_hook", None) is not None:  # accelerate's hook would move the input to the weights
            hidden_states = hidden_states.to(head.weight.device)
        return PromisedLogits(hidden_states)

    signature = inspect.signature(model_forward)

    @wraps(model_forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if args and args[0] is model:  # accelerate's unwrap_model sets the function that it finds as a bound method
            args = args[1:]
        if is_traced_or_transformed():
            return model_forward(*args, **kwargs)
        before = _state.has_labels
        _state.has_labels = signature.bind_partial(*args, **kwargs).arguments.get("labels") is not None
        try:
            return model_forward(*args, **kwargs)
        finally:
            _state.has_labels = before

    def loss_function(
        logits: torch.Tensor | PromisedLogits,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Computes what ``ForCausalLMLoss`` does for promised logits, and calls it for others."""
        if not isinstance(logits, PromisedLogits):
            return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        hidden = logits._hidden
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if shift_labels.numel() != hidden.shape[:-1].numel():
            raise structure.PatchError(
                f"flashmla_hf.patch: patch 'loss': expected as many labels as hidden states, {hidden.shape[:-1].numel()}, got "
                f"{shift_labels.numel()}. If logits_to_keep is given, cut the labels to it"
            )
        labels = shift_labels.reshape(-1).to(hidden.device)

        def loss_of(hidden: torch.Tensor) -> torch.Tensor:
            _refuse_unreadable(model, head, hidden)
            if head.weight.shape[0] != vocab_size:
                expected = f"{head.weight.shape[0]} (rows of the weight)"
                raise structure.refuse(model, "loss", "vocab_size", expected, str(vocab_size))
            return linear_cross_entropy(
                hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias, labels,
                num_items=num_items_in_batch, ignore_index=ignore_index, steps=logits._steps, chunk=chunk,
            )  # fmt: skip

        return _with_weights(head, loss_of, hidden)

    replacements.set(head, "forward", promise)
    replacements.set(model, "_loss_function", loss_function)
    replacements.set(model, "forward", forward)


def _with_weights(
    head: nn.Module, loss_of: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    """``loss_of(hidden)`` where the weights of ``head`` are whole: a shard frees them when the module's own call is over."""
    if weights.is_partitioned(head):
        # ZeRO-3 gathers weights, in backward too, by the hooks of a call alone: one more call, which computes the loss.
        _state.loss_of = loss_of
        try:
            return head(hidden)
        finally:
            _state.loss_of = None
    with weights.gathered(head):
        return loss_of(hidden)


def _refuse_unreadable(model: nn.Module, head: nn.Module, hidden: torch.Tensor) -> None:
    reason = weights.unreadable(head, hidden, is_gathered=True)
    if reason is None and weights.own_class(head) is not nn.Linear:
        reason = type(head).__name__
    if reason is None and (head._backward_hooks or head._backward_pre_hooks):
        reason = "a backward hook, which needs logits"
    if reason is not None:
        raise structure.refuse(
            model, "loss", "get_output_embeddings()", "a torch.nn.Linear whose weights can be read in the loss", reason
        )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    num_items: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    steps: Sequence[Step] = (),
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Cross-entropy of ``steps(hidden weightᵀ + bias)`` against labels, a fp32 scalar, with the logits of a chunk at a time.

    hidden [tokens, hidden], weight [vocabulary, hidden], bias [vocabulary] or ``None``, labels [tokens], ``ignore_index`` for
    tokens without a label. The sum over tokens is divided by ``num_items``, or by the number of labels if it is ``None``.
    Under autocast the product is in autocast's dtype. Gradients exist for hidden, weight and bias, for one backward pass.

    Raises PatchError for float16.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if hidden.dtype == torch.float16:
        raise structure.PatchError(
            f"flashmla_hf.patch: patch 'loss': expected bfloat16 or float32, got float16: {_SCALED_TOO_LATE}. "
            f"{structure.exclude('loss')}"
        )
    if num_items is None:
        num_items = (labels != ignore_index).sum()
    elif isinstance(num_items, torch.Tensor):
        num_items = num_items.to(hidden.device)
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, labels, num_items, ignore_index, steps, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        num_items: torch.Tensor | int,
        ignore_index: int,
        steps: Sequence[Step],
        chunk: int,
    ) -> torch.Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs = needs_hidden or needs_weight or needs_bias
        # The parameters' gradients are sums over all tokens, so they are in fp32 for every dtype of the model.
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias and bias is not None else None
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
            # Zero for tokens without a label, even if there is no label at all and the loss is 0 / 0.
            factor = (is_label / num_items).masked_fill_(~is_label, 0.0)[:, None]
            p.exp_().mul_(factor)
            p.scatter_add_(1, y, -factor)
            dtype = logits.dtype
            del logits
            grad = _apply_backward(derivatives, p.to(dtype))
            del p, derivatives
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0, dtype=wide)
        grads = (grad_hidden, grad_weight, grad_bias)
        inputs = (hidden, weight, bias)
        ctx.grads = [None if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]
        return loss / num_items

    @staticmethod
    @gradients.first_derivatives
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "flashmla_hf.patch: patch 'loss': expected one backward pass, got a second one (retain_graph=True). Add the "
                "losses and call backward() once, or exclude the patch: flashmla_hf.patch(model, exclude=['loss'])"
            )
        grads, ctx.grads = ctx.grads, None
        return (*(g if g is None else g.mul_(grad) for g in grads), *(None,) * 5)


def _apply(
    steps: Sequence[Step], logits: torch.Tensor, needs_derivatives: bool
) -> tuple[torch.Tensor, list[tuple[str, Any]]]:
    """Applies ``steps`` to logits [tokens, vocabulary] in place. Returns them, and per step what its derivative needs."""
    derivatives: list[tuple[str, Any]] = []
    for name, number in steps:
        kept: Any = number
        if name == "scale":
            logits.mul_(kept)
        elif name == "divide":
            logits.div_(kept)
        else:
            logits = logits.tanh_()
            kept = logits.clone() if needs_derivatives else None
        derivatives.append((name, kept))
    return logits, derivatives


def _apply_backward(derivatives: list[tuple[str, Any]], grad: torch.Tensor) -> torch.Tensor:
    """The gradient of the product from ``grad``, that of the result of the steps."""
    for name, kept in reversed(derivatives):
        if name == "scale":
            grad.mul_(kept)
        elif name == "divide":
            grad.div_(kept)
        else:
            grad = torch.ops.aten.tanh_backward(grad, kept)
    return grad
