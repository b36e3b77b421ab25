//! What is counted, and how it is told: the text format of Prometheus, version 0.0.4
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>).

use super::job::JobType;
use std::fmt::Write;
use std::time::Duration;

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Completed,
    Failed,
    /// It is tried again.
    Retried,
    /// An executor elsewhere goes on with it.
    HandedOver,
}

/// What a sealed or opened value came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vault {
    Encrypted,
    NotEncrypted,
    Decrypted,
    NotDecrypted,
}

/// A number that only grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Attempts that have ended.
    Attempts(JobType, Ending),
    Vault(Vault),
    /// Jobs of a worker that was gone.
    GivenBack,
    DeletedJobs,
    DeletedAttempts,
    /// Jobs that were ended because whoever ran them had not.
    FailedOrphans,
    /// Transactions of the worker.
    FailedTransactions,
    Loops,
}

const TYPES: [(JobType, &str); 5] = [
    (JobType::ToolInvoke, "tool_invoke"),
    (JobType::ResourceFetch, "resource_fetch"),
    (JobType::PromptExecute, "prompt_execute"),
    (JobType::ServerSync, "server_sync"),
    (JobType::HttpRequest, "http_request"),
];
const ENDINGS: [Ending; 4] = [Ending::Completed, Ending::Failed, Ending::Retried, Ending::HandedOver];
const VAULT: [(Vault, &str, &str); 4] = [
    (Vault::Encrypted, "encrypt", "ok"),
    (Vault::NotEncrypted, "encrypt", "failed"),
    (Vault::Decrypted, "decrypt", "ok"),
    (Vault::NotDecrypted, "decrypt", "failed"),
];
const OTHERS: [Counter; 6] = [
    Counter::GivenBack,
    Counter::DeletedJobs,
    Counter::DeletedAttempts,
    Counter::FailedOrphans,
    Counter::FailedTransactions,
    Counter::Loops,
];
const AT_VAULT: usize = TYPES.len() * ENDINGS.len();
const AT_OTHERS: usize = AT_VAULT + VAULT.len();
const AT_LATENCY: usize = AT_OTHERS + OTHERS.len();
/// Upper bounds of the buckets of times, in milliseconds; above the last one all that take longer.
const BOUNDS_MS: [u32; 14] = [1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000];
/// Each bucket by itself, the one above all bounds, and the sum in microseconds.
const LATENCY: usize = BOUNDS_MS.len() + 2;

/// How many numbers there are.
pub const COUNT: usize = AT_LATENCY + TYPES.len() * LATENCY;

fn number_of(job: JobType) -> usize {
    TYPES.iter().position(|(other, _)| *other == job).unwrap_or_default()
}

impl Counter {
    /// Its place among all numbers.
    pub fn place(self) -> usize {
        match self {
            Self::Attempts(job, ending) => {
                let ending = ENDINGS.iter().position(|other| *other == ending).unwrap_or_default();
                number_of(job) * ENDINGS.len() + ending
            }
            Self::Vault(what) => AT_VAULT + VAULT.iter().position(|(other, ..)| *other == what).unwrap_or_default(),
            other => AT_OTHERS + OTHERS.iter().position(|one| *one == other).unwrap_or_default(),
        }
    }
}

/// What an attempt's time adds to: a bucket, and the sum, with what is to be added.
pub fn latency(job: JobType, time: Duration) -> [(usize, u64); 2] {
    let first = AT_LATENCY + number_of(job) * LATENCY;
    let bucket = BOUNDS_MS.iter().position(|bound| time <= Duration::from_millis(u64::from(*bound)));
    let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    [(first + bucket.unwrap_or(BOUNDS_MS.len()), 1), (first + LATENCY - 1, micros)]
}

/// A worker of the database.
#[derive(Clone, Copy, Debug)]
pub struct WorkerGauge {
    pub number: u16,
    pub is_up: bool,
    /// Seconds since 1970.
    pub last_loop: Option<f64>,
    pub in_flight: u32,
}

