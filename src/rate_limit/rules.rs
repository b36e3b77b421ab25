//! Exemptions and overrides: kept by each session, and read again when somebody has changed them. Where there are none,
//! a call costs a look at a counter.

use crate::domain::rate::SECOND;
use crate::pg::error::{ErrorReport, Kind, error};
use crate::pg::shmem::rates::Rates;
use crate::pg::{identity, snapshot};
use pgrx::prelude::*;
use pgrx::spi::SpiError;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// How long they are good for at most: of changes on a standby's primary, and by prepared transactions, nobody is told.
const TIME: u64 = 10 * SECOND;

/// What is said of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    None,
    /// No limit is for it.
    Exempt,
    /// This limit instead of the caller's.
    Limit(i32),
}

#[derive(Default)]
struct Rules {
    exempt: HashSet<String>,
    exempt_users: HashSet<[u8; 16]>,
    texts: HashMap<String, i32>,
    servers: HashMap<String, i32>,
    users: HashMap<[u8; 16], i32>,
    pairs: HashMap<String, HashMap<[u8; 16], i32>>,
}

// What was read last. One thread owns PostgreSQL, so these are plain variables of the process.
/// By [`Rates::rules`]; 0: nothing that is good for later.
static VERSION: AtomicU64 = AtomicU64::new(0);
static READ_AT: AtomicU64 = AtomicU64::new(0);
static ANY: AtomicBool = AtomicBool::new(false);

thread_local! {
    static RULES: RefCell<Rules> = RefCell::default();
}

/// Whether it is known that there are none.
pub fn are_none(table: Rates, now: u64) -> bool {
    !ANY.load(Relaxed) && is_known(table.rules(), now)
}

fn is_known(version: u64, now: u64) -> bool {
    let read_at = READ_AT.load(Relaxed);
    version != 0 && VERSION.load(Relaxed) == version && (read_at..read_at.saturating_add(TIME)).contains(&now)
}

/// They could not be read.
pub fn unreadable(problem: SpiError) -> ErrorReport {
    error(Kind::Internal, format!("could not read the exemptions and overrides of rate limits: {problem}"))
}

/// What is said of calls of a user to a server: an exemption of either, else the override of both, of the user, of the
/// server.
pub fn of_server(table: Option<Rates>, server: &str, user: Option<&[u8; 16]>, now: u64) -> Result<Rule, SpiError> {
    refresh(table, now)?;
    Ok(of_server_as_known(server, user))
}

/// The same by what was read last.
pub fn of_server_as_known(server: &str, user: Option<&[u8; 16]>) -> Rule {
    if !ANY.load(Relaxed) {
        return Rule::None;
    }
    RULES.with_borrow(|rules| {
        if rules.exempt.contains(server) || user.is_some_and(|user| rules.exempt_users.contains(user)) {
            return Rule::Exempt;
        }
        let of_user = user.and_then(|user| {
            let pair = rules.pairs.get(server).and_then(|users| users.get(user));
            pair.or_else(|| rules.users.get(user))
        });
        of_user.or_else(|| rules.servers.get(server)).map_or(Rule::None, |limit| Rule::Limit(*limit))
    })
}

/// What is said of a text.
pub fn of_text(table: Option<Rates>, text: &str, now: u64) -> Result<Rule, SpiError> {
    if !refresh(table, now)? {
        return Ok(Rule::None);
    }
    Ok(RULES.with_borrow(|rules| {
        if rules.exempt.contains(text) {
            return Rule::Exempt;
        }
        rules.texts.get(text).map_or(Rule::None, |limit| Rule::Limit(*limit))
    }))
}

/// Reads them again if they may have changed, and tells whether there are any.
pub fn refresh(table: Option<Rates>, now: u64) -> Result<bool, SpiError> {
    // Looked at before reading: what changes meanwhile is read the next time.
    let version = table.map_or(0, |table| table.rules());
    if is_known(version, now) {
        return Ok(ANY.load(Relaxed));
    }
    VERSION.store(0, Relaxed);
    let rules = read()?;
    let any = rules.any();
    RULES.set(rules);
    ANY.store(any, Relaxed);
    READ_AT.store(now, Relaxed);
    VERSION.store(version, Relaxed);
    Ok(any)
}

fn read() -> Result<Rules, SpiError> {
    let read = || {
        Spi::connect(|client| {
            let mut rules = Rules::default();
            let rows = client.select(
                "SELECT is_exempt, identifier, server_id, user_id, request_limit FROM _nexus_hub.rate_limit_rules()",
                None,
                &[],
            )?;
            for row in rows {
                let is_exempt = row.get::<bool>(1)?.unwrap_or_default();
                let user = row.get::<pgrx::Uuid>(4)?.map(|user| *user.as_bytes());
                rules.add(is_exempt, row.get(2)?, row.get(3)?, user, row.get(5)?.unwrap_or_default());
            }
            Ok(rules)
        })
    };
    // What is committed by now, also for a transaction that goes by an older snapshot.
    identity::as_superuser(|| snapshot::with_latest(read))
}

impl Rules {
    fn any(&self) -> bool {
        let Self { exempt, exempt_users, texts, servers, users, pairs } = self;
        let exemptions = exempt.len() + exempt_users.len();
        exemptions + texts.len() + servers.len() + users.len() + pairs.len() > 0
    }

    fn add(
        &mut self,
        is_exempt: bool,
        text: Option<String>,
        server: Option<String>,
        user: Option<[u8; 16]>,
        limit: i32,
    ) {
        match (is_exempt, text, server, user) {
            (true, Some(text), ..) => {
                // In whatever way the user's id is written.
                self.exempt_users.extend(uuid::Uuid::try_parse(&text).ok().map(uuid::Uuid::into_bytes));
                self.exempt.insert(text);
            }
            (false, Some(text), ..) => _ = self.texts.insert(text, limit),
            (_, None, Some(server), Some(user)) => _ = self.pairs.entry(server).or_default().insert(user, limit),
            (_, None, Some(server), None) => _ = self.servers.insert(server, limit),
            (_, None, None, Some(user)) => _ = self.users.insert(user, limit),
            (_, None, None, None) => {}
        }
    }
}
