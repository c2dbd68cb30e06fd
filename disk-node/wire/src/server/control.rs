//! Control frames of one connection: each request in a task of its own, answers as they come.

use super::Server;
use crate::auth::{Caller, GatewayId, VersionRange, PROTOCOL_VERSIONS};
use crate::control::{ControlError, ControlRequest, ControlResponse};
use crate::error::{AuthError, LinkError};
use crate::frame::{decode, encode, Frame, FrameReader, FrameWriter, Kind};
use bytes::Bytes;
use futures::FutureExt;
use granary_placement::id::DiskUuid;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Bodies at work are counted in units of this many bytes.
const UNIT_BYTES: usize = 1024;

/// Answers waiting to be sent. Tasks wait for a place with their answer in hand, so this need not be large.
const QUEUE_FRAMES: usize = 64;

pub(super) fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX >> 3).clamp(1, u32::MAX >> 3)
}

/// Serves one connection to its end.
pub(super) async fn serve(server: &Arc<Server>, stream: TcpStream, caller: Caller, peer: SocketAddr) {
    let Caller { disk, gateway, session, .. } = caller;
    let version = session.version;
    let (read, write) = stream.into_split();
    let reader = FrameReader::new(read, session.to_server);
    let writer = FrameWriter::new(write, session.to_client);
    let (answers, queue) = mpsc::channel(QUEUE_FRAMES);
    let mut tasks = JoinSet::new();
    let mut writing = tokio::spawn(write_loop(writer, queue, server.limits.stall_timeout));
    let _abort = AbortOnDrop(writing.abort_handle());

    let ended = tokio::select! {
        ended = read_loop((server, (disk, gateway, version)), reader, &mut tasks, &answers) => ended,
        written = &mut writing => written.unwrap_or_else(|error| Err(LinkError::Closed(error.to_string()))),
        () = server.stop.cancelled() => {
            // What was asked is still answered: a command that is already in the log had better not look lost.
            let _ = timeout(server.limits.stop_grace, async {
                while tasks.join_next().await.is_some() {}
                drop(answers);
                let _ = (&mut writing).await;
            })
            .await;
            Ok(())
        }
    };
    match ended {
        Ok(()) => {}
        Err(LinkError::Closed(why)) => tracing::debug!(%peer, why, "control connection ended"),
        Err(error) => server.complaints.warn(peer, &error.to_string()),
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The client's disk, if it is a disk node, the gateway that it is part of, and the version that both ends use.
type From = (Option<DiskUuid>, Option<GatewayId>, u16);

async fn read_loop(
    (server, from): (&Arc<Server>, From),
    mut reader: FrameReader<OwnedReadHalf>,
    tasks: &mut JoinSet<()>,
    answers: &mpsc::Sender<Frame>,
) -> Result<(), LinkError> {
    loop {
        let frame = tokio::select! {
            Some(_) = tasks.join_next() => continue,
            frame = timeout(server.limits.control_idle_timeout, reader.next(server.limits.stall_timeout)) => match frame {
                Ok(frame) => frame?,
                Err(_) => return Err(LinkError::Closed("idle".to_owned())),
            },
        };
        let Some(Frame { id, kind, body }) = frame else { return Ok(()) };
        match kind {
            Kind::Request => {}
            Kind::Ping => {
                // A full queue means that answers are on their way: sign of life enough.
                let _ = answers.try_send(Frame { id, kind: Kind::Pong, body: Bytes::new() });
                continue;
            }
            kind => return Err(LinkError::Protocol(format!("a {kind:?} from a client"))),
        }
        // Made again, it is refused with the versions that are needed now.
        let version = from.2;
        if version < PROTOCOL_VERSIONS.max && version < server.versions().min {
            let (ours, theirs) = (server.versions(), VersionRange { min: version, max: version });
            return Err(AuthError::Version { ours, theirs }.into());
        }
        let units = units(body.len()).min(units(server.limits.max_control_bytes));
        let room = Arc::clone(&server.control_units).try_acquire_many_owned(units);
        let (Ok(room), true) = (room, tasks.len() < server.limits.max_control_in_flight) else {
            let refusal = encode(&ControlResponse::Error(ControlError::Overloaded))?;
            if answers.send(Frame { id, kind: Kind::Response, body: refusal }).await.is_err() {
                return Ok(());
            }
            continue;
        };
        let (server, answers) = (Arc::clone(server), answers.clone());
        tasks.spawn(async move {
            let body = answer(&server, from, &body).await;
            let _ = answers.send(Frame { id, kind: Kind::Response, body }).await;
            drop(room);
        });
    }
}

/// The encoded answer to an encoded request.
async fn answer(server: &Server, (disk, gateway, version): From, body: &[u8]) -> Bytes {
    let mut response = match decode::<ControlRequest>(body) {
        Ok(request) => {
            AssertUnwindSafe(server.service.control(server.asker(disk, gateway), request))
                .catch_unwind()
                .await
                .unwrap_or_else(|_| {
                    // The panic itself is in the log. The peer must not wait for its deadline.
                    ControlResponse::Error(ControlError::Unavailable("the node failed while answering".to_owned()))
                })
        }
        // Authenticated, so not an attack: another build, or a defect.
        Err(error) => ControlResponse::Error(ControlError::BadRequest(error.to_string())),
    };
    // Also what is only bytes here may tell of what came about while it was asked.
    if version < PROTOCOL_VERSIONS.max && version < response.since().max(server.versions().min) {
        let why = format!("the answer cannot be read by version {version} of the node protocol: upgrade this end");
        response = ControlResponse::Error(ControlError::BadRequest(why));
    }
    encode(&response)
        .or_else(|error| {
            encode(&ControlResponse::Error(ControlError::BadRequest(format!("the answer cannot be sent: {error}"))))
        })
        .unwrap_or_default()
}

async fn write_loop(
    mut writer: FrameWriter<OwnedWriteHalf>,
    mut queue: mpsc::Receiver<Frame>,
    stall: Duration,
) -> Result<(), LinkError> {
    let mut batch = Vec::new();
    while queue.recv_many(&mut batch, QUEUE_FRAMES).await > 0 {
        for frame in batch.drain(..) {
            writer.write(&frame, stall).await?;
        }
        writer.flush(stall).await?;
    }
    Ok(())
}
