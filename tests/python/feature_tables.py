"""Writes the digits of scikit-learn, 8 x 8 numbers each, in every type that a column of features can have.

    feature_tables.py FOLDER

Every table has the ids `digit0000` and so on, the label `digit`, and the column `features`. `odd` has one row of each kind that
cannot be used beside one that can.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import write_deltalake
from sklearn.datasets import load_digits

NUM_DIGITS = 240


def fixed(values: pa.Array, *sizes: int) -> pa.Array:
    """Lists of fixed sizes, the innermost first."""
    for size in sizes:
        values = pa.FixedSizeListArray.from_arrays(values, size)
    return values


def main(folder: Path) -> None:
    data = load_digits()
    numbers = data.images[:NUM_DIGITS].astype(np.int64)
    flat = pa.array(numbers.ravel())
    nested = lambda type_: pa.array(numbers.tolist(), pa.list_(pa.list_(type_)))
    rows = lambda type_: pa.array(numbers.reshape(NUM_DIGITS, -1).tolist(), type_)
    columns = {
        "nested_int64": nested(pa.int64()),
        "nested_double": nested(pa.float64()),
        "nested_large": pa.array(numbers.tolist(), pa.large_list(pa.large_list(pa.float32()))),
        "fixed_nested_float": fixed(flat.cast(pa.float32()), 8, 8),
        "fixed_float": fixed(flat.cast(pa.float32()), 64),
        "fixed_half": fixed(pa.array(numbers.ravel().astype(np.float16)), 64),
        "list_float": rows(pa.list_(pa.float32())),
        "list_double": rows(pa.list_(pa.float64())),
        "list_int8": rows(pa.list_(pa.int8())),
        "large_list_uint16": rows(pa.large_list(pa.uint16())),
        "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(numbers.astype(np.float32))),
    }
    ids = [f"digit{row:04}" for row in range(NUM_DIGITS)]
    labels = data.target[:NUM_DIGITS]
    for name, column in columns.items():
        (folder / name).mkdir(parents=True)
        table = pa.table({"image_id": ids, "digit": labels, "features": column})
        pq.write_table(table, folder / name / "digits.parquet", row_group_size=100)
    for name, source in (("delta_list", "list_double"), ("delta_nested", "nested_int64")):
        table = pa.table({"image_id": ids, "digit": labels, "features": columns[source]})
        write_deltalake(folder / name, table)
        # A second file, without the column: its rows have no features.
        write_deltalake(folder / name, pa.table({"image_id": ["none"], "digit": [0]}), mode="append", schema_mode="merge")

    good = numbers[0].tolist()
    odd = {
        "good": good,
        "null": None,
        "null_list": good[:7] + [None],
        "null_value": good[:7] + [[1, 2, 3, None, 5, 6, 7, 8]],
        "short": good[:7],
        "long": good + good[:1],
        "other_shape": [sum(good[:4], []), sum(good[4:], [])],
        "ragged": good[:7] + [[1.0]],
        "empty": [],
        "nan": good[:7] + [[0.0, 0.0, float("nan"), 0.0, 0.0, 0.0, 0.0, 0.0]],
        "infinite": good[:7] + [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, float("-inf")]],
        "too_large": good[:7] + [[1e300, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]],
    }
    features = pa.array(odd.values(), pa.list_(pa.list_(pa.float64())))
    (folder / "odd").mkdir()
    pq.write_table(pa.table({"image_id": list(odd), "features": features}), folder / "odd" / "x.parquet")
    (folder / "twice").mkdir()
    rows_twice = pa.table({"image_id": ["x", "c", "b"], "features": columns["list_float"].take(pa.array([5, 0, 0]))})
    pq.write_table(rows_twice, folder / "twice" / "x.parquet")
    # Files that do not hold the same kind of thing.
    (folder / "mixed").mkdir()
    pq.write_table(pa.table({"image_id": ["a"], "features": columns["list_float"][:1]}), folder / "mixed" / "a.parquet")
    pq.write_table(pa.table({"image_id": ["b"], "features": pa.array([b"image"])}), folder / "mixed" / "b.parquet")
    print(" ".join([*columns, "delta_list", "delta_nested"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
