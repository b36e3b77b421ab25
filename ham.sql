\set QUIET on
update job_results set status='pending' where id in (select id from job_results where status='running' order by random() limit 5 for update skip locked);
