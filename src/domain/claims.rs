//! Who is calling, by the claims of the request.

use serde_json::Value;

/// The caller's id, by the rule of the SQL function `nexus_hub_uid`: `sub` of the claims, else the older setting that holds
/// nothing else; and only what is written as a uuid. Claims that are no JSON, for which that raises an error, name nobody.
pub fn caller(claims: &str, older: &str) -> Option<[u8; 16]> {
    let claimed = match claims {
        "" => None,
        text => match serde_json::from_str::<Value>(text).ok()? {
            Value::Object(mut claims) => claims.remove("sub").filter(|sub| !sub.is_null()),
            _ => None,
        },
    };
    let sub = match &claimed {
        Some(Value::String(sub)) => sub,
        // Of another type: written out, no uuid.
        Some(_) => return None,
        None => older,
    };
    // One of several ways of writing it that would be understood.
    (sub.len() == 36).then(|| uuid::Uuid::try_parse(sub).ok()).flatten().map(uuid::Uuid::into_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caller_is_the_sub_of_the_claims_or_of_the_older_setting_if_it_is_a_uuid() {
        const A: &str = "A11CE000-0000-4000-8000-000000000001";
        const B: &str = "b0b00000-0000-4000-8000-000000000002";
        let bytes = |text: &str| uuid::Uuid::try_parse(text).ok().map(uuid::Uuid::into_bytes);
        let claims = |sub: &str| format!("{{\"role\": \"anon\", \"sub\": {sub}}}");
        for (claims, older, expected) in [
            (claims(&format!("\"{A}\"")), "", bytes(A)),
            (claims(&format!("\"{A}\"")), B, bytes(A)),
            (claims("null"), B, bytes(B)),
            ("{}".into(), B, bytes(B)),
            (String::new(), B, bytes(B)),
            ("[]".into(), B, bytes(B)),
            (claims("\"me@example.com\""), B, None),
            (claims("5"), B, None),
            (claims(&format!("\"{{{A}}}\"")), "", None),
            (claims(&format!("\"{}\"", A.replace('-', ""))), "", None),
            ("not JSON".into(), B, None),
            (String::new(), "", None),
        ] {
            assert_eq!(caller(&claims, older), expected, "{claims} {older}");
        }
    }
}
