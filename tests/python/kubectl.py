"""A stand-in for kubectl and a cluster behind it: what a Job manifest says is done by processes on this machine.

    kubectl.py create --filename -
    kubectl.py get job NAME --output JSONPATH
    kubectl.py get pods --selector job-name=NAME --field-selector status.phase=Succeeded --output name
    kubectl.py logs POD --tail N
    kubectl.py logs --selector job-name=NAME --tail N --prefix

`create` checks the manifest against the schema of Kubernetes' API, and comes back when the Job has ended. All that Kubernetes' documentation says of
Indexed Jobs is kept that the manifests of pipelines/kubernetes use: indexes, pod failure policies, tries of an index. The folder
KUBECTL_FOLDER holds the config maps, the secrets (files of lines NAME=VALUE) and what became of Jobs; the program is that of KUBECTL_PROGRAM.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

VERSION = "1.33"
FOLDER = Path(os.environ.get("KUBECTL_FOLDER", "."))


def validated(text: str) -> list[dict[str, Any]]:
    """The manifests of a file, each of which is valid to the last key."""
    # kubectl is asked often, but only here does it need these, which take a while.
    import kubernetes_validate
    import yaml

    manifests = list(yaml.safe_load_all(text))
    for manifest in manifests:
        kubernetes_validate.validate(manifest, VERSION, strict=True)
    return manifests


def environment(container: dict[str, Any]) -> dict[str, str]:
    """The variables of a container: those of an image, and what the manifest adds."""
    variables = {"PATH": os.environ["PATH"], "ORT_DYLIB_PATH": os.environ["ORT_DYLIB_PATH"]}
    for source in container["envFrom"]:
        secret = FOLDER / "secrets" / source["secretRef"]["name"]
        variables |= dict(line.split("=", 1) for line in secret.read_text().splitlines())
    return variables


def command(pod: dict[str, Any], container: dict[str, Any]) -> list[str]:
    """The command line, with the folders of config maps where they are here."""
    maps = {volume["name"]: volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume}
    mounts = {
        mount["mountPath"]: FOLDER / "configmaps" / maps[mount["name"]] for mount in container["volumeMounts"] if mount["name"] in maps
    }
    arguments = container["args"]
    for place, folder in mounts.items():
        arguments = [argument.replace(f"{place}/", f"{folder}/") for argument in arguments]
    assert container["command"] == ["lookalike"]
    return [os.environ["KUBECTL_PROGRAM"], *arguments]


def action(spec: dict[str, Any], code: int) -> str:
    """What the pod failure policy says of an exit code: the first rule that fits."""
    for rule in spec["podFailurePolicy"]["rules"]:
        on = rule.get("onExitCodes")
        if on and (code in on["values"]) == (on["operator"] == "In"):
            return rule["action"]
    return "Count"


def run_index(job: str, spec: dict[str, Any], index: int) -> str | None:
    """Runs the pods of an index until one succeeds; returns why the Job has failed."""
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    for attempt in range(1 + spec["backoffLimitPerIndex"]):
        name = f"{job}-{index}-{attempt}"
        with (FOLDER / "logs" / name).open("wb") as log:
            variables = environment(container) | {"JOB_COMPLETION_INDEX": str(index)}
            # Containers have one stream of lines, for both of a program's.
            code = subprocess.run(command(pod, container), env=variables, stdout=log, stderr=log).returncode
        code = 128 - code if code < 0 else code
        (FOLDER / "pods" / name).write_text("Succeeded" if code == 0 else "Failed")
        if code == 0:
            return None
        if action(spec, code) == "FailJob":
            return f"Container {container['name']} for pod default/{name} failed with exit code {code} matching FailJob rule at index 1"
    return "Job has exceeded the specified maximal number of failed indexes"


def create(manifest: dict[str, Any]) -> None:
    name, spec = manifest["metadata"]["name"], manifest["spec"]
    assert spec["completionMode"] == "Indexed" and spec["template"]["spec"]["restartPolicy"] == "Never"
    file = FOLDER / "jobs" / name
    if file.exists():
        sys.exit(f'Error from server (AlreadyExists): jobs.batch "{name}" already exists')
    file.touch()
    print(f"job.batch/{name} created")
    with ThreadPoolExecutor(spec["parallelism"]) as pods:
        failures = [failure for failure in pods.map(lambda index: run_index(name, spec, index), range(spec["completions"])) if failure]
    status = {"type": "Failed", "message": failures[0]} if failures else {"type": "Complete", "message": ""}
    file.write_text(json.dumps(status))


def pods(selector: str, phase: str | None = None) -> list[str]:
    job = selector.removeprefix("job-name=")
    found = sorted((FOLDER / "pods").glob(f"{job}-*"))
    return [pod.name for pod in found if phase in (None, pod.read_text())]


def option(arguments: list[str], name: str) -> str | None:
    return arguments[1 + arguments.index(name)] if name in arguments else None


def main(arguments: list[str]) -> None:
    for name in ("jobs", "pods", "logs"):
        (FOLDER / name).mkdir(exist_ok=True)
    selector, tail = option(arguments, "--selector"), int(option(arguments, "--tail") or 0)
    match arguments:
        case ["create", "--filename", "-"]:
            for manifest in validated(sys.stdin.read()):
                create(manifest)
        case ["get", "job", name, "--output", path]:
            status = json.loads((FOLDER / "jobs" / name).read_text())
            paths = {
                '{.status.conditions[?(@.status=="True")].type}': "type",
                '{.status.conditions[?(@.type=="Failed")].message}': "message",
            }
            print(status[paths[path.removeprefix("jsonpath=")]])
        case ["get", "pods", *_]:
            phase = option(arguments, "--field-selector")
            print("\n".join(f"pod/{name}" for name in pods(selector, phase.removeprefix("status.phase="))))
        case ["logs", *_]:
            names = pods(selector) if selector else [arguments[1].removeprefix("pod/")]
            for name in names:
                lines = (FOLDER / "logs" / name).read_text().splitlines()[-tail:]
                print("\n".join(f"[pod/{name}/lookalike] {line}" if "--prefix" in arguments else line for line in lines))
        case _:
            sys.exit(f"error: this stand-in does not know: {' '.join(arguments)}")


if __name__ == "__main__":
    main(sys.argv[1:])
