"""Exports a small VAE, made of ONNX operators, with models/lookalike_export.py, and networks that it must refuse.

    exported.py OUT

OUT gets the package. Its preprocessing has what little else uses: not square, Lanczos, padded, channels last, normalized by channel.
"""

import io
import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from check import check

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

from lookalike_export import Preprocessing, export, golden_images  # noqa: E402

HEIGHT, WIDTH, LATENTS = 8, 12, 3
VALUES = HEIGHT * WIDTH * 3
PREPROCESSING = Preprocessing(HEIGHT, WIDTH, "rgb", "nhwc", "lanczos", "pad", mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.5])
ROLES = {"mu": "mean", "logvar": "spread", "reconstruction": "picture"}


def network(nodes: list, source: tuple[str, list], results: dict[str, list]) -> bytes:
    """An ONNX file of nodes, with random weights of fixed seed."""
    random = np.random.default_rng(7)
    weights = {
        "encode": random.normal(0, 0.05, (VALUES, LATENTS)),
        "spread_by": random.normal(0, 0.01, (VALUES, LATENTS)),
        "decode": random.normal(0, 0.3, (LATENTS, VALUES)),
    }
    used = {name for node in nodes for name in node.input}
    constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items() if name in used]
    if "shape" in used:
        constants.append(numpy_helper.from_array(np.array([-1, HEIGHT, WIDTH, 3]), "shape"))
    info = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)  # noqa: E731
    graph = helper.make_graph(nodes, "vae", [info(*source)], [info(*result) for result in results.items()], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def picture_of(z: str) -> list:
    return [helper.make_node("MatMul", [z, "decode"], ["flat"]), helper.make_node("Reshape", ["flat", "shape"], ["picture"])]


IMAGE = ("pixels", ["batch", HEIGHT, WIDTH, 3])
RESULTS = {"mean": ["batch", LATENTS], "spread": ["batch", LATENTS], "picture": ["batch", HEIGHT, WIDTH, 3]}
MU = [helper.make_node("Flatten", ["pixels"], ["values"], axis=1), helper.make_node("MatMul", ["values", "encode"], ["mean"])]
LOGVAR = [helper.make_node("MatMul", ["values", "spread_by"], ["spread"])]
VAE = network([*MU, *LOGVAR, *picture_of("mean")], IMAGE, RESULTS)
DECODER = network(picture_of("z"), ("z", ["batch", LATENTS]), {"picture": RESULTS["picture"]})

# Normalized over the batch, as a network in training mode is.
BATCH_MEAN = [
    helper.make_node("ReduceMean", ["values"], ["typical"], axes=[0]),
    helper.make_node("Sub", ["values", "typical"], ["centered"]),
]
IN_TRAINING = network([MU[0], *BATCH_MEAN, helper.make_node("MatMul", ["centered", "encode"], ["mean"])], IMAGE, {"mean": RESULTS["mean"]})
NEGATIVE = [helper.make_node("Exp", ["mean"], ["positive"]), helper.make_node("Neg", ["positive"], ["negative"])]
LOG_OF_NEGATIVE = [*MU, *NEGATIVE, helper.make_node("Log", ["negative"], ["spread"])]
NOT_A_NUMBER = network(LOG_OF_NEGATIVE, IMAGE, {"mean": RESULTS["mean"], "spread": RESULTS["spread"]})
CLOSED = network(MU, ("pixels", [1, HEIGHT, WIDTH, 3]), {"mean": [1, LATENTS]})


def main(out: Path) -> str:
    def refused(words: str, content: bytes = VAE, roles: dict | None = None, **more) -> None:
        refused.count += 1
        try:
            export(out, content, PREPROCESSING, ROLES if roles is None else roles, name="refused", **more)
        except ValueError as error:
            check(words in str(error), f"{words!r} is not in {error}")
        else:
            check(False, f"a package was written where {words!r} was expected")
        check(not out.exists(), "what is refused leaves something behind")

    refused.count = 0
    refused("depends on the other images of its batch", IN_TRAINING, {"mu": "mean"})
    refused("no finite numbers", NOT_A_NUMBER, {"mu": "mean", "logvar": "spread"})
    refused("open first axis", CLOSED, {"mu": "mean"})
    refused("has no output code; it has mean, spread, picture", roles={"mu": "code"})
    refused("to search by, or a `pred_score`", roles={"reconstruction": "picture"})
    refused("there is no role latent", roles={"latent": "mean"})
    refused("has shape (8, 12, 3), and must be one vector", roles={"embedding": "picture"})
    refused("has no 2 regions", roles={"embedding": "mean"}, regions=2)
    refused(
        "does not make the reconstruction",
        decoder=network(
            [
                *picture_of("z")[:1],
                helper.make_node("Neg", ["flat"], ["other"]),
                helper.make_node("Reshape", ["other", "shape"], ["picture"]),
            ],
            ("z", ["batch", LATENTS]),
            {"picture": RESULTS["picture"]},
        ),
    )
    refused(
        "is not in ONNX Runtime what the framework gives",
        roles={"mu": "mean"},
        reference=lambda tensors: {"mu": np.ones((len(tensors), 3))},
    )

    jpeg = io.BytesIO()
    Image.open(io.BytesIO(golden_images()[2])).save(jpeg, "JPEG")
    images = [*golden_images(), jpeg.getvalue()]
    likelihood = {"kind": "gaussian", "sigma": 0.5}
    sha256 = export(out, VAE, PREPROCESSING, ROLES, name="small-vae", decoder=DECODER, likelihood=likelihood, images=images)
    return f"refused {refused.count} networks and exported {sha256}"


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
