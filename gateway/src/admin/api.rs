//! The admin API as types: a request and an answer for everything an operator can do or list.
//!
//! The server, the verbs of `granary`, the status page, readiness and the tests use these types; nobody reads JSON by
//! field name. A request ([`Call`]) names its method, its route and its answer. What is not in the path travels as a
//! JSON object in the body of a POST; an empty body is the empty object. An answer that is no success carries an
//! [`ApiError`].
//!
//! | request | route | answer |
//! |---|---|---|
//! | [`GetStatus`] | `GET /v1/status` | [`Status`] |
//! | [`GetMap`] | `GET /v1/map` | the [`ClusterMap`] |
//! | [`RunCensus`] | `POST /v1/census` | [`Census`] |
//! | [`ReplaceDisk`] | `POST /v1/disks/{disk}/replace` | [`DiskChanged`] |
//! | [`DrainDisk`], [`WeighDisk`] | `POST /v1/disks/{disk}/drain`, `.../weight` | [`DiskChanged`] |
//! | [`GetConfig`] | `GET /v1/config` | [`Config`] |
//! | [`SetConfig`] | `POST /v1/config` | [`ConfigChanged`] |
//! | [`StartDisk`], [`StopDisk`] | `POST /v1/disks/{disk}/start`, `.../stop` | [`DiskChanged`] |
//!
//! `GET /readyz`, which needs no token, answers with [`Readiness`].
//!
//! Fields are only ever added; a reader of an older release skips what it does not know, and reads a new word of
//! [`Health`] or [`ErrorCode`] as `unknown`.

pub use crate::background::heal::{Census, HealStatus};
pub use granary_placement::settings::Row as SettingRow;

use crate::disks::DiskHealth;
use granary_placement::id::{ClusterId, DiskId, DiskUuid, Epoch, ShardId};
use granary_placement::map::{ClusterMap, DiskState};
use http::{Method, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// A request of the admin API.
pub trait Call: Serialize + DeserializeOwned + Send + 'static {
    /// What a success answers, as JSON.
    type Answer: Serialize + DeserializeOwned + Send + 'static;
    /// GET for what changes nothing, else POST.
    const METHOD: Method;
    /// Path; `{disk}` stands for [`Call::disk`].
    const ROUTE: &'static str;

    /// The disk in the path; None when the route names none.
    fn disk(&self) -> Option<DiskId> {
        None
    }

    /// Takes the disk from the path.
    fn set_disk(&mut self, _disk: DiskId) {}

    /// The path with the disk filled in.
    fn path(&self) -> String {
        match self.disk() {
            Some(disk) => Self::ROUTE.replace("{disk}", &disk.to_string()),
            None => Self::ROUTE.to_owned(),
        }
    }
}

/// Declares requests: how they look, and their [`Call`].
macro_rules! calls {
    ($($(#[$doc:meta])* $method:ident $route:literal $name:ident { $($fields:tt)* } -> $answer:ty;)+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $name { $($fields)* }

        impl Call for $name {
            type Answer = $answer;
            const METHOD: Method = Method::$method;
            const ROUTE: &'static str = $route;
        }
    )+};
}

/// The same for requests about one disk, which the path names.
macro_rules! disk_calls {
    ($($(#[$doc:meta])* $route:literal $name:ident { $($fields:tt)* } -> $answer:ty;)+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            /// The disk; stands in the path.
            #[serde(skip)]
            pub disk: DiskId,
            $($fields)*
        }

        impl Call for $name {
            type Answer = $answer;
            const METHOD: Method = Method::POST;
            const ROUTE: &'static str = $route;

            fn disk(&self) -> Option<DiskId> {
                Some(self.disk)
            }

            fn set_disk(&mut self, disk: DiskId) {
                self.disk = disk;
            }
        }
    )+};
}

calls! {
    /// How the cluster stands.
    GET "/v1/status" GetStatus {} -> Status;
    /// The cluster map in use.
    GET "/v1/map" GetMap {} -> ClusterMap;
    /// Read every chunk and count them. Answers when all are read, which may take hours.
    POST "/v1/census" RunCensus {} -> Census;
    /// All settings.
    GET "/v1/config" GetConfig {} -> Config;
    /// Change a setting of the whole cluster.
    POST "/v1/config" SetConfig {
        /// Its name.
        pub name: String,
        /// Its value from now on; None: the default.
        #[serde(default)]
        pub value: Option<String>,
    } -> ConfigChanged;
}

disk_calls! {
    /// Give the slots and shard replicas of a disk to a new one. Where the gateway starts its disk nodes itself
    /// (`granary dev`) nothing else need be said; elsewhere the new disk is formatted and its node runs.
    "/v1/disks/{disk}/replace" ReplaceDisk {
        /// UUID on the new disk's label.
        #[serde(default)]
        pub uuid: Option<DiskUuid>,
        /// `host:port` of its node; None: the old disk's.
        #[serde(default)]
        pub address: Option<String>,
    } -> DiskChanged;
    /// Take a disk out of service in order: its slots and replicas go to other disks. Asked again once it is empty, it
    /// is out.
    "/v1/disks/{disk}/drain" DrainDisk {} -> DiskChanged;
    /// Give a disk another share of the data.
    "/v1/disks/{disk}/weight" WeighDisk {
        /// The new weight, relative to the other disks.
        pub weight: u32,
    } -> DiskChanged;
    /// Start the node of a disk; `granary dev` only.
    "/v1/disks/{disk}/start" StartDisk {} -> DiskChanged;
    /// Stop the node of a disk; `granary dev` only.
    "/v1/disks/{disk}/stop" StopDisk {} -> DiskChanged;
}

/// All settings: those of the cluster and of the gateway that answers as they are in force, and those of disk nodes
/// where the gateway starts them itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// One row per setting.
    pub settings: Vec<SettingRow>,
}