/// What is as it is, and not counted.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    pub database: String,
    pub version: &'static str,
    pub workers: Vec<WorkerGauge>,
    pub pending: Option<i64>,
    pub oldest_pending_seconds: Option<f64>,
    pub table_rows: Option<i64>,
    pub table_bytes: Option<i64>,
    pub unreachable_hosts: Option<i64>,
    pub cache_entries: Option<i64>,
    pub cache_expired_share: Option<f64>,
    pub failing_syncs: Option<i64>,
    pub rate: Option<RateGauges>,
}

/// Rate limits, of all databases.
#[derive(Clone, Copy, Debug)]
pub struct RateGauges {
    pub allowed: u64,
    pub denied: u64,
    pub exempt: u64,
    pub no_room: u64,
    pub keys: u64,
    pub max_keys: u64,
}

/// A text of metrics, being written. Writing to a string cannot fail.
#[derive(Default)]
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        _ = writeln!(self.0, "# HELP nexus_hub_{name} {help}\n# TYPE nexus_hub_{name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        _ = write!(self.0, "nexus_hub_{name}");
        for (at, (label, text)) in labels.iter().enumerate() {
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            _ = write!(self.0, "{}{label}=\"{text}\"", if at == 0 { '{' } else { ',' });
        }
        _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: Option<impl std::fmt::Display>) {
        if let Some(value) = value {
            self.family(name, kind, help);
            self.sample(name, &[], value);
        }
    }
}

/// The page that Prometheus reads. `count`: what stands at each place; none: there is no shared memory.
pub fn page(count: Option<&dyn Fn(usize) -> u64>, gauges: &Gauges) -> String {
    let mut page = Page::default();
    page.family("info", "gauge", "The library's version, and the database that all of this is about.");
    page.sample("info", &[("version", gauges.version), ("database", &gauges.database)], 1);
    if let Some(count) = count {
        counters(&mut page, count);
        workers(&mut page, gauges);
    }
    page.single("pending_jobs", "gauge", "Jobs that are due and wait; above 1000 an estimate.", gauges.pending);
    let oldest = gauges.pending.map(|_| gauges.oldest_pending_seconds.unwrap_or(0.0));
    page.single("oldest_pending_job_seconds", "gauge", "How long the job that waits longest has been due.", oldest);
    page.single("job_rows", "gauge", "About how many rows job_results has.", gauges.table_rows);
    page.single("job_bytes", "gauge", "What job_results takes on disk, its indexes included.", gauges.table_bytes);
    let hosts = gauges.unreachable_hosts;
    page.single("unreachable_hosts", "gauge", "Hosts whose circuit breaker is not closed.", hosts);
    let entries = gauges.cache_entries;
    page.single("cache_entries", "gauge", "Entries in the caches, of large ones an estimate.", entries);
    let share = gauges.cache_expired_share;
    page.single("cache_expired_ratio", "gauge", "Share of the caches' entries that is expired, 0 to 1.", share);
    let syncs = gauges.failing_syncs;
    page.single("failing_syncs", "gauge", "Servers whose last sync has failed, 1000 at most.", syncs);
    if let Some(rate) = gauges.rate {
        let help = "Decisions on rate limits, of all databases of the server.";
        page.family("rate_limit_decisions_total", "counter", help);
        let decisions =
            [("allowed", rate.allowed), ("denied", rate.denied), ("exempt", rate.exempt), ("no_room", rate.no_room)];
        for (decision, value) in decisions {
            page.sample("rate_limit_decisions_total", &[("decision", decision)], value);
        }
        page.single("rate_limit_keys", "gauge", "Keys in the table of rate limits.", Some(rate.keys));
        page.single("rate_limit_max_keys", "gauge", "Keys that it has room for.", Some(rate.max_keys));
    }
    page.0
}

