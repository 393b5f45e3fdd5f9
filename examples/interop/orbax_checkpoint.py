"""An Orbax checkpoint of a model some of whose weights are ScaledArrays, saved and restored.

    python examples/interop/orbax_checkpoint.py
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jax_fp8gemm import quantize


def init(key):
    """Embeddings in bf16, and FP8 weights: a matrix, and those of eight experts."""
    keys, shapes = jax.random.split(key, 3), [(100, 256), (384, 256), (8, 384, 300)]
    embedding, projection, experts = map(lambda *args: jax.random.normal(*args, jnp.bfloat16), keys, shapes)
    return {"embedding": embedding,
            "layers": [{"projection": quantize(projection, (128, 128)), "experts": quantize(experts)}]}


def save_and_restore(params, path):
    template = jax.eval_shape(init, jax.random.key(0))  # shapes, dtypes, granularities
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, template)


if __name__ == "__main__":
    params = init(jax.random.key(1))
    with tempfile.TemporaryDirectory() as folder:
        restored = save_and_restore(params, pathlib.Path(folder) / "params")
    for (path, leaf), saved in zip(jax.tree.leaves_with_path(restored), jax.tree.leaves(params), strict=True):
        is_same = jnp.array_equal(leaf.view(jnp.uint8), saved.view(jnp.uint8))
        print(f"{jax.tree_util.keystr(path):34}{leaf.dtype!s:15}{leaf.shape!s:16}"
              f"{'restored' if is_same else 'CHANGED'}")
    print("granularity of the projection:", restored["layers"][0]["projection"].granularity)
