"""What a GPU can do: the figures that the choice of a configuration depends on."""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """A Hopper GPU, or the part of it that a kernel may use.

    Attributes:
      name: what JAX calls it (`device_kind`).
      num_sms: streaming multiprocessors that a kernel may use.
      flops_per_cycle: FP8 tensor-core operations of one SM (a multiplication and an addition are two).
      hbm_bytes_per_s: reads from memory, once they stream.
      l2_bytes_per_s: from L2 into all SMs.
      clock_hz: of the SMs under load: power, not the boost clock, sets it.
      shared_bytes: shared memory that a CTA can have.
      is_limited: whether `num_sms` is fewer than the GPU has, so that kernels must keep to them.
    """

    name: str
    num_sms: int
    flops_per_cycle: int = 8192
    hbm_bytes_per_s: float = 3.45e12
    l2_bytes_per_s: float = 20e12
    clock_hz: float = 1.6e9
    shared_bytes: int = 232448
    is_limited: bool = False

    @property
    def slug(self) -> str:
        """The name as a file is called: "nvidia-h200"."""
        return "-".join(self.name.lower().split())

    def limited_to(self, num_sms: int | None) -> Device:
        """This device with at most `num_sms` SMs; all of them for None."""
        if num_sms is None or num_sms >= self.num_sms:
            return self
        return dataclasses.replace(self, num_sms=num_sms, is_limited=True)

    def computes_like(self, other: Device) -> bool:
        """Whether the two differ in memory and clock alone: what fills the SMs of one fills the other's."""
        alike = lambda device: (device.num_sms, device.flops_per_cycle, device.shared_bytes)
        return alike(self) == alike(other)


# The H200's rates are measured, the others' are scaled from it by the data sheets.
H200 = Device("NVIDIA H200", num_sms=132)
KNOWN_DEVICES = (
    H200,
    Device("NVIDIA H100 80GB HBM3", num_sms=132, hbm_bytes_per_s=2.4e12),
    Device("NVIDIA H800", num_sms=132, hbm_bytes_per_s=2.4e12),
    Device("NVIDIA H100 PCIe", num_sms=114, hbm_bytes_per_s=1.4e12, clock_hz=1.3e9),
    Device("NVIDIA H20", num_sms=78, hbm_bytes_per_s=2.9e12, flops_per_cycle=2048),
)


def find_device(name: str, num_sms: int | None = None) -> Device:
    """The figures of the GPU that JAX calls `name`; an unknown one gets the H200's, but its own SMs."""
    known = next((device for device in KNOWN_DEVICES if device.name == name), H200)
    return dataclasses.replace(known, name=name, num_sms=num_sms or known.num_sms)


def current_device() -> Device:
    """The GPU that JAX runs on, or an H200 where it has none (lowering for another machine)."""
    try:
        gpu = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return H200
    return find_device(gpu.device_kind, getattr(gpu, "core_count", None))
