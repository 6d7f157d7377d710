//! Which columns an SQL expression may speak of, without a parser: a column that is not there as a
//! word is not meant. The other way round it errs on the safe side: a word in a string or the name
//! of a function counts as well.

/// True if the name stands in the expression as a word, whatever its case.
pub fn mentions(sql: &str, name: &str) -> bool {
    let text = sql.to_lowercase();
    let name = name.to_lowercase();
    if name.is_empty() {
        return false;
    }
    // In double quotes, a quote is written twice.
    is_word(&text, &name) || (name.contains('"') && is_word(&text, &name.replace('"', "\"\"")))
}

fn is_word(text: &str, name: &str) -> bool {
    text.match_indices(name).any(|(at, found)| {
        let before = text.get(..at).and_then(|t| t.chars().next_back());
        let after = text.get(at + found.len()..).and_then(|t| t.chars().next());
        let ends = |c: Option<char>, edge: Option<char>| {
            // A name that begins or ends with something else than a letter needs no border there.
            !edge.is_some_and(is_of_word) || !c.is_some_and(is_of_word)
        };
        ends(before, found.chars().next()) && ends(after, found.chars().next_back())
    })
}

fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '$'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_found_in_any_dress_and_no_parts_of_words() {
        for sql in ["email = 'x'", "lower(EMAIL)", "\"email\"||1", "(a,email)", "x.email"] {
            assert!(mentions(sql, "email"), "{sql}");
        }
        for sql in ["emails", "e_mail", "my_email", "email2", "$email"] {
            assert!(!mentions(sql, "email"), "{sql}");
        }
        assert!(mentions("\"a\"\"b\" > 1", "a\"b"));
        assert!(mentions("\"odd name!\"", "odd name!"));
        assert!(!mentions("x", ""));
    }
}
