-- Which images of yesterday are strange, and where are they?
--
-- Adapt: `uri` is the kept column that says where a picture is ([source] columns = ["uri"]); for a folder of images, image_id is the path
-- below it. The partition key is `ds`, a string such as 2026-11-22. "Yesterday" is the session's; for another day write it in its place.
WITH params AS (
  SELECT CAST(CAST(CURRENT_DATE - INTERVAL 1 DAY AS DATE) AS VARCHAR) AS day
)
SELECT i.image_id, i.uri, i.anomaly_score, i.severity_percentile, i.p_value, i.rule, i.reasons, i.nearest_id, i.nearest_distance
FROM images AS i
CROSS JOIN params AS p
WHERE i.ds = p.day AND i.is_anomaly
ORDER BY i.anomaly_score DESC, i.image_id;
