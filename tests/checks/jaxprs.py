"""What a traced program holds."""

from jax.extend.core import ClosedJaxpr, Jaxpr


def largest(jaxpr):
    """Returns the most elements of any intermediate, inner programs included."""
    sizes = [
        variable.aval.size
        for equation in jaxpr.eqns
        for variable in equation.outvars
        if hasattr(variable.aval, "size")
    ]
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, ClosedJaxpr):
                    sizes.append(largest(inner.jaxpr))
                elif isinstance(inner, Jaxpr):
                    sizes.append(largest(inner))
    return max(sizes, default=0)
