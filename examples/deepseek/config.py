"""All that a run depends on, besides its seed and its precision: the model's sizes, and how it is trained."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, get_type_hints


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes with the names of DeepSeek-V3's report, and the settings of a training run.

    Attributes:
      vocabulary: tokens; 256 for bytes.
      hidden: width of the residual stream.
      dense_layers: first layers, with a dense feed-forward.
      moe_layers: the layers after them, with experts.
      heads: of attention.
      q_rank, kv_rank: widths that queries, and keys with values, are compressed to.
      nope_dim, rope_dim: of a head's queries and keys, the part without positions and the rotated part, which
        all heads' keys share.
      v_dim: of a head's values.
      rope_theta: base of the wavelengths.
      dense_intermediate: width of the dense feed-forward.
      experts, experts_per_token: routed experts, and how many of them a token takes.
      shared_experts: each token takes these too; they are one feed-forward, as wide as that many experts.
      expert_intermediate: width of one expert.
      routed_scaling: factor of the routing weights, which add up to one before it.
      capacity_factor: of the tokens that a device has room for in expert parallelism, over those that come if
        all experts have as many; what is beyond is left out.
      bias_speed: how far a step moves the bias of an expert that has too many or too few tokens.
      attention: "xla", or "cudnn", which needs a GPU and heads that its kernel takes.
      remat: keep only the results of GEMMs of a layer, and compute the rest again in the backward pass.
      remat_experts: with it, compute the results of the routed experts' GEMMs again, too, which are more than
        half of what layers keep. The experts' work grows by a third; their weights are gathered once more.
      unroll: write the loops over layers out: nothing that a layer keeps is copied, for a longer compilation.
      sequence, batch: tokens of a sequence, sequences of a step.
      steps: of the whole run; the learning rate's schedule spans them.
      warmup: steps until the learning rate has its peak; it falls from there to a tenth, as a cosine.
      learning_rate: the peak.
      weight_decay, beta1, beta2, clip: of AdamW; the gradient's largest global norm.
      validation_every, validation_batches: steps between two validations, and the batches of one.
    """

    vocabulary: int
    hidden: int
    dense_layers: int
    moe_layers: int
    heads: int
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    dense_intermediate: int
    experts: int
    experts_per_token: int
    shared_experts: int
    expert_intermediate: int
    bias_speed: float
    sequence: int
    batch: int
    steps: int
    warmup: int
    learning_rate: float
    remat: bool
    routed_scaling: float = 2.5
    rope_theta: float = 10_000.0
    capacity_factor: float = 2.0
    attention: str = "xla"
    remat_experts: bool = False
    unroll: bool = False
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    validation_every: int = 250
    validation_batches: int = 8

    def __post_init__(self):
        for name, kind in get_type_hints(Config).items():
            value = getattr(self, name)
            allowed = (int, float) if kind is float else (kind,)
            if type(value) not in allowed:
                raise ValueError(f"Config: {name}: expected {kind.__name__}, got {value!r}")
            if kind is int and value < (0 if name in _MAY_BE_ZERO else 1):
                raise ValueError(f"Config: {name}: expected at least 1, got {value}")
        if not self.capacity_factor >= 1:
            raise ValueError(f"Config: capacity_factor: expected at least 1, got {self.capacity_factor}")
        if self.experts_per_token > self.experts:
            raise ValueError(f"Config: experts_per_token: expected at most experts = {self.experts}, got "
                             f"{self.experts_per_token}")
        if self.rope_dim % 2:
            raise ValueError(f"Config: rope_dim: expected an even number, got {self.rope_dim}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.sequence

    @property
    def layers(self) -> int:
        return self.dense_layers + self.moe_layers

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim


_MAY_BE_ZERO = ("warmup",)

PRESETS = {
    # Runs on a CPU; widths that are no multiples of 128 among them.
    "tiny": Config(
        vocabulary=256, hidden=128, dense_layers=1, moe_layers=2, heads=2, q_rank=48, kv_rank=32, nope_dim=16,
        rope_dim=8, v_dim=16, dense_intermediate=256, experts=4, experts_per_token=2, shared_experts=1,
        expert_intermediate=96, bias_speed=0.01, sequence=64, batch=4, steps=60, warmup=5,
        learning_rate=3e-3, remat=True, validation_every=20, validation_batches=2),
    # 342 million parameters, 154 million of them active, for one Hopper GPU: GEMMs that are worth FP8.
    "small": Config(
        vocabulary=256, hidden=2048, dense_layers=1, moe_layers=5, heads=8, q_rank=768, kv_rank=256,
        nope_dim=64, rope_dim=64, v_dim=128, dense_intermediate=4096, experts=8, experts_per_token=2,
        shared_experts=1, expert_intermediate=1024, bias_speed=0.005, sequence=1024, batch=16, steps=2000,
        warmup=100, learning_rate=3e-4, remat=False, unroll=True),
    # DeepSeek-V3: 671 billion parameters, 37 billion of them active.
    "v3": Config(
        vocabulary=129_280, hidden=7168, dense_layers=3, moe_layers=58, heads=128, q_rank=1536, kv_rank=512,
        nope_dim=128, rope_dim=64, v_dim=128, dense_intermediate=18_432, experts=256, experts_per_token=8,
        shared_experts=1, expert_intermediate=2048, bias_speed=0.001, sequence=4096, batch=15_360,
        steps=235_000, warmup=2000, learning_rate=2.2e-4, remat=True, remat_experts=True),
}


def load(name: str, overrides: dict[str, Any] | None = None) -> Config:
    """The preset of this name, or the configuration in this JSON file, with some of its fields replaced.

    Raises:
      ValueError: there is no such preset or file, or a field does not exist or has a value that does not fit.
    """
    if name in PRESETS:
        fields = dataclasses.asdict(PRESETS[name])
    elif pathlib.Path(name).is_file():
        fields = json.loads(pathlib.Path(name).read_text())
    else:
        raise ValueError(f"config: expected a JSON file or one of {', '.join(PRESETS)}, got {name!r}")
    fields |= overrides or {}
    known = {field.name for field in dataclasses.fields(Config)}
    required = {field.name for field in dataclasses.fields(Config) if field.default is dataclasses.MISSING}
    if wrong := sorted(fields.keys() - known) + sorted(required - fields.keys()):
        raise ValueError(f"config {name!r}: expected the fields of Config, got unknown or no {wrong}")
    return Config(**fields)
