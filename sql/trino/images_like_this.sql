-- Which images look most like this one?
--
-- Compares its vector with all others of the same model, by cosine_similarity of arrays of doubles. `neighbors` has the k nearest of
-- each image already; this is for more of them, among other rows, or by other conditions.
--
-- Adapt: the image and its day, and the last line. Where cosine_similarity takes no arrays yet, divide the inner product of both,
-- reduce(zip_with(a, b, (x, y) -> x * y), 0e0, (s, x) -> s + x, s -> s), by the roots of each one's with itself; for the metric `l2`,
-- it is the root of the sum of (x - y) * (x - y), for `inner_product` the negative inner product.
WITH params AS (
  SELECT 'cell0002' AS image_id, '2026-11-22' AS ds
),
query AS (
  SELECT i.image_id, i.ds, i.model_sha256, CAST(i.embedding AS array(double)) AS embedding
  FROM images AS i
  JOIN params AS p ON p.image_id = i.image_id AND p.ds = i.ds
)
SELECT i.image_id, i.ds, i.uri, 1 - cosine_similarity(CAST(i.embedding AS array(double)), q.embedding) AS distance
FROM images AS i
JOIN query AS q ON q.model_sha256 = i.model_sha256
WHERE i.embedding IS NOT NULL AND (i.image_id <> q.image_id OR i.ds IS DISTINCT FROM q.ds)
ORDER BY distance, i.ds, i.image_id
LIMIT 10;
