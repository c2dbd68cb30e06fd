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
//! | [`DrainDisk`], [`WeighDisk`], [`OutDisk`] | `POST /v1/disks/{disk}/drain`, `.../weight`, `.../out` | [`DiskChanged`] |
//! | [`FindLost`] | `POST /v1/lost` | [`LostPage`] |
//! | [`PauseHealing`], [`ResumeHealing`] | `POST /v1/heal/pause`, `.../resume` | [`HealingPaused`] |
//! | [`GetConfig`] | `GET /v1/config` | [`Config`] |
//! | [`SetConfig`] | `POST /v1/config` | [`ConfigChanged`] |
//! | [`GetFeatureLevels`] | `GET /v1/feature-level` | [`FeatureLevels`] |
//! | [`RaiseFeatureLevel`] | `POST /v1/feature-level` | [`FeatureLevelRaised`] |
//! | [`StartDisk`], [`StopDisk`] | `POST /v1/disks/{disk}/start`, `.../stop` | [`DiskChanged`] |
//!
//! `GET /readyz`, which needs no token, answers with [`Readiness`].
//!
//! Fields are only ever added; a reader of an older release skips what it does not know, and reads a new word of
//! [`Health`] or [`ErrorCode`] as `unknown`.

mod rows;

pub use crate::background::heal::lost::{LostCursor, LostKey, LostPage};
pub use crate::background::heal::{Census, HealStatus};
pub use granary_placement::settings::Row as SettingRow;
pub use rows::{
    BucketRow, Count, DiskRow, FeatureLevels, Health, Readiness, ReplicaRow, Role, ShardLevelRow, ShardRow, Status,
    UsageRow,
};

use granary_placement::id::{DiskId, DiskUuid, Epoch, ShardId};
use granary_placement::map::ClusterMap;
use http::{Method, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
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
    /// A page of the keys that cannot be read now. Answers after some seconds, with where to go on.
    POST "/v1/lost" FindLost {
        /// Only keys of this bucket.
        #[serde(default)]
        pub bucket: Option<String>,
        /// Where to go on; None: at the beginning.
        #[serde(default)]
        pub from: Option<LostCursor>,
        /// Have every chunk read and checked by its disk, instead of asking whether it is there.
        #[serde(default)]
        pub read: bool,
    } -> LostPage;
    /// Pause healing in the whole cluster, for so many seconds from now on, at least one and at most 7 days.
    POST "/v1/heal/pause" PauseHealing {
        /// How long.
        pub for_s: u64,
    } -> HealingPaused;
    /// End a pause of healing.
    POST "/v1/heal/resume" ResumeHealing {} -> HealingPaused;
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
    /// The feature level of each shard, and what the builds in the cluster know.
    GET "/v1/feature-level" GetFeatureLevels {} -> FeatureLevels;
    /// Raise the feature level of every shard to the highest that all builds know. For good: disk nodes of older
    /// releases cannot join shards any more.
    POST "/v1/feature-level" RaiseFeatureLevel {} -> FeatureLevelRaised;
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
    /// Take a dead disk out of service now, without waiting for `heal.out_after`, and however many went out lately.
    "/v1/disks/{disk}/out" OutDisk {} -> DiskChanged;
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

/// Healing is paused, or goes on; gateways follow within seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealingPaused {
    /// Until then, Unix milliseconds; 0: it is not paused.
    pub paused_until_ms: u64,
}

/// A setting of the cluster was changed; gateways follow within seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigChanged {
    /// Its name.
    pub name: String,
    /// Its value from now on.
    pub value: String,
}

/// What became of the feature levels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeatureLevelRaised {
    /// The highest level that all builds know: the level of every shard from now on, unless one has a higher one.
    pub level: u32,
    /// Shards that had a lower one; empty when there was nothing to raise.
    pub raised: Vec<ShardId>,
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
    /// Slots of placement groups that the change gave to another disk.
    #[serde(default)]
    pub slots_moving: usize,
    /// Shard replicas that the change gave to another disk.
    #[serde(default)]
    pub replicas_moving: usize,
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
    /// It was dead, and others take over what it held.
    Away,
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
