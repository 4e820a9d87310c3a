"""Reads the settings: one YAML file, the environment and command-line flags make one frozen ``Settings``.

What is wrong is reported all at once, one line each: where the value came from, its key path, the value and what
would be right. Nothing is created on disk; files are only read or looked at.

YAML is read without its type guessing: every scalar stays the text that was written (``1.10`` is no 1.1, ``off`` no
false, ``12:30`` no 750), and the key that it stands for says how it is read. So a value from the environment, which is
text anyway, goes the same way as one from a file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias, cast

import msgspec
import yaml
from msgspec import UNSET, inspect

from proxy import config_checks
from proxy.config_checks import Finding, KeyPath
from proxy.config_values import KINDS, Kind, WrongValueError, shown
from proxy.settings import Settings

Tree: TypeAlias = dict[object, object]

PREFIX = "PAYLOAD_LOGGER_"
ANY = "<collection>"  # stands for the free part of a key path

# Top level of Azure ML's managed and Kubernetes online deployment schemas (CLI v2), what `az ml online-deployment show`
# adds to it included. All of it may stand in our file and is not looked at.
AZURE_KEYS = frozenset({
    "$schema", "app_insights_enabled", "code_configuration", "creation_context", "description",
    "egress_public_network_access", "environment", "environment_variables", "id", "instance_count", "instance_type",
    "liveness_probe", "model", "model_mount_path", "private_network_connection", "properties", "provisioning_state",
    "readiness_probe", "request_settings", "resources", "scale_settings", "startup_probe", "tags", "traffic", "type",
})  # fmt: skip

_COLLECTOR_KEYS = frozenset(
    {"collections", "rolling_rate", "sampling_rate", "request_logging", "request", "response", "enabled"}
)

# What Kubernetes sets for a Service whose name begins with payload-logger.
_SERVICE_LINK = re.compile(
    rf"{PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)=.*"
    rf"|{PREFIX}(\w+_)?PORT=(tcp|udp|sctp)://.*"
)
_SETTINGS = cast("inspect.StructType", inspect.type_info(Settings))


class ConfigError(Exception):
    """The configuration can't be used; ``problems`` has one line for each thing that is wrong."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings that can be used, and what their owner should know about them."""

    settings: Settings
    warnings: tuple[str, ...]


def load(
    *,
    config: Path | None = None,
    deployment: Path | None = None,
    overrides: Mapping[str, object],
    environ: Mapping[str, str],
) -> Loaded:
    """Settings from, in order of precedence: ``overrides``, ``environ``, the file, the defaults.

    config: our YAML file. deployment: an Azure ML online deployment YAML, where unknown top-level keys are not looked
    at; at most one of the two. overrides: dotted key path to value; None is no value. environ: ``PAYLOAD_LOGGER_…``
    variables; an empty one is none.

    Raises ConfigError with every problem found.
    """
    if config and deployment:
        raise ConfigError(["give either a configuration file or a deployment, not both"])
    file = config or deployment
    findings = _Findings(str(file) if file else None)
    tree = _top_level(_read_file(file, findings), findings, foreign_keys_allowed=deployment is not None) if file else {}
    warnings = []
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or not text.strip():
            continue
        if path := _path_of(variable):
            _put(tree, path, text)
            findings.origins[path] = variable
        elif not _SERVICE_LINK.fullmatch(f"{variable}={text}"):
            known = (variable_of(path) for path, _ in keys())
            warnings.append(_one_line(f"{variable}: unknown variable{_nearest(variable, known, cutoff=0.9)}"))
    for dotted, value in overrides.items():
        if value is not None:
            _put(tree, path := tuple(dotted.split(".")), _as_written(value))
            findings.origins[path] = "command line"
    settings = _struct(_SETTINGS, tree, (), findings)
    if isinstance(settings, Settings):
        findings.check(config_checks.problems(settings))
    if findings.lines or not isinstance(settings, Settings):
        raise ConfigError(findings.lines)
    warnings += [findings.line(paths[0], text) for paths, text in config_checks.warnings(settings)]
    return Loaded(settings, tuple(warnings))


def keys(struct: inspect.StructType | None = None, path: KeyPath = ()) -> Iterator[tuple[KeyPath, inspect.Field]]:
    """Every key that has a value of its own, in order; ``ANY`` stands for the name of a collection."""
    for item in (struct or _SETTINGS).fields:
        below, _ = bare(item.type)
        here = (*path, item.name)
        if isinstance(below, inspect.DictType):
            below, here = bare(below.value_type)[0], (*here, ANY)
        if isinstance(below, inspect.StructType):
            yield from keys(below, here)
        else:
            yield here, item


def variable_of(path: KeyPath) -> str:
    """Name of the environment variable for a key path."""
    return PREFIX + "_".join(path).upper()


