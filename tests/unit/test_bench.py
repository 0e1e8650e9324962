"""The benchmark command: what it writes, and that a wrong result is not timed."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from bla_inductor.__main__ import main
from bla_inductor.bench import command, measure, model_cases, models
from bla_inductor.bench.cases import SUITES, Case
from bla_inductor.bench.output import read_csv
from bla_inductor.bench.providers import naive


def bench(tmp_path, *arguments: str) -> int:
    common = ["--device", "cpu", "--out", str(tmp_path), "--no-plot"]
    return main(["bench", "smoke", "--lengths", "64", *common, *arguments])


def test_rows_and_machine(tmp_path, capsys) -> None:
    assert bench(tmp_path, "--providers", "torch") == 0
    (file,) = tmp_path.glob("*.csv")
    assert f"# torch: {torch.__version__}" in file.read_text()
    forward, backward = read_csv(file)
    assert (forward["run"], backward["run"]) == ("forward", "backward")
    assert float(forward["ms"]) > 0
    assert 0 < float(forward["inaccuracy"]) <= 1
    assert "wrote" in capsys.readouterr().out


def test_the_precision_of_float32(tmp_path, monkeypatch) -> None:
    """Set for a case alone, and told in its rows."""
    smoke = SUITES["smoke"][0]
    asked = [replace(smoke, float32=float32) for float32 in ("high", "highest")]
    monkeypatch.setitem(SUITES, "smoke", asked)
    seen = []

    def provided(name, case):
        seen.append(torch.get_float32_matmul_precision())
        return naive(case)

    monkeypatch.setattr(command, "provider", provided)
    assert bench(tmp_path, "--providers", "torch") == 0
    assert seen == ["high", "highest"]
    assert torch.get_float32_matmul_precision() == "highest"
    (file,) = tmp_path.glob("*.csv")
    assert [row["dtype"] for row in read_csv(file)[::2]] == ["float32 high", "float32"]


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        command, "provider", lambda name, case: lambda *x: naive(case)(*x) * (1 + 1e-3)
    )
    assert bench(tmp_path, "--providers", "bla") == 1
    (file,) = tmp_path.glob("*.csv")
    (row,) = read_csv(file)
    assert row["ms"] == ""
    assert "WRONG" in capsys.readouterr().out


def test_ratio_to_inductor(tmp_path, monkeypatch) -> None:
    times = {"inductor": 4.0, "bla": 1.0}
    monkeypatch.setattr(command, "provider", lambda name, case: naive(case))
    now = iter([1.0, 1.0, 3.0, 4.0, 8.0, 1.0, 2.0])  # the copy; then forward, forward and backward
    monkeypatch.setattr(measure, "milliseconds", lambda function, device: next(now))
    assert bench(tmp_path, "--providers", ",".join(["torch", *times])) == 0
    (file,) = tmp_path.glob("*.csv")
    ratios = [r["inductor_ratio"] for r in read_csv(file) if r["provider"] == "bla"]
    assert ratios == ["4", "4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--providers", "tensorflow"], "no provider 'tensorflow'"), (["--lengths", "3"], "no case")],
)
def test_what_it_cannot_do_it_says(tmp_path, arguments, said) -> None:
    with pytest.raises(SystemExit, match=said):
        bench(tmp_path, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths", "abc"], "--lengths abc should be numbers"),
        (["--device", "cuda"], "torch sees no GPU"),
        (["--out", f"{__file__}/results"], "cannot be written"),
    ],
)
def test_what_would_fail_later_is_said_first(arguments, said, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["bench", "smoke", *arguments])
    assert said in capsys.readouterr().err


def test_an_interrupt_keeps_what_was_measured(tmp_path, monkeypatch, capsys) -> None:
    def interrupted(case, *arguments):
        yield command.Row(case.name, "", case.N, "", "", "forward", "torch")
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_case", interrupted)
    assert bench(tmp_path, "--providers", "torch") == 0
    (file,) = tmp_path.glob("*.csv")
    assert len(list(read_csv(file))) == 1
    assert "interrupted after 1 rows" in capsys.readouterr().out


def test_floor() -> None:
    """Forward 4 units, backward 7, where a unit is one q-sized tensor."""
    unit = 8 * 16 * 1024 * 64 * 2
    assert Case("x", 8, 16, 1024, 64).floor_bytes() == (4 * unit, 7 * unit)


def test_every_case_is_a_possible_attention() -> None:
    for case in (c for cases in SUITES.values() for c in cases):
        small = Case(**{**case.__dict__, "B": 1, "H": 1, "N": 5, "dtype": torch.float32})
        inputs = measure.make_inputs(small, "cpu")
        assert naive(small)(inputs.q, inputs.k, inputs.v).shape == inputs.do.shape


def test_models(tmp_path, monkeypatch) -> None:
    """The suite of whole models: the zoo is found, both runs are timed, and checked before."""
    small = model_cases._zoo("mlla", "LinearAttention", 8, 2, shape=(1, 2, 3, 8))
    monkeypatch.setattr(models, "MODELS", [model_cases.Model("MLLA", 6, small, torch.float32)])
    common = ["--device", "cpu", "--out", str(tmp_path), "--no-plot", "--providers", "torch"]
    assert main(["bench", "models", *common]) == 0
    (file,) = tmp_path.glob("*.csv")
    rows = read_csv(file)
    assert [r["run"] for r in rows] == ["inference", "training step"]
    assert all(0 < float(r["inaccuracy"]) <= 1 for r in rows)


def test_a_model_whose_package_is_not_installed_is_told(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.setattr(
        models, "MODELS", [model_cases.Model("LoFTR", 20, model_cases._loftr(16, 1, 1, 20))]
    )
    common = ["--device", "cpu", "--out", str(tmp_path), "--providers", "torch"]
    assert main(["bench", "models", *common]) == 0
    assert "pip install kornia" in capsys.readouterr().out


def test_loftr_takes_two_images() -> None:
    pytest.importorskip("kornia")
    model, images, _ = model_cases._loftr(16, 1, 2, 20)()
    assert [tuple(x.shape) for x in model(*images)] == [(2, 20, 16)] * 2


def test_a_single_wrong_gradient_is_seen() -> None:
    """Of the queries' projection, say, a thousandth of all."""
    outputs, large, small = [torch.ones(4), torch.ones(4)], torch.ones(1000), torch.full((9,), 0.01)

    def results(small: torch.Tensor) -> list[torch.Tensor]:
        return [*outputs, torch.cat([large, small]), large, small]

    exact, rounded, wrong = results(small), results(small * 1.01), results(small.flip(0) * -1)
    assert models._worst(rounded, [rounded], exact, torch.bfloat16) <= 1
    assert models._worst(wrong[:3], [rounded[:3]], exact[:3], torch.bfloat16) <= 1
    assert models._worst(wrong, [rounded], exact, torch.bfloat16) > 1
    assert models._worst(wrong, [rounded, rounded], exact, torch.bfloat16) > 1


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_inference_is_checked_apart_from_training(tmp_path, monkeypatch, factor, capsys) -> None:
    """With batch norms it is another function, and training steps move what it depends on."""

    class Wrong(torch.nn.Module):
        def __init__(self, module) -> None:
            super().__init__()
            self._orig_mod = module

        def forward(self, x):
            return self._orig_mod(x) * (1.0 if self._orig_mod.training else factor)

    def make():
        return torch.nn.BatchNorm1d(4), (torch.randn(16, 4),), {}

    monkeypatch.setattr(models, "MODELS", [model_cases.Model("norm", 16, make, torch.float32)])
    monkeypatch.setattr(models.torch, "compile", lambda f, **_: Wrong(f))
    common = ["--device", "cpu", "--out", str(tmp_path), "--no-plot"]
    assert main(["bench", "models", *common, "--providers", "torch,bla"]) == int(factor != 1)
    assert ("WRONG" in capsys.readouterr().out) == (factor != 1)


def test_compilations_are_timed_after_the_first_of_the_process(tmp_path, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(
        models.torch, "compile", lambda f, backend, **_: (compiled.append(backend), f)[1]
    )
    small = model_cases._zoo("mlla", "LinearAttention", 8, 2, shape=(1, 2, 3, 8))
    monkeypatch.setattr(models, "MODELS", [model_cases.Model("MLLA", 6, small, torch.float32)])
    common = ["--device", "cpu", "--out", str(tmp_path), "--no-plot", "--fresh"]
    assert main(["bench", "models", *common, "--providers", "inductor,bla"]) == 0
    assert compiled == ["inductor", "bla"] * 2
    (file,) = tmp_path.glob("*.csv")
    assert [bool(r["note"]) for r in read_csv(file)] == [False, True] * 2
