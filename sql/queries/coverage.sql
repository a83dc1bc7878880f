-- Is every day there, and how much of it could be used?
--
-- A day is settled when its rows are those that the newest run has recorded for it: the same run ids in all tables, and as many rows.
-- Between two commits of a run, or after one that did not come to its end, it is not. A day without any row is missing in the result.
--
-- Adapt: the days.
WITH params AS (
  SELECT '2026-11-01' AS first_day, '2026-11-30' AS last_day
),
found AS (
  SELECT
    i.ds,
    i.image_partition,
    COUNT(*) AS images,
    SUM(CASE WHEN i.status = 'ok' THEN 1 ELSE 0 END) AS usable,
    COUNT(i.anomaly_score) AS scored,
    COUNT(i.nearest_id) AS with_neighbors,
    COUNT(i.group_id) AS grouped,
    MIN(i.latents_run_id) AS latents_run_id,
    MIN(i.neighbors_run_id) AS neighbors_run_id,
    MIN(i.groups_run_id) AS groups_run_id,
    MIN(i.anomalies_run_id) AS anomalies_run_id
  FROM images AS i
  CROSS JOIN params AS p
  WHERE i.ds BETWEEN p.first_day AND p.last_day
  GROUP BY i.ds, i.image_partition
),
recorded AS (
  SELECT
    r.partition AS image_partition,
    r.rows_in,
    r.finished_at,
    r.latents_run_id,
    r.neighbors_run_id,
    r.groups_run_id,
    r.run_id AS anomalies_run_id,
    ROW_NUMBER() OVER (PARTITION BY r.partition ORDER BY r.finished_at DESC) AS place
  FROM runs AS r
)
SELECT
  f.ds,
  f.images,
  f.usable,
  f.scored,
  f.with_neighbors,
  f.grouped,
  1e0 * f.usable / f.images AS usable_share,
  r.finished_at AS settled_at,
  -- A table without a row of the day has no run id to compare: all its images were rejected, or the pipeline does not write the table.
  r.rows_in = f.images
    AND r.latents_run_id = f.latents_run_id
    AND COALESCE(r.neighbors_run_id = f.neighbors_run_id, f.neighbors_run_id IS NULL)
    AND COALESCE(r.groups_run_id = f.groups_run_id, f.groups_run_id IS NULL)
    AND COALESCE(r.anomalies_run_id = f.anomalies_run_id, f.anomalies_run_id IS NULL) AS is_settled
FROM found AS f
LEFT JOIN recorded AS r ON r.image_partition IS NOT DISTINCT FROM f.image_partition AND r.place = 1
ORDER BY f.ds;
