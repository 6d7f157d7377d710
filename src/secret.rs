//! Passwords, text cleaned of them (law 12: secrets are never printed), and letters by which one
//! process gives another a secret through a table that others may read.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::agreement::{EphemeralPrivateKey, UnparsedPublicKey, X25519, agree_ephemeral};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::SystemRandom;
pub use secrecy::{ExposeSecret, SecretString};

/// `text` with the password of a `scheme://user:password@host` URI and the value of every
/// `password=` or `sslpassword=` pair replaced by `***`. For text that may echo what a user typed.
pub fn redact(text: &str) -> String {
    let mut out = text.to_string();
    for key in ["password=", "sslpassword="] {
        out = redact_pair(&out, key);
    }
    redact_userinfo(&out)
}

/// True if `text`, a command of the user's, holds what [`redact`] would hide. A shell's variable or
/// substitution in its place is no secret.
pub fn holds_secret(text: &str) -> bool {
    let text = text.replace("password=$", "").replace("password=\"$", "").replace(":$", "");
    redact(&text) != text
}

/// Takes one letter: what is sealed for its address can be opened by it alone, while its process
/// lives. X25519, HKDF-SHA256 and ChaCha20-Poly1305, each key for one letter.
#[derive(Debug)]
pub struct LetterBox {
    private: EphemeralPrivateKey,
    address: Vec<u8>,
}

impl LetterBox {
    /// A new one; `None` if the system has no randomness to give.
    pub fn new() -> Option<LetterBox> {
        let private = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).ok()?;
        let address = private.compute_public_key().ok()?.as_ref().to_vec();
        Some(LetterBox { private, address })
    }

    /// What others need to seal a letter for it, in hex.
    pub fn address(&self) -> String {
        to_hex(&self.address)
    }

    /// The text of a letter; `None` if it was sealed for another, or is damaged.
    pub fn open(self, letter: &str) -> Option<SecretString> {
        let letter = from_hex(letter)?;
        let (sender, body) = letter.split_at_checked(32)?;
        let key = agreed(self.private, sender, sender, &self.address)?;
        let mut body = body.to_vec();
        let nonce = Nonce::assume_unique_for_key([0; 12]);
        let text = key.open_in_place(nonce, Aad::empty(), &mut body).ok()?;
        String::from_utf8(text.to_vec()).ok().map(SecretString::from)
    }
}

/// A letter for the box at `address`; `None` if that is no address.
pub fn seal(text: &SecretString, address: &str) -> Option<String> {
    let address = from_hex(address)?;
    let private = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).ok()?;
    let sender = private.compute_public_key().ok()?.as_ref().to_vec();
    let key = agreed(private, &address, &sender, &address)?;
    let mut body = text.expose_secret().as_bytes().to_vec();
    let nonce = Nonce::assume_unique_for_key([0; 12]);
    key.seal_in_place_append_tag(nonce, Aad::empty(), &mut body).ok()?;
    Some(to_hex(&[sender, body].concat()))
}

/// The key that both ends work out, bound to both public keys.
fn agreed(
    private: EphemeralPrivateKey,
    peer: &[u8],
    sender: &[u8],
    address: &[u8],
) -> Option<LessSafeKey> {
    let salt = Salt::new(HKDF_SHA256, &[sender, address].concat());
    let derived = agree_ephemeral(private, &UnparsedPublicKey::new(&X25519, peer), |shared| {
        let extracted = salt.extract(shared);
        let expanded = extracted.expand(&[b"walferry letter"], &CHACHA20_POLY1305);
        expanded.map(UnboundKey::from).map(LessSafeKey::new)
    });
    derived.ok()?.ok()
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.is_ascii() && text.len().is_multiple_of(2);
    let pairs = digits.then(|| text.as_bytes().chunks(2))?;
    pairs.map(|p| u8::from_str_radix(std::str::from_utf8(p).ok()?, 16).ok()).collect()
}

fn redact_pair(text: &str, key: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(key) {
        let (head, tail) = rest.split_at(at + key.len());
        out.push_str(head);
        out.push_str("***");
        let quoted = tail.strip_prefix('\'');
        let end = match quoted {
            Some(inner) => inner.find('\'').map_or(tail.len(), |i| i + 2),
            None => tail.find([' ', '&', '\n', '\t', '"']).unwrap_or(tail.len()),
        };
        rest = tail.get(end..).unwrap_or("");
    }
    out.push_str(rest);
    out
}

fn redact_userinfo(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (head, tail) = rest.split_at(at + 3);
        out.push_str(head);
        let authority = tail.find(['/', '?', ' ', '\n']).unwrap_or(tail.len());
        let (authority, after) = tail.split_at(authority);
        match authority.rsplit_once('@') {
            Some((userinfo, host)) => match userinfo.split_once(':') {
                Some((user, _)) => out.push_str(&format!("{user}:***@{host}")),
                None => out.push_str(authority),
            },
            None => out.push_str(authority),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_redacted_in_every_form() {
        assert_eq!(redact("postgres://u:p@h/db"), "postgres://u:***@h/db");
        assert_eq!(
            redact("postgres://u@h/db?password=x&a=b"),
            "postgres://u@h/db?password=***&a=b"
        );
        assert_eq!(redact("host=h password=se user=u"), "host=h password=*** user=u");
        assert_eq!(redact("password='a b' user=u"), "password=*** user=u");
        assert_eq!(redact("no secret"), "no secret");
    }

    #[test]
    fn a_command_that_names_a_variable_holds_no_secret() {
        for (text, holds) in [
            ("./flip --password=hush", true),
            ("psql postgres://u:hush@h/d", true),
            ("./flip --password=$PW", false),
            ("psql \"postgres://u:$PW@h/d\"", false),
            ("psql postgres://u@h/d", false),
            ("./flip --password=$PW --sslpassword=hush", true),
        ] {
            assert_eq!(holds_secret(text), holds, "{text}");
        }
    }

    #[test]
    fn a_letter_is_opened_by_its_box_and_by_no_other() {
        let (ours, other) = (LetterBox::new().unwrap(), LetterBox::new().unwrap());
        let letter = seal(&SecretString::from("h\u{fc}sh"), &ours.address()).unwrap();
        let again = seal(&SecretString::from("h\u{fc}sh"), &ours.address()).unwrap();
        assert_ne!(letter, again);
        assert!(!letter.contains(&to_hex("sh".as_bytes())));
        assert!(other.open(&letter).is_none());
        assert_eq!(ours.open(&letter).unwrap().expose_secret(), "h\u{fc}sh");
        let damaged = LetterBox::new().unwrap();
        let letter = seal(&SecretString::from("x"), &damaged.address()).unwrap();
        let flipped = if letter.ends_with('0') { "1" } else { "0" };
        let cut = letter.len() - 1;
        assert!(damaged.open(&format!("{}{flipped}", &letter[..cut])).is_none());
        for bad in ["", "zz", "00", "\u{fc}"] {
            assert!(LetterBox::new().unwrap().open(bad).is_none(), "{bad}");
            assert!(seal(&SecretString::from("x"), bad).is_none(), "{bad}");
        }
    }
}
