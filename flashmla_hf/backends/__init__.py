"""The implementations behind :func:`flashmla_hf.attention`, a module each; see :mod:`flashmla_hf.backend`."""
