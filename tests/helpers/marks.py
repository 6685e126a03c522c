"""Marks for single cases of a parametrized test."""

from functools import partial

import pytest

slow = partial(pytest.param, marks=pytest.mark.slow)
