-- Why could images not be used, how many, and which is an example?
--
-- Adapt: the days. For one cause, list its rows: SELECT image_id, ds, uri, error_message FROM images WHERE status = 'truncated_image'.
WITH params AS (
  SELECT '2026-11-01' AS first_day, '2026-11-30' AS last_day
),
by_status AS (
  SELECT
    i.status,
    COUNT(*) AS images,
    MIN(i.ds) AS first_seen,
    MAX(i.ds) AS last_seen,
    MIN(i.image_id) AS example_id,
    MIN(i.error_message) AS example_message
  FROM images AS i
  CROSS JOIN params AS p
  WHERE i.ds BETWEEN p.first_day AND p.last_day
  GROUP BY i.status
),
shared AS (
  SELECT status, images, 1e0 * images / SUM(images) OVER () AS share_of_all, first_seen, last_seen, example_id, example_message
  FROM by_status
)
SELECT status, images, share_of_all, first_seen, last_seen, example_id, example_message
FROM shared
WHERE status <> 'ok'
ORDER BY images DESC, status;
