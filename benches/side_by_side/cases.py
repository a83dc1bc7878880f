"""The cases: what is compared with what."""

import itertools
import re
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import beside_faiss
import data
import store
import yardsticks
from ours import EMBED_ONLY, FAST_DECODE, WORK, Pipeline, Program, vectors
from runs import Failed, Report, execute

# Of the vectors of one image from two programs, as in models/parity.py: JPEG decoders round colors at half the resolution differently
# here and there. What is prepared in another way differs by far more.
LEAST_MEDIAN_COSINE, LEAST_COSINE = 0.999, 0.998

# Of the Python side: the fastest of 16 to 512.
CELLS_BATCH_SIZE = 128

# Of `floor`: how often each cell is in the larger table, which takes as long as that of the photographs.
CELL_COPIES = 4

# The slow store of `latency`.
LATENCY_SECS, BYTES_PER_SEC = 0.05, 100e6

# Pairs at most of what takes minutes.
LONG_PAIRS = 2

# Of `memory`: how many times as many images the large table has, and runs of the small one in each pair, which takes seconds.
TILES, SMALL_RUNS = 100, 5

# Of `scale_fit_flag`: images to fit to, rows to flag, and how large the smaller table of each is.
FIT_IMAGES, FLAG_ROWS, SMALLER = 100_000, 10_000_000, 0.1
FIT_LATENTS, FEATURE_DIM = 128, 16
LARGEST_DIFFERENCE_EXPLAINED = 0.005

NUM_FILES = 10_000
HELP_RUNS = 20

# Of `report`.
REPORTED_IMAGES = 10_000, 200_000


@dataclass
class Settings:
    program: Program
    repeats: int
    count: int  # photographs
    scale: float  # of the sizes below, to try things out


def warm(*folders: Path) -> None:
    """Reads all files, so that they come from memory for everybody."""
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file():
                file.read_bytes()


def agree(report: Report, what: str, a: dict[str, np.ndarray], b: dict[str, np.ndarray], *, must: bool = True) -> None:
    """Tells how near the vectors of the same images are, and fails where they must be the same and are not."""
    if a.keys() != b.keys():
        raise Failed(f"{what}: {len(a.keys() ^ b.keys())} images are on one side alone")
    pairs = [(a[key].astype(np.float64), b[key].astype(np.float64)) for key in a]
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs]
    least, median = float(np.min(cosines)), float(np.median(cosines))
    report.figure(f"cosine of {what}, least", least)
    report.figure(f"cosine of {what}, median", median)
    if must and (least < LEAST_COSINE or median < LEAST_MEDIAN_COSINE):
        raise Failed(f"{what} are not the same: the cosine is {least:.6f} at least, and {median:.6f} in the median")


def photograph_table(count: int) -> tuple[Path, list[Path]]:
    folder = data.photographs(count) / "table"
    warm(folder.parent, data.ENCODER)
    return folder, sorted(folder.iterdir())


def photographs(settings: Settings, report: Report) -> None:
    count = settings.count
    report.case("photographs", f"{count} JPEG of 512 x 512 in Parquet -> 224 x 224 -> EfficientNet-Lite0 -> Parquet")
    table, files = photograph_table(count)
    exact = Pipeline("photographs", table, data.ENCODER, count)
    fast = Pipeline("photographs-fast", table, data.ENCODER, count, {**EMBED_ONLY, **FAST_DECODE})
    # fastdup finds neighbors and groups too, so it is compared with a run that does.
    groups = {"neighbors": {"k": 5, "duplicate_distance": 0.04}, "anomaly": {"enabled": False}}
    with_groups = Pipeline("photographs-groups", table, data.ENCODER, count, groups)
    ours = settings.program.embed("lookalike", exact)
    ours_fast = settings.program.embed("lookalike, decode = fast", fast)
    ours_groups = settings.program.whole("lookalike with neighbors", with_groups)
    loop, threads, draft = (yardsticks.python(variant, data.ENCODER, files, count) for variant in yardsticks.VARIANTS)
    fastdup = yardsticks.fastdup(data.ENCODER / "encoder.onnx", 1280, table.parent / "jpeg", count)
    report.warm_up(ours, ours_fast, ours_groups, loop, threads, draft, fastdup)
    found = exact.vectors("embedding")
    agree(report, "vectors of lookalike and Python", found, vectors([yardsticks.python_out("loop")], "embedding"))
    agree(report, "vectors of decode = exact and fast", found, fast.vectors("embedding"), must=False)
    agree(report, "vectors of Python without and with draft mode", *draft_vectors(), must=False)
    report.pairs(ours, loop, settings.repeats)
    report.pairs(ours, threads, settings.repeats)
    report.pairs(ours, draft, settings.repeats, wanted=1.3)
    report.pairs(ours_fast, draft, settings.repeats)
    report.pairs(ours_groups, fastdup, settings.repeats, wanted=1.35)


