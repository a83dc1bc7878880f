"""Does a GPU give what the CPU gives, and how near is it to what ONNX Runtime alone can do there?

    gpu.py LOOKALIKE PACKAGE IMAGES WORK

LOOKALIKE is the program, PACKAGE an encoder, IMAGES an image table; what is written goes to WORK. The images are embedded twice, with
device cpu and cuda, and the vectors compared: a cosine below 0.9999 fails. Then inference alone is timed on random tensors: ours
(benches/inference.rs, from this program's memory to the GPU and back), and the floor, which is ONNX Runtime on tensors that stay on the
GPU, with the same settings.
"""

import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/python"))
from published import read_delta  # noqa: E402

BATCH, SECS, LEAST_COSINE = 64, 10, 0.9999

PIPELINE = """[pipeline]
name = "gpu"
[source]
table = {images}
[model]
package = {package}
[neighbors]
enabled = false
[anomaly]
enabled = false
[output]
table = {table}
"""


def embed(program: Path, device: str, package: Path, images: Path, work: Path) -> dict[str, np.ndarray]:
    table = work / device
    text = PIPELINE.format(**{key: json.dumps(str(value)) for key, value in {"images": images, "package": package, "table": table}.items()})
    pipeline = work / f"{device}.toml"
    pipeline.write_text(text)
    ran = subprocess.run([program, "run", pipeline, "--force", "--device", device], stdout=subprocess.PIPE, text=True)
    if ran.returncode != 0:
        sys.exit(ran.returncode)
    summary = json.loads(ran.stdout.splitlines()[-1])
    if summary["provider"] != device:
        sys.exit(f"failed: asked for {device}, and {summary['provider']} computed")
    print(f"{device}: {summary['rows_ok']} images in {summary['secs']['embed']:.1f} s, decoding included")
    rows = read_delta(table / "latents", columns=["image_id", "embedding"]).to_pylist()
    return {row["image_id"]: np.array(row["embedding"], np.float64) for row in rows if row["embedding"] is not None}


def floor(package: Path) -> float:
    """Images a second of ONNX Runtime alone, on tensors that stay on the GPU."""
    onnxruntime.preload_dlls()
    contract = tomllib.loads((package / "model.toml").read_text())
    settings = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
    network = package / contract["graph"]["main"]
    session = onnxruntime.InferenceSession(network, providers=[("CUDAExecutionProvider", settings)])
    if "CUDAExecutionProvider" not in session.get_providers():
        sys.exit("failed: ONNX Runtime has no CUDA here")
    channels = 3 if contract["input"]["color"] == "rgb" else 1
    shape = (BATCH, channels, contract["input"]["height"], contract["input"]["width"])
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input(contract["input"]["tensor"], onnxruntime.OrtValue.ortvalue_from_numpy(values, "cuda", 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda")
    for _ in range(3):
        session.run_with_iobinding(binding)
    count, started = 0, time.monotonic()
    while time.monotonic() - started < SECS:
        session.run_with_iobinding(binding)
        count += BATCH
    binding.synchronize_outputs()
    return count / (time.monotonic() - started)


def ours(package: Path) -> float:
    command = ["cargo", "bench", "--locked", "--bench", "inference", "--", package, "cuda", str(BATCH), "2", str(SECS)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def main(program: Path, package: Path, images: Path, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    cpu, cuda = (embed(program, device, package, images, work) for device in ("cpu", "cuda"))
    if cpu.keys() != cuda.keys():
        sys.exit(f"failed: {len(cpu.keys() ^ cuda.keys())} images were read on one device alone")
    cosines = [cpu[key] @ cuda[key] / np.linalg.norm(cpu[key]) / np.linalg.norm(cuda[key]) for key in cpu]
    print(f"cosine between cpu and cuda: least {min(cosines):.7f} of {len(cosines)}")
    if min(cosines) < LEAST_COSINE:
        sys.exit(f"failed: the least cosine is below {LEAST_COSINE}")
    pairs = [(floor(package), ours(package)) for _ in range(3)]
    for alone, with_copies in pairs:
        print(f"inference: {with_copies:.0f} images/s, ONNX Runtime alone {alone:.0f}, {with_copies / alone:.1%} of the floor")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
