"""Writes the table of pipelines/features/breast_cancer.toml: 569 tumors, each as 30 numbers that were measured on its cell nuclei.

    python breast_cancer_table.py FOLDER

Needs scikit-learn, which has the data (W. N. Street, W. H. Wolberg and O. L. Mangasarian, "Nuclear feature extraction for breast
tumor diagnosis", 1993; UCI Machine Learning Repository, CC BY 4.0), and pyarrow. Benign tumors are split: half are for a model to learn
from, a quarter for the reference, and the last quarter, `rest`, is new to both, as all malignant ones are.
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_breast_cancer


def main(folder: Path) -> None:
    data = load_breast_cancer()
    diagnoses = [str(data.target_names[target]) for target in data.target]
    splits, num_benign = [], 0
    for diagnosis in diagnoses:
        if diagnosis == "benign":
            splits.append(("fit", "calibrate", "fit", "rest")[num_benign % 4])
            num_benign += 1
        else:
            splits.append("rest")
    features = pa.FixedSizeListArray.from_arrays(pa.array(data.data.ravel()), data.data.shape[1])
    table = pa.table({"tumor": range(len(diagnoses)), "features": features, "diagnosis": diagnoses, "split": splits})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "tumors.parquet")
    print(f"{len(diagnoses)} tumors of {data.data.shape[1]} features in {folder / 'tumors.parquet'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
