//! The words of test_decoding's text: names, types, values. Nothing is copied.

use std::borrow::Cow;

use memchr::memchr;

use crate::clock::PgTimestamp;

/// A place in one message. A method that answers `None` has found something else than it is named
/// for, and the message is given up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scan<'a> {
    left: &'a [u8],
}

/// A name as `quote_identifier()` printed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name<'a> {
    /// Without the quotes around it.
    raw: &'a [u8],
    /// Those within are doubled, and there are some.
    doubled: bool,
}

/// A value as `print_literal()` printed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Literal<'a> {
    Null,
    Unchanged,
    /// Text as the type's output function gave it.
    Plain(&'a [u8]),
    /// The same with every quote doubled.
    Doubled(&'a [u8]),
}

impl<'a> Name<'a> {
    /// The name itself; `None` if it is not UTF-8.
    pub fn text(&self) -> Option<String> {
        let text = std::str::from_utf8(self.raw).ok()?;
        Some(if self.doubled { text.replace("\"\"", "\"") } else { text.to_string() })
    }

    /// The name itself, of any encoding; copied only if it holds quotes.
    pub fn bytes(&self) -> Cow<'a, [u8]> {
        match self.doubled {
            false => Cow::Borrowed(self.raw),
            true => Cow::Owned(pieces(self.raw, b'"').flatten().copied().collect()),
        }
    }

    /// True if this is how `name` is printed.
    pub fn is(&self, name: &str) -> bool {
        if self.doubled {
            pieces(self.raw, b'"').flatten().eq(name.as_bytes())
        } else {
            self.raw == name.as_bytes()
        }
    }
}

/// Text whose quotes are doubled, in pieces that together are the text without the doubling.
pub(super) fn pieces(raw: &[u8], quote: u8) -> impl Iterator<Item = &[u8]> {
    let mut left = Some(raw);
    std::iter::from_fn(move || {
        let text = left?;
        match memchr(quote, text) {
            Some(at) => {
                left = text.get(at.saturating_add(2)..);
                text.get(..=at)
            }
            None => left.take(),
        }
    })
}

impl<'a> Scan<'a> {
    pub fn new(text: &'a [u8]) -> Self {
        Scan { left: text }
    }

    pub fn left(&self) -> &'a [u8] {
        self.left
    }

    pub fn is_done(&self) -> bool {
        self.left.is_empty()
    }

    /// Passes `word` if it comes next.
    pub fn pass(&mut self, word: &[u8]) -> bool {
        match self.left.strip_prefix(word) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }

    /// The next `len` bytes.
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, left) = self.left.split_at_checked(len)?;
        self.left = left;
        Some(taken)
    }

    /// Digits, as a number.
    pub fn number<T: std::str::FromStr>(&mut self) -> Option<T> {
        let len = self.left.iter().take_while(|b| b.is_ascii_digit()).count();
        std::str::from_utf8(self.take(len)?).ok()?.parse().ok()
    }

    /// A timestamp up to the closing bracket, always in ISO style: the session's DateStyle does not
    /// change it.
    pub fn timestamp(&mut self) -> Option<PgTimestamp> {
        let text = self.take(memchr(b')', self.left)?)?;
        PgTimestamp::from_iso(std::str::from_utf8(text).ok()?)
    }

    /// A name, quoted or of `a-z`, `0-9` and `_`.
    pub fn name(&mut self) -> Option<Name<'a>> {
        if self.pass(b"\"") {
            let (raw, doubled) = self.quoted(b'"')?;
            return Some(Name { raw, doubled });
        }
        let plain = |b: &&u8| b.is_ascii_lowercase() || b.is_ascii_digit() || **b == b'_';
        let len = self.left.iter().take_while(plain).count();
        let raw = self.take(len)?;
        (!raw.is_empty()).then_some(Name { raw, doubled: false })
    }

    /// What `format_type()` printed between `[` and `]`, both passed: `character varying[]`,
    /// `"char"`, `public."we[ird"`.
    pub fn type_name(&mut self) -> Option<&'a [u8]> {
        if !self.pass(b"[") {
            return None;
        }
        let start = self.left;
        let mut depth = 0_usize;
        loop {
            let at = memchr::memchr3(b'"', b'[', b']', self.left)?;
            let sign = self.take(at.saturating_add(1))?.last()?;
            match sign {
                b'"' => {
                    self.quoted(b'"')?;
                }
                b'[' => depth = depth.saturating_add(1),
                _ if depth > 0 => depth = depth.saturating_sub(1),
                _ => return start.get(..start.len() - self.left.len() - 1),
            }
        }
    }

    /// A value, up to the space or the end that follows it, which stays.
    pub fn literal(&mut self) -> Option<Literal<'a>> {
        let literal = if self.pass(b"'") {
            match self.quoted(b'\'')? {
                (raw, false) => Literal::Plain(raw),
                (raw, true) => Literal::Doubled(raw),
            }
        } else if self.pass(b"B'") {
            let at = memchr(b'\'', self.left)?;
            let bits = self.take(at)?;
            self.take(1)?;
            Literal::Plain(bits)
        } else {
            let len = memchr(b' ', self.left).unwrap_or(self.left.len());
            match self.take(len)? {
                b"" => return None,
                b"null" => Literal::Null,
                b"unchanged-toast-datum" => Literal::Unchanged,
                b"true" => Literal::Plain(b"t"),
                b"false" => Literal::Plain(b"f"),
                number => Literal::Plain(number),
            }
        };
        matches!(self.left.first(), None | Some(b' ')).then_some(literal)
    }

    /// Up to the `quote` that is not doubled, which is passed; true if there are doubled ones.
    fn quoted(&mut self, quote: u8) -> Option<(&'a [u8], bool)> {
        let start = self.left;
        let mut doubled = false;
        loop {
            let at = memchr(quote, self.left)?;
            self.left = self.left.get(at.saturating_add(1)..)?;
            if self.left.first() != Some(&quote) {
                return Some((start.get(..start.len() - self.left.len() - 1)?, doubled));
            }
            self.left = self.left.get(1..)?;
            doubled = true;
        }
    }
}
