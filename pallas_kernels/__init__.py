"""Sequence-mixing kernels behind plain functions of arrays; imports JAX only.

Every operation is a package with the same parts: `api` (validates its arguments and
picks an implementation), `reference` (the equation, one step at a time, the definition
of truth), further implementations of the same signature, and `shapes` (named shapes for
tests and benchmarks).
"""
