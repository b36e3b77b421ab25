//! Private PostgreSQL clusters.

use super::{PATIENCE, wait_until};
use postgres::{Client, NoTls};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// The key that every cluster's vault starts with.
pub const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A running cluster, ended and removed when it is dropped or when the test's process dies.
pub struct Cluster {
    dir: PathBuf,
    bin: PathBuf,
    _keeper: Keeper,
}

/// A shell that cleans up when its input ends, which happens even when this process is killed.
struct Keeper(Child);

impl Keeper {
    fn start(script: &str, arguments: &[&Path]) -> Self {
        let child = as_server_user(Path::new("setsid"))
            .args(["sh", "-c"])
            .arg(format!("cat >/dev/null; {script}"))
            .args(arguments)
            .stdin(Stdio::piped())
            .current_dir("/tmp")
            .spawn()
            .expect("sh");
        Self(child)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// The cluster for tests that need none of their own.
pub fn shared() -> &'static Cluster {
    static SHARED: OnceLock<Cluster> = OnceLock::new();
    SHARED.get_or_init(|| Cluster::start(&[]))
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output().expect("id");
    id.stdout.trim_ascii() == b"0"
}

/// PostgreSQL refuses to run as root; then everything of the cluster is done as the user postgres.
fn as_server_user(program: &Path) -> Command {
    if is_root() {
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--"]).arg(program);
        command
    } else {
        Command::new(program)
    }
}

fn run(command: &mut Command) -> String {
    let output = command.current_dir("/tmp").output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn bin_dir() -> PathBuf {
    let named = std::env::var("NEXUS_HUB_TEST_PG_CONFIG").or_else(|_| std::env::var("PGRX_PG_CONFIG_PATH"));
    let pg_config = named.unwrap_or_else(|_| "pg_config".into());
    PathBuf::from(run(Command::new(pg_config).arg("--bindir")).trim())
}

/// An initialised data directory to copy from: initdb takes longer than all the rest.
fn template(bin: &Path) -> &'static Path {
    static TEMPLATE: OnceLock<(PathBuf, Keeper)> = OnceLock::new();
    let (data, _) = TEMPLATE.get_or_init(|| {
        let dir = fresh_dir("template");
        let keeper = Keeper::start("rm -rf \"$0\"", &[&dir]);
        let data = dir.join("data");
        run(as_server_user(&bin.join("initdb")).arg("-D").arg(&data).args([
            "--auth=trust",
            "--username=postgres",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ]));
        run(as_server_user(Path::new("sh"))
            .args(["-c", "echo \"include_if_exists 'test.conf'\" >>\"$0\"/postgresql.conf"])
            .arg(&data));
        (data, keeper)
    });
    data
}

fn fresh_dir(kind: &str) -> PathBuf {
    // Short, because the path of a socket may have no more than 107 bytes.
    let name = format!("nexus_hub_test.{}.{}.{kind}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let dir = Path::new("/tmp").join(name);
    run(as_server_user(Path::new("mkdir")).arg("-m").arg("0755").arg(&dir));
    dir
}

impl Cluster {
    /// Starts a cluster with nexus_hub preloaded, a vault key, and more settings.
    pub fn start(settings: &[&str]) -> Self {
        let cluster = Self::create(settings);
        cluster.start_up();
        cluster
    }

    /// Starts a cluster made by [`Cluster::create`].
    pub fn start_up(&self) {
        self.pg_ctl(&["start"]);
        for role in ["anon", "authenticated", "service_role"] {
            self.connect("postgres").batch_execute(&format!("CREATE ROLE {role} NOLOGIN")).expect("CREATE ROLE");
        }
    }

    /// Starts a cluster made by [`Cluster::create`] with a variable in the server's environment.
    pub fn start_with_environment(&self, name: &str, value: &str) {
        self.start_under(as_server_user(Path::new("env")).arg(format!("{name}={value}")));
    }

    /// Starts a cluster made by [`Cluster::create`] whose processes may have so many files open.
    pub fn start_with_descriptors(&self, limit: u32) {
        self.start_under(as_server_user(Path::new("prlimit")).arg(format!("--nofile={limit}:{limit}")));
    }

    fn start_under(&self, command: &mut Command) {
        run(command
            .arg(self.bin.join("pg_ctl"))
            .arg("-D")
            .arg(self.dir.join("data"))
            .arg("-l")
            .arg(self.dir.join("log"))
            .args(["-w", "-t", "60", "-s", "start"])
            .stdin(Stdio::null())
            .stdout(Stdio::null()));
    }

    /// Makes a cluster without starting it.
    pub fn create(settings: &[&str]) -> Self {
        let bin = bin_dir();
        let dir = fresh_dir("pg");
        let cluster = Self::kept(bin, dir);
        run(as_server_user(Path::new("cp")).arg("-a").arg(template(&cluster.bin)).arg(cluster.dir.join("data")));
        cluster.write_key_file(KEY);
        cluster.configure(settings);
        cluster
    }

    /// A standby of a running cluster, started.
    pub fn standby_of(primary: &Cluster) -> Self {
        let standby = Self::kept(primary.bin.clone(), fresh_dir("pg"));
        run(as_server_user(&primary.bin.join("pg_basebackup"))
            .args([
                "--checkpoint=fast",
                "--no-sync",
                "--write-recovery-conf",
                "--username=postgres",
                "-p",
                "5432",
                "-h",
            ])
            .arg(&primary.dir)
            .arg("-D")
            .arg(standby.dir.join("data")));
        standby.write_key_file(KEY);
        standby.configure(&[]);
        standby.pg_ctl(&["start"]);
        standby
    }

    fn kept(bin: PathBuf, dir: PathBuf) -> Self {
        let script = "\"$0\"/pg_ctl -D \"$1\"/data -m immediate stop >/dev/null 2>&1; rm -rf \"$1\"";
        let keeper = Keeper::start(script, &[&bin, &dir]);
        Self { dir, bin, _keeper: keeper }
    }

    /// Sets the cluster's settings, these after the ones every cluster has.
    pub fn configure(&self, settings: &[&str]) {
        let mut text = format!(
            "shared_preload_libraries = 'nexus_hub'\nlisten_addresses = ''\nport = 5432\n\
             unix_socket_directories = '{}'\nmax_connections = 100\nmax_worker_processes = 64\n\
             fsync = off\nnexus_hub.egress_allow = '127.0.0.1'\n\
             nexus_hub.vault_key_file = '{}/vault.key'\n",
            self.dir.display(),
            self.dir.display()
        );
        for setting in settings {
            text.push_str(setting);
            text.push('\n');
        }
        self.write_file("data/test.conf", &text, "0600");
    }

    /// Writes a file as the server's user.
    pub fn write_file(&self, name: &str, text: &str, mode: &str) {
        let path = self.dir.join(name);
        let script = "umask 077; cat >\"$0\".new && chmod \"$1\" \"$0\".new && mv \"$0\".new \"$0\"";
        let mut child = as_server_user(Path::new("sh"))
            .args(["-c", script])
            .arg(&path)
            .arg(mode)
            .stdin(Stdio::piped())
            .current_dir("/tmp")
            .spawn()
            .expect("sh");
        child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("write");
        assert!(child.wait().expect("sh").success(), "could not write {}", path.display());
    }

    pub fn write_key_file(&self, text: &str) {
        self.write_file("vault.key", text, "0600");
    }

    /// Runs pg_ctl and waits for it.
    pub fn pg_ctl(&self, arguments: &[&str]) {
        run(as_server_user(&self.bin.join("pg_ctl"))
            .arg("-D")
            .arg(self.dir.join("data"))
            .arg("-l")
            .arg(self.dir.join("log"))
            .args(["-w", "-t", "60", "-s"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null()));
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        self.read_file("log")
    }

    /// Reads a file as the server's user; one that is not there is empty.
    pub fn read_file(&self, name: &str) -> String {
        let output =
            as_server_user(Path::new("cat")).arg(self.dir.join(name)).current_dir("/tmp").output().expect("cat");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The files of the data directory and the log that hold a text.
    pub fn files_with(&self, text: &str) -> Vec<String> {
        let output = as_server_user(Path::new("grep"))
            .args(["-rlaF", "--", text])
            .args([self.dir.join("data"), self.dir.join("log")])
            .current_dir("/tmp")
            .output()
            .expect("grep");
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
    }

    /// A connection as the superuser.
    pub fn connect(&self, database: &str) -> Client {
        self.try_connect(database).unwrap_or_else(|error| panic!("connect to {database}: {error}"))
    }

    pub fn try_connect(&self, database: &str) -> Result<Client, postgres::Error> {
        let mut config = Client::configure();
        config.host_path(&self.dir).port(5432).user("postgres").dbname(database).connect(NoTls)
    }

    /// Connects once the server takes connections again, as after a crash.
    pub fn reconnect(&self, database: &str) -> Client {
        let begin = Instant::now();
        loop {
            match self.try_connect(database) {
                Ok(client) => return client,
                Err(error) => assert!(begin.elapsed() < PATIENCE, "the server does not come back: {error}"),
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// Sends a signal to one of the server's processes.
    pub fn signal(&self, signal: &str, pid: i32) {
        run(as_server_user(Path::new("kill")).arg(format!("-{signal}")).arg(pid.to_string()));
    }

    /// A new database with the extension, dropped with the value.
    pub fn database(&self) -> Database<'_> {
        let database = self.empty_database();
        database.connect().batch_execute("CREATE EXTENSION nexus_hub").expect("CREATE EXTENSION");
        database
    }

    /// A new database without the extension.
    pub fn empty_database(&self) -> Database<'_> {
        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        self.connect("postgres").batch_execute(&format!("CREATE DATABASE {name}")).expect("CREATE DATABASE");
        Database { cluster: self, name }
    }

    /// The environment with which libpq programs find the cluster.
    pub fn environment(&self) -> [(&'static str, String); 3] {
        [("PGHOST", self.dir.display().to_string()), ("PGPORT", "5432".into()), ("PGUSER", "postgres".into())]
    }
}

/// A database of a cluster.
pub struct Database<'a> {
    pub cluster: &'a Cluster,
    pub name: String,
}

impl Database<'_> {
    pub fn connect(&self) -> Client {
        self.cluster.connect(&self.name)
    }

    /// The database's dump, as SQL.
    pub fn dump(&self) -> String {
        run(Command::new(self.cluster.bin.join("pg_dump")).arg(&self.name).envs(self.cluster.environment()))
    }

    /// Dumps the database and restores it into an empty one, of this cluster or another.
    pub fn copy_to(&self, other: &Database<'_>) {
        self.copy_with(other, &[]);
    }

    /// The same, with more arguments for both programs.
    pub fn copy_with(&self, other: &Database<'_>, arguments: &[&str]) {
        let mut dump = Command::new(self.cluster.bin.join("pg_dump"))
            .args(["-Fc", &self.name])
            .args(arguments)
            .envs(self.cluster.environment())
            .stdout(Stdio::piped())
            .spawn()
            .expect("pg_dump");
        let restore = Command::new(self.cluster.bin.join("pg_restore"))
            .args(["--exit-on-error", "-d", &other.name])
            .args(arguments)
            .envs(other.cluster.environment())
            .stdin(dump.stdout.take().expect("piped"))
            .output()
            .expect("pg_restore");
        assert!(restore.status.success(), "{}", String::from_utf8_lossy(&restore.stderr));
        assert!(dump.wait().expect("pg_dump").success());
    }

    /// The process id of the database's worker, if it has one.
    pub fn worker(&self) -> Option<i32> {
        let mut client = self.cluster.connect("postgres");
        let query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'nexus_hub worker' AND datname = $1";
        client.query_opt(query, &[&self.name]).expect("pg_stat_activity").map(|row| row.get(0))
    }

    /// Waits until the database's worker is at work: one that has just come to be may only look for the extension, and end.
    /// After several that ended soon it counts as stuck for a while.
    pub fn wait_for_worker(&self) -> i32 {
        let mut client = self.connect();
        let query = "SELECT w.pid FROM _nexus_hub.workers() w
                      WHERE w.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
                        AND w.number = 0 AND w.state IN ('running', 'stuck')";
        let mut pid = None;
        wait_until(&format!("a worker for {}", self.name), || {
            pid = client.query_opt(query, &[]).expect("workers").map(|row| row.get(0));
            pid.is_some()
        });
        pid.expect("just seen")
    }
}

impl Drop for Database<'_> {
    fn drop(&mut self) {
        if let Ok(mut client) = self.cluster.try_connect("postgres") {
            let _ = client.batch_execute(&format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name));
        }
    }
}
