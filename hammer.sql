begin;
select cancel_job(id) from job_results where status='running' order by random() limit 5 \gset
select retry_job(id) from job_results where status='cancelled' limit 50 \gset
commit;
