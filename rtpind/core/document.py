# SPDX-License-Identifier: GPL-2.0-or-later
"""Text of a policy file → plain data with line numbers, checked against the schema; or problems, all at once.

First half of reading a policy; :mod:`rtpind.core.policy` gives the data its meaning.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.composer import ComposerError
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from rtpind import schemas

Path = tuple[str | int, ...]

#: A policy is a page or two; more is not one, and would only cost time.
MAX_CHARS = 256 * 1024
_MAX_DEPTH = 20
_MAX_VALUES = 20_000
_DECIMAL = re.compile(r"0|-?[1-9][0-9]{0,18}", re.ASCII)
_LIKE_CPUS = re.compile(r"\^?\d+(-\d+)?|\^?isolated", re.ASCII)
_NOTHING_HINT = "give it a value, or leave the key out"
_PERIOD_HINT = "a number with ms, s or m, such as 10s"
_QUOTE_CPUS = 'a CPU list with commas inside {} must be quoted: "2-7,^4"'
#: What YAML gives a value by its look, or spells out as one of these; any other tag was put there to mean something.
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq", "timestamp",
                                                  "merge", "value")}  # fmt: skip


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One fault of a policy file: where (line from 1, path of keys), what, and the cure."""

    line: int
    path: str
    message: str
    hint: str = ""
    warning: bool = False

    def text(self, file: str) -> str:
        """Return ``FILE:LINE: path: message (hint)``."""
        where = f"{file}:{self.line}: " + (f"{self.path}: " if self.path else "")
        return where + ("warning: " if self.warning else "") + self.message + (f" ({self.hint})" if self.hint else "")


@dataclass(frozen=True, slots=True)
class Document:
    """Plain data (dict, list, str, int, bool, None), the line on which each path begins, and what was taken out."""

    data: Any
    lines: Mapping[Path, int]
    refused: frozenset[Path] = frozenset()

    def line(self, path: Path) -> int:
        """Return the line of ``path``, or of its nearest ancestor that has one."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def problem(self, path: Path, message: str, hint: str = "", *, warning: bool = False) -> Problem:
        """Return a problem at ``path``."""
        return Problem(self.line(path), dotted(path), message, hint, warning)


def dotted(path: Path) -> str:
    """Return ``classes.realtime.vcpu``, ``guests[0].class``; an empty key is ``''``."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part or _show(part)}" for part in path)
    return "".join(parts).removeprefix(".")


def read(text: str) -> tuple[Document | None, list[Problem]]:
    """Parse YAML 1.2 and check it against the policy schema.

    Returns the document, or None where the text is not YAML at all, and every problem found so far. What the schema
    refuses is reported and taken out of the data (its line stays known), so that the rest can be checked too.
    Never raises.
    """
    if len(text) > MAX_CHARS:
        return None, [Problem(1, "", f"the file is larger than {MAX_CHARS} characters", "this is no policy file")]
    yaml = YAML(typ="rt", pure=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReusedAnchorWarning)  # YAML allows it; an alias means the one before it
            node = yaml.compose(text)
    except MarkedYAMLError as error:
        return None, [_not_yaml(error)]
    except ReaderError as error:
        what = f"the character #x{error.character:04x} is not allowed"
        return None, [Problem(text.count("\n", 0, error.position) + 1, "", f"not YAML: {what}", "delete it")]
    except (YAMLError, ValueError, OverflowError, TypeError, IndexError, AttributeError, KeyError) as fault:
        # ruamel raises these on some malformed tags, directives and characters, without a mark.
        return None, [Problem(1, "", f"not YAML: {str(fault).splitlines()[0] if str(fault) else type(fault).__name__}")]
    except RecursionError:
        return None, [Problem(1, "", "not a policy: nested too deeply")]
    if node is None or (isinstance(node, ScalarNode) and node.value in ("", "~", "null")):
        return None, [Problem(1, "", "the file is empty", "a policy needs at least 'version: 1'")]
    builder = _Builder()
    data = builder.build(node, (), 0)
    if builder.too_much:
        return None, builder.problems
    errors = list(_validator().iter_errors(data))
    bad_keys = {(*error.absolute_path, error.instance) for error in errors if _of_key(error)}
    errors = [error for error in errors if _of_key(error) or not _at_or_below(tuple(error.absolute_path), bad_keys)]
    places = Document(data, builder.lines)
    problems = builder.problems + [problem for error in errors for problem in _explain(places, error)]
    if not isinstance(data, dict):
        return None, problems
    refused = builder.refused.union(*(_take_out(data, error) for error in errors))
    return Document(data, builder.lines, frozenset(refused)), problems


def _not_yaml(error: MarkedYAMLError) -> Problem:
    """Say what the parser stumbled on, and where the construct that it was in begins."""
    mark = error.problem_mark or error.context_mark
    context = str(error.context or "")
    if error.context and error.context_mark and mark and error.context_mark.line != mark.line:
        context += f" that begins on line {error.context_mark.line + 1},"
    what = " ".join(part for part in (context, str(error.problem or "")) if part).replace("'\\x00'", "the end")
    hint = "" if isinstance(error, ComposerError) else "check indentation, brackets and quotes"
    return Problem(mark.line + 1 if mark else 1, "", f"not YAML: {what}", hint)


