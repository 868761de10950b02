"""The names of the attention in Transformers. Every other file asks here."""

# The name to use. It contains "flash" on purpose: Transformers then hands vision towers, continuous batching and static
# caches what a flash kernel wants (packed boundaries, 2-D masks) instead of what SDPA wants.
NAME = "flashmla"
# A name without "flash", for the few models that refuse or redirect flash names: Llama 4 beyond one attention chunk,
# HRM-Text's prefix masks, ESM-C's sequence ids.
ALIAS = "fmla"
# A name for the places that check names and take built-in ones or those of hub kernels: "transformers serve", sequence
# parallelism of accelerate and DeepSpeed. It has the shape of a hub kernel of FlashAttention 3, but is no repository:
# nothing is ever downloaded for it.
KERNEL_NAME = "flashmla/flash-attn3"
NAMES = (NAME, ALIAS, KERNEL_NAME)
# Transformers 5.17 puts this before a name for continuous batching; later releases strip it.
PAGED_PREFIX = "paged|"


def is_ours(implementation: str | None) -> bool:
    """Whether ``implementation``, as a configuration holds it, is one of our names."""
    return isinstance(implementation, str) and implementation.removeprefix(PAGED_PREFIX) in NAMES
