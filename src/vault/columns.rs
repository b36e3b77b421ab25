//! The columns that hold the vault's ciphertexts, and the registration of users' own.

use super::{keys, sweep};
use crate::pg::error::{ErrorReport, Kind, error};
use crate::pg::identity;
use pgrx::PgTryBuilder;
use pgrx::pg_sys::panic::CaughtError;
use pgrx::prelude::*;
use pgrx::spi::SpiError;
use std::panic::AssertUnwindSafe;

/// Values of a new column that are tried.
const MAX_TRIED: i64 = 100;

/// A column of a table that really holds rows, and how to read and write it.
#[derive(Clone, Debug)]
pub struct Leaf {
    pub relation: pg_sys::Oid,
    pub column: String,
    /// What its values are called in errors.
    pub noun: String,
    /// With whose rights the statements are run: a context's expression is the owner's, not ours.
    pub owner: pg_sys::Oid,
    pub is_registered: bool,
    /// Blocks that the table had when this was read.
    pub blocks: i64,
    pub look: String,
    /// Waits for who has rows locked.
    pub lock: String,
    /// Passes over them.
    pub pass: String,
    pub write: String,
    /// Why the statements cannot be run.
    pub problem: Option<String>,
}

/// The columns of all tables that hold ciphertexts, by table and name. Call it in a transaction.
pub fn leaves() -> Result<Vec<Leaf>, SpiError> {
    identity::as_superuser(|| {
        Spi::connect(|client| {
            let rows = client.select(
                "SELECT relation, column_name::pg_catalog.text, noun, owner, is_registered, blocks, look_statement, lock_statement,
                        pass_statement, write_statement, problem
                   FROM _nexus_hub.vault_leaves()",
                None,
                &[],
            )?;
            rows.map(|row| {
                Ok(Leaf {
                    relation: row.get(1)?.unwrap_or(pg_sys::InvalidOid),
                    column: row.get(2)?.unwrap_or_default(),
                    noun: row.get(3)?.unwrap_or_default(),
                    owner: row.get(4)?.unwrap_or(pg_sys::InvalidOid),
                    is_registered: row.get(5)?.unwrap_or(true),
                    blocks: row.get(6)?.unwrap_or_default(),
                    look: row.get(7)?.unwrap_or_default(),
                    lock: row.get(8)?.unwrap_or_default(),
                    pass: row.get(9)?.unwrap_or_default(),
                    write: row.get(10)?.unwrap_or_default(),
                    problem: row.get(11)?,
                })
            })
            .collect()
        })
    })
}

/// Has rotations take a column along; see the function's COMMENT.
#[pg_extern(sql = false)]
fn register_vault_column(
    table: Option<pg_sys::Oid>,
    column: Option<&str>,
    context: Option<&str>,
) -> Result<(), ErrorReport> {
    let (table, column) = named(table, column)?;
    require_owner(table)?;
    if let Some(fault) = fault(table, &column).map_err(internal)? {
        return Err(error(Kind::BadArgument, format!("the column \"{column}\" cannot be registered: {fault}"))
            .set_hint("Register a column of type bytea, of an ordinary or partitioned table, that holds what encrypt_token made."));
    }
    let context = context.map(str::trim).filter(|context| !context.is_empty());
    identity::as_superuser(|| {
        Spi::connect_mut(|client| {
            let arguments = [table.into(), column.as_str().into(), context.into()];
            client
                .update("SELECT _nexus_hub.put_registered_column($1, $2::pg_catalog.name, $3)", None, &arguments)
                .map(|_| ())
        })
    })
    .map_err(internal)?;
    try_out(table, &column)
}

