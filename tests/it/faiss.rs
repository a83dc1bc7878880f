use std::collections::BTreeMap;
use std::path::PathBuf;

use arrow::array::AsArray as _;
use arrow::datatypes::{Float32Type, Int32Type};
use lookalike::neighbors::exact::{Metric, self_join};
use lookalike::schema::{TableName, column};
use ndarray::Array2;

use crate::solar_cells::journey;
use crate::support::{Random, batches, cells, folder, lookalike, python, write};

const K: usize = 10;

const METRICS: [Metric; 2] = [Metric::Cosine, Metric::L2];

/// Lets FAISS search the same vectors; `lists` are the rows found for each and their distances.
fn compare(metric: Metric, vectors: &Array2<f32>, lists: &[Vec<(u32, f32)>]) {
    assert!(lists.iter().all(|list| list.len() == K));
    let folder = folder();
    let save = |name: &str, values: Vec<[u8; 4]>| -> PathBuf {
        let path = folder.path().join(name);
        #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
        std::fs::write(&path, values.as_flattened()).unwrap();
        path
    };
    let found = || lists.iter().flatten();
    python(
        "faiss_agrees.py",
        &[
            metric.name().as_ref(),
            vectors.ncols().to_string().as_ref(),
            K.to_string().as_ref(),
            &save("vectors", vectors.iter().map(|value| value.to_le_bytes()).collect()),
            &save("rows", found().map(|(row, _)| row.to_le_bytes()).collect()),
            &save("distances", found().map(|(_, distance)| distance.to_le_bytes()).collect()),
        ],
    );
}

fn compare_join(vectors: &Array2<f32>) {
    for metric in METRICS {
        let found = self_join(&vectors.view(), metric, K).unwrap();
        let lists: Vec<_> =
            found.iter().map(|list| list.iter().map(|near| (near.row, near.distance)).collect()).collect();
        compare(metric, vectors, &lists);
    }
}

fn random(num_rows: usize, dim: usize, seed: u64) -> Array2<f32> {
    let mut random = Random::new(seed);
    Array2::from_shape_simple_fn((num_rows, dim), || (random.fraction() * 2.0 - 1.0) as f32)
}

#[test]
fn neighbors_of_random_vectors_are_those_of_faiss() {
    compare_join(&random(6000, 96, 1));
}

#[test]
fn neighbors_of_clustered_vectors_are_those_of_faiss() {
    let (centers, noise) = (random(200, 64, 2), random(8000, 64, 3));
    compare_join(&Array2::from_shape_fn((8000, 64), |(row, column)| {
        centers[[row % 200, column]] + 0.1 * noise[[row, column]]
    }));
}

/// Pictures of cells, some of them twice in the table; the published neighbors, searched again by FAISS.
#[test]
fn published_neighbors_of_pictures_and_of_duplicates_are_those_of_faiss() {
    let folder = folder();
    for module in ["mono", "twin"] {
        let target = folder.path().join(format!("images/module={module}"));
        std::fs::create_dir_all(&target).unwrap();
        std::fs::copy(cells().join("module=mono/cells.parquet"), target.join("cells.parquet")).unwrap();
    }
    let model = journey().model("mono");
    for metric in METRICS {
        let pipeline = format!(
            "[pipeline]\nname = \"twins\"\n[source]\ntable = \"images\"\nwhere = \"module = 'mono' OR split = 'fit'\"\n\
             [model]\npackage = \"{}\"\n[neighbors]\nk = {K}\nmetric = \"{}\"\n[output]\ntable = \"tables\"\n",
            model.display(),
            metric.name(),
        );
        write(&folder.path().join("twins.toml"), &pipeline);
        lookalike(folder.path(), &["run", "twins.toml"]).expect(0);

        let tables = folder.path().join("tables");
        // The vectors by partition and id, in the order of which rows are numbered here.
        let mut vectors: BTreeMap<(String, String), Vec<f32>> = BTreeMap::new();
        for (partition, batch) in batches(&tables, TableName::Latents) {
            let ids = batch.column_by_name(column::IMAGE_ID).unwrap().as_string::<i32>();
            let embeddings = batch.column_by_name(column::EMBEDDING).unwrap().as_list::<i32>();
            for (id, embedding) in ids.iter().zip(embeddings.iter()) {
                let vector = embedding.unwrap().as_primitive::<Float32Type>().values().to_vec();
                vectors.insert((partition.clone(), id.unwrap().to_owned()), vector);
            }
        }
        let number: BTreeMap<_, u32> = vectors.keys().zip(0..).collect();
        let mut lists = vec![vec![(0, f32::NAN); K]; vectors.len()];
        for (partition, batch) in batches(&tables, TableName::Neighbors) {
            let text = |name| batch.column_by_name(name).unwrap().as_string::<i32>();
            let ranks = batch.column_by_name(column::RANK).unwrap().as_primitive::<Int32Type>();
            let distances = batch.column_by_name(column::DISTANCE).unwrap().as_primitive::<Float32Type>();
            for row in 0..batch.num_rows() {
                let of = |partition: &str, id: &str| number[&(partition.to_owned(), id.to_owned())];
                let query = of(&partition, text(column::IMAGE_ID).value(row));
                let near = of(text(column::NEIGHBOR_PARTITION).value(row), text(column::NEIGHBOR_ID).value(row));
                let rank = usize::try_from(ranks.value(row)).unwrap();
                lists[query as usize][rank - 1] = (near, distances.value(row));
            }
        }
        let num_twins = lists.iter().filter(|list| list[0].1 == 0.0).count();
        assert!(num_twins > 100 && num_twins < lists.len(), "{num_twins} of {} rows have a duplicate", lists.len());
        let dim = vectors.values().next().unwrap().len();
        let values: Vec<f32> = vectors.into_values().flatten().collect();
        compare(metric, &Array2::from_shape_vec((values.len() / dim, dim), values).unwrap(), &lists);
    }
}
