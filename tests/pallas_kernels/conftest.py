"""Lets pytest explain the assertions of the suites, which are no test modules themselves."""

import pytest

for module in ("comparison", "suite_block_sparse", "suite_ground_truth", "suite_decode", "suite_selection"):
    pytest.register_assert_rewrite(f"tests.pallas_kernels.{module}")