def draft_vectors() -> tuple[dict, dict]:
    loop, draft = (vectors([yardsticks.python_out(variant)], "embedding") for variant in ("loop", "draft"))
    return loop, draft


def cell_table(folder: Path = data.CELLS) -> tuple[Path, list[Path], int]:
    warm(folder)
    files = sorted(folder.rglob("*.parquet"))
    return folder, files, sum(pq.ParquetFile(file).metadata.num_rows for file in files)


def cells(settings: Settings, report: Report) -> None:
    table, files, count = cell_table()
    package = data.vae()
    report.case("cells", f"{count} PNG of 300 x 300 in Parquet -> 64 x 64 gray -> convolutional VAE -> vectors and scores in Parquet")
    pipeline = Pipeline("cells", table, package, count)
    ours, theirs = settings.program.embed("lookalike", pipeline), yardsticks.python("threads", package, files, count, CELLS_BATCH_SIZE)
    report.warm_up(ours, theirs)
    for ours_name, theirs_name in (("embedding", "mu"), ("logvar", "logvar")):
        their_vectors = vectors([yardsticks.python_out("threads")], theirs_name)
        agree(report, f"{theirs_name} of lookalike and Python", pipeline.vectors(ours_name), their_vectors)
    same_scores(report, pipeline.vectors("mean_squared_error"), vectors([yardsticks.python_out("threads")], "mean_squared_error"))
    report.pairs(ours, theirs, settings.repeats, wanted=2.0)


