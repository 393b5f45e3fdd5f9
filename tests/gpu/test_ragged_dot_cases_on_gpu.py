"""The cases of test_ragged_dot_cases.py, all of them, on a Hopper GPU."""

from test_ragged_dot_cases import *  # noqa: F403
