-- Written by sql/generate.py from schemas/.
--
-- The tables as Iceberg tables, and a documented view of each, in Snowflake. Before: an external volume `lake` of the folder above
-- s3://lake/lookalike, and
-- CREATE CATALOG INTEGRATION delta_files CATALOG_SOURCE = OBJECT_STORE TABLE_FORMAT = DELTA ENABLED = TRUE.

CREATE OR REPLACE ICEBERG TABLE latents_delta
  EXTERNAL_VOLUME = 'lake'
  CATALOG = 'delta_files'
  BASE_LOCATION = 'lookalike/latents'
  AUTO_REFRESH = TRUE;

CREATE OR REPLACE VIEW latents (
  image_id COMMENT 'Key of the row: the source''s id column, integers written in decimal; for a folder of images, the file''s path relative to it. Unique within a partition.',
  uri COMMENT 'Column of the source, kept as it is. Null where the source is.',
  split COMMENT 'Column of the source, kept as it is. Null where the source is.',
  status COMMENT '`ok`, or why there is no vector: `missing` (null in the source), `not_found` (no object at the URI), `invalid_uri`, `empty` (no bytes), `image_too_large` and `too_many_pixels`, `decode_timeout` (above [limits]), `side_too_long`, `too_much_memory`, `unknown_format`, `unsupported_image`, `truncated_image`, `corrupt_image`, `decoder_panicked`, `non_finite_output` (the model gave NaN or infinity). Of features: `missing`, `wrong_shape` (another number of values or other lists than the model takes, or lists of unequal lengths), `null_value` (a value, or a list within the row, is null), `non_finite_input` (a value that is NaN, infinite, or too large for 32 bits), `non_finite_output`.',
  error_message COMMENT 'The reason in words. Null exactly where `status` is `ok`.',
  width COMMENT 'Width of the source image as it is looked at: after its EXIF orientation, where the model package applies it. Unit: pixels. Null where `status` is not `ok`, and of features, whose shape is in the model package.',
  height COMMENT 'Height of the source image as it is looked at. Unit: pixels. Null where `status` is not `ok`, and of features.',
  image_bytes COMMENT 'Size of the compressed image, also of one that cannot be decoded; of features, four bytes a value. Unit: bytes. Null where there were no bytes to read.',
  content_sha256 COMMENT 'SHA-256 of the compressed image, 64 lower-case hexadecimal digits: equal files have equal hashes. Of features, that of their values as little-endian 32-bit floats, the last axis fastest. Null where there were no bytes to read.',
  embedding COMMENT 'The vector to search by: the model''s `embedding` output, or its `mu` where it has no other. All rows of a model have the same length, and elements are finite and never null. Null where `status` is not `ok`.',
  mu COMMENT 'Mean of the approximate posterior q(z|x). Null where the model has none, where it is the embedding already, and where `status` is not `ok`.',
  logvar COMMENT 'Natural logarithm of the variances of q(z|x), element by element beside the mean. Null where the model has none, and where `status` is not `ok`.',
  mean_squared_error COMMENT 'Mean over the n values of the input tensor of (x - r)^2, where r is the reconstruction from the mean of the posterior. Unit: squared unit of the input tensor. Null where the model has no reconstruction, and where `status` is not `ok`.',
  mean_absolute_error COMMENT 'Mean over the n values of the input tensor of |x - r|. Unit: unit of the input tensor. Null where the model has no reconstruction, and where `status` is not `ok`.',
  top_1pct_squared_error COMMENT 'Mean of the largest ceil(n / 100) squared errors (x - r)^2: small defects drown in the mean over all (compare `outlier_perc` of alibi-detect). Unit: squared unit of the input tensor. Null where the model has no reconstruction, and where `status` is not `ok`.',
  kl_divergence COMMENT 'KL(q(z|x) || N(0, I)) = -1/2 sum(1 + logvar - mu^2 - exp(logvar)); Kingma and Welling, Auto-Encoding Variational Bayes, 2014, appendix B. Unit: nats. Null where the model has no mu and logvar, and where `status` is not `ok`.',
  negative_elbo COMMENT '-log p(x|z) + KL, with the expectation over q(z|x) taken at its mean: the loss of a VAE without sampling noise; with [model] elbo_samples, the mean over so many samples of z that are drawn by the row''s key. The first term is n/2 log(2 pi sigma^2) + sum((x - r)^2) / (2 sigma^2) for a Gaussian likelihood, and -sum(x log r + (1 - x) log(1 - r)) for a Bernoulli one. Unit: nats. Null where the model package states no likelihood or lacks an output that it needs, and where `status` is not `ok`.',
  pred_score COMMENT 'The model''s own score, higher = stranger: its output `pred_score`, as exports of anomaly detectors have one, or where it has an `anomaly_map` alone, the map''s maximum. Unit: as the model has it. Null where the model has neither, and where `status` is not `ok`.',
  brightness COMMENT 'Mean of the samples of the image as the model sees it, in its size and colors, before normalization: (x std + mean) / (255 scale) of the values x of the input tensor. Unit: share of white, 0 to 1. Null where `status` is not `ok`, and of features.',
  contrast COMMENT 'Standard deviation of the same samples, over all channels (the sum of squares is divided by their number). Unit: share of white, 0 to 1. Null where `status` is not `ok`, and of features.',
  sharpness COMMENT 'Mean of the squared Laplacian (4 c - left - right - above - below)^2 of the same samples, over those with all four neighbors; 0 where none has. Blur lowers it first. Unit: squared share of white. Null where `status` is not `ok`, and of features.',
  complexity COMMENT 'Mean of (x - y)^2 over the values x, y of the input tensor that are neighbors in a row or a column of one channel: the Dirichlet energy of the image a pair of neighbors, 0 for a flat one. Unit: squared unit of the input tensor. Null where `status` is not `ok`, and of features, of which most have no neighbors.',
  cell COMMENT 'Number of the cell that the embedding lies in, from 0, where the table is searched by cells: cells with near numbers lie near each other. Data files are sorted by it, and their row groups hold whole cells, so that a filter on it reads little. The footer of a data file names the set of cells as `lookalike.cells`; numbers of different sets do not compare. Null where the table is small enough to be searched exactly, and where `status` is not `ok`.',
  run_id COMMENT 'Fingerprint of all that the row depends on: source files and rows (`where`, id, image and kept columns), model package, provider and limits. Equal ids mean equal rows. `latents_run_id` in `runs`.',
  model_sha256 COMMENT 'SHA-256 of the model package''s contract, which lists the hashes of its other files. Vectors and scores compare between rows of one model only.',
  ds COMMENT 'Partition key of the source.'
)
COMMENT = 'One row for each row of the source table: its latent vector, its scores, and whether the image could be read. Where the source has features, a list column of numbers in the place of the images, a row''s numbers are what is called its image here.'
AS SELECT
  image_id,
  uri,
  split,
  status,
  error_message,
  width,
  height,
  image_bytes,
  content_sha256,
  embedding,
  mu,
  logvar,
  mean_squared_error,
  mean_absolute_error,
  top_1pct_squared_error,
  kl_divergence,
  negative_elbo,
  pred_score,
  brightness,
  contrast,
  sharpness,
  complexity,
  cell,
  run_id,
  model_sha256,
  ds
