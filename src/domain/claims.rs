//! Who is calling, by the claims of the request.

use serde_json::Value;

/// Whom the claims name, by the rule of the SQL function `nexus_hub_uid`: their `sub`, if it is written as a uuid. `None`:
/// they have none, and the older setting, which holds nothing else, is to be asked. Claims that are no JSON, for which that
/// function raises an error, name nobody.
pub fn named_by_claims(claims: &str) -> Option<Option<[u8; 16]>> {
    if claims.is_empty() {
        return None;
    }
    match serde_json::from_str::<Value>(claims) {
        Ok(Value::Object(mut claims)) => match claims.remove("sub") {
            None | Some(Value::Null) => None,
            Some(Value::String(sub)) => Some(named_by_sub(&sub)),
            // Written out, it is no uuid.
            Some(_) => Some(None),
        },
        Ok(_) => None,
        Err(_) => Some(None),
    }
}

/// Whom the text names, if it is a uuid: in the usual form, one of several that would be understood.
pub fn named_by_sub(sub: &str) -> Option<[u8; 16]> {
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
            let caller = named_by_claims(&claims).unwrap_or_else(|| named_by_sub(older));
            assert_eq!(caller, expected, "{claims} {older}");
        }
    }
}
