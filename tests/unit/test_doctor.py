"""`python -m bla_inductor doctor`: what it says where all is well, and of each fault."""

from __future__ import annotations

import functools
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bla_inductor import backend, doctor, doctor_machine, doctor_selftest
from bla_inductor.__main__ import main
from bla_inductor.doctor import Finding
from bla_inductor.ops import aten

Fault = Callable[[pytest.MonkeyPatch, Path], None]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of this machine, and a compiler that takes a quarter of a minute, stay out."""
    for name in ("TRITON_INTERPRET", *doctor_machine._DISABLING):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor_selftest, "compiler", lambda: "")


def told(section: Callable[[], Iterator[Finding]], level: str = "problem") -> str:
    return "\n".join(str(f) for f in doctor._guarded(section) if f.level == level)


def sets(**variables: str) -> Fault:
    def fault(patch: pytest.MonkeyPatch, folder: Path) -> None:
        for name, value in variables.items():
            patch.setenv(name, value.format(folder=folder))

    return fault


def replaces(owner: Any, name: str, value: Any) -> Fault:
    return lambda patch, folder: patch.setattr(owner, name, value)


def all_of(*faults: Fault) -> Fault:
    def fault(patch: pytest.MonkeyPatch, folder: Path) -> None:
        for one in faults:
            one(patch, folder)

    return fault


def raising(error: Exception) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


def gpu(major: int = 9) -> Fault:
    properties = types.SimpleNamespace(
        name="imagined", major=major, minor=0, total_memory=80 << 30, multi_processor_count=132
    )
    return all_of(
        replaces(torch.cuda, "is_available", lambda: True),
        replaces(torch.cuda, "device_count", lambda: 1),
        replaces(torch.cuda, "get_device_properties", lambda index: properties),
    )


def usage(free: int) -> Callable[[Any], Any]:
    return lambda path: types.SimpleNamespace(free=free)


def off(function: Callable[..., Any], which: int) -> Callable[..., Any]:
    """`function` of aten.py, one of its results 1 % too large."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        results = list(function(*args, **kwargs))
        results[which] = results[which] * 1.01
        return results

    return wrong


def entry_points(*values: str) -> Callable[..., Any]:
    return lambda group: [types.SimpleNamespace(name="bla", value=v) for v in values]


machine, metadata = doctor_machine, doctor_machine.metadata
triton_is_broken = replaces(machine.importlib, "import_module", raising(OSError("no libstdc++")))
no_triton = replaces(
    machine.importlib, "import_module", raising(ModuleNotFoundError("No module named 'triton'"))
)

