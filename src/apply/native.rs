//! Values of the server's own types, from the text that a server prints to what its receive
//! functions read. Pure.
//!
//! A target spends more on reading the text of a time or a number than on anything else of a row
//! that comes by COPY. Here only what a server prints under the settings of our sessions (ISO
//! dates, UTC, hex bytea) is taken, and nothing is guessed: whatever else stands there, be it
//! another type's text, a date before Christ or a number with an exponent, is refused, and the
//! target's own input function gets it as text.
//!
//! The forms are the same from PostgreSQL 10 to 18, as COPY's binary format relies on.
//!
//! <https://www.postgresql.org/docs/current/protocol-overview.html#PROTOCOL-FORMAT-CODES>

/// A type whose values travel in binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Native {
    /// boolean.
    Bool,
    /// smallint.
    Int2,
    /// integer.
    Int4,
    /// bigint.
    Int8,
    /// real.
    Float4,
    /// double precision.
    Float8,
    /// numeric, of any precision.
    Numeric,
    /// date.
    Date,
    /// timestamp without time zone.
    Timestamp,
    /// timestamp with time zone.
    Timestamptz,
    /// uuid.
    Uuid,
    /// bytea.
    Bytea,
    /// text, varchar, char(n) or json: their binary form is the text.
    Text,
    /// jsonb: a version, then the text.
    Jsonb,
}

/// Days from 1970-01-01 to PostgreSQL's own epoch, 2000-01-01.
const EPOCH_DAYS: i64 = 10_957;

const DAY_MICROS: i64 = 86_400_000_000;

/// Texts of numeric longer than this are left to the server.
const NUMERIC_BYTES_MAX: usize = 4096;

impl Native {
    /// By the name in pg_type of one of pg_catalog's own types.
    pub fn named(name: &str) -> Option<Native> {
        Some(match name {
            "bool" => Native::Bool,
            "int2" => Native::Int2,
            "int4" => Native::Int4,
            "int8" => Native::Int8,
            "float4" => Native::Float4,
            "float8" => Native::Float8,
            "numeric" => Native::Numeric,
            "date" => Native::Date,
            "timestamp" => Native::Timestamp,
            "timestamptz" => Native::Timestamptz,
            "uuid" => Native::Uuid,
            "bytea" => Native::Bytea,
            "text" | "varchar" | "bpchar" | "json" => Native::Text,
            "jsonb" => Native::Jsonb,
            _ => return None,
        })
    }

    /// `pg_type.oid` of elements of a binary array; `None` where an array of text does as well.
    pub fn element_oid(self) -> Option<u32> {
        Some(match self {
            Native::Bool => 16,
            Native::Bytea => 17,
            Native::Int8 => 20,
            Native::Int2 => 21,
            Native::Int4 => 23,
            Native::Float4 => 700,
            Native::Float8 => 701,
            Native::Date => 1082,
            Native::Timestamp => 1114,
            Native::Timestamptz => 1184,
            Native::Numeric => 1700,
            Native::Uuid => 2950,
            Native::Text | Native::Jsonb => return None,
        })
    }

    /// Appends the value's length and bytes. `None` if the text is not one that a server prints for
    /// this type; what was appended then is of no use.
    pub fn encode(self, text: &[u8], out: &mut Vec<u8>) -> Option<()> {
        match self {
            Native::Bool => put(out, &[boolean(text)?]),
            Native::Int2 => put(out, &i16::try_from(integer(text)?).ok()?.to_be_bytes()),
            Native::Int4 => put(out, &i32::try_from(integer(text)?).ok()?.to_be_bytes()),
            Native::Int8 => put(out, &integer(text)?.to_be_bytes()),
            Native::Float4 => put(out, &float::<f32>(text)?.to_be_bytes()),
            Native::Float8 => put(out, &float::<f64>(text)?.to_be_bytes()),
            Native::Numeric => return sized(out, |out| numeric(text, out)),
            Native::Date => put(out, &days(text)?.to_be_bytes()),
            Native::Timestamp => put(out, &timestamp(text, b"")?.to_be_bytes()),
            Native::Timestamptz => put(out, &timestamp(text, b"+00")?.to_be_bytes()),
            Native::Uuid => return sized(out, |out| uuid(text, out)),
            Native::Bytea => return sized(out, |out| hex(text.strip_prefix(b"\\x")?, out)),
            Native::Text => put(out, text),
            Native::Jsonb => {
                out.extend_from_slice(&(text.len() as u32 + 1).to_be_bytes());
                out.push(1);
                out.extend_from_slice(text);
            }
        }
        Some(())
    }
}

