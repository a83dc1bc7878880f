-- Which test images have a twin among the training images?
--
-- A model that has seen a test image, or one nearly like it, is tested on what it knows. A pair is found where one of the two is in the
-- other's list of neighbors, so k bounds how many twins of an image are found.
--
-- Adapt: the names of the splits in the kept column `split`, and max_distance: take the distance at which pictures of yours are hard to
-- tell apart. With 0 only equal pictures are found.
WITH params AS (
  SELECT 'train' AS train_split, 'test' AS test_split, 0.01 AS max_distance
),
pairs AS (
  SELECT i.image_id, i.image_partition, n.neighbor_id, n.neighbor_partition, n.distance
  FROM neighbors AS n
  JOIN images AS i ON i.image_id = n.image_id AND i.ds IS NOT DISTINCT FROM n.ds
  CROSS JOIN params AS p
  WHERE n.distance <= p.max_distance
),
either_way AS (
  SELECT
    image_id AS test_id, image_partition AS test_partition, neighbor_id AS train_id, neighbor_partition AS train_partition, distance
  FROM pairs
  UNION ALL
  SELECT neighbor_id, neighbor_partition, image_id, image_partition, distance
  FROM pairs
),
once AS (
  SELECT test_id, test_partition, train_id, train_partition, MIN(distance) AS distance
  FROM either_way
  GROUP BY test_id, test_partition, train_id, train_partition
)
SELECT
  test.image_id AS test_id,
  test.ds AS test_ds,
  test.uri AS test_uri,
  train.image_id AS train_id,
  train.ds AS train_ds,
  train.uri AS train_uri,
  o.distance,
  test.content_sha256 = train.content_sha256 AS is_same_file
FROM once AS o
CROSS JOIN params AS p
JOIN images AS test
  ON test.image_id = o.test_id AND test.image_partition IS NOT DISTINCT FROM o.test_partition AND test.split = p.test_split
JOIN images AS train
  ON train.image_id = o.train_id AND train.image_partition IS NOT DISTINCT FROM o.train_partition AND train.split = p.train_split
ORDER BY o.distance, test.ds, test.image_id, train.ds, train.image_id;
