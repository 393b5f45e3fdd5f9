"""The FFI handlers, driven without a GPU: fake_xla.cc calls the built extension, which opens fake_cuda.cc.

test_ffi_stages.py runs each scenario in a process of its own, since a process opens the driver once:
LD_LIBRARY_PATH=FOLDER_OF_LIBCUDA python scenarios.py SCENARIO EXTENSION_MODULE LAUNCH_PY FAKE_XLA
"""

import concurrent.futures
import ctypes
import importlib.util
import json
import sys

import numpy as np

INSTANTIATE, INITIALIZE, EXECUTE = 0, 2, 3
CUBIN = (
    b"fp8_gemm 128 8 4 128 ;1024\0"  # what fake_cuda.cc reads: parameters of these sizes, 1024 static bytes
)
ADDRESSES = (0x10000, 0x20000, 0x30010)
SIZES = (300 * 256, 96 * 4, 300 * 40 * 2)  # lhs u8 [300, 256], scales f32 [96], out bf16 [300, 40]


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Call(ctypes.Structure):
    """One custom call, as XLA sees it: its state, and the stream and device of the current execution."""

    _fields_ = (("state", ctypes.c_void_p), ("stream", ctypes.c_void_p), ("device", ctypes.c_int32))


class Double:
    """The handlers of the extension, between a fake XLA and a fake driver."""

    def __init__(self, extension, launch, xla):
        self.launch = load("launch", launch)
        module = load("_ffi", extension)
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.cuda.fake_cuda_journal.restype = ctypes.c_char_p
        self.cuda.fake_cuda_stream.restype = ctypes.c_void_p
        self.xla = ctypes.CDLL(xla)
        self.xla.fake_xla_call.restype = ctypes.c_char_p
        self.xla.fake_xla_traits.restype = ctypes.c_int64
        self._type = module.kernel_type()
        self._handlers = module.handlers()
        self.xla.fake_xla_register_type(pointer(self._type["type_id"]))

    def plan(self, cubin=CUBIN, **changes):
        """A plan with every kind of argument over the buffers of ADDRESSES."""
        of = self.launch
        fields = {
            "cubin": cubin,
            "entry": "fp8_gemm",
            "grid": (6, 1, 1),
            "cluster": (2, 1, 1),
            "block": 384,
            "shared_bytes": 200000,
            "arguments": (
                of.TensorMap(0, "u8", (256, 300), (256,), (128, 64), 128),
                of.Pointer(1),
                of.Scalar(4_000_000_000),
                of.TensorMap(2, "bf16", (40, 300), (80,), (32, 64), 64),
            ),
        }
        return of.LaunchPlan(**{**fields, **changes})

    def _call(self, stage, call, plan, addresses=(), sizes=()):
        name = {INSTANTIATE: "instantiate", INITIALIZE: "initialize", EXECUTE: "execute"}[stage]
        attributes = plan.attributes()
        launch, arguments = attributes["launch"], attributes["arguments"]
        int64s = lambda array: array.ctypes.data_as(ctypes.c_void_p)  # keeps the array alive
        size = ctypes.c_size_t
        error = self.xla.fake_xla_call(
            pointer(self._handlers[name]),
            stage,
            ctypes.byref(call),
            attributes["cubin"],
            size(len(attributes["cubin"])),
            attributes["entry"].encode(),
            int64s(launch),
            size(launch.size),
            int64s(arguments),
            size(arguments.size),
            max(len(addresses) - 1, 0),
            min(len(addresses), 1),  # the last buffer is the result
            int64s(np.array(addresses, np.int64)),
            int64s(np.array(sizes, np.int64)),
        )
        return error and error.decode()

    def instantiate(self, plan, call=None):
        """The call, or the error."""
        call = call or Call()
        return self._call(INSTANTIATE, call, plan) or call

    def initialize(self, call, plan, device=0):
        return self._call(INITIALIZE, self.on(call, device), plan)

    def execute(self, call, plan, device=0, addresses=ADDRESSES, sizes=SIZES):
        return self._call(EXECUTE, self.on(call, device), plan, addresses, sizes)

    def on(self, call, device):
        return Call(call.state, self.cuda.fake_cuda_stream(device), device)

    def destroy(self, call):
        self.xla.fake_xla_destroy(pointer(self._type["type_info"]), ctypes.byref(call))

    def traits(self, name, stage):
        return self.xla.fake_xla_traits(pointer(self._handlers[name]), stage)

    def journal(self, call=None):
        """What the driver was asked since the last look (only this call, if named)."""
        lines = [json.loads(line) for line in self.cuda.fake_cuda_journal().decode().splitlines()]
        return [line for line in lines if call in (None, line["call"])]

    def fail(self, call, result):
        self.cuda.fake_cuda_fail(call.encode(), result)

    def ready(self, plan, device=0):
        """A call that is instantiated and initialized, with an empty journal."""
        call = self.instantiate(plan)
        assert isinstance(call, Call), call
        assert self.initialize(call, plan, device) is None
        self.journal()
        return call


