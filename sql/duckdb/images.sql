-- Written by sql/generate.py from schemas/.
--
-- One row an image: what is in `latents`, its flag, its group and its nearest neighbor. Run it after tables.sql, in the same schema.

CREATE OR REPLACE VIEW images AS
SELECT
  l.image_id,
  l.uri,
  l.split,
  l.status,
  l.error_message,
  l.width,
  l.height,
  l.image_bytes,
  l.content_sha256,
  l.embedding,
  l.mu,
  l.logvar,
  l.mean_squared_error,
  l.mean_absolute_error,
  l.top_1pct_squared_error,
  l.kl_divergence,
  l.negative_elbo,
  l.pred_score,
  l.brightness,
  l.contrast,
  l.sharpness,
  l.complexity,
  l.cell,
  l.run_id AS latents_run_id,
  l.model_sha256,
  l.ds,
  'ds=' || COALESCE(l.ds, '__HIVE_DEFAULT_PARTITION__') AS image_partition,
  a.anomaly_score,
  a.rule,
  a.severity_percentile,
  a.p_value,
  a.anomaly_threshold,
  a.is_anomaly,
  a.reasons,
  a.complexity_adjusted_error,
  a.mahalanobis_distance,
  a.knn_distance,
  a.fused,
  a.segment,
  a.reference_id,
  a.run_id AS anomalies_run_id,
  g.group_id,
  g.representative_id,
  g.representative_partition,
  g.distance_to_representative,
  g.group_size,
  g.run_id AS groups_run_id,
  n.neighbor_id AS nearest_id,
  n.neighbor_partition AS nearest_partition,
  n.distance AS nearest_distance,
  n.run_id AS neighbors_run_id
