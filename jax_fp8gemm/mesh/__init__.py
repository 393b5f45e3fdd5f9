"""How an operation lies on a mesh of devices: one rule, in every mode that JAX has. `sharding.py` has the rules."""
