-- Which partitions as a whole are no longer like the reference, and in what?
--
-- Takes the newest comparison of each partition that `runs` has. Needs [anomaly] reference. `runs.drift` in schemas/ says what the
-- metrics are.
--
-- Adapt: leave out the last condition to see all checks, also those that found nothing.
WITH newest AS (
  SELECT
    r.partition AS image_partition,
    r.finished_at,
    r.drift,
    ROW_NUMBER() OVER (PARTITION BY r.partition ORDER BY r.finished_at DESC) AS place
  FROM runs AS r
  -- An array is never null here.
  WHERE ARRAY_LENGTH(r.drift) > 0
),
checks AS (
  SELECT n.image_partition, n.finished_at, c
  FROM newest AS n
  CROSS JOIN UNNEST(n.drift) AS c
  WHERE n.place = 1
)
SELECT
  k.image_partition,
  k.finished_at,
  k.c.input AS input,
  k.c.metric AS metric,
  k.c.value AS value,
  k.c.threshold AS threshold,
  k.c.p_value AS p_value,
  k.c.rows AS rows_compared
FROM checks AS k
WHERE k.c.is_anomaly
ORDER BY k.image_partition, k.c.value / k.c.threshold DESC, k.c.input, k.c.metric;
