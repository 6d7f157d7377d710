//! What is handed over goes out as what is copied.

use super::*;
use proptest::prelude::*;

fn bytes(pipeline: &Pipeline) -> Vec<u8> {
    [pipeline.before.concat().as_slice(), pipeline.out.as_ref()].concat()
}

/// Small, and as large as those that are not copied.
fn value() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..20),
        (APART_BYTES - 2..APART_BYTES + 3).prop_map(|size| vec![b'x'; size]),
    ]
}

proptest! {
    #[test]
    fn what_is_handed_over_is_sent_as_what_is_copied(
        requests in prop::collection::vec(
            prop::collection::vec((any::<bool>(), value()), 0..5), 0..4,
        ),
        apart in 0..4_usize,
    ) {
        let (mut owned, mut other, mut copied) = <(Pipeline, Pipeline, Pipeline)>::default();
        for (number, params) in requests.iter().enumerate() {
            // Some of them in another, which is appended.
            let request = if number < apart { &mut owned } else { &mut other };
            let given = params.iter().map(|(binary, value)| OwnedParam {
                binary: *binary,
                value: value.clone(),
            });
            request.run_owned("name", given.collect());
            let params: Vec<Param<'_>> = params.iter().map(|(binary, value)| match binary {
                true => Param::Binary(value),
                false => Param::Text(Some(value)),
            }).collect();
            copied.run_mixed("name", &params);
        }
        owned.append(other);
        prop_assert_eq!(owned.len(), copied.len());
        prop_assert_eq!(owned.is_empty(), requests.is_empty());
        prop_assert_eq!(bytes(&owned), bytes(&copied));
    }
}

#[test]
fn data_of_a_copy_is_a_message_a_piece_and_its_statement_is_still_told() {
    let mut pipeline = Pipeline::new();
    pipeline.parse("large", "copy large from stdin", &[]);
    pipeline.copy("large", [vec![b'a'; APART_BYTES], b"b".to_vec()]);
    let sent = bytes(&pipeline);
    let head = [b"d".as_slice(), &(APART_BYTES as u32 + 4).to_be_bytes(), b"a"].concat();
    assert!(sent.windows(head.len()).any(|window| window == head));
    assert!(sent.ends_with(b"ad\0\0\0\x05bc\0\0\0\x04"));
    assert_eq!(pipeline.statements(), "copy large from stdin");
}

#[test]
fn a_large_piece_of_a_copy_is_several_messages() {
    let mut pipeline = Pipeline::new();
    pipeline.copy("large", [vec![b'a'; 2 * COPY_MESSAGE_BYTES + 3], Vec::new()]);
    let sent = bytes(&pipeline);
    let (mut rest, mut sizes) = (sent.as_slice(), Vec::new());
    while let Some((head, tail)) = rest.split_at_checked(5) {
        let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize - 4;
        if head[0] == b'd' {
            sizes.push(length);
        }
        rest = &tail[length..];
    }
    assert_eq!((sizes, rest), (vec![COPY_MESSAGE_BYTES, COPY_MESSAGE_BYTES, 3], b"".as_slice()));
}
