//! The background workers: a launcher for the server, and one worker for each database that has the extension.

mod assign;
mod backlog;
mod feed;
mod fill;
mod launcher;
mod limits;
mod prune;
mod record;
mod refresh;
mod rotate;
mod run;
mod start;
mod step;
mod sync;

use crate::pg::bgworker;
use pgrx::prelude::*;

/// The launcher's entry point, by name, as the postmaster looks it up.
const LAUNCHER_MAIN: &str = "nexus_hub_launcher_main";
/// The workers' name and entry point.
const WORKER: &str = "nexus_hub worker";
const WORKER_MAIN: &str = "nexus_hub_worker_main";
/// The name and entry point of the process that rotates the vault's keys, while they are being rotated.
const ROTATION: &str = "nexus_hub rotation";
const ROTATION_MAIN: &str = "nexus_hub_rotation_main";

/// Registers the launcher. Only from `_PG_init` of a preloaded library.
pub fn register() {
    bgworker::register_launcher(LAUNCHER_MAIN);
}

/// Entry point of the launcher.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn nexus_hub_launcher_main(_argument: pg_sys::Datum) {
    launcher::main();
    // Not 0, which would unregister the launcher until the server restarts.
    bgworker::exit(1);
}

/// Entry point of a worker; the argument is its slot in shared memory.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn nexus_hub_worker_main(argument: pg_sys::Datum) {
    let code = start::main(argument.value());
    bgworker::exit(code);
}

/// Entry point of a rotation of the vault's keys; the argument is the database's oid.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn nexus_hub_rotation_main(argument: pg_sys::Datum) {
    rotate::main(pg_sys::Oid::from(argument.value() as u32));
    bgworker::exit(0);
}
