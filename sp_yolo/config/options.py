"""Options and hyperparameters: one field of a dataclass gives each its name, flag, help, default and bounds."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sp_yolo.errors import UserError

T = TypeVar("T")
REQUIRED = dataclasses.MISSING  # the default of an option that must be given


@dataclass(frozen=True)
class Rule:
    """What a number may be, and the words allowed beside it; words without bounds: nothing but these.

    ``low`` and ``high`` are allowed themselves, the latter not where the range is ``open``.
    """

    low: float = -math.inf
    high: float = math.inf
    words: tuple[str, ...] = ()
    whole: bool = False
    open: bool = False

    def check(self, value: Any) -> Any:
        """``value`` as the type that it has to be.

        Raises:
            ValueError: the rule that it breaks, as in "must lie in [0, 1]".
        """
        if isinstance(value, str) and value in self.words:
            return value
        words = " or ".join(repr(word) for word in self.words)
        if self.words and self.low == -math.inf and self.high == math.inf:
            raise ValueError(f"must be {words}")
        kind = "a whole number" if self.whole else "a number"
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not abs(value) < math.inf or (self.whole and value != int(value)):
            raise ValueError(f"must be {kind}{' or ' + words if words else ''}")
        if not self.low <= value <= self.high or (self.open and value == self.high):
            raise ValueError(self._range())
        try:
            return int(value) if self.whole else float(value)
        except OverflowError:
            raise ValueError("is too large for a number") from None

    def _range(self) -> str:
        if self.high == math.inf:
            return f"must be at least {self.low:g}"
        return f"must lie in [{self.low:g}, {self.high:g}{')' if self.open else ']'}"


@dataclass(frozen=True)
class Option:
    """What a field says of itself beside its name, type and default.

    ``flags``: all its spellings, the first one in messages. ``without``: its value when the flag stands alone.
    ``repeated``: given several times it collects. ``on_resume``: may differ from what the run was started with.
    """

    help: str
    flags: tuple[str, ...]
    rule: Rule | None
    metavar: str | None
    without: Any
    repeated: bool
    on_resume: bool
    read: Callable[[Any], Any] | None


def option(
    default: Any,
    help: str,
    *flags: str,
    rule: Rule | None = None,
    metavar: str | None = None,
    without: Any = None,
    repeated: bool = False,
    on_resume: bool = False,
    read: Callable[[Any], Any] | None = None,
) -> Any:
    """A dataclass field that is an option; see :class:`Option`. ``flags``: default ``--name-of-the-field``, a
    positional argument where the first has no dashes. ``read``: what the command line gave -> the value."""
    own = Option(help, flags, rule, metavar, without, repeated, on_resume, read)
    if default is REQUIRED:
        return dataclasses.field(metadata={"option": own})
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata={"option": own})
    return dataclasses.field(default=default, metadata={"option": own})


@dataclass(frozen=True)
class Entry:
    """One option with all that its field says. ``kind``: type of one value; ``many``: a tuple of these."""

    name: str
    kind: type
    many: bool
    default: Any
    option: Option

    @property
    def flags(self) -> tuple[str, ...]:
        return self.option.flags or (f"--{self.name.replace('_', '-')}",)

    @property
    def positional(self) -> bool:
        return not self.flags[0].startswith("-")

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def rule(self) -> Rule | None:
        if self.option.rule is None:
            return Rule(whole=True) if self.kind is int else Rule() if self.kind is float else None
        return dataclasses.replace(self.option.rule, whole=self.option.rule.whole or self.kind is int)

    def read(self, value: Any) -> Any:
        """What the command line gave, as the field has it."""
        return value if self.option.read is None else self.option.read(value)

    def check(self, value: Any) -> Any:
        """``value`` as the type and within the rule of this option.

        Raises:
            UserError: it is not; names the flag, the value and the rule.
        """
        rule = self.rule
        if (value is None and self.default is None) or rule is None or value == self.default:
            return tuple(value) if self.many and isinstance(value, list) else value
        if self.many:
            each = value if isinstance(value, list | tuple) else (value,)
            return tuple(self._checked(rule, part, each) for part in each)
        return self._checked(rule, value, value)

    def _checked(self, rule: Rule, value: Any, shown: Any) -> Any:
        try:
            return rule.check(value)
        except ValueError as error:
            text = " ".join(map(str, shown)) if isinstance(shown, tuple | list) else shown
            raise UserError(f"{self.flags[0]} {text}: {error}") from None


def entries(cls: type) -> dict[str, Entry]:
    """The options of a dataclass by name, in the order in which its bases declare them."""
    return {entry.name: entry for _, members in groups(cls) for entry in members}


def groups(cls: type) -> list[tuple[str, list[Entry]]]:
    """(heading, options) of a dataclass: the first line of each base's docstring is the heading of what it declares."""
    hints = typing.get_type_hints(cls)
    fields = {entry.name: entry for entry in dataclasses.fields(cls) if "option" in entry.metadata}
    found: dict[str, list[Entry]] = {}
    seen: set[str] = set()
    for base in _bases(cls):
        names = [name for name in inspect.get_annotations(base) if name in fields and name not in seen]
        seen.update(names)
        if names:
            heading = (base.__doc__ or "").splitlines()[0].rstrip(".")
            found.setdefault(heading, []).extend(_entry(fields[name], hints[name]) for name in names)
    return list(found.items())