/// A setting of the cluster was changed; gateways follow within seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigChanged {
    /// Its name.
    pub name: String,
    /// Its value from now on.
    pub value: String,
}

/// What was done to a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskChanged {
    /// The disk that the request named.
    pub disk: DiskId,
    /// What was done.
    pub done: DiskAct,
    /// Epoch of the cluster map that says so; None when no map changed.
    #[serde(default)]
    pub epoch: Option<Epoch>,
    /// Slots of placement groups in that map whose chunks are on their way to another disk.
    #[serde(default)]
    pub slots_moving: usize,
}

/// What can be done to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskAct {
    /// Its node was started.
    Start,
    /// Its node was stopped.
    Stop,
    /// A new disk took its place.
    Replace,
    /// Its slots go to other disks.
    Drain,
    /// It was empty and is out of service.
    Out,
    /// It has another share of the data.
    Weight,
    /// A word of a later release.
    #[serde(other)]
    Unknown,
}

/// Why a request was refused, or not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// For programs.
    pub code: ErrorCode,
    /// For people: one sentence.
    pub message: String,
}

impl ApiError {
    /// An error of that kind.
    pub fn new(code: ErrorCode, message: impl fmt::Display) -> ApiError {
        ApiError { code, message: message.to_string() }
    }
}

/// The kinds of errors, each with its HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request makes no sense.
    BadRequest,
    /// The token is missing or wrong.
    Unauthorized,
    /// There is no such path, or no such disk.
    NotFound,
    /// The path takes another method.
    MethodNotAllowed,
    /// The request did not come whole, or was not done, in time.
    Timeout,
    /// It cannot be done as the cluster stands.
    Conflict,
    /// The body is too long.
    TooLarge,
    /// As many requests of this kind as may are under way.
    Busy,
    /// A fault of the gateway.
    Internal,
    /// This gateway cannot do that.
    NotSupported,
    /// Something needed does not answer now; again later.
    Unavailable,
    /// A word of a later release.
    #[serde(other)]
    Unknown,
}

impl ErrorCode {
    /// The HTTP status it travels with.
    pub fn status(self) -> StatusCode {
        match self {
            ErrorCode::BadRequest => StatusCode::BAD_REQUEST,
            ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
            ErrorCode::NotFound => StatusCode::NOT_FOUND,
            ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            ErrorCode::Timeout => StatusCode::REQUEST_TIMEOUT,
            ErrorCode::Conflict => StatusCode::CONFLICT,
            ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ErrorCode::Busy => StatusCode::TOO_MANY_REQUESTS,
            ErrorCode::Internal | ErrorCode::Unknown => StatusCode::INTERNAL_SERVER_ERROR,
            ErrorCode::NotSupported => StatusCode::NOT_IMPLEMENTED,
            ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// The answer of `/readyz`: should this gateway get traffic?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// Reads and writes can be served.
    pub ready: bool,
    /// Why not.
    pub reasons: Vec<String>,
    /// What is not well, though requests are served.
    pub warnings: Vec<String>,
}

/// The cluster as this gateway sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// When it was collected, Unix milliseconds; 0 for never.
    pub collected_ms: u64,
    /// Which cluster; None before the first collection.
    pub cluster_id: Option<ClusterId>,
    /// Epoch of the map in use.
    pub epoch: Epoch,
    /// Scheme of uploads that name no storage class.
    pub default_scheme: String,
    /// Placement groups.
    pub groups: usize,
    /// Groups of the default scheme by how many of their disks are up.
    pub groups_by_disks_up: BTreeMap<usize, usize>,
    /// Disks in service.
    pub disks: Vec<DiskRow>,
    /// Shards.
    pub shards: Vec<ShardRow>,
    /// Chunks waiting for repair.
    pub repair_queue: Count,
    /// How healing stands; None before it begins.
    pub heal: Option<HealStatus>,
    /// The admin address of the gateway that heals; None when none does.
    #[serde(default)]
    pub heals_at: Option<String>,
    /// Buckets, the first by name.
    pub buckets: Vec<BucketRow>,
    /// There are more buckets than shown.
    pub more_buckets: bool,
}

/// How many; `more` when counting stopped there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Counted.
    pub count: u64,
    /// There are more.
    pub more: bool,
    /// Some shards did not answer.
    pub partial: bool,
}

