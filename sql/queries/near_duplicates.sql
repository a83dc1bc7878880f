-- Which images can be deleted since another one stands for them, and how many bytes does that save?
--
-- Of each group its representative stays: the one with the most pixels, then bytes, then the smallest id. Needs [neighbors]
-- duplicate_distance. Look at some pairs before you delete anything: uri and kept_uri are the kept column that says where the picture is.
--
-- Adapt: max_distance, to be stricter than the pipeline was; 0 leaves files that are equal to the last byte, and pictures that the
-- model cannot tell apart.
WITH params AS (
  SELECT 1.0 AS max_distance
)
SELECT
  i.group_id,
  i.image_id,
  i.ds,
  i.uri,
  i.distance_to_representative,
  i.image_bytes AS bytes_saved,
  SUM(i.image_bytes) OVER () AS bytes_saved_by_all,
  kept.image_id AS kept_id,
  kept.ds AS kept_ds,
  kept.uri AS kept_uri
FROM images AS i
CROSS JOIN params AS p
JOIN images AS kept
  ON kept.image_id = i.representative_id AND kept.image_partition IS NOT DISTINCT FROM i.representative_partition
WHERE i.distance_to_representative <= p.max_distance
  -- The representative itself stays.
  AND (i.image_id <> i.representative_id OR i.image_partition IS DISTINCT FROM i.representative_partition)
ORDER BY i.group_id, i.distance_to_representative, i.ds, i.image_id;
