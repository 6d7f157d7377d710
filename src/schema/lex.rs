//! Tokens of SQL as pg_dump writes it. Pure.
//!
//! <https://www.postgresql.org/docs/current/sql-syntax-lexical.html>

use crate::id::QualifiedName;

/// What a token is, as far as splitting and classifying need to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// White space.
    Space,
    /// `-- ...` without its line end, or `/* ... */` with what is nested in it.
    Comment,
    /// A keyword, an unquoted identifier or a number.
    Word,
    /// `"..."`.
    Quoted,
    /// `'...'`, `E'...'` or `$tag$...$tag$`.
    Literal,
    /// Any other character, one at a time.
    Sign,
}

/// A piece of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token<'a> {
    /// What it is.
    pub kind: Kind,
    /// The text itself.
    pub text: &'a str,
    /// Where it starts, in bytes from the beginning of the whole text.
    pub start: usize,
}

impl Token<'_> {
    /// Where it ends, in bytes, exclusive.
    pub fn end(&self) -> usize {
        self.start + self.text.len()
    }

    /// True for this keyword in any case. Quoted identifiers are never keywords.
    pub fn is(&self, keyword: &str) -> bool {
        self.kind == Kind::Word && self.text.eq_ignore_ascii_case(keyword)
    }

    /// True for this sign.
    pub fn is_sign(&self, sign: char) -> bool {
        self.kind == Kind::Sign && self.text.starts_with(sign)
    }

    /// The identifier it stands for: quotes taken off, unquoted ones in lower case.
    pub fn ident(&self) -> Option<String> {
        match self.kind {
            Kind::Word => Some(self.text.to_lowercase()),
            Kind::Quoted => {
                let inner = self.text.strip_prefix('"')?.strip_suffix('"')?;
                Some(inner.replace("\"\"", "\""))
            }
            _ => None,
        }
    }
}

/// A quote or comment that is never closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} opened in line {line} is never closed")]
pub struct LexError {
    /// What.
    pub what: &'static str,
    /// Where it was opened, counted from 1.
    pub line: usize,
}

/// The tokens of a text; ends after the first error.
pub struct Lexer<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Lexer<'a> {
    /// From the start of the text.
    pub fn new(text: &'a str) -> Self {
        Lexer { text, at: 0 }
    }

    /// Goes on after the end of the line that holds byte `at`.
    pub fn skip_line(&mut self, at: usize) {
        let rest = self.text.get(at..).unwrap_or_default();
        self.at = at + rest.find('\n').map_or(rest.len(), |i| i + 1);
    }

    fn token(&mut self) -> Result<Option<Token<'a>>, LexError> {
        let start = self.at;
        let rest = self.text.get(start..).unwrap_or_default();
        let Some(first) = rest.chars().next() else { return Ok(None) };
        let open = |what| LexError { what, line: self.line(start) };
        let (kind, len) = match first {
            c if c.is_ascii_whitespace() => {
                (Kind::Space, length_while(rest, |c| c.is_ascii_whitespace()))
            }
            '-' if rest.starts_with("--") => (Kind::Comment, length_while(rest, |c| c != '\n')),
            '/' if rest.starts_with("/*") => {
                (Kind::Comment, comment_len(rest).ok_or_else(|| open("a comment"))?)
            }
            '\'' => (Kind::Literal, quoted_len(rest, '\'').ok_or_else(|| open("a quote"))?),
            '"' => (Kind::Quoted, quoted_len(rest, '"').ok_or_else(|| open("a name's quote"))?),
            'e' | 'E' if rest.get(1..2) == Some("'") => {
                (Kind::Literal, escape_len(rest).ok_or_else(|| open("a quote"))?)
            }
            '$' => match dollar_len(rest) {
                Dollar::Quote(len) => (Kind::Literal, len),
                Dollar::Unclosed => return Err(open("a dollar quote")),
                Dollar::No => (Kind::Sign, 1),
            },
            c if is_word(c) => (Kind::Word, length_while(rest, |c| is_word(c) || c == '$')),
            c => (Kind::Sign, c.len_utf8()),
        };
        self.at = start + len;
        Ok(rest.get(..len).map(|text| Token { kind, text, start }))
    }

    fn line(&self, at: usize) -> usize {
        self.text.bytes().take(at).filter(|b| *b == b'\n').count() + 1
    }
}

