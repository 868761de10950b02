"""The integration with Hugging Face Transformers: ``attn_implementation="flashmla"``.

``forward`` computes one attention layer, ``masks`` makes the masks of a model, ``boundaries`` turns them into what the kernel
reads, ``paged`` reads the caches of continuous batching, ``check`` reports which layers use the kernel, ``names`` lists our
names, and ``register`` makes them known to Transformers when it is imported. This file imports nothing, because ``check`` and
``names`` also serve programs without Transformers.
"""
