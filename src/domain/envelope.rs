//! The format of a ciphertext: 12-byte IV, ciphertext, 16-byte tag; AES-256-GCM (NIST SP 800-38D), as WebCrypto's
//! `encrypt` with the IV in front.

use aes_gcm::aead::{Aead, Nonce, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use zeroize::Zeroizing;

/// Bytes of an initialisation vector.
pub const IV_LENGTH: usize = 12;
/// Bytes of an authentication tag.
pub const TAG_LENGTH: usize = 16;
/// Bytes of the shortest ciphertext, that of an empty text.
pub const MIN_LENGTH: usize = IV_LENGTH + TAG_LENGTH;

/// What a key's fingerprint authenticates, and under which IV. No value is ever sealed under that one: theirs are random.
const FINGERPRINT_IV: [u8; IV_LENGTH] = *b"nexus_hub/id";
const FINGERPRINT_OF: &[u8] = b"nexus_hub vault key fingerprint";
/// Bytes of a fingerprint.
pub const FINGERPRINT_LENGTH: usize = 8;

/// What tells keys apart without telling anything of them: the first 8 bytes of a GMAC (NIST SP 800-38D) under the key,
/// of a text that is always the same. A key check value, in the words of hardware security modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; FINGERPRINT_LENGTH]);

impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// A key with its schedule computed. The schedule is wiped when it is dropped.
pub struct Key(Aes256Gcm);

impl Key {
    pub fn new(bytes: &[u8; 32]) -> Self {
        Self(Aes256Gcm::new(bytes.into()))
    }

    /// Encrypts, binding the ciphertext to `context`. Never call it twice with the same IV. `None`: longer than
    /// GCM allows.
    pub fn seal(&self, iv: [u8; IV_LENGTH], plaintext: &[u8], context: &[u8]) -> Option<Vec<u8>> {
        let nonce = Nonce::<Aes256Gcm>::from(iv);
        let sealed = self.0.encrypt(&nonce, Payload { msg: plaintext, aad: context }).ok()?;
        Some([iv.as_slice(), &sealed].concat())
    }

    /// What the key is known by.
    pub fn fingerprint(&self) -> Fingerprint {
        let mac = self.seal(FINGERPRINT_IV, b"", FINGERPRINT_OF).unwrap_or_default();
        let mac = mac.get(IV_LENGTH..).and_then(<[u8]>::first_chunk).copied();
        Fingerprint(mac.unwrap_or_default())
    }

    /// Decrypts; `None` when this is not the key, or anything was changed.
    pub fn open(&self, envelope: &[u8], context: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (iv, sealed) = envelope.split_first_chunk::<IV_LENGTH>()?;
        let nonce = Nonce::<Aes256Gcm>::from(*iv);
        self.0.decrypt(&nonce, Payload { msg: sealed, aad: context }).ok().map(Zeroizing::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Test case 14 of the GCM specification's AES-256 vectors (McGrew & Viega, "The Galois/Counter Mode of
    /// Operation"): all-zero key, IV and one block of plaintext.
    #[test]
    fn matches_the_published_vector() {
        let sealed = Key::new(&[0; 32]).seal([0; 12], &[0; 16], b"").unwrap_or_default();
        assert_eq!(hex::encode(&sealed[12..]), "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919");
    }

    /// Computed with Node's WebCrypto: AES-GCM of nothing, that IV and additional data.
    #[test]
    fn a_fingerprint_is_the_gmac_that_webcrypto_computes() {
        assert_eq!(Key::new(&[7; 32]).fingerprint().to_string(), "717b9c709077101a");
        assert_ne!(Key::new(&[8; 32]).fingerprint(), Key::new(&[7; 32]).fingerprint());
    }

    #[test]
    fn opens_what_it_sealed_only_with_key_and_context() {
        let key = Key::new(&[7; 32]);
        let sealed = key.seal([9; 12], b"token", b"row 1").unwrap_or_default();
        assert_eq!(sealed.len(), MIN_LENGTH + 5);
        assert_eq!(key.open(&sealed, b"row 1").as_deref().map(Vec::as_slice), Some(b"token".as_slice()));
        assert!(key.open(&sealed, b"row 2").is_none());
        assert!(key.open(&sealed, b"").is_none());
        assert!(Key::new(&[8; 32]).open(&sealed, b"row 1").is_none());
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_noticed() {
        let key = Key::new(&[7; 32]);
        let sealed = key.seal([9; 12], b"token", b"").unwrap_or_default();
        for bit in 0..sealed.len() * 8 {
            let mut changed = sealed.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(key.open(&changed, b"").is_none(), "bit {bit}");
        }
        for length in 0..sealed.len() {
            assert!(key.open(&sealed[..length], b"").is_none(), "length {length}");
        }
    }
}
