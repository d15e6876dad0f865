"""The shipped schemas: valid, closed, explained, and with the words that the code has."""

import json
from importlib import resources

import jsonschema
import pytest

from rtpind import schemas
from rtpind.core.decision import State
from rtpind.core.model import Role, Sched, Scheduling
from rtpind.core.plan import Phase, Reason
from rtpind.core.verdict import Verdict

NAMES = ["status", "plan", "guest-shape", "capacity", "capacity-running", "explain", "verify", "check-config", "hands"]


def parts(schema, path=()):
    """Yield every subschema with its path."""
    yield path, schema
    for key in ("properties", "$defs"):
        for name, part in schema.get(key, {}).items():
            yield from parts(part, (*path, name))
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from parts(schema[key], (*path, key))
    for part in schema.get("anyOf", ()):
        yield from parts(part, (*path, "anyOf"))


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_one(name):
    """It says which dialect it is in, and is valid there."""
    schema = schemas.load(name)

    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"]
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_of_version_1(name):
    """Each document says its version first of all."""
    schema = schemas.load(name)

    assert "version" in schema["required"]
    assert schema["properties"]["version"]["const"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_nothing_unsaid_may_be_in_a_document(name):
    """Every object is closed and needs all its keys; a map says what its values are."""
    for path, part in parts(schemas.load(name)):
        if part.get("type") != "object":
            continue
        if isinstance(part.get("additionalProperties"), dict):
            assert "properties" not in part, path
        else:
            assert part["additionalProperties"] is False, path
            assert sorted(part["required"]) == sorted(part["properties"]), path


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_explained(name):
    """What is a property has a sentence about it, itself or where it points to."""
    schema = schemas.load(name)
    for path, part in parts(schema):
        for key, value in part.get("properties", {}).items():
            target = schema["$defs"][value["$ref"].rpartition("/")[2]] if "$ref" in value else value
            assert target.get("description", "").endswith("."), (*path, key)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("definition", "words"), [("role", Role), ("verdict", Verdict), ("state", State), ("reason", Reason)]
)
def test_the_words_are_those_of_the_code(name, definition, words):
    """Role, verdict, state and reason have exactly the values that there are."""
    found = schemas.load(name).get("$defs", {}).get(definition)

    assert found is None or found["enum"] == [str(word) for word in words]


def test_the_phases_are_those_of_the_code():
    """A step of a plan has a phase that there is."""
    steps = schemas.load("plan")["properties"]["steps"]["items"]["properties"]

    assert steps["phase"]["enum"] == [int(phase) for phase in Phase]


@pytest.mark.parametrize("sched", list(Sched))
def test_every_scheduling_can_be_said(sched):
    """Whatever a thread has, its text is one that the schema knows."""
    thread = schemas.load("status")["$defs"]["thread"]["properties"]["scheduling"]
    text = str(Scheduling(sched, 99 if sched in (Sched.FIFO, Sched.RR) else 0))

    jsonschema.Draft202012Validator(thread).validate(text)


def test_no_schema_is_forgotten():
    """What ships is what these tests know, and the policy's."""
    found = {entry.name for entry in resources.files(schemas).iterdir() if entry.name.endswith(".json")}

    assert found == {f"{name}.json" for name in (*NAMES, "policy")}
    assert all(json.loads(resources.files(schemas).joinpath(name).read_text()) for name in found)
