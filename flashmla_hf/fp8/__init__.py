"""Attention in fp8 (e4m3): the numbers, the kernel and its emulation, and the calls.

:mod:`~flashmla_hf.fp8.quantization` turns q, k and v into fp8 and back, :mod:`~flashmla_hf.fp8.emulation` computes what the
Hopper kernel computes, block by block, and :mod:`~flashmla_hf.fp8.kernel` calls that. :mod:`~flashmla_hf.fp8.calls` serves
``flashmla_hf.attention(..., precision="fp8")``, and :mod:`~flashmla_hf.fp8.cached` attention to fp8 caches, which has no kernel
for GPUs yet: such calls raise.
"""