/// Appends length and bytes.
pub(super) fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    out.extend_from_slice(bytes);
}

/// Appends what `write` appends, and its length before it.
fn sized(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>) -> Option<()>) -> Option<()> {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    write(out)?;
    let length = (out.len() - at - 4) as u32;
    *out.get_mut(at..)?.first_chunk_mut::<4>()? = length.to_be_bytes();
    Some(())
}

fn boolean(text: &[u8]) -> Option<u8> {
    match text {
        b"t" => Some(1),
        b"f" => Some(0),
        _ => None,
    }
}

fn integer(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Digits and nothing else, few enough for their value.
fn number(digits: &[u8]) -> Option<i64> {
    let add =
        |sum: i64, digit: &u8| digit.is_ascii_digit().then(|| sum * 10 + i64::from(digit - b'0'));
    if digits.is_empty() || digits.len() > 9 { None } else { digits.iter().try_fold(0, add) }
}

/// Both round as the server does, to the nearest. What is out of range is the server's to refuse.
fn float<F: std::str::FromStr + Into<f64> + Copy>(text: &[u8]) -> Option<F> {
    let named = matches!(text, b"NaN" | b"Infinity" | b"-Infinity");
    let plain = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b'+' | b'-' | b'.' | b'e');
    if !named && !text.iter().all(plain) {
        return None;
    }
    let value: F = std::str::from_utf8(text).ok()?.parse().ok()?;
    let wide: f64 = value.into();
    let mut mantissa = text.iter().take_while(|byte| **byte != b'e');
    let is_zero = !mantissa.any(|byte| (b'1'..=b'9').contains(byte));
    (named || (wide.is_finite() && (wide != 0.0 || is_zero))).then_some(value)
}

/// Digits in groups of four, without groups of zeros at either end.
fn numeric(text: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let special = match text {
        b"NaN" => Some(0xc000_u16),
        b"Infinity" => Some(0xd000),
        b"-Infinity" => Some(0xf000),
        _ => None,
    };
    let at = out.len();
    out.extend_from_slice(&[0; 8]);
    let (mut weight, mut sign, mut scale) = (0, special.unwrap_or(0), 0);
    if special.is_none() {
        let digits = text.strip_prefix(b"-");
        sign = if digits.is_some() { 0x4000 } else { 0 };
        let digits = digits.unwrap_or(text);
        let mut parts = digits.splitn(2, |byte| *byte == b'.');
        let (whole, fraction) = (parts.next()?, parts.next());
        if fraction.is_some_and(<[u8]>::is_empty) || text.len() > NUMERIC_BYTES_MAX {
            return None;
        }
        let fraction = fraction.unwrap_or_default();
        scale = fraction.len();
        let (first, rest) = whole.split_at(whole.len() % 4);
        weight = whole.len().div_ceil(4) as i16 - 1;
        let groups = std::iter::once(first).filter(|first| !first.is_empty());
        for group in groups.chain(rest.chunks(4)) {
            out.extend_from_slice(&(number(group)? as u16).to_be_bytes());
        }
        for group in fraction.chunks(4) {
            let missing = 4 - group.len() as u32;
            out.extend_from_slice(&(number(group)? as u16 * 10_u16.pow(missing)).to_be_bytes());
        }
        if whole.is_empty() {
            return None;
        }
        weight -= trim(out, at + 8) as i16;
    }
    let count = (out.len() - at - 8) / 2;
    let head = [count as u16, if count == 0 { 0 } else { weight as u16 }, sign, scale as u16];
    let place = out.get_mut(at..at + 8)?;
    place.copy_from_slice(head.map(u16::to_be_bytes).as_flattened());
    Some(())
}

/// Takes groups of zeros away at both ends of what stands behind `at`; how many at the beginning.
fn trim(out: &mut Vec<u8>, at: usize) -> usize {
    while out.len() > at && out.ends_with(&[0, 0]) {
        out.truncate(out.len() - 2);
    }
    let zeros = |groups: &[u8]| groups.chunks(2).take_while(|group| *group == [0, 0]).count();
    let leading = out.get(at..).map_or(0, zeros);
    out.drain(at..at + leading * 2);
    leading
}

