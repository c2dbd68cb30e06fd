//! The handshake that opens every connection, and the keys it leaves behind.
//!
//! ```text
//! client -> server  hello    magic 8 | highest version u16 | purpose u8 | older u8 | cluster id 16
//!                            | disk meant 16 | client's disk 16 | client's gateway 16 | client nonce 32
//! server -> client  hello    magic 8 | highest version u16 | verdict u8 | older u8 | server nonce 32 | server proof 32
//! client -> server  proof    client proof 32
//! server -> client  verdict  u8 | code 32
//! ```
//!
//! Numbers are big-endian. The transcript is the client's hello and the first 44 bytes of the server's (all but its
//! proof). A proof is HMAC-SHA256 under the cluster secret over a label of its role and the transcript; so is each
//! direction's session key. Both nonces are fresh, so no proof and no key is ever good for a second connection; the
//! label keeps an end from being handed its own proof. The first 12 bytes of either hello never change their meaning,
//! so that ends of different versions can say so: `older` is how many versions before the highest an end speaks as
//! well. Both ends use the highest version that both speak; since the transcript holds both ranges, nobody between them
//! can talk them into an older one.
//!
//! The hello names the disk that the client means to speak to, and the client's own if it is a disk node. Addresses are
//! taken over and swapped; a node refuses whoever means another disk, and knows which disk speaks to it. Zeros stand
//! for "whoever answers" and "no disk": a gateway that looks who is there, and every gateway. A gateway names itself by
//! a number that it drew at its start, by which a node counts the gateways that share its places.
//!
//! Once the server has proved itself, its verdict carries a code under the key of what it says: nobody between the ends
//! can say in its name that another disk is there, or that it is busy. What it says before that cannot carry one, and
//! is believed only where it speaks of no disk.

use crate::error::{AuthError, LinkError};
use granary_placement::id::{ClusterId, DiskUuid};
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use std::fmt;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use subtle::ConstantTimeEq;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

/// Versions that this build speaks of everything said between nodes: handshake, chunk requests, frames, and the
/// messages inside them.
///
/// 1: the first. 2: the hello names the gateway, the verdict carries a code, and NodeStatus tells a gateway's share of
/// the places; the hello's length is another, so 1 is not spoken any more. 3: Reach, Reached, and disks that are away
/// in maps; see [`ControlRequest::since`](crate::control::ControlRequest::since). 4: ListDamaged.
pub const PROTOCOL_VERSIONS: VersionRange = VersionRange { min: 2, max: 4 };

/// The version in which a map can say of a disk that it is away.
pub const AWAY_VERSION: u16 = 3;
/// The version in which a disk can be asked for what its scrub found.
pub const DAMAGED_VERSION: u16 = 4;

/// Protocol versions that an end speaks, both ends of the range included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VersionRange {
    /// The oldest; at most 255 before `max`.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

impl VersionRange {
    /// The highest version in both; None when there is none.
    pub fn common(self, other: VersionRange) -> Option<u16> {
        let highest = self.max.min(other.max);
        (highest >= self.min && highest >= other.min).then_some(highest)
    }

    fn older(self) -> u8 {
        u8::try_from(self.max.saturating_sub(self.min)).unwrap_or(u8::MAX)
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            write!(f, "version {}", self.max)
        } else {
            write!(f, "versions {} to {}", self.min, self.max)
        }
    }
}

const MAGIC: [u8; 8] = *b"granary\0";
const NONCE_BYTES: usize = 32;
const PREFIX_BYTES: usize = 12;
const UUID_BYTES: usize = 16;
const CLIENT_HELLO_BYTES: usize = PREFIX_BYTES + 4 * UUID_BYTES + NONCE_BYTES;
const SERVER_HEAD_BYTES: usize = PREFIX_BYTES + NONCE_BYTES;
const PROOF_BYTES: usize = 32;
const VERDICT_BYTES: usize = 1 + 32;

const LABEL_SERVER_PROOF: &[u8] = b"granary proof of the server\0";
const LABEL_CLIENT_PROOF: &[u8] = b"granary proof of the client\0";
const LABEL_TO_SERVER: &[u8] = b"granary key client to server\0";
const LABEL_TO_CLIENT: &[u8] = b"granary key server to client\0";
/// Under the key of what the server says.
const LABEL_VERDICT: &[u8] = b"granary verdict\0";

/// Shortest cluster secret, in bytes.
pub const MIN_SECRET_BYTES: usize = 32;

/// Longest secret file, in bytes: guards against being pointed at something else.
const MAX_SECRET_FILE_BYTES: u64 = 4096;

