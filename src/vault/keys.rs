//! Where the vault's keys come from: the file that `nexus_hub.vault_key_file` names, else the environment variable
//! `VAULT_ENCRYPTION_KEY` of the server. Read once per process and configuration reload.

use crate::domain::keyring::KeyRing;
use crate::pg::error::{ErrorReport, Kind, error};
use crate::pg::guc;
use std::cell::RefCell;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::rc::Rc;
use zeroize::Zeroizing;

const ENVIRONMENT_VARIABLE: &str = "VAULT_ENCRYPTION_KEY";
/// No ring of keys is larger; a device or a huge file named by mistake is not read to its end.
const MAX_FILE_BYTES: u64 = 64 * 1024;

thread_local! {
    static LOADED: RefCell<Option<(i64, Rc<KeyRing>)>> = const { RefCell::new(None) };
}

/// The keys as of the last configuration reload. A failure is not remembered: the next call looks again.
pub fn ring() -> Result<Rc<KeyRing>, ErrorReport> {
    let now = guc::configuration_loaded_at();
    let loaded = LOADED.with_borrow(|loaded| match loaded {
        Some((at, ring)) if *at == now => Some(Rc::clone(ring)),
        _ => None,
    });
    if let Some(ring) = loaded {
        return Ok(ring);
    }
    let ring = Rc::new(load()?);
    LOADED.set(Some((now, Rc::clone(&ring))));
    Ok(ring)
}

/// Whether there is anything that should hold keys.
pub fn configured() -> bool {
    guc::vault_key_file().is_some() || std::env::var_os(ENVIRONMENT_VARIABLE).is_some()
}

fn load() -> Result<KeyRing, ErrorReport> {
    if let Some(path) = guc::vault_key_file() {
        let text = read(&path)?;
        return KeyRing::parse(&text).map_err(|problem| {
            error(Kind::KeyNotConfigured, "the vault key file cannot be used")
                .set_detail(format!("The file named by nexus_hub.vault_key_file: {problem}."))
                .set_hint("Each line is a key of 64 hex characters, as `openssl rand -hex 32` makes them; the first one encrypts.")
        });
    }
    if let Some(value) = std::env::var_os(ENVIRONMENT_VARIABLE) {
        let text = Zeroizing::new(value.into_string().unwrap_or_default());
        return KeyRing::parse(&text).map_err(|problem| {
            error(Kind::KeyNotConfigured, "the vault key in the environment cannot be used")
                .set_detail(format!("In the server's environment variable {ENVIRONMENT_VARIABLE}, {problem}."))
                .set_hint("A key is 64 hex characters, as `openssl rand -hex 32` makes them.")
        });
    }
    Err(error(Kind::KeyNotConfigured, "no vault key is configured").set_hint(
        "Put the output of `openssl rand -hex 32` into a file of mode 0600 owned by the server's user, name it in \
         nexus_hub.vault_key_file and reload; or start the server with VAULT_ENCRYPTION_KEY in its environment.",
    ))
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
    if metadata.len() > MAX_FILE_BYTES {
        return Err(unreadable(format!("it is larger than {MAX_FILE_BYTES} bytes")));
    }
    // Sized beforehand, because a String that grows leaves copies of the keys behind.
    let mut text = Zeroizing::new(String::with_capacity(metadata.len() as usize + 1));
    file.take(MAX_FILE_BYTES).read_to_string(&mut text).map_err(|problem| {
        unreadable(match problem.kind() {
            ErrorKind::InvalidData => "it is not text".into(),
            _ => problem.to_string(),
        })
    })?;
    Ok(text)
}
