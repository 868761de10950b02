"""Property-based: whatever call the strategy draws, the CPU kernel keeps the error rule, forward and backward."""

import pytest
import torch
from cases import calls
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import check

# Split by dtype so that two workers share the work.
CASES_PER_DTYPE = {torch.float32: 900, torch.bfloat16: 700, torch.float16: 500}


@pytest.mark.parametrize("dtype", CASES_PER_DTYPE, ids=str)
def test_random_calls_keep_the_error_rule(dtype):
    @settings(
        max_examples=CASES_PER_DTYPE[dtype], deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(case=calls(), seed=st.integers(0, 2**31))
    def property_(case, seed):
        check("cpu", case, dtype, seed=seed)

    property_()
