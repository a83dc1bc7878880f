-- Written by sql/generate.py from schemas/.
--
-- Copies of the tables in BigQuery, loaded from the files below gs://lake/lookalike where the pipeline says publish = "parquet".
-- The newest file in _manifests of a table names its files, with the run in their path: load the files of each run by a statement of
-- its own, for the partition keys are read from what follows the prefix. Without enable_list_inference an array would come as
-- embedding.list.element.

CREATE OR REPLACE TABLE latents (
  image_id STRING NOT NULL OPTIONS (description = 'Key of the row: the source\'s id column, integers written in decimal; for a folder of images, the file\'s path relative to it. Unique within a partition.'),
  uri STRING OPTIONS (description = 'Column of the source, kept as it is. Null where the source is.'),
  split STRING OPTIONS (description = 'Column of the source, kept as it is. Null where the source is.'),
  status STRING NOT NULL OPTIONS (description = '`ok`, or why there is no vector: `missing` (null in the source), `not_found` (no object at the URI), `invalid_uri`, `empty` (no bytes), `image_too_large` and `too_many_pixels`, `decode_timeout` (above [limits]), `side_too_long`, `too_much_memory`, `unknown_format`, `unsupported_image`, `truncated_image`, `corrupt_image`, `decoder_panicked`, `non_finite_output` (the model gave NaN or infinity). Of features: `missing`, `wrong_shape` (another number of values or other lists than the model takes, or lists of unequal lengths), `null_value` (a value, or a list within the row, is null), `non_finite_input` (a value that is NaN, infinite, or too large for 32 bits), `non_finite_output`.'),
  error_message STRING OPTIONS (description = 'The reason in words. Null exactly where `status` is `ok`.'),
  width INT64 OPTIONS (description = 'Width of the source image as it is looked at: after its EXIF orientation, where the model package applies it. Unit: pixels. Null where `status` is not `ok`, and of features, whose shape is in the model package.'),
  height INT64 OPTIONS (description = 'Height of the source image as it is looked at. Unit: pixels. Null where `status` is not `ok`, and of features.'),
  image_bytes INT64 OPTIONS (description = 'Size of the compressed image, also of one that cannot be decoded; of features, four bytes a value. Unit: bytes. Null where there were no bytes to read.'),
  content_sha256 STRING OPTIONS (description = 'SHA-256 of the compressed image, 64 lower-case hexadecimal digits: equal files have equal hashes. Of features, that of their values as little-endian 32-bit floats, the last axis fastest. Null where there were no bytes to read.'),
  embedding ARRAY<FLOAT64> OPTIONS (description = 'The vector to search by: the model\'s `embedding` output, or its `mu` where it has no other. All rows of a model have the same length, and elements are finite and never null. Null where `status` is not `ok`.'),
  mu ARRAY<FLOAT64> OPTIONS (description = 'Mean of the approximate posterior q(z|x). Null where the model has none, where it is the embedding already, and where `status` is not `ok`.'),
  logvar ARRAY<FLOAT64> OPTIONS (description = 'Natural logarithm of the variances of q(z|x), element by element beside the mean. Null where the model has none, and where `status` is not `ok`.'),
  mean_squared_error FLOAT64 OPTIONS (description = 'Mean over the n values of the input tensor of (x - r)^2, where r is the reconstruction from the mean of the posterior. Unit: squared unit of the input tensor. Null where the model has no reconstruction, and where `status` is not `ok`.'),
  mean_absolute_error FLOAT64 OPTIONS (description = 'Mean over the n values of the input tensor of |x - r|. Unit: unit of the input tensor. Null where the model has no reconstruction, and where `status` is not `ok`.'),
  top_1pct_squared_error FLOAT64 OPTIONS (description = 'Mean of the largest ceil(n / 100) squared errors (x - r)^2: small defects drown in the mean over all (compare `outlier_perc` of alibi-detect). Unit: squared unit of the input tensor. Null where the model has no reconstruction, and where `status` is not `ok`.'),
  kl_divergence FLOAT64 OPTIONS (description = 'KL(q(z|x) || N(0, I)) = -1/2 sum(1 + logvar - mu^2 - exp(logvar)); Kingma and Welling, Auto-Encoding Variational Bayes, 2014, appendix B. Unit: nats. Null where the model has no mu and logvar, and where `status` is not `ok`.'),
  negative_elbo FLOAT64 OPTIONS (description = '-log p(x|z) + KL, with the expectation over q(z|x) taken at its mean: the loss of a VAE without sampling noise; with [model] elbo_samples, the mean over so many samples of z that are drawn by the row\'s key. The first term is n/2 log(2 pi sigma^2) + sum((x - r)^2) / (2 sigma^2) for a Gaussian likelihood, and -sum(x log r + (1 - x) log(1 - r)) for a Bernoulli one. Unit: nats. Null where the model package states no likelihood or lacks an output that it needs, and where `status` is not `ok`.'),
  pred_score FLOAT64 OPTIONS (description = 'The model\'s own score, higher = stranger: its output `pred_score`, as exports of anomaly detectors have one, or where it has an `anomaly_map` alone, the map\'s maximum. Unit: as the model has it. Null where the model has neither, and where `status` is not `ok`.'),
  brightness FLOAT64 OPTIONS (description = 'Mean of the samples of the image as the model sees it, in its size and colors, before normalization: (x std + mean) / (255 scale) of the values x of the input tensor. Unit: share of white, 0 to 1. Null where `status` is not `ok`, and of features.'),
  contrast FLOAT64 OPTIONS (description = 'Standard deviation of the same samples, over all channels (the sum of squares is divided by their number). Unit: share of white, 0 to 1. Null where `status` is not `ok`, and of features.'),
  sharpness FLOAT64 OPTIONS (description = 'Mean of the squared Laplacian (4 c - left - right - above - below)^2 of the same samples, over those with all four neighbors; 0 where none has. Blur lowers it first. Unit: squared share of white. Null where `status` is not `ok`, and of features.'),
  complexity FLOAT64 OPTIONS (description = 'Mean of (x - y)^2 over the values x, y of the input tensor that are neighbors in a row or a column of one channel: the Dirichlet energy of the image a pair of neighbors, 0 for a flat one. Unit: squared unit of the input tensor. Null where `status` is not `ok`, and of features, of which most have no neighbors.'),
  cell INT64 OPTIONS (description = 'Number of the cell that the embedding lies in, from 0, where the table is searched by cells: cells with near numbers lie near each other. Data files are sorted by it, and their row groups hold whole cells, so that a filter on it reads little. The footer of a data file names the set of cells as `lookalike.cells`; numbers of different sets do not compare. Null where the table is small enough to be searched exactly, and where `status` is not `ok`.'),
  run_id STRING NOT NULL OPTIONS (description = 'Fingerprint of all that the row depends on: source files and rows (`where`, id, image and kept columns), model package, provider and limits. Equal ids mean equal rows. `latents_run_id` in `runs`.'),
  model_sha256 STRING NOT NULL OPTIONS (description = 'SHA-256 of the model package\'s contract, which lists the hashes of its other files. Vectors and scores compare between rows of one model only.'),
  ds STRING OPTIONS (description = 'Partition key of the source.')
)
OPTIONS (description = 'One row for each row of the source table: its latent vector, its scores, and whether the image could be read. Where the source has features, a list column of numbers in the place of the images, a row\'s numbers are what is called its image here.');