/// `2026-01-31`, as days from PostgreSQL's epoch.
fn date(text: &[u8]) -> Option<i64> {
    let [y1, y2, y3, y4, b'-', m1, m2, b'-', d1, d2] = text else { return None };
    let (year, month) = (number(&[*y1, *y2, *y3, *y4])?, number(&[*m1, *m2])?);
    let day = number(&[*d1, *d2])?;
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let last = match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if year == 0 || !(1..=last).contains(&day) {
        return None;
    }
    // Years that begin in March have their odd day at the end.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    Some(days - 719_468 - EPOCH_DAYS)
}

fn days(text: &[u8]) -> Option<i32> {
    match text {
        b"infinity" => Some(i32::MAX),
        b"-infinity" => Some(i32::MIN),
        text => i32::try_from(date(text)?).ok(),
    }
}

/// `2026-01-31 12:59:59.999999` and the zone's suffix, as microseconds from PostgreSQL's epoch.
fn timestamp(text: &[u8], zone: &[u8]) -> Option<i64> {
    match text {
        b"infinity" => return Some(i64::MAX),
        b"-infinity" => return Some(i64::MIN),
        _ => {}
    }
    let (day, time) = text.strip_suffix(zone)?.split_at_checked(10)?;
    let [b' ', h1, h2, b':', m1, m2, b':', s1, s2, fraction @ ..] = time else { return None };
    let hours = number(&[*h1, *h2]).filter(|hours| *hours < 24)?;
    let minutes = number(&[*m1, *m2]).filter(|minutes| *minutes < 60)?;
    let seconds = number(&[*s1, *s2]).filter(|seconds| *seconds < 60)?;
    let micros = match fraction {
        [] => 0,
        [b'.', digits @ ..] if digits.len() <= 6 => {
            number(digits)? * 10_i64.pow(6 - digits.len() as u32)
        }
        _ => return None,
    };
    let seconds = (hours * 60 + minutes) * 60 + seconds;
    Some(date(day)? * DAY_MICROS + seconds * 1_000_000 + micros)
}

fn uuid(text: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let groups = text.split(|byte| *byte == b'-');
    let lengths = [8, 4, 4, 4, 12];
    if text.len() != 36 || !groups.clone().map(<[u8]>::len).eq(lengths) {
        return None;
    }
    groups.into_iter().try_for_each(|group| hex(group, out))
}