/// Why there is no cluster secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be read.
    #[error("cannot read the cluster secret file {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Others than its owner may read or write the file.
    #[error("the cluster secret file {path} is open to other users (mode {mode:03o}): run `chmod 600 {path}`")]
    Mode {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Not hexadecimal.
    #[error("the cluster secret is not hexadecimal digits, two per byte")]
    NotHex,
    /// Too short to be a secret.
    #[error(
        "the cluster secret has {len_bytes} bytes, fewer than {MIN_SECRET_BYTES}: make one with `openssl rand -hex 32`"
    )]
    TooShort {
        /// How long it is.
        len_bytes: usize,
    },
    /// Longer than any secret.
    #[error("the cluster secret file {path} is larger than {MAX_SECRET_FILE_BYTES} bytes: is it the right file?")]
    TooLong {
        /// Which file.
        path: PathBuf,
    },
    /// The operating system gave no random bytes.
    #[error("no random bytes from the operating system: {0}")]
    Random(String),
}

/// What every node of a cluster knows and nobody else. There is no default.
#[derive(Clone)]
pub struct ClusterSecret(Arc<[u8]>);

impl ClusterSecret {
    /// The secret in these hexadecimal digits; white space around them is ignored.
    ///
    /// # Errors
    /// [`SecretError::NotHex`], [`SecretError::TooShort`].
    pub fn from_hex(text: &str) -> Result<ClusterSecret, SecretError> {
        let bytes = hex::decode(text.trim()).map_err(|_| SecretError::NotHex)?;
        if bytes.len() < MIN_SECRET_BYTES {
            return Err(SecretError::TooShort { len_bytes: bytes.len() });
        }
        Ok(ClusterSecret(bytes.into()))
    }

    /// A new secret of 32 random bytes.
    ///
    /// # Errors
    /// [`SecretError::Random`].
    pub fn generate() -> Result<ClusterSecret, SecretError> {
        let mut bytes = [0u8; MIN_SECRET_BYTES];
        getrandom::fill(&mut bytes).map_err(|error| SecretError::Random(error.to_string()))?;
        Ok(ClusterSecret(Arc::new(bytes)))
    }

    /// The secret in a file of hexadecimal digits that only its owner can read.
    ///
    /// # Errors
    /// Each says what to do about it.
    pub fn read_file(path: &Path) -> Result<ClusterSecret, SecretError> {
        let failed = |source| SecretError::Read { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(failed)?;
        // Of the open file, not of the path: what is judged is what is read.
        let mode = file.metadata().map_err(failed)?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(SecretError::Mode { path: path.to_owned(), mode });
        }
        let mut text = String::new();
        file.take(MAX_SECRET_FILE_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > MAX_SECRET_FILE_BYTES {
            return Err(SecretError::TooLong { path: path.to_owned() });
        }
        ClusterSecret::from_hex(&text)
    }

    /// The digits [`ClusterSecret::from_hex`] takes. For writing a secret file, never for logs.
    pub fn to_hex(&self) -> String {
        hex::encode(&self.0)
    }

    fn key(&self) -> MacKey {
        MacKey::new(&self.0)
    }
}

impl fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterSecret(redacted)")
    }
}

/// Which cluster a node belongs to and how it proves it.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The cluster.
    pub cluster: ClusterId,
    /// Its secret.
    pub secret: ClusterSecret,
}

/// What a connection is for. Part of the proof: a connection made for one cannot be used for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Chunk requests, HTTP/1.1.
    Data,
    /// Control frames.
    Control,
}

impl Purpose {
    fn number(self) -> u8 {
        match self {
            Purpose::Data => 1,
            Purpose::Control => 2,
        }
    }

    fn from_number(number: u8) -> Option<Purpose> {
        match number {
            1 => Some(Purpose::Data),
            2 => Some(Purpose::Control),
            _ => None,
        }
    }
}

/// A gateway, as disk nodes count them: a number that its process drew at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GatewayId([u8; UUID_BYTES]);

impl GatewayId {
    /// A new one; None when the operating system gives no random bytes. Who has none is not counted, and served all the
    /// same.
    pub fn random() -> Option<GatewayId> {
        let mut bytes = [0u8; UUID_BYTES];
        getrandom::fill(&mut bytes).ok()?;
        GatewayId::heard(bytes)
    }

    fn heard(bytes: [u8; UUID_BYTES]) -> Option<GatewayId> {
        Some(GatewayId(bytes)).filter(|id| id.0 != NOBODY.0)
    }
}