FROM latents AS l
LEFT JOIN anomalies AS a ON a.image_id = l.image_id AND a.ds IS NOT DISTINCT FROM l.ds
LEFT JOIN groups AS g ON g.image_id = l.image_id AND g.ds IS NOT DISTINCT FROM l.ds
LEFT JOIN neighbors AS n ON n.image_id = l.image_id AND n.ds IS NOT DISTINCT FROM l.ds AND n.rank = 1;
COMMENT ON VIEW images IS 'One row for each row of `latents`, with its flag, its group and its nearest neighbor as far as it has them.';
COMMENT ON COLUMN images.image_id IS 'Key of the row: the source''s id column, integers written in decimal; for a folder of images, the file''s path relative to it. Unique within a partition.';
COMMENT ON COLUMN images.uri IS 'Column of the source, kept as it is. Null where the source is.';
COMMENT ON COLUMN images.split IS 'Column of the source, kept as it is. Null where the source is.';
COMMENT ON COLUMN images.status IS '`ok`, or why there is no vector: `missing` (null in the source), `not_found` (no object at the URI), `invalid_uri`, `empty` (no bytes), `image_too_large` and `too_many_pixels`, `decode_timeout` (above [limits]), `side_too_long`, `too_much_memory`, `unknown_format`, `unsupported_image`, `truncated_image`, `corrupt_image`, `decoder_panicked`, `non_finite_output` (the model gave NaN or infinity). Of features: `missing`, `wrong_shape` (another number of values or other lists than the model takes, or lists of unequal lengths), `null_value` (a value, or a list within the row, is null), `non_finite_input` (a value that is NaN, infinite, or too large for 32 bits), `non_finite_output`.';
COMMENT ON COLUMN images.error_message IS 'The reason in words. Null exactly where `status` is `ok`.';
COMMENT ON COLUMN images.width IS 'Width of the source image as it is looked at: after its EXIF orientation, where the model package applies it. Unit: pixels. Null where `status` is not `ok`, and of features, whose shape is in the model package.';
COMMENT ON COLUMN images.height IS 'Height of the source image as it is looked at. Unit: pixels. Null where `status` is not `ok`, and of features.';
COMMENT ON COLUMN images.image_bytes IS 'Size of the compressed image, also of one that cannot be decoded; of features, four bytes a value. Unit: bytes. Null where there were no bytes to read.';
COMMENT ON COLUMN images.content_sha256 IS 'SHA-256 of the compressed image, 64 lower-case hexadecimal digits: equal files have equal hashes. Of features, that of their values as little-endian 32-bit floats, the last axis fastest. Null where there were no bytes to read.';
COMMENT ON COLUMN images.embedding IS 'The vector to search by: the model''s `embedding` output, or its `mu` where it has no other. All rows of a model have the same length, and elements are finite and never null. Null where `status` is not `ok`.';
COMMENT ON COLUMN images.mu IS 'Mean of the approximate posterior q(z|x). Null where the model has none, where it is the embedding already, and where `status` is not `ok`.';
COMMENT ON COLUMN images.logvar IS 'Natural logarithm of the variances of q(z|x), element by element beside the mean. Null where the model has none, and where `status` is not `ok`.';
COMMENT ON COLUMN images.mean_squared_error IS 'Mean over the n values of the input tensor of (x - r)^2, where r is the reconstruction from the mean of the posterior. Unit: squared unit of the input tensor. Null where the model has no reconstruction, and where `status` is not `ok`.';
COMMENT ON COLUMN images.mean_absolute_error IS 'Mean over the n values of the input tensor of |x - r|. Unit: unit of the input tensor. Null where the model has no reconstruction, and where `status` is not `ok`.';
COMMENT ON COLUMN images.top_1pct_squared_error IS 'Mean of the largest ceil(n / 100) squared errors (x - r)^2: small defects drown in the mean over all (compare `outlier_perc` of alibi-detect). Unit: squared unit of the input tensor. Null where the model has no reconstruction, and where `status` is not `ok`.';
COMMENT ON COLUMN images.kl_divergence IS 'KL(q(z|x) || N(0, I)) = -1/2 sum(1 + logvar - mu^2 - exp(logvar)); Kingma and Welling, Auto-Encoding Variational Bayes, 2014, appendix B. Unit: nats. Null where the model has no mu and logvar, and where `status` is not `ok`.';
COMMENT ON COLUMN images.negative_elbo IS '-log p(x|z) + KL, with the expectation over q(z|x) taken at its mean: the loss of a VAE without sampling noise; with [model] elbo_samples, the mean over so many samples of z that are drawn by the row''s key. The first term is n/2 log(2 pi sigma^2) + sum((x - r)^2) / (2 sigma^2) for a Gaussian likelihood, and -sum(x log r + (1 - x) log(1 - r)) for a Bernoulli one. Unit: nats. Null where the model package states no likelihood or lacks an output that it needs, and where `status` is not `ok`.';
COMMENT ON COLUMN images.pred_score IS 'The model''s own score, higher = stranger: its output `pred_score`, as exports of anomaly detectors have one, or where it has an `anomaly_map` alone, the map''s maximum. Unit: as the model has it. Null where the model has neither, and where `status` is not `ok`.';
COMMENT ON COLUMN images.brightness IS 'Mean of the samples of the image as the model sees it, in its size and colors, before normalization: (x std + mean) / (255 scale) of the values x of the input tensor. Unit: share of white, 0 to 1. Null where `status` is not `ok`, and of features.';
COMMENT ON COLUMN images.contrast IS 'Standard deviation of the same samples, over all channels (the sum of squares is divided by their number). Unit: share of white, 0 to 1. Null where `status` is not `ok`, and of features.';
COMMENT ON COLUMN images.sharpness IS 'Mean of the squared Laplacian (4 c - left - right - above - below)^2 of the same samples, over those with all four neighbors; 0 where none has. Blur lowers it first. Unit: squared share of white. Null where `status` is not `ok`, and of features.';
COMMENT ON COLUMN images.complexity IS 'Mean of (x - y)^2 over the values x, y of the input tensor that are neighbors in a row or a column of one channel: the Dirichlet energy of the image a pair of neighbors, 0 for a flat one. Unit: squared unit of the input tensor. Null where `status` is not `ok`, and of features, of which most have no neighbors.';
COMMENT ON COLUMN images.cell IS 'Number of the cell that the embedding lies in, from 0, where the table is searched by cells: cells with near numbers lie near each other. Data files are sorted by it, and their row groups hold whole cells, so that a filter on it reads little. The footer of a data file names the set of cells as `lookalike.cells`; numbers of different sets do not compare. Null where the table is small enough to be searched exactly, and where `status` is not `ok`.';
COMMENT ON COLUMN images.latents_run_id IS 'Fingerprint of all that the row depends on: source files and rows (`where`, id, image and kept columns), model package, provider and limits. Equal ids mean equal rows. `latents_run_id` in `runs`.';
COMMENT ON COLUMN images.model_sha256 IS 'SHA-256 of the model package''s contract, which lists the hashes of its other files. Vectors and scores compare between rows of one model only.';
COMMENT ON COLUMN images.ds IS 'Partition key of the source.';
COMMENT ON COLUMN images.image_partition IS 'The partition keys as `key=value` pairs joined by slashes, as `neighbor_partition` and `representative_partition` have them.';
COMMENT ON COLUMN images.anomaly_score IS 'The score that decides; higher is stranger. Unit: unit of the column that `rule` names. Null where the image could not be scored: where `status` in `latents` is not `ok`, and where the reference has no rows of its segment.';
COMMENT ON COLUMN images.rule IS 'Which score that is: `mean_squared_error`, `mean_absolute_error`, `top_1pct_squared_error`, `kl_divergence` or `negative_elbo`, a column of `latents`; or `complexity_adjusted_error`, `mahalanobis_distance`, `knn_distance` or `fused`, a column of this table.';
COMMENT ON COLUMN images.severity_percentile IS 'Share of the reference whose score is at or below this one, 0 to 100. Unit: percent. Null where the score is null.';
COMMENT ON COLUMN images.p_value IS 'Conformal p-value: (1 + number of reference scores at or above this one) / (1 + number of reference scores). Were the image exchangeable with the reference, p <= a would have a chance of at most a (Bates, Candes, Lei, Romano and Sesia, Testing for Outliers with Conformal p-Values, 2023). Null where the score is null.';
COMMENT ON COLUMN images.anomaly_threshold IS 'The cutoff: the pipeline''s fixed value, or the score that the chosen share of the reference lies above; for a false discovery rate, the one that all rows of the partition together allow. Unit: as `anomaly_score`. Null where the score is null, and where a false discovery rate allows no flag in the partition.';
COMMENT ON COLUMN images.is_anomaly IS 'Whether `anomaly_score` is strictly above `anomaly_threshold`. Null where the score is null.';
COMMENT ON COLUMN images.reasons IS 'Why the image is flagged: the rule that decided, and after it all others by whose scores the image lies beyond the same share of the reference. Empty where `is_anomaly` is not true. Elements are never null.';
COMMENT ON COLUMN images.complexity_adjusted_error IS '`top_1pct_squared_error`, divided by what images of the same `complexity` have: exp(a + b ln(complexity)), with the least-squares line through the logarithms of the reference. Outside of the complexities of the reference, the quotient at the line''s end times the factor by which the image is outside. 1 is as usual. Null where the model has no reconstruction, of features, which have no complexity, and where the image could not be scored.';
COMMENT ON COLUMN images.mahalanobis_distance IS 'sqrt((x - m)'' S^-1 (x - m)) of the embedding x, with the mean m and the covariance S of the reference, shrunk after Ledoit and Wolf (2004). Where the embedding has regions, the largest of the regions'' distances (compare PaDiM, 2021). Unit: standard deviations. Null where the reference has too few rows for a covariance, and where the image could not be scored.';
COMMENT ON COLUMN images.knn_distance IS 'Distance to the k-th nearest embedding of the reference ([anomaly] k), never to the image itself. Unit: unit of the metric. Null where the embedding has no direction (all zeros, by `cosine`), where the reference has fewer than k others, and where the image could not be scored.';
COMMENT ON COLUMN images.fused IS 'Mean of the three scores above, as far as the model has them, each as max(-3, (ln(score) - mean) / deviation) with mean and standard deviation of the logarithms in the reference: 0 is as usual. Unit: standard deviations. Null where a score that every row of the reference has is null, and where the image could not be scored.';
COMMENT ON COLUMN images.segment IS 'Value of the column that [anomaly] segment names: the image is compared with reference rows of the same value. Null where none is named.';
COMMENT ON COLUMN images.reference_id IS 'Fingerprint of the reference scored against. Percentiles and p-values compare between rows of one reference only.';
COMMENT ON COLUMN images.anomalies_run_id IS 'Fingerprint of all that the row depends on: the rows of `latents`, the reference, the rule and the threshold. `run_id` in `runs`.';
COMMENT ON COLUMN images.group_id IS 'The group: a fingerprint of its representative''s id and partition, 32 hexadecimal digits, the same in every run in which that image represents a group.';
COMMENT ON COLUMN images.representative_id IS 'The image that represents the group; `image_id` of `latents`. The image itself where it represents its group, or is alone in it.';
COMMENT ON COLUMN images.representative_partition IS 'Partition of the representative, as `key=value` pairs joined by slashes. Null where the table has no partitions.';
COMMENT ON COLUMN images.distance_to_representative IS 'Distance of the image to its representative, at most `duplicate_distance`; 0 for the representative and for images of the same bytes. Unit: as `distance` in `neighbors`.';
COMMENT ON COLUMN images.group_size IS 'Images in the group, in all partitions, this one included; 1 for an image that is like no other. Unit: images.';
COMMENT ON COLUMN images.groups_run_id IS 'Fingerprint of all that the row depends on: the rows of `latents` and of `neighbors`, and the threshold. `groups_run_id` in `runs`.';
COMMENT ON COLUMN images.nearest_id IS 'The nearest neighbor; `image_id` of `latents`.';
COMMENT ON COLUMN images.nearest_partition IS 'Its partition, as `key=value` pairs joined by slashes. Null where the table has no partitions.';
COMMENT ON COLUMN images.nearest_distance IS 'Distance of the two embeddings a and b; smaller is nearer. `cosine`: 1 - cos(a, b), 0 to 2. `l2`: |a - b|. `inner_product`: -a.b. Unit: 1 for cosine; unit of the embedding for l2; its square for inner_product.';
COMMENT ON COLUMN images.neighbors_run_id IS 'Fingerprint of all that the list depends on: the rows that were searched, k, metric and scope. `neighbors_run_id` in `runs`.';
