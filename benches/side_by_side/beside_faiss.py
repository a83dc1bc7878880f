"""Neighbor search beside FAISS: the same vectors, the same two threads, in turn A B A B.

Vectors are made by benches/neighbors.rs, of length 1 and clustered, k = 10; it runs by `cargo bench`.

`exact` is the join of all rows with each other, beside FAISS's flat index searched for all rows. `ivf` is everything that it
takes to have recall@10 >= 0.99 for all rows: training, adding (assigning), choosing nprobe, searching. FAISS is not charged
for choosing: it is told the smallest nprobe that reaches the recall, measured on 1,000 queries beforehand, for each number
of cells, and trains on 64 rows a cell but at least 100,000, which is faster than its default and no worse. Its best
total counts.
"""

import json
import subprocess
import tempfile
import time

import faiss
import numpy as np

from runs import ROOT, Failed, Report

K = 10
RECALL = 0.99
NUM_THREADS = 2
SAMPLE_QUERIES = 1000
# The search, rows and values of a vector.
SEARCHES = [("exact", 100_000, 128), ("exact", 50_000, 512), ("ivf", 200_000, 128), ("ivf", 1_000_000, 128)]
PROGRAM = ["cargo", "bench", "--quiet", "--locked", "--bench", "neighbors", "--"]


def bench(*arguments: object) -> str:
    """What neighbors.rs prints."""
    command = [*PROGRAM, *map(str, arguments), "--threads", str(NUM_THREADS)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    if ran.returncode != 0:
        raise Failed(f"{' '.join(command)} failed:\n{ran.stderr}")
    return ran.stdout


class Clock:
    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict:
        return {"total_secs": time.perf_counter() - self.wall, "cpu_secs": time.process_time() - self.cpu}


def flat(x: np.ndarray) -> dict:
    clock = Clock()
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x)
    index.search(x, K + 1)
    return clock.read()


def trained(x: np.ndarray, num_cells: int) -> faiss.IndexIVF:
    index = faiss.index_factory(x.shape[1], f"IVF{num_cells},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(x[: max(100_000, 64 * num_cells)])
    index.add(x)
    return index


def fewest_probes(x: np.ndarray, index: faiss.IndexIVF) -> tuple[int, float]:
    """The smallest nprobe that reaches the recall, and the recall."""
    queries = x[:SAMPLE_QUERIES]
    exact = faiss.IndexFlatIP(x.shape[1])
    exact.add(x)
    truth = without_self(exact.search(queries, K + 1)[1])
    for nprobe in range(1, index.nlist + 1):
        index.nprobe = nprobe
        found = without_self(index.search(queries, K + 1)[1])
        recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(found, truth)])
        if recall >= RECALL:
            return nprobe, recall
    raise Failed("no nprobe of FAISS reaches the recall")


def without_self(lists: np.ndarray) -> list[list[int]]:
    return [[row for row in found if row != query][:K] for query, found in enumerate(lists)]


def ivf(x: np.ndarray, num_cells: int, nprobe: int) -> dict:
    clock = Clock()
    index = trained(x, num_cells)
    index.nprobe = nprobe
    index.search(x, K + 1)
    return clock.read()


def tell(name: str, run: dict) -> None:
    phases = " ".join(f"{key[:-5]} {run[key]:.1f}" for key in run if key.endswith("_secs") and key not in ("total_secs", "cpu_secs"))
    found = f"{run['cells']} cells, nprobe {run['nprobe']}, recall {run['recall']:.4f}, " if "nprobe" in run else ""
    print(f"  {name:<22} {run['total_secs']:7.2f} s, processor {run['cpu_secs']:7.2f} s  {found}{phases}".rstrip(), flush=True)


def neighbors(report: Report, repeats: int) -> None:
    report.case("neighbors", f"neighbor search beside FAISS, k {K}, {NUM_THREADS} threads")
    faiss.omp_set_num_threads(NUM_THREADS)
    for search, num_rows, dim in SEARCHES:
        with tempfile.NamedTemporaryFile(suffix=".f32") as file:
            bench("data", num_rows, dim, file.name)
            compare(report, repeats, search, file.name, np.fromfile(file.name, np.float32).reshape(num_rows, dim))


def compare(report: Report, repeats: int, search: str, file: str, x: np.ndarray) -> None:
    num_rows, dim = x.shape
    print(f"  {search}, {num_rows} x {dim}", flush=True)
    theirs = {"FAISS flat": lambda: flat(x)}
    if search == "ivf":
        theirs = {}
        for num_cells in (1024, 4096) if num_rows >= 500_000 else (1024,):
            nprobe, recall = fewest_probes(x, trained(x, num_cells))
            name = f"FAISS IVF{num_cells} nprobe {nprobe}"
            print(f"  {name}: recall {recall:.4f}", flush=True)
            theirs[name] = lambda num_cells=num_cells, nprobe=nprobe: ivf(x, num_cells, nprobe)
    ratios: dict[str, list[float]] = {name: [] for name in theirs}
    for _ in range(repeats):
        for name, run in theirs.items():
            us = json.loads(bench(search, file, dim, K, "cosine" if search == "exact" else RECALL))
            them = run()
            for who, taken in (("lookalike", us), (name, them)):
                report.keep(f"{who}, {search} {num_rows} x {dim}", taken)
                tell(who, taken)
            ratios[name].append(them["total_secs"] / us["total_secs"])
    for name, of in ratios.items():
        report.result(f"lookalike / {name}, {search} {num_rows} x {dim}", of)