FROM latents_delta;

CREATE OR REPLACE ICEBERG TABLE neighbors_delta
  EXTERNAL_VOLUME = 'lake'
  CATALOG = 'delta_files'
  BASE_LOCATION = 'lookalike/neighbors'
  AUTO_REFRESH = TRUE;

CREATE OR REPLACE VIEW neighbors (
  image_id COMMENT 'The image whose neighbors these are; `image_id` of `latents`.',
  rank COMMENT 'Place in the list: 1 is the nearest, up to k. The image itself is not in its list. Equal distances are ranked by the neighbor''s id.',
  neighbor_id COMMENT 'The neighbor; `image_id` of `latents`.',
  distance COMMENT 'Distance of the two embeddings a and b; smaller is nearer. `cosine`: 1 - cos(a, b), 0 to 2. `l2`: |a - b|. `inner_product`: -a.b. Unit: 1 for cosine; unit of the embedding for l2; its square for inner_product.',
  neighbor_partition COMMENT 'Partition of the neighbor, as `key=value` pairs joined by slashes. Null where the table has no partitions.',
  run_id COMMENT 'Fingerprint of all that the list depends on: the rows that were searched, k, metric and scope. `neighbors_run_id` in `runs`.',
  ds COMMENT 'Partition key of the source.'
)
COMMENT = 'The nearest images of every image: one row for each image and rank. Exact, and the same whatever the number of threads.'
AS SELECT
  image_id,
  rank,
  neighbor_id,
  distance,
  neighbor_partition,
  run_id,
  ds