/// Who is at the ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ends {
    /// The disk that the client means to speak to; None: whoever answers.
    pub to: Option<DiskUuid>,
    /// The client's own disk; None for a gateway.
    pub from: Option<DiskUuid>,
    /// The gateway that the client is part of; None for a disk node.
    pub gateway: Option<GatewayId>,
}

/// No disk has this one.
const NOBODY: DiskUuid = DiskUuid([0; UUID_BYTES]);

fn said(disk: Option<DiskUuid>) -> [u8; UUID_BYTES] {
    disk.unwrap_or(NOBODY).0
}

fn heard(bytes: [u8; UUID_BYTES]) -> Option<DiskUuid> {
    Some(DiskUuid(bytes)).filter(|disk| *disk != NOBODY)
}

/// What a server learns of a client.
#[derive(Debug)]
pub(crate) struct Caller {
    /// What the connection is for.
    pub purpose: Purpose,
    /// The client's disk, if it is a disk node.
    pub disk: Option<DiskUuid>,
    /// The gateway that the client is part of.
    pub gateway: Option<GatewayId>,
    /// The keys of the connection.
    pub session: Session,
}

/// A key for HMAC-SHA256, with its pads already hashed.
#[derive(Clone)]
pub(crate) struct MacKey(Hmac<Sha256>);

impl MacKey {
    fn new(key: &[u8]) -> MacKey {
        // The key block of RFC 2104, made here because it cannot fail, as the crate's constructor for slices could.
        let mut block = hmac::digest::Key::<Hmac<Sha256>>::default();
        let hashed = Sha256::digest(key);
        let key = if key.len() > block.len() { &hashed[..] } else { key };
        for (place, byte) in block.iter_mut().zip(key) {
            *place = *byte;
        }
        MacKey(Hmac::new(&block))
    }

    /// HMAC-SHA256 of the parts, one after the other. Callers make the parts unambiguous.
    pub(crate) fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        let mut mac = self.0.clone();
        for part in parts {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }
}

impl fmt::Debug for MacKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MacKey(redacted)")
    }
}

/// Are these equal? Takes the same time wherever they differ.
pub(crate) fn same(a: &[u8], b: &[u8]) -> bool {
    a.ct_eq(b).into()
}

/// The keys of one connection.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    /// The protocol version that both ends use on it.
    pub version: u16,
    /// Authenticates what the client says.
    pub to_server: MacKey,
    /// Authenticates what the server says.
    pub to_client: MacKey,
}

impl Session {
    /// A verdict that the server gives after its proof.
    fn verdict(&self, verdict: Verdict) -> [u8; VERDICT_BYTES] {
        let number = [verdict.number()];
        let mut bytes = [0u8; VERDICT_BYTES];
        bytes[..1].copy_from_slice(&number);
        bytes[1..].copy_from_slice(&self.to_client.mac(&[LABEL_VERDICT, &number]));
        bytes
    }
}

/// The server's verdict on a hello or a proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Accepted,
    Version,
    Cluster,
    Secret,
    Busy,
    Disk,
}

impl Verdict {
    fn number(self) -> u8 {
        match self {
            Verdict::Accepted => 0,
            Verdict::Version => 1,
            Verdict::Cluster => 2,
            Verdict::Secret => 3,
            Verdict::Busy => 4,
            Verdict::Disk => 5,
        }
    }

    /// What the client makes of it.
    fn check(number: u8, ours: VersionRange, theirs: VersionRange) -> Result<(), LinkError> {
        match number {
            0 => Ok(()),
            1 => Err(AuthError::Version { ours, theirs }.into()),
            2 => Err(AuthError::Cluster.into()),
            3 => Err(AuthError::Secret.into()),
            4 => Err(LinkError::Busy),
            5 => Err(AuthError::Disk.into()),
            other => Err(LinkError::Protocol(format!("unknown verdict {other} in the handshake"))),
        }
    }
}

/// Fresh random bytes for one handshake.
pub(crate) fn nonce() -> Result<[u8; NONCE_BYTES], LinkError> {
    let mut nonce = [0u8; NONCE_BYTES];
    getrandom::fill(&mut nonce).map_err(|error| LinkError::Connect(format!("no random bytes: {error}")))?;
    Ok(nonce)
}

struct Transcript {
    key: MacKey,
    client_hello: [u8; CLIENT_HELLO_BYTES],
    server_head: [u8; SERVER_HEAD_BYTES],
}

