//! Messages on a socket: reading is cancel-safe, so a read may lose a race against a timer.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::message::backend::{Header, Message};
use tokio::io::{AsyncReadExt, ReadHalf};

use super::socket::Socket;
use crate::limit::MESSAGE_BYTES;

/// Bytes asked of the kernel at a time. Big enough that a busy stream needs few system calls.
const READ_BYTES: usize = 128 << 10;

/// A block of memory with less room than this is left to the messages in it. Reads that find little
/// share a block: it is kept for as long as any message in it is.
const ROOM_BYTES: usize = 16 << 10;

/// A message from a server: the two that postgres-protocol lacks or that must cost nothing, and
/// the rest.
pub enum Frame {
    /// CopyData's payload, not copied.
    CopyData(Bytes),
    /// CopyBothResponse, which postgres-protocol does not know.
    CopyBoth,
    /// Everything else.
    Message(Message),
}

impl std::fmt::Debug for FrameReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameReader").field("buffered", &self.buffer.len()).finish()
    }
}

/// The reading half of a connection.
pub struct FrameReader {
    half: ReadHalf<Socket>,
    buffer: BytesMut,
}

impl FrameReader {
    /// Reads from `half`; nothing has been read yet.
    pub fn new(half: ReadHalf<Socket>) -> Self {
        FrameReader { half, buffer: BytesMut::with_capacity(READ_BYTES) }
    }

    /// The next message. Cancel-safe: dropping the future loses nothing.
    pub async fn next(&mut self) -> io::Result<Frame> {
        loop {
            if let Some(frame) = self.buffered()? {
                return Ok(frame);
            }
            let room = self.buffer.capacity() - self.buffer.len();
            if !self.buffer.try_reclaim(READ_BYTES) && room < ROOM_BYTES {
                self.buffer.reserve(READ_BYTES);
            }
            if self.half.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the server closed the connection",
                ));
            }
        }
    }

    /// Bytes that have arrived and were not taken.
    pub fn arrived(&self) -> usize {
        self.buffer.len()
    }

    /// Moves the payloads of CopyData messages that have arrived whole to the end of `into`, until
    /// that holds `limit` bytes or more, or another message comes. Gives their number. Nothing is
    /// allocated or counted for a message: rows come by the million.
    pub fn gather(&mut self, into: &mut BytesMut, limit: usize) -> u64 {
        let (mut count, mut at) = (0, 0);
        while into.len() < limit {
            let rest = self.buffer.get(at..).unwrap_or_default();
            let Some((b"d", rest)) = rest.split_at_checked(1) else { break };
            let Some((length, _)) = rest.split_first_chunk::<4>() else { break };
            let length = u32::from_be_bytes(*length) as usize;
            let Some(payload) = rest.get(4..length) else { break };
            into.extend_from_slice(payload);
            at += length + 1;
            count += 1;
        }
        self.buffer.advance(at);
        count
    }

    /// A message that has already arrived, without waiting.
    pub fn buffered(&mut self) -> io::Result<Option<Frame>> {
        take(&mut self.buffer)
    }
}