FROM neighbors_delta;

CREATE OR REPLACE ICEBERG TABLE groups_delta
  EXTERNAL_VOLUME = 'lake'
  CATALOG = 'delta_files'
  BASE_LOCATION = 'lookalike/groups'
  AUTO_REFRESH = TRUE;

CREATE OR REPLACE VIEW groups (
  image_id COMMENT 'The image; `image_id` of `latents`.',
  group_id COMMENT 'The group: a fingerprint of its representative''s id and partition, 32 hexadecimal digits, the same in every run in which that image represents a group.',
  representative_id COMMENT 'The image that represents the group; `image_id` of `latents`. The image itself where it represents its group, or is alone in it.',
  representative_partition COMMENT 'Partition of the representative, as `key=value` pairs joined by slashes. Null where the table has no partitions.',
  distance_to_representative COMMENT 'Distance of the image to its representative, at most `duplicate_distance`; 0 for the representative and for images of the same bytes. Unit: as `distance` in `neighbors`.',
  group_size COMMENT 'Images in the group, in all partitions, this one included; 1 for an image that is like no other. Unit: images.',
  run_id COMMENT 'Fingerprint of all that the row depends on: the rows of `latents` and of `neighbors`, and the threshold. `groups_run_id` in `runs`.',
  ds COMMENT 'Partition key of the source.'
)
COMMENT = 'Near-duplicates: one row for each image whose `status` in `latents` is `ok`, also for one that is like no other. Written where the pipeline has a `duplicate_distance`.'
AS SELECT
  image_id,
  group_id,
  representative_id,
  representative_partition,
  distance_to_representative,
  group_size,
  run_id,
  ds
FROM groups_delta;

CREATE OR REPLACE ICEBERG TABLE anomalies_delta
  EXTERNAL_VOLUME = 'lake'
  CATALOG = 'delta_files'
  BASE_LOCATION = 'lookalike/anomalies'
  AUTO_REFRESH = TRUE;

