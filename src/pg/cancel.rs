//! Cancel requests.

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::connect::{self, Place};
use super::{Error, Result};

/// Cancels what a session is doing.
///
/// <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-CANCELING-REQUESTS>
#[derive(Clone, Debug)]
pub struct CancelHandle {
    pub(super) place: Place,
    pub(super) process_id: i32,
    pub(super) secret_key: i32,
}

impl CancelHandle {
    /// Sends the request on a connection of its own, TLS where the session is, and waits (up to
    /// connect_timeout) until the server has taken it. The server promises nothing more.
    pub async fn cancel(&self) -> Result<()> {
        let Place { config, host, address, encrypted } = &self.place;
        let peer = config.peer(host);
        let asking = async {
            let mut socket = connect::connect_socket(config, host, address, *encrypted).await?;
            let mut out = BytesMut::new();
            frontend::cancel_request(self.process_id, self.secret_key, &mut out);
            let sent = async {
                socket.write_all(&out).await?;
                socket.flush().await
            };
            sent.await.map_err(|source| Error::Io { peer: peer.clone(), source })?;
            // The server hangs up when it has passed the request on; how does not matter.
            let _ = socket.read(&mut [0u8; 1]).await;
            Ok(())
        };
        let limit = config.connect_timeout;
        tokio::time::timeout(limit, asking).await.unwrap_or_else(|_| {
            let (doing, seconds) = ("canceling".to_string(), limit.as_secs());
            Err(Error::Timeout { peer: config.peer(host), doing, seconds })
        })
    }
}
