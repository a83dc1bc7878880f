-- Which share of the images is flagged each day, and is that within what chance explains?
--
-- A p-chart: the center line is the share of all days together, and the control limits lie three standard deviations of a binomial
-- share around it, wider on days with few images (NIST/SEMATECH e-Handbook of Statistical Methods, 6.3.3.2,
-- https://www.itl.nist.gov/div898/handbook/pmc/section3/pmc332.htm). By chance alone, about one day in 370 lies outside.
-- Images that could not be scored are not counted.
--
-- Adapt: the days. Choose a quiet stretch for the center line, so that a bad week does not widen what is called normal.
WITH params AS (
  SELECT '2026-11-01' AS first_day, '2026-11-30' AS last_day, '2026-11-01' AS first_quiet_day, '2026-11-30' AS last_quiet_day
),
by_day AS (
  SELECT ds, COUNT(is_anomaly) AS judged, SUM(CASE WHEN is_anomaly THEN 1 ELSE 0 END) AS flagged
  FROM images
  WHERE is_anomaly IS NOT NULL
  GROUP BY ds
),
center AS (
  SELECT 1e0 * SUM(d.flagged) / SUM(d.judged) AS rate
  FROM by_day AS d
  CROSS JOIN params AS p
  WHERE d.ds BETWEEN p.first_quiet_day AND p.last_quiet_day
),
chart AS (
  SELECT
    d.ds,
    d.judged,
    d.flagged,
    1e0 * d.flagged / d.judged AS rate,
    c.rate AS center,
    GREATEST(0e0, c.rate - 3e0 * SQRT(c.rate * (1e0 - c.rate) / d.judged)) AS lower_limit,
    LEAST(1e0, c.rate + 3e0 * SQRT(c.rate * (1e0 - c.rate) / d.judged)) AS upper_limit
  FROM by_day AS d
  CROSS JOIN center AS c
  CROSS JOIN params AS p
  WHERE d.ds BETWEEN p.first_day AND p.last_day
)
SELECT ds, judged, flagged, rate, center, lower_limit, upper_limit, rate < lower_limit OR rate > upper_limit AS is_out_of_control
FROM chart
ORDER BY ds;
