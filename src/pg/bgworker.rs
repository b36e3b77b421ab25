//! What a background worker needs of PostgreSQL: start, signals, waiting, the end.

use super::xact;
use pgrx::bgworkers::{BackgroundWorkerBuilder, BackgroundWorkerStatus, BgWorkerStartTime, DynamicBackgroundWorker};
use pgrx::prelude::*;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::SeqCst};
use std::time::Duration;

/// Registers the launcher, to be started when the server accepts writes: never on a standby, and after a promotion.
pub fn register_launcher(function: &str) {
    BackgroundWorkerBuilder::new("nexus_hub launcher")
        .set_type("nexus_hub launcher")
        .set_library("nexus_hub")
        .set_function(function)
        .enable_spi_access()
        .set_start_time(BgWorkerStartTime::RecoveryFinished)
        .set_restart_time(Some(Duration::from_secs(1)))
        .load();
}

/// A worker that was asked of the postmaster.
pub struct Launched(DynamicBackgroundWorker);

impl Launched {
    /// Has a worker of that name started, with `argument` for its main function. `None`: max_worker_processes is reached.
    pub fn start(name: &str, function: &str, argument: usize) -> Option<Self> {
        // SAFETY: a plain global of this process.
        let own_pid = unsafe { pg_sys::MyProcPid };
        BackgroundWorkerBuilder::new(name)
            .set_type(name)
            .set_library("nexus_hub")
            .set_function(function)
            .enable_spi_access()
            .set_start_time(BgWorkerStartTime::RecoveryFinished)
            .set_restart_time(None)
            .set_argument(Some(pg_sys::Datum::from(argument)))
            .set_notify_pid(own_pid)
            .load_dynamic()
            .ok()
            .map(Self)
    }

    /// Whether the worker's process is gone, or never came to be.
    pub fn is_over(&self) -> bool {
        matches!(self.0.pid(), Err(BackgroundWorkerStatus::Stopped))
    }
}

// pgrx's bindings of these are Rust functions around them; a signal handler has to be the C function itself.
unsafe extern "C-unwind" {
    #[allow(non_snake_case)]
    fn SetLatch(latch: *mut pg_sys::Latch);
    #[allow(non_snake_case)]
    fn SignalHandlerForConfigReload(signal: std::ffi::c_int);
    fn die(signal: std::ffi::c_int);
}

/// Somebody has told the process to end.
static STOP: AtomicBool = AtomicBool::new(false);
/// When that was, in milliseconds of the monotonic clock.
static STOP_AT: AtomicI64 = AtomicI64::new(0);
/// PostgreSQL tells each of its processes twice, once as a process and once as a group, with whatever time between the two
/// that the machine takes. Somebody who tells it again after this time is in a hurry.
const TOLD_ONCE_MS: i64 = 1000;
/// This process is one of the extension's, and has that handler.
static IS_WORKER: AtomicBool = AtomicBool::new(false);
/// A transaction is being committed.
static COMMITTING: AtomicBool = AtomicBool::new(false);

/// The handler of SIGTERM: notes it. PostgreSQL's own would end the process in the middle of whatever it does, and the
/// jobs in flight would look as if it had crashed. What a transaction waits for has a time limit; only a commit may wait
/// for a standby without one, and looks at PostgreSQL's flag meanwhile.
unsafe extern "C-unwind" fn request_stop(_signal: std::ffi::c_int) {
    // SAFETY: atomics, flags meant for signal handlers, and calls that may be made in one; errno is kept.
    unsafe {
        let error = *libc::__errno_location();
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time);
        let now = time.tv_sec * 1000 + time.tv_nsec / 1_000_000;
        // Told twice, it ends at once.
        let is_again = STOP.swap(true, SeqCst) && now - STOP_AT.load(SeqCst) >= TOLD_ONCE_MS;
        if !is_again {
            _ = STOP_AT.compare_exchange(0, now, SeqCst, SeqCst);
        }
        if is_again || COMMITTING.load(SeqCst) {
            tell_postgresql();
        }
        SetLatch(pg_sys::MyLatch);
        *libc::__errno_location() = error;
    }
}

/// SAFETY: flags of this process; a signal handler may set them.
unsafe fn tell_postgresql() {
    // SAFETY: see above.
    unsafe {
        std::ptr::write_volatile(&raw mut pg_sys::ProcDiePending, 1);
        std::ptr::write_volatile(&raw mut pg_sys::InterruptPending, 1);
    }
}

/// Called when nothing of a transaction is left to be run but its commit, in whichever process.
pub fn begin_of_commit() {
    if !IS_WORKER.load(SeqCst) {
        return;
    }
    COMMITTING.store(true, SeqCst);
    if STOP.load(SeqCst) {
        // SAFETY: see there.
        unsafe { tell_postgresql() };
    }
}

/// Makes PostgreSQL forget what it was told for a commit: the process ends when its main loop gets to it.
pub fn end_of_commit() {
    COMMITTING.store(false, SeqCst);
    if STOP.load(SeqCst) {
        // SAFETY: a flag of this process, taken back on its main thread; nobody else reads it.
        unsafe { std::ptr::write_volatile(&raw mut pg_sys::ProcDiePending, 0) };
    }
}

