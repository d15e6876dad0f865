# SPDX-License-Identifier: GPL-2.0-or-later
"""Text of a policy file → plain data with line numbers, checked against the schema; or problems, all at once.

First half of reading a policy; :mod:`rtpind.core.policyfile` gives the data its meaning.
"""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from ruamel.yaml import YAML
from ruamel.yaml.composer import ComposerError
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from rtpind import schemas
from rtpind.core.document import Document, Path, Problem, dotted, show
from rtpind.core.schemafaults import explain, independent, take_out

#: A policy is a page or two; more is not one, and would only cost time.
MAX_CHARS = 256 * 1024
_MAX_DEPTH = 20
_MAX_VALUES = 20_000
_DECIMAL = re.compile(r"0|-?[1-9][0-9]{0,18}", re.ASCII)
#: What YAML gives a value by its look, or spells out as one of these; any other tag was put there to mean something.
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq", "timestamp",
                                                  "merge", "value")}  # fmt: skip


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
    except RecursionError:
        return None, [Problem(1, "", "not a policy: nested too deeply")]
    except Exception as fault:  # ruamel raises many kinds on malformed tags, directives, characters and comments
        return None, [Problem(1, "", f"not YAML: {str(fault).splitlines()[0] if str(fault) else type(fault).__name__}")]
    if node is None or (isinstance(node, ScalarNode) and node.value.lower() in ("", "~", "null")):
        return None, [Problem(1, "", "the file is empty", "a policy needs at least 'version: 1'")]
    builder = _Builder()
    data = builder.build(node, (), 0)
    if builder.too_much:
        return None, builder.problems
    errors = independent(_validator().iter_errors(data))
    places = Document(data, builder.lines)
    problems = builder.problems + [problem for error in errors for problem in explain(places, error)]
    if not isinstance(data, dict):
        return None, problems
    refused = builder.refused.union(*(take_out(data, error) for error in errors))
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
        self.add(path, f"{show(text)} has a line break or a character that cannot be seen", "write it on one line")
        return "".join(character for character in text if character.isprintable())

    def add(self, path: Path, message: str, hint: str = "") -> None:
        line = next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), 1)
        self.problems.append(Problem(line, dotted(path), message, hint))


@lru_cache(maxsize=1)
def _validator() -> Draft202012Validator:
    return Draft202012Validator(schemas.load("policy"))
