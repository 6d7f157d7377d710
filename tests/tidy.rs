//! Holds the house rules that a compiler does not: the floors, sizes, essays, names and words.
//!
//! `violations` is pure: it takes a list of files and gives sentences. The first tests feed it bad
//! samples, one for each rule; the last feeds it this repository.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test")]

use std::collections::BTreeMap;
use std::path::Path;

/// Every room and its floor. A room imports only from floors below its own.
const FLOORS: &[(u8, &[&str])] = &[
    (0, &["lsn", "id", "clock", "limit", "fault", "secret"]),
    (1, &["pg", "change"]),
    (2, &["decode", "catalog", "cluster", "map"]),
    (3, &["source", "buffer", "apply", "copy", "large", "reshape", "schema", "verify", "route"]),
    (4, &["cutover"]),
    (5, &["job"]),
    (6, &["config", "cli", "http", "demo"]),
];

/// On these floors rooms may use each other: words that need words, and the edges. Never on 3.
const SOCIAL: &[u8] = &[0, 1, 2, 6];

/// Longer than 500 lines: how long at most, and why. Lower the number when one shrinks.
const LONG_FILES: &[(&str, usize, &str)] = &[];

/// Lines over 100 columns that rustfmt leaves alone (SQL in strings): how many at most.
const LONG_LINES: &[(&str, usize)] = &[("src/catalog/table.rs", 1)];

const FUNCTION_LINES: usize = 70;
const FILE_LINES: usize = 500;
const COLUMNS: usize = 100;
const ESSAY_LINES: usize = 5;

/// Names that say nothing of what is inside.
const EMPTY_NAMES: &[&str] =
    &["util", "utils", "common", "helper", "helpers", "types", "manager", "misc"];

/// What may lie beside src.
const TOP_LEVEL: &[&str] = &[
    "Cargo.toml",
    "Cargo.lock",
    "README.md",
    "Makefile",
    "src",
    "proto",
    "bench",
    "tests",
    "docker-compose.yml",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "LICENSE",
    "clippy.toml",
    "rustfmt.toml",
];

/// Not in code outside tests: each is a panic or a leftover.
const UNFINISHED: &[&str] = &[".unwrap()", "todo!", "dbg!", "unimplemented!"];

/// In no text of the repository: places that exist on one machine only, and notes to oneself.
const FOREIGN_WORDS: &[&str] = &["/home/", "/Users/", "/root/", "/work/", "FIXME", "XXX", "TODO"];

/// A file: its path from the top, with `/`, and its text.
type File = (String, String);

fn violations(files: &[File]) -> Vec<String> {
    let mut found = Vec::new();
    for (path, text) in files {
        found.extend(foreign_words(path, text));
        if !path.ends_with(".rs") {
            continue;
        }
        if path.starts_with("src/") {
            found.extend(long_lines(path, text));
            let code = code_only(text);
            found.extend(rooms_and_names(path, text));
            found.extend(floors(path, &code));
            found.extend(long_functions(path, &code));
            found.extend(long_file(path, text));
            found.extend(unfinished(path, &without_tests(&code)));
        }
    }
    found
}

fn floor_of(room: &str) -> Option<u8> {
    FLOORS.iter().find(|(_, rooms)| rooms.contains(&room)).map(|(floor, _)| *floor)
}

/// The room a source file belongs to; `None` for lib.rs and main.rs, which see everything.
fn room_of(path: &str) -> Option<&str> {
    let inner = path.strip_prefix("src/")?.trim_end_matches(".rs");
    let room = inner.split('/').next()?;
    (!matches!(inner, "lib" | "main")).then_some(room)
}

fn rooms_and_names(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let parts: Vec<&str> = path.trim_end_matches(".rs").split('/').collect();
    if let Some(name) = parts.iter().find(|part| EMPTY_NAMES.contains(part)) {
        found.push(format!("{path}: \"{name}\" says nothing: name the module after its content"));
    }
    if let Some(room) = room_of(path)
        && floor_of(room).is_none()
    {
        found.push(format!("{path}: room {room} is on no floor: list it in tests/tidy.rs"));
    }
    let essay = text.lines().take_while(|line| line.starts_with("//!")).count();
    if path.ends_with("/mod.rs") && parts.len() == 3 && essay < ESSAY_LINES {
        found.push(format!("{path}: its essay has {essay} lines: say why the room exists"));
    }
    found
}