fn hex(digits: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let nibble = |digit: u8| char::from(digit).to_digit(16).map(|n| n as u8);
    let (pairs, rest) = digits.as_chunks::<2>();
    for [high, low] in pairs {
        out.push(nibble(*high)? << 4 | nibble(*low)?);
    }
    rest.is_empty().then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encoded(native: Native, text: &str) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        native.encode(text.as_bytes(), &mut out)?;
        let (length, bytes) = out.split_first_chunk::<4>().unwrap();
        assert_eq!(u32::from_be_bytes(*length) as usize, bytes.len());
        Some(bytes.to_vec())
    }

    fn i64_of(native: Native, text: &str) -> Option<i64> {
        let bytes = encoded(native, text)?;
        match bytes.len() {
            4 => Some(i32::from_be_bytes(bytes.try_into().unwrap()).into()),
            _ => Some(i64::from_be_bytes(bytes.try_into().unwrap())),
        }
    }

    #[test]
    fn times_are_counted_from_the_year_2000() {
        for (text, days) in [
            ("2000-01-01", 0),
            ("2000-02-29", 59),
            ("2001-01-01", 366),
            ("1999-12-31", -1),
            ("1970-01-01", -10_957),
            ("0001-01-01", -730_119),
            ("9999-12-31", 2_921_939),
            ("2024-03-01", 8_826),
            ("1900-03-01", -36_465),
        ] {
            assert_eq!(i64_of(Native::Date, text), Some(days), "{text}");
            let midnight = format!("{text} 00:00:00");
            let micros = days * DAY_MICROS;
            assert_eq!(i64_of(Native::Timestamp, &midnight), Some(micros), "{text}");
            assert_eq!(i64_of(Native::Timestamptz, &format!("{midnight}+00")), Some(micros));
        }
        let late = i64_of(Native::Timestamptz, "2000-01-01 23:59:59.9+00");
        assert_eq!(late, Some(DAY_MICROS - 100_000));
        assert_eq!(i64_of(Native::Timestamp, "1999-12-31 23:59:59.999999"), Some(-1));
        assert_eq!(i64_of(Native::Timestamp, "-infinity"), Some(i64::MIN));
        assert_eq!(i64_of(Native::Date, "infinity"), Some(i64::from(i32::MAX)));
    }

    #[test]
    fn what_no_server_prints_is_refused() {
        for (native, texts) in [
            (Native::Bool, &["true", "", "T", "1"][..]),
            (Native::Int4, &["", " 5", "2147483648", "1e3", "0x1"]),
            (Native::Float8, &["", "nan", "inf", "1e400", "1e-400", " 1", "1_0", "0x1p3"]),
            (Native::Float4, &["1e39", "1e-50"]),
            (Native::Numeric, &["", "-", ".", ".5", "1.", "1e5", "1..2", "+1", "1 ", "nan", "a"]),
            (
                Native::Date,
                &[
                    "2026-02-29",
                    "2026-1-1",
                    "26-01-01",
                    "0000-01-01",
                    "0044-03-15 BC",
                    "10000-01-01",
                    "2026/01/01",
                    "2026-13-01",
                    "2026-00-10",
                    "2026-01-00",
                    "today",
                ],
            ),
            (
                Native::Timestamp,
                &[
                    "2026-01-01",
                    "2026-01-01 24:00:00",
                    "2026-01-01T00:00:00",
                    "2026-01-01 00:00:00+00",
                    "2026-01-01 00:00:60",
                    "2026-01-01 00:00:00.",
                    "2026-01-01 00:00:00.1234567",
                    "2026-01-01 00:00:00 BC",
                ],
            ),
            (
                Native::Timestamptz,
                &[
                    "2026-01-01 00:00:00",
                    "2026-01-01 00:00:00+01",
                    "2026-01-01 00:00:00+00:00",
                    "2026-01-01 00:00:00+00 BC",
                ],
            ),
            (
                Native::Uuid,
                &[
                    "",
                    "a0eebc999c0b4ef8bb6d6bb9bd380a11",
                    "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a1g",
                    "{0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
                ],
            ),
            (Native::Bytea, &["", "00", "\\x0", "\\x0g", "\\000"]),
        ] {
            for text in texts {
                assert_eq!(encoded(native, text), None, "{native:?} {text:?}");
            }
        }
    }

    #[test]
    fn numerics_have_groups_of_four_digits() {
        let parts = |text: &str| -> Vec<u16> {
            let bytes = encoded(Native::Numeric, text).unwrap();
            bytes.chunks(2).map(|b| u16::from_be_bytes([b[0], b[1]])).collect()
        };
        assert_eq!(parts("0"), [0, 0, 0, 0]);
        assert_eq!(parts("0.00"), [0, 0, 0, 2]);
        assert_eq!(parts("1"), [1, 0, 0, 0, 1]);
        assert_eq!(parts("-12345.6789"), [3, 1, 0x4000, 4, 1, 2345, 6789]);
        assert_eq!(parts("100000000"), [1, 2, 0, 0, 1]);
        assert_eq!(parts("0.00001"), [1, 0xfffe, 0, 5, 1000]);
        assert_eq!(parts("1.50"), [2, 0, 0, 2, 1, 5000]);
        assert_eq!(parts("NaN"), [0, 0, 0xc000, 0]);
        assert_eq!(parts("-Infinity"), [0, 0, 0xf000, 0]);
    }

    proptest! {
        #[test]
        fn any_text_is_a_value_or_refused(text in proptest::collection::vec(prop_oneof![
            any::<u8>(), prop::sample::select(b"0123456789-+.: eEINx".to_vec())], 0..40))
        {
            for name in ["bool", "int2", "int4", "int8", "float4", "float8", "numeric", "date",
                "timestamp", "timestamptz", "uuid", "bytea", "text", "jsonb"]
            {
                let _ = Native::named(name).unwrap().encode(&text, &mut Vec::new());
            }
        }

        #[test]
        fn floats_keep_every_bit(value in any::<f64>(), short in any::<f32>()) {
            prop_assume!(value.is_finite() && short.is_finite());
            let bytes = encoded(Native::Float8, &format!("{value:e}")).unwrap();
            prop_assert_eq!(bytes, value.to_be_bytes());
            let bytes = encoded(Native::Float4, &format!("{short:e}")).unwrap();
            prop_assert_eq!(bytes, short.to_be_bytes());
        }
    }
}