CREATE OR REPLACE VIEW anomalies (
  image_id COMMENT 'The image; `image_id` of `latents`.',
  anomaly_score COMMENT 'The score that decides; higher is stranger. Unit: unit of the column that `rule` names. Null where the image could not be scored: where `status` in `latents` is not `ok`, and where the reference has no rows of its segment.',
  rule COMMENT 'Which score that is: `mean_squared_error`, `mean_absolute_error`, `top_1pct_squared_error`, `kl_divergence` or `negative_elbo`, a column of `latents`; or `complexity_adjusted_error`, `mahalanobis_distance`, `knn_distance` or `fused`, a column of this table.',
  severity_percentile COMMENT 'Share of the reference whose score is at or below this one, 0 to 100. Unit: percent. Null where the score is null.',
  p_value COMMENT 'Conformal p-value: (1 + number of reference scores at or above this one) / (1 + number of reference scores). Were the image exchangeable with the reference, p <= a would have a chance of at most a (Bates, Candes, Lei, Romano and Sesia, Testing for Outliers with Conformal p-Values, 2023). Null where the score is null.',
  anomaly_threshold COMMENT 'The cutoff: the pipeline''s fixed value, or the score that the chosen share of the reference lies above; for a false discovery rate, the one that all rows of the partition together allow. Unit: as `anomaly_score`. Null where the score is null, and where a false discovery rate allows no flag in the partition.',
  is_anomaly COMMENT 'Whether `anomaly_score` is strictly above `anomaly_threshold`. Null where the score is null.',
  reasons COMMENT 'Why the image is flagged: the rule that decided, and after it all others by whose scores the image lies beyond the same share of the reference. Empty where `is_anomaly` is not true. Elements are never null.',
  complexity_adjusted_error COMMENT '`top_1pct_squared_error`, divided by what images of the same `complexity` have: exp(a + b ln(complexity)), with the least-squares line through the logarithms of the reference. Outside of the complexities of the reference, the quotient at the line''s end times the factor by which the image is outside. 1 is as usual. Null where the model has no reconstruction, of features, which have no complexity, and where the image could not be scored.',
  mahalanobis_distance COMMENT 'sqrt((x - m)'' S^-1 (x - m)) of the embedding x, with the mean m and the covariance S of the reference, shrunk after Ledoit and Wolf (2004). Where the embedding has regions, the largest of the regions'' distances (compare PaDiM, 2021). Unit: standard deviations. Null where the reference has too few rows for a covariance, and where the image could not be scored.',
  knn_distance COMMENT 'Distance to the k-th nearest embedding of the reference ([anomaly] k), never to the image itself. Unit: unit of the metric. Null where the embedding has no direction (all zeros, by `cosine`), where the reference has fewer than k others, and where the image could not be scored.',
  fused COMMENT 'Mean of the three scores above, as far as the model has them, each as max(-3, (ln(score) - mean) / deviation) with mean and standard deviation of the logarithms in the reference: 0 is as usual. Unit: standard deviations. Null where a score that every row of the reference has is null, and where the image could not be scored.',
  segment COMMENT 'Value of the column that [anomaly] segment names: the image is compared with reference rows of the same value. Null where none is named.',
  reference_id COMMENT 'Fingerprint of the reference scored against. Percentiles and p-values compare between rows of one reference only.',
  run_id COMMENT 'Fingerprint of all that the row depends on: the rows of `latents`, the reference, the rule and the threshold. `run_id` in `runs`.',
  ds COMMENT 'Partition key of the source.'
)
COMMENT = 'One row for each row of `latents`: how strange the image is, measured against a reference of images taken as normal.'
AS SELECT
  image_id,
  anomaly_score,
  rule,
  severity_percentile,
  p_value,
  anomaly_threshold,
  is_anomaly,
  reasons,
  complexity_adjusted_error,
  mahalanobis_distance,
  knn_distance,
  fused,
  segment,
  reference_id,
  run_id,
  ds
FROM anomalies_delta;

CREATE OR REPLACE ICEBERG TABLE runs_delta
  EXTERNAL_VOLUME = 'lake'
  CATALOG = 'delta_files'
  BASE_LOCATION = 'lookalike/runs'
  AUTO_REFRESH = TRUE;