def pointer(capsule):
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return ctypes.c_void_p(get(capsule, None))


def expect(got, *words):
    assert isinstance(got, str), f"expected an error, got {got}"
    assert all(word in got for word in words), f"expected {words} in: {got}"


def expect_compilation_alone(double, *words):
    """A machine without a usable driver compiles for others: a plan is decoded, and nothing runs."""
    plan = double.plan()
    call = double.instantiate(plan)
    assert not isinstance(call, str), call
    for _ in range(2):
        expect(double.initialize(call, plan), *words)
    expect(double.execute(call, plan), "expected a device ordinal below 0, got 0")
    assert not double.journal("cuLibraryLoadData")
    double.destroy(call)
    expect(double.instantiate(double.plan(block=0)), "malformed launch plan")


def scenario_launch(double):
    plan = double.plan()
    call = double.ready(plan)
    assert double.execute(call, plan) is None
    lhs, out, launch = double.journal()
    # CU_TENSOR_MAP_DATA_TYPE_UINT8, _SWIZZLE_128B, _L2_PROMOTION_L2_256B
    assert lhs == {
        "call": "cuTensorMapEncodeTiled",
        "map": 0,
        "type": 0,
        "address": 0x10000,
        "shape": [256, 300],
        "strides": [256],
        "box": [128, 64],
        "element_strides": [1, 1],
        "interleave": 0,
        "swizzle": 3,
        "promotion": 3,
        "fill": 0,
    }, lhs
    # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, _SWIZZLE_64B, _L2_PROMOTION_L2_128B
    assert out == {
        "call": "cuTensorMapEncodeTiled",
        "map": 1,
        "type": 9,
        "address": 0x30010,
        "shape": [40, 300],
        "strides": [80],
        "box": [32, 64],
        "element_strides": [1, 1],
        "interleave": 0,
        "swizzle": 2,
        "promotion": 2,
        "fill": 0,
    }, out
    assert launch == {
        "call": "cuLaunchKernelEx",
        "entry": "fp8_gemm",
        "context": 1,
        "stream": 1,
        "grid": [6, 1, 1],
        "block": [384, 1, 1],
        "cluster": [2, 1, 1],
        "shared_bytes": 200000,
        "parameters": [0, 0x20000, 4_000_000_000, 1],
    }, launch


def scenario_map_in_front_of_its_buffer(double):
    """300 rows of 80 bytes, as windows of 16 rows that end at any of them."""
    of = double.launch
    windows = of.TensorMap(2, "bf16", (40, 16, 301), (80, 80), (32, 16, 1), 64, lead=16 * 80)
    plan = double.plan(arguments=(*double.plan().arguments[:3], windows))
    call = double.ready(plan)
    assert double.execute(call, plan) is None
    _, out = double.journal("cuTensorMapEncodeTiled")
    assert out["address"] == ADDRESSES[2] - 16 * 80
    assert out["shape"] == [40, 16, 301]
    expect(
        double.execute(call, plan, sizes=(*SIZES[:2], SIZES[2] - 1)),
        "lead 1280 reaches over 25280 bytes",
        "23999 bytes",
    )


def scenario_plain_launch(double):
    plan = double.plan(cluster=(1, 1, 1))
    assert double.execute(double.ready(plan), plan) is None
    (launch,) = double.journal("cuLaunchKernelEx")
    assert launch["cluster"] == [0, 0, 0]  # no attribute at all


def scenario_empty_grid(double):
    plan = double.plan(grid=(6, 0, 1))
    call = double.ready(plan)
    assert double.execute(call, plan) is None
    assert double.journal() == []


def scenario_prepare_once_per_device(double):
    plan = double.plan(grid=(16, 1, 1), cluster=(16, 1, 1))
    call = double.instantiate(plan)
    assert double.journal() == [{"call": "cuLibraryLoadData", "context": 0}]  # no device's context was needed
    for device in (0, 1):
        assert double.initialize(call, plan, device) is None
        context = device + 1
        # All of the shared memory (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES), and clusters of 16.
        assert double.journal() == [
            {"call": "cuFuncLoad", "context": context},
            {"call": "cuFuncSetAttribute", "attribute": 8, "value": 232448 - 1024, "context": context},
            {"call": "cuFuncSetAttribute", "attribute": 14, "value": 1, "context": context},
        ]
        assert double.initialize(call, plan, device) is None
        assert double.journal() == []
        assert double.execute(call, plan, device) is None
        (launch,) = double.journal("cuLaunchKernelEx")
        assert (launch["context"], launch["stream"]) == (context, context)


def scenario_share_libraries(double):
    plan, same = double.plan(), double.plan(grid=(8, 1, 1))
    other = double.plan(cubin=CUBIN.replace(b"1024", b"2048"))
    calls = [double.instantiate(p) for p in (plan, same, other)]
    assert len(double.journal("cuLibraryLoadData")) == 2
    double.destroy(calls[0])
    assert double.journal() == []
    double.destroy(calls[1])
    assert double.journal() == [{"call": "cuLibraryUnload"}]
    double.instantiate(plan)
    assert len(double.journal("cuLibraryLoadData")) == 1


