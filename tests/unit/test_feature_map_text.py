"""The language of feature maps: what is read, how it is printed, and the texts of errors."""

from __future__ import annotations

import pytest
import sympy

from bla_inductor.ops.feature_map import RowWise, canonical, derivative, parse, text_of

X = sympy.Symbol("x", real=True)

CANONICAL = {
    "": "",
    "x": "",
    " x -> softmax ": "softmax",
    "x*1 + 0": "",
    "Piecewise((x+1,x>0),(exp(x),True))": "Piecewise((x + 1, x > 0), (exp(x), True))",
    "Piecewise((0, x <= 0), (x, True)) + 1e-6": "Piecewise((1e-06, x <= 0), (x + 1e-06, True))",
    "Piecewise((x, x > 0), (exp(x) - 1, True)) + 1": "Piecewise((x + 1, x > 0), (exp(x), True))",
    "2*Piecewise((x, x > 0), (expm1(x), True)) + 2": "Piecewise((2*x + 2, x > 0), (2*exp(x), True))",  # noqa: E501
    "0.1*x": "0.1*x",
    "x/3": "x/3",
    "x*0.3333333333333333": "0.3333333333333333*x",
    "1/(1 + exp(-x))": "sigmoid(x)",
    "x/(exp(-2*x) + 1)": "x*sigmoid(2*x)",
    "exp(x)/(1 + exp(x))": "sigmoid(x)",
    "log(1 + exp(x))": "log1p(exp(x))",
    "exp(x) - 1": "expm1(x)",
    "expm1(x) + 1": "exp(x)",
    "2*expm1(x) + 1": "2*exp(x) - 1",
    "x**0.5": "sqrt(x)",
    "x**(-1/2)": "1/sqrt(x)",
    "x**2.0": "x**2",
    "x**1.5": "sqrt(x)**3",
    "x**0.3": "pow(x, 0.3)",
    "pow(x, 2)": "x**2",
    "2**x": "2**x",
    "E**x": "exp(x)",
    "sqrt(2/pi)*x": "sqrt(2)*x/sqrt(pi)",
    "-x + +x*2": "",
    "Piecewise((1, (x > 0) & (x < 1)), (x, True))": "Piecewise((1, (x > 0) & (x < 1)), (x, True))",
    "Piecewise((1, (x < 0) | (x > 1)), (x, True))": "Piecewise((1, (x > 1) | (x < 0)), (x, True))",
    "Piecewise((x, 1<0), (-x, x < 0), (x, 2>1), (0, True))": "Piecewise((-x, x < 0), (x, True))",
    "Piecewise((2*x, 1 > 0), (0, True))": "2*x",
    "l2": "l2",
    "l2(max=0)": "l2",
    "l2(add=0.0)": "l2",
    "l2(max=1e-12)": "l2(max=1e-12)",
    "l2(add=0.000001)": "l2(add=1e-06)",
    "exp(x)->l1( add = 1 )" : "exp(x) -> l1(add=1.0)",
    "abs(x)*sign(x)": "abs(x)*sign(x)",
    "7": "7",
}  # fmt: skip


@pytest.mark.parametrize("text", CANONICAL)
def test_canonical_text(text) -> None:
    assert canonical(text) == CANONICAL[text]


@pytest.mark.parametrize("text", CANONICAL)
def test_the_canonical_text_is_read_as_it_was_written(text) -> None:
    once = canonical(text)
    assert canonical(once) == once
    assert parse(once) == parse(text)


def test_domains_are_not_simplified_away() -> None:
    for text in ("exp(log(x))", "sqrt(x)**2", "sqrt(x**2)", "pow(x, 0.3)**2"):
        assert canonical(text) == text


def test_the_two_guards_of_a_norm_are_two_stages() -> None:
    assert parse("l2(max=0.5)") == (RowWise("l2", 0.5),)
    assert parse("l2(add=0.5)") == (RowWise("l2", 0.5, "add"),)
    assert parse("l2(max=0.5)") != parse("l2(add=0.5)")


def test_stages_have_a_text() -> None:
    stages = (sympy.Float(0.1) * X, RowWise("softmax"), X**2)
    assert text_of(stages) == "0.1*x -> softmax -> x**2"
    assert parse(text_of(stages)) == stages


def test_stages_in_sympys_own_functions_have_a_text() -> None:
    stages = (sympy.sqrt(X), sympy.log(1 + X), 1 / (1 + sympy.exp(-X)), sympy.Abs(X))
    assert canonical(text_of(stages)) == "sqrt(x) -> log1p(x) -> sigmoid(x) -> abs(x)"


@pytest.mark.parametrize(
    ("text", "slope"),
    [
        ("Piecewise((0, x <= 0), (x, True))", "Piecewise((0, x <= 0), (1, True))"),
        ("Piecewise((x + 1, x > 0), (exp(x), True))", "Piecewise((1, x > 0), (exp(x), True))"),
        (
            "Piecewise((x, x > 20), (log1p(exp(x)), True))",
            "Piecewise((1, x > 20), (sigmoid(x), True))",
        ),
        ("x**3", "3*x**2"),
        ("abs(x)", "sign(x)"),
        ("x*sign(x)", "sign(x)"),
        ("sigmoid(x)", "(1 - sigmoid(x))*sigmoid(x)"),
        ("5", "0"),
    ],
)  # fmt: skip
def test_derivative(text, slope) -> None:
    (stage,) = parse(text)
    assert text_of((derivative(stage),)) == slope


ERRORS = {
    "relu(x)": "relu is not in the language",
    "y": "'y' is not in the language",
    "x.real": "is not in the language",
    "__import__('os')": "__import__ is not in the language",
    "[x for x in x]": "is not in the language",
    "x if x else x": "is not in the language",
    "'x'": "is not in the language",
    "exp(x, x)": "exp does not take 2 arguments",
    "exp(x=x)": "is not in the language",
    "pow(x, x)": "the exponent x is not a number",
    "x**x": "a power needs a number as its exponent, or a positive one as its base",
    "(-2)**x": "a power needs a number as its exponent, or a positive one as its base",
    "x +": "it is not an expression",
    "exp(x) -> ": "it is not an expression",
    "x > 0": "it is a condition, not a value",
    "(x > 0) + 1": "conditions and values are mixed up",
    "Piecewise((x, x + 1), (0, True))": "conditions and values are mixed up",
    "Piecewise((x, x > 0))": "the condition of the last piece is not True",
    "Piecewise(x, 0)": "Piecewise takes pairs (value, condition)",
    "x == 0": "conditions compare with < <= > >=",
    "0 < x < 1": "is not in the language",
    "x % 2": "the operator Mod is not in the language",
    "1/0*x": "a constant in it is not a finite real number",
    "x*sqrt(-1)": "a constant in it is not a finite real number",
    "softmax(max=1)": "softmax takes no eps",
    "l2(max=tiny)": "'tiny' is not a finite number",
    "l2(max=inf)": "'inf' is not a finite number",
    "l3": "'l3' is not in the language",
}


@pytest.mark.parametrize("text", ERRORS)
def test_what_is_not_in_the_language(text) -> None:
    with pytest.raises(ValueError, match="feature map stage") as error:
        parse(text)
    assert ERRORS[text] in str(error.value)


def test_the_operators_do_not_import_sympy_for_identity(run_python) -> None:
    run_python("""
        import sys
        import torch
        before = "sympy" in sys.modules
        import bla_inductor.ops
        x = torch.rand(5, 4)
        torch.ops.bla.linear_attention(x, x, x, q_map="softmax", k_map="l2")
        assert ("sympy" in sys.modules) == before
    """)
