"""The fake kernels (meta tensors, FakeTensorMode, torch.compile) refuse what the real ones refuse."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmla_hf import ops  # noqa: F401  registers the operators

FORWARD = torch.ops.flashmla.flash_attn_forward
BACKWARD = torch.ops.flashmla.flash_attn_backward


def arguments(is_packed=False, device="cpu"):
    rows = (9,) if is_packed else (2, 5)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32) if is_packed else None
    tensors = {
        "dout": torch.zeros(*rows, 4, 6), "dlse": torch.zeros(*((4, 9) if is_packed else (2, 4, 5))), "q": torch.zeros(*rows, 4, 8),
        "k": torch.zeros(*rows, 2, 8), "v": torch.zeros(*rows, 2, 6), "out": torch.zeros(*rows, 4, 6),
        "lse": torch.zeros(*((4, 9) if is_packed else (2, 4, 5))), "sinks": torch.zeros(4),
        "cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens,
    }  # fmt: skip
    return {name: x if x is None else x.to(device) for name, x in tensors.items()}


def call(operator, tensors):
    options = (9, 9, 0.3, -1, -1, 0.0, False)
    if operator is FORWARD:
        return FORWARD(*(tensors[name] for name in ("q", "k", "v", "sinks", "cu_seqlens_q", "cu_seqlens_kv")), *options)
    return BACKWARD(*tensors.values(), *options, True, True, True, True)


NAMES = {FORWARD: ("q", "k", "v", "sinks", "cu_seqlens_q", "cu_seqlens_kv"), BACKWARD: tuple(arguments())}
EACH = [(operator, name) for operator, names in NAMES.items() for name in names]
each_tensor = pytest.mark.parametrize(("operator", "name"), EACH, ids=lambda value: str(value).rsplit(".", 1)[-1])


# A dense call has no boundaries.
GIVEN = [(False, *each) for each in EACH if not each[1].startswith("cu_seqlens")] + [(True, *each) for each in EACH]


@pytest.mark.parametrize(("is_packed", "operator", "name"), GIVEN, ids=lambda value: str(value).rsplit(".", 1)[-1])
def test_a_tensor_on_another_device_is_refused(operator, name, is_packed):
    tensors = arguments(is_packed)
    call(operator, tensors)
    for changed in (
        {**tensors, name: tensors[name].to("meta")},
        {**arguments(is_packed, "meta"), name: tensors[name]},
    ):
        with pytest.raises(
            RuntimeError, match=r"flash_attn_\w+: \w+: expected a tensor on (cpu|meta) \(the device of q\)"
        ):
            call(operator, changed)


@each_tensor
def test_fakes_of_other_devices_are_refused(operator, name):
    with FakeTensorMode() as mode:
        tensors = {n: x if x is None else mode.from_tensor(x) for n, x in arguments(is_packed=True).items()}
        call(operator, tensors)
        x = tensors[name]
        tensors[name] = torch.empty(x.shape, dtype=x.dtype, device="cuda")
        with pytest.raises(Exception, match=r"expected a tensor on|Unhandled FakeTensor Device Propagation"):
            call(operator, tensors)


CHANGES = {
    "dtype": lambda x: x.to(torch.int64),
    "rank": lambda x: x[None],
    "first size": lambda x: torch.cat([x, x]),
    "last size": lambda x: torch.cat([x, x], dim=-1),
}
# Sizes that are free: of v's head dim and the rows of q, which nothing else in a forward call has.
FREE = {(FORWARD, "v", "last size"), (FORWARD, "q", "first size")}


WRONG = [(*each, change) for each in EACH for change in CHANGES if (*each, change) not in FREE]


@pytest.mark.parametrize(("operator", "name", "change"), WRONG, ids=lambda value: str(value).rsplit(".", 1)[-1])
def test_wrong_dtypes_and_shapes_are_refused_by_fake_and_real_alike(operator, name, change):
    tensors = arguments(is_packed=True)
    tensors[name] = CHANGES[change](tensors[name])
    for device in ("cpu", "meta"):
        moved = {n: x.to(device) for n, x in tensors.items()}
        with pytest.raises(RuntimeError, match=r"^flash_attn_\w+: \w+: expected "):
            call(operator, moved)


def test_one_of_the_boundaries_alone_is_refused():
    for name in ("cu_seqlens_q", "cu_seqlens_kv"):
        for device in ("cpu", "meta"):
            with pytest.raises(RuntimeError, match=f"{name}: expected a tensor, since the other cu_seqlens is"):
                call(FORWARD, {**arguments(True, device), name: None})