fn counters(page: &mut Page, count: &dyn Fn(usize) -> u64) {
    page.family("jobs_total", "counter", "Jobs that the workers have brought to an end.");
    for (job, name) in TYPES {
        for (ending, status) in [(Ending::Completed, "completed"), (Ending::Failed, "failed")] {
            let value = count(Counter::Attempts(job, ending).place());
            page.sample("jobs_total", &[("type", name), ("status", status)], value);
        }
    }
    page.family("job_attempts_total", "counter", "Attempts of jobs that have ended, in whatever way.");
    for (job, name) in TYPES {
        let value: u64 = ENDINGS.iter().map(|ending| count(Counter::Attempts(job, *ending).place())).sum();
        page.sample("job_attempts_total", &[("type", name)], value);
    }
    let single = [
        (Ending::Retried, "job_retries_total", "Attempts that failed and are made again."),
        (Ending::HandedOver, "jobs_handed_over_total", "Jobs that an executor elsewhere has taken over."),
    ];
    for (ending, family, help) in single {
        page.family(family, "counter", help);
        for (job, name) in TYPES {
            page.sample(family, &[("type", name)], count(Counter::Attempts(job, ending).place()));
        }
    }
    histogram(page, count);
    page.family("vault_operations_total", "counter", "Values that were encrypted or decrypted, rotations left out.");
    for (what, operation, outcome) in VAULT {
        let labels = [("operation", operation), ("outcome", outcome)];
        page.sample("vault_operations_total", &labels, count(Counter::Vault(what).place()));
    }
    page.family("cleanup_rows_total", "counter", "Rows that the worker has deleted, or ended, because they were old.");
    let kinds =
        [("jobs", Counter::DeletedJobs), ("attempts", Counter::DeletedAttempts), ("orphans", Counter::FailedOrphans)];
    for (what, counter) in kinds {
        page.sample("cleanup_rows_total", &[("what", what)], count(counter.place()));
    }
    let others = [
        (Counter::GivenBack, "jobs_given_back_total", "Jobs that were given back because their worker was gone."),
        (Counter::FailedTransactions, "worker_failed_transactions_total", "Transactions of the workers that failed."),
        (Counter::Loops, "worker_loops_total", "Times that the workers have looked for something to do."),
    ];
    for (counter, family, help) in others {
        page.single(family, "counter", help, Some(count(counter.place())));
    }
}

fn histogram(page: &mut Page, count: &dyn Fn(usize) -> u64) {
    let help = "From sending the request of an attempt until its answer, or failure, was there.";
    page.family("request_duration_seconds", "histogram", help);
    for (number, (_, name)) in TYPES.iter().enumerate() {
        let first = AT_LATENCY + number * LATENCY;
        let mut total = 0;
        for (at, bound) in BOUNDS_MS.iter().enumerate() {
            total += count(first + at);
            let bound = (f64::from(*bound) / 1000.0).to_string();
            page.sample("request_duration_seconds_bucket", &[("type", name), ("le", &bound)], total);
        }
        total += count(first + BOUNDS_MS.len());
        page.sample("request_duration_seconds_bucket", &[("type", name), ("le", "+Inf")], total);
        let micros = count(first + LATENCY - 1);
        page.sample("request_duration_seconds_sum", &[("type", name)], micros as f64 / 1e6);
        page.sample("request_duration_seconds_count", &[("type", name)], total);
    }
}

