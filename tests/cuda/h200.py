"""An H200 that is not there: enough of a GPU for tracing and for Inductor's code generation. Nothing can be run on it.

    autograd        asks the device for its stream, so PyTorch for CPUs gets hooks and a guard that do nothing
    attention       asks the device which of its kernels fits: flash attention, as an H200 answers for 16 bits
    Inductor        asks for the number of multiprocessors and the like
    Triton          asks a driver what to compile for; nothing is compiled

PyTorch looks for the hooks once, when it is first imported, so this must come before; it cannot be undone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import pathlib
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import Any
from unittest import mock

HOOKS = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
struct Guard : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

namespace native {
int64_t choose(const Tensor& query, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
               std::optional<double>, bool) {
  constexpr int64_t flash = 1, efficient = 2;
  return query.element_size() == 2 ? flash : efficient;
}
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choose)
}
}
"""


def _load_hooks() -> ctypes.CDLL:
    assert "torch" not in sys.modules, "PyTorch has looked for its CUDA hooks already"
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_folder = pathlib.Path(spec.origin).parent
    libraries = torch_folder / "lib"
    with tempfile.TemporaryDirectory() as name:
        source, library = pathlib.Path(name, "hooks.cpp"), pathlib.Path(name, "hooks.so")
        source.write_text(HOOKS)
        flags = ["-std=c++20", "-shared", "-fPIC", "-I", torch_folder / "include"]
        link = ["-L", libraries, "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
        subprocess.run(["c++", *flags, source, "-o", library, *link], check=True)
        return ctypes.CDLL(str(library))


_hooks = _load_hooks()

import torch  # noqa: E402
from torch._dynamo import device_interface  # noqa: E402

PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 << 30,
    L2_cache_size=60 << 20,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    warp_size=32,
    gcnArchName="",
)


class Interface(device_interface.CudaInterface):
    """What Dynamo and Inductor know of a device type."""

    class Worker(device_interface.CudaInterface.Worker):
        @staticmethod
        def get_device_properties(device: Any = None) -> Any:
            return PROPERTIES

    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_device_properties = staticmethod(lambda device=None: PROPERTIES)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    synchronize = staticmethod(lambda device=None: None)
    get_raw_stream = staticmethod(lambda device: 0)
    exchange_device = maybe_exchange_device = staticmethod(lambda device: 0)


_kernels = torch.library.Library("aten", "IMPL")
for _op in ("_fused_rms_norm", "_fused_rms_norm_backward"):
    _kernels.impl(_op, lambda *args: None, "CUDA")  # where there is a kernel PyTorch does not write the layer out
for _name, _function in {
    "_lazy_init": lambda: None,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "is_bf16_supported": lambda including_emulation=True: True,
    "synchronize": lambda device=None: None,
}.items():
    mock.patch.object(torch.cuda, _name, _function).start()
mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False).start()
list(device_interface.get_registered_device_interfaces())  # registers the true ones, once
for _name in ("cuda", "cuda:0"):
    device_interface.register_interface_for_device(_name, Interface)