# name → (the fault, the section that tells, what it says, what it says to do)
FAULTS: dict[str, tuple[Fault, str, str, str]] = {
    "torch": (replaces(torch, "__version__", "2.9.1"), "versions", "torch 2.9.1", "-U torch"),
    "torch without CUDA": (
        all_of(
            replaces(machine, "_driver", lambda: "570.1"),
            replaces(torch.version, "cuda", None),
            replaces(torch.cuda, "is_available", lambda: False),
        ),
        "versions",
        "built without CUDA", "install a build with CUDA",
    ),
    "driver": (
        all_of(
            replaces(machine, "_driver", lambda: "390.1"),
            replaces(torch.version, "cuda", "13.0"),
            replaces(torch.cuda, "is_available", lambda: False),
        ),
        "versions", "torch finds no GPU: driver 390.1 may be too old", "update the driver",
    ),
    "triton broken": (triton_is_broken, "versions", "no libstdc++", "pip install triton"),
    "no triton": (all_of(gpu(), no_triton), "versions", "Triton cannot be imported", "pip install"),
    "another triton": (
        all_of(gpu(), replaces(metadata, "requires", lambda name: ['triton==1.2 ; os == "a"'])),
        "versions", "made with triton==1.2", "pip install triton==1.2",
    ),
    "no backend": (
        replaces(metadata, "entry_points", entry_points()), "versions",
        "does not know", "reinstall bla-inductor",
    ),
    "two backends": (
        replaces(metadata, "entry_points", entry_points("other:bla", "bla_inductor.backend:bla")),
        "versions", "bla_inductor.backend:bla, other:bla", "uninstall the other",
    ),
    "no compiler": (
        all_of(
            replaces(machine.shutil, "which", lambda name: None),
            replaces(torch.cuda, "is_available", lambda: False),
        ),
        "versions", "no C++ compiler", "install g++",
    ),
    "another compiler": (
        all_of(sets(CXX="{folder}/g++"), replaces(torch.cuda, "is_available", lambda: False)),
        "versions", "no C++ compiler", "install g++",
    ),
    "an old GPU": (gpu(major=7), "devices", "compute capability 7.0", "'rewrite': 'off'"),
    "interpreter": (sets(TRITON_INTERPRET="1"), "settings", "TRITON_INTERPRET", "unset"),
    "no dynamo": (sets(TORCHDYNAMO_DISABLE="1"), "settings", "nothing is compiled", "unset"),
    "a wrong option": (sets(BLA_INNER="indctor"), "settings", "did you mean 'inductor'", "unset"),
    "an unwritable cache": (
        sets(TORCHINDUCTOR_CACHE_DIR="{folder}/file/cache"), "caches",
        "Inductor: ", "set TORCHINDUCTOR_CACHE_DIR",
    ),
    "Triton's cache": (
        sets(TRITON_CACHE_DIR="{folder}/file/cache"), "caches",
        "Triton: ", "set TRITON_CACHE_DIR",
    ),
    "a full disk": (
        replaces(machine.shutil, "disk_usage", usage(10**6)), "caches", "too little", "make room",
    ),
    "noexec": (
        all_of(
            replaces(machine.shutil, "disk_usage", usage(2**40)),
            replaces(machine.os, "statvfs", lambda path: types.SimpleNamespace(f_flag=8)),
        ),
        "caches", "mounted noexec", "another file system",
    ),
    "a wrong result": (
        replaces(aten, "forward", off(aten.forward, 0)), "errors",
        "operator, cpu, float32: forward 1.0e-02", "please report it",
    ),
    "a wrong gradient": (
        replaces(aten, "backward", off(aten.backward, 1)), "errors",
        "compiled model, cpu, float32, aot_eager: forward", "please report it",
    ),
    "a failing operator": (
        replaces(aten, "forward", raising(ZeroDivisionError("on purpose"))), "errors",
        "operator, cpu, bfloat16: ZeroDivisionError: on purpose", "please report it",
    ),
    "a failing analysis": (
        replaces(backend, "rewrite", raising(ZeroDivisionError("on purpose"))), "errors",
        "compiled model, cpu, float32, aot_eager: BackendCompilerFailed", "please report it",
    ),
    "a backend that does nothing": (
        replaces(torch, "compile", lambda function, **_: function), "errors",
        "nothing was rewritten", "please report it",
    ),
    "a warning": (
        replaces(backend, "announce", lambda report: backend.log.warning("on purpose")), "errors",
        "it warned: on purpose", "please report it",
    ),
}  # fmt: skip


def section_named(name: str) -> Callable[[], Iterator[Finding]]:
    return getattr(doctor_selftest if name == "errors" else doctor_machine, name)


@functools.cache
def untouched(section: str) -> str:
    return told(section_named(section))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_with_what_to_do(name: str, monkeypatch: Any, tmp_path: Path) -> None:
    fault, section, words, todo = FAULTS[name]
    (tmp_path / "file").write_text("")
    assert words not in untouched(section)
    fault(monkeypatch, tmp_path)
    text = told(section_named(section))
    assert words in text
    assert todo in text


