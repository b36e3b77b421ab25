//! Finding a text in another, however that is written.

use super::percent;
use zeroize::Zeroizing;

/// A text to be found in one pass over another (Knuth, Morris and Pratt): whoever answers decides what is searched, and
/// must not decide how long that takes.
pub struct Needle {
    text: Zeroizing<Vec<u8>>,
    /// For each beginning of the text, the length of the longest shorter one that it ends with.
    fallbacks: Vec<usize>,
}

impl Needle {
    pub fn new(text: &[u8]) -> Self {
        let mut fallbacks = vec![0; text.len()];
        let mut length = 0;
        for at in 1..text.len() {
            while length > 0 && text[at] != text[length] {
                length = fallbacks[length - 1];
            }
            length += usize::from(text[at] == text[length]);
            fallbacks[at] = length;
        }
        Self { text: Zeroizing::new(text.to_vec()), fallbacks }
    }

    pub fn text(&self) -> &[u8] {
        &self.text
    }

    /// Finds the text, again behind each place. `read` reads what the rest of the haystack begins with.
    pub fn find(&self, haystack: &[u8], read: impl Fn(&[u8]) -> Option<Unit>, mut found: impl FnMut(usize, usize)) {
        if haystack.len() < self.text.len() {
            return;
        }
        // Where each of the last bytes began, as many as the text has.
        let mut begins = vec![0; self.text.len()];
        let (mut at, mut count, mut length) = (0, 0, 0);
        while let Some(unit) = read(&haystack[at..]) {
            let begin = at;
            at += unit.taken;
            for byte in &unit.bytes[..unit.length] {
                begins[count % self.text.len()] = begin;
                count += 1;
                while length > 0 && *byte != self.text[length] {
                    length = self.fallbacks[length - 1];
                }
                length += usize::from(*byte == self.text[length]);
                if length == self.text.len() {
                    found(begins[count % self.text.len()], at);
                    length = 0;
                }
            }
        }
    }
}

/// What some bytes of a text stand for.
pub struct Unit {
    bytes: [u8; 4],
    length: usize,
    taken: usize,
}

impl Unit {
    fn byte((byte, taken): (u8, usize)) -> Self {
        Self { bytes: [byte, 0, 0, 0], length: 1, taken }
    }

    fn character(character: char, taken: usize) -> Self {
        let mut bytes = [0; 4];
        let length = character.encode_utf8(&mut bytes).len();
        Self { bytes, length, taken }
    }
}

/// As it is.
pub fn plain(text: &[u8]) -> Option<Unit> {
    text.first().map(|byte| Unit::byte((*byte, 1)))
}

/// As URLs have it.
pub fn percent_encoded(text: &[u8]) -> Option<Unit> {
    percent::first(text).map(Unit::byte)
}

/// As forms and queries have it.
pub fn form_encoded(text: &[u8]) -> Option<Unit> {
    if text.first() == Some(&b'+') { Some(Unit::byte((b' ', 1))) } else { percent_encoded(text) }
}

/// As strings of JSON have it, also where the text is none, or a string that holds more JSON.
pub fn escaped(text: &[u8]) -> Option<Unit> {
    let code_unit = |text: &[u8]| {
        let digits = text.strip_prefix(b"\\u")?.get(..4)?;
        u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    let [b'\\', second, ..] = text else { return plain(text) };
    let Some(high) = code_unit(text) else {
        // A backslash and n, say, are a control character, which no secret has.
        let is_itself = matches!(second, b'"' | b'\\' | b'/');
        return if is_itself { Some(Unit::byte((*second, 2))) } else { plain(text) };
    };
    let pair = text.get(6..).and_then(code_unit).and_then(|low| char::decode_utf16([high, low]).next()?.ok());
    match (char::decode_utf16([high]).next(), pair) {
        (Some(Ok(character)), _) => Some(Unit::character(character, 6)),
        (_, Some(character)) => Some(Unit::character(character, 12)),
        _ => Some(Unit::character(char::REPLACEMENT_CHARACTER, 6)),
    }
}
