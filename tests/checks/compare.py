"""Comparison of arrays: finite first, then shape, and a reference that says something."""

import numpy as np


def assert_close(actual, expected, atol=1e-4, name="value"):
    """Largest absolute difference; the reference must exceed it by far."""
    got = np.asarray(actual, np.float64)
    want = np.asarray(expected, np.float64)
    assert got.shape == want.shape, f"{name}: shape {got.shape} is not {want.shape}"
    assert np.isfinite(got).all(), f"{name}: not finite"
    assert np.isfinite(want).all(), f"{name}: the reference is not finite"
    assert np.abs(want).max() > 20 * atol, f"{name}: the reference is about zero"
    error = np.abs(got - want).max()
    assert error <= atol, f"{name}: differs by {error:.2e} > {atol:.0e}"


def assert_trees_close(actual, expected, rtol):
    """Relative error in norm of every entry of two flat dicts."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        got = np.asarray(actual[name], np.float64)
        want = np.asarray(value, np.float64)
        assert got.shape == want.shape, f"{name}: {got.shape} is not {want.shape}"
        assert np.isfinite(got).all(), f"{name}: not finite"
        norm = np.linalg.norm(want)
        assert norm > 1e-7 * np.sqrt(want.size), f"{name}: the reference is about zero"
        error = np.linalg.norm(got - want) / norm
        assert error <= rtol, f"{name}: relative error {error:.2e} > {rtol:.0e}"
