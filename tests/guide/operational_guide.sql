-- Every SQL statement of the Nexus Hub's operational guide, as it stands there. Run by tests/blackbox/guide.rs, through psql.

SELECT * FROM rotate_vault_key();

SELECT * FROM cron.job WHERE jobname = 'cleanup-old-job-results';

SELECT * FROM cron.job_run_details 
WHERE jobid = (SELECT jobid FROM cron.job WHERE jobname = 'cleanup-old-job-results')
ORDER BY start_time DESC
LIMIT 10;

SELECT * FROM cleanup_job_results_manual();

SELECT * FROM cleanup_job_results_manual(14, 2);

SELECT 
  COUNT(*) as total_jobs,
  COUNT(*) FILTER (WHERE status = 'completed') as completed,
  COUNT(*) FILTER (WHERE status = 'failed') as failed,
  COUNT(*) FILTER (WHERE status = 'pending') as pending,
  COUNT(*) FILTER (WHERE status = 'running') as running,
  COUNT(*) FILTER (WHERE created_at < now() - interval '7 days') as older_than_7_days,
  pg_size_pretty(pg_total_relation_size('job_results')) as table_size,
  pg_size_pretty(pg_relation_size('job_results')) as table_data_size,
  pg_size_pretty(pg_indexes_size('job_results')) as indexes_size
FROM job_results;

SELECT 
  DATE(created_at) as date,
  COUNT(*) as jobs_created,
  COUNT(*) FILTER (WHERE status = 'completed') as completed,
  COUNT(*) FILTER (WHERE status = 'failed') as failed
FROM job_results
WHERE created_at > now() - interval '30 days'
GROUP BY DATE(created_at)
ORDER BY date DESC;

SELECT 
  COUNT(*) FILTER (WHERE expires_at > now()) as active_cached_tools,
  COUNT(*) FILTER (WHERE expires_at < now()) as expired_tools,
  COUNT(DISTINCT server_ref_id) as unique_servers_cached
FROM tool_cache;

SELECT 
  server_id,
  COUNT(*) as violations,
  MAX(window_start) as last_violation
FROM rate_limit_tracking
WHERE request_count > (
  SELECT rate_limit_per_minute 
  FROM system_servers 
  WHERE id = rate_limit_tracking.server_id
)
GROUP BY server_id
ORDER BY violations DESC;

SELECT current_setting('app.vault_key', true);

SELECT id, length(config_encrypted) as encrypted_length
FROM user_servers
LIMIT 5;

SELECT id, job_type, server_id, created_at, status
FROM job_results
WHERE status IN ('pending', 'running')
  AND created_at < now() - interval '1 hour'
ORDER BY created_at;

UPDATE job_results
SET status = 'cancelled', completed_at = now()
WHERE status IN ('pending', 'running')
  AND created_at < now() - interval '1 hour';

SELECT server_ref_id, MAX(expires_at) as latest_expiration
FROM tool_cache
GROUP BY server_ref_id;

SELECT 
  schemaname,
  tablename,
  pg_size_pretty(pg_total_relation_size(schemaname||'.'||tablename)) as size
FROM pg_tables
WHERE schemaname = 'public'
ORDER BY pg_total_relation_size(schemaname||'.'||tablename) DESC;

SELECT * FROM cleanup_job_results_manual(7, 1);

ANALYZE job_results;
ANALYZE tool_cache;

TRUNCATE user_servers;
\copy user_servers FROM 'user_servers_backup.csv' CSV HEADER;