def _bases(cls: type) -> Iterator[type]:
    for base in cls.__bases__:
        if dataclasses.is_dataclass(base):
            yield from _bases(base)
    yield cls


def _entry(field: dataclasses.Field[Any], hint: Any) -> Entry:
    kinds = [part for part in (typing.get_args(hint) if _is_union(hint) else (hint,)) if part is not type(None)]
    many = typing.get_origin(kinds[0]) is tuple
    kind = typing.get_args(kinds[0])[0] if many else kinds[0]
    default = field.default_factory() if callable(field.default_factory) else field.default
    return Entry(field.name, kind if isinstance(kind, type) else object, many, default, field.metadata["option"])


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def checked(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance of an option class from the names of its fields; lists become tuples.

    A class that has options which depend on one another says so in ``prepare``, a static method of the values given.

    Raises:
        UserError: an unknown name, a value of the wrong type or outside its rule.
    """
    known = entries(cls)
    for key in values:
        if key not in known:
            raise UserError(f"unknown option {key!r}{_meant(key, known)}")
    prepare = getattr(cls, "prepare", dict)
    values = prepare(values)
    return cls(**{key: known[key].check(value) for key, value in values.items()})


def _meant(key: str, known: Mapping[str, Entry]) -> str:
    """As :func:`did_you_mean`, the flags of the command line understood: the name of the field that they set."""
    spellings = {flag.lstrip("-").replace("-", "_"): name for name, entry in known.items() for flag in entry.flags}
    spellings |= {name: name for name in known}
    near = difflib.get_close_matches(key.lstrip("-").replace("-", "_"), spellings, n=1)
    return f" (did you mean {spellings[near[0]]!r}?)" if near else ""


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add the flags of an option class, a group for each base. Absent flags stay absent."""
    for heading, members in groups(cls):
        place = parser.add_argument_group(heading)
        for entry in members:
            place.add_argument(*_names(entry), **_argument(entry))


def _names(entry: Entry) -> tuple[str, ...]:
    return (entry.name,) if entry.positional else entry.flags


def _argument(entry: Entry) -> dict[str, Any]:
    """What argparse's add_argument takes beside the names."""
    own = entry.option
    settings: dict[str, Any] = {"help": _help(entry) or argparse.SUPPRESS, "default": argparse.SUPPRESS}
    if not entry.positional:
        settings |= {"dest": entry.name, "required": entry.required}
    if entry.kind is bool:
        return {**settings, "action": argparse.BooleanOptionalAction if entry.default is None else "store_true"}
    if own.repeated:
        settings["action"] = "extend" if entry.many else "append"
    if entry.many:
        settings["nargs"] = "+" if entry.required or not entry.positional else "*"
    elif own.without is not None or (entry.positional and not entry.required):
        settings |= {"nargs": "?", **({} if entry.positional else {"const": own.without})}
    if entry.kind in (int, float):
        settings["type"] = entry.kind
    metavar = own.metavar or ("|".join(own.rule.words) if own.rule and own.rule.words else None)
    return {**settings, "metavar": metavar} if metavar else settings


def _help(entry: Entry) -> str:
    if entry.required and not entry.positional:
        return f"{_with_default(entry)} (required)".replace("%", "%%")
    return _with_default(entry).replace("%", "%%")


def _with_default(entry: Entry) -> str:
    text, shown = entry.option.help, entry.default
    if not text or shown is False or shown in (None, "", (), REQUIRED) or isinstance(shown, dict) or "default" in text:
        return text
    words = " ".join(map(str, shown)) if entry.many else f"{shown:g}" if isinstance(shown, float) else str(shown)
    return f"{text} (default {words})"


def optional(cls: type) -> type:
    """The option class with nothing as every default: an instance tells what was given from what was not. The help
    keeps the class's own defaults."""
    hints = typing.get_type_hints(cls)
    fields = [(name, hints[name] | None, _absent(entry)) for name, entry in entries(cls).items()]
    found = dataclasses.make_dataclass(f"Optional{cls.__name__}", fields, frozen=True)
    found.__doc__ = cls.__doc__
    return found


def _absent(entry: Entry) -> Any:
    """The field of an option that need not be given, whose help says what its default was."""
    own = dataclasses.replace(entry.option, help=_with_default(entry))
    return dataclasses.field(default=None, metadata={"option": own})


def from_arguments(cls: type[T], arguments: argparse.Namespace) -> T:
    """The option class that was parsed from the command line; see :func:`checked`."""
    given = vars(arguments)
    return checked(cls, {name: entry.read(given[name]) for name, entry in entries(cls).items() if name in given})


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" where one of ``known`` is near, else nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
