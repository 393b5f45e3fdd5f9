"""What a cubin holds: its instructions, and the registers and memory of its kernel."""

import dataclasses
import re
import subprocess

from cuda import pathfinder
from jax_fp8gemm.jit.toolchain import compile_source, find_nvdisasm

REGISTERS = 65536  # of a multiprocessor, given to warps in steps of 8 a thread


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel, and what of its control bits matters here.

    Attributes:
      name: opcode with its modifiers, without the predicate.
      yields: whether the warp scheduler may turn to another warp after it; bit 45 of the upper 64 is then 0.
    """

    name: str
    yields: bool

    def is_a(self, *opcodes):
        return self.name.split(".")[0] in opcodes


# An address, the instruction, its lower 64 bits; on the next line the upper 64.
INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Za-z0-9_.]+).*/\* 0x[0-9a-f]{16} \*/\s*\n"
    r"\s+/\* (0x[0-9a-f]{16}) \*/", re.M)


def compiled(source, folder):
    """The instructions of a kernel, and what it uses."""
    path = folder / "kernel.cubin"
    path.write_bytes(compile_source(source))
    return disassemble(path), resource_usage(path)


def disassemble(path):
    """The instructions of a cubin, in order."""
    command = [find_nvdisasm(), "--print-code", "--print-instruction-encoding", str(path)]
    text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return [Instruction(name, not int(upper, 16) >> 45 & 1) for name, upper in INSTRUCTION.findall(text)]


def resource_usage(path):
    """Registers, stack and local bytes of the kernel, as cuobjdump counts them."""
    tool = pathfinder.find_nvidia_binary_utility("cuobjdump")
    assert tool is not None, "cuobjdump is needed: pip install nvidia-cuda-cuobjdump"
    command = [tool, "--dump-resource-usage", str(path)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}


def accesses(instructions, access):
    """Where the loads or stores of one width are, such as LDG.128."""
    opcode, width = access.split(".")
    return [i for i, each in enumerate(instructions) if each.is_a(opcode) and f".{width}" in each.name]


def assert_no_spills(instructions, usage):
    assert usage["STACK"] == 0
    assert not any(each.is_a("LDL", "STL") for each in instructions), "spills"


def assert_room_for(ctas, threads, usage):
    """A multiprocessor has the registers of so many CTAs."""
    assert -(-usage["REG"] // 8) * 8 * threads * ctas <= REGISTERS


def assert_loads_are_in_flight_together(instructions):
    """Nothing that needs the first of the wide loads, and no barrier, comes before the last of them."""
    loads = sorted(accesses(instructions, "LDG.128") + accesses(instructions, "LDGSTS.128"))
    waits = [i for i, each in enumerate(instructions)
             if each.is_a("STG", "STS", "STSM", "BAR", "FFMA", "F2FP")]
    assert not [i for i in waits if loads and loads[0] < i < loads[-1]]
