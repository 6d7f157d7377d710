//! Messages on a socket: reading is cancel-safe, so a read may lose a race against a timer.

use std::io;

use bytes::{Bytes, BytesMut};
use postgres_protocol::message::backend::{Header, Message};
use tokio::io::{AsyncReadExt, ReadHalf};

use super::socket::Socket;
use crate::limit::MESSAGE_BYTES;

/// Bytes asked of the kernel at a time. Big enough that a busy stream needs few system calls.
const READ_BYTES: usize = 128 << 10;

/// A message from a server: the two that postgres-protocol lacks or that must cost nothing, and the rest.
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
            self.buffer.reserve(READ_BYTES);
            if self.half.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the server closed the connection",
                ));
            }
        }
    }

    /// A message that has already arrived, without waiting.
    pub fn buffered(&mut self) -> io::Result<Option<Frame>> {
        let Some(header) = Header::parse(&self.buffer)? else { return Ok(None) };
        let len = usize::try_from(header.len()).unwrap_or(usize::MAX).saturating_add(1);
        if len > MESSAGE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "message over 1 GiB"));
        }
        if self.buffer.len() < len {
            self.buffer.reserve(len - self.buffer.len());
            return Ok(None);
        }
        let mut whole = self.buffer.split_to(len);
        match header.tag() {
            b'd' => Ok(Some(Frame::CopyData(whole.split_off(5).freeze()))),
            b'W' => Ok(Some(Frame::CopyBoth)),
            _ => Ok(Message::parse(&mut whole)?.map(Frame::Message)),
        }
    }
}
