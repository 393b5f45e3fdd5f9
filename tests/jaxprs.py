"""Equations of a jaxpr, those inside of scans, checkpoints and other calls included."""

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def equations(jaxpr, name=None):
    """The equations, of the primitive of that name or of all; the body of a scan counts once."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    for eqn in jaxpr.eqns:
        if name in (None, eqn.primitive.name):
            yield eqn
        # NOTES: rules of custom_vjp are no jaxprs, so that a function's derivative is not counted with it.
        for leaf in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
            if isinstance(leaf, Jaxpr | ClosedJaxpr):
                yield from equations(leaf, name)


def count(function, name, *args):
    """How many equations of this primitive tracing `function` gives."""
    return len(list(equations(jax.make_jaxpr(function)(*args), name)))
