//! Commands that the server runs, with a time limit.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// How often it is looked whether the statement was cancelled meanwhile.
const LOOK: Duration = Duration::from_millis(50);

/// Why a command gave no output. Never quotes the command or its output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It could not be started.
    NotStarted(String),
    /// It ended otherwise than with exit status 0.
    Ended(String),
    /// It was still running after so long, and was ended.
    TimedOut(Duration),
    /// It wrote more than so many bytes, and was ended.
    TooLong(usize),
    /// The session was told to cancel its statement, or to end.
    Cancelled,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotStarted(problem) => write!(f, "it could not be started: {problem}"),
            Self::Ended(status) => write!(f, "it ended with {status}"),
            Self::TimedOut(limit) => write!(f, "it was still running after {} s, and was stopped", limit.as_secs()),
            Self::TooLong(limit) => write!(f, "it wrote more than {limit} bytes, and was stopped"),
            Self::Cancelled => f.write_str("it was cancelled"),
        }
    }
}

/// What a shell command writes. Its errors go to the server's log, its input is empty.
pub fn output(command: &std::ffi::OsStr, limit: Duration, max_bytes: usize) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut child = Command::new("/bin/sh")
        .arg("-c")
        .arg(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Of its own, so that what the shell has started can be ended with it.
        .process_group(0)
        .spawn()
        .map_err(|problem| Failure::NotStarted(problem.to_string()))?;
    let read = read(&mut child, Instant::now() + limit, limit, max_bytes);
    if read.is_err() && !matches!(child.try_wait(), Ok(Some(_))) {
        // SAFETY: a signal to the group of a child that has not been waited for, so that its number is still its own.
        unsafe { libc::kill(-(child.id() as libc::pid_t), libc::SIGKILL) };
        let _ = child.wait();
    }
    read
}

fn read(
    child: &mut Child,
    deadline: Instant,
    limit: Duration,
    max_bytes: usize,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let Some(stdout) = child.stdout.take() else { return Err(Failure::NotStarted("it has no output".into())) };
    let mut stdout = File::from(OwnedFd::from(stdout));
    // It never grows, because a Vec that does leaves copies behind.
    let mut text = Zeroizing::new(vec![0; max_bytes + 1]);
    let mut length = 0;
    loop {
        let time = time_left(deadline, limit)?;
        let mut waited = libc::pollfd { fd: stdout.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, whose descriptor is open.
        let ready = unsafe { libc::poll(&mut waited, 1, time.as_millis() as libc::c_int) };
        if ready <= 0 {
            continue;
        }
        match stdout.read(&mut text[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(problem) if problem.kind() == ErrorKind::Interrupted => {}
            Err(problem) => return Err(Failure::Ended(problem.to_string())),
        }
        if length > max_bytes {
            return Err(Failure::TooLong(max_bytes));
        }
    }
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => break,
            Ok(Some(status)) => return Err(Failure::Ended(status.to_string())),
            Ok(None) => std::thread::sleep(time_left(deadline, limit)?.min(Duration::from_millis(1))),
            Err(problem) => return Err(Failure::Ended(problem.to_string())),
        }
    }
    text.truncate(length);
    Ok(text)
}

/// How long to wait before the next look.
fn time_left(deadline: Instant, limit: Duration) -> Result<Duration, Failure> {
    // SAFETY: flags that signal handlers set.
    let cancelled = unsafe {
        std::ptr::read_volatile(&raw const pgrx::pg_sys::QueryCancelPending) != 0
            || std::ptr::read_volatile(&raw const pgrx::pg_sys::ProcDiePending) != 0
    };
    if cancelled || super::bgworker::stop_requested() {
        return Err(Failure::Cancelled);
    }
    let time = deadline.saturating_duration_since(Instant::now()).min(LOOK);
    if time.is_zero() { Err(Failure::TimedOut(limit)) } else { Ok(time.max(Duration::from_millis(1))) }
}
