"""The keys of a run explained from the docstrings of ``schema``: for ``--help`` and for docs/configuration.md."""

import ast
import inspect
import json
import sys
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from typing import Any, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from unimega.config import schema, strict
from unimega.config.schema import RunConfig

EXPLANATION = """A run of unimega: trains, and goes on from its newest checkpoint when it is started again.

One process: python {program} --config RUN.toml

8 GPUs: torchrun --nproc-per-node 8 {program} --config RUN.toml --parallel.tp 2

Two files, the last one wins, and keys on top of them: --config BASE.toml LARGE.toml --optimizer.lr 3e-4

Lists are words, e.g. --parallel.layout 1 2 0 1; lists of tables are TOML in one word. What is marked (required) has to
be given in a file or here. A stored run.json is a file as well.

SIGTERM and SIGUSR1 save and end the run, Ctrl-C ends it; the same command goes on. docs/training.md tells of resuming,
signals, metrics and profiles, docs/configuration.md of every key."""


def print_help() -> None:
    """Print every option with its type, default and docstring."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_tables_in_one_word)
    program = sys.argv[0]
    with registry:
        try:
            tyro.cli(
                RunConfig,
                prog=program,
                description=EXPLANATION.replace("{program}", program),
                args=["--help"],
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
            )
        except SystemExit:
            return


def _tables_in_one_word(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """tyro cannot ask for a list of tables or a free table without a default; the loader reads them as TOML or JSON."""
    args = get_args(info.type)
    if get_origin(info.type) is dict or (args and is_dataclass(args[0])):
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="TOML",
            instance_from_str=lambda words: words,
            is_instance=lambda value: True,
            str_from_instance=_words,
        )
    return None


def _words(value: Any) -> list[str]:
    return [repr(value)]


def markdown() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Generated from `unimega/config/schema.py` by `python tools/write_configuration_doc.py`; "
        "a test holds the two together.",
        "",
        (inspect.getdoc(schema) or "").replace("``", "`"),
        "Precedence: defaults, then the files of `--config` from left to right, then `--section.key value`.",
        "On the command line a list is words (`--parallel.layout 1 2 0 1`) or TOML in one word, a bool is true or",
        "false, and `none` takes back a key whose default is absent.",
        "An unknown key, a wrong type or an impossible combination is one line on stderr and exit status 2.",
        "",
    ]
    for name, want in strict.types_of(RunConfig).items():
        lines += [f"## [{name}]", ""]
        if is_dataclass(want):
            lines += [inspect.getdoc(want) or "", "", *_table(want)]  # type: ignore[arg-type]
        else:
            lines += [docstrings(RunConfig)[name], ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(cls: type[Any]) -> list[str]:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    nested: list[str] = []
    meanings = docstrings(cls)
    for one in fields(cls):
        want = strict.types_of(cls)[one.name]
        meaning = meanings[one.name].replace("|", "\\|").replace("<", "\\<")
        rows.append(f"| `{one.name}` | {_type(want)} | {_default(one)} | {meaning} |")
        inner = want if is_dataclass(want) else next(iter(get_args(want)), None)
        if is_dataclass(inner):
            nested += [f"`{one.name}`: {inspect.getdoc(inner)}", "", *_table(inner)]  # type: ignore[arg-type]
    return [*rows, "", *nested]


def _type(want: Any) -> str:
    return strict.describe(want).replace("'", "`")


def _default(one: Any) -> str:
    if one.default is not MISSING:
        value = list(one.default) if isinstance(one.default, tuple) else one.default
        return "absent" if value is None else f"`{json.dumps(value)}`"
    return "required" if one.default_factory is MISSING else "see below" if is_dataclass(one.type) else "`{}`"


def docstrings(cls: type[Any]) -> dict[str, str]:
    """The string below each field of a dataclass."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for one, text in pairwise(definition.body):
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(text, ast.Expr):
            found[one.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found
