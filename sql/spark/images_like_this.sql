-- Which images look most like this one?
--
-- Compares its vector with all others of the same model, by vector_cosine_similarity, which Spark has from 4.2 and Databricks from 18.1;
-- for others see images_like_this_by_hand.sql. `neighbors` has the k nearest of each image already; this is for more of them, among
-- other rows, or by other conditions.
--
-- Adapt: the image and its day, and the last line. For the metric `l2` it is vector_l2_distance, for `inner_product`
-- -vector_inner_product.
WITH params AS (
  SELECT 'cell0002' AS image_id, '2026-11-22' AS ds
),
query AS (
  SELECT i.image_id, i.ds, i.model_sha256, i.embedding AS embedding
  FROM images AS i
  JOIN params AS p ON p.image_id = i.image_id AND p.ds = i.ds
)
SELECT i.image_id, i.ds, i.uri, 1 - vector_cosine_similarity(i.embedding, q.embedding) AS distance
FROM images AS i
JOIN query AS q ON q.model_sha256 = i.model_sha256
WHERE i.embedding IS NOT NULL AND (i.image_id <> q.image_id OR i.ds IS DISTINCT FROM q.ds)
ORDER BY distance, i.ds, i.image_id
LIMIT 10;
