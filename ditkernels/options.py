"""A dataclass as flags, as a YAML file and as a record: fields are declared once, by :func:`option`. Nothing here imports torch."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


# What another value of a field means for a run that is resumed.
Role = Literal["identity", "recipe", "execution", "free"]
IDENTITY: Final = "identity"  # it is another run
RECIPE: Final = "recipe"  # the run goes on differently, if its owner says so
EXECUTION: Final = "execution"  # the same numbers up to how they are rounded
FREE: Final = "free"  # no number that is trained changes


def option(default: Any, text: str, role: Role = IDENTITY, *, least: float | None = None, first: Any = None) -> Any:
    """A field of a config.

    Args:
        default: its default.
        text: what ``--help`` says.
        role: what another value means for a run that is resumed.
        least: the smallest value allowed.
        first: what was done before the field existed, where its default is another by now.
    """
    first = default if first is None else first
    return field(default=default, metadata={"text": text, "role": role, "least": least, "first": first})


def check_fields(config: Any) -> None:
    """Every field of a dataclass made of :func:`option` has its type and is not below its least value."""
    hints = get_type_hints(type(config))
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if value is None and type(None) in get_args(hints[spec.name]):
            continue
        kind = _kind(hints[spec.name])
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                allowed = ", ".join(map(str, get_args(kind)))
                raise ValueError(f"{spec.name}: got {value!r}, allowed are {allowed}")
            continue
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{spec.name}: got {value!r}, allowed is {_described(kind)}")
        least = spec.metadata["least"]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{spec.name}: got {value}, allowed is a finite number")
        if least is not None and value < least:
            raise ValueError(f"{spec.name}: got {value}, allowed is {least} or more")


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """A flag for every field, and ``--config FILE``; :func:`from_flags` makes the config of what they were given."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of the same settings; flags override it")
    hints = get_type_hints(config)
    for spec in dataclasses.fields(config):
        kind = _kind(hints[spec.name])
        text = spec.metadata["text"].replace("%", "%%")
        default = "" if spec.default is None or spec.default == "" else f" (default: {spec.default})"
        arguments: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text + default}
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            arguments["choices"] = get_args(kind)
        else:
            arguments |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument("--" + spec.name.replace("_", "-"), **arguments)


def from_flags(config: type[Config], args: argparse.Namespace) -> Config:
    """The config of the flags that were given, of the YAML file they name, and of the defaults, in this order.

    Raises:
        ValueError: as the config; a file that is no mapping, or holds unknown keys, which are named.
        OSError: the file cannot be read.
    """
    values = {} if args.config is None else read_yaml(config, Path(args.config))
    names = {spec.name for spec in dataclasses.fields(config)}  # type: ignore[arg-type]
    values |= {name: value for name, value in vars(args).items() if name in names}
    return config(**values)


def read_yaml(config: type, path: Path) -> dict[str, Any]:
    """The fields of ``config`` that a YAML file sets; errors as of :func:`from_flags`."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML has the last of two keys; a setting that is given twice is a mistake."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = sorted({str(key) for key in keys if keys.count(key) > 1})
            if twice:
                raise ValueError(f"{path}: {', '.join(twice)} is given twice")
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, allowed is a mapping of settings")
    hints = get_type_hints(config)
    unknown = [str(key) for key in content if key not in hints]
    if unknown:
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; allowed are {', '.join(hints)}")
    return {name: _number(hints[name], value) for name, value in content.items()}


def recorded_values(recorded: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The values that a record in a checkpoint stands for; a field that is younger than the record had its first effect."""
    return {spec.name: recorded.get(spec.name, spec.metadata["first"]) for spec in dataclasses.fields(config)}


class Difference(NamedTuple):
    """A field in which a config differs from a recorded one."""

    name: str
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.there!r} there, {self.here!r} here"


def differences(recorded: Mapping[str, Any], config: Any) -> dict[str, list[Difference]]:
    """The fields in which a config differs from one recorded in a checkpoint, by role.

    A record of "auto" says nothing: it is of a version that did not record what that became.
    """
    here, there = dataclasses.asdict(config), recorded_values(recorded, config)
    found: dict[str, list[Difference]] = {role: [] for role in get_args(Role)}
    for spec in dataclasses.fields(config):
        if there[spec.name] not in (here[spec.name], "auto"):
            found[spec.metadata["role"]].append(Difference(spec.name, there[spec.name], here[spec.name]))
    return found


def names_of(config: type, role: Role) -> list[str]:
    """The fields of a role."""
    return [spec.name for spec in dataclasses.fields(config) if spec.metadata["role"] == role]


def _kind(hint: Any) -> Any:
    """The type of a field, without the None that may stand beside it."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def _described(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[kind]


def _number(hint: Any, value: Any) -> Any:
    # YAML 1.1, which PyYAML reads, takes 1e-4 for a string: it wants a dot and a sign.
    if _kind(hint) is not float or not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