impl Transcript {
    fn mac(&self, label: &[u8]) -> [u8; 32] {
        self.key.mac(&[label, &self.client_hello, &self.server_head])
    }

    fn session(&self, version: u16) -> Session {
        Session {
            version,
            to_server: MacKey::new(&self.mac(LABEL_TO_SERVER)),
            to_client: MacKey::new(&self.mac(LABEL_TO_CLIENT)),
        }
    }
}

fn prefix(versions: VersionRange, third: u8) -> [u8; PREFIX_BYTES] {
    let mut bytes = [0u8; PREFIX_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&versions.max.to_be_bytes());
    bytes[10] = third;
    bytes[11] = versions.older();
    bytes
}

/// The versions and third field of a hello's first bytes.
fn read_prefix(bytes: &[u8; PREFIX_BYTES]) -> Result<(VersionRange, u8), AuthError> {
    if bytes[..8] != MAGIC {
        return Err(AuthError::Magic);
    }
    let max = u16::from_be_bytes([bytes[8], bytes[9]]);
    Ok((VersionRange { min: max.saturating_sub(bytes[11].into()), max }, bytes[10]))
}

fn lost(error: std::io::Error) -> LinkError {
    LinkError::Closed(format!("in the handshake: {error}"))
}

/// The client's side. The caller sets the deadline.
pub(crate) async fn client_handshake<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    credentials: &Credentials,
    (purpose, ends): (Purpose, Ends),
    versions: VersionRange,
    nonce: [u8; NONCE_BYTES],
) -> Result<Session, LinkError> {
    let mut client_hello = [0u8; CLIENT_HELLO_BYTES];
    client_hello[..12].copy_from_slice(&prefix(versions, purpose.number()));
    client_hello[12..28].copy_from_slice(&credentials.cluster.0);
    client_hello[28..44].copy_from_slice(&said(ends.to));
    client_hello[44..60].copy_from_slice(&said(ends.from));
    client_hello[60..76].copy_from_slice(&ends.gateway.map_or(NOBODY.0, |gateway| gateway.0));
    client_hello[76..].copy_from_slice(&nonce);
    stream.write_all(&client_hello).await.map_err(lost)?;

    let mut head = [0u8; PREFIX_BYTES];
    stream.read_exact(&mut head).await.map_err(lost)?;
    let (theirs, verdict) = read_prefix(&head)?;
    // Whoever has proved nothing yet may say that it cannot talk, and nothing about the cluster's disks.
    if [Verdict::Secret, Verdict::Disk].iter().any(|proven| proven.number() == verdict) {
        return Err(LinkError::Protocol(format!("verdict {verdict} before any proof")));
    }
    Verdict::check(verdict, versions, theirs)?;
    let version = versions.common(theirs).ok_or(AuthError::Version { ours: versions, theirs })?;
    let mut server_head = [0u8; SERVER_HEAD_BYTES];
    server_head[..PREFIX_BYTES].copy_from_slice(&head);
    stream.read_exact(&mut server_head[PREFIX_BYTES..]).await.map_err(lost)?;
    let mut server_proof = [0u8; PROOF_BYTES];
    stream.read_exact(&mut server_proof).await.map_err(lost)?;

    let transcript = Transcript { key: credentials.secret.key(), client_hello, server_head };
    if !same(&server_proof, &transcript.mac(LABEL_SERVER_PROOF)) {
        return Err(AuthError::Secret.into());
    }
    stream.write_all(&transcript.mac(LABEL_CLIENT_PROOF)).await.map_err(lost)?;
    let session = transcript.session(version);
    let mut verdict = [0u8; VERDICT_BYTES];
    stream.read_exact(&mut verdict).await.map_err(lost)?;
    let (number, code) = (verdict[0], &verdict[1..]);
    if !same(code, &session.to_client.mac(&[LABEL_VERDICT, &[number]])) {
        return Err(AuthError::Message.into());
    }
    // Our proof was right: somebody between the ends has changed it.
    if number == Verdict::Secret.number() {
        return Err(AuthError::Message.into());
    }
    Verdict::check(number, versions, theirs)?;
    Ok(session)
}

