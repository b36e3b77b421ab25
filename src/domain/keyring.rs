//! The vault's keys: the first encrypts, all decrypt.

use super::envelope::Key;
use zeroize::{Zeroize, Zeroizing};

/// A ring of at least one key.
pub struct KeyRing(Vec<Key>);

/// Why a text is no key ring. Never quotes the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// There is no key in it.
    Empty,
    /// The line of that number is not 64 hex characters.
    Line(usize),
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Malformed::Empty => f.write_str("it holds no key"),
            Malformed::Line(number) => write!(f, "line {number} is not 64 hex characters"),
        }
    }
}

impl KeyRing {
    /// Reads one key a line, newest first. Empty lines and lines that begin with `#` are passed over.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let mut keys = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut bytes = Zeroizing::new([0u8; 32]);
            if hex::decode_to_slice(line, bytes.as_mut_slice()).is_err() {
                bytes.zeroize();
                return Err(Malformed::Line(index + 1));
            }
            keys.push(Key::new(&bytes));
        }
        if keys.is_empty() { Err(Malformed::Empty) } else { Ok(Self(keys)) }
    }

    /// Encrypts with the first key. `None`: too long for GCM.
    pub fn seal(&self, iv: [u8; 12], plaintext: &[u8], context: &[u8]) -> Option<Vec<u8>> {
        self.0.first()?.seal(iv, plaintext, context)
    }

    /// Decrypts with whichever key fits.
    pub fn open(&self, envelope: &[u8], context: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        self.0.iter().find_map(|key| key.open(envelope, context))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "0000000000000000000000000000000000000000000000000000000000000001";
    const NEW: &str = "00000000000000000000000000000000000000000000000000000000000000FF";

    fn ring(text: &str) -> KeyRing {
        KeyRing::parse(text).unwrap_or_else(|problem| panic!("{problem}"))
    }

    #[test]
    fn the_first_key_encrypts_and_all_decrypt() {
        let sealed_by_old = ring(OLD).seal([1; 12], b"x", b"").unwrap_or_default();
        let both = ring(&format!("# newest first\n\n{NEW}\r\n  {OLD}  \n"));
        assert!(both.open(&sealed_by_old, b"").is_some());
        let sealed_by_new = both.seal([2; 12], b"x", b"").unwrap_or_default();
        assert!(ring(NEW).open(&sealed_by_new, b"").is_some());
        assert!(ring(OLD).open(&sealed_by_new, b"").is_none());
    }

    #[test]
    fn a_malformed_ring_is_told_by_line_without_its_text() {
        assert_eq!(KeyRing::parse(" \n# only words\n").err(), Some(Malformed::Empty));
        let problem = KeyRing::parse(&format!("{NEW}\nnot-a-key\n")).err();
        assert_eq!(problem, Some(Malformed::Line(2)));
        assert_eq!(Malformed::Line(2).to_string(), "line 2 is not 64 hex characters");
        assert_eq!(KeyRing::parse(&NEW[2..]).err(), Some(Malformed::Line(1)));
        assert_eq!(KeyRing::parse(&format!("{NEW}00")).err(), Some(Malformed::Line(1)));
    }
}
