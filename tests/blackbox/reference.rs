//! docs/reference.md is what the code says of itself: its settings, and the catalogue's comments. `make docs` writes it.

use crate::support::*;
use postgres::Client;
use std::fmt::Write;
use std::path::Path;

/// A value as one writes it into a configuration file.
fn shown(value: &str, unit: Option<&str>) -> String {
    let Ok(number) = value.parse::<i64>() else { return value.to_owned() };
    let larger: &[(i64, &str)] = match unit {
        Some("ms") => &[(86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s"), (1, "ms")],
        Some("s") => &[(86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")],
        Some("min") => &[(1_440, "d"), (60, "h"), (1, "min")],
        Some("B") => &[(1 << 20, "MB"), (1 << 10, "kB"), (1, "B")],
        Some("kB") => &[(1 << 20, "GB"), (1 << 10, "MB"), (1, "kB")],
        _ => &[],
    };
    let fits = larger.iter().find(|(size, _)| number != 0 && number % size == 0);
    fits.map_or_else(|| value.to_owned(), |(size, name)| format!("{}{name}", number / size))
}

/// A text that may stand in a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;").replace('\n', " ")
}

fn settings(page: &mut String, client: &mut Client) {
    let rows = client
        .query(
            "SELECT name, boot_val, unit, context, vartype, min_val, max_val, short_desc, extra_desc, array_to_string(enumvals, ', ')
               FROM pg_settings WHERE name LIKE 'nexus\\_hub.%' ORDER BY name",
            &[],
        )
        .expect("pg_settings");
    page.push_str(
        "\n## Settings\n\nWhere: *start* in the configuration file, read when the server starts; *reload* in the configuration file,\n\
         read again at a reload; *database* there, or with `ALTER DATABASE … SET`, both read at a reload. A `SET` in a session does\n\
         not reach the worker.\n\n| setting | default | range | where | |\n|---|---|---|---|---|\n",
    );
    for row in rows {
        let get = |index: usize| row.get::<_, Option<String>>(index);
        let unit = get(2);
        let value = |index: usize| shown(&get(index).unwrap_or_default(), unit.as_deref());
        let range = match get(4).as_deref() {
            Some("integer") if get(6).as_deref() == Some("2147483647") => format!("{} or more", value(5)),
            Some("integer") => format!("{} to {}", value(5), value(6)),
            Some("enum") => get(9).unwrap_or_default(),
            Some("bool") => "on, off".into(),
            _ => String::new(),
        };
        let place = match get(3).as_deref() {
            Some("postmaster") => "start",
            Some("sighup") => "reload",
            Some("superuser") => "database",
            other => panic!("{other:?}"),
        };
        let default = Some(value(1)).filter(|value| !value.is_empty()).map(|value| format!("`{value}`"));
        let text = format!("{} {}", get(7).unwrap_or_default(), get(8).unwrap_or_default());
        let (name, default) = (get(0).unwrap_or_default(), default.unwrap_or_default());
        writeln!(page, "| `{name}` | {default} | {range} | {place} | {} |", cell(text.trim())).expect("a string");
    }
}

fn functions(page: &mut String, client: &mut Client) {
    let rows = client
        .query(
            "SELECT p.proname || '(' || pg_get_function_arguments(p.oid) || ')', pg_get_function_result(p.oid), obj_description(p.oid, 'pg_proc'),
                    (SELECT string_agg(a.role, ', ' ORDER BY a.role)
                       FROM (SELECT DISTINCT CASE grantee WHEN 0 THEN 'everybody' ELSE grantee::regrole::text END AS role
                               FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) WHERE grantee <> p.proowner) AS a)
               FROM pg_proc p
               JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
               JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND e.extname = 'nexus_hub'
              WHERE p.pronamespace = e.extnamespace
              ORDER BY p.proname",
            &[],
        )
        .expect("the functions");
    page.push_str("\n## Functions\n");
    for row in rows {
        let (call, result, comment): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        let (name, arguments) = call.split_once('(').expect("a function");
        let roles = row.get::<_, Option<String>>(3).unwrap_or_else(|| "the owner alone".into());
        write!(
            page,
            "\n### {name}\n\n```\n{name}({arguments} → {result}\n```\n\n{}\n\nFor: {roles}.\n",
            comment.replace('<', "&lt;")
        )
        .expect("a string");
    }
}

fn tables(page: &mut String, client: &mut Client) {
    let tables = client
        .query(
            "SELECT c.oid::bigint, c.relname::text, c.relkind = 'v', obj_description(c.oid, 'pg_class')
               FROM pg_class c
               JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
               JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND e.extname = 'nexus_hub'
              WHERE c.relnamespace = e.extnamespace AND c.relkind IN ('r', 'v')
              ORDER BY c.relname",
            &[],
        )
        .expect("the tables");
    page.push_str("\n## Tables and views\n");
    for table in tables {
        let (name, is_view, comment): (String, bool, String) = (table.get(1), table.get(2), table.get(3));
        let kind = if is_view { "A view. " } else { "" };
        write!(page, "\n### {name}\n\n{kind}{}\n\n| column | type | |\n|---|---|---|\n", comment.replace('<', "&lt;"))
            .expect("a string");
        let columns = client
            .query(
                "SELECT a.attname::text, format_type(a.atttypid, a.atttypmod),
                        CASE WHEN a.attgenerated <> '' THEN 'generated' ELSE pg_get_expr(x.adbin, x.adrelid) END,
                        a.attnotnull, col_description(a.attrelid, a.attnum)
                   FROM pg_attribute a LEFT JOIN pg_attrdef x ON x.adrelid = a.attrelid AND x.adnum = a.attnum
                  WHERE a.attrelid = $1::bigint::oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
                &[&table.get::<_, i64>(0)],
            )
            .expect("the columns");
        for column in columns {
            let default = column.get::<_, Option<String>>(2);
            let default = default
                .map(|default| format!(", {}`{}`", if default == "generated" { "" } else { "default " }, default));
            let required = if column.get::<_, bool>(3) { " not null" } else { "" };
            let (name, kind, comment): (String, String, String) = (column.get(0), column.get(1), column.get(4));
            writeln!(
                page,
                "| `{name}` | {kind}{required}{} | {} |",
                cell(&default.unwrap_or_default()),
                cell(&comment)
            )
            .expect("a string");
        }
    }
}

#[test]
fn the_reference_is_what_the_code_says_of_itself() {
    let database = shared().database();
    let mut client = database.connect();
    // The view of settings knows them once the library is loaded, which a preloaded one is.
    let mut page = String::from(
        "# Reference\n\nWritten by `make docs` from the settings' own descriptions and the comments in the catalogue; `\\dx+ nexus_hub`,\n\
         `\\df+` and `\\d+` show the same in psql.\n\n[Settings](#settings) · [Functions](#functions) · [Tables and views](#tables-and-views)\n",
    );
    settings(&mut page, &mut client);
    functions(&mut page, &mut client);
    tables(&mut page, &mut client);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference.md");
    if std::env::var_os("NEXUS_HUB_WRITE_REFERENCE").is_some() {
        std::fs::write(&file, &page).expect("docs/reference.md");
    }
    let found = std::fs::read_to_string(&file).unwrap_or_default();
    let differs = found.lines().zip(page.lines()).find(|(found, expected)| found != expected);
    assert!(found == page, "docs/reference.md is not up to date: `make docs` (first: {differs:?})");
}
