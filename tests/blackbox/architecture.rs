//! The floors of DESIGN: imports run downward only, and `unsafe` stays on its floor.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("src") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The module of the crate's root that a file belongs to.
fn module(file: &Path) -> String {
    let relative = file.strip_prefix(src()).expect("below src");
    let first = relative.components().next().expect("a name").as_os_str().to_string_lossy();
    first.trim_end_matches(".rs").to_owned()
}

fn floor(module: &str) -> u8 {
    match module {
        "domain" => 0,
        "net" | "pg" => 1,
        "worker" => 3,
        "lib" => 4,
        _ => 2,
    }
}

#[test]
fn imports_run_downward_only() {
    let mut checked = 0;
    for file in sources(&src()) {
        let own = module(&file);
        for (number, line) in fs::read_to_string(&file).expect("text").lines().enumerate() {
            for path in line.split("crate::").skip(1) {
                let used: String = path.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if used.is_empty() || used == own {
                    continue;
                }
                checked += 1;
                // Façades may use each other; `pg` and `net` must not.
                let allowed = floor(&used) < floor(&own) || (floor(&own) == 2 && floor(&used) == 2);
                assert!(allowed, "{}:{}: {own} must not use {used}", file.display(), number + 1);
            }
        }
    }
    assert!(checked > 20, "the imports were not found");
}

#[test]
fn unsafe_code_stays_on_the_floor_of_postgresql_and_says_why_it_holds() {
    for file in sources(&src()) {
        let text = fs::read_to_string(&file).expect("text");
        let lines: Vec<_> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if !code.contains("unsafe {") || code.contains("#[unsafe(") {
                continue;
            }
            let place = format!("{}:{}", file.display(), number + 1);
            assert_eq!(module(&file), "pg", "unsafe at {place}");
            let above = &lines[number.saturating_sub(12)..=number];
            assert!(above.iter().any(|line| line.contains("SAFETY:")), "no SAFETY at {place}");
        }
    }
}

#[test]
fn the_pure_floor_has_no_clock_and_no_randomness() {
    for file in sources(&src().join("domain")) {
        let text = fs::read_to_string(&file).expect("text");
        // Tests may look at the clock.
        let text = text.split("#[cfg(test)]").next().unwrap_or_default();
        if file.ends_with("tests.rs") || file.components().any(|part| part.as_os_str() == "tests") {
            continue;
        }
        for word in ["Instant::now()", "SystemTime::now()", "rand::", "pgrx", "tokio", "reqwest"] {
            assert!(!text.contains(word), "{word} in {}", file.display());
        }
    }
}