def bare(declared: inspect.Type) -> tuple[inspect.Type, str]:
    """A declared type without Annotated and Optional, and its kind: a key of KINDS, or "" where KINDS has none."""
    kind = ""
    while isinstance(declared, inspect.Metadata | inspect.UnionType):
        if isinstance(declared, inspect.Metadata):
            kind = kind or (declared.extra or {}).get("kind", "")
            declared = declared.type
        else:
            declared = next(one for one in declared.types if not isinstance(one, inspect.NoneType))
    if not kind and isinstance(declared, inspect.IntType | inspect.StrType):
        kind = "integer" if isinstance(declared, inspect.IntType) else "text"
    return declared, kind


# The file


class _Loader(yaml.SafeLoader):
    """Whatever YAML would guess a scalar to be, but for null, it stays text; a mapping may not have the same key twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                self.duplicates.append(
                    f"line {line}: duplicate key {key.value[:60]!r}, first on line {lines[key.value]}"
                )
            lines.setdefault(key.value, line)
        return node


_Loader.yaml_constructors = yaml.SafeLoader.yaml_constructors | {
    f"tag:yaml.org,2002:{guess}": yaml.SafeLoader.construct_yaml_str
    for guess in ("int", "float", "bool", "timestamp", "value")
}


class _NotYamlError(ValueError):
    """Says where and why in one line."""


def _parse(text: str) -> tuple[object, list[str]]:
    """Tree and duplicate keys of a YAML text. Raises _NotYamlError."""
    try:
        loader = _Loader(text)
        return loader.get_single_data(), loader.duplicates
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise _NotYamlError(f"{place}{error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position].split("\n")
        raise _NotYamlError(f"line {len(before)}, column {len(before[-1]) + 1}: {error.reason}") from None
    except RecursionError:
        raise _NotYamlError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML leaks these for escapes like \UFFFFFFFF
        raise _NotYamlError(f"not YAML: {error}") from None


def _read_file(file: Path, findings: _Findings) -> Tree:
    try:
        tree, duplicates = _parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        findings.add((), f"cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        findings.add((), f"not UTF-8 text (byte {error.start})")
    except ValueError as error:  # _NotYamlError, or a file name with a NUL
        findings.add((), str(error))
    else:
        findings.lines += [_one_line(f"{file}: {duplicate}") for duplicate in duplicates]
        if isinstance(tree, dict):
            return tree
        findings.add((), "empty" if tree is None else f"{shown(tree)} is not a mapping of keys to values")
    return {}


def _top_level(tree: Tree, findings: _Findings, *, foreign_keys_allowed: bool) -> Tree:
    """The part of a file that is ours; what is neither ours nor Azure ML's is reported."""
    ours = [item.name for item in _SETTINGS.fields]
    kept: Tree = {}
    for key, value in tree.items():
        if key in ours:
            kept[key] = value
        elif key in AZURE_KEYS:
            continue
        elif key in _COLLECTOR_KEYS:
            findings.add((_text_of(key),), "belongs below data_collector; is the indentation lost?")
        elif not foreign_keys_allowed:
            findings.add((_text_of(key),), f"unknown key{_nearest(key, [*ours, *AZURE_KEYS])}")
        elif hint := _nearest(key, ["data_collector"], cutoff=0.8):
            findings.add((_text_of(key),), f"unknown key{hint}")
    return kept


# The environment and the flags


def _path_of(variable: str) -> KeyPath | None:
    for path, _ in keys():
        pattern = variable_of(path).replace(ANY.upper(), "(.+)")
        if match := re.fullmatch(pattern, variable):
            return tuple(match[1].lower() if key == ANY else key for key in path)
    return None


def _put(tree: Tree, path: KeyPath, value: object) -> None:
    """Sets a value; a section that the file does not have begins with its defaults."""
    for depth, key in enumerate(path[:-1]):
        below = tree.get(key)
        if below is None and depth == 0:
            below = _as_written(msgspec.to_builtins(getattr(Settings(), key, None)))
        below = {} if below is None else below
        if not isinstance(below, dict):
            return  # is reported when the section is read
        tree[key] = tree = dict(below)  # a copy: with YAML aliases several keys share one mapping
    tree[path[-1]] = value