LOAD DATA INTO latents
FROM FILES (
  format = 'PARQUET',
  enable_list_inference = true,
  uris = ['gs://lake/lookalike/latents/runs/RUN/*.parquet'],
  hive_partition_uri_prefix = 'gs://lake/lookalike/latents/runs/RUN'
)
WITH PARTITION COLUMNS (ds STRING);

CREATE OR REPLACE TABLE neighbors (
  image_id STRING NOT NULL OPTIONS (description = 'The image whose neighbors these are; `image_id` of `latents`.'),
  rank INT64 NOT NULL OPTIONS (description = 'Place in the list: 1 is the nearest, up to k. The image itself is not in its list. Equal distances are ranked by the neighbor\'s id.'),
  neighbor_id STRING NOT NULL OPTIONS (description = 'The neighbor; `image_id` of `latents`.'),
  distance FLOAT64 NOT NULL OPTIONS (description = 'Distance of the two embeddings a and b; smaller is nearer. `cosine`: 1 - cos(a, b), 0 to 2. `l2`: |a - b|. `inner_product`: -a.b. Unit: 1 for cosine; unit of the embedding for l2; its square for inner_product.'),
  neighbor_partition STRING OPTIONS (description = 'Partition of the neighbor, as `key=value` pairs joined by slashes. Null where the table has no partitions.'),
  run_id STRING NOT NULL OPTIONS (description = 'Fingerprint of all that the list depends on: the rows that were searched, k, metric and scope. `neighbors_run_id` in `runs`.'),
  ds STRING OPTIONS (description = 'Partition key of the source.')
)
OPTIONS (description = 'The nearest images of every image: one row for each image and rank. Exact, and the same whatever the number of threads.');