/// The server's side; `me` is its disk. `admit` says whether there is a place for a client of that purpose, once it is
/// known to be of the cluster; `turned_out` ends the wait for a client whose place another one needs, and tells it that
/// the node is busy. The caller sets the deadline.
pub(crate) async fn server_handshake<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    credentials: &Credentials,
    me: DiskUuid,
    versions: VersionRange,
    nonce: [u8; NONCE_BYTES],
    turned_out: CancellationToken,
    admit: impl FnOnce(Purpose) -> bool,
) -> Result<Caller, LinkError> {
    let mut client_hello = [0u8; CLIENT_HELLO_BYTES];
    let mut head = [0u8; PREFIX_BYTES];
    read_or_refuse(stream, &mut head, &turned_out).await?;
    let (theirs, purpose) = read_prefix(&head)?;
    let Some(version) = versions.common(theirs) else {
        refuse(stream, versions, Verdict::Version).await;
        return Err(AuthError::Version { ours: versions, theirs }.into());
    };
    client_hello[..PREFIX_BYTES].copy_from_slice(&head);
    read_or_refuse(stream, &mut client_hello[PREFIX_BYTES..], &turned_out).await?;
    if client_hello[12..28] != credentials.cluster.0 {
        refuse(stream, versions, Verdict::Cluster).await;
        return Err(AuthError::Cluster.into());
    }
    let [mut to, mut from, mut gateway] = [[0u8; UUID_BYTES]; 3];
    to.copy_from_slice(&client_hello[28..44]);
    from.copy_from_slice(&client_hello[44..60]);
    gateway.copy_from_slice(&client_hello[60..76]);
    let purpose = Purpose::from_number(purpose)
        .ok_or_else(|| LinkError::Protocol(format!("unknown purpose {purpose} in the handshake")))?;

    let mut server_head = [0u8; SERVER_HEAD_BYTES];
    server_head[..PREFIX_BYTES].copy_from_slice(&prefix(versions, Verdict::Accepted.number()));
    server_head[PREFIX_BYTES..].copy_from_slice(&nonce);
    let transcript = Transcript { key: credentials.secret.key(), client_hello, server_head };
    let mut hello = [0u8; SERVER_HEAD_BYTES + PROOF_BYTES];
    hello[..SERVER_HEAD_BYTES].copy_from_slice(&server_head);
    hello[SERVER_HEAD_BYTES..].copy_from_slice(&transcript.mac(LABEL_SERVER_PROOF));
    stream.write_all(&hello).await.map_err(lost)?;

    let session = transcript.session(version);
    let mut client_proof = [0u8; PROOF_BYTES];
    tokio::select! {
        read = stream.read_exact(&mut client_proof) => read.map_err(|error| match error.kind() {
            // A client that hangs up here found our proof wrong.
            std::io::ErrorKind::UnexpectedEof => LinkError::Auth(AuthError::Secret),
            _ => lost(error),
        })?,
        () = turned_out.cancelled() => {
            let _ = stream.write_all(&session.verdict(Verdict::Busy)).await;
            return Err(LinkError::Busy);
        }
    };
    if !same(&client_proof, &transcript.mac(LABEL_CLIENT_PROOF)) {
        let _ = stream.write_all(&session.verdict(Verdict::Secret)).await;
        return Err(AuthError::Secret.into());
    }
    // Only now: a stranger does not learn which disk this is.
    if heard(to).is_some_and(|meant| meant != me) {
        let _ = stream.write_all(&session.verdict(Verdict::Disk)).await;
        return Err(AuthError::Disk.into());
    }
    if !admit(purpose) {
        let _ = stream.write_all(&session.verdict(Verdict::Busy)).await;
        return Err(LinkError::Busy);
    }
    stream.write_all(&session.verdict(Verdict::Accepted)).await.map_err(lost)?;
    Ok(Caller { purpose, disk: heard(from), gateway: GatewayId::heard(gateway), session })
}

/// Reads a part of the client's hello, unless another client needs its place first.
async fn read_or_refuse<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    bytes: &mut [u8],
    turned_out: &CancellationToken,
) -> Result<(), LinkError> {
    tokio::select! {
        read = stream.read_exact(bytes) => read.map(|_| ()).map_err(lost),
        () = turned_out.cancelled() => {
            refuse_busy(stream).await;
            Err(LinkError::Busy)
        }
    }
}

/// Tells a client why it is turned away; whether it hears it does not matter.
async fn refuse<S: AsyncWrite + Unpin>(stream: &mut S, versions: VersionRange, verdict: Verdict) {
    let _ = stream.write_all(&prefix(versions, verdict.number())).await;
    let _ = stream.shutdown().await;
}

/// Tells a client that there is no place for it.
pub(crate) async fn refuse_busy<S: AsyncWrite + Unpin>(stream: &mut S) {
    refuse(stream, PROTOCOL_VERSIONS, Verdict::Busy).await;
}

#[cfg(test)]
pub(crate) mod tests;
