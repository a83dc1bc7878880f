"""Gives the reader of weights in models/efficientnet_lite0.py files that do harm, or none that is a file of weights.

    hostile_weights.py WORK

What a pickle names is not called, and a tensor reaches no numbers but its own.
"""

import pickle
import sys
from pathlib import Path

import numpy as np

from check import check

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

import efficientnet_lite0 as exporter  # noqa: E402


class Harm:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def weights(offset: int, shape: tuple, strides: tuple, numbers: int) -> bytes:
    """A file of one tensor `w`, in the pickle's own operations: its storage holds 0, 1, 2 and so on."""
    text = lambda value: b"X" + len(value).to_bytes(4, "little") + value.encode()  # noqa: E731
    whole = lambda value: b"J" + value.to_bytes(4, "little", signed=True)  # noqa: E731
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + whole(numbers) + b"NtQ"
    sides = b"".join(b"(" + b"".join(map(whole, values)) + b"t" for values in (shape, strides))
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + whole(offset) + sides + b"\x89NtR"
    tensors = b"\x80\x02}" + text("w") + tensor + b"s."
    values = np.arange(numbers, dtype="<f4").tobytes()
    return HEAD + tensors + pickle.dumps(["0"], 2) + numbers.to_bytes(8, "little") + values


HEAD = b"".join(pickle.dumps(value, 2) for value in (exporter.MAGIC, exporter.PROTOCOL, {}))


def main(work: Path) -> str:
    file = work / "weights.pth"

    def read(content: bytes) -> dict | str:
        file.write_bytes(content)
        try:
            return exporter.read_weights(file)
        except (ValueError, EOFError, pickle.UnpicklingError) as error:
            return str(error)

    transposed = read(weights(2, (2, 3), (1, 2), 8))
    check(transposed["w"].tolist() == [[2, 4, 6], [3, 5, 7]], f"a view is {transposed}")
    touched = work / "touched"
    for hostile in (HEAD + pickle.dumps(Harm(touched)), pickle.dumps(Harm(touched))):
        refused = read(hostile)
        check("a file of weights has no" in refused, f"harm gave {refused}")
    check(not touched.exists(), "what a pickle named was called")
    for offset, shape, strides in [(3, (2, 3), (1, 2)), (0, (2, 3), (1, 4)), (-1, (1,), (1,)), (4, (2,), (-5,))]:
        refused = read(weights(offset, shape, strides, 8))
        check("reaches beyond" in refused, f"a tensor at {offset} of {shape} and {strides} gave {refused}")
    whole = weights(0, (8,), (1,), 8)
    for length in range(len(whole)):
        check(isinstance(read(whole[:length]), str), f"{length} of {len(whole)} bytes were read")
    return f"files of weights: 2 that do harm, 4 that reach too far, {len(whole)} that end too early"


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
