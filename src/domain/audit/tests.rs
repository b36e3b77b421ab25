use super::*;

fn deed(kind: Kind, object: Option<&str>) -> Deed<'_> {
    Deed { kind, outcome: Outcome::Allowed, object, role: 10, sub: None, nest: 1 }
}

/// The events, as text: kind, object, outcome, count.
fn finish(pending: &mut Pending, end: End) -> Vec<String> {
    let mut events = Vec::new();
    pending.finish(end, |event| {
        let object = event.object.map_or("-".into(), |object| String::from_utf8_lossy(object.bytes()).into_owned());
        events.push(format!("{} {object} {} {}", event.kind.name(), event.outcome.name(), event.count));
    });
    assert!(pending.is_empty());
    events
}

#[test]
fn equal_deeds_are_one_entry_with_their_number_and_the_time_of_the_first() {
    let mut pending = Pending::default();
    for now in 0..1000 {
        pending.note(deed(Kind::Decrypt, Some(["a", "b"][now % 2])), || now as i64);
        pending.note(deed(Kind::Decrypt, None), || now as i64);
    }
    pending.note(Deed { sub: Some([1; 16]), ..deed(Kind::Decrypt, None) }, || 0);
    pending.note(Deed { role: 11, ..deed(Kind::Decrypt, None) }, || 0);
    pending.note(Deed { outcome: Outcome::Failed, ..deed(Kind::Decrypt, None) }, || 0);
    assert_eq!(pending.entries[0].event.at, 0);
    assert_eq!(
        finish(&mut pending, End::Committed),
        [
            "decrypt a allowed 500",
            "decrypt - allowed 1000",
            "decrypt b allowed 500",
            "decrypt - allowed 1",
            "decrypt - allowed 1",
            "decrypt - failed 1"
        ]
    );
    assert_eq!(finish(&mut pending, End::Committed), Vec::<String>::new());
}

#[test]
fn of_many_objects_the_first_are_kept_and_the_rest_counted_without_ever_growing() {
    let mut pending = Pending::default();
    let capacity = pending.entries.capacity();
    for round in 0..2 {
        for number in 0..1000_u32 {
            let name = number.to_string();
            let sub = Some(u128::from(number / 100).to_be_bytes());
            for outcome in Outcome::ALL {
                let kind = Kind::ALL[(number % 4) as usize];
                let own = Deed { outcome, sub, nest: number, ..deed(kind, Some(&name)) };
                pending.note(own, || round);
            }
        }
    }
    assert_eq!(pending.entries.capacity(), capacity);
    assert!(pending.entries.len() <= EXACT + MERGED + LAST_RESORT);
    assert_eq!(pending.entries.iter().map(|entry| entry.event.count).sum::<u64>(), 10_000);
    let events = finish(&mut pending, End::Committed);
    assert_eq!(events[0], "decrypt 0 allowed 2", "those that are kept are found again");
    assert_eq!(events.iter().filter(|event| !event.contains(" - ")).count(), EXACT);
}

#[test]
fn a_rollback_undoes_changes_and_nothing_that_was_seen() {
    for (end, outcome) in [(End::Committed, "allowed"), (End::RolledBack, "rolled_back"), (End::Prepared, "prepared")] {
        let mut pending = Pending::default();
        pending.note(deed(Kind::Get, Some("g")), || 0);
        pending.note(deed(Kind::Change, Some("c")), || 0);
        pending.note(Deed { outcome: Outcome::Refused, ..deed(Kind::Change, Some("c")) }, || 0);
        assert_eq!(
            finish(&mut pending, end),
            ["get g allowed 1".into(), format!("change c {outcome} 1"), "change c refused 1".into()]
        );
    }
}

#[test]
fn a_rollback_to_a_savepoint_undoes_what_came_after_it() {
    let mut pending = Pending::default();
    let change = |nest| Deed { nest, ..deed(Kind::Change, Some("row")) };
    pending.note(change(1), || 0);
    pending.note(change(2), || 1);
    pending.note(change(3), || 2);
    pending.nested_committed(3, 2);
    pending.note(deed(Kind::Get, Some("row")), || 3);
    pending.nested_rolled_back(2);
    pending.note(change(4), || 4);
    pending.nested_committed(4, 1);
    pending.note(change(1), || 5);
    assert_eq!(
        finish(&mut pending, End::Committed),
        ["change row allowed 3", "change row rolled_back 2", "get row allowed 1"]
    );
}

#[test]
fn a_thousand_savepoints_on_one_row_are_one_entry() {
    let mut pending = Pending::default();
    for nest in 2..1002 {
        pending.note(Deed { nest, ..deed(Kind::Change, Some("row")) }, || 0);
        if nest % 4 == 0 { pending.nested_rolled_back(nest) } else { pending.nested_committed(nest, 1) }
    }
    let mut events = finish(&mut pending, End::Committed);
    events.sort();
    assert_eq!(events, ["change row allowed 750", "change row rolled_back 250"]);
}

#[test]
fn a_name_is_cut_where_a_character_ends() {
    for (name, length) in [("", 0), ("abc", 3), (&"x".repeat(101), 100), (&"ä".repeat(80), 100), (&"€".repeat(80), 99)]
    {
        let object = Object::new(name);
        assert_eq!(object.bytes().len(), length);
        assert_eq!(object.bytes(), cut(name));
        assert!(std::str::from_utf8(object.bytes()).is_ok());
    }
}