CREATE OR REPLACE VIEW runs (
  run_id COMMENT '`run_id` of the partition''s rows in `anomalies`. Repeats where a later run changed other tables only. Null where the pipeline has no anomaly stage.',
  latents_run_id COMMENT '`run_id` of the partition''s rows in `latents`. Empty where the partition is no longer in the source.',
  neighbors_run_id COMMENT '`run_id` of the partition''s rows in `neighbors`. Null where the pipeline has no neighbors stage.',
  groups_run_id COMMENT '`run_id` of the partition''s rows in `groups`. Null where the pipeline has no `duplicate_distance`.',
  pipeline COMMENT 'Name of the pipeline, [pipeline] name.',
  partition COMMENT 'The partition, as `key=value` pairs joined by slashes. Null where the source has no partitions.',
  started_at COMMENT 'When the run began. Unit: microseconds since 1970, UTC.',
  finished_at COMMENT 'When the run''s last stage ended, before this row was written. Unit: microseconds since 1970, UTC.',
  rows_in COMMENT 'Rows of the partition in `latents`: those of the source that satisfy [source] where. Unit: rows.',
  rows_ok COMMENT 'Rows whose `status` is `ok`. Unit: rows.',
  rows_rejected COMMENT 'Rows with any other `status`: rows_in - rows_ok. Unit: rows.',
  rows_duplicate COMMENT 'Rows of the source that are not in `latents`, because an earlier row of the partition has their id and the pipeline says [source] duplicates = "keep_first". 0 where the run found the partition''s rows done by an earlier one. Unit: rows.',
  rejects COMMENT 'Rejected rows by `status`, as a JSON object such as {"truncated_image":2}; {} where there are none.',
  rows_flagged COMMENT 'Rows of the partition in `anomalies` whose `is_anomaly` is true. Unit: rows. Null where the pipeline has no anomaly stage: nothing was judged.',
  drift COMMENT 'Whether the partition''s images are still like those of the reference: one element a check. `input` is a score or pixel statistic of `latents`, or `embedding`; `metric` says how it was compared: `cliffs_delta` (Cliff''s delta |2 AUC - 1|: where the values lie), `upper_tail_excess` and `lower_tail_excess` (share of rows beyond the outermost 1 % of the reference, less the reference''s own share), `energy_coefficient` (energy coefficient of inhomogeneity of the vectors, 0 for equal distributions, 1 at most). `value` is the effect size, null where a side has no values; `threshold` the largest one that does not matter. `p_value` is the chance that any check of the partition comes out as strange if nothing has drifted (permutations of all checks together), null below 30 rows on either side. `rows` is how many rows of the partition were looked at, up to 2,000, and 500 vectors. Null where the pipeline names no reference, and where [drift] is switched off.',
  embed_secs COMMENT 'Wall time of the embed stage, for all partitions together. Unit: seconds.',
  neighbors_secs COMMENT 'Wall time of the neighbors stage, for all partitions together; 0 where the pipeline has none. Unit: seconds.',
  flag_secs COMMENT 'Wall time of the flag stage, for all partitions together; 0 where the pipeline has none. Unit: seconds.',
  neighbors_search COMMENT 'How neighbors were searched: `exact`, or `ivf` by cells. Null where the pipeline has no neighbors stage.',
  neighbors_cells COMMENT 'Cells of the search by cells. Unit: cells. Null where the search was exact, and where the pipeline has no neighbors stage.',
  neighbors_nprobe COMMENT 'Cells that each image was compared with in the search by cells. Unit: cells. Null where the search was exact, and where the pipeline has no neighbors stage.',
  neighbors_recall COMMENT 'Share of the true `k` nearest neighbors that the search found: 1 for the exact search, and for the search by cells as measured when the lists were made, on a sample of images against the exact search, apart from the sample that `nprobe` was chosen by. Unit: share, 0 to 1. Null where the pipeline has no neighbors stage.',
  source_url COMMENT 'URL of the source table, without credentials.',
  source_version COMMENT 'Version of the source table that was read, where it is a Delta table. Null where the source is no Delta table.',
  model_package COMMENT 'URL of the model package, without credentials.',
  model_sha256 COMMENT '`model_sha256` of the rows in `latents`.',
  reference_id COMMENT '`reference_id` of the rows in `anomalies`. Null where the pipeline has no anomaly stage.',
  settings COMMENT 'The pipeline''s settings as resolved, defaults included, as a JSON object with the keys of the pipeline file. Holds no credentials.',
  provider COMMENT 'What computed for ONNX Runtime: `cpu` or `cuda`.',
  onnxruntime_version COMMENT 'Version of ONNX Runtime; empty where this run loaded no model.',
  lookalike_version COMMENT 'Version of lookalike.'
)
COMMENT = 'What was done: one row for each run and each partition of which it changed a table. A run with nothing to do writes no row.'
AS SELECT
  run_id,
  latents_run_id,
  neighbors_run_id,
  groups_run_id,
  pipeline,
  partition,
  started_at,
  finished_at,
  rows_in,
  rows_ok,
  rows_rejected,
  rows_duplicate,
  rejects,
  rows_flagged,
  drift,
  embed_secs,
  neighbors_secs,
  flag_secs,
  neighbors_search,
  neighbors_cells,
  neighbors_nprobe,
  neighbors_recall,
  source_url,
  source_version,
  model_package,
  model_sha256,
  reference_id,
  settings,
  provider,
  onnxruntime_version,
  lookalike_version
FROM runs_delta;
