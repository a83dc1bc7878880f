-- Which images look most like this one?
--
-- Compares its vector with all others of the same model, by array_cosine_distance of arrays of a fixed length. `neighbors` has the k
-- nearest of each image already; this is for more of them, among other rows, or by other conditions.
--
-- Adapt: the image and its day, 128 in both places to the length of your vectors, and the last line. For the metric `l2` it is
-- array_distance, for `inner_product` array_negative_inner_product.
WITH params AS (
  SELECT 'cell0002' AS image_id, '2026-11-22' AS ds
),
query AS (
  SELECT i.image_id, i.ds, i.model_sha256, CAST(i.embedding AS FLOAT[128]) AS embedding
  FROM images AS i
  JOIN params AS p ON p.image_id = i.image_id AND p.ds = i.ds
)
SELECT i.image_id, i.ds, i.uri, array_cosine_distance(CAST(i.embedding AS FLOAT[128]), q.embedding) AS distance
FROM images AS i
JOIN query AS q ON q.model_sha256 = i.model_sha256
WHERE i.embedding IS NOT NULL AND (i.image_id <> q.image_id OR i.ds IS DISTINCT FROM q.ds)
ORDER BY distance, i.ds, i.image_id
LIMIT 10;
