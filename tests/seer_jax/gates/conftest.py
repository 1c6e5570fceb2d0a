"""Scores are float32 by themselves: products have the precision that users have."""

import pytest


@pytest.fixture(scope="module")
def products() -> None:
    """In place of the fixture of the folder above, which asks for the highest precision."""
