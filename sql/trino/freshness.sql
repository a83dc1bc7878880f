-- When did each pipeline last change its tables, and is that too long ago?
--
-- A run that finds nothing to do writes no row: where days come in every night, silence means that the job or its source has stopped.
-- `newest_partition` is the last one by name, which is the newest day where the key is a day.
--
-- Adapt: max_hours.
WITH params AS (
  SELECT 26 AS max_hours
),
latest AS (
  SELECT
    r.pipeline,
    MAX(r.partition) AS newest_partition,
    MAX(r.finished_at) AS last_change,
    date_diff('second', MAX(r.finished_at), CURRENT_TIMESTAMP) / 3600e0 AS hours_ago
  FROM runs AS r
  GROUP BY r.pipeline
)
SELECT l.pipeline, l.newest_partition, l.last_change, l.hours_ago, l.hours_ago > p.max_hours AS is_stale
FROM latest AS l
CROSS JOIN params AS p
ORDER BY l.pipeline;
