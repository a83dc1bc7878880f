-- Do two models, or two settings of one pipeline, agree on the same images?
--
-- Compares flags, the order of scores, and nearest neighbors of the images that both have scored, and whose files are equal.
-- `rank_correlation` is Spearman's: 1 where both put the images in the same order, whatever the units of their scores; equal scores share
-- the smallest of their ranks. `same_nearest` is the share of images whose nearest neighbor is the same one.
--
-- Adapt: `other.images` is the view of the other pipeline's tables: run tables.sql and images.sql for them in a schema `other`. For an
-- earlier run of the same pipeline, read older versions of its tables there (Spark: VERSION AS OF; Trino: FOR VERSION AS OF).
WITH pairs AS (
  SELECT
    a.model_sha256 AS model_a,
    b.model_sha256 AS model_b,
    a.is_anomaly AS is_anomaly_a,
    b.is_anomaly AS is_anomaly_b,
    RANK() OVER (ORDER BY a.anomaly_score) AS rank_a,
    RANK() OVER (ORDER BY b.anomaly_score) AS rank_b,
    CASE WHEN a.nearest_id = b.nearest_id AND a.nearest_partition IS NOT DISTINCT FROM b.nearest_partition THEN 1 ELSE 0 END AS same_nearest
  FROM images AS a
  JOIN other.images AS b ON b.image_id = a.image_id AND b.ds IS NOT DISTINCT FROM a.ds AND b.content_sha256 = a.content_sha256
  WHERE a.is_anomaly IS NOT NULL AND b.is_anomaly IS NOT NULL
)
SELECT
  MIN(model_a) AS model_a,
  MIN(model_b) AS model_b,
  COUNT(*) AS images,
  SUM(CASE WHEN is_anomaly_a AND is_anomaly_b THEN 1 ELSE 0 END) AS flagged_by_both,
  SUM(CASE WHEN is_anomaly_a AND NOT is_anomaly_b THEN 1 ELSE 0 END) AS flagged_by_a_only,
  SUM(CASE WHEN is_anomaly_b AND NOT is_anomaly_a THEN 1 ELSE 0 END) AS flagged_by_b_only,
  SUM(CASE WHEN is_anomaly_a OR is_anomaly_b THEN 0 ELSE 1 END) AS flagged_by_neither,
  CORR(rank_a, rank_b) AS rank_correlation,
  1e0 * SUM(same_nearest) / COUNT(*) AS same_nearest
FROM pairs;