/// Cuts one whole message off the front of `buffer`; `None` if it is not all there yet.
fn take(buffer: &mut BytesMut) -> io::Result<Option<Frame>> {
    let Some(header) = Header::parse(buffer)? else { return Ok(None) };
    let len = usize::try_from(header.len()).unwrap_or(usize::MAX).saturating_add(1);
    if len > MESSAGE_BYTES {
        let message = "a message over 1 GiB; is this a PostgreSQL server's port?";
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    if buffer.len() < len {
        // Grown by doubling rather than to the announced length: a peer that is no PostgreSQL
        // announces anything.
        let missing = len - buffer.len();
        buffer.reserve(missing.min(buffer.len().max(READ_BYTES)));
        return Ok(None);
    }
    let mut whole = buffer.split_to(len);
    match header.tag() {
        b'd' => Ok(Some(Frame::CopyData(whole.split_off(5).freeze()))),
        b'W' => Ok(Some(Frame::CopyBoth)),
        _ => Ok(Message::parse(&mut whole)?.map(Frame::Message)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::ServerError;
    use fallible_iterator::FallibleIterator;
    use proptest::prelude::*;

    /// Reads every part of a message that a session would read.
    fn look_into(message: &Message) {
        match message {
            Message::ErrorResponse(body) => {
                let _ = ServerError::from_fields(body.fields());
            }
            Message::NoticeResponse(body) => {
                let _ = ServerError::from_fields(body.fields());
            }
            Message::DataRow(body) => {
                let _ = body.ranges().count();
            }
            Message::RowDescription(body) => {
                let _ = body.fields().count();
            }
            Message::ParameterStatus(body) => {
                let _ = (body.name(), body.value());
            }
            Message::NotificationResponse(body) => {
                let _ = (body.channel(), body.message());
            }
            Message::CommandComplete(body) => {
                let _ = body.tag();
            }
            Message::AuthenticationSasl(body) => {
                let _ = body.mechanisms().count();
            }
            Message::CopyOutResponse(body) => {
                let _ = body.column_formats().count();
            }
            _ => {}
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn any_bytes_are_frames_or_an_error(
            tag in prop::sample::select(b"RKSZCDTEN123AGHIdcVnstvW\x00".to_vec()),
            claimed in prop::option::of(any::<i32>()),
            body in prop::collection::vec(any::<u8>(), 0..60),
        ) {
            let mut buffer = BytesMut::from(&[tag][..]);
            let len = claimed.unwrap_or(body.len() as i32 + 4);
            buffer.extend_from_slice(&len.to_be_bytes());
            buffer.extend_from_slice(&body);
            while let Ok(Some(frame)) = take(&mut buffer) {
                if let Frame::Message(message) = &frame {
                    look_into(message);
                }
            }
        }
    }

    #[tokio::test]
    async fn rows_are_gathered_up_to_the_limit_and_other_messages_left() {
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        drop(theirs);
        let (half, _) = tokio::io::split(Socket::Unix(ours));
        let mut reader = FrameReader::new(half);
        for (length, body) in [(6_u32, "ab"), (5, "c"), (4, ""), (7, "def"), (9, "ghijk")] {
            reader.buffer.extend_from_slice(b"d");
            reader.buffer.extend_from_slice(&length.to_be_bytes());
            reader.buffer.extend_from_slice(body.as_bytes());
        }
        reader.buffer.extend_from_slice(b"c\0\0\0\x04d\0\0");
        let mut rows = BytesMut::from(&b"-"[..]);
        assert_eq!(reader.gather(&mut rows, 4), 2);
        assert_eq!(&rows[..], b"-abc");
        assert_eq!(reader.gather(&mut rows, 5), 2, "an empty row, and one over the limit");
        assert_eq!(reader.gather(&mut rows, 5), 0, "it is full");
        assert_eq!(reader.gather(&mut rows, 1 << 20), 1);
        assert_eq!(&rows[..], b"-abcdefghijk");
        assert!(matches!(reader.buffered(), Ok(Some(Frame::Message(Message::CopyDone)))));
        assert_eq!(reader.gather(&mut rows, 1 << 20), 0, "half a message");
    }

    #[test]
    fn a_length_below_its_own_four_bytes_is_not_gathered() {
        let mut buffer = BytesMut::from(&b"d\0\0\0\x02xx"[..]);
        assert!(take(&mut buffer).is_err());
    }

    #[test]
    fn an_announced_length_is_not_believed_before_the_bytes_come() {
        let mut buffer = BytesMut::from(&b"D\x3f\xff\xff\xff"[..]);
        assert!(take(&mut buffer).unwrap().is_none());
        assert!(buffer.capacity() <= 4 * READ_BYTES);
        let mut buffer = BytesMut::from(&b"HTTP/1.1 400 Bad Request"[..]);
        assert!(take(&mut buffer).is_err());
    }
}
