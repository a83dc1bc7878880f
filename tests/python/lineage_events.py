"""Reads events with the classes of OpenLineage's own client, strictly: every field must be one of the specification, of its type, and all
that are required must be there.

usage: lineage_events.py FILE    (one event a line; prints how many)
"""

import json
import sys
import typing
import uuid
from datetime import datetime
from enum import Enum

import attr
from openlineage.client import event_v2, facet_v2

MODULES = [module for module in vars(facet_v2).values() if getattr(module, "__name__", "").startswith("openlineage.client.")]
FACETS = {}
for module in MODULES:
    for kind in vars(module).values():
        if isinstance(kind, type) and attr.has(kind) and kind.__module__ == module.__name__ and hasattr(kind, "_get_schema"):
            FACETS[kind._get_schema()] = kind

# The member of an event's part in which facets of a kind stand.
BASES = {
    "run": facet_v2.RunFacet,
    "job": facet_v2.JobFacet,
    "dataset": facet_v2.DatasetFacet,
    "input": facet_v2.InputDatasetFacet,
    "output": facet_v2.OutputDatasetFacet,
}
# The keys by which the specification calls the facets.
KEYS = {
    "parent": "ParentRunFacet",
    "errorMessage": "ErrorMessageRunFacet",
    "nominalTime": "NominalTimeRunFacet",
    "processing_engine": "ProcessingEngineRunFacet",
    "jobType": "JobTypeJobFacet",
    "dataSource": "DatasourceDatasetFacet",
    "schema": "SchemaDatasetFacet",
    "version": "DatasetVersionDatasetFacet",
    "inputStatistics": "InputStatisticsInputDatasetFacet",
    "outputStatistics": "OutputStatisticsOutputDatasetFacet",
}


def read(kind, value, where):
    """A value of JSON as a type of the client."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is typing.Any:
        return value
    if origin is list:
        assert isinstance(value, list), where
        return [read(arguments[0], element, f"{where}[{index}]") for index, element in enumerate(value)]
    if origin is dict:
        raise AssertionError(f"{where} is not read here")
    if arguments:
        (kind,) = [argument for argument in arguments if argument is not type(None)]
        return read(kind, value, where)
    if attr.has(kind):
        return construct(kind, value, where)
    if issubclass(kind, Enum):
        return kind(value)
    assert type(value) is kind, f"{where}: {value!r} is no {kind}"
    return value


def construct(kind, value, where, own=()):
    """An object of JSON as a class of the client; `own` are members that are read elsewhere."""
    assert isinstance(value, dict), where
    hints = typing.get_type_hints(kind)
    known = {field.name for field in attr.fields(kind)}
    members = {name: member for name, member in value.items() if name not in own}
    assert members.keys() <= known, f"{where}: {members.keys() - known} is in no {kind.__name__}"
    # The client's objects set the schema by themselves; it is compared by whoever calls.
    own = ("_schemaURL", "schemaURL")
    given = {name: read(hints[name], member, f"{where}.{name}") for name, member in members.items() if name not in own}
    return kind(**{name.lstrip("_"): member for name, member in given.items()})


def facets(base, found, where):
    for key, value in found.items():
        kind = FACETS[value["_schemaURL"]]
        assert KEYS[key] == kind.__name__, f"{where}: {kind.__name__} as {key}"
        assert issubclass(kind, BASES[base]), f"{where}.{key} is no facet of a {base}"
        assert value["_producer"].startswith("urn:lookalike:"), value
        construct(kind, value, f"{where}.{key}")


def dataset(kind, value, role, where):
    construct(kind, value, where, own=("facets", f"{role}Facets"))
    facets("dataset", value["facets"], f"{where}.facets")
    facets(role, value.get(f"{role}Facets", {}), f"{where}.{role}Facets")


events = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
for event in events:
    assert event["schemaURL"] == event_v2.RunEvent._get_schema(), event["schemaURL"]
    construct(event_v2.Run, event["run"], "run", own=("facets",))
    facets("run", event["run"]["facets"], "run.facets")
    uuid.UUID(event["run"]["runId"])
    construct(event_v2.Job, event["job"], "job", own=("facets",))
    facets("job", event["job"]["facets"], "job.facets")
    for number, value in enumerate(event["inputs"]):
        dataset(event_v2.InputDataset, value, "input", f"inputs[{number}]")
    for number, value in enumerate(event["outputs"]):
        dataset(event_v2.OutputDataset, value, "output", f"outputs[{number}]")
    assert set(event) == {"eventType", "eventTime", "producer", "schemaURL", "run", "job", "inputs", "outputs"}, event.keys()
    event_v2.RunState(event["eventType"])
    assert datetime.fromisoformat(event["eventTime"]).tzinfo is not None, event["eventTime"]
print(len(events))
