# SPDX-License-Identifier: GPL-2.0-or-later
"""What the schema says against a policy → problems in words that name the place and the cure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from jsonschema.exceptions import ValidationError

from rtpind.core.document import Document, Path, Problem, show
from rtpind.core.policy import GLOBS

_LIKE_CPUS = re.compile(r"\^?\d+(-\d+)?|\^?isolated", re.ASCII)
_NOTHING_HINT = "give it a value, or leave the key out"
_PERIOD_HINT = "a number with ms, s or m, such as 10s"
_QUOTE_CPUS = 'a CPU list with commas inside {} must be quoted: "2-7,^4"'


def independent(errors: Iterable[ValidationError]) -> list[ValidationError]:
    """Return the errors but for those below a key that is itself refused."""
    found = list(errors)
    bad_keys: set[Path] = {(*error.absolute_path, str(error.instance)) for error in found if _of_key(error)}
    return [error for error in found if _of_key(error) or not _at_or_below(tuple(error.absolute_path), bad_keys)]


def _of_key(error: ValidationError) -> bool:
    """Return whether the error is about a key's own text."""
    return "propertyNames" in error.absolute_schema_path


def _at_or_below(path: Path, places: Collection[Path]) -> bool:
    return any(path[: len(place)] == place for place in places)


def take_out(data: dict[str, Any], error: ValidationError) -> list[Path]:
    """Remove the value that a schema error is about: the unknown keys of a mapping, else the value itself."""
    path: Path = tuple(error.absolute_path)
    schema: Any = error.schema
    instance: Any = error.instance
    if error.validator == "additionalProperties":
        unknown = sorted(set(instance) - set(schema["properties"]))
        for key in unknown:
            del instance[key]
        return [(*path, key) for key in unknown]
    if _of_key(error):
        path = (*path, instance)
    if not path:
        return []
    parent: Any = data
    for part in path[:-1]:
        parent = parent[part]
    if isinstance(parent, list):
        parent[int(path[-1])] = None  # keeps the numbers of the other items
    elif isinstance(parent, dict):
        parent.pop(path[-1], None)
    return [path]


def explain(document: Document, error: ValidationError) -> Iterator[Problem]:
    """Say one schema error in words that name the place and the cure."""
    path: Path = tuple(error.absolute_path)
    schema: Any = error.schema
    wanted: Any = error.validator_value
    value: Any = error.instance
    match error.validator:
        case "additionalProperties":
            known = sorted(schema["properties"])
            unknown = [key for key in value if key not in known]
            like_cpus = [key for key in unknown if _LIKE_CPUS.fullmatch(key)]
            for key in unknown:
                if key not in like_cpus[1:]:  # one CPU list, said once
                    yield document.problem((*path, key), "unknown key", _key_hint(key, known))
        case "required":
            for key in _missing(wanted, value, sorted(schema["properties"])):
                hint = "add 'version: 1'" if key == "version" else ""
                yield document.problem(path, f"the key '{key}' is missing", hint)
        case "const":
            yield document.problem(path, f"{show(value)} is not {wanted}", f"write {path[-1]}: {wanted}")
        case "enum":
            listed = " or ".join(show(choice) for choice in wanted)
            yield document.problem(path, f"{show(value)} is not {listed}", _choice_hint(path, value, wanted))
        case "type":
            yield document.problem(path, f"{show(value)} is not {_types(wanted)}", _type_hint(path, value))
        case "minimum" | "maximum":
            low, high = schema.get("minimum"), schema.get("maximum")
            span = f"from {low} to {high}" if high is not None else f"{low} or more"
            yield document.problem(path, f"{show(value)} is out of range", f"a number {span}")
        case "pattern":
            yield document.problem((*path, value) if _of_key(error) else path, *_pattern(path, value))
        case "minLength":
            yield document.problem(path, "an empty text matches no guest", 'for every guest: "*"')
        case _:
            yield document.problem(path, f"{show(value)} is not allowed", f"{error.validator}: {wanted}")


def _pattern(path: Path, value: str) -> tuple[str, str]:
    if path[-1:] == ("period",):
        return f"{show(value)} is not a time", _PERIOD_HINT
    if path[-1:] == ("uri",):
        return f"{show(value)} is not libvirt's system connection", "only qemu:///system has the cgroups rtpind needs"
    if path[-1:] == ("metrics_dir",):
        return f"{show(value)} is not an absolute path", "such as /run/rtpind"
    hint = "a small letter first, then up to 31 of a-z, 0-9, _ and -"
    return f"{show(value)} is not a name", _QUOTE_CPUS if _LIKE_CPUS.fullmatch(value) else hint


def _missing(wanted: list[str], value: Mapping[str, Any], known: list[str]) -> list[str]:
    """Return the keys that a mapping lacks, but not those that it misspells: these are said to be unknown."""
    meant = {_meant(key, known) for key in value if key not in known}
    return [key for key in wanted if key not in value and key not in meant]


def _meant(key: str, known: list[str]) -> str:
    """Return the known key that an unknown one probably is; empty when it is like none."""
    if _LIKE_CPUS.fullmatch(key) and "cpus" in known:
        return "cpus"
    return next(iter(difflib.get_close_matches(key, known, 1)), "")


def _key_hint(key: str, known: list[str]) -> str:
    if _LIKE_CPUS.fullmatch(key):
        return _QUOTE_CPUS
    meant = _meant(key, known)
    return f"did you mean '{meant}'?" if meant else f"known here: {', '.join(known)}"


def _choice_hint(path: Path, value: Any, choices: list[str]) -> str:
    if path[-1:] == ("share_with",):
        return "or a thread by its number: {vcpu: 0}"
    if value is None:
        return _NOTHING_HINT
    close = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) else []
    return f"did you mean {close[0]}?" if close else ""


def _type_hint(path: Path, value: Any) -> str:
    if value is None and path and isinstance(path[-1], str):
        return _QUOTE_CPUS if _LIKE_CPUS.fullmatch(path[-1]) else _NOTHING_HINT
    if path[-1:] == ("period",):
        return _PERIOD_HINT
    if path[-1:] and path[-1] in GLOBS:
        return "quote it"
    if path[-1:] == ("unsafe",):
        return "write true or false"
    return ""


_TYPE_NAMES = {
    "object": "a mapping", "array": "a list", "string": "a text", "integer": "a whole number",
    "boolean": "true or false",
}  # fmt: skip


def _types(wanted: str | list[str]) -> str:
    names = [wanted] if isinstance(wanted, str) else wanted
    return " or ".join(_TYPE_NAMES[name] for name in names if name != "null")