def scenario_threads(double):
    plan = double.plan()

    def work(device):
        call = double.instantiate(plan)
        for _ in range(50):
            assert double.initialize(call, plan, device) is None
            assert double.execute(call, plan, device) is None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, n % 2) for n in range(8)]:
            done.result()
    journal = double.journal()
    assert sum(line["call"] == "cuLibraryLoadData" for line in journal) == 1
    contexts = [line["context"] for line in journal if line["call"] == "cuLaunchKernelEx"]
    assert sorted(contexts) == [1] * 200 + [2] * 200
    assert all(line["context"] == line["stream"] for line in journal if line["call"] == "cuLaunchKernelEx")


def scenario_devices_share_one_call(double):
    plan = double.plan()
    call = double.instantiate(plan)

    def work(device):
        assert double.initialize(call, plan, device) is None
        assert double.execute(call, plan, device) is None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, n % 2) for n in range(40)]:
            done.result()
    launches = double.journal("cuLaunchKernelEx")
    assert len(launches) == 40
    assert all(line["context"] == line["stream"] for line in launches)


def scenario_bad_buffers(double):
    plan = double.plan()
    call = double.ready(plan)
    expect(
        double.execute(call, plan, addresses=ADDRESSES[:2], sizes=SIZES[:2]),
        "buffer index below 2, got 2",
        "kernel fp8_gemm",
    )
    expect(
        double.execute(call, plan, addresses=(0x10008, *ADDRESSES[1:])),
        "multiple of 16",
        str(0x10008),
        "u8 tensor map over buffer 0",
        "shape (256, 300)",
        "box (128, 64)",
    )
    expect(
        double.execute(call, plan, sizes=(*SIZES[:2], SIZES[2] - 1)),
        "reaches over 24000 bytes",
        "23999 bytes",
    )
    assert double.journal("cuLaunchKernelEx") == []


def scenario_bad_kernels(double):
    expect(
        double.instantiate(double.plan(entry="gemm")),
        "cuLibraryGetKernel: CUDA_ERROR_NOT_FOUND (as told)",
        "kernel gemm",
    )
    expect(
        double.instantiate(double.plan(block=0)), "malformed launch plan", "block: expected 1 to 1024, got 0"
    )
    for changes, words in (
        ({"shared_bytes": 231425}, ("232448", "1024", "231425")),
        ({"arguments": double.plan().arguments[:3]}, ("4 parameters", "3 arguments")),
        ({"arguments": double.plan().arguments[::-1][1:] * 2}, ("parameter 0 has 128 bytes", "argument 4")),
    ):
        plan = double.plan(**changes)
        call = double.instantiate(plan)
        expect(double.initialize(call, plan), *words)
        expect(double.execute(call, plan), "before it was initialized on device 0")
    fitting = double.plan(shared_bytes=231424)
    assert double.initialize(double.instantiate(fitting), fitting) is None


def scenario_driver_errors(double):
    plan = double.plan()
    call = double.instantiate(plan)
    expect(double.initialize(call, plan, 2), "device ordinal below 2, got 2")
    out_of_memory = 2
    double.fail("cuFuncLoad", out_of_memory)
    expect(double.initialize(call, plan), "cuFuncLoad: CUDA_ERROR_OUT_OF_MEMORY", "384 threads")
    double.fail("cuFuncLoad", 0)
    assert double.initialize(call, plan) is None  # a failure is not remembered
    for entry, words in (
        ("cuTensorMapEncodeTiled", ("CUDA_ERROR_INVALID_VALUE", "u8 tensor map")),
        ("cuLaunchKernelEx", ("CUDA_ERROR_INVALID_VALUE", "grid (6, 1, 1), cluster (2, 1, 1)")),
    ):
        double.fail(entry, 1)
        expect(double.execute(call, plan), entry, *words)
        double.fail(entry, 0)
    double.fail("cuLibraryLoadData", out_of_memory)
    expect(
        double.instantiate(double.plan(cubin=CUBIN + b"\0")),
        "cuLibraryLoadData: CUDA_ERROR_OUT_OF_MEMORY",
        f"{len(CUBIN) + 1} bytes",
    )


def scenario_no_device(double):
    double.fail("cuInit", 100)
    expect_compilation_alone(double, "cuInit: CUDA_ERROR_NO_DEVICE")


def scenario_traits(double):
    command_buffer_compatible = 1
    assert double.traits("execute", EXECUTE) & command_buffer_compatible
    assert double.traits("instantiate", INSTANTIATE) >= 0
    assert double.traits("initialize", INITIALIZE) >= 0


def old_driver(double):
    """With a libcuda that has no cuFuncLoad."""
    expect_compilation_alone(double, "libcuda.so.1 lacks cuFuncLoad", "install a driver for CUDA 13")


if __name__ == "__main__":
    globals()[sys.argv[1]](Double(*sys.argv[2:]))
