-- Which images are the strangest of each segment?
--
-- Adapt: the days, and how many images. `segment` is the value of the column that [anomaly] segment names; any kept column can take
-- its place, such as i.split. Scores of different rules, or of different references, are no order: compare within one reference_id.
WITH params AS (
  SELECT '2026-11-01' AS first_day, '2026-11-30' AS last_day, 10 AS num_images
),
ranked AS (
  SELECT
    i.segment,
    ROW_NUMBER() OVER (PARTITION BY i.segment ORDER BY i.anomaly_score DESC, i.ds, i.image_id) AS place,
    i.image_id,
    i.ds,
    i.uri,
    i.rule,
    i.anomaly_score,
    i.severity_percentile,
    i.p_value,
    i.is_anomaly,
    p.num_images
  FROM images AS i
  CROSS JOIN params AS p
  WHERE i.anomaly_score IS NOT NULL AND i.ds BETWEEN p.first_day AND p.last_day
)
SELECT segment, place, image_id, ds, uri, rule, anomaly_score, severity_percentile, p_value, is_anomaly
FROM ranked
WHERE place <= num_images
ORDER BY segment, place;
