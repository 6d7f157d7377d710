//! A reader of JSON over bytes, as far as wal2json's messages need it.
//!
//! Not serde_json: values must come out byte for byte. A number is its source text, never an f64; a
//! string of a SQL_ASCII database may hold bytes that are not UTF-8; and a row is read without a
//! tree, an allocation for each column or recursion, so that no message can make it large or deep.

use bytes::{BufMut, BytesMut};

/// What does not read, and how many bytes were left from there on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// What was expected, or what is wrong.
    pub what: &'static str,
    /// Bytes of the message behind that place.
    pub left: usize,
}

/// Result of reading.
pub type Result<T> = std::result::Result<T, Wrong>;

/// A string as it stands between its quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text<'a> {
    /// The bytes between the quotes.
    pub raw: &'a [u8],
    /// True if there are backslashes among them.
    pub escaped: bool,
}

impl Text<'_> {
    /// Appends what the string says.
    pub fn write(&self, out: &mut BytesMut) -> Result<()> {
        if self.escaped {
            return unescape(self.raw, out);
        }
        out.put_slice(self.raw);
        Ok(())
    }

    /// What the string says, as a name: `None` if it is not UTF-8.
    pub fn name(&self) -> Result<Option<String>> {
        let mut out = BytesMut::new();
        self.write(&mut out)?;
        Ok(String::from_utf8(out.into()).ok())
    }
}

/// A value that is not an array or an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token<'a> {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// The number's own text.
    Number(&'a [u8]),
    /// A string.
    Text(Text<'a>),
}

/// Reads from the front of what is left.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads all of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Reader { left: bytes }
    }

    /// An error at this place.
    pub fn wrong<T>(&self, what: &'static str) -> Result<T> {
        Err(Wrong { what, left: self.left.len() })
    }

    /// The next byte that is not white space, not taken.
    pub fn peek(&mut self) -> Option<u8> {
        while let Some((b' ' | b'\t' | b'\n' | b'\r', rest)) = self.left.split_first() {
            self.left = rest;
        }
        self.left.first().copied()
    }

    /// Takes `byte` if it is next.
    pub fn eat(&mut self, byte: u8) -> bool {
        if self.peek() != Some(byte) {
            return false;
        }
        self.left = self.left.get(1..).unwrap_or_default();
        true
    }

    /// Takes `byte`, or fails saying `what` was expected.
    pub fn expect(&mut self, byte: u8, what: &'static str) -> Result<()> {
        if self.eat(byte) { Ok(()) } else { self.wrong(what) }
    }

    /// Takes `bytes` if exactly they are next, white space and all.
    pub fn eat_exact(&mut self, bytes: &[u8]) -> bool {
        match self.left.strip_prefix(bytes) {
            Some(rest) => {
                self.left = rest;
                true
            }
            None => false,
        }
    }

    /// After an element: true if another follows, false at the closing byte.
    pub fn more(&mut self, close: u8) -> Result<bool> {
        if self.eat(b',') {
            return Ok(true);
        }
        if self.eat(close) { Ok(false) } else { self.wrong("a comma or the end of a list") }
    }

    /// Fails if anything but white space is left.
    pub fn end(&mut self) -> Result<()> {
        match self.peek() {
            None => Ok(()),
            Some(_) => self.wrong("the end of the message"),
        }
    }

    /// A string and the colon after it.
    pub fn key(&mut self) -> Result<Text<'a>> {
        let key = self.string()?;
        self.expect(b':', "a colon")?;
        Ok(key)
    }

    /// A string.
    pub fn string(&mut self) -> Result<Text<'a>> {
        self.expect(b'"', "a string")?;
        let mut at = 0;
        let mut escaped = false;
        loop {
            let rest = self.left.get(at..).unwrap_or_default();
            let Some(found) = memchr::memchr2(b'"', b'\\', rest) else {
                return self.wrong("the end of a string");
            };
            at += found;
            if self.left.get(at) == Some(&b'"') {
                break;
            }
            escaped = true;
            at += 2;
        }
        let (raw, rest) = self.left.split_at_checked(at).unwrap_or_default();
        self.left = rest.get(1..).unwrap_or_default();
        Ok(Text { raw, escaped })
    }

    /// A value that is not an array or an object.
    pub fn token(&mut self) -> Result<Token<'a>> {
        match self.peek() {
            Some(b'"') => self.string().map(Token::Text),
            Some(b'n') => self.word(b"null", Token::Null),
            Some(b't') => self.word(b"true", Token::Bool(true)),
            Some(b'f') => self.word(b"false", Token::Bool(false)),
            Some(b'-' | b'0'..=b'9') => self.number().map(Token::Number),
            _ => self.wrong("a value"),
        }
    }

    fn word(&mut self, word: &[u8], token: Token<'a>) -> Result<Token<'a>> {
        if self.eat_exact(word) { Ok(token) } else { self.wrong("a value") }
    }

    /// The number's text: what wal2json lets through as a number, to the next other byte.
    fn number(&mut self) -> Result<&'a [u8]> {
        let part = |b: &u8| matches!(b, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
        let len = self.left.iter().take_while(|b| part(b)).count();
        let (number, rest) = self.left.split_at_checked(len).unwrap_or_default();
        if rest.is_empty() || !number.iter().any(u8::is_ascii_digit) {
            return self.wrong("a number and what follows it");
        }
        self.left = rest;
        Ok(number)
    }

    /// Passes over any value. Does not recurse, and needs no memory however deep it is.
    pub fn skip(&mut self) -> Result<()> {
        let mut depth = 0_usize;
        loop {
            match self.peek() {
                Some(b'[' | b'{') => {
                    self.left = self.left.get(1..).unwrap_or_default();
                    depth += 1;
                    continue;
                }
                Some(b']' | b'}') if depth > 0 => {
                    self.left = self.left.get(1..).unwrap_or_default();
                    depth -= 1;
                }
                Some(b',' | b':') if depth > 0 => {
                    self.left = self.left.get(1..).unwrap_or_default();
                    continue;
                }
                _ => {
                    self.token()?;
                }
            }
            if depth == 0 {
                return Ok(());
            }
        }
    }
}