/// Takes the signals over and connects to a database; without one, only the shared catalogues can be read.
pub fn start(database: Option<pg_sys::Oid>) {
    IS_WORKER.store(true, SeqCst);
    xact::register();
    // SAFETY: first thing in a background worker's main function, with signals still blocked. PostgreSQL's own
    // handler of SIGHUP is used.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        {
            pg_sys::pqsignal(libc::SIGHUP, Some(SignalHandlerForConfigReload));
            pg_sys::pqsignal(libc::SIGTERM, Some(request_stop));
        }
        #[cfg(feature = "pg18")]
        {
            pg_sys::pqsignal_be(libc::SIGHUP, Some(SignalHandlerForConfigReload));
            pg_sys::pqsignal_be(libc::SIGTERM, Some(request_stop));
        }
        pg_sys::BackgroundWorkerUnblockSignals();
        match database {
            Some(oid) => pg_sys::BackgroundWorkerInitializeConnectionByOid(oid, pg_sys::InvalidOid, 0),
            None => pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0),
        }
    }
}

/// Has SIGTERM end the process wherever it is, as it ends a session: for one that loses nothing by it.
pub fn end_at_once_when_told() {
    // SAFETY: PostgreSQL's own handler, set on the main thread.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        pg_sys::pqsignal(libc::SIGTERM, Some(die));
        #[cfg(feature = "pg18")]
        pg_sys::pqsignal_be(libc::SIGTERM, Some(die));
    }
}

/// Forgets a request to cancel a statement where none is running: it would end the process.
pub fn forget_cancel_request() {
    // SAFETY: a flag of this process, meant for signal handlers.
    unsafe { std::ptr::write_volatile(&raw mut pg_sys::QueryCancelPending, 0) };
}

/// Sets what the worker relies on, whatever ALTER DATABASE or postgresql.conf say for ordinary sessions.
pub fn pin_session_settings() {
    for (name, value) in [
        // A row or table that somebody keeps locked must not stop the whole queue.
        (c"lock_timeout", c"1s"),
        (c"statement_timeout", c"0"),
        (c"idle_in_transaction_session_timeout", c"0"),
        (c"default_transaction_isolation", c"read committed"),
        (c"default_transaction_read_only", c"off"),
        (c"search_path", c"pg_catalog, pg_temp"),
        (c"row_security", c"off"),
        (c"role", c"none"),
        // Plans are made once, because making one takes longer than what it does, and perhaps while the tables are empty:
        // they must not go on reading, sorting or hashing all of a table when it has millions of rows.
        (c"plan_cache_mode", c"force_generic_plan"),
        (c"enable_hashjoin", c"off"),
        (c"enable_mergejoin", c"off"),
        (c"enable_seqscan", c"off"),
        (c"enable_bitmapscan", c"off"),
        (c"enable_sort", c"off"),
        (c"jit", c"off"),
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        (c"transaction_timeout", c"0"),
    ] {
        pin_setting(name, value);
    }
}

/// Sets one, until the process ends.
pub fn pin_setting(name: &CStr, value: &CStr) {
    // SAFETY: C strings, a worker connected to its database.
    unsafe {
        pg_sys::SetConfigOption(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_OVERRIDE,
        );
    }
}

pub(super) fn milliseconds(time: Duration) -> std::ffi::c_long {
    // Rounded up, or the last fraction of a millisecond would be spent in a busy loop.
    let milliseconds = time.as_micros().div_ceil(1000);
    std::ffi::c_long::try_from(milliseconds).unwrap_or(i32::MAX.into()).clamp(0, i32::MAX.into())
}

