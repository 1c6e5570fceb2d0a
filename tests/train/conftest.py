"""Tests of this folder hold float32 base models to float32 bounds."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def products(exact_products: None) -> None:
    """As a user asks for them who compares models."""
