//! Percent-encoding (RFC 3986, 2.1).

use zeroize::Zeroizing;

/// A text with everything encoded that is not unreserved (RFC 3986, 2.3).
pub fn encode(text: &str) -> Zeroizing<String> {
    const DIGITS: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'A', 'B', 'C', 'D', 'E', 'F'];
    let mut encoded = Zeroizing::new(String::with_capacity(3 * text.len()));
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(byte.into());
        } else {
            encoded.extend(['%', DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
        }
    }
    encoded
}

/// The bytes that a text stands for.
pub fn decode(text: &str) -> Zeroizing<Vec<u8>> {
    let mut decoded = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut rest = text.as_bytes();
    while let Some((byte, length)) = first(rest) {
        decoded.push(byte);
        rest = &rest[length..];
    }
    decoded
}

/// The byte that the beginning of a text stands for, and what that takes. A per cent sign that encodes nothing is one.
pub fn first(text: &[u8]) -> Option<(u8, usize)> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    match text {
        [b'%', high, low, ..] if let (Some(high), Some(low)) = (digit(high), digit(low)) => Some((high << 4 | low, 3)),
        [byte, ..] => Some((*byte, 1)),
        [] => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded_to_the_same_bytes() {
        for text in ["", "abc-._~", "a b/c?d#e%f+g\\h:i@j&k=l{}", "ключ 🗝", "%41"] {
            assert_eq!(&**decode(&encode(text)), text.as_bytes(), "{text}");
        }
        assert_eq!(encode("a/ä").as_str(), "a%2F%C3%A4");
    }

    #[test]
    fn a_per_cent_sign_that_encodes_nothing_stays() {
        assert_eq!(&**decode("%4%zz%41%4a%"), b"%4%zzAJ%");
    }
}