impl<'a> Iterator for Lexer<'a> {
    type Item = Result<Token<'a>, LexError>;

    fn next(&mut self) -> Option<Self::Item> {
        let token = self.token();
        if token.is_err() {
            self.at = self.text.len();
        }
        token.transpose()
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || !c.is_ascii()
}

fn length_while(text: &str, accept: impl Fn(char) -> bool) -> usize {
    text.find(|c| !accept(c)).unwrap_or(text.len())
}

/// Length of a quoted text in which the quote itself is doubled.
fn quoted_len(text: &str, quote: char) -> Option<usize> {
    let mut at = 1;
    loop {
        at += text.get(at..)?.find(quote)? + 1;
        if !text.get(at..)?.starts_with(quote) {
            return Some(at);
        }
        at += 1;
    }
}

/// Length of `E'...'`, where a backslash takes the next character along.
fn escape_len(text: &str) -> Option<usize> {
    let mut chars = text.char_indices().skip(2).peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            '\'' if chars.peek().is_some_and(|(_, c)| *c == '\'') => drop(chars.next()),
            '\'' => return Some(at + 1),
            _ => {}
        }
    }
    None
}

fn comment_len(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    let mut at = 0;
    loop {
        let rest = text.get(at..)?;
        let next = rest.find(['/', '*'])?;
        at += next;
        let rest = text.get(at..)?;
        if rest.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return Some(at);
            }
        } else {
            at += 1;
        }
    }
}

enum Dollar {
    Quote(usize),
    Unclosed,
    No,
}

fn dollar_len(text: &str) -> Dollar {
    let tag = text.get(1..).unwrap_or_default();
    let name = length_while(tag, is_word);
    if tag.starts_with(|c: char| c.is_ascii_digit())
        || !tag.get(name..).unwrap_or_default().starts_with('$')
    {
        return Dollar::No;
    }
    let open = text.get(..name + 2).unwrap_or_default();
    match text.get(open.len()..).and_then(|body| body.find(open)) {
        Some(body) => Dollar::Quote(open.len() * 2 + body),
        None => Dollar::Unclosed,
    }
}

/// Reads a statement word by word; white space and comments are not seen.
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
}

impl<'a> Cursor<'a> {
    /// At the first word of a statement; what follows a lexical error is not seen.
    pub fn new(statement: &'a str) -> Self {
        let tokens = Lexer::new(statement)
            .map_while(Result::ok)
            .filter(|t| !matches!(t.kind, Kind::Space | Kind::Comment))
            .collect();
        Cursor { tokens, at: 0 }
    }

    /// The token under the cursor.
    pub fn peek(&self) -> Option<&Token<'a>> {
        self.tokens.get(self.at)
    }

    /// Every token, wherever the cursor stands.
    pub fn tokens(&self) -> &[Token<'a>] {
        &self.tokens
    }

    /// Steps over one token, whatever it is.
    pub fn step(&mut self) {
        self.at += 1;
    }

    /// Steps over these keywords if they come next, all of them; else stays.
    pub fn eat(&mut self, keywords: &str) -> bool {
        let mut at = self.at;
        for keyword in keywords.split(' ') {
            if !self.tokens.get(at).is_some_and(|t| t.is(keyword)) {
                return false;
            }
            at += 1;
        }
        self.at = at;
        true
    }

    /// Steps over an identifier.
    pub fn ident(&mut self) -> Option<String> {
        let ident = self.peek()?.ident()?;
        self.at += 1;
        Some(ident)
    }

    /// Steps over `schema.name`. A bare name is none: pg_dump always gives the schema.
    pub fn name(&mut self) -> Option<QualifiedName> {
        let schema = self.ident()?;
        if !self.peek()?.is_sign('.') {
            return None;
        }
        self.at += 1;
        Some(QualifiedName::new(schema, self.ident()?))
    }

    /// Goes to just after the next occurrence of a keyword; false (and at the end)
    /// if there is none.
    pub fn find(&mut self, keyword: &str) -> bool {
        while let Some(token) = self.tokens.get(self.at) {
            self.at += 1;
            if token.is(keyword) {
                return true;
            }
        }
        false
    }
}