def same_scores(report: Report, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    off = max(abs(float(a[key]) - float(b[key])) / float(b[key]) for key in b)
    report.figure("mean_squared_error of lookalike and Python, relative difference at most", off)
    if off > 0.01:
        raise Failed(f"the scores differ by {off:.1%}")


def one_layer(settings: Settings, report: Report) -> None:
    count, package = settings.count, data.one_layer()
    report.case("one_layer", f"the {count} photographs through a network of one layer: decoding is all there is")
    table, files = photograph_table(count)
    pipeline = Pipeline("one-layer", table, package, count)
    ours = settings.program.embed("lookalike", pipeline)
    fast = replace(pipeline, name="one-layer-fast", tables={**EMBED_ONLY, **FAST_DECODE})
    ours_fast = settings.program.embed("lookalike, decode = fast", fast)
    loop, threads, draft = (yardsticks.python(variant, package, files, count) for variant in yardsticks.VARIANTS)
    report.warm_up(ours, ours_fast, loop, threads, draft)
    agree(report, "vectors of lookalike and Python", pipeline.vectors("embedding"), vectors([yardsticks.python_out("loop")], "embedding"))
    report.pairs(ours, loop, settings.repeats, wanted=3.0)
    report.pairs(ours_fast, loop, settings.repeats, wanted=3.0)
    report.pairs(ours, threads, settings.repeats)
    report.pairs(ours_fast, draft, settings.repeats)


def floor(settings: Settings, report: Report) -> None:
    photographs, _ = photograph_table(settings.count)
    cells, _, num_cells = cell_table()
    many, _, num_many = cell_table(data.many_cells(CELL_COPIES))
    report.case("floor", "decoding alone and inference alone, added up, beside the embed stage that does both")
    of_photographs = Pipeline("photographs", photographs, data.ENCODER, settings.count)
    fast = replace(of_photographs, name="photographs, decode = fast", tables={**EMBED_ONLY, **FAST_DECODE})
    of_cells = Pipeline("cells", cells, data.vae(), num_cells)
    # All cells take two seconds, of which the start and the end of the stage are a part; in the larger table they are none to speak of.
    of_many = Pipeline(f"cells, each {CELL_COPIES} times", many, data.vae(), num_many)
    for pipeline in (of_photographs, fast, of_cells, of_many):
        name, pipeline = pipeline.name, replace(pipeline, name=f"floor-{re.sub('[^a-z0-9]+', '-', pipeline.name)}")
        ours, alone = settings.program.embed(f"lookalike, {name}", pipeline), settings.program.floor(pipeline)
        alone.name += f", {name}"
        report.warm_up(ours, alone)
        report.between(ours, alone, settings.repeats, wanted=0.95)


def memory(settings: Settings, report: Report) -> None:
    count, package = settings.count, data.one_layer()
    num_tiles = max(2, round(TILES * settings.scale))
    report.case("memory", f"{count} photographs, and the same {num_tiles} times under other ids, in SeaweedFS, through a network of one layer")
    _, (table,) = photograph_table(count)
    with store.seaweedfs() as seaweedfs, tempfile.TemporaryDirectory(dir=data.BENCH) as folder:
        for number in range(num_tiles):
            file = Path(folder) / "tile.parquet"
            data.tiled(table, number, file)
            seaweedfs.upload(file, f"large/part{number:04}.parquet")
            if number == 0:
                seaweedfs.upload(file, "small/part0000.parquet")
        small = Pipeline("memory-small", f"{seaweedfs.url}/small", package, count, env=seaweedfs.env)
        large = Pipeline("memory-large", f"{seaweedfs.url}/large", package, count * num_tiles, env=seaweedfs.env)
        sides = [settings.program.embed(f"lookalike, {pipeline.num_images} images", pipeline) for pipeline in (small, large)]
        report.warm_up(sides[0])
        pairs = [
            ([report.run(sides[0]) for _ in range(SMALL_RUNS)], report.run(sides[1])) for _ in range(min(settings.repeats, LONG_PAIRS))
        ]
    report.tell(sides[0], [run for runs, _ in pairs for run in runs])
    report.tell(sides[1], [run for _, run in pairs])
    of_small = lambda value: [statistics.median(map(value, runs)) for runs, _ in pairs]  # noqa: E731
    peaks, rates = of_small(lambda run: run.peak_bytes), of_small(lambda run: run.rate)
    report.result("memory, large / small", [run.peak_bytes / peak for (_, run), peak in zip(pairs, peaks, strict=True)], at_most=1.1)
    report.result("images a second, large / small", [run.rate / rate for (_, run), rate in zip(pairs, rates, strict=True)], at_least=0.95)


def latency(settings: Settings, report: Report) -> None:
    count = settings.count
    network = f"{LATENCY_SECS * 1000:.0f} ms a request and {BYTES_PER_SEC / 1e6:.0f} MB/s"
    report.case("latency", f"the {count} photographs through EfficientNet-Lite0, from a store with {network}, and from disk")
    folder, (table,) = photograph_table(count)
    local = Pipeline("latency-local", folder, data.ENCODER, count)
    with store.seaweedfs() as seaweedfs, store.slow_network(seaweedfs, LATENCY_SECS, BYTES_PER_SEC) as slow:
        seaweedfs.upload(table, "images/photographs.parquet")
        source = Pipeline("latency-source", f"{slow.url}/images", data.ENCODER, count, env=slow.env)
        outputs = (f"{slow.url}/out{number}" for number in itertools.count())
        both = replace(source, name="latency-both", outputs=outputs)
        from_disk = settings.program.embed("from disk", local)
        from_store = settings.program.embed("from the store", source)
        within_store = settings.program.embed("from the store, and into it", both)
        report.warm_up(from_disk, from_store, within_store)
        report.pairs(from_store, from_disk, settings.repeats, wanted=0.9)
        report.pairs(within_store, from_disk, settings.repeats, wanted=0.9)


def stages(settings: Settings, report: Report) -> None:
    photographs, _ = photograph_table(settings.count)
    cells, _, num_cells = cell_table()
    report.case("stages", "what neighbors, flags and commits add to the embed stage")
    for name, source, package, count in (
        ("photographs", photographs, data.ENCODER, settings.count),
        ("cells", cells, data.vae(), num_cells),
    ):
        side = settings.program.whole(f"lookalike, {name}", Pipeline(f"stages-{name}", source, package, count, {}))
        report.warm_up(side)
        runs = [report.run(side) for _ in range(settings.repeats)]
        report.tell(side, runs)
        for stage in runs[0].more["stage_secs"]:
            report.result(f"seconds of {stage}, {name}", [run.more["stage_secs"][stage] for run in runs])
        embed = [run.more["stage_secs"]["embed"] for run in runs]
        added = [sum(run.more["stage_secs"].values()) / secs - 1 for run, secs in zip(runs, embed, strict=True)]
        report.result(f"added to embed by the other stages, {name}", added, at_most=0.15)
        added = [run.wall_secs / secs - 1 for run, secs in zip(runs, embed, strict=True)]
        report.result(f"added to embed by all else of the process, {name}", added, at_most=0.15)


def startup(settings: Settings, report: Report) -> None:
    report.case("startup", f"seconds until there is an answer: --help, and plan over a table of {NUM_FILES} files")
    many_files = data.many_files(NUM_FILES)
    warm(many_files)
    pipeline = Pipeline("startup", many_files, data.one_layer(), NUM_FILES)

    def help_() -> dict:
        return execute([settings.program.file, "--help"])[1]

    def plan() -> dict:
        found, taken = settings.program.call("plan", pipeline, "--json")
        num_rows = sum(partition["rows_to_embed"] for partition in found["partitions"])
        if num_rows != NUM_FILES:
            raise Failed(f"plan found {num_rows} of {NUM_FILES} images")
        return taken

    for name, ask, repeats, at_most in (("--help", help_, HELP_RUNS, 0.02), ("plan", plan, settings.repeats, 2.0)):
        ask()
        report.result(f"seconds of {name}", [ask()["wall_secs"] for _ in range(repeats)], at_most=at_most)


def report_page(settings: Settings, report: Report) -> None:
    sizes = [max(1000, round(size * settings.scale)) for size in REPORTED_IMAGES]
    report.case("report", "the page about a run over pieces of the solar cells of 64 x 64, with pictures from the source")
    for num_images in sizes:
        table = data.small_cells(num_images)
        pipeline = Pipeline(
            f"report-{num_images}", table, WORK / f"report-{num_images}-package", num_images, {"neighbors": {"k": 5, "duplicate_distance": 0.0001}}
        )
        settings.program.fit("fit", pipeline, "--color", "gray", "--latent-dim", str(FIT_LATENTS)).run()
        settings.program.whole("run", pipeline).run()
        page = pipeline.folder / f"reports/{pipeline.name}.html"
        within_run = page.stat().st_size
        taken = [settings.program.report(pipeline)["wall_secs"] for _ in range(settings.repeats)]
        report.result(f"seconds of report, {num_images} images", taken, at_most=10)
        report.result(f"megabytes of the page, {num_images} images", [within_run / 1e6, page.stat().st_size / 1e6], at_most=5)


def neighbors(settings: Settings, report: Report) -> None:
    beside_faiss.neighbors(report, min(settings.repeats, LONG_PAIRS))


def scale_fit_flag(settings: Settings, report: Report) -> None:
    sizes = lambda size: [max(1000, round(size * settings.scale * share)) for share in (SMALLER, 1)]  # noqa: E731
    report.case("scale_fit_flag", "fit of a PCA of 64 x 64 pixels, and flags of rows by all rules, with growing tables")
    fits = []
    for num_images in sizes(FIT_IMAGES):
        table = data.small_cells(num_images)
        warm(table)
        pipeline = Pipeline(f"fit-{num_images}", table, WORK / f"fit-{num_images}-package", num_images)
        fits.append(settings.program.fit(f"fit to {num_images} images", pipeline, "--color", "gray", "--latent-dim", str(FIT_LATENTS)))
    theirs = yardsticks.python_pca(64, FIT_LATENTS, sorted(table.iterdir()), num_images)
    _, ours_found, theirs_found = (run.more for run in report.warm_up(*fits, theirs))
    explained = [found["explained_variance"] for found in (ours_found, theirs_found)]
    report.figure("variance explained by lookalike and by scikit-learn", explained)
    if abs(explained[0] - explained[1]) > LARGEST_DIFFERENCE_EXPLAINED:
        raise Failed("the models explain different shares of the variance")
    repeats = min(settings.repeats, LONG_PAIRS)
    report.pairs(fits[1], theirs, repeats)
    report.pairs(fits[1], fits[0], repeats)

    flags = []
    for num_rows in sizes(FLAG_ROWS):
        table = data.features(num_rows, FEATURE_DIM)
        tables = {"neighbors": {"enabled": False}}
        pipeline = Pipeline(f"flag-{num_rows}", table, WORK / f"flag-{num_rows}-package", num_rows, tables, image="features")
        for side in (
            settings.program.fit("fit", pipeline, "--latent-dim", str(FEATURE_DIM // 2)),
            settings.program.embed("embed", pipeline),
        ):
            report.figure(f"seconds to {side.name} {num_rows} rows", side.run().wall_secs)
        flags.append(settings.program.flag(f"flag {num_rows} rows", pipeline))
    report.warm_up(*flags)
    report.pairs(flags[1], flags[0], repeats)
