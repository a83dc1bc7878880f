"""Proves that a metrics file is what its readers take it for, and prints its samples.

    metrics.py FILE

Read by the parsers of OpenMetrics and of the Prometheus text format, as prometheus-client has them; what node-exporter refuses
beyond that is checked here. Prints one JSON object: sample name with its labels, without the pipeline, to value.
"""

import json
import sys
from pathlib import Path

from check import check
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_prometheus

text = Path(sys.argv[1]).read_text()
openmetrics = list(read_openmetrics(text))
prometheus = list(read_prometheus(text))

check(bool(openmetrics), "the file has metrics")
for family in openmetrics:
    # The formats disagree on other types, and node-exporter refuses a file with a type it does not know.
    check(family.type == "gauge", f"{family.name} is a {family.type}")
    check(bool(family.documentation), f"{family.name} is explained")
    check(family.name.startswith("lookalike_"), family.name)
    # Endings that belong to parts of counters, summaries and histograms.
    check(not family.name.endswith(("_total", "_sum", "_count", "_bucket", "_created")), family.name)
    check(family.unit == "" or family.name.endswith(f"_{family.unit}"), f"{family.name} has the unit {family.unit}")
    check(family.name.endswith("_seconds") == (family.unit == "seconds"), f"{family.name} names its unit")
    for sample in family.samples:
        # node-exporter refuses files whose samples have times.
        check(sample.timestamp is None, f"{sample} has no time of its own")
        check(set(sample.labels) <= {"pipeline", "status", "stage", "version"}, f"labels of {sample}")


def samples(families) -> dict[str, float]:
    found = {}
    for family in families:
        for sample in family.samples:
            labels = [f"{name}={value}" for name, value in sorted(sample.labels.items()) if name != "pipeline"]
            found[" ".join([sample.name, *labels])] = sample.value
    return found


check(samples(openmetrics) == samples(prometheus), "both parsers read the same")
check(
    {family.name: (family.type, family.documentation) for family in openmetrics}
    == {family.name: (family.type, family.documentation) for family in prometheus},
    "both parsers see the same metrics",
)
pipelines = {sample.labels.get("pipeline") for family in openmetrics for sample in family.samples}
check(len(pipelines) == 1, f"all samples are of one pipeline, not {pipelines}")
print(json.dumps({"pipeline": pipelines.pop(), **samples(openmetrics)}))