LOAD DATA INTO neighbors
FROM FILES (
  format = 'PARQUET',
  enable_list_inference = true,
  uris = ['gs://lake/lookalike/neighbors/runs/RUN/*.parquet'],
  hive_partition_uri_prefix = 'gs://lake/lookalike/neighbors/runs/RUN'
)
WITH PARTITION COLUMNS (ds STRING);

CREATE OR REPLACE TABLE `groups` (
  image_id STRING NOT NULL OPTIONS (description = 'The image; `image_id` of `latents`.'),
  group_id STRING NOT NULL OPTIONS (description = 'The group: a fingerprint of its representative\'s id and partition, 32 hexadecimal digits, the same in every run in which that image represents a group.'),
  representative_id STRING NOT NULL OPTIONS (description = 'The image that represents the group; `image_id` of `latents`. The image itself where it represents its group, or is alone in it.'),
  representative_partition STRING OPTIONS (description = 'Partition of the representative, as `key=value` pairs joined by slashes. Null where the table has no partitions.'),
  distance_to_representative FLOAT64 NOT NULL OPTIONS (description = 'Distance of the image to its representative, at most `duplicate_distance`; 0 for the representative and for images of the same bytes. Unit: as `distance` in `neighbors`.'),
  group_size INT64 NOT NULL OPTIONS (description = 'Images in the group, in all partitions, this one included; 1 for an image that is like no other. Unit: images.'),
  run_id STRING NOT NULL OPTIONS (description = 'Fingerprint of all that the row depends on: the rows of `latents` and of `neighbors`, and the threshold. `groups_run_id` in `runs`.'),
  ds STRING OPTIONS (description = 'Partition key of the source.')
)
OPTIONS (description = 'Near-duplicates: one row for each image whose `status` in `latents` is `ok`, also for one that is like no other. Written where the pipeline has a `duplicate_distance`.');

LOAD DATA INTO `groups`
FROM FILES (
  format = 'PARQUET',
  enable_list_inference = true,
  uris = ['gs://lake/lookalike/groups/runs/RUN/*.parquet'],
  hive_partition_uri_prefix = 'gs://lake/lookalike/groups/runs/RUN'
)
WITH PARTITION COLUMNS (ds STRING);