/// Waits for the process's latch or for the time to pass. Ends the process when the postmaster is gone.
pub fn wait(time: Duration) {
    let events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    // SAFETY: the process's own latch.
    unsafe {
        pg_sys::WaitLatch(pg_sys::MyLatch, events as i32, milliseconds(time), pg_sys::PG_WAIT_EXTENSION);
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
}

/// What a worker waits for: its latch, and input on a descriptor. Made once, because making it takes a descriptor, of
/// which there may be none when one is needed.
pub struct Waiter(*mut pg_sys::WaitEventSet);

impl Waiter {
    /// The descriptor must stay open as long as this is used.
    pub fn new(descriptor: BorrowedFd<'_>) -> Self {
        // SAFETY: the set is kept for the life of the process, in memory that lives as long; the latch is the
        // process's own.
        unsafe {
            #[cfg(any(feature = "pg14", feature = "pg15", feature = "pg16"))]
            let set = pg_sys::CreateWaitEventSet(pg_sys::TopMemoryContext, 3);
            #[cfg(not(any(feature = "pg14", feature = "pg15", feature = "pg16")))]
            let set = pg_sys::CreateWaitEventSet(std::ptr::null_mut(), 3);
            pg_sys::AddWaitEventToSet(set, pg_sys::WL_LATCH_SET, -1, pg_sys::MyLatch, std::ptr::null_mut());
            pg_sys::AddWaitEventToSet(set, pg_sys::WL_EXIT_ON_PM_DEATH, -1, std::ptr::null_mut(), std::ptr::null_mut());
            pg_sys::AddWaitEventToSet(
                set,
                pg_sys::WL_SOCKET_READABLE,
                descriptor.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            );
            Self(set)
        }
    }

    /// Waits for the latch, the descriptor, or the time to pass. Ends the process when the postmaster is gone.
    ///
    /// The latch is no message: PostgreSQL's own waits inside a transaction may use it up. Look at everything that
    /// could have been asked for right before the call, and again after it.
    pub fn wait(&self, time: Duration) {
        // SAFETY: the set of `new`; the one event that is asked for has room.
        unsafe {
            let mut event = std::mem::zeroed();
            pg_sys::WaitEventSetWait(self.0, milliseconds(time), &mut event, 1, pg_sys::PG_WAIT_EXTENSION);
            pg_sys::ResetLatch(pg_sys::MyLatch);
        }
    }
}

/// How long ago the server was started; a restart after a crash of one of its processes is none.
pub fn server_uptime() -> Duration {
    // SAFETY: a global that the postmaster has set, and a look at the clock.
    let microseconds = unsafe { pg_sys::GetCurrentTimestamp() - pg_sys::PgStartTime };
    Duration::from_micros(u64::try_from(microseconds).unwrap_or_default())
}

/// Whether the process was told to end.
pub fn stop_requested() -> bool {
    STOP.load(SeqCst)
}

/// Whether a SIGHUP waits to be handled by [`reload_configuration`].
pub fn reload_requested() -> bool {
    // SAFETY: a flag that the signal handler sets.
    unsafe { std::ptr::read_volatile(&raw const pg_sys::ConfigReloadPending) != 0 }
}

/// Has [`reload_configuration`] read the configuration files.
pub fn request_reload() {
    // SAFETY: a flag that the signal handler sets.
    unsafe { std::ptr::write_volatile(&raw mut pg_sys::ConfigReloadPending, 1) };
}

/// Answers what other processes want of this one (DROP DATABASE waits for such answers). A request to cancel the statement
/// is an error here.
pub fn handle_interrupts() {
    pgrx::check_for_interrupts!();
}

/// The same in a worker's main loop, outside transactions: no statement is running that a cancel request could be meant
/// for, and as an error it would end the process.
pub fn handle_interrupts_of_others() {
    // SAFETY: a counter of this process, as PostgreSQL uses it itself: it keeps a cancel request from becoming an error.
    // The check raises no other one: what ends the process does not return.
    unsafe {
        pg_sys::QueryCancelHoldoffCount += 1;
        pgrx::check_for_interrupts!();
        pg_sys::QueryCancelHoldoffCount -= 1;
    }
    forget_cancel_request();
}

/// Reads the configuration files again if a SIGHUP asked for it, and tells whether it did.
pub fn reload_configuration() -> bool {
    if !reload_requested() {
        return false;
    }
    // SAFETY: a flag that the signal handler sets; the read is done in the main loop, outside a transaction.
    unsafe {
        std::ptr::write_volatile(&raw mut pg_sys::ConfigReloadPending, 0);
        pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
        true
    }
}

/// Ends the process. Code 0 unregisters a worker for good; any other has the postmaster honour its restart time.
pub fn exit(code: i32) -> ! {
    // SAFETY: called from a worker's main function, outside a transaction; runs the exit callbacks.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        pg_sys::proc_exit(code);
        // The bindings of 18 don't know that it does not return: bindgen overlooks `pg_noreturn`.
        #[cfg(feature = "pg18")]
        {
            pg_sys::proc_exit(code);
            std::process::abort()
        }
    }
}

/// Raises the process's limit of file descriptors as far as the system lets it, and returns it.
pub fn raise_descriptor_limit() -> usize {
    // SAFETY: the struct is filled by the first call; a failure of either leaves the limit as it was.
    let limit = unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) != 0 {
            return 1024;
        }
        let raised = libc::rlimit { rlim_cur: limit.rlim_max, rlim_max: limit.rlim_max };
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raised) == 0 { raised.rlim_cur } else { limit.rlim_cur }
    };
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// Hands memory that was freed back to the system, which the allocator keeps after a burst.
pub fn give_memory_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it may be called at any time, beside other threads.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Whether this process is one of the extension's workers.
pub fn is_own_worker() -> bool {
    // SAFETY: NULL in other processes; in a worker it points to its registration, made by `start` or `register_launcher`.
    unsafe {
        let entry = pg_sys::MyBgworkerEntry;
        !entry.is_null() && CStr::from_ptr((*entry).bgw_library_name.as_ptr()).to_bytes() == b"nexus_hub"
    }
}

/// Runs `start_threads` with every signal blocked, so that the threads it starts never run a handler of PostgreSQL's:
/// they inherit the mask, and so do the ones they start themselves.
pub fn with_signals_blocked<R>(start_threads: impl FnOnce() -> R) -> R {
    // SAFETY: the sets are initialised by the calls that fill them, and the old mask is put back.
    unsafe {
        let mut all = std::mem::zeroed();
        let mut before = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let result = start_threads();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        result
    }
}
