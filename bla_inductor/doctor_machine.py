"""What the doctor sees without running anything: versions, devices, settings, caches."""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from bla_inductor._version import __version__
from bla_inductor.doctor import Finding, note, ok, problem

__all__ = ["caches", "compiler", "devices", "has_gpu", "settings", "triton_error", "versions"]

_OLDEST_TORCH, _NEWEST_TORCH = (2, 11), (2, 15)  # that the tests were run with
_REINSTALL = "pip install --upgrade --force-reinstall bla-inductor"


def versions() -> Iterator[Finding]:
    yield ok(f"bla_inductor {__version__}, {Path(__file__).parent}")
    yield ok(f"Python {platform.python_version()}, {platform.platform()}")
    yield from _torch()
    yield from _triton()
    yield from _registration()
    found = compiler()
    if found:
        yield ok(f"C++ compiler {found}")
    else:
        which = note if has_gpu() else problem
        yield which("no C++ compiler: Inductor compiles nothing for the CPU", "install g++")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield problem(f"torch cannot be imported: {error}", "install it: https://pytorch.org")
        return
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    built = f"ROCm {torch.version.hip}" if torch.version.hip else built
    text = f"torch {torch.__version__}, built for {built}"
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < _OLDEST_TORCH:
        yield problem(text, "torch 2.11 is the oldest that is supported: pip install -U torch")
    elif version > _NEWEST_TORCH:
        newest = ".".join(map(str, _NEWEST_TORCH))
        yield note(f"{text}: newer than {newest}, the newest that was tested")
    else:
        yield ok(text)
    driver = _driver()
    if driver:
        yield ok(f"NVIDIA driver {driver}")
    if driver and not torch.version.cuda:
        yield problem(
            "there is an NVIDIA driver, but this torch was built without CUDA",
            "install a build with CUDA: https://pytorch.org/get-started/locally",
        )
    elif torch.version.cuda and not torch.cuda.is_available() and driver:
        if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
            yield note("CUDA_VISIBLE_DEVICES hides the GPUs")
        else:
            yield problem(
                f"torch finds no GPU: driver {driver} may be too old for CUDA {torch.version.cuda}",
                "update the driver, or install a torch for an older CUDA; nvidia-smi tells both",
            )


