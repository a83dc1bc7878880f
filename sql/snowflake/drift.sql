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
  WHERE r.drift IS NOT NULL
),
checks AS (
  SELECT n.image_partition, n.finished_at, f.value AS c
  FROM newest AS n,
    LATERAL FLATTEN(INPUT => n.drift::ARRAY) AS f
  WHERE n.place = 1
)
SELECT
  k.image_partition,
  k.finished_at,
  k.c:input::VARCHAR AS input,
  k.c:metric::VARCHAR AS metric,
  k.c:value::FLOAT AS value,
  k.c:threshold::FLOAT AS threshold,
  k.c:p_value::FLOAT AS p_value,
  k.c:"rows"::INTEGER AS rows_compared
FROM checks AS k
WHERE k.c:is_anomaly::BOOLEAN
ORDER BY k.image_partition, k.c:value::FLOAT / k.c:threshold::FLOAT DESC, k.c:input::VARCHAR, k.c:metric::VARCHAR;
