# SPDX-License-Identifier: GPL-2.0-or-later
"""Text of a policy file → plain data with line numbers, checked against the schema; or problems, all at once.

First half of reading a policy; :mod:`rtpind.core.policy` gives the data its meaning.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from rtpind import schemas

Path = tuple[str | int, ...]

#: A policy is a page or two; more is not one, and would only cost time.
MAX_CHARS = 256 * 1024
_MAX_DEPTH = 20
_MAX_VALUES = 20_000
_DECIMAL = re.compile(r"0|-?[1-9][0-9]{0,18}", re.ASCII)
_LIKE_CPUS = re.compile(r"\^?\d+(-\d+)?|\^?isolated", re.ASCII)


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
    """Plain data (dict, list, str, int, bool, None) and the line on which each path begins."""

    data: Any
    lines: Mapping[Path, int]

    def line(self, path: Path) -> int:
        """Return the line of ``path``, or of its nearest ancestor that has one."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def problem(self, path: Path, message: str, hint: str = "", *, warning: bool = False) -> Problem:
        """Return a problem at ``path``."""
        return Problem(self.line(path), dotted(path), message, hint, warning)


def dotted(path: Path) -> str:
    """Return ``classes.realtime.vcpu``, ``guests[0].class``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


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
        node = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = " ".join(str(part) for part in (error.context, error.problem) if part)
        return None, [Problem(line, "", f"not YAML: {what or 'unreadable'}", "check indentation, brackets and quotes")]
    except (YAMLError, ValueError, OverflowError, TypeError, IndexError, AttributeError, KeyError) as fault:
        # ruamel raises these on some malformed tags, directives and characters, without a mark.
        return None, [Problem(1, "", f"not YAML: {str(fault).splitlines()[0] if str(fault) else type(fault).__name__}")]
    except RecursionError:
        return None, [Problem(1, "", "not a policy: nested too deeply")]
    if node is None:
        return None, [Problem(1, "", "the file is empty", "a policy needs at least 'version: 1'")]
    builder = _Builder()
    data = builder.build(node, (), 0)
    document = Document(data, builder.lines)
    errors = list(_validator().iter_errors(data))
    problems = builder.problems + [problem for error in errors for problem in _explain(document, error)]
    if not isinstance(data, dict):
        return None, problems
    for error in errors:
        _take_out(data, error)
    return document, problems


class _Builder:
    """Turns YAML nodes into plain data, and notes lines and what plain data would hide (duplicate keys, tags)."""

    def __init__(self) -> None:
        self.lines: dict[Path, int] = {}
        self.problems: list[Problem] = []
        self.values = 0

    def build(self, node: Node, path: Path, depth: int) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        self.values += 1
        if depth > _MAX_DEPTH or self.values > _MAX_VALUES:  # also what ends an alias that holds itself
            if not any(problem.message.startswith("nested too") for problem in self.problems):
                self.add(path[:2], "nested too deeply, or repeated by aliases too often")
            return None
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
            key = str(key_node.value)
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
        text = str(node.value)
        tag = str(node.tag or "")
        if node.style is None and tag.endswith(":null"):
            return None
        if node.style is None and tag.endswith(":bool"):
            return text.lower() == "true"
        # Only plain decimals are numbers: 0x3, 010 and 1_0 mean different things to different readers.
        if node.style is None and tag.endswith(":int") and _DECIMAL.fullmatch(text):
            return int(text)
        if tag.startswith("!") or ":" not in tag:
            self.add(path, f"the YAML tag {tag} has no meaning here", "leave the tag out")
        return text

    def add(self, path: Path, message: str, hint: str = "") -> None:
        line = next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), 1)
        self.problems.append(Problem(line, dotted(path), message, hint))


@lru_cache(maxsize=1)
def _validator() -> Draft202012Validator:
    return Draft202012Validator(schemas.load("policy"))


def _take_out(data: dict[str, Any], error: ValidationError) -> None:
    """Remove the value that a schema error is about: the unknown keys of a mapping, else the value itself."""
    path: list[str | int] = list(error.absolute_path)
    schema: Any = error.schema
    instance: Any = error.instance
    if error.validator == "additionalProperties":
        for key in set(instance) - set(schema.get("properties", ())):
            del instance[key]
        return
    if "propertyNames" in error.absolute_schema_path:
        path.append(str(instance))
    if not path:
        return
    parent: Any = data
    for part in path[:-1]:
        parent = parent[int(part)] if isinstance(parent, list) else parent.get(part, {})
    if isinstance(parent, list):
        parent[int(path[-1])] = None  # keeps the numbers of the other items
    elif isinstance(parent, dict):
        parent.pop(path[-1], None)


def _explain(document: Document, error: ValidationError) -> Iterator[Problem]:
    """Say one schema error in words that name the place and the cure."""
    path: Path = tuple(error.absolute_path)
    schema: Any = error.schema
    if "propertyNames" in error.absolute_schema_path:
        path = (*path, str(error.instance))
    wanted: Any = error.validator_value
    value: Any = error.instance
    match error.validator:
        case "additionalProperties":
            known = sorted(schema.get("properties", ()))
            for key in value:
                if key not in known:
                    yield document.problem((*path, key), "unknown key", _key_hint(key, known))
        case "required":
            for key in wanted:
                if key not in value:
                    hint = "add 'version: 1'" if key == "version" else ""
                    yield document.problem(path, f"the key '{key}' is missing", hint)
        case "enum" | "const":
            choices = [wanted] if error.validator == "const" else list(wanted)
            close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], 1)
            listed = " or ".join(_show(choice) for choice in choices)
            hint = f"did you mean {close[0]}?" if close and str(value) != close[0] else ""
            yield document.problem(path, f"{_show(value)} is not {listed}", hint)
        case "type":
            yield document.problem(path, f"{_show(value)} is not {_types(wanted)}", _type_hint(path, value))
        case "minimum" | "maximum":
            low, high = schema.get("minimum"), schema.get("maximum")
            span = f"from {low} to {high}" if high is not None else f"{low} or more"
            yield document.problem(path, f"{_show(value)} is out of range", f"a number {span}")
        case "pattern":
            yield document.problem(path, *_pattern(path, value, wanted))
        case _:
            yield document.problem(path, error.message.replace("\n", " ")[:200])


def _pattern(path: Path, value: Any, pattern: str) -> tuple[str, str]:
    if path[-1:] == ("period",):
        return f"{_show(value)} is not a time", "a number with ms, s or m, such as 10s"
    if path[-1:] == ("uri",):
        return f"{_show(value)} is not libvirt's system connection", "only qemu:///system has the cgroups rtpind needs"
    if _LIKE_CPUS.fullmatch(str(value)):
        return f"{_show(value)} is not a name", 'a CPU list with commas inside {} must be quoted: "2-7,^4"'
    return f"{_show(value)} is not a name", f"a name matches {pattern}"


def _key_hint(key: str, known: list[str]) -> str:
    if _LIKE_CPUS.fullmatch(key):
        return 'a CPU list with commas inside {} must be quoted: "2-7,^4"'
    close = difflib.get_close_matches(key, known, 1)
    return f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"


def _type_hint(path: Path, value: Any) -> str:
    if value is None:
        return "give it a value, or leave the key out"
    if path[-1:] == ("unsafe",):
        return "write true or false"
    return ""


_TYPE_NAMES = {
    "object": "a mapping", "array": "a list", "string": "a text", "integer": "a whole number",
    "boolean": "true or false",
}  # fmt: skip


def _types(wanted: str | list[str]) -> str:
    names = [wanted] if isinstance(wanted, str) else wanted
    return " or ".join(_TYPE_NAMES.get(name, name) for name in names)


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
