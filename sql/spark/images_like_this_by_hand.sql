-- Which images look most like this one?
--
-- The same as images_like_this.sql, with functions that every Spark from 3.4 has: the cosine as a sum of products, by the norms of both.
--
-- Adapt: the image and its day, and the last line.
WITH params AS (
  SELECT 'cell0002' AS image_id, '2026-11-22' AS ds
),
vectors AS (
  SELECT
    i.image_id, i.ds, i.uri, i.model_sha256, i.embedding,
    SQRT(aggregate(i.embedding, 0D, (total, x) -> total + CAST(x AS DOUBLE) * x)) AS norm
  FROM images AS i
  WHERE i.embedding IS NOT NULL
),
query AS (
  SELECT v.*
  FROM vectors AS v
  JOIN params AS p ON p.image_id = v.image_id AND p.ds = v.ds
)
SELECT
  v.image_id,
  v.ds,
  v.uri,
  1 - aggregate(zip_with(v.embedding, q.embedding, (x, y) -> CAST(x AS DOUBLE) * y), 0D, (total, x) -> total + x) / (v.norm * q.norm) AS distance
FROM vectors AS v
JOIN query AS q ON q.model_sha256 = v.model_sha256
WHERE v.image_id <> q.image_id OR v.ds IS DISTINCT FROM q.ds
ORDER BY distance, v.ds, v.image_id
LIMIT 10;
