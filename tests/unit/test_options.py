"""Options: precedence, both spellings, and errors that say what to write instead."""

from __future__ import annotations

import pickle
from dataclasses import fields

import pytest
import torch._inductor

from bla_inductor.errors import BlaOptionError
from bla_inductor.options import Options, variable_of


def parse(given=None, **environ):
    return Options.parse(given, environ=environ)


def test_defaults():
    assert parse() == (Options(), {})
    assert Options() == Options(strict=False, inner="inductor", rewrite="auto", mode=None)


def test_options_win_over_environment_and_that_over_defaults():
    assert parse(BLA_INNER="eager", BLA_STRICT="1")[0] == Options(strict=True, inner="eager")
    own, _ = parse({"inner": "aot_eager"}, BLA_INNER="eager", BLA_STRICT="on")
    assert own == Options(strict=True, inner="aot_eager")
    assert parse({"strict": False}, BLA_STRICT="1")[0] == Options()
    assert parse({"mode": None}, BLA_MODE="max-autotune")[0] == Options()


def test_the_process_environment_is_read(monkeypatch):
    monkeypatch.setenv("BLA_REWRITE", "always")
    assert Options.parse()[0].rewrite == "always"


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("TRUE", True), ("on", True), ("0", False), ("No", False)]
)
def test_booleans_in_the_environment(text, value):
    assert parse(BLA_STRICT=text)[0].strict is value


def test_an_empty_variable_is_unset():
    assert parse(BLA_STRICT="", BLA_INNER="", BLA_MODE="")[0] == Options()


def test_inductors_options_are_kept_apart():
    own, inductor = parse({"strict": True, "max-autotune": True, "triton.cudagraphs": False})
    assert own == Options(strict=True)
    assert inductor == {"max_autotune": True, "triton.cudagraphs": False}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("strct", "strict"), ("max_autotun", "max_autotune"), ("cudagraphs", "triton.cudagraphs")],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(BlaOptionError) as caught:
        parse({key: True})
    error = caught.value
    assert (error.key, error.got, error.nearest) == (key, True, nearest)
    assert nearest in error.valid
    first = str(error).splitlines()[0]
    assert repr(key) in first
    assert f"did you mean {nearest!r}" in first


def test_an_unknown_key_near_to_nothing_lists_our_own():
    with pytest.raises(BlaOptionError, match="strict, inner, rewrite, mode") as caught:
        parse({"zzzzqqqq": 1})
    assert caught.value.nearest is None


@pytest.mark.parametrize(
    ("given", "environ", "message"),
    [
        ({"inner": "inducto"}, {}, "inner='inducto' should be one of .*mean 'inductor'"),
        ({"rewrite": True}, {}, "rewrite=True should be one of auto, always, off"),
        ({"strict": 1}, {}, "strict=1 should be one of True, False"),
        ({"mode": "max-autotun"}, {}, "mode='max-autotun' should be .*mean 'max-autotune'"),
        ({}, {"BLA_INNER": "egaer"}, "BLA_INNER='egaer' should be .*mean 'eager'"),
        ({}, {"BLA_STRICT": "maybe"}, "BLA_STRICT='maybe' should be"),
        ({"verify": False}, {}, "verify=False should be one of first, always, None"),
        ({"fullgraph": True}, {}, "an argument, torch.compile\\(model, fullgraph=…\\)"),
        ({3: 4}, {}, "unknown option '3'"),
        ("strict", {}, "options='strict' should be a dictionary"),
    ],
)
def test_a_bad_value_lists_the_good_ones(given, environ, message):
    with pytest.raises(BlaOptionError, match=message) as caught:
        parse(given, **environ)
    assert caught.value.nearest is None or caught.value.nearest in caught.value.valid


def test_what_an_error_proposes_for_the_approximation_is_taken():
    with pytest.raises(BlaOptionError) as caught:
        parse(BLA_APPROXIMATE="pisa")
    (example,) = caught.value.valid
    assert f"should be {example}" in str(caught.value)
    own, _ = parse(BLA_APPROXIMATE=example)
    assert own.approximate is not None


def test_none_in_the_environment_is_the_default():
    assert parse(BLA_VERIFY="None", BLA_MODE="none")[0] == Options()


def test_the_errors_survive_a_process_boundary():
    with pytest.raises(BlaOptionError) as caught:
        parse({"inner": "inducto"})
    twin = pickle.loads(pickle.dumps(caught.value))
    assert (str(twin), twin.__dict__) == (str(caught.value), caught.value.__dict__)


def test_no_key_of_ours_is_one_of_inductors():
    ours = {row.name for row in fields(Options)}
    assert not ours & set(torch._inductor.list_options())


def test_every_option_is_documented():
    for row in fields(Options):
        assert row.metadata["doc"], row.name
        assert variable_of(row.name) == "BLA_" + row.name.upper()
