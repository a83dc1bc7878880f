"""Runs as tasks, of tables that grow, beside what the scale model says of them.

    python benches/scale.py [--program FILE] [--model FILE] [--rows N ...] [--tasks N] [--json FILE]

Makes feature vectors around centers (normal around normal centers), puts them into SeaweedFS, and runs plan, tasks and commits over them:
eight tasks a step, as many at a time as there are cores, of one thread each. For every step it tells the time, the largest resident
set of a task, and what it moved between the steps: as the tasks count it, and requests as the
server counts them. With the first two sizes the model (`cargo bench --bench scale`) is calibrated; it tells how far it is off for all of
them, and what it says of sizes that are not run. All figures go to FILE.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benches/side_by_side"))
import store  # noqa: E402
from data import BENCH  # noqa: E402
from runs import execute  # noqa: E402

DIM, CENTERS, PARTITIONS, LATENT_DIM, K, UNIT_ROWS = 64, 256, 4, 32, 10, 8192
SEED = 7

PIPELINE = """\
[pipeline]
name = "scale"
[source]
table = "{lake}/features-{rows}"
id = "row"
image = "features"
[model]
package = "{lake}/model"
[execution]
unit_rows = {unit_rows}
memory_limit = "1GiB"
workers = 1
[neighbors]
k = {k}
search = "ivf"
[anomaly]
enabled = false
[report]
enabled = false
[output]
table = "{lake}/tables-{rows}"
"""

# Step, and the commit after it.
STEPS = [
    ("embed", ["embed"], "embed"),
    ("sort", ["neighbors", "--step", "sort"], "sort"),
    ("probe", ["neighbors", "--step", "probe"], None),
    ("join", ["neighbors", "--step", "join"], None),
    ("merge", ["neighbors", "--step", "merge"], "neighbors"),
]


def vectors(num_rows: int, dim: int = DIM) -> np.ndarray:
    random = np.random.default_rng(SEED)
    centers = random.standard_normal((CENTERS, dim), dtype=np.float32)
    # The same rows first, however many follow.
    rows = np.random.default_rng(SEED + 1)
    blocks = []
    for start in range(0, num_rows, 50_000):
        count = min(50_000, num_rows - start)
        which = rows.integers(CENTERS, size=50_000)[:count]
        blocks.append(centers[which] + 0.7 * rows.standard_normal((50_000, dim), dtype=np.float32)[:count])
    return np.concatenate(blocks)


def upload_features(lake: store.Store, num_rows: int, folder: Path) -> None:
    made = vectors(num_rows)
    for partition in range(PARTITIONS):
        mine = np.arange(partition, num_rows, PARTITIONS)
        features = pa.FixedSizeListArray.from_arrays(pa.array(made[mine].reshape(-1)), DIM)
        table = pa.table({"row": pa.array([f"row{row:09}" for row in mine]), "features": features})
        file = folder / "part.parquet"
        pq.write_table(table, file, row_group_size=8192, use_dictionary=False)
        lake.upload(file, f"features-{num_rows}/ds=2026-11-{partition + 1:02}/part.parquet")


class Runs:
    """The program, and what came of its tasks."""

    def __init__(self, program: Path, lake: store.Store, folder: Path, num_tasks: int) -> None:
        self.program, self.lake, self.folder, self.num_tasks = program, lake, folder, num_tasks
        onnxruntime = next((ROOT / ".cache/onnxruntime").glob("libonnxruntime.*"))
        self.env = {**lake.env, "RAYON_NUM_THREADS": "1", "ORT_DYLIB_PATH": str(onnxruntime)}

    def call(self, *args: str) -> tuple[dict, float, int]:
        """The summary, the seconds, and the largest resident set in bytes."""
        lines, taken = execute([self.program, *args], self.env)
        return json.loads(lines[-1]), taken["wall_secs"], taken["peak_bytes"]

    def step(self, command: list[str], plan: str) -> dict:
        def task(index: int) -> tuple[dict, float, int]:
            return self.call(*command, "--plan", plan, "--task-index", str(index), "--task-count", str(self.num_tasks))

        started = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(task, range(self.num_tasks)))
        moved = [summary.get("shuffle", {}) for summary, _, _ in done]
        keys = ("rows_written", "bytes_written", "rows_read", "bytes_read", "puts", "gets")
        return {
            "secs": time.monotonic() - started,
            "task_secs": [secs for _, secs, _ in done],
            "rows": sum(summary["rows"] for summary, _, _ in done),
            "resident_mib": max(resident for _, _, resident in done) / 2**20,
            "shuffle": {key: sum(part.get(key, 0) for part in moved) for key in keys},
        }


def requests(metrics_port: int) -> dict[str, int]:
    """Requests that the server has answered so far, those that read and those that write."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics").read().decode()
    counts = {"gets": 0, "puts": 0}
    for labels, value in re.findall(r"SeaweedFS_s3_request_total\{([^}]*)\} ([0-9.e+]+)", text):
        method = re.search(r'type="([^"]*)"', labels)
        kind = {"GET": "gets", "HEAD": "gets", "LIST": "gets"}.get(method[1] if method else "", "puts")
        counts[kind] += round(float(value))
    return counts