CREATE OR REPLACE TABLE anomalies (
  image_id STRING NOT NULL OPTIONS (description = 'The image; `image_id` of `latents`.'),
  anomaly_score FLOAT64 OPTIONS (description = 'The score that decides; higher is stranger. Unit: unit of the column that `rule` names. Null where the image could not be scored: where `status` in `latents` is not `ok`, and where the reference has no rows of its segment.'),
  rule STRING NOT NULL OPTIONS (description = 'Which score that is: `mean_squared_error`, `mean_absolute_error`, `top_1pct_squared_error`, `kl_divergence` or `negative_elbo`, a column of `latents`; or `complexity_adjusted_error`, `mahalanobis_distance`, `knn_distance` or `fused`, a column of this table.'),
  severity_percentile FLOAT64 OPTIONS (description = 'Share of the reference whose score is at or below this one, 0 to 100. Unit: percent. Null where the score is null.'),
  p_value FLOAT64 OPTIONS (description = 'Conformal p-value: (1 + number of reference scores at or above this one) / (1 + number of reference scores). Were the image exchangeable with the reference, p <= a would have a chance of at most a (Bates, Candes, Lei, Romano and Sesia, Testing for Outliers with Conformal p-Values, 2023). Null where the score is null.'),
  anomaly_threshold FLOAT64 OPTIONS (description = 'The cutoff: the pipeline\'s fixed value, or the score that the chosen share of the reference lies above; for a false discovery rate, the one that all rows of the partition together allow. Unit: as `anomaly_score`. Null where the score is null, and where a false discovery rate allows no flag in the partition.'),
  is_anomaly BOOL OPTIONS (description = 'Whether `anomaly_score` is strictly above `anomaly_threshold`. Null where the score is null.'),
  reasons ARRAY<STRING> OPTIONS (description = 'Why the image is flagged: the rule that decided, and after it all others by whose scores the image lies beyond the same share of the reference. Empty where `is_anomaly` is not true. Elements are never null.'),
  complexity_adjusted_error FLOAT64 OPTIONS (description = '`top_1pct_squared_error`, divided by what images of the same `complexity` have: exp(a + b ln(complexity)), with the least-squares line through the logarithms of the reference. Outside of the complexities of the reference, the quotient at the line\'s end times the factor by which the image is outside. 1 is as usual. Null where the model has no reconstruction, of features, which have no complexity, and where the image could not be scored.'),
  mahalanobis_distance FLOAT64 OPTIONS (description = 'sqrt((x - m)\' S^-1 (x - m)) of the embedding x, with the mean m and the covariance S of the reference, shrunk after Ledoit and Wolf (2004). Where the embedding has regions, the largest of the regions\' distances (compare PaDiM, 2021). Unit: standard deviations. Null where the reference has too few rows for a covariance, and where the image could not be scored.'),
  knn_distance FLOAT64 OPTIONS (description = 'Distance to the k-th nearest embedding of the reference ([anomaly] k), never to the image itself. Unit: unit of the metric. Null where the embedding has no direction (all zeros, by `cosine`), where the reference has fewer than k others, and where the image could not be scored.'),
  fused FLOAT64 OPTIONS (description = 'Mean of the three scores above, as far as the model has them, each as max(-3, (ln(score) - mean) / deviation) with mean and standard deviation of the logarithms in the reference: 0 is as usual. Unit: standard deviations. Null where a score that every row of the reference has is null, and where the image could not be scored.'),
  segment STRING OPTIONS (description = 'Value of the column that [anomaly] segment names: the image is compared with reference rows of the same value. Null where none is named.'),
  reference_id STRING NOT NULL OPTIONS (description = 'Fingerprint of the reference scored against. Percentiles and p-values compare between rows of one reference only.'),
  run_id STRING NOT NULL OPTIONS (description = 'Fingerprint of all that the row depends on: the rows of `latents`, the reference, the rule and the threshold. `run_id` in `runs`.'),
  ds STRING OPTIONS (description = 'Partition key of the source.')
)
OPTIONS (description = 'One row for each row of `latents`: how strange the image is, measured against a reference of images taken as normal.');

LOAD DATA INTO anomalies
FROM FILES (
  format = 'PARQUET',
  enable_list_inference = true,
  uris = ['gs://lake/lookalike/anomalies/runs/RUN/*.parquet'],
  hive_partition_uri_prefix = 'gs://lake/lookalike/anomalies/runs/RUN'
)
WITH PARTITION COLUMNS (ds STRING);

