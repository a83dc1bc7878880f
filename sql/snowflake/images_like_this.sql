-- Which images look most like this one?
--
-- Compares its vector with all others of the same model, by VECTOR_COSINE_SIMILARITY of vectors of a fixed length, at most 4,096.
-- `neighbors` has the k nearest of each image already; this is for more of them, among other rows, or by other conditions.
--
-- Adapt: the image and its day, 128 in both places to the length of your vectors, and the last line. For the metric `l2` it is
-- VECTOR_L2_DISTANCE, for `inner_product` -VECTOR_INNER_PRODUCT. The first cast is for the arrays of Iceberg tables, which are of another kind
-- than those that can be cast to a vector.
WITH params AS (
  SELECT 'cell0002' AS image_id, '2026-11-22' AS ds
),
query AS (
  SELECT i.image_id, i.ds, i.model_sha256, i.embedding::ARRAY::VECTOR(FLOAT, 128) AS embedding
  FROM images AS i
  JOIN params AS p ON p.image_id = i.image_id AND p.ds = i.ds
)
SELECT i.image_id, i.ds, i.uri, 1 - VECTOR_COSINE_SIMILARITY(i.embedding::ARRAY::VECTOR(FLOAT, 128), q.embedding) AS distance
FROM images AS i
JOIN query AS q ON q.model_sha256 = i.model_sha256
WHERE i.embedding IS NOT NULL AND (i.image_id <> q.image_id OR i.ds IS DISTINCT FROM q.ds)
ORDER BY distance, i.ds, i.image_id
LIMIT 10;
