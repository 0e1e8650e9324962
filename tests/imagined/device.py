"""A CUDA device for a torch that was built without CUDA, as far as tracing asks for one.

`imagine()` comes before torch is imported. Autograd guards the device of its inputs and asks its
hooks whether there is one: both are registered here, by a library that g++ makes once.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device d) const noexcept override { return Stream(Stream::DEFAULT, d); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
};
static impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new Guard());
using at::CUDAHooksRegistry;
using at::CUDAHooksArgs;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
"""


def imagine() -> None:
    assert "torch" not in sys.modules
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    torch = Path(found.origin).parent
    version = importlib.metadata.version("torch")
    library = Path(tempfile.gettempdir()) / f"imagined_cuda_{os.getuid()}_{version}" / "device.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        source, made = library.with_suffix(".cpp"), library.with_suffix(f".{os.getpid()}")
        source.write_text(_SOURCE)
        paths = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
        flags = ["-std=c++20", "-shared", "-fPIC", *paths, str(source), "-ltorch_cpu", "-lc10"]
        subprocess.run(["g++", *flags, "-o", str(made)], check=True, timeout=120)
        made.replace(library)
    ctypes.CDLL(str(torch / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
