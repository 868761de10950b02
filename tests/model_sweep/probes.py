"""What the sweep asks of one model class: built under ``attn_implementation="flashmla"``, is it the eager model?

Every weight is drawn anew, large enough that attention decides the outputs: with Transformers' own initialisation an
attention that returns zeros passes most comparisons. Each result says whether zeros pass here ("not discriminating").
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
import transformers
from counting import counted_calls, standing_in
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import flashmla_hf

from . import batches
from .classes import Candidate
from .tiny_configs import PLANS, tiny

TOLERANCE = 1e-3
FORWARD_SECONDS = 3
MOST_NOISE = 3e-2  # an eager model that is further from itself in float64 cannot be judged by
MAX_PARAMETERS = 40_000_000
BUILD_SECONDS = 40  # after these no further plan is tried
KERNELS = ("cpu", "sm90", "flex")
_NO_OUTPUT = ("cache", "past_key_values", "attentions", "memory", "mems")


@dataclass
class Result:
    """What the sweep found about one class. ``status``:

    ``equal``: every probe that applies is. ``eager``: runs with "eager", after our warning. ``refused``: raises, in our words.
    ``no attention``: the model never calls an attention function. ``not discriminating``: equal, but so would zeros be.
    ``not as eager``: equal to Transformers' own SDPA, which differs from eager. ``cannot build``: no tiny configuration or no
    inputs were found. ``failed``: differs from eager, or raises where eager does not.
    """

    class_name: str
    model_type: str
    status: str = "cannot build"
    reason: str = ""
    implementation: str = "flashmla"
    plan: str = ""
    inputs: list[str] = field(default_factory=list)
    probes: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict:
        return asdict(self)


def examine(candidate: Candidate, only_forward: bool = False) -> Result:
    """All probes of one class, in this process."""
    result = Result(candidate.class_name, candidate.model_type)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        model_class = getattr(transformers, candidate.class_name)
        config_class = getattr(model_class, "config_class", None) or CONFIG_MAPPING[candidate.model_type]
        inspect.signature(model_class.forward)
    except Exception as error:
        result.reason = _first_line(error)
        return result
    built = build_eager(model_class, config_class, result)
    if built is None:
        return result
    eager, config, batch = built
    result.inputs = sorted(batch)
    _compare(model_class, eager, config, batch, result, only_forward)
    return result


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# Building


def build_eager(model_class, config_class, result: Result):
    """(model, its configuration, a batch that it answers) by the first plan that leads to all three."""
    first = None
    tried, began = set(), time.monotonic()
    for plan in PLANS:
        if time.monotonic() - began > BUILD_SECONDS:
            break
        try:
            config = tiny(config_class, plan)
            text = repr(config)
            if text in tried:
                continue
            tried.add(text)
            if _num_parameters(model_class, config) > MAX_PARAMETERS:
                raise MemoryError("the model is not tiny")
            model = build(model_class, config, "eager")
            draw_weights(model)
            batch = batches.runnable(model, functools.partial(_is_finite, model))
        except Exception as error:
            first = first or f"{_first_line(error)} [{plan}]"
            continue
        result.plan = str(plan)
        return model, config, batch
    result.reason = first or "no plan"
    return None


def _num_parameters(model_class, config) -> int:
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    except Exception:
        return 0  # some models compute with numbers while they are built


def build(model_class, config, implementation: str | None) -> torch.nn.Module:
    torch.manual_seed(0)
    model = model_class._from_config(copy.deepcopy(config), attn_implementation=implementation)
    return model.float().eval()


@torch.no_grad()
def draw_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws every parameter anew: matrices so that they keep the size of what they multiply and a bit more, norms and
    gates around what they are, those that would hide a branch (layer scales, gates of 0) around 1."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if parameter.dim() >= 2:
            fan_in = 1 if id(parameter) in embeddings else max(1, parameter[0].numel())
            parameter.copy_(noise * (1.5 / fan_in**0.5 if fan_in > 1 else 1.0))
        elif not torch.isfinite(parameter).all() or float(parameter.abs().max()) < 0.05:
            is_bias = bool((parameter == 0).all()) and parameter.numel() > 1
            parameter.copy_(0.1 * noise if is_bias else 1.0 + 0.1 * noise)
        else:
            parameter.add_(0.1 * noise)


# Running


def outputs(value, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in what a model returned, by name; caches and attention weights left out."""
    if isinstance(value, torch.Tensor):
        yield name or "output", value
    elif isinstance(value, dict):
        for key, item in value.items():
            if not any(word in str(key) for word in _NO_OUTPUT):
                yield from outputs(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from outputs(item, f"{name}[{index}]")


def run(model, batch: dict, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    batch = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(outputs(model(**batch, **options)))


def _is_finite(model, batch: dict) -> bool:
    began = time.monotonic()
    got = run(model, batch)
    if time.monotonic() - began > FORWARD_SECONDS:
        raise TimeoutError("the forward pass is slow: the model or its inputs are not tiny")
    floats = [value for value in got.values() if value.is_floating_point() and value.numel()]
    if not floats:
        raise ValueError(f"no floating output: {sorted(got)}")
    if not all(bool((~torch.isnan(value)).all()) for value in floats):
        raise ValueError("outputs are not finite")
    return True


def difference(got: dict, want: dict, real: torch.Tensor | None = None) -> tuple[float, str]:
    """(largest difference as a fraction of the largest value, at least 1; the output it is in). ``real`` [batch,
    seqlen]: outputs of that leading shape count there alone. Infinite if the outputs are not of one shape or kind."""
    worst, where = 0.0, ""
    if got.keys() != want.keys():
        return float("inf"), f"outputs {sorted(got.keys() ^ want.keys())}"
    for name, expected in want.items():
        value = got[name]
        if value.shape != expected.shape:
            return float("inf"), f"{name} {[*value.shape]}, not {[*expected.shape]}"
        if not expected.numel():
            continue
        if real is not None and expected.dim() >= 2 and expected.shape[1] == real.shape[1]:
            copies, rest = divmod(expected.shape[0], real.shape[0])  # several codebooks stand in one batch
            if rest == 0:
                there = real.repeat_interleave(copies, 0)
                value, expected = value[there], expected[there]
        if not expected.is_floating_point():
            error = 0.0 if torch.equal(value, expected) else 1.0
        else:
            value, expected = value.double(), expected.double()
            same = (value == expected) | (torch.isnan(value) & torch.isnan(expected))  # infinities as well
            finite = torch.isfinite(expected)
            scale = max(1.0, float(expected[finite].abs().max())) if finite.any() else 1.0
            error = float(torch.where(same, 0.0, (value - expected).abs()).max()) / scale if expected.numel() else 0.0
            error = float("inf") if error != error else error
        if error > worst:
            worst, where = error, name
    return worst, where


def zeros(call, run):
    out, *rest = run(call)
    return (torch.zeros_like(out) + 0.0 * out, *rest)


# Comparing


@dataclass
class Pair:
    """The two models and what is allowed to differ."""

    eager: torch.nn.Module
    ours: torch.nn.Module
    result: Result
    peer_name: str = "no peer"

    def probe(self, name: str, batch: dict, real: torch.Tensor | None = None, **options) -> None:
        """Compares one forward pass. A pass that eager itself refuses is no probe."""
        try:
            want = run(self.eager, batch, **options)
        except Exception as error:
            self.result.probes[name] = f"eager refuses: {_first_line(error)[:100]}"
            return
        try:
            got = run(self.ours, batch, **options)
        except Exception as error:
            self.result.probes[name] = raised(error)
            return
        error, where = difference(got, want, real)
        if error <= TOLERANCE:
            self.result.probes[name] = "equal"
            return
        noise = self._noise(batch, want, real, options)
        if noise > MOST_NOISE:
            self.result.probes[name] = f"not judged: eager in float64 is {noise:.1e} from eager"
            return
        if error <= 10 * noise:
            self.result.probes[name] = f"equal within the rounding of eager ({error:.1e}, {noise:.1e})"
            return
        told = "none"
        if self.peer is not None:
            try:
                theirs = run(self.peer, batch, **options)
            except Exception as raised_there:
                told = type(raised_there).__name__
            else:
                if difference(got, theirs, real)[0] <= TOLERANCE:
                    self.result.probes[name] = f"as {self.peer_name}, which differs from eager ({error:.1e} in {where})"
                    return
                told = f"{difference(theirs, want, real)[0]:.1e}"
        self.result.probes[name] = (
            f"DIFFERS by {error:.2e} in {where} ({self.peer_name}: {told}; eager in float64: {noise:.1e})"
        )

    def _noise(self, batch, want, real, options) -> float:
        """How far eager in float64 is from eager in float32: nobody can ask for less."""
        try:
            double = copy.deepcopy(self.eager).double()
            batch = {
                n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in batch.items()
            }
            return difference(run(double, batch, **options), want, real)[0]
        except Exception:
            return 0.0

    @functools.cached_property
    def peer(self) -> torch.nn.Module | None:
        """The same model under SDPA, or under what Transformers takes if nothing is asked for. Where eager and this one
        differ, one of them is wrong in Transformers (a boolean mask that eager adds, a row that sees no key)."""
        for name in ("sdpa", None):
            with contextlib.suppress(Exception):
                model = build(type(self.eager), self.eager.config, name)
                copy_state(self.eager, model)
                self.peer_name = name or "Transformers' default"
                return model
        return None


def raised(error: Exception) -> str:
    text = str(error)
    if text.startswith("flashmla"):
        return f"REFUSED {text.strip().splitlines()[0][:400]}"
    last = [f for f in traceback.extract_tb(error.__traceback__) if "torch/nn" not in f.filename][-1]
    return f"RAISES {_first_line(error)} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"


def copy_state(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Parameters and every buffer, the ones that are not saved as well."""
    with torch.no_grad():
        for kind in ("named_parameters", "named_buffers"):
            theirs = dict(getattr(source, kind)())
            ours = dict(getattr(target, kind)())
            if theirs.keys() != ours.keys():
                raise ValueError(f"{kind} differ: {sorted(theirs.keys() ^ ours.keys())[:4]}")
            for name, value in ours.items():
                if value.shape != theirs[name].shape:  # a table that grew as the model ran
                    owner, _, name_there = name.rpartition(".")
                    setattr(target.get_submodule(owner), name_there, theirs[name].clone())
                else:
                    value.copy_(theirs[name])


def _compare(model_class, eager, config, batch, result: Result, only_forward: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            ours = build(model_class, config, result.implementation)
        except Exception as error:
            if result.implementation == "flashmla" and "flash" in str(error) and raised(error).startswith("RAISES"):
                result.implementation = "fmla"  # Transformers itself refuses every name that contains "flash" here
                _compare(model_class, eager, config, batch, result, only_forward)
                return
            result.status, result.reason = "failed", f"load: {raised(error)}"
            if "REFUSED" in result.reason:
                result.status = "refused"
            return
    said = [str(w.message) for w in caught if str(w.message).startswith("flashmla")]
    copy_state(eager, ours)
    pair = Pair(eager, ours, result)
    if result.implementation == "flashmla" and _refuses_flash_names(ours, batch):
        result.implementation = "fmla"
        _compare(model_class, eager, config, batch, result, only_forward)
        return
    report = flashmla_hf.check(ours)
    result.layers = [sum(layer.uses_kernel for layer in report.layers), len(report.layers)]

    with counted_calls() as calls, _callers(ours, report) as called:
        pair.probe("forward", batch)
    result.calls = dict(calls)
    result.probes["check"] = _check_is_true(report, called)
    if not only_forward:
        more_probes(pair, batch)
    _judge(result, ours, pair, batch, said)


def _refuses_flash_names(ours, batch: dict) -> bool:
    """Whether Transformers itself refuses every name that contains "flash" here: our other name is for that."""
    try:
        run(ours, batch)
    except Exception as error:
        return str(error).startswith("Flash attention") or ("flash" in str(error) and "flashmla" not in str(error))
    return False


@contextlib.contextmanager
def _callers(model, report):
    """Which of the layers of ``report`` ran, and how many calls of the kernel each made."""
    ran: dict[str, int] = {}
    stack: list[str] = []
    handles = []
    modules = dict(model.named_modules())
    for layer in report.layers:
        module = modules[layer.name]

        def enter(module, args, name=layer.name):
            ran.setdefault(name, 0)
            stack.append(name)

        def leave(module, args, output):
            stack.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]

    def noting(name, call, run):
        if stack and name in KERNELS:
            ran[stack[-1]] += 1
        return run(call)

    try:
        with standing_in(noting):
            yield ran
    finally:
        for handle in handles:
            handle.remove()


def _check_is_true(report, called: dict[str, int]) -> str:
    """Whether ``flashmla_hf.check`` says of every layer that ran what it did."""
    for layer in report.layers:
        if layer.name in called and layer.uses_kernel != (called[layer.name] > 0):
            said = "uses the kernel" if layer.uses_kernel else f"does not ({layer.reason})"
            return f"UNTRUE: check says {layer.class_name} {said[:120]}, kernel calls {called[layer.name]}"
    return "true"


def more_probes(pair: Pair, batch: dict) -> None:
    """Masks, lengths, causality, training, generation: those that the class takes."""
    eager = pair.eager
    parameters = inspect.signature(eager.forward).parameters
    name = batches.text_mask_name(batch)
    if name == "input_ids" and "attention_mask" in parameters:
        mask_probes(pair, batch)
    elif "attention_mask" in parameters and "input_ids" not in batch:
        frame_mask_probes(pair, batch)
    if "decoder_input_ids" in batch and "decoder_attention_mask" in parameters:
        length = batch["decoder_input_ids"].shape[-1]
        mask = torch.ones(batches.BATCH, length, dtype=torch.long)
        pair.probe("decoder ones", batch | {"decoder_attention_mask": mask})
        mask = mask.clone()
        mask[0, -3:] = 0
        pad = batches.setting(eager.config, "pad_token_id", default=0)
        padded = batch["decoder_input_ids"].clone()
        padded[0, ..., -3:] = pad
        pair.probe("decoder right", batch | {"decoder_input_ids": padded, "decoder_attention_mask": mask}, mask.bool())
    _causality(pair, batch)
    if name == "input_ids" and set(batch) == {"input_ids"}:
        pair.probe("short", {"input_ids": batch["input_ids"][:, :5]})
    _training(pair, batch)
    _generation(pair, batch)


def mask_probes(pair: Pair, batch: dict) -> None:
    ids = batch["input_ids"]
    if ids.dim() != 2:
        return
    media = len(batch) > 1 and "decoder_input_ids" not in batch
    ones = torch.ones_like(ids)
    pair.probe("ones", batch | {"attention_mask": ones})
    pair.probe("bool ones", batch | {"attention_mask": ones.bool()})
    right, left, hole = ones.clone(), ones.clone(), ones.clone()
    right[0, -7:] = 0
    left[0, : 2 if media else 7] = 0
    hole[0, -9], hole[1, -5] = 0, 0
    pad = batches.setting(pair.eager.config, "pad_token_id", default=0)
    end = batches.setting(pair.eager.config, "eos_token_id", default=0)
    end = end if isinstance(end, int) else end[0]

    def padded(mask):
        """As a tokenizer pads: heads look for the token of padding, or for the one that ends the sequence."""
        tokens = ids.masked_fill(mask == 0, pad)
        last = (mask != 0).long() * torch.arange(1, mask.shape[1] + 1)
        tokens[torch.arange(len(tokens)), last.argmax(1)] = end
        return batch | {"input_ids": tokens, "attention_mask": mask}

    for probe, mask in (("right", right), ("left", left)):
        pair.probe(probe, padded(mask), mask.bool())
    pair.probe("hole", batch | {"attention_mask": hole}, hole.bool())
    pair.probe("bool left", padded(left.bool()), left.bool())
    pair.probe("int32 right", padded(right.int()), right.bool())
    pair.probe("int32 hole", batch | {"attention_mask": hole.int()}, hole.bool())


def frame_mask_probes(pair: Pair, batch: dict) -> None:
    """Padding of sounds and features: the mask is as long as one of the dimensions of the input."""
    name = next((n for n in batch if n.startswith(("input_", "inputs"))), None)
    if name is None:
        return
    for axis in range(1, batch[name].dim()):
        mask = torch.ones(batches.BATCH, batch[name].shape[axis], dtype=torch.long)
        try:
            run(pair.eager, batch | {"attention_mask": mask})
        except Exception:
            continue
        pair.probe("ones", batch | {"attention_mask": mask})
        mask = mask.clone()
        mask[0, -mask.shape[1] // 3 :] = 0
        pair.probe("right", batch | {"attention_mask": mask}, mask.bool())
        pair.probe("bool right", batch | {"attention_mask": mask.bool()}, mask.bool())
        pair.probe("int32 right", batch | {"attention_mask": mask.int()}, mask.bool())
        return


def _causality(pair: Pair, batch: dict) -> None:
    """Outputs before the last token: where eager's do not move when it changes, ours do not."""
    name = "decoder_input_ids" if "decoder_input_ids" in batch else batches.text_mask_name(batch)
    if name is None or batch[name].dim() != 2 or batch[name].is_floating_point():
        return
    other = batch[name].clone()
    other[:, -1] = torch.where(other[:, -1] == 7, 8, 7)
    length = other.shape[1]
    try:
        moves = []
        for model in (pair.eager, pair.ours):
            a, b = run(model, batch), run(model, batch | {name: other})
            moves.append({n: (a[n] - b[n]).abs().flatten(2).amax(-1)[:, :-1] for n in a
                          if a[n].is_floating_point() and a[n].dim() >= 3 and a[n].shape[:2] == (batches.BATCH, length)
                          and a[n].shape == b[n].shape})  # fmt: skip
    except Exception:
        return
    still = {n: moved <= 1e-6 for n, moved in moves[0].items() if not torch.isnan(moved).any()}
    if not any(bool(s.any()) for s in still.values()):
        return
    worst = max(float(moves[1][n][s].max()) for n, s in still.items() if s.any())
    pair.result.probes["causality"] = "equal" if worst <= 1e-4 else f"DIFFERS: earlier outputs move by {worst:.2e}"


def _training(pair: Pair, batch: dict) -> None:
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
                pair.result.probes["training"] = f"eager refuses: {_first_line(error)[:100]}"
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


def _generation(pair: Pair, batch: dict) -> None:
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


def _judge(result: Result, ours, pair: Pair, batch: dict, said: list[str]) -> None:
    if result.calls:
        with counted_calls(wrong=zeros):
            try:
                error, _ = difference(run(ours, batch), run(pair.eager, batch))
            except Exception:
                error = float("inf")
        result.probes["control of zeros"] = "noticed" if error > TOLERANCE else f"PASSES, {error:.1e}"
    result.status, result.reason = verdict(result, said[0] if said else "")


def verdict(result: Result, said: str = "") -> tuple[str, str]:
    """(status, reason) by what the probes found; ``said`` is our warning at load."""
    probes = {n: v for n, v in result.probes.items() if n not in ("check", "control of zeros")}
    bad = {n: v for n, v in probes.items() if v.startswith(("DIFFERS", "RAISES"))}
    refusals = {n: v for n, v in probes.items() if v.startswith("REFUSED")}
    if bad:
        return "failed", "; ".join(f"{n}: {v}" for n, v in bad.items())
    if refusals:
        return "refused", "; ".join(f"{n}: {v}" for n, v in refusals.items())
    if probes.get("forward", "").startswith("not judged"):
        return "not discriminating", probes["forward"]
    if not result.calls:
        return ("eager", said) if said else ("no attention", "")
    as_peer = {n: v for n, v in probes.items() if v.startswith("as ")}
    if as_peer:
        return "not as eager", "; ".join(f"{n}: {v}" for n, v in as_peer.items())
    if result.probes["control of zeros"] != "noticed":
        return "not discriminating", f"zeros instead of attention: {result.probes['control of zeros']}"
    return "equal", said
