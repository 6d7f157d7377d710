//! Passwords, and text cleaned of them (law 12: secrets are never printed).

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
}
