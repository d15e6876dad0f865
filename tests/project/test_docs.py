# SPDX-License-Identifier: GPL-2.0-or-later
"""The manual pages build and are complete; what the Markdown files point at is there."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from factories import host

from rtpind import EXIT_CONFIG
from rtpind.core.audit import Kind, Result
from rtpind.core.plan import Reason
from rtpind.core.policyfile import load
from rtpind.core.verdict import Verdict
from rtpind.ctl.main import parser as rtpinctl_parser
from rtpind.daemon.main import parser as rtpind_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs/man").glob("*.rst"))
DAEMON, POLICY, CONTROL = ((ROOT / f"docs/man/{name}.rst").read_text() for name in
                           ("rtpind.8", "rtpind.yaml.5", "rtpinctl.1"))  # fmt: skip
MARKDOWN = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})
SOURCES = [ROOT / name for name in ("rtpind/core/audit.py", "rtpind/core/notices.py")]


def has_term(page: str, term: str) -> bool:
    """Return whether a page defines a term: a line of its own, perhaps among others, above indented text."""
    return bool(re.search(rf"^ *(?:[\w-]+, )*{re.escape(term)}(?:,? [^\n]*)?\n +\S", page, re.MULTILINE))


def built(page: Path, tmp_path: Path) -> Path:
    """Build a manual page; any remark of docutils is an error."""
    made = tmp_path / page.stem
    command = [sys.executable, "-m", "docutils", "--writer=manpage", "--report=info", "--halt=info"]
    done = subprocess.run([*command, str(page), str(made)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_manual_page_builds(page: Path, tmp_path: Path) -> None:
    """The page passes docutils without a remark, and its head says what it is."""
    text = built(page, tmp_path).read_text()
    name, section = page.stem.rsplit(".", 1)
    assert re.search(rf'^\.TH "{re.escape(name)}" "?{section}"? ', text, re.MULTILINE | re.IGNORECASE)


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="no mandoc")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_mandoc_finds_nothing(page: Path, tmp_path: Path) -> None:
    """Nothing is warned of but a blank line that docutils puts after some headings."""
    done = subprocess.run(["mandoc", "-Tlint", "-Wwarning", str(built(page, tmp_path))], capture_output=True, text=True)
    remarks = [line for line in (done.stdout + done.stderr).splitlines() if "sp after SH" not in line]
    assert remarks == []


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_groff_finds_nothing(page: Path, tmp_path: Path) -> None:
    """What man(1) shows it with warns of nothing."""
    command = ["groff", "-man", "-Tutf8", "-Kutf8", "-ww", "-z", str(built(page, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def schema_keys(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key that the policy schema knows, at any depth, with its schema."""
    if isinstance(schema, dict):
        for name, inner in schema.get("properties", {}).items():
            yield name, inner
        for inner in schema.values():
            yield from schema_keys(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from schema_keys(inner)


@pytest.mark.parametrize(
    ("key", "schema"), list(schema_keys(json.loads((ROOT / "rtpind/schemas/policy.json").read_text())))
)
def test_rtpind_yaml_5_has_every_key(key: str, schema: dict[str, Any]) -> None:
    """Each key of the policy has its paragraph, and its choices and its default are there."""
    assert has_term(POLICY, key)
    paragraph = POLICY[POLICY.index(f"\n{key}\n") if f"\n{key}\n" in POLICY else 0 :]
    for choice in schema.get("enum", []):
        assert f"``{choice}``" in paragraph
    default = schema.get("default")
    if isinstance(default, str):
        assert default in paragraph


def test_the_example_of_rtpind_yaml_5_is_a_good_policy() -> None:
    """The first complete policy of the page has no problem and no warning."""
    found = re.search(r"::\n\n((?:    [^\n]*\n)*? +version: 1\n(?:    [^\n]*\n)+)", POLICY)
    assert found is not None
    policy, problems = load(textwrap.dedent(found[1]), host(), strict=True)
    assert problems == []
    assert policy is not None
    assert policy.rules


def options(parser: argparse.ArgumentParser) -> set[str]:
    """Return every option of a parser and of its commands."""
    found: set[str] = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found.update(*(options(command) for command in action.choices.values()))
    return found


def commands() -> set[str]:
    """Return the commands of rtpinctl."""
    actions = rtpinctl_parser()._actions
    return set(next(action for action in actions if isinstance(action, argparse._SubParsersAction)).choices)


@pytest.mark.parametrize(("page", "parser"), [(DAEMON, rtpind_parser), (CONTROL, rtpinctl_parser)])
def test_a_page_has_every_option_and_no_other(page: str, parser: Any) -> None:
    """The OPTIONS of the page are the options of the program."""
    section = re.split(r"\n[A-Z][A-Z ]+\n=+\n", page.partition("\nOPTIONS\n")[2].lstrip("=\n"))[0]
    assert all(has_term(section, option) for option in options(parser()))
    heads = "\n".join(line for line in section.splitlines() if line.startswith("-"))
    assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", heads)) == options(parser())


def test_rtpinctl_1_has_every_command() -> None:
    """Each command has its paragraph and its line in the synopsis."""
    for command in commands():
        assert has_term(CONTROL, command)
        assert f"| **rtpinctl** **{command}**" in CONTROL


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_rtpind_8_has_every_kind_of_record(kind: Kind) -> None:
    """Each kind has its paragraph, with its MESSAGE_ID."""
    assert has_term(DAEMON, f"{kind.name}, {kind.value}")


def test_rtpind_8_has_every_field_and_no_other() -> None:
    """The fields of the page are those that the sources send."""
    sent = {name for source in SOURCES for name in re.findall(r'"([A-Z][A-Z_]+)"', source.read_text())}
    sent |= {"LINE"}  # of the policy's problems, which the daemon reports itself
    assert {f"RTPIND_{name}" for name in sent} == set(re.findall(r"RTPIND_[A-Z_]+", DAEMON))


def test_rtpind_8_has_every_reason_and_result() -> None:
    """What RTPIND_REASON and RTPIND_RESULT can be is listed; two results never get a record."""
    results = set(Result) - {Result.VANISHED, Result.DEFERRED}
    assert {word for word in {*Reason, *results} if f"``{word}``" not in DAEMON} == set()


@pytest.mark.parametrize("verdict", Verdict)
def test_rtpinctl_1_has_every_verdict(verdict: Verdict) -> None:
    """Each verdict has its paragraph."""
    assert has_term(CONTROL.partition("\nVERDICTS\n")[2], verdict)


@pytest.mark.parametrize(("page", "codes"), [(DAEMON, (0, 1, 2, EXIT_CONFIG)), (CONTROL, (0, 1, 2, EXIT_CONFIG))])
def test_a_page_has_every_exit_code(page: str, codes: tuple[int, ...]) -> None:
    """Each exit code has its paragraph."""
    section = page.partition("\nEXIT STATUS\n")[2]
    assert all(has_term(section, str(code)) for code in codes)


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path: Path) -> None:
    """Each relative link of a Markdown file leads to a file."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_markdown_is_tidy(path: Path) -> None:
    """No tabs, no spaces at the end of a line, one line end at the end of the file."""
    text = path.read_text()
    assert "\t" not in text
    assert not re.search(r" +$", text, re.MULTILINE)
    assert text == text.strip("\n") + "\n"


def test_the_commands_of_the_readme_exist() -> None:
    """Each make target and each rtpinctl command that a Markdown file tells to run is there."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(path.read_text() for path in MARKDOWN)
    named = set(re.findall(r"(?:^ *|`)(?:\w+=\w+ )?make ([a-z-]+)", text, re.MULTILINE))
    assert {"demo", "test", "venv"} <= named <= targets
    told = set(re.findall(r"(?:^ *|`)(?:# )?rtpinctl ([a-z][a-z-]+)", text, re.MULTILINE))
    assert {"status", "plan"} <= told <= commands()
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"^# (rtpinctl \w+)$", readme, re.MULTILINE)[1] == "rtpinctl status"  # type: ignore[index]


def test_every_decision_is_listed() -> None:
    """The architecture page links each ADR, and each ADR has the same four parts."""
    architecture = (ROOT / "docs/architecture.md").read_text()
    for path in sorted((ROOT / "docs/adr").glob("*.md")):
        assert f"adr/{path.name}" in architecture
        parts = re.findall(r"^## (.+)$", path.read_text(), re.MULTILINE)
        assert parts == ["Context", "Decision", "Alternatives", "Consequences"]


def test_the_architecture_page_has_every_module() -> None:
    """Each module of core, host and daemon stands in the table."""
    architecture = (ROOT / "docs/architecture.md").read_text()
    for package in ("core", "host", "daemon"):
        for module in (ROOT / "rtpind" / package).glob("[a-z]*.py"):
            assert f"`{package}/{module.stem}`" in architecture
