"""Checks that the tests call, and that the mutation tests expect to fail.

`oracle` is NumPy in float64, written from the formulas; nothing in it calls the package.
"""
