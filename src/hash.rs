//! SHA-256 as hexadecimal text, and fingerprints made of named parts.

use sha2::{Digest as _, Sha256};

/// A SHA-256 hash.
pub type Digest = [u8; 32];

/// Digits of a fingerprint that go into names and columns: 64 bits, so that two runs of one table never meet by chance.
pub const SHORT_DIGITS: usize = 16;

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |value: u8| char::from(DIGITS[usize::from(value)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 0xf)]).collect()
}

/// SHA-256 of `bytes`.
pub fn digest(bytes: &[u8]) -> Digest {
    Sha256::digest(bytes).into()
}

/// SHA-256 of `bytes`, 64 hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&digest(bytes))
}

/// A fingerprint of named values: equal if and only if all names and values are equal, in this order.
#[derive(Debug, Default)]
pub struct Fingerprint(Sha256);

impl Fingerprint {
    /// Starts a fingerprint for one purpose; different purposes never collide.
    pub fn new(purpose: &str) -> Self {
        Self::default().with("purpose", purpose)
    }

    /// Adds a named value.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        // Lengths first, so that no two lists of values read alike.
        for text in [name, value] {
            self.0.update((text.len() as u64).to_le_bytes());
            self.0.update(text);
        }
        self
    }

    /// All digits of the fingerprint.
    pub fn full(self) -> String {
        hex(&self.0.finalize())
    }

    /// The first 64 bits, as a number.
    pub fn number(self) -> u64 {
        self.0.finalize().first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
    }

    /// The first [`SHORT_DIGITS`] digits.
    pub fn short(self) -> String {
        let mut text = self.full();
        text.truncate(SHORT_DIGITS);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_of_abc_is_the_published_test_vector() {
        assert_eq!(sha256(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn a_character_moved_between_values_changes_the_fingerprint() {
        let a = Fingerprint::new("t").with("x", "ab").with("y", "c").short();
        let b = Fingerprint::new("t").with("x", "a").with("y", "bc").short();
        assert_ne!(a, b);
        assert_eq!(a.len(), SHORT_DIGITS);
        let number = Fingerprint::new("t").with("x", "ab").with("y", "c").number();
        assert_eq!(format!("{number:016x}"), a);
    }
}
