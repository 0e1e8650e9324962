"""The backend's options. Each field of `Options` is an option key, a BLA_* variable and a row here.

    torch.compile(model, backend="bla", options={"strict": True, "max_autotune": True})
    BLA_STRICT=1 python train.py

An option wins over the environment, and that over the default. Keys that are not bla's own are
Inductor's configuration keys and go to Inductor; a key that neither knows is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from bla_inductor.errors import BlaOptionError

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


def _row(default: Any, doc: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"doc": doc, "choices": choices})


@dataclass(frozen=True)
class Pisa:
    """Piecewise sparse attention (arXiv 2602.01077): the share of key blocks that each query block
    attends to exactly, above 0 and at most 1, and how many queries and keys make a block.
    """

    density: float = 0.15
    block_size: int = 64


_BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Options:
    """What a compilation was asked to do.

    `Options()` holds the defaults and reads nothing; `parse` applies the environment and the
    dictionary given to `torch.compile`, and raises `BlaOptionError` on what they may not hold.
    """

    strict: bool = _row(
        False, "raise BlaNoMatchError when nothing in a compiled graph was rewritten"
    )
    inner: str = _row(
        "inductor",
        "what compiles the rewritten graph; with eager and aot_eager, which serve to "
        "find out whose fault a fault is, Inductor's options are checked and unused",
        ("inductor", "aot_eager", "eager"),
    )
    rewrite: str = _row(
        "auto",
        "rewrite what matches where the cost model says that it pays (auto), "
        "wherever it matches (always), or nowhere, and only report (off)",
        ("auto", "always", "off"),
    )
    mode: str | None = _row(
        None,
        "torch.compile's mode, as an option, because torch refuses mode= beside options=",
    )
    approximate: Pisa | None = _row(  # noqa: RUF009  (a field, like the others)
        None,
        "replace softmax attention by an approximation, which changes results: "
        "{'pisa': {'density': 0.15, 'block_size': 64}}, as JSON in the environment",
    )
    approximate_training: bool = _row(
        False,
        "approximate attention that needs gradients too, with those of the approximation",
    )
    verify: str | None = _row(
        None,
        "run the original beside the rewritten graph, on the first call or on every one, and "
        "fall back to it where the rewritten one is less accurate",
        ("first", "always"),
    )

    @classmethod
    def parse(
        cls,
        given: Mapping[str, Any] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
    ) -> tuple[Options, dict[str, Any]]:
        """Split `given` into bla's own options and Inductor's.

        The second part of the result has Inductor's spelling of the keys and values as given:
        Inductor checks their types itself.
        """
        if given is not None and not isinstance(given, Mapping):
            raise BlaOptionError.no_dictionary(given)
        environ = os.environ if environ is None else environ
        rows = {row.name: row for row in fields(cls)}
        own: dict[str, Any] = {}
        for name, row in rows.items():
            variable = variable_of(name)
            if environ.get(variable, "") != "":
                own[name] = _checked(row, variable, environ[variable])

        inductor: dict[str, Any] = {}
        for key, value in (given or {}).items():
            name = str(key).replace("-", "_")  # Inductor takes both spellings, and so do we
            if name in rows:
                own[name] = _checked(rows[name], key, value)
            else:
                inductor[name] = value
        if inductor:
            known = _inductor_keys()
            for name, value in inductor.items():
                if name not in known:
                    raise BlaOptionError.unknown_key(name, value, rows, known)
        return cls(**own), inductor


def variable_of(name: str) -> str:
    """The environment variable of the option `name`: strict -> BLA_STRICT."""
    return f"BLA_{name.upper()}"


def _checked(row: Any, key: str, value: Any) -> Any:
    if isinstance(row.default, bool):
        return _checked_bool(key, value)
    if row.name == "approximate":
        return _checked_approximation(key, value)
    if row.default is None and str(value).lower() == "none":
        return None
    choices = _modes() if row.name == "mode" else row.metadata["choices"]
    if value not in choices:
        valid = choices if row.default is not None else (*choices, "None")
        raise BlaOptionError.bad_value(key, value, valid)
    return value


def _checked_bool(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    raise BlaOptionError.bad_value(key, value, ("True", "False"))


def _checked_approximation(key: str, value: Any) -> Pisa | None:
    """A dictionary {"pisa": {...}}, or its text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BlaOptionError.bad_value(key, value, (_EXAMPLE,)) from None
    if value is None or isinstance(value, Pisa):
        return value
    if not isinstance(value, Mapping) or list(value) != ["pisa"]:
        raise BlaOptionError.bad_value(key, value, (_EXAMPLE,))
    given = value["pisa"]
    names = [row.name for row in fields(Pisa)]
    if not isinstance(given, Mapping) or not set(given) <= set(names):
        raise BlaOptionError.bad_value(f"{key}['pisa']", given, (_EXAMPLE, *names))
    chosen = Pisa(**given)
    density, block_size = chosen.density, chosen.block_size
    number = isinstance(density, int | float) and not isinstance(density, bool)
    if not number or not 0 < density <= 1:
        raise BlaOptionError.bad_value(f"{key}['pisa']['density']", density, ("0 < density <= 1",))
    if isinstance(block_size, bool) or block_size not in _BLOCK_SIZES:
        sizes = map(str, _BLOCK_SIZES)
        raise BlaOptionError.bad_value(f"{key}['pisa']['block_size']", block_size, sizes)
    return Pisa(float(density), block_size)


_EXAMPLE = json.dumps({"pisa": {"density": 0.15, "block_size": 64}})  # Python as well


def _modes() -> Iterable[str]:
    from torch._inductor import list_mode_options

    return tuple(list_mode_options())


def _inductor_keys() -> tuple[str, ...]:
    from torch._inductor import list_options

    return tuple(list_options())
