"""Makes the parameters of a Typer command from a settings model, so that an option is declared in one place.

Typer has no such bridge of its own, and the packages that add one (pydantic-typer) offer a model's fields as they are,
with their defaults; here None must mean "not given", because profiles and methods fill in what is missing.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from vlmdefend.cli.options import complete
from vlmdefend.options import Option

if TYPE_CHECKING:
    from pydantic import BaseModel

Command = Callable[..., None]


def options_of(model: type[BaseModel], *, single: bool = False) -> Callable[[Command], Command]:
    """Decorates a command with one parameter per field of ``model`` that holds an :class:`~vlmdefend.options.Option`.

    The command receives its own parameters by name, and the options that were given on the command line as the
    dictionary ``given``: fields to values, without those that were left out.

    Args:
        model: the settings model.
        single: the command takes one value where a grid takes several (a saved set is of one model, attack and eps),
            and no option that is of grids only.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True).parameters
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, p in signature.items() if name != "given"]
        made = {parameter.name: parameter for parameter in _parameters(model, single=single)}

        def call(**values: Any) -> None:
            given = {name: values.pop(name) for name in made}
            command(**values, given={name: value for name, value in given.items() if _was_given(made[name], value)})

        parameters = [*made.values(), *own]
        call.__doc__, call.__name__ = command.__doc__, command.__name__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate


def _parameters(model: type[BaseModel], *, single: bool) -> Iterator[inspect.Parameter]:
    """One parameter per option: required ones first, then those of the most derived class first."""
    declared: list[tuple[str, Any, Option]] = []
    for name, hint in _fields_in_order(model).items():
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, Option):
                declared.append((name, hint, mark))
    panels = list(dict.fromkeys(option.panel for _, _, option in declared))
    declared.sort(key=lambda entry: (not entry[2].required, panels.index(entry[2].panel)))
    for name, hint, option in declared:
        kind = _plain_type(hint)
        if single and option.grid_only:
            continue
        if option.cells:  # each value is checked with its own sentence by the settings
            kind = str if single else list[str]
        flag = "--" + name.replace("_", "-")
        flags = option.flags or ((flag,) if kind is bool else ())
        default = (
            ... if option.required else (False if kind is bool and len(flags) == 1 and "/" not in flags[0] else None)
        )
        info = typer.Option(
            default,
            *flags,
            help=(single and option.single) or option.help,
            rich_help_panel=getattr(model, "panels", {}).get(option.panel, option.panel),
            autocompletion=getattr(complete, option.complete) if option.complete else None,
        )
        annotation = kind if option.required or default is False else kind | None
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=annotation)


def _was_given(parameter: inspect.Parameter, value: Any) -> bool:
    """Whether the option was on the command line: an absent one is None, an empty list, or an unset flag."""
    return value is not None and value not in ([], ()) and not (value is False and parameter.annotation is bool)


def _fields_in_order(model: type[BaseModel]) -> dict[str, Any]:
    """The annotations of all fields, those of the most derived class first."""
    hints = get_type_hints(model, include_extras=True)
    names = [name for cls in model.__mro__ for name in inspect.get_annotations(cls) if name in hints]
    return {name: hints[name] for name in dict.fromkeys(names) if name in model.model_fields}


def _plain_type(hint: Any) -> Any:
    """The type in which Typer reads a field: a literal as text, a number without its range, a tuple as a list."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _plain_type(parts[0])
    if origin in (Union, types.UnionType):
        kinds = list(dict.fromkeys(_plain_type(part) for part in parts if part is not type(None)))
        return next((kind for kind in kinds if get_origin(kind) is list), kinds[0])
    if origin is Literal:
        return str
    if origin in (list, tuple):
        item = _plain_type(parts[0])
        return list[item]  # type: ignore[valid-type]
    return hint if hint in (bool, int, float, str, Path) else str