def _driver() -> str:
    """The version of NVIDIA's driver, if there is one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]


def triton_error() -> str:
    """Why Triton cannot be used; empty if it can."""
    try:
        importlib.import_module("triton.language")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _triton() -> Iterator[Finding]:
    error = triton_error()
    gpu = has_gpu()
    if error:
        text = f"Triton cannot be imported ({error}): CUDA tensors run in ATen, and Inductor cannot"
        missing = error.startswith("ModuleNotFoundError")
        which = problem if gpu or not missing else note
        yield which(text, f"pip install {_wanted_triton() or 'triton'}")
        return
    version = metadata.version("triton") if _installed("triton") else "of unknown version"
    wanted = _wanted_triton()
    if gpu and wanted.startswith("triton==") and wanted != f"triton=={version}":
        yield problem(
            f"triton {version}, but this torch was made with {wanted}", f"pip install {wanted}"
        )
    else:
        yield ok(f"triton {version}")


def _wanted_triton() -> str:
    """The requirement of the torch that is installed; a CPU build has none."""
    wanted = [r for r in metadata.requires("torch") or () if re.match(r"triton\b", r)]
    return wanted[0].partition(";")[0].replace(" ", "") if wanted else ""


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _registration() -> Iterator[Finding]:
    group = metadata.entry_points(group="torch_dynamo_backends")
    found = {point.value for point in group if point.name == "bla"}
    if found == {"bla_inductor.backend:bla"}:
        yield ok('torch.compile(model, backend="bla") finds the backend')
    elif not found:
        yield problem('torch.compile does not know backend="bla"', _REINSTALL)
    else:
        yield problem(f'backend="bla" is {", ".join(sorted(found))}', "uninstall the other one")


def has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def compiler() -> str:
    """The C++ compiler that Inductor will find."""
    usual = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", usual)) or ""


def devices() -> Iterator[Finding]:
    import torch

    simd = torch.backends.cpu.get_cpu_capability()
    yield ok(f"CPU: {platform.machine()}, {simd}, {torch.get_num_threads()} threads")
    if not has_gpu():
        yield note("no GPU: the Triton kernels do not run here")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        text = (
            f"cuda:{index}: {device.name}, compute capability {device.major}.{device.minor}, "
            f"{memory}, {device.multi_processor_count} multiprocessors"
        )
        if torch.version.hip:
            yield note(f"{text}: the kernels were never run on ROCm")
        elif device.major < 8:
            yield problem(
                f"{text}: the kernels need 8.0",
                "compile with options={'rewrite': 'off'} or backend='inductor' on this GPU",
            )
        else:
            yield ok(text)


_DISABLING = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")


def settings() -> Iterator[Finding]:
    import torch

    from bla_inductor.errors import BlaOptionError
    from bla_inductor.options import Options, variable_of

    environ = os.environ
    found: list[Finding] = []
    if environ.get("TRITON_INTERPRET", "0") != "0":
        found.append(
            problem(
                "TRITON_INTERPRET is set: kernels run in Triton's interpreter, slow and not exact",
                "unset TRITON_INTERPRET",
            )
        )
    for name in _DISABLING:
        if environ.get(name, "0") != "0":
            found.append(problem(f"{name} is set: nothing is compiled", f"unset {name}"))
    try:
        options, _ = Options.parse()
        if options != Options():
            found.append(note(f"options of the environment: {_changed(options)}"))
    except BlaOptionError as error:
        found.append(problem(f"the environment: {error}", "correct or unset the variable"))
    known = {variable_of(row.name) for row in fields(Options)}
    for name in sorted(n for n in environ if n.startswith("BLA_") and n not in known):
        found.append(note(f"{name} is no option of bla", f"there are {', '.join(sorted(known))}"))
    if environ.get("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "0") != "0":
        found.append(note("Inductor's caches are off: every process compiles everything"))
    if environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        found.append(note("CUDA_LAUNCH_BLOCKING is set: the host waits for every kernel"))
    if has_gpu() and torch.get_float32_matmul_precision() == "highest":
        found.append(
            note(
                "float32 products run at precision 'highest', on the CUDA cores",
                "torch.set_float32_matmul_precision('high') lets the tensor cores do it",
            )
        )
    yield from found or [ok("no environment variable and no setting changes what is done")]


def _changed(options: Any) -> str:
    values = [(row, getattr(options, row.name)) for row in fields(options)]
    return ", ".join(f"{row.name}={value!r}" for row, value in values if value != row.default)


def caches() -> Iterator[Finding]:
    variable = "TORCHINDUCTOR_CACHE_DIR"
    folder = os.environ.get(variable)
    if not folder:  # else the import makes the folder, and fails where that cannot be
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        folder = default_cache_dir()
    yield _cache("Inductor", folder, variable)
    home = os.environ.get("TRITON_HOME") or Path.home()
    triton = os.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton" / "cache"
    yield _cache("Triton", triton, "TRITON_CACHE_DIR")


def _cache(name: str, folder: str | os.PathLike[str], variable: str) -> Finding:
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        return problem(
            f"{name}: {path} cannot be written ({error.strerror}): nothing can be compiled",
            f"set {variable} to a folder that can",
        )
    free = shutil.disk_usage(path).free
    text = f"{name}: {path}, {_size(path) / 2**20:.0f} MiB in use, {free / 2**30:.1f} GiB free"
    if free < 2**30:
        return problem(f"{text}: too little", f"make room, or set {variable} to another disk")
    if os.statvfs(path).f_flag & getattr(os, "ST_NOEXEC", 0):
        return problem(
            f"{text}: mounted noexec, so that what is compiled cannot be loaded",
            f"set {variable} to a folder on another file system",
        )
    return ok(text)


def _size(path: Path) -> int:
    total = 0
    for folder, _, files in os.walk(path):
        for file in files:
            try:
                total += os.lstat(os.path.join(folder, file)).st_size
            except OSError:  # another process has removed it
                continue
    return total