/// Runs the new column's statement, whose errors are the caller's to see, and warns when it opens nothing.
fn try_out(table: pg_sys::Oid, column: &str) -> Result<(), ErrorReport> {
    let is_this = |leaf: &&Leaf| leaf.is_registered && leaf.column == column && leaf.problem.is_none();
    let leaves = leaves().map_err(internal)?;
    let Some(leaf) = leaves.iter().find(|leaf| is_this(leaf) && leaf.relation == table).or_else(|| {
        // A partitioned table has no rows of its own.
        leaves.iter().rev().find(is_this)
    }) else {
        return Ok(());
    };
    let ring = keys::configured().then(keys::ring).and_then(Result::ok);
    let (mut seen, mut opened) = (0, 0);
    let looked = PgTryBuilder::new(AssertUnwindSafe(|| {
        sweep::look(leaf, 0..leaf.blocks.clamp(1, 8), ring.as_deref(), |_, opener| {
            seen += 1;
            opened += i64::from(opener.is_some());
            seen < MAX_TRIED
        })
    }));
    // The same error, in words that say whose it is. The transaction is aborted all the same.
    let explained = looked.catch_others(|caught| match caught {
        CaughtError::PostgresError(report) if report.sql_error_code() != PgSqlErrorCode::ERRCODE_QUERY_CANCELED => {
            Err(error(Kind::BadArgument, format!("p_context cannot be evaluated: {}", report.message()))
                .set_hint("It is an SQL expression over the row's columns, such as user_id::text; functions in it need their schema."))
        }
        other => other.rethrow(),
    });
    explained.execute()?;
    if ring.is_some() && seen > 0 && opened == 0 {
        warning!(
            "none of the first {seen} values of the column \"{column}\" can be decrypted: is p_context what they were encrypted with?"
        );
    }
    Ok(())
}

/// Has rotations leave a column alone; see the function's COMMENT.
#[pg_extern(sql = false)]
fn unregister_vault_column(table: Option<pg_sys::Oid>, column: Option<&str>) -> Result<bool, ErrorReport> {
    let (table, column) = named(table, column)?;
    require_owner(table)?;
    identity::as_superuser(|| {
        Spi::connect_mut(|client| {
            let arguments = [table.into(), column.as_str().into()];
            let dropped = client.update(
                "SELECT _nexus_hub.drop_registered_column($1, $2::pg_catalog.name)",
                Some(1),
                &arguments,
            )?;
            dropped.first().get_one::<bool>()
        })
    })
    .map(Option::unwrap_or_default)
    .map_err(internal)
}

fn named(table: Option<pg_sys::Oid>, column: Option<&str>) -> Result<(pg_sys::Oid, String), ErrorReport> {
    let missing = |name| error(Kind::BadArgument, format!("{name} is NULL")).set_hint("Pass a table and its column.");
    let column = column.ok_or_else(|| missing("p_column"))?.to_owned();
    Ok((table.ok_or_else(|| missing("p_table"))?, column))
}

fn require_owner(table: pg_sys::Oid) -> Result<(), ErrorReport> {
    if identity::owns_table(table) {
        return Ok(());
    }
    Err(error(Kind::NotAllowed, "only a table's owner can say what is in its columns")
        .set_detail("Rotations will read and write the column with the owner's rights."))
}

fn fault(table: pg_sys::Oid, column: &str) -> Result<Option<String>, SpiError> {
    identity::as_superuser(|| {
        Spi::connect(|client| {
            let arguments = [table.into(), column.into()];
            client
                .select("SELECT _nexus_hub.column_fault($1, $2::pg_catalog.name)", Some(1), &arguments)?
                .first()
                .get_one()
        })
    })
}

/// The values of a column by the key that opens them.
#[pg_extern(sql = false)]
fn count_values(
    relation: Option<pg_sys::Oid>,
    column: Option<&str>,
) -> Result<TableIterator<'static, (name!(fingerprint, Option<String>), name!(value_count, i64))>, ErrorReport> {
    let (relation, column) = named(relation, column)?;
    let ring = keys::configured().then(keys::ring).transpose()?;
    let fingerprints = ring.as_ref().map_or(&[][..], |ring| ring.fingerprints());
    let mut counts = vec![0; fingerprints.len() + 1];
    for leaf in leaves().map_err(internal)?.iter().filter(|leaf| leaf.relation == relation && leaf.column == column) {
        for blocks in sweep::ranges(leaf.blocks) {
            sweep::look(leaf, blocks, ring.as_deref(), |_, opener| {
                counts[opener.unwrap_or(fingerprints.len())] += 1;
                true
            })?;
        }
    }
    let names = fingerprints.iter().map(|fingerprint| Some(fingerprint.to_string())).chain([None]);
    let counted: Vec<_> = names.zip(counts).filter(|(_, count)| *count > 0).collect();
    Ok(TableIterator::new(counted))
}

fn internal(problem: SpiError) -> ErrorReport {
    error(Kind::Internal, format!("could not read the vault's columns: {problem}"))
}
