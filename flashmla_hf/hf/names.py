"""The names of our attention in Transformers, for every other file."""

# The name to use. It contains "flash" on purpose: Transformers then gives vision towers, continuous batching and static
# caches the arguments of a flash kernel (packed boundaries, 2-D masks) instead of those of SDPA.
NAME = "flashmla"
# A name without "flash", for the few models that refuse or redirect flash names: Llama 4 beyond one attention chunk,
# HRM-Text's prefix masks, ESM-C's sequence ids.
ALIAS = "fmla"
# A name for programs that accept only built-in names and names of hub kernels: "transformers serve", sequence parallelism of
# accelerate and DeepSpeed. It has the form of a hub kernel of FlashAttention 3, but is no repository: nothing is downloaded.
KERNEL_NAME = "flashmla/flash-attn3"
# Attention in fp8, which is never exact, so nobody gets it without its name.
FP8_NAME = "flashmla_fp8"
NAMES = (NAME, ALIAS, KERNEL_NAME, FP8_NAME)
# Transformers 5.17 puts this before a name for continuous batching; later releases strip it.
PAGED_PREFIX = "paged|"


def is_ours(implementation: str | None) -> bool:
    """Whether ``implementation``, as a configuration holds it, is one of our names."""
    return isinstance(implementation, str) and implementation.removeprefix(PAGED_PREFIX) in NAMES


def is_fp8(implementation: str | None) -> bool:
    """Whether ``implementation``, as a configuration holds it, is our name of attention in fp8."""
    return isinstance(implementation, str) and implementation.removeprefix(PAGED_PREFIX) == FP8_NAME