fn floors(path: &str, code: &str) -> Vec<String> {
    let Some(room) = room_of(path) else { return Vec::new() };
    let Some(floor) = floor_of(room) else { return Vec::new() };
    let mut found = Vec::new();
    for (line, other) in crate_paths(code) {
        let Some(their_floor) = floor_of(&other) else { continue };
        let sideways = their_floor == floor && other != room && !SOCIAL.contains(&floor);
        if their_floor > floor || sideways {
            let way = if sideways { "sideways" } else { "up" };
            found.push(format!(
                "{path}:{line}: {room} (floor {floor}) looks {way} to {other} (floor {their_floor})"
            ));
        }
    }
    for (line, supers, depth) in super_paths(path, code) {
        if supers >= depth {
            found.push(format!("{path}:{line}: climbs out of its room by super: write crate::"));
        }
    }
    for at in positions(code, "walferry::") {
        found.push(format!("{path}:{}: names its own crate: write crate::", line_of(code, at)));
    }
    found
}

/// Line and room of each `crate::room` and each room in `crate::{...}`.
fn crate_paths(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for at in positions(code, "crate::") {
        let rest = &code[at + "crate::".len()..];
        let line = line_of(code, at);
        if !rest.starts_with('{') {
            found.push((line, identifier(rest)));
            continue;
        }
        let (mut depth, mut fresh) = (0, false);
        for (offset, c) in rest.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                break;
            }
            if fresh && depth == 1 && (c.is_alphabetic() || c == '_') {
                found.push((line, identifier(&rest[offset..])));
            }
            fresh = matches!(c, '{' | ',') || (fresh && c.is_whitespace());
        }
    }
    found
}

/// Line, number of `super::` in a row, and how many of them reach the root of the crate.
fn super_paths(path: &str, code: &str) -> Vec<(usize, usize, usize)> {
    let inner = path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    let depth = inner.split('/').count();
    let modules = blocks(code, "mod ");
    let mut found = Vec::new();
    for at in positions(code, "super::") {
        if code[..at].ends_with("super::") {
            continue;
        }
        let supers = code[at..].split("super::").skip(1).take_while(|s| s.is_empty()).count() + 1;
        let nested = modules.iter().filter(|(start, end)| (*start..*end).contains(&at)).count();
        found.push((line_of(code, at), supers, depth + nested));
    }
    found
}

fn long_functions(path: &str, code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (start, end) in blocks(code, "fn ") {
        let lines = code[start..end].matches('\n').count() + 1;
        if lines > FUNCTION_LINES {
            let (line, name) = (line_of(code, start), identifier(&code[start + 3..]));
            found.push(format!("{path}:{line}: {name} has {lines} lines of {FUNCTION_LINES}"));
        }
    }
    found
}

fn long_file(path: &str, text: &str) -> Option<String> {
    let lines = text.lines().count();
    let listed = LONG_FILES.iter().find(|(file, ..)| *file == path).map(|(_, most, _)| *most);
    let most = listed.unwrap_or(FILE_LINES);
    (lines > most).then(|| format!("{path}: {lines} lines of {most}"))
}

/// An address alone on its line cannot be broken.
fn is_long(line: &str) -> bool {
    line.chars().count() > COLUMNS && !line.trim_start_matches(['/', '!', ' ']).starts_with("<http")
}

fn long_lines(path: &str, text: &str) -> Option<String> {
    let long: Vec<usize> = (1..)
        .zip(text.lines())
        .filter(|(_, line)| is_long(line))
        .map(|(number, _)| number)
        .collect();
    let most = LONG_LINES.iter().find(|(file, _)| *file == path).map_or(0, |(_, most)| *most);
    (long.len() > most).then(|| format!("{path}: over {COLUMNS} columns in lines {long:?}"))
}

fn unfinished(path: &str, code: &str) -> Vec<String> {
    // A file of tests, whose `mod` line carries the cfg(test).
    if path.ends_with("tests.rs") {
        return Vec::new();
    }
    let at = |word: &&str| {
        positions(code, word)
            .into_iter()
            .map(|at| format!("{path}:{}: {word} outside tests", line_of(code, at)))
            .collect::<Vec<_>>()
    };
    UNFINISHED.iter().flat_map(at).collect()
}

fn foreign_words(path: &str, text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let is_in = |word: &&&str| {
        let plain = word.chars().any(|c| c.is_uppercase());
        if plain { text.contains(**word) } else { lower.contains(**word) }
    };
    FOREIGN_WORDS.iter().filter(is_in).map(|word| format!("{path}: has \"{word}\"")).collect()
}

