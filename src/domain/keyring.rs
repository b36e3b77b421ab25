//! The vault's keys: the first encrypts, all decrypt.

use super::envelope::{Fingerprint, Key};
use zeroize::Zeroizing;

/// A key as it comes from its source.
pub type RawKey = [u8; 32];

/// Keys that a ring has at most: each ciphertext that none of them opens is tried with all of them.
pub const MAX_KEYS: usize = 32;

/// A ring of at least one key.
pub struct KeyRing {
    keys: Vec<Key>,
    fingerprints: Vec<Fingerprint>,
}

/// Why a text is no key ring. Never quotes the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// There is no key in it.
    Empty,
    /// The line of that number is not 64 hex characters.
    Line(usize),
    /// There are more than [`MAX_KEYS`].
    TooMany,
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Malformed::Empty => f.write_str("it holds no key"),
            Malformed::Line(number) => write!(f, "line {number} is not 64 hex characters"),
            Malformed::TooMany => write!(f, "it holds more than {MAX_KEYS} keys"),
        }
    }
}

/// Reads one key a line, newest first. Empty lines and lines that begin with `#` are passed over.
pub fn parse(text: &str) -> Result<Zeroizing<Vec<RawKey>>, Malformed> {
    // It never grows, because a Vec that does leaves copies of the keys behind.
    let mut keys = Zeroizing::new(Vec::with_capacity(MAX_KEYS));
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if keys.len() == MAX_KEYS {
            return Err(Malformed::TooMany);
        }
        let mut key = Zeroizing::new([0; 32]);
        hex::decode_to_slice(line, key.as_mut_slice()).map_err(|_| Malformed::Line(index + 1))?;
        keys.push(*key);
    }
    if keys.is_empty() { Err(Malformed::Empty) } else { Ok(keys) }
}

/// What became of a ciphertext that was to be under the first key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resealed {
    /// It is now.
    Anew(Vec<u8>),
    /// It was.
    Already,
    /// No key opens it.
    Unopened,
}

impl KeyRing {
    /// A ring of these keys, the first of which encrypts.
    pub fn new(keys: &[RawKey]) -> Self {
        let keys: Vec<_> = keys.iter().map(Key::new).collect();
        let fingerprints = keys.iter().map(Key::fingerprint).collect();
        Self { keys, fingerprints }
    }

    /// What the keys are known by, in their order.
    pub fn fingerprints(&self) -> &[Fingerprint] {
        &self.fingerprints
    }

    /// Which key opens a ciphertext: its place, from 0.
    pub fn opener(&self, envelope: &[u8], context: &[u8]) -> Option<usize> {
        self.keys.iter().position(|key| key.open(envelope, context).is_some())
    }

    /// Encrypts with the first key. `None`: too long for GCM.
    pub fn seal(&self, iv: [u8; 12], plaintext: &[u8], context: &[u8]) -> Option<Vec<u8>> {
        self.keys.first()?.seal(iv, plaintext, context)
    }

    /// Decrypts with whichever key fits.
    pub fn open(&self, envelope: &[u8], context: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        self.keys.iter().find_map(|key| key.open(envelope, context))
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Encrypts anew under the first key what another one opens. The older keys are tried first: most of what is to be
    /// rotated is under one of them. `iv` is asked for only when it is needed.
    pub fn reseal<E>(
        &self,
        envelope: &[u8],
        context: &[u8],
        iv: impl FnOnce() -> Result<[u8; 12], E>,
    ) -> Result<Resealed, E> {
        let Some((first, older)) = self.keys.split_first() else { return Ok(Resealed::Unopened) };
        let Some(plaintext) = older.iter().find_map(|key| key.open(envelope, context)) else {
            return Ok(if first.open(envelope, context).is_some() { Resealed::Already } else { Resealed::Unopened });
        };
        Ok(first.seal(iv()?, &plaintext, context).map_or(Resealed::Unopened, Resealed::Anew))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "0000000000000000000000000000000000000000000000000000000000000001";
    const NEW: &str = "00000000000000000000000000000000000000000000000000000000000000FF";

    fn ring(text: &str) -> KeyRing {
        KeyRing::new(&parse(text).unwrap_or_else(|problem| panic!("{problem}")))
    }

    #[test]
    fn the_first_key_encrypts_and_all_decrypt() {
        let sealed_by_old = ring(OLD).seal([1; 12], b"x", b"").unwrap_or_default();
        let both = ring(&format!("# newest first\n\n{NEW}\r\n  {OLD}  \n"));
        assert!(both.open(&sealed_by_old, b"").is_some());
        let sealed_by_new = both.seal([2; 12], b"x", b"").unwrap_or_default();
        assert!(ring(NEW).open(&sealed_by_new, b"").is_some());
        assert!(ring(OLD).open(&sealed_by_new, b"").is_none());
        assert_eq!(both.fingerprints(), [ring(NEW).fingerprints(), ring(OLD).fingerprints()].concat());
        assert_eq!((both.opener(&sealed_by_old, b""), both.opener(&sealed_by_new, b"")), (Some(1), Some(0)));
        assert_eq!(ring(OLD).opener(&sealed_by_new, b""), None);
    }

    #[test]
    fn resealing_brings_everything_under_the_first_key_once() {
        let sealed_by_old = ring(OLD).seal([1; 12], b"x", b"row").unwrap_or_default();
        let both = ring(&format!("{NEW}\n{OLD}"));
        let iv = || Ok::<_, ()>([2; 12]);
        let Ok(Resealed::Anew(anew)) = both.reseal(&sealed_by_old, b"row", iv) else { panic!("not resealed") };
        assert_eq!(ring(NEW).open(&anew, b"row").as_deref().map(Vec::as_slice), Some(b"x".as_slice()));
        assert_eq!(both.reseal(&anew, b"row", iv), Ok(Resealed::Already));
        assert_eq!(both.reseal(&sealed_by_old, b"another row", iv), Ok(Resealed::Unopened));
        assert_eq!(ring(NEW).reseal(&sealed_by_old, b"row", iv), Ok(Resealed::Unopened));
        assert_eq!(both.reseal(b"short", b"", iv), Ok(Resealed::Unopened));
        assert_eq!(both.reseal(&sealed_by_old, b"row", || Err(())), Err(()), "without randomness nothing is sealed");
    }

    #[test]
    fn a_malformed_ring_is_told_by_line_without_its_text() {
        assert_eq!(parse(" \n# only words\n").err(), Some(Malformed::Empty));
        let problem = parse(&format!("{NEW}\nnot-a-key\n")).err();
        assert_eq!(problem, Some(Malformed::Line(2)));
        assert_eq!(Malformed::Line(2).to_string(), "line 2 is not 64 hex characters");
        assert_eq!(parse(&NEW[2..]).err(), Some(Malformed::Line(1)));
        assert_eq!(parse(&format!("{NEW}00")).err(), Some(Malformed::Line(1)));
        assert_eq!(parse(&[NEW; MAX_KEYS].join("\n")).map(|keys| keys.len()), Ok(MAX_KEYS));
        assert_eq!(parse(&[NEW; MAX_KEYS + 1].join("\n")).err(), Some(Malformed::TooMany));
    }
}
