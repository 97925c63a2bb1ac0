"""Finds a method (attack, defense, dataset source ...) by its name: a file of the package, an entry point or a plugin.

A package such as ``vlmdefend.attacks`` owns one :class:`Registry`. A built-in method is one file in one of its family
packages (``vlmdefend.attacks.gradient`` ...); the file's name is the method's name, so listing and completing names
imports nothing heavy. Other distributions add methods through the entry point group ``vlmdefend.<package>``, a user
through ``--plugin FILE``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, get_args, get_type_hints

from vlmdefend.errors import UnknownName, UserError, did_you_mean

T = TypeVar("T")
C = TypeVar("C", bound=type)


class ReadBy(NamedTuple):
    """In ``Annotated[float, ReadBy(f)]``: an option's text is read by ``f(text, option)`` in place of its type."""

    read: Callable[[str, str], Any]


class Registry(Generic[T]):
    """Classes of one kind, by name.

    Args:
        kind: the singular noun used in messages, ``"attack"``.
        families: dotted names of the packages in which every file holds one class (files whose names begin with an
            underscore hold none), or of single modules that hold one.
        group: the entry point group; default: the first family.
        shared: module names in those packages that hold no method (the contract).
        separator: ``"-"`` or ``"_"``: how a name is spelled where its file has an underscore.
        prefixes: modules that answer for every name ``prefix:NAME``, by prefix; each has ``create(NAME, options)`` and
            ``names()``.
    """

    _all: ClassVar[list[Registry[Any]]] = []

    def __init__(
        self,
        kind: str,
        families: tuple[str, ...],
        *,
        group: str | None = None,
        shared: tuple[str, ...] = (),
        separator: str = "-",
        prefixes: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self._families = families
        self._group = group or families[0]
        self._shared = frozenset(shared)
        self.prefixes = dict(prefixes or {})
        self._separator = separator
        self._classes: dict[str, type[Any]] = {}
        Registry._all.append(self)
        self._modules: dict[str, str] | None = None

    def register(self, cls: C) -> C:
        """Class decorator: enter ``cls`` under its class attribute ``name``."""
        name: str = cls.name  # type: ignore[attr-defined]
        known = self._classes.get(self._key(name))
        home = known.__module__ if known is not None else self._built_in(self._key(name))
        if home is not None and home != cls.__module__:
            raise UserError(f"{self.kind} {name!r} is defined twice, in {home} and {cls.__module__}; rename one.")
        self._classes[self._key(name)] = cls
        return cls

    def names(self) -> list[str]:
        """All names, sorted; imports no method's file."""
        return sorted({self._spelled(key) for key in self._files()} | {c.name for c in self._classes.values()})

    def get(self, name: str) -> type[T]:
        """The class called ``name`` (``-`` and ``_`` are one).

        Raises:
            UnknownName: with the nearest names.
            UserError: its file needs a package that is not installed.
        """
        key = self._key(name)
        if key not in self._classes and key in self._files():
            try:
                importlib.import_module(self._files()[key])
            except ImportError as error:
                raise UserError(f"{self.kind} {name!r} cannot be loaded ({error}); install what it needs.") from error
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(
                    f"{self.kind} {name!r} cannot be loaded ({reason}); mend or remove its file."
                ) from error
        if key not in self._classes and key in self._files():
            raise UserError(
                f"{self.kind} {name!r}: {self._files()[key]} registers no class of that name; the entry point and the "
                "class attribute `name` must agree."
            )
        if key not in self._classes:
            raise did_you_mean(self.kind, name, self.names())
        return self._classes[key]

    def create(self, text: str, **options: Any) -> T:
        """Build one from ``name`` or ``name:option=value:option=value``; ``options`` come on top."""
        name, written = parse_spec(text)
        prefix, _, member = name.partition(":")
        if self._key(prefix) in self.prefixes:
            made: T = importlib.import_module(self.prefixes[self._key(prefix)]).create(member, {**written, **options})
            return made
        try:
            cls = self.get(name)
        except UnknownName:
            first, colon, rest = name.partition(":")
            if colon and self._key(first) in map(self._key, self.names()):
                raise UserError(
                    f"{self.kind} {text!r}: option {rest!r} has no value; write {first}:{rest or 'option'}=VALUE."
                ) from None
            raise
        return cls(**check_options(self.kind, cls, {**written, **options}))

    def __iter__(self) -> Iterator[type[T]]:
        """Every class, by name; imports them all."""
        return iter([self.get(name) for name in self.names()])

    def _key(self, name: str) -> str:
        return name.strip().lower().replace("-", "_")

    def _built_in(self, key: str) -> str | None:
        """The module of this package that holds the method, imported or not; None: not built in."""
        module = self._files().get(key)
        return module if module is not None and {module, module.rpartition(".")[0]} & {*self._families} else None

    def _spelled(self, key: str) -> str:
        return key.replace("_", self._separator)

    def _files(self) -> dict[str, str]:
        """The dotted name of every method's module, by key; nothing is imported."""
        if self._modules is None:
            self._modules = {}
            for family in self._families:
                spec = importlib.util.find_spec(family)
                if spec is not None and spec.submodule_search_locations is None:
                    self._modules[family.rpartition(".")[2]] = family
                for folder in (spec.submodule_search_locations or []) if spec else []:
                    for file in sorted(Path(folder).glob("*.py")):
                        if not file.stem.startswith("_") and file.stem not in self._shared:
                            self._modules[file.stem] = f"{family}.{file.stem}"
            for point in entry_points(group=self._group):
                self._modules.setdefault(self._key(point.name), point.module)
        return self._modules


def parse_spec(text: str) -> tuple[str, dict[str, str]]:
    """Split ``name:option=value:...`` into the name and the written options.

    A part without ``=`` belongs to the name, so that ``torchattacks:CW`` stays whole; so does what is in brackets, as
    in ``worst-of:attacks=[pgd:steps=20]+square``.

    Raises:
        UserError: an option that is written twice, a bracket without its partner.
    """
    parts = split_outside(text, ":")
    name = ":".join(p for p in parts if "=" not in p)
    options: dict[str, str] = {}
    for key, _, value in (p.partition("=") for p in parts if "=" in p):
        option = key.strip().replace("-", "_")
        if option in options:
            raise UserError(f"{text!r} gives {option} twice; keep one.")
        options[option] = value.strip()
    return name, options


def split_outside(text: str, separator: str) -> list[str]:
    """Split at the separators that are outside of square brackets.

    Raises:
        UserError: a bracket without its partner.
    """
    parts, depth = [""], 0
    for letter in text:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if depth < 0:
            break
        if letter == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth != 0:
        raise UserError(f"{text!r}: a square bracket has no partner; write [ before and ] after what belongs together.")
    return parts


def check_options(kind: str, cls: type[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Keep options that ``cls`` takes, turned from text into the annotated type.

    Raises:
        UserError: for an option the class does not take or a value of another type.
    """
    parameters = inspect.signature(cls).parameters
    types = get_type_hints(cls, include_extras=True)  # each inherited option in the module that wrote it
    checked = {}
    for key, value in options.items():
        if key not in parameters:
            raise did_you_mean(f"option of {kind} {cls.name}", key, list(parameters) or ["none"])
        checked[key] = _coerce(f"{cls.name}:{key}", value, types[key])
    return checked


def _coerce(where: str, value: Any, annotation: Any) -> Any:
    """Text to the annotated type through pydantic, which knows unions, literals and tuples."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if isinstance(value, str):
        if value.lower() == "none" and type(None) in get_args(annotation):
            return None
        for mark in getattr(annotation, "__metadata__", ()):
            if isinstance(mark, ReadBy):
                return mark.read(value, where)
    try:
        config = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
        return TypeAdapter(annotation, config=config).validate_python(value)
    except ValidationError as error:
        expected = error.errors()[0]["msg"]
        raise UserError(f"{where}={value!r}: {expected[0].lower()}{expected[1:]}.") from None


def load_plugin(path: str, warn: Callable[[str], None]) -> None:
    """Import a user's file so that the classes in it register; a broken one breaks only itself.

    Raises:
        UserError: if there is no such file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--plugin {path}: no such file; give the path of a Python file that registers a class.")
    place = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]  # two folders may hold a file of one name
    name = f"vlmdefend_plugin_{file.stem}_{place}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin {path}: not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        for registry in Registry._all:  # what it registered before it failed; not what it imported
            registry._classes = {key: cls for key, cls in registry._classes.items() if cls.__module__ != name}
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        warn(f"plugin {path} was not loaded: {type(error).__name__}: {reason}")