CREATE OR REPLACE TABLE runs (
  run_id STRING OPTIONS (description = '`run_id` of the partition\'s rows in `anomalies`. Repeats where a later run changed other tables only. Null where the pipeline has no anomaly stage.'),
  latents_run_id STRING NOT NULL OPTIONS (description = '`run_id` of the partition\'s rows in `latents`. Empty where the partition is no longer in the source.'),
  neighbors_run_id STRING OPTIONS (description = '`run_id` of the partition\'s rows in `neighbors`. Null where the pipeline has no neighbors stage.'),
  groups_run_id STRING OPTIONS (description = '`run_id` of the partition\'s rows in `groups`. Null where the pipeline has no `duplicate_distance`.'),
  pipeline STRING NOT NULL OPTIONS (description = 'Name of the pipeline, [pipeline] name.'),
  `partition` STRING OPTIONS (description = 'The partition, as `key=value` pairs joined by slashes. Null where the source has no partitions.'),
  started_at TIMESTAMP NOT NULL OPTIONS (description = 'When the run began. Unit: microseconds since 1970, UTC.'),
  finished_at TIMESTAMP NOT NULL OPTIONS (description = 'When the run\'s last stage ended, before this row was written. Unit: microseconds since 1970, UTC.'),
  rows_in INT64 NOT NULL OPTIONS (description = 'Rows of the partition in `latents`: those of the source that satisfy [source] where. Unit: rows.'),
  rows_ok INT64 NOT NULL OPTIONS (description = 'Rows whose `status` is `ok`. Unit: rows.'),
  rows_rejected INT64 NOT NULL OPTIONS (description = 'Rows with any other `status`: rows_in - rows_ok. Unit: rows.'),
  rows_duplicate INT64 NOT NULL OPTIONS (description = 'Rows of the source that are not in `latents`, because an earlier row of the partition has their id and the pipeline says [source] duplicates = "keep_first". 0 where the run found the partition\'s rows done by an earlier one. Unit: rows.'),
  rejects STRING NOT NULL OPTIONS (description = 'Rejected rows by `status`, as a JSON object such as {"truncated_image":2}; {} where there are none.'),
  rows_flagged INT64 OPTIONS (description = 'Rows of the partition in `anomalies` whose `is_anomaly` is true. Unit: rows. Null where the pipeline has no anomaly stage: nothing was judged.'),
  drift ARRAY<STRUCT<`input` STRING, `metric` STRING, `threshold` FLOAT64, `value` FLOAT64, `p_value` FLOAT64, `rows` INT64, `is_anomaly` BOOL>> OPTIONS (description = 'Whether the partition\'s images are still like those of the reference: one element a check. `input` is a score or pixel statistic of `latents`, or `embedding`; `metric` says how it was compared: `cliffs_delta` (Cliff\'s delta |2 AUC - 1|: where the values lie), `upper_tail_excess` and `lower_tail_excess` (share of rows beyond the outermost 1 % of the reference, less the reference\'s own share), `energy_coefficient` (energy coefficient of inhomogeneity of the vectors, 0 for equal distributions, 1 at most). `value` is the effect size, null where a side has no values; `threshold` the largest one that does not matter. `p_value` is the chance that any check of the partition comes out as strange if nothing has drifted (permutations of all checks together), null below 30 rows on either side. `rows` is how many rows of the partition were looked at, up to 2,000, and 500 vectors. Null where the pipeline names no reference, and where [drift] is switched off.'),
  embed_secs FLOAT64 NOT NULL OPTIONS (description = 'Wall time of the embed stage, for all partitions together. Unit: seconds.'),
  neighbors_secs FLOAT64 NOT NULL OPTIONS (description = 'Wall time of the neighbors stage, for all partitions together; 0 where the pipeline has none. Unit: seconds.'),
  flag_secs FLOAT64 NOT NULL OPTIONS (description = 'Wall time of the flag stage, for all partitions together; 0 where the pipeline has none. Unit: seconds.'),
  neighbors_search STRING OPTIONS (description = 'How neighbors were searched: `exact`, or `ivf` by cells. Null where the pipeline has no neighbors stage.'),
  neighbors_cells INT64 OPTIONS (description = 'Cells of the search by cells. Unit: cells. Null where the search was exact, and where the pipeline has no neighbors stage.'),
  neighbors_nprobe INT64 OPTIONS (description = 'Cells that each image was compared with in the search by cells. Unit: cells. Null where the search was exact, and where the pipeline has no neighbors stage.'),
  neighbors_recall FLOAT64 OPTIONS (description = 'Share of the true `k` nearest neighbors that the search found: 1 for the exact search, and for the search by cells as measured when the lists were made, on a sample of images against the exact search, apart from the sample that `nprobe` was chosen by. Unit: share, 0 to 1. Null where the pipeline has no neighbors stage.'),
  source_url STRING NOT NULL OPTIONS (description = 'URL of the source table, without credentials.'),
  source_version INT64 OPTIONS (description = 'Version of the source table that was read, where it is a Delta table. Null where the source is no Delta table.'),
  model_package STRING NOT NULL OPTIONS (description = 'URL of the model package, without credentials.'),
  model_sha256 STRING NOT NULL OPTIONS (description = '`model_sha256` of the rows in `latents`.'),
  reference_id STRING OPTIONS (description = '`reference_id` of the rows in `anomalies`. Null where the pipeline has no anomaly stage.'),
  settings STRING NOT NULL OPTIONS (description = 'The pipeline\'s settings as resolved, defaults included, as a JSON object with the keys of the pipeline file. Holds no credentials.'),
  provider STRING NOT NULL OPTIONS (description = 'What computed for ONNX Runtime: `cpu` or `cuda`.'),
  onnxruntime_version STRING NOT NULL OPTIONS (description = 'Version of ONNX Runtime; empty where this run loaded no model.'),
  lookalike_version STRING NOT NULL OPTIONS (description = 'Version of lookalike.')
)
OPTIONS (description = 'What was done: one row for each run and each partition of which it changed a table. A run with nothing to do writes no row.');

LOAD DATA INTO runs
FROM FILES (
  format = 'PARQUET',
  enable_list_inference = true,
  uris = ['gs://lake/lookalike/runs/runs/RUN/*.parquet']
);
