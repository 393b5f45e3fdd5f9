"""How an operation lies on a mesh of devices, in every mode that JAX has. `sharding.py` has the rules."""
