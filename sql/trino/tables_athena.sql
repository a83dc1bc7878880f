-- Written by sql/generate.py from schemas/.
--
-- The tables in Athena. They lie below s3://lake/lookalike: put your own place there. Columns come from the Delta log.

CREATE EXTERNAL TABLE `latents`
LOCATION 's3://lake/lookalike/latents/'
TBLPROPERTIES ('table_type' = 'DELTA');

CREATE EXTERNAL TABLE `neighbors`
LOCATION 's3://lake/lookalike/neighbors/'
TBLPROPERTIES ('table_type' = 'DELTA');

CREATE EXTERNAL TABLE `groups`
LOCATION 's3://lake/lookalike/groups/'
TBLPROPERTIES ('table_type' = 'DELTA');

CREATE EXTERNAL TABLE `anomalies`
LOCATION 's3://lake/lookalike/anomalies/'
TBLPROPERTIES ('table_type' = 'DELTA');

CREATE EXTERNAL TABLE `runs`
LOCATION 's3://lake/lookalike/runs/'
TBLPROPERTIES ('table_type' = 'DELTA');