def _as_written(value: object) -> object:
    """A Python value as the YAML reader would give it."""
    if isinstance(value, Mapping):
        return {key: _as_written(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_written(one) for one in value]
    return value if value is None else str(value)


# From the tree to settings

# Commas part the items of a list, but not the methods of a path rule: there an item goes on up to its pattern.
_ITEMS = re.compile(r"[^/*,]*(?:,[^/*,]*)*[/*][^,]*|[^,]+")
_EXAMPLES = {"enabled": "true", "collections": "{request: {enabled: true}, response: {enabled: true}}"}


@dataclass(slots=True)
class _Findings:
    """What is wrong so far, with the place that each value came from."""

    source: str | None
    origins: dict[KeyPath, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    unread: list[KeyPath] = field(default_factory=list)

    def line(self, path: KeyPath, text: str) -> str:
        nearest_first = (path[:length] for length in range(len(path), 0, -1))
        origin = next((self.origins[one] for one in nearest_first if one in self.origins), self.source)
        return _one_line(": ".join(filter(None, (origin, ".".join(path).replace(".[", "["), text))))

    def add(self, path: KeyPath, text: str) -> None:
        self.lines.append(self.line(path, text))
        self.unread.append(path)

    def check(self, found: Iterable[Finding]) -> None:
        """Adds what is wrong between values, unless one of them could not be read: it has its default meanwhile."""
        unread = tuple(self.unread)
        for paths, text in found:
            if not any(one[: len(path)] == path[: len(one)] for one in unread for path in paths):
                self.add(paths[0], text)


def _read(declared: inspect.Type, given: object, path: KeyPath, findings: _Findings) -> object:
    """The value of one key; UNSET if it is wrong, which is then reported."""
    kind_type, kind = bare(declared)
    if isinstance(kind_type, inspect.StructType):
        return _struct(kind_type, given, path, findings)
    if isinstance(kind_type, inspect.DictType):
        return _table(kind_type, given, path, findings)
    if isinstance(kind_type, inspect.VarTupleType):
        return _items(kind_type, given, path, findings)
    how = KINDS[kind] if kind else _choice(kind_type)
    try:
        if not isinstance(given, str) or not given.strip().isprintable():
            raise ValueError
        value = how.read(given.strip())
    except WrongValueError as error:
        wrong = str(error)
    except ValueError:
        wrong = f"is not {how.noun}; use {how.use}"
    else:
        wrong = _out_of_bounds(kind_type, value)
        if not wrong:
            return value
    findings.add(path, f"{shown(given)} {wrong}")
    return UNSET


def _choice(declared: inspect.Type) -> Kind:
    values = {str(one.value): one for one in cast("inspect.EnumType", declared).cls}
    by_name = {name.lower(): one for name, one in values.items()}

    def read(text: str) -> Enum:
        if text.lower() not in by_name:
            raise ValueError
        return by_name[text.lower()]

    return Kind(read, "a choice here", " or ".join(values))


def _out_of_bounds(declared: inspect.Type, value: object) -> str:
    if isinstance(declared, inspect.IntType | inspect.FloatType) and isinstance(value, int | float):
        if declared.gt is not None and value <= declared.gt:
            return f"is too small; it must be more than {declared.gt}"
        if declared.ge is not None and value < declared.ge:
            return f"is too small; the least is {declared.ge}"
        if declared.le is not None and value > declared.le:
            return f"is too large; the most is {declared.le}"
    return ""


def _struct(struct: inspect.StructType, given: object, path: KeyPath, findings: _Findings) -> object:
    known = {item.name: item for item in struct.fields}
    if not isinstance(given, dict):
        findings.add(path, f"{shown(given)} is not a section; write {', '.join(known)} below it")
        return UNSET
    values = {}
    for key, value in given.items():
        here = (*path, _text_of(key))
        if key not in known:
            findings.add(here, f"unknown key{_nearest(key, known)}")
        elif value is not None:
            values[key] = _read(known[key].type, value, here, findings)
    for name, item in known.items():
        if item.required and name not in values:
            values[name] = UNSET
            findings.add((*path, name), f"missing; write '{name}: {_EXAMPLES.get(name, '…')}'")
    if any(values.get(name) is UNSET for name, item in known.items() if item.required):
        return UNSET
    return struct.cls(**{name: value for name, value in values.items() if value is not UNSET})


def _table(table: inspect.DictType, given: object, path: KeyPath, findings: _Findings) -> object:
    if not isinstance(given, dict):
        findings.add(path, f"{shown(given)} is not a section; write '{path[-1]}: {_EXAMPLES[path[-1]]}'")
        return UNSET
    values = {}
    for key, value in given.items():
        here = (*path, _text_of(key))
        name = _read(table.key_type, key, here, findings)
        if value is None:
            findings.add(here, f"empty; write '{_text_of(key)}: {{enabled: true}}'")
        elif (below := _read(table.value_type, value, here, findings)) is not UNSET and name is not UNSET:
            values[name] = below
    return values


def _items(items: inspect.VarTupleType, given: object, path: KeyPath, findings: _Findings) -> object:
    if isinstance(given, str):
        try:
            in_yaml = given.lstrip().startswith("[")
            given = _parse(given)[0] if in_yaml else [one.strip(" ,") for one in _ITEMS.findall(given)]
        except _NotYamlError as error:
            findings.add(path, f"{shown(given)} is not a list: {error}")
            return UNSET
    if not isinstance(given, list):
        findings.add(path, f"{shown(given)} is not a list; use [A, B] or 'A, B'")
        return UNSET
    read = [_read(items.item_type, one, (*path, f"[{n}]"), findings) for n, one in enumerate(given)]
    return UNSET if UNSET in read else tuple(read)


# Words for the lines


def _text_of(key: object) -> str:
    return "null" if key is None else str(key)[:60]


def _nearest(key: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    plain = {_plain(one): one for one in known}
    near = difflib.get_close_matches(_plain(_text_of(key)), plain, n=1, cutoff=cutoff)
    return f"; did you mean '{plain[near[0]]}'?" if near else ""


def _plain(key: str) -> str:
    return key.strip().lower().replace("-", "").replace("_", "")


def _one_line(text: str) -> str:
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