fn unescape(raw: &[u8], out: &mut BytesMut) -> Result<()> {
    let mut left = raw;
    while let Some(at) = memchr::memchr(b'\\', left) {
        let (plain, rest) = left.split_at_checked(at).unwrap_or_default();
        out.put_slice(plain);
        let (escape, rest) = match rest {
            [_, escape, rest @ ..] => (*escape, rest),
            _ => return Err(Wrong { what: "the end of an escape", left: rest.len() }),
        };
        left = rest;
        let byte = match escape {
            b'"' | b'\\' | b'/' => escape,
            b'b' => 8,
            b'f' => 12,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'u' => {
                left = code_point(left, out)?;
                continue;
            }
            _ => return Err(Wrong { what: "a known escape", left: left.len() }),
        };
        out.put_u8(byte);
    }
    out.put_slice(left);
    Ok(())
}

/// What follows `\u`, a second half of a surrogate pair included; gives what is left.
fn code_point<'a>(left: &'a [u8], out: &mut BytesMut) -> Result<&'a [u8]> {
    let wrong = || Wrong { what: "the digits of a code point", left: left.len() };
    let (high, rest) = hex4(left).ok_or_else(wrong)?;
    let (code, rest) = match (high, rest) {
        (0xD800..=0xDBFF, [b'\\', b'u', rest @ ..]) => {
            let (low, rest) = hex4(rest).ok_or_else(wrong)?;
            let low = low.checked_sub(0xDC00).filter(|low| *low < 0x400).ok_or_else(wrong)?;
            (0x10000 + ((high - 0xD800) << 10) + low, rest)
        }
        _ => (high, rest),
    };
    let character = char::from_u32(code).ok_or_else(wrong)?;
    out.put_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
    Ok(rest)
}

fn hex4(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (digits, rest) = bytes.split_first_chunk::<4>()?;
    let mut code = 0;
    for digit in digits {
        code = code * 16 + char::from(*digit).to_digit(16)?;
    }
    Some((code, rest))
}

/// Appends `text` as a JSON string, the way PostgreSQL's `escape_json` writes it.
pub fn escape(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    for byte in text.bytes() {
        match byte {
            8 => out.extend_from_slice(b"\\b"),
            12 => out.extend_from_slice(b"\\f"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            0..=31 => out.extend_from_slice(format!("\\u{byte:04x}").as_bytes()),
            _ => out.push(byte),
        }
    }
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn said(json: &str) -> Result<String> {
        let name = Reader::new(json.as_bytes()).string()?.name()?;
        Ok(name.unwrap_or_else(|| "not UTF-8".to_string()))
    }

    #[test]
    fn strings_say_what_their_escapes_mean() {
        assert_eq!(said(r#""a\"b\\c\/d\b\f\n\r\t""#).unwrap(), "a\"b\\c/d\u{8}\u{c}\n\r\t");
        assert_eq!(said(r#""\u0001\u00e9\u20AC\ud83d\ude00x""#).unwrap(), "\u{1}é€😀x");
        for bad in [r#""\ud83d""#, r#""\ude00""#, r#""\ud83d\u0041""#, r#""\u12G4""#, r#""\q""#] {
            assert!(said(bad).is_err(), "{bad}");
        }
        for cut in [r#""abc"#, r#""abc\""#, r#""abc\"#, "", "x"] {
            assert!(said(cut).is_err(), "{cut}");
        }
        let bytes = [b'"', 0xff, b'\\', b'n', b'"'];
        let text = Reader::new(&bytes).string().unwrap();
        let mut out = BytesMut::new();
        text.write(&mut out).unwrap();
        assert_eq!(&out[..], [0xff, b'\n']);
    }

    #[test]
    fn numbers_keep_their_text() {
        let digits = "9".repeat(1000);
        for number in ["-0", "1.50", "1e+300", "-1.7976931348623157e+308", &digits] {
            let json = format!("{number},");
            let token = Reader::new(json.as_bytes()).token().unwrap();
            assert_eq!(token, Token::Number(number.as_bytes()));
        }
        assert!(Reader::new(b"-,").token().is_err() && Reader::new(b"12").token().is_err());
    }

    #[test]
    fn a_million_brackets_are_passed_over_or_refused() {
        let deep = "[".repeat(1_000_000);
        assert!(Reader::new(deep.as_bytes()).skip().is_err());
        let whole = format!("{deep}{}x", "]".repeat(1_000_000));
        let mut reader = Reader::new(whole.as_bytes());
        reader.skip().unwrap();
        assert_eq!(reader.left, b"x");
    }

    proptest! {
        #[test]
        fn what_was_escaped_is_said_again(text in ".*") {
            let mut json = Vec::new();
            escape(&text, &mut json);
            prop_assert_eq!(said(std::str::from_utf8(&json).unwrap()).unwrap(), text);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Reader::new(&bytes).skip();
            if let Ok(text) = Reader::new(&bytes).string() {
                let _ = text.write(&mut BytesMut::new());
            }
        }
    }
}
