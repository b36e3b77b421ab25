//! Where the vault's keys come from. The first source that is set counts: the command of
//! `nexus_hub.vault_key_command`, the file of `nexus_hub.vault_key_file`, the environment variable `VAULT_ENCRYPTION_KEY`
//! of the server, the setting `app.vault_key`.

use crate::domain::keyring::{self, KeyRing, RawKey};
use crate::pg::error::{ErrorReport, Kind, error};
use crate::pg::process::{self, Failure};
use crate::pg::shmem::keys as shared;
use crate::pg::{app_settings, bgworker, guc};
use std::cell::{Cell, RefCell};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

const ENVIRONMENT_VARIABLE: &str = "VAULT_ENCRYPTION_KEY";
/// No ring of keys is larger; a device or a huge file named by mistake is not read to its end.
const MAX_BYTES: u64 = 64 * 1024;
/// How long the command may run.
const COMMAND_TIME: Duration = Duration::from_secs(10);
/// How long after a failure the command is not run again, or every session would wait for it in turn.
const COMMAND_PAUSE: Duration = Duration::from_secs(10);
/// How often a session looks whether another one has the keys.
const LOOK: Duration = Duration::from_millis(5);
const FORMAT: &str =
    "Each line is a key of 64 hex characters, as `openssl rand -hex 32` makes them; the first one encrypts.";

/// What the keys in memory are of: they are good until one of these changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Loaded {
    configuration: i64,
    /// Of the server, which may be ahead of this process: it loads the configuration between statements.
    load: Option<u64>,
}

thread_local! {
    static RING: RefCell<Option<(Loaded, Rc<KeyRing>)>> = const { RefCell::new(None) };
    // Without shared memory.
    static COMMAND_FAILED: Cell<Option<(Loaded, Instant)>> = const { Cell::new(None) };
}

fn loaded() -> Loaded {
    Loaded { configuration: guc::configuration_loaded_at(), load: shared::loads() }
}

/// The keys as of the last configuration load. A failure is not remembered, but the command's.
pub fn ring() -> Result<Rc<KeyRing>, ErrorReport> {
    let now = loaded();
    let ring = RING.with_borrow(|ring| match ring {
        Some((at, ring)) if *at == now => Some(Rc::clone(ring)),
        _ => None,
    });
    if let Some(ring) = ring {
        return Ok(ring);
    }
    // Wiped before there are others.
    RING.set(None);
    let (keys, can_be_kept) = load(now)?;
    let ring = Rc::new(KeyRing::new(&keys));
    if can_be_kept {
        RING.set(Some((now, Rc::clone(&ring))));
    }
    Ok(ring)
}

/// The keys as far as they are known: what a command prints is not waited for. `None`: nobody knows yet.
pub fn known() -> Option<Result<Rc<KeyRing>, ErrorReport>> {
    let (Some(Source::Command(command)), Some(load)) = (Source::first(), loaded().load) else { return Some(ring()) };
    let wanted = wanted(load, &command);
    if shared::stored(wanted).is_some() {
        return Some(ring());
    }
    shared::failed_ago(wanted).map(|_| {
        Err(error(Kind::KeyNotConfigured, "the vault key command failed")
            .set_detail("The reason is in the server's log."))
    })
}

/// What the output of the command is known by. A session in the middle of a statement has the command of before: what that
/// prints is not for the others.
fn wanted(load: u64, command: &OsStr) -> u64 {
    let mut hasher = DefaultHasher::new();
    (load, command).hash(&mut hasher);
    hasher.finish()
}

/// What keys come from.
enum Source {
    Command(OsString),
    File(PathBuf),
    Environment(OsString),
    Setting(Zeroizing<String>),
}

impl Source {
    /// The first one that is set.
    fn first() -> Option<Self> {
        guc::vault_key_command()
            .map(Self::Command)
            .or_else(|| guc::vault_key_file().map(Self::File))
            .or_else(|| std::env::var_os(ENVIRONMENT_VARIABLE).map(Self::Environment))
            .or_else(|| app_settings::vault_key().map(Self::Setting))
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Command(_) => "nexus_hub.vault_key_command",
            Self::File(_) => "nexus_hub.vault_key_file",
            Self::Environment(_) => ENVIRONMENT_VARIABLE,
            Self::Setting(_) => "app.vault_key",
        }
    }
}

/// Whether there is anything that should hold keys.
pub fn configured() -> bool {
    source().is_some()
}

/// The name of what the keys come from.
pub fn source() -> Option<&'static str> {
    Source::first().map(|source| source.name())
}

/// Whether the keys come from the setting `app.vault_key`, which each session has for itself.
pub fn comes_from_setting() -> bool {
    matches!(Source::first(), Some(Source::Setting(_)))
}

/// The keys, and whether they are good until the configuration is loaded again.
fn load(now: Loaded) -> Result<(Zeroizing<Vec<RawKey>>, bool), ErrorReport> {
    let source = Source::first().ok_or_else(|| {
        error(Kind::KeyNotConfigured, "no vault key is configured").set_hint(
            "Put the output of `openssl rand -hex 32` into a file of mode 0600 owned by the server's user, name it in \
             nexus_hub.vault_key_file and reload; or have nexus_hub.vault_key_command print it.",
        )
    })?;
    // A SET changes a setting at any time.
    let can_be_kept = !matches!(source, Source::Setting(_));
    let (text, fault, place) = match source {
        Source::Command(command) => return from_command(&command, now).map(|keys| (keys, can_be_kept)),
        Source::File(path) => {
            (read(&path)?, "the vault key file cannot be used", "The file named by nexus_hub.vault_key_file: ")
        }
        Source::Environment(value) => (
            Zeroizing::new(value.into_string().unwrap_or_default()),
            "the vault key in the environment cannot be used",
            "In the server's environment variable VAULT_ENCRYPTION_KEY, ",
        ),
        Source::Setting(text) => {
            (text, "the vault key in the setting app.vault_key cannot be used", "In app.vault_key, ")
        }
    };
    shared::wipe();
    let keys = keyring::parse(&text).map_err(|problem| {
        error(Kind::KeyNotConfigured, fault).set_detail(format!("{place}{problem}.")).set_hint(FORMAT)
    })?;
    Ok((keys, can_be_kept))
}

