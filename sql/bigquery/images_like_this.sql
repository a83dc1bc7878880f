-- Which images look most like this one?
--
-- Compares its vector with all others: VECTOR_SEARCH, exactly and without an index. `neighbors` has the k nearest of each image already;
-- this is for more of them, among other rows, or by other conditions. Vectors of one model only can be compared.
--
-- Adapt: the image and its day, and the numbers of rows. For the metric `l2` it is EUCLIDEAN, for `inner_product` DOT_PRODUCT. A view is not
-- accepted as what is searched: put `latents` in place of latents_delta where you have loaded it from Parquet.
WITH params AS (
  SELECT 'cell0002' AS image_id, '2026-11-22' AS ds
)
SELECT base.image_id, base.ds, base.uri, distance
FROM VECTOR_SEARCH(
  (SELECT image_id, ds, uri, embedding FROM latents_delta WHERE status = 'ok'),
  'embedding',
  (SELECT i.image_id, i.ds, i.embedding FROM images AS i JOIN params AS p ON p.image_id = i.image_id AND p.ds = i.ds),
  query_column_to_search => 'embedding',
  -- One more than is wanted, for the image itself is found too.
  top_k => 11,
  distance_type => 'COSINE',
  options => '{"use_brute_force": true}'
)
WHERE base.image_id <> query.image_id OR base.ds IS DISTINCT FROM query.ds
ORDER BY distance, base.ds, base.image_id
LIMIT 10;
