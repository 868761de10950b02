"""Small calls of ``attention`` as keyword arguments: a dense one, a packed one, and the tensors to change in them."""

import torch


def x(*shape, **options):
    return torch.zeros(shape, **options)


def cu(*values, **options):
    return torch.tensor(values, **{"dtype": torch.int32, **options})


def qkv(**changes):
    return {"q": x(2, 5, 4, 8), "k": x(2, 6, 2, 8), "v": x(2, 6, 2, 8), **changes}


def packed(**changes):
    return {
        "q": x(9, 4, 8), "k": x(9, 2, 8), "v": x(9, 2, 8), "cu_seqlens_q": cu(0, 4, 9), "cu_seqlens_kv": cu(0, 4, 9), **changes,
    }  # fmt: skip