/// Whether a disk answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// It answers.
    Up,
    /// New, or an error was seen a moment ago.
    Suspect,
    /// It does not answer.
    Down,
    /// A word of a later release.
    #[serde(other)]
    Unknown,
}

impl Health {
    /// All that a disk can be.
    pub const ALL: [Health; 3] = [Health::Up, Health::Suspect, Health::Down];

    /// As it stands in JSON, metrics and tables.
    pub fn name(self) -> &'static str {
        match self {
            Health::Up => "up",
            Health::Suspect => "suspect",
            Health::Down => "down",
            Health::Unknown => "unknown",
        }
    }
}

impl From<DiskHealth> for Health {
    fn from(health: DiskHealth) -> Health {
        match health {
            DiskHealth::Up => Health::Up,
            DiskHealth::Suspect => Health::Suspect,
            DiskHealth::Down => Health::Down,
        }
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a disk does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Stores chunks.
    Storage,
    /// Holds shard replicas.
    Metadata,
    /// A word of a later release.
    #[serde(other)]
    Unknown,
}

impl Role {
    /// As it stands in JSON and tables.
    pub fn name(self) -> &'static str {
        match self {
            Role::Storage => "storage",
            Role::Metadata => "metadata",
            Role::Unknown => "unknown",
        }
    }
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRow {
    /// Its number.
    pub disk: DiskId,
    /// On its label.
    pub uuid: DiskUuid,
    /// Where its node is called.
    pub address: String,
    /// zone/rack/server.
    pub location: String,
    /// in or draining.
    pub state: DiskState,
    /// Share of the data it is to hold.
    #[serde(default)]
    pub weight: u32,
    /// What it does.
    pub roles: Vec<Role>,
    /// Slots of placement groups whose chunks it holds or is being given.
    #[serde(default)]
    pub slots: usize,
    /// Slots whose chunks are on their way from it to another disk.
    #[serde(default)]
    pub slots_leaving: usize,
    /// Whether it answers.
    pub health: Health,
    /// Size of its file system, in bytes.
    pub capacity_bytes: Option<u64>,
    /// Free for chunks, in bytes.
    pub free_bytes: Option<u64>,
    /// Chunks on it.
    pub chunks: Option<u64>,
    /// Payload of them, in bytes.
    pub chunk_bytes: Option<u64>,
    /// Epoch of the map it knows.
    pub epoch: Option<Epoch>,
    /// The last error seen.
    pub last_error: Option<String>,
}

/// A shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRow {
    /// Its number; 0 is the root shard.
    pub shard: ShardId,
    /// Members by the map.
    pub members: Vec<DiskId>,
    /// Who says to lead it.
    pub leader: Option<DiskId>,
    /// Term of that.
    pub term: Option<u64>,
    /// Voters by the leader's word.
    pub voters: Vec<DiskId>,
    /// Replicas that answered: disk, state, last applied index.
    pub replicas: Vec<ReplicaRow>,
}

impl ShardRow {
    /// Voters whose replica answered.
    pub fn voters_answering(&self) -> usize {
        self.replicas.iter().filter(|replica| self.voters.contains(&replica.disk)).count()
    }
}

/// A replica of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaRow {
    /// On which disk.
    pub disk: DiskId,
    /// leader, follower, ...
    pub state: String,
    /// Last applied index.
    pub applied_index: u64,
}

/// A bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketRow {
    /// Name.
    pub name: String,
    /// What lies in it; None when a shard did not answer.
    pub usage: Option<UsageRow>,
}

/// Usage of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageRow {
    /// Current objects.
    pub objects: u64,
    /// Payload, uploads in progress included, in bytes.
    pub bytes: u64,
    /// Uploads in progress.
    pub uploads: u64,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_request_fills_its_disk_into_the_path_and_not_into_the_body() {
        let call = ReplaceDisk { disk: DiskId(7), uuid: Some(DiskUuid([0xab; 16])), address: None };
        assert_eq!((ReplaceDisk::METHOD, call.path().as_str()), (Method::POST, "/v1/disks/7/replace"));
        let body = serde_json::to_string(&call).unwrap();
        assert_eq!(body, r#"{"uuid":"abababababababababababababababab","address":null}"#);
        let mut read: ReplaceDisk = serde_json::from_str(&body).unwrap();
        read.set_disk(DiskId(7));
        assert_eq!(read, call);
        assert_eq!(serde_json::from_str::<ReplaceDisk>("{}").unwrap(), ReplaceDisk::default());
        assert!(serde_json::from_str::<ReplaceDisk>(r#"{"uid":"x"}"#).is_err(), "a misspelt field is no request");
    }

    #[test]
    fn words_and_fields_of_a_later_release_do_not_break_an_older_reader() {
        let error: ApiError = serde_json::from_str(r#"{"code":"too_sleepy","message":"later","hint":1}"#).unwrap();
        assert_eq!(error, ApiError::new(ErrorCode::Unknown, "later"));
        assert_eq!(serde_json::from_str::<Health>("\"resting\"").unwrap(), Health::Unknown);
        for health in Health::ALL {
            assert_eq!(serde_json::to_string(&health).unwrap(), format!("\"{}\"", health.name()));
        }
    }
}
