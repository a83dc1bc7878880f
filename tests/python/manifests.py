"""Checks what of pipelines/ is for Kubernetes: the manifests, the pods of the DAG of Airflow, and what becomes of exit codes.

    manifests.py AIRFLOW_HOME

Manifests are checked against the schemas of Kubernetes' API, with no key that these do not know. The DAG is parsed as Airflow does it; its pods are
those that its operators would ask a cluster for.
"""

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIPELINES = Path(__file__).parents[2] / "pipelines"
HOME = Path(sys.argv[1])
os.environ |= {"AIRFLOW_HOME": str(HOME), "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "AIRFLOW__CORE__DAGS_FOLDER": str(PIPELINES / "airflow")}
os.environ |= {"KUBECONFIG": str(HOME / "kubeconfig"), "AIRFLOW_CONN_KUBERNETES_DEFAULT": '{"conn_type": "kubernetes"}'}
sys.path.insert(0, str(PIPELINES / "airflow"))

import kubernetes_validate  # noqa: E402
import lookalike_daily_kubernetes as kubernetes  # noqa: E402
import lookalike_graph as graph  # noqa: E402
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator  # noqa: E402
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException  # noqa: E402
from kubernetes.client import ApiClient  # noqa: E402
from kubernetes.client import models as k8s  # noqa: E402

from check import check  # noqa: E402
from kubectl import VERSION, action, validated  # noqa: E402

KUBECONFIG = """apiVersion: v1
kind: Config
current-context: test
clusters: [{{name: test, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
contexts: [{{name: test, context: {{cluster: test, user: test}}}}]
users: [{{name: test, user: {{}}}}]
"""

# The verdict on each exit code of the program, and on those of a container that was killed.
TRIED_AGAIN, FAILS_AT_ONCE = [5, 130, 137, 143], [1, 2, 3, 4, 6, 126, 127]


def check_manifests() -> int:
    folder = PIPELINES / "kubernetes"
    values = {"TASKS": "7", "ARGUMENTS": '["embed", "--task-count", "7"]', "GPUS": "1", "CPU": "4", "MEMORY": "8Gi"}
    step = (folder / "step.yaml").read_text()
    for name in ("NAME", "RUN", "STEP", "TASKS", "ARGUMENTS", "IMAGE", "SERVICE_ACCOUNT", "CPU", "MEMORY", "GPUS"):
        step = step.replace(f"${{{name}}}", values.get(name, name.lower()))
    [job] = validated(step)
    [cronjob] = validated((folder / "cronjob.yaml").read_text())
    for spec in (job["spec"], cronjob["spec"]["jobTemplate"]["spec"]):
        for code in FAILS_AT_ONCE + TRIED_AGAIN:
            wanted = "FailJob" if code in FAILS_AT_ONCE else "Count"
            check(action(spec, code) == wanted, f"exit code {code} is not {wanted}")
    job["spec"]["surprise"] = 1
    try:
        kubernetes_validate.validate(job, VERSION, strict=True)
    except kubernetes_validate.ValidationError:
        return 2
    sys.exit("failed: a manifest with an unknown key is valid")


def unmapped(task: Any) -> KubernetesPodOperator:
    """An operator as Airflow makes it of a mapped one, for one of its tasks."""
    if not task.is_mapped:
        return task
    shares = ["--plan", "s3://lake/plans/1/", "--task-index", "0", "--task-count", "3"]
    return task.unmap({"arguments": [task.task_id, *shares]})


def check_pods() -> int:
    tasks = [task for task in kubernetes.dag.tasks if not task.task_id.endswith("_tasks")]
    for task in tasks:
        operator = unmapped(task)
        pod = ApiClient().sanitize_for_serialization(operator.build_pod_request_obj())
        # What Airflow fills in itself when it knows the cluster.
        kubernetes_validate.validate(pod | {"apiVersion": "v1", "kind": "Pod"}, VERSION, strict=True)
        [container] = [container for container in pod["spec"]["containers"] if container["name"] == "base"]
        is_embed = task.task_id == "embed"
        check(("nvidia.com/gpu" in container["resources"]["limits"]) == is_embed, f"{task.task_id}: {container['resources']}")
        has_summary = task.task_id.startswith(("plan", "commit"))
        check(("airflow-xcom-sidecar" in json.dumps(pod)) == has_summary, f"{task.task_id}: {pod}")
        check(container["command"][0] == ("sh" if has_summary else "lookalike"), f"{task.task_id}: {container}")
    return len(tasks)


class Cluster(BaseHTTPRequestHandler):
    """A cluster with one pod, which has ended; nothing else is asked of it here."""

    pod: dict[str, Any]

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        is_pod = self.path.split("?")[0].endswith("/pods/pod")
        body = json.dumps(self.pod if is_pod else {"apiVersion": "v1", "kind": "EventList", "items": []}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PATCH = do_DELETE = answer

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def verdict(code: int | None) -> str:
    """What Airflow does after a pod whose container ended so, or which was evicted before there was a code."""
    state = k8s.V1ContainerState(terminated=None if code is None else k8s.V1ContainerStateTerminated(exit_code=code))
    container = k8s.V1ContainerStatus(name="base", state=state, image="", image_id="", ready=False, restart_count=0)
    pod = k8s.V1Pod(
        metadata=k8s.V1ObjectMeta(name="pod", namespace="lookalike", labels={}),
        spec=k8s.V1PodSpec(containers=[k8s.V1Container(name="base")]),
        status=k8s.V1PodStatus(phase="Succeeded" if code == 0 else "Failed", container_statuses=[container]),
    )
    Cluster.pod = ApiClient().sanitize_for_serialization(pod)
    try:
        unmapped(kubernetes.dag.get_task("embed")).cleanup(pod, pod)
    except AirflowSkipException:
        return "skipped"
    except AirflowFailException as error:
        check(f"exit code {code}" in str(error), str(error))
        return "fails at once"
    except AirflowException:
        return "tried again"
    return "goes on"


def check_exit_codes() -> None:
    expected = {0: "goes on", 99: "skipped", None: "tried again"}
    expected |= dict.fromkeys(TRIED_AGAIN, "tried again") | dict.fromkeys(FAILS_AT_ONCE, "fails at once")
    for code, wanted in expected.items():
        check(verdict(code) == wanted, f"after exit code {code} a pod is {verdict(code)}, not {wanted}")
    for code in FAILS_AT_ONCE + TRIED_AGAIN + [-9, -15]:
        is_final = isinstance(graph.failure(code), AirflowFailException)
        check(is_final == (code in FAILS_AT_ONCE), f"exit code {code} on a worker: {graph.failure(code)!r}")


def check_shares() -> None:
    """What is mapped over: as many tasks of a step as have work, at most `max_tasks`."""
    plan, said = {"plan": "s3://plans/1/"}, {"tasks": {"probe": 9, "join": 3, "merge": 0}}
    command = ["neighbors", "--step", "probe"]
    for most, step, count in [(4, "probe", 4), (4, "join", 3), (4, "merge", 0), (5000, "probe", 9)]:
        shares = graph.share_out.function(step, command, plan, said, {"max_tasks": most})
        of = [[*command, "--plan", "s3://plans/1/", "--task-index", str(index), "--task-count", str(count)] for index in range(count)]
        check(shares == of, f"{step} of at most {most}: {shares}")


def main() -> None:
    HOME.mkdir(exist_ok=True)
    cluster = ThreadingHTTPServer(("127.0.0.1", 0), Cluster)
    threading.Thread(target=cluster.serve_forever, daemon=True).start()
    (HOME / "kubeconfig").write_text(KUBECONFIG.format(port=cluster.server_port))
    manifests, pods = check_manifests(), check_pods()
    check_exit_codes()
    check_shares()
    print(f"{manifests} manifests and {pods} pods are valid")


if __name__ == "__main__":
    main()
