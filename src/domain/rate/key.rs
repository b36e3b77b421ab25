//! Whose calls are counted together. A key is compared in full: two that have the same hash stay two.

#![expect(deprecated, reason = "the standard library has no other SipHash with keys")]

use std::hash::{Hasher, SipHasher};

/// Bytes of a key that are kept. A longer one is known by its beginning and 128 bits of hash.
pub const BYTES: usize = 200;
const HASHED: usize = 16;

/// Secrets of the hashes: who chooses keys can't choose where they go.
pub type Secrets = [u64; 6];

/// What a key is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A server, and no user.
    Server = 1,
    /// A server and a user.
    ServerUser = 2,
    /// A text that the caller made.
    Text = 3,
}

/// The key of a server and a user before it is made, to look for it.
#[derive(Clone, Copy)]
pub struct Sought<'a> {
    pub hash: u64,
    database: u32,
    kind: Kind,
    head: &'a [u8],
    tail: &'a [u8],
}

impl<'a> Sought<'a> {
    /// `None`: the name is too long to be kept as it is.
    pub fn server(secrets: &Secrets, database: u32, server: &'a [u8], user: Option<&'a [u8; 16]>) -> Option<Self> {
        let (kind, head) = match user {
            Some(user) => (Kind::ServerUser, &user[..]),
            None => (Kind::Server, &[][..]),
        };
        if head.len() + server.len() > BYTES {
            return None;
        }
        let [a, b, ..] = *secrets;
        let hash = digest(a, b, database, kind, head, server);
        Some(Self { hash, database, kind, head, tail: server })
    }

    /// Whether this is it.
    pub fn is(&self, key: &Key) -> bool {
        let bytes = || key.bytes().split_at_checked(self.head.len());
        self.hash == key.hash
            && self.database == key.database
            && self.kind as u8 == key.kind
            && !key.is_hashed
            && bytes().is_some_and(|(head, tail)| head == self.head && tail == self.tail)
    }
}

fn digest(first: u64, second: u64, database: u32, kind: Kind, head: &[u8], tail: &[u8]) -> u64 {
    let mut hasher = SipHasher::new_with_keys(first, second);
    hasher.write_u64(u64::from(database) << 8 | kind as u64);
    hasher.write(head);
    hasher.write(tail);
    hasher.finish()
}

/// A key as it is kept, in shared memory, too.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Key {
    pub hash: u64,
    pub database: u32,
    /// Seconds, of a text's key: policies with different windows are apart.
    pub window: u32,
    pub kind: u8,
    /// Whether it was too long to be kept as it is.
    pub is_hashed: bool,
    length: u16,
    bytes: [u8; BYTES],
}

impl Key {
    /// The key of a server and a user.
    pub fn server(secrets: &Secrets, database: u32, server: &str, user: Option<&[u8; 16]>) -> Self {
        match user {
            Some(user) => Self::new(secrets, database, Kind::ServerUser, 0, user, server.as_bytes()),
            None => Self::new(secrets, database, Kind::Server, 0, &[], server.as_bytes()),
        }
    }

    /// The key that is a text, with a window in seconds.
    pub fn text(secrets: &Secrets, database: u32, text: &str, window: u32) -> Self {
        Self::new(secrets, database, Kind::Text, window, &[], text.as_bytes())
    }

    fn new(secrets: &Secrets, database: u32, kind: Kind, window: u32, head: &[u8], tail: &[u8]) -> Self {
        let digest = |first: u64, second: u64| digest(first, second, database, kind, head, tail);
        let [a, b, c, d, e, f] = *secrets;
        let mut bytes = [0; BYTES];
        bytes[..head.len()].copy_from_slice(head);
        let room = BYTES - head.len();
        let is_hashed = tail.len() > room;
        let kept = if is_hashed { room - HASHED } else { tail.len() };
        bytes[head.len()..head.len() + kept].copy_from_slice(&tail[..kept]);
        let length = if is_hashed {
            bytes[BYTES - HASHED..BYTES - HASHED / 2].copy_from_slice(&digest(c, d).to_be_bytes());
            bytes[BYTES - HASHED / 2..].copy_from_slice(&digest(e, f).to_be_bytes());
            BYTES
        } else {
            head.len() + kept
        };
        // Without the window, so that all of a text's are found together.
        let hash = digest(a, b);
        Self { hash, database, window, kind: kind as u8, is_hashed, length: length as u16, bytes }
    }

    /// The bytes that are kept.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length).min(BYTES)]
    }

    /// Whether it is another one's, but for the window.
    pub fn has_text_of(&self, other: &Self) -> bool {
        self.hash == other.hash
            && self.database == other.database
            && self.kind == other.kind
            && self.is_hashed == other.is_hashed
            && self.bytes() == other.bytes()
    }

    /// Whether it is another one.
    pub fn is(&self, other: &Self) -> bool {
        self.window == other.window && self.has_text_of(other)
    }

    /// The server and the user of a key of these; of a long name the beginning and the hash.
    pub fn server_and_user(&self) -> Option<(String, Option<[u8; 16]>)> {
        let bytes = self.bytes();
        let (user, server) = match self.kind {
            kind if kind == Kind::Server as u8 => (None, bytes),
            kind if kind == Kind::ServerUser as u8 => {
                let (user, server) = bytes.split_first_chunk::<16>()?;
                (Some(*user), server)
            }
            _ => return None,
        };
        if !self.is_hashed {
            return Some((String::from_utf8_lossy(server).into_owned(), user));
        }
        let (name, hash) = server.split_at_checked(server.len().saturating_sub(HASHED))?;
        // Perhaps cut in the middle of a character.
        let name = match std::str::from_utf8(name) {
            Ok(name) => name,
            Err(problem) => std::str::from_utf8(&name[..problem.valid_up_to()]).unwrap_or_default(),
        };
        Some((format!("{name}…{}", hex::encode(hash)), user))
    }
}