/// Start of each `keyword name ... {` and end of its block; declarations without one are left out.
fn blocks(code: &str, keyword: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    for start in positions(code, keyword) {
        if code[..start].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let (mut braces, mut others) = (0, 0);
        for (offset, c) in code[start..].char_indices() {
            match c {
                '(' | '[' => others += 1,
                ')' | ']' => others -= 1,
                '{' => braces += 1,
                '}' => braces -= 1,
                ';' if braces == 0 && others == 0 => break,
                _ => {}
            }
            if c == '}' && braces == 0 {
                found.push((start, start + offset + 1));
                break;
            }
            // The end of what surrounds it: a type such as `fn (T)` in a struct.
            if braces < 0 || others < 0 {
                break;
            }
        }
    }
    found
}

/// The code with every `#[cfg(test)]` item blanked out.
fn without_tests(code: &str) -> String {
    let mut kept = code.to_string();
    for at in positions(code, "#[cfg(test)]") {
        let modules = blocks(&code[at..], "mod ");
        if let Some((_, end)) = modules.first() {
            kept.replace_range(at..at + end, &blank(&code[at..at + end]));
        }
    }
    kept
}

fn blank(text: &str) -> String {
    text.chars()
        .flat_map(|c| std::iter::repeat_n(if c == '\n' { c } else { ' ' }, c.len_utf8()))
        .collect()
}

/// The text with comments, strings and characters blanked out, every byte in its place.
fn code_only(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let after_word = code.ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if c == '"' {
            string_end(rest)
        } else if c == 'r' && !after_word && raw_string_end(rest).is_some() {
            raw_string_end(rest).unwrap()
        } else if rest.starts_with("br") && !after_word && raw_string_end(&rest[1..]).is_some() {
            raw_string_end(&rest[1..]).unwrap() + 1
        } else if c == '\'' {
            character_end(rest)
        } else {
            code.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        };
        code.push_str(&blank(&rest[..skipped]));
        rest = &rest[skipped..];
    }
    code
}

fn string_end(rest: &str) -> usize {
    let mut escaped = false;
    for (offset, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return offset + 1,
            _ => {}
        }
    }
    rest.len()
}