/// The keys that the command prints. With shared memory one process runs it, and all have its output.
fn from_command(command: &OsStr, now: Loaded) -> Result<Zeroizing<Vec<RawKey>>, ErrorReport> {
    let Some(load) = now.load else {
        let failed_at = COMMAND_FAILED.get().filter(|(of, at)| *of == now && at.elapsed() < COMMAND_PAUSE);
        if failed_at.is_some() {
            return Err(failed_before());
        }
        let keys = run(command);
        // Ends the statement or the session, if that is what was asked for.
        bgworker::handle_interrupts();
        if matches!(keys, Err(Some(_))) {
            COMMAND_FAILED.set(Some((now, Instant::now())));
        }
        return keys.map_err(|problem| failed(problem.as_ref()));
    };
    let wanted = wanted(load, command);
    loop {
        if let Some(keys) = shared::stored(wanted) {
            return Ok(Zeroizing::new(keys.as_chunks().0.to_vec()));
        }
        let pause = i64::try_from(COMMAND_PAUSE.as_micros()).unwrap_or(i64::MAX);
        if shared::failed_ago(wanted).is_some_and(|time| (0..pause).contains(&time)) {
            return Err(failed_before());
        }
        let Some(loading) = shared::begin() else {
            if bgworker::stop_requested() {
                return Err(failed(None));
            }
            bgworker::handle_interrupts();
            std::thread::sleep(LOOK);
            continue;
        };
        // Somebody may have been quicker.
        if shared::stored(wanted).is_some() {
            continue;
        }
        let keys = run(command);
        match &keys {
            Ok(keys) => loading.store(wanted, keys.as_flattened()),
            Err(Some(_)) => loading.fail(wanted),
            Err(None) => {}
        }
        // First, because what follows may be the end of the session.
        drop(loading);
        bgworker::handle_interrupts();
        return keys.map_err(|problem| failed(problem.as_ref()));
    }
}

/// `Err(None)`: the session was told to cancel its statement, or to end.
fn run(command: &OsStr) -> Result<Zeroizing<Vec<RawKey>>, Option<String>> {
    let text = process::output(command, COMMAND_TIME, MAX_BYTES as usize)
        .map_err(|problem| (problem != Failure::Cancelled).then(|| problem.to_string()))?;
    let text = std::str::from_utf8(&text).map_err(|_| Some("what it printed is not text".to_owned()))?;
    keyring::parse(text).map_err(|problem| Some(format!("of what it printed, {problem}")))
}

fn failed(reason: Option<&String>) -> ErrorReport {
    let reason = reason.map_or("it was cancelled", String::as_str);
    error(Kind::KeyNotConfigured, "the vault key command failed")
        .set_detail(format!("The command of nexus_hub.vault_key_command: {reason}."))
        .set_hint(format!(
            "It is run by the server's user in the data directory, and what it writes to its standard error is in the server's log. {FORMAT}"
        ))
}

fn failed_before() -> ErrorReport {
    error(Kind::KeyNotConfigured, "the vault key command failed")
        .set_detail(format!(
            "The command of nexus_hub.vault_key_command failed less than {} seconds ago, in this session or in another.",
            COMMAND_PAUSE.as_secs()
        ))
        .set_hint("The reason is in the server's log. It is run again after a while, and at once after a configuration reload.")
}

fn read(path: &Path) -> Result<Zeroizing<String>, ErrorReport> {
    let unreadable = |reason: String| {
        error(Kind::KeyNotConfigured, "the vault key file cannot be read")
            .set_detail(format!("The file named by nexus_hub.vault_key_file: {reason}."))
            .set_hint("It must be an ordinary file that the server's user can read and nobody else: chmod 600.")
    };
    // A FIFO would block the session beyond the reach of a cancel request.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(|problem| {
        unreadable(match problem.kind() {
            ErrorKind::NotFound => "it does not exist".into(),
            ErrorKind::PermissionDenied => "the server's user may not read it".into(),
            _ => problem.to_string(),
        })
    })?;
    // Of the open file, not of the path: it can't be exchanged between the check and the read.
    let metadata = file.metadata().map_err(|problem| unreadable(problem.to_string()))?;
    if !metadata.is_file() {
        return Err(unreadable("it is not an ordinary file".into()));
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(unreadable(format!("group or others may access it (mode {:04o})", metadata.mode() & 0o7777)));
    }
    if metadata.len() > MAX_BYTES {
        return Err(unreadable(format!("it is larger than {MAX_BYTES} bytes")));
    }
    // Sized beforehand, because a String that grows leaves copies of the keys behind.
    let mut text = Zeroizing::new(String::with_capacity(metadata.len() as usize + 1));
    file.take(MAX_BYTES).read_to_string(&mut text).map_err(|problem| {
        unreadable(match problem.kind() {
            ErrorKind::InvalidData => "it is not text".into(),
            _ => problem.to_string(),
        })
    })?;
    Ok(text)
}
