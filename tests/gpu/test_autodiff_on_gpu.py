"""The differentiable products on a Hopper GPU: the tests of their meaning, run by the kernels."""

from test_autodiff import *  # noqa: F403
