"""A lookalike pipeline day by day, each task in a pod of its own. Copy this file and lookalike_graph.py to your DAGs, and put your own places below.

The image has the program, ONNX Runtime and a shell, for instance:

    FROM python:3.13-slim
    RUN pip install onnxruntime
    COPY lookalike /usr/local/bin/

For GPUs it has `onnxruntime-gpu[cuda,cudnn]` in its place, and the pipeline file says `device = "cuda"`. That file is in a config map
(`kubectl create configmap lookalike-pipeline --from-file pipeline.toml=cells.toml`), and the credentials of the store are in a secret, as environment
variables, or come with the service account. How often and which days: see lookalike_daily.py. Wants Airflow 3.3 or later and apache-airflow-providers-cncf-kubernetes.
"""

from datetime import timedelta
from typing import Any

import pendulum
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk.exceptions import AirflowException, AirflowSkipException
from kubernetes.client import models as k8s
from lookalike_graph import NOTHING_TO_DO, announce, failure, lookalike_dag

IMAGE = "registry.example.com/lookalike:0.1.0"
NAMESPACE = "lookalike"
SERVICE_ACCOUNT = "lookalike"
SECRET = "lookalike-credentials"
PIPELINE = "/etc/lookalike/pipeline.toml"
PLANS = "s3://lake/plans/cells"
TABLES = "s3://lake/lookalike"
TIMEZONE = "UTC"  # whose days the partitions are
RETRY_DELAY = timedelta(minutes=1)
CPU = k8s.V1ResourceRequirements(requests={"cpu": "2", "memory": "6Gi"}, limits={"memory": "6Gi"})
EMBED = {
    "container_resources": k8s.V1ResourceRequirements(
        requests={"cpu": "4", "memory": "8Gi"}, limits={"memory": "8Gi", "nvidia.com/gpu": "1"}
    ),
    "tolerations": [k8s.V1Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")],
}

# Airflow reads a file of the pod once the container has ended: what the program printed last.
LAST_LINE = 'lookalike "$@" > /tmp/stdout; code=$?; tail -n 1 /tmp/stdout | tee /airflow/xcom/return.json; exit $code'


class LookalikePodOperator(KubernetesPodOperator):
    """Runs the program in a pod."""

    def __init__(self, *, arguments: list[str], do_xcom_push: bool = True, **kwargs: Any) -> None:
        # A task without a summary is the container's only process, so that signals reach it.
        cmds = ["sh", "-c", LAST_LINE, "lookalike"] if do_xcom_push else ["lookalike"]
        super().__init__(
            cmds=cmds, arguments=arguments, do_xcom_push=do_xcom_push, skip_on_exit_code=NOTHING_TO_DO, deferrable=False, **kwargs
        )

    def execute(self, context: dict[str, Any]) -> dict[str, Any] | None:
        summary = super().execute(context)
        return announce(summary, context) if self.do_xcom_push else None

    def cleanup(self, pod: k8s.V1Pod, remote_pod: k8s.V1Pod, *args: Any, **kwargs: Any) -> None:
        try:
            super().cleanup(pod, remote_pod, *args, **kwargs)
        except AirflowSkipException:
            raise
        except AirflowException as error:
            # There is none of a pod that was evicted, or whose node is gone, and it is not about this error where it is 0.
            codes = [
                container.state.terminated.exit_code
                for container in remote_pod.status.container_statuses or []
                if container.name == self.base_container_name and container.state.terminated
            ]
            if not any(codes):
                raise
            raise failure(codes[0]) from error


dag = lookalike_dag(
    "lookalike_daily_kubernetes",
    LookalikePodOperator,
    pipeline=PIPELINE,
    plans=PLANS,
    tables=TABLES,
    start_date=pendulum.datetime(2026, 11, 1, tz=TIMEZONE),
    retry_delay=RETRY_DELAY,
    settings={
        "image": IMAGE,
        "namespace": NAMESPACE,
        "service_account_name": SERVICE_ACCOUNT,
        "env_from": [k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name=SECRET, optional=True))],
        "container_resources": CPU,
        "volumes": [k8s.V1Volume(name="pipeline", config_map=k8s.V1ConfigMapVolumeSource(name="lookalike-pipeline", optional=False))],
        "volume_mounts": [k8s.V1VolumeMount(name="pipeline", mount_path="/etc/lookalike", read_only=True)],
        "on_finish_action": "delete_succeeded_pod",
    },
    settings_of={"embed": EMBED},
    doc_md=__doc__,
)
