//! PostgreSQL's own hash functions, for what would otherwise cost a question to the source.
//!
//! `hash_bytes` and `hash_bytes_uint32` are Bob Jenkins' lookup3 as PostgreSQL has it since 8.4;
//! its results are the same on every platform of one byte order and part of what hash partitions
//! and Citus's shards rest on, so no release changes them. A test holds each against servers.
//!
//! <https://git.postgresql.org/gitweb/?p=postgresql.git;a=blob;f=src/common/hashfn.c>

/// What all three words begin with, the length in bytes added.
const START: u32 = 0x9e37_79b9_u32.wrapping_add(3_923_095);

/// `hash_any` of the bytes, as little-endian servers compute it: hashtext() of a text under a
/// deterministic collation, uuid_hash() of a uuid's 16 bytes.
pub(super) fn bytes(mut key: &[u8]) -> i32 {
    let start = START.wrapping_add(key.len() as u32);
    let (mut a, mut b, mut c) = (start, start, start);
    while let Some((block, rest)) = key.split_first_chunk::<12>() {
        a = a.wrapping_add(word(block, 0));
        b = b.wrapping_add(word(block, 4));
        c = c.wrapping_add(word(block, 8));
        mix(&mut a, &mut b, &mut c);
        key = rest;
    }
    // The lowest byte of c is the length's.
    let (first, rest) = key.split_at(key.len().min(4));
    let (second, third) = rest.split_at(rest.len().min(4));
    a = a.wrapping_add(word(first, 0));
    b = b.wrapping_add(word(second, 0));
    c = c.wrapping_add(word(third, 0) << 8);
    ended(a, b, c)
}

/// hashint4(), and hashint2() of a value that fits.
pub(super) fn int4(value: i32) -> i32 {
    let start = START.wrapping_add(4);
    ended(start.wrapping_add(value as u32), start, start)
}

/// hashint8(): equal to [`int4`] for what fits into one.
pub(super) fn int8(value: i64) -> i32 {
    let (low, high) = (value as u32, (value >> 32) as u32);
    int4((low ^ if value >= 0 { high } else { !high }) as i32)
}

/// Up to four bytes from `at` on as a little-endian number; those that are not there are 0.
fn word(key: &[u8], at: usize) -> u32 {
    key.iter().skip(at).take(4).rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
}

fn mix(a: &mut u32, b: &mut u32, c: &mut u32) {
    // x -= z; x ^= rot(z); z += y
    fn turn(x: &mut u32, y: &u32, z: &mut u32, by: u32) {
        *x = x.wrapping_sub(*z) ^ z.rotate_left(by);
        *z = z.wrapping_add(*y);
    }
    turn(a, b, c, 4);
    turn(b, c, a, 6);
    turn(c, a, b, 8);
    turn(a, b, c, 16);
    turn(b, c, a, 19);
    turn(c, a, b, 4);
}

fn ended(mut a: u32, mut b: u32, mut c: u32) -> i32 {
    // x ^= y; x -= rot(y)
    let turn = |x: u32, y: u32, by: u32| (x ^ y).wrapping_sub(y.rotate_left(by));
    c = turn(c, b, 14);
    a = turn(a, c, 11);
    b = turn(b, a, 25);
    c = turn(c, b, 16);
    a = turn(a, c, 4);
    b = turn(b, a, 14);
    c = turn(c, b, 24);
    c as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As PostgreSQL 15 gave them.
    #[test]
    fn values_seen_on_a_server() {
        let ints = [0, 1, -1, -7, i32::MAX].map(int4);
        assert_eq!(ints, [-272_711_505, -1_905_060_026, 385_747_274, -82_204_417, -96_758_253]);
        assert_eq!([1, -1, i64::MIN].map(int8), [-1_905_060_026, 385_747_274, -96_758_253]);
        assert_eq!(bytes(b""), -1_477_818_771);
        assert_eq!(bytes("walferry \u{fc}ber zw\u{f6}lf".as_bytes()), -2_144_498_621);
        let uuid: Vec<u8> = (0..16).map(|digit| digit * 0x11).collect();
        assert_eq!(bytes(&uuid), 776_152_245);
    }
}