class _Builder:
    """Turns YAML nodes into plain data, and notes lines and what plain data would hide (duplicate keys, tags)."""

    def __init__(self) -> None:
        self.lines: dict[Path, int] = {}
        self.problems: list[Problem] = []
        self.values = 0
        self.too_much = False
        self.refused: set[Path] = set()

    def build(self, node: Node, path: Path, depth: int) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        self.values += 1
        if depth > _MAX_DEPTH or self.values > _MAX_VALUES:  # also what ends an alias that holds itself
            if not self.too_much:
                self.add(path[:2], "nested too deeply, or too much for a policy", "an alias may hold itself")
            self.too_much = True
            return None
        if (tag := str(node.tag)) not in _TAGS:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            self.add(path, f"the YAML tag {shown} has no meaning here", "leave the tag out")
            self.refused.add(path)
        if isinstance(node, MappingNode):
            return self.mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            return [self.build(child, (*path, number), depth + 1) for number, child in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self.scalar(node, path)

    def mapping(self, node: MappingNode, path: Path, depth: int) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self.problems.append(Problem(key_node.start_mark.line + 1, dotted(path), "a key must be a plain word"))
                continue
            key = self.printable(str(key_node.value), path)
            here = (*path, key)
            line = key_node.start_mark.line + 1
            if key in data:
                first = self.lines[here]
                self.problems.append(
                    Problem(line, dotted(here), f"duplicate key, first on line {first}", "keep one of them")
                )
                continue
            self.lines[here] = line
            data[key] = self.build(value_node, here, depth + 1)
        return data

    def scalar(self, node: ScalarNode, path: Path) -> Any:
        text = self.printable(str(node.value), path)
        tag = str(node.tag)
        if node.style is None and tag.endswith(":null"):
            return None
        if node.style is None and tag.endswith(":bool") and text.lower() in ("true", "false"):
            return text.lower() == "true"
        # Only plain decimals are numbers: 0x3, 010 and 1_0 mean different things to different readers.
        if node.style is None and tag.endswith(":int") and _DECIMAL.fullmatch(text):
            return int(text)
        return text

    def printable(self, text: str, path: Path) -> str:
        """Return the text without what a line of a log cannot show, which is a problem."""
        if text.isprintable():
            return text
        self.add(path, f"{_show(text)} has a line break or a character that cannot be seen", "write it on one line")
        return "".join(character for character in text if character.isprintable())

    def add(self, path: Path, message: str, hint: str = "") -> None:
        line = next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), 1)
        self.problems.append(Problem(line, dotted(path), message, hint))


@lru_cache(maxsize=1)
def _validator() -> Draft202012Validator:
    return Draft202012Validator(schemas.load("policy"))


def _of_key(error: ValidationError) -> bool:
    """Return whether the error is about a key's own text."""
    return "propertyNames" in error.absolute_schema_path


def _at_or_below(path: Path, places: Collection[Path]) -> bool:
    return any(path[: len(place)] == place for place in places)


def _take_out(data: dict[str, Any], error: ValidationError) -> list[Path]:
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


def _explain(document: Document, error: ValidationError) -> Iterator[Problem]:
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
            yield document.problem(path, f"{_show(value)} is not {wanted}", f"write {path[-1]}: {wanted}")
        case "enum":
            listed = " or ".join(_show(choice) for choice in wanted)
            yield document.problem(path, f"{_show(value)} is not {listed}", _choice_hint(value, wanted))
        case "type":
            yield document.problem(path, f"{_show(value)} is not {_types(wanted)}", _type_hint(path, value))
        case "minimum" | "maximum":
            low, high = schema.get("minimum"), schema.get("maximum")
            span = f"from {low} to {high}" if high is not None else f"{low} or more"
            yield document.problem(path, f"{_show(value)} is out of range", f"a number {span}")
        case "pattern":
            yield document.problem((*path, value) if _of_key(error) else path, *_pattern(path, value))
        case "minLength":
            yield document.problem(path, "an empty text matches no guest", 'for every guest: "*"')
        case _:
            yield document.problem(path, f"{_show(value)} is not allowed", f"{error.validator}: {wanted}")


def _pattern(path: Path, value: str) -> tuple[str, str]:
    if path[-1:] == ("period",):
        return f"{_show(value)} is not a time", _PERIOD_HINT
    if path[-1:] == ("uri",):
        return f"{_show(value)} is not libvirt's system connection", "only qemu:///system has the cgroups rtpind needs"
    hint = "a small letter first, then up to 31 of a-z, 0-9, _ and -"
    return f"{_show(value)} is not a name", _QUOTE_CPUS if _LIKE_CPUS.fullmatch(value) else hint


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


def _choice_hint(value: Any, choices: list[str]) -> str:
    if value is None:
        return _NOTHING_HINT
    close = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) else []
    return f"did you mean {close[0]}?" if close else ""


def _type_hint(path: Path, value: Any) -> str:
    if value is None and isinstance(path[-1], str):
        return _QUOTE_CPUS if _LIKE_CPUS.fullmatch(path[-1]) else _NOTHING_HINT
    if path[-1:] == ("period",):
        return _PERIOD_HINT
    if path[-1:] in (("name",), ("uuid",)):
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


def _show(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case str():
            return repr(value if len(value) <= 60 else value[:57] + "...")
    return str(value)
