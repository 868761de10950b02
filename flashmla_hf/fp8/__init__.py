"""Attention in fp8 (e4m3): the numbers, the emulation of the kernel that is to come, and the calls.

:mod:`~flashmla_hf.fp8.quantization` turns q, k and v into fp8 and back, :mod:`~flashmla_hf.fp8.emulation` computes what a
Hopper kernel computes, block by block, :mod:`~flashmla_hf.fp8.calls` serves ``flashmla_hf.attention(..., precision="fp8")``,
and :mod:`~flashmla_hf.fp8.cached` attention to fp8 caches. There is no kernel for GPUs yet: such calls raise.
"""