def run(runs: Runs, num_rows: int, metrics_port: int) -> dict:
    lake = runs.lake.url
    file = runs.folder / f"scale-{num_rows}.toml"
    file.write_text(PIPELINE.format(lake=lake, rows=num_rows, unit_rows=UNIT_ROWS, k=K))
    plan = f"{lake}/plans/{num_rows}"
    if not (runs.folder / "model-is-there").exists():
        runs.call("fit", str(file), "--latent-dim", str(LATENT_DIM))
        (runs.folder / "model-is-there").touch()
    planned, _, _ = runs.call("plan", str(file), "--plan", plan)
    found: dict = {"rows": num_rows, "units": planned["tasks"]["embed"], "steps": {}, "commits": {}}
    for name, command, commit in STEPS:
        before = requests(metrics_port)
        step = runs.step(command, plan)
        after = requests(metrics_port)
        step["server"] = {kind: after[kind] - before[kind] for kind in after}
        found["steps"][name] = step
        if commit:
            summary, secs, resident = runs.call("commit", "--plan", plan, "--stage", commit)
            found["commits"][commit] = {"secs": secs, "resident_mib": resident / 2**20, **summary.get("tasks", {})}
            if commit == "sort":
                found["rows_to_travel"] = summary["rows_to_travel"]
        print(f"  {name}: {step['secs']:.1f} s, {step['resident_mib']:.0f} MiB, {step['shuffle']}, server {step['server']}", flush=True)
    runs.call("flag", "--plan", plan)
    last, _, _ = runs.call("commit", "--plan", plan, "--stage", "flag")
    found["summary"] = last
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/lookalike", metavar="FILE", help="the program")
    parser.add_argument("--model", type=Path, metavar="FILE", help="the built bench `scale` (else: cargo builds it)")
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 300_000, 100_000, 1_000_000], metavar="N", help="sizes")
    parser.add_argument("--tasks", type=int, default=8, metavar="N", help="tasks of a step (default: 8)")
    parser.add_argument("--json", type=Path, default=BENCH / "scale.json", metavar="FILE", help="where the figures go")
    options = parser.parse_args()
    BENCH.mkdir(parents=True, exist_ok=True)
    metrics_port = store.free_ports(1)[0]
    measured = []
    with store.seaweedfs(f"-metricsPort={metrics_port}") as lake, tempfile.TemporaryDirectory(dir=BENCH) as folder:
        runs = Runs(options.program.resolve(), lake, Path(folder), options.tasks)
        for num_rows in options.rows:
            print(f"{num_rows} rows", flush=True)
            upload_features(lake, num_rows, Path(folder))
            measured.append(run(runs, num_rows, metrics_port))
            if num_rows == options.rows[min(1, len(options.rows) - 1)]:
                shutil.rmtree(BENCH / "scale", ignore_errors=True)
                download(lake, f"tables-{num_rows}/latents", BENCH / "scale")
    options.json.write_text(json.dumps({"dim": LATENT_DIM, "k": K, "unit_rows": UNIT_ROWS, "partitions": PARTITIONS, "runs": measured}, indent=1))
    sample = BENCH / "scale.f32"
    embeddings(BENCH / "scale").tofile(sample)
    model = [str(options.model)] if options.model else ["cargo", "bench", "--locked", "--bench", "scale", "--"]
    subprocess.run([*model, str(options.json), str(sample)], check=True, cwd=ROOT)


def download(lake: store.Store, prefix: str, to: Path) -> None:
    from pyarrow import fs

    fs.copy_files(f"{store.BUCKET}/{prefix}", str(to), source_filesystem=lake.client())


def embeddings(latents: Path) -> np.ndarray:
    files = sorted(file for file in latents.rglob("*.parquet") if "_delta_log" not in file.parts)
    # Sorted files hold the rows once more than the unsorted ones before them.
    newest = [file for file in files if re.search(r"-[0-9a-f]+r1-", file.name)] or files
    lists = pa.concat_tables([pq.read_table(file, columns=["embedding"]) for file in newest])["embedding"].combine_chunks()
    return lists.flatten().to_numpy().astype(np.float32)


if __name__ == "__main__":
    main()
