"""Tests of this folder hold float32 base models to float32 bounds, and compile many programs that each run for a moment."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def products(exact_products: None, compile_quickly: None) -> None:
    """As a user asks for them who compares models."""