@pytest.mark.parametrize(
    "variables",
    [
        {"BLA_REWRITE": "offf"},
        {"TORCH_COMPILE_DISABLE": "1"},
        {"TORCHINDUCTOR_CACHE_DIR": "{folder}/file"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_a_wrong_setting_is_not_blamed_on_the_self_test(
    variables: dict[str, str], monkeypatch: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    sets(**variables)(monkeypatch, tmp_path)
    assert told(doctor._errors) == ""
    assert "not run" in told(doctor._errors, "note")


def test_no_gpu_and_no_triton_is_no_fault(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    no_triton(monkeypatch, Path())
    assert told(doctor_machine.versions) == ""
    assert "CUDA tensors run in ATen" in told(doctor_machine.versions, "note")
    assert "no GPU" in told(doctor_machine.devices, "note")


def test_a_variable_that_is_no_option_is_noted(monkeypatch: Any) -> None:
    monkeypatch.setenv("BLA_STRCT", "1")
    assert "BLA_STRCT is no option" in told(doctor_machine.settings, "note")
    monkeypatch.setenv("BLA_REWRITE", "off")
    assert "rewrite='off'" in told(doctor_machine.settings, "note")


def test_the_table_follows_the_dispatch_and_the_cost_model(monkeypatch: Any) -> None:
    assert "cuda" not in told(doctor_selftest.kernels, "ok")
    gpu()(monkeypatch, Path())
    asked: list[Any] = []

    def decide(problem: Any) -> Any:
        asked.append(problem)
        pays = problem.c < 160 and not (problem.gradients and problem.float32)
        pays = pays or problem.wide
        return types.SimpleNamespace(pays=pays)

    monkeypatch.setattr(doctor_selftest, "decide", decide)
    lines = {
        line.partition("  calls")[0].partition(": calls")[0].split("ok")[1].strip(): line
        for line in told(doctor_selftest.kernels, "ok").splitlines()
    }
    pytest.importorskip("triton")
    assert "calls on Triton; compiled: rewritten" in lines["cuda, bfloat16 head dim  64"]
    assert "calls on Triton; compiled: rewritten" in lines["cuda, bfloat16 head dim 160"]
    assert "for inference alone" in lines["cuda, float16  head dim 160"]
    assert "calls on Triton; compiled: left to" in lines["cuda, float32  head dim 160"]
    assert "calls on nothing (an error)" in lines["cuda, bfloat16 head dim 320"]
    assert "for inference alone" in lines["cuda, float32  head dim  64"]
    assert {p.device for p in asked} == {"cuda"}
    assert "calls on ATen" in lines["cuda, float64  head dim  64"]


def test_a_section_that_fails_is_a_problem_and_the_others_run(
    monkeypatch: Any, capsys: Any
) -> None:
    def fails() -> Iterator[Finding]:
        yield doctor.ok("so far")
        raise KeyError("on purpose")

    def works() -> Iterator[Finding]:
        yield doctor.ok("the next")

    monkeypatch.setattr(doctor, "sections", lambda: {"A": fails, "B": works})
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert out.index("so far") < out.index("looking failed: KeyError") < out.index("the next")
    assert "1 problem:" in out
    monkeypatch.setattr(doctor, "sections", lambda: {"B": works})
    assert main(["doctor"]) == 0
    assert "Healthy." in capsys.readouterr().out


PROGRAM = """
    import sys
    sys.modules["{module}"] = None  # importing it fails
    from bla_inductor import doctor_machine
    doctor_machine.compiler = lambda: ""  # the self-test then takes no minutes
    doctor_machine.has_gpu = lambda: False
    from bla_inductor.__main__ import main
    print("status", main(["doctor"]))
"""


def test_without_torch(run_python: Any) -> None:
    out = run_python(PROGRAM.format(module="torch")).stdout
    assert "torch cannot be imported" in out
    assert "not looked at: there is no torch" in out
    assert "looking failed" not in out
    assert "status 1" in out


def test_without_triton(run_python: Any) -> None:
    """The only problem is the compiler that the program hides."""
    out = run_python(PROGRAM.format(module="triton")).stdout
    assert "note    Triton cannot be imported" in out
    assert "1 problem:\n  problem no C++ compiler" in out
    assert "compiled model, cpu, float32, aot_eager: forward" in out


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it finds there")
def test_as_a_command() -> None:
    command = [sys.executable, "-m", "bla_inductor", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compiled model, cpu, float32, inductor: forward" in done.stdout
    assert "Healthy." in done.stdout