fn raw_string_end(rest: &str) -> Option<usize> {
    let hashes = rest[1..].chars().take_while(|c| *c == '#').count();
    let body = rest[1 + hashes..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    Some(body.find(&close).map_or(rest.len(), |end| 2 + hashes + end + close.len()))
}

/// A character literal, or the quote alone where it begins a lifetime.
fn character_end(rest: &str) -> usize {
    let mut chars = rest.char_indices().skip(1);
    match (chars.next(), chars.next()) {
        (Some((_, '\\')), _) => rest[2..]
            .char_indices()
            .skip(1)
            .find(|(_, c)| *c == '\'')
            .map_or(1, |(offset, _)| offset + 3),
        (Some(_), Some((offset, '\''))) => offset + 1,
        _ => 1,
    }
}

fn positions(code: &str, word: &str) -> Vec<usize> {
    let word_like = word.starts_with(|c: char| c.is_alphabetic());
    code.match_indices(word)
        .map(|(at, _)| at)
        .filter(|at| {
            !word_like || !code[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_')
        })
        .collect()
}

fn identifier(text: &str) -> String {
    text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

fn line_of(code: &str, at: usize) -> usize {
    code[..at].matches('\n').count() + 1
}

fn read(dir: &Path, top: &Path, files: &mut Vec<File>) {
    let texts = ["rs", "md", "sh", "sql", "toml", "yml", "proto"];
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            read(&path, top, files);
        } else if path.extension().is_some_and(|e| texts.iter().any(|t| e == *t)) {
            let name = path.strip_prefix(top).unwrap().to_str().unwrap().to_string();
            files.push((name, std::fs::read_to_string(&path).unwrap()));
        }
    }
}

fn sample(path: &str, text: &str) -> Vec<String> {
    violations(&[(path.to_string(), text.to_string())])
}

#[test]
fn looking_up_or_sideways_is_seen() {
    let bad = [
        ("src/pg/session.rs", "use crate::job::State;", "looks up to job"),
        ("src/lsn.rs", "fn f() { crate::pg::x() }", "looks up to pg"),
        ("src/copy/reader.rs", "use crate::apply::Batch;", "looks sideways to apply"),
        ("src/copy/reader.rs", "use crate::{\n    id::X,\n    verify::{self, a},\n};", "to verify"),
        ("src/copy/reader.rs", "use super::super::apply;", "climbs out"),
        ("src/copy/mod.rs", "use super::apply;", "climbs out"),
        ("src/copy/reader.rs", "mod a { use super::super::super::apply; }", "climbs out"),
        ("src/copy/reader.rs", "use walferry::apply;", "names its own crate"),
        ("src/wing/a.rs", "", "on no floor"),
    ];
    for (path, text, said) in bad {
        let found = sample(path, text);
        assert!(found.iter().any(|v| v.contains(said)), "{path} {text}: {found:?}");
    }
    let good = [
        (
            "src/copy/reader.rs",
            "use crate::pg::Session;\nuse super::partition;\nmod tests { use super::*; use super::super::writer; }",
        ),
        ("src/copy/reader.rs", "use crate::copy::writer; use crate::{id, pg::{self, job}};"),
        (
            "src/copy/reader.rs",
            "// crate::job\nconst A: &str = \"crate::job\"; const B: &str = r#\"\"crate::job\"#;",
        ),
        ("src/main.rs", "use walferry::cli;"),
        ("src/lib.rs", "pub use crate::job::Job;"),
    ];
    for (path, text) in good {
        assert_eq!(sample(path, text), Vec::<String>::new(), "{text}");
    }
}

#[test]
fn sizes_essays_names_and_words_are_seen() {
    let function =
        |lines: usize| format!("fn long(a: [u8; 4]) {{\n{}}}\n", "    x();\n".repeat(lines - 2));
    assert_eq!(sample("src/pg/a.rs", &function(70)), Vec::<String>::new());
    let essay = "//! One.\n//! Two.\n//! Three.\n//! Four.\n";
    let bad = [
        ("src/pg/a.rs", function(71), "long has 71 lines"),
        ("src/pg/a.rs", "\n".repeat(501), "501 lines of 500"),
        ("src/pg/a.rs", format!("// {}", "x".repeat(98)), "over 100 columns in lines [1]"),
        ("src/pg/mod.rs", essay.to_string(), "essay has 4 lines"),
        ("src/pg/utils.rs", String::new(), "says nothing"),
        ("src/pg/a.rs", "fn f() { x.unwrap() }".to_string(), "unwrap() outside tests"),
        ("src/pg/a.rs", "fn f() { todo!() }".to_string(), "todo! outside tests"),
        ("src/pg/a.rs", "#[cfg(test)]\nmod tests {}\nfn f() { dbg!(1) }".to_string(), ":3: dbg!"),
        ("README.md", format!("see {}x", FOREIGN_WORDS[0]), "has"),
        ("src/pg/a.rs", format!("// {} later", FOREIGN_WORDS[6]), "has"),
    ];
    for (path, text, said) in bad {
        let found = sample(path, &text);
        assert!(found.iter().any(|v| v.contains(said)), "{path} {text}: {found:?}");
    }
    let tests = "#[cfg(test)]\nmod tests {\n    fn f() { x.unwrap(); '\"'; '{'; }\n}\n";
    assert_eq!(sample("src/pg/a.rs", tests), Vec::<String>::new());
    assert_eq!(sample("src/pg/mod.rs", &format!("{essay}//! Five.\n")), Vec::<String>::new());
}

#[test]
fn this_repository_is_tidy() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for dir in ["src", "tests", "bench", "proto", ".ci"] {
        read(&top.join(dir), top, &mut files);
    }
    for name in TOP_LEVEL.iter().filter(|name| **name != "Cargo.lock" && top.join(name).is_file()) {
        files.push((name.to_string(), std::fs::read_to_string(top.join(name)).unwrap()));
    }
    // This file has to name what it looks for.
    files.retain(|(path, _)| path != "tests/tidy.rs");
    let mut found = violations(&files);
    for entry in std::fs::read_dir(top).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if !name.starts_with('.') && name != "target" && !TOP_LEVEL.contains(&name.as_str()) {
            found.push(format!("{name}: not in the layout of DESIGN: a home for it is in a room"));
        }
    }
    found.extend(stale_exceptions(&files));
    assert!(files.len() > 30, "only {} files were read", files.len());
    assert!(found.is_empty(), "{} untidy things:\n{}", found.len(), found.join("\n"));
}

/// An exception that nothing needs any more lets the next long thing in unseen.
fn stale_exceptions(files: &[File]) -> Vec<String> {
    let texts: BTreeMap<&str, &str> = files.iter().map(|(p, t)| (p.as_str(), t.as_str())).collect();
    let mut found = Vec::new();
    for (path, most, reason) in LONG_FILES {
        let lines = texts.get(path).map_or(0, |text| text.lines().count());
        if lines <= FILE_LINES || reason.is_empty() {
            found.push(format!("{path}: listed with {most} lines, has {lines}: unlist it"));
        }
    }
    for (path, most) in LONG_LINES {
        let long = |text: &&str| text.lines().filter(|line| is_long(line)).count();
        let count = texts.get(path).map_or(0, long);
        if count < *most {
            found.push(format!("{path}: listed with {most} long lines, has {count}: lower it"));
        }
    }
    found
}
