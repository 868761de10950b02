"""The probes of training (the gradient of every parameter) and of generation."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import warnings

import torch

from model_sweep import batches
from model_sweep.building import outputs, run
from model_sweep.comparison import MOST_NOISE, TOLERANCE, Pair, difference
from model_sweep.verdicts import first_line, raised


def probe_training(pair: Pair, batch: dict) -> None:
    """The gradient of every parameter, of a random projection of all outputs; the model's own loss where it has one."""
    results = []
    labels = _labels(pair.eager, batch)
    if "token_type_ids" in inspect.signature(pair.eager.forward).parameters and len(batch) > 1 and "input_ids" in batch:
        with contextlib.suppress(Exception):  # some need to know which tokens are images, in training alone
            kinds = {"token_type_ids": batches.media_tokens(batch["input_ids"], pair.eager.config)}
            run(pair.eager, batch | kinds)
            batch = batch | kinds
    for model in (pair.eager, pair.ours):
        try:
            results.append(_step(model, batch | labels))
        except Exception as error:
            if model is pair.eager:
                pair.result.probes["training"] = f"eager refuses: {first_line(error)[:100]}"
            else:
                pair.result.probes["training"] = raised(error)
            return
        finally:
            model.eval()
            model.zero_grad()
    (want_out, want), (got_out, got) = results
    error, where = difference(got_out, want_out)
    if want.keys() != got.keys():
        pair.result.probes["training"] = f"DIFFERS: gradients exist for {sorted(want.keys() ^ got.keys())[:3]}"
        return
    largest = max((float(g.abs().max()) for g in want.values()), default=0.0)
    worst, worst_name = _gradients_differ(got, want, largest)
    name = "training with labels" if labels else "training"
    if not want:
        pair.result.probes[name] = "no gradients"
    elif largest != largest or largest == float("inf"):
        pair.result.probes[name] = "eager refuses: gradients are not finite"
    elif error <= TOLERANCE and worst <= 5 * TOLERANCE:
        pair.result.probes[name] = "equal"
    else:
        what = f"outputs {error:.2e} ({where})" if error > TOLERANCE else f"gradient {worst:.2e} ({worst_name})"
        noise = _training_noise(pair.eager, batch | labels, want, largest)
        if noise > MOST_NOISE:
            pair.result.probes[name] = f"not judged: gradients of eager in float64 are {noise:.1e} from eager's"
            return
        if error <= TOLERANCE and worst <= 10 * noise:
            pair.result.probes[name] = f"equal within the rounding of eager ({worst:.1e}, {noise:.1e})"
            return
        with contextlib.suppress(Exception):
            their_out, theirs = _step(pair.peer, batch | labels)
            if (
                difference(got_out, their_out)[0] <= TOLERANCE
                and _gradients_differ(got, theirs, largest)[0] <= 5 * TOLERANCE
            ):
                pair.result.probes[name] = f"as {pair.peer_name}, which differs from eager ({what})"
                return
            if error <= TOLERANCE and worst <= 5 * _gradients_differ(theirs, want, largest)[0]:
                # A backward from P and the sum over O dO, not from the whole row of P dP: SDPA rounds the same way.
                pair.result.probes[name] = f"equal within the rounding of {pair.peer_name} ({what})"
                return
        pair.result.probes[name] = f"DIFFERS by {what} (eager in float64: {noise:.1e})"


def _gradients_differ(got: dict, want: dict, largest: float) -> tuple[float, str]:
    """(largest difference of a gradient, the parameter). A gradient counts by its own size, down to a hundredth of the
    ``largest`` of the model; a bias of keys, which softmax does not see, down to a tenth."""
    worst, worst_name = 0.0, ""
    for name, gradient in want.items():
        floor = 1e-1 if re.search(r"\bk\w*\.bias$|key\w*\.bias$", name) else 1e-2
        size = max(float(gradient.abs().max()), floor * largest, 1e-12)
        relative = float((got[name] - gradient).abs().max()) / size
        relative = float("inf") if relative != relative else relative
        if relative > worst:
            worst, worst_name = relative, name
    return worst, worst_name


def _training_noise(eager, batch, want, largest) -> float:
    try:
        double = copy.deepcopy(eager).double()
        batch = {
            n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in batch.items()
        }
        _, exact = _step(double, batch)
        return _gradients_differ(exact, want, largest)[0]
    except Exception:
        return 0.0


def _labels(eager, batch: dict) -> dict:
    """Labels that the eager model's own loss takes, if it has one."""
    if "labels" not in inspect.signature(eager.forward).parameters:
        return {}
    options = [batch.get("decoder_input_ids"), batch.get("input_ids"), torch.zeros(batches.BATCH, dtype=torch.long)]
    for labels in options:
        if labels is None:
            continue
        with contextlib.suppress(Exception):
            loss = run(eager, batch | {"labels": labels}).get("loss")
            if loss is not None and torch.isfinite(loss).all():
                return {"labels": labels}
    return {}


def _step(model, batch: dict) -> tuple[dict, dict]:
    model.train()
    for module in model.modules():  # statistics of a batch are no matter of attention
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    model.zero_grad()
    torch.manual_seed(1)
    batch = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    out = {n: v for n, v in outputs(model(**batch)) if v.is_floating_point() and v.requires_grad}
    if not out:
        raise ValueError("no output has a gradient")
    total = 0.0
    for index, (_, value) in enumerate(out.items()):
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(index)).to(value.dtype)
        total = total + (torch.where(torch.isfinite(value), value, 0.0) * weights).sum() / max(1, value.numel()) ** 0.5
    total.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.numel()}
    return {n: v.detach() for n, v in out.items()}, gradients


def probe_generation(pair: Pair, batch: dict) -> None:
    """Scores of a few generated tokens: a cache, one query at a time, left padding."""
    can_generate = getattr(pair.eager, "can_generate", None)
    if can_generate is None or not can_generate() or "input_ids" not in batch or batch["input_ids"].dim() != 2:
        return
    inputs = {n: v for n, v in batch.items() if n != "decoder_input_ids"}
    variants = {"generate": inputs}
    if len(inputs) == 1:
        mask = torch.ones_like(batch["input_ids"])
        mask[0, :5] = 0
        variants["generate left"] = inputs | {"attention_mask": mask}
    for name, variant in variants.items():
        got = []
        for model in (pair.eager, pair.ours):
            try:
                got.append(_generated(model, variant))
            except Exception as error:
                if model is pair.ours:
                    pair.result.probes[name] = raised(error)
                break
        if len(got) == 2:
            error, where = difference(*got[::-1])
            if error > TOLERANCE and pair.peer is not None:
                with contextlib.suppress(Exception):
                    if difference(got[1], _generated(pair.peer, variant))[0] <= TOLERANCE:
                        pair.result.probes[name] = (
                            f"as {pair.peer_name}, which differs from eager ({error:.1e} in {where})"
                        )
                        continue
            pair.result.probes[name] = "equal" if error <= TOLERANCE else f"DIFFERS by {error:.2e} in {where}"


def _generated(model, batch: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            **batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1, output_logits=True,
            return_dict_in_generate=True, disable_compile=True,
        )  # fmt: skip
    return {f"step {i}": step for i, step in enumerate(out.logits)}