fn workers(page: &mut Page, gauges: &Gauges) {
    let mut each = |family: &str, help: &str, value: &dyn Fn(&WorkerGauge) -> Option<f64>| {
        page.family(family, "gauge", help);
        for worker in &gauges.workers {
            if let Some(value) = value(worker) {
                page.sample(family, &[("number", &worker.number.to_string())], value);
            }
        }
    };
    each("worker_up", "Whether the worker is there and was seen at work lately.", &|worker| {
        Some(f64::from(u8::from(worker.is_up)))
    });
    each("worker_last_loop_timestamp_seconds", "When the worker was seen at work last.", &|worker| worker.last_loop);
    each("requests_in_flight", "Requests that the worker has in flight.", &|worker| Some(worker.in_flight.into()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn all() -> Vec<Counter> {
        let attempts = TYPES.iter().flat_map(|(job, _)| ENDINGS.map(|ending| Counter::Attempts(*job, ending)));
        attempts.chain(VAULT.map(|(what, ..)| Counter::Vault(what))).chain(OTHERS).collect()
    }

    #[test]
    fn each_number_has_a_place_of_its_own() {
        let mut places: HashSet<_> = all().into_iter().map(Counter::place).collect();
        assert_eq!(places.len(), AT_LATENCY);
        for (job, _) in TYPES {
            let times = BOUNDS_MS.map(|bound| latency(job, Duration::from_millis(bound.into()))[0].0);
            places.extend(times);
            places.extend(latency(job, Duration::from_secs(3600)).map(|(place, _)| place));
        }
        assert_eq!(places, (0..COUNT).collect());
    }

    #[test]
    fn a_time_is_in_the_bucket_of_its_bound_and_in_the_sum() {
        let at = |micros| latency(JobType::ToolInvoke, Duration::from_micros(micros));
        assert_eq!(at(0), [(AT_LATENCY, 1), (AT_LATENCY + LATENCY - 1, 0)]);
        assert_eq!(at(1000)[0], (AT_LATENCY, 1));
        assert_eq!(at(1001), [(AT_LATENCY + 1, 1), (AT_LATENCY + LATENCY - 1, 1001)]);
        assert_eq!(at(60_000_001)[0], (AT_LATENCY + BOUNDS_MS.len(), 1));
    }

    fn text(values: &[(usize, u64)], gauges: &Gauges) -> String {
        let mut all = [0; COUNT];
        values.iter().for_each(|(place, value)| all[*place] += value);
        page(Some(&|place| all[place]), gauges)
    }

    #[test]
    fn buckets_are_told_as_sums_of_all_below_them() {
        let times =
            [300, 2_000, 2_000, 90_000_000].map(|micros| latency(JobType::HttpRequest, Duration::from_micros(micros)));
        let text = text(&times.concat(), &Gauges::default());
        for line in [
            "nexus_hub_request_duration_seconds_bucket{type=\"http_request\",le=\"0.001\"} 1",
            "nexus_hub_request_duration_seconds_bucket{type=\"http_request\",le=\"0.005\"} 3",
            "nexus_hub_request_duration_seconds_bucket{type=\"http_request\",le=\"60\"} 3",
            "nexus_hub_request_duration_seconds_bucket{type=\"http_request\",le=\"+Inf\"} 4",
            "nexus_hub_request_duration_seconds_sum{type=\"http_request\"} 90.0043",
            "nexus_hub_request_duration_seconds_count{type=\"http_request\"} 4",
            "nexus_hub_request_duration_seconds_count{type=\"tool_invoke\"} 0",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn attempts_are_all_endings_and_jobs_the_last_ones() {
        let one = |ending| (Counter::Attempts(JobType::PromptExecute, ending).place(), 1);
        let text = text(&ENDINGS.map(one), &Gauges::default());
        for line in [
            "nexus_hub_jobs_total{type=\"prompt_execute\",status=\"completed\"} 1",
            "nexus_hub_jobs_total{type=\"prompt_execute\",status=\"failed\"} 1",
            "nexus_hub_job_attempts_total{type=\"prompt_execute\"} 4",
            "nexus_hub_job_retries_total{type=\"prompt_execute\"} 1",
            "nexus_hub_jobs_handed_over_total{type=\"prompt_execute\"} 1",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn each_family_is_announced_once_before_its_samples_and_labels_are_escaped() {
        let worker = WorkerGauge { number: 3, is_up: true, last_loop: Some(1.5), in_flight: 7 };
        let gauges = Gauges {
            database: "a\\b\"c\nd".into(),
            version: "9.9",
            workers: vec![worker],
            pending: Some(4),
            ..Gauges::default()
        };
        let text = text(&[], &gauges);
        assert!(text.contains("nexus_hub_info{version=\"9.9\",database=\"a\\\\b\\\"c\\nd\"} 1\n"), "{text}");
        assert!(text.contains("nexus_hub_worker_up{number=\"3\"} 1\n"), "{text}");
        assert!(text.contains("nexus_hub_oldest_pending_job_seconds 0\n"), "{text}");
        let mut announced = HashSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let name = rest.split(' ').next().expect("a name");
                assert!(announced.insert(name.to_owned()), "{name} twice");
            } else if !line.starts_with('#') {
                let name = line.split(['{', ' ']).next().expect("a name");
                let family = ["_bucket", "_sum", "_count"]
                    .iter()
                    .find_map(|end| name.strip_suffix(end))
                    .filter(|name| announced.contains(*name));
                assert!(announced.contains(family.unwrap_or(name)), "{line}");
            }
        }
    }

    #[test]
    fn without_shared_memory_nothing_is_counted() {
        let text = page(None, &Gauges { pending: Some(1), ..Gauges::default() });
        assert!(text.contains("nexus_hub_pending_jobs 1\n") && !text.contains("_total"), "{text}");
    }
}
