//! The directory of a `granary dev` cluster: what lies where, and what is decided once, at its first start.
//!
//! ```text
//! DIR/lock               held while a granary dev runs on DIR
//! DIR/dev.json           the format of all that lies here, and the plan: scheme, shards, disk directories, and their
//!                        addresses by the map
//! DIR/cluster-secret     64 hex digits, mode 600        DIR/admin-token        mode 600
//! DIR/root-credentials   JSON, mode 600; only when made here
//! DIR/map.json           the newest cluster map this machine has seen
//! DIR/addresses.json     addresses that replaced those of the map: {"disk id": "host:port"}
//! DIR/cluster.json       processes and addresses of the cluster that runs now
//! DIR/disks/disk-N/      the disks                       DIR/logs/disk-N.log    their logs
//! ```
//!
//! **Invariant:** what a disk directory holds is said by its label, never by its name. The map's address of a disk
//! names its directory: a replacement takes over the address, so each address has one disk in service, and each
//! directory one address.

use crate::settings::{read_small, write_atomic, SettingsError};
use granary_placement::id::{ClusterId, DiskId, DiskUuid};
use granary_placement::map::{ClusterMap, Disk, DiskState, Location, Roles};
use granary_placement::place::{default_replicas, new_map, NewCluster, NewDisk, DEFAULT_GROUPS_PER_DISK};
use granary_placement::scheme::{FailureDomain, KPlusM, Scheme};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

/// Format of everything below DIR, named in `dev.json`. It is raised when any file there changes so that this build
/// cannot use what another one wrote.
///
/// 1: granary 0.1.0. 2: hash slots, two disks per slot of a placement group, a version in each record. 3: replicas with
/// incarnations.
pub const DATA_VERSION: u32 = 3;
/// Disk directories of the default cluster.
pub const DEFAULT_DISKS: u16 = 8;
/// Most disks of a `granary dev` cluster: each is a process with threads of its own.
pub const MAX_DISKS: u16 = 64;
/// Object shards of the default cluster.
pub const DEFAULT_SHARDS: u16 = 16;
const MAX_SHARDS: u16 = 1024;
/// A map file longer than this is not one of a machine's.
const MAX_MAP_BYTES: u64 = 64 * 1024 * 1024;

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// Another process uses it.
    #[error("another granary dev{by} is running on {dir}; stop it first, or use another --dir", dir = dir.display())]
    Locked {
        /// The directory.
        dir: PathBuf,
        /// ` (process N)`, when known.
        by: String,
    },
    /// The folder is no place for a cluster.
    #[error("{dir} {why}", dir = dir.display())]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// What stands in the way, and what to do.
        why: String,
    },
    /// An option does not fit.
    #[error("{option}: {why}")]
    Option {
        /// Which option.
        option: &'static str,
        /// What is wrong.
        why: String,
    },
    /// A file that cannot be read or written.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A file that does not hold what it should.
    #[error("{path}: {why}", path = path.display())]
    Bad {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The disks cannot keep the scheme.
    #[error("--disks, --scheme: {0}")]
    Place(#[from] granary_placement::place::PlaceError),
}

/// Paths below DIR.
#[derive(Debug, Clone)]
pub struct Layout {
    /// DIR, absolute.
    pub dir: PathBuf,
}

/// One disk directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// Name of the directory, `disk-1` and so on.
    pub name: String,
    /// Address by the cluster map of whichever disk lives here.
    pub map_address: String,
}

/// What is decided at the first start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Of the data below DIR: [`DATA_VERSION`].
    pub version: u32,
    /// Version of the granary that made it.
    pub made_by: String,
    /// Which cluster.
    pub cluster_id: ClusterId,
    /// As K+M.
    pub scheme: String,
    /// Shards that hold objects.
    pub shards: u16,
    /// Disk directories.
    pub disks: Vec<Slot>,
    /// All disks have been formatted: from now on an empty disk directory is a disk that was lost.
    pub formatted: bool,
    /// The cluster has been formed to the end.
    pub formed: bool,
}

/// Options that are fixed by the first start; None: not given.
#[derive(Debug, Clone, Default)]
pub struct Shape {
    /// `--disks`.
    pub disks: Option<u16>,
    /// `--scheme`.
    pub scheme: Option<String>,
    /// `--shards`.
    pub shards: Option<u16>,
    /// `--servers`: so many are played on this one machine. Only the first start asks for it.
    pub servers: Option<u16>,
}

impl Layout {
    /// The layout below `dir`, which need not be there. Nothing is made.
    ///
    /// # Errors
    /// There is no working directory that it could be below.
    pub fn at(dir: &Path) -> Result<Layout, LayoutError> {
        let absolute = std::path::absolute(dir).map_err(|error| SettingsError::file(dir, error))?;
        Ok(Layout { dir: absolute.canonicalize().unwrap_or(absolute) })
    }

    /// The layout below `dir`, with the folders of it, which are made if need be.
    ///
    /// # Errors
    /// They cannot be made.
    pub fn open(dir: &Path) -> Result<Layout, LayoutError> {
        let layout = Layout::at(dir)?;
        for below in [layout.dir.join("disks"), layout.logs()] {
            fs::create_dir_all(&below).map_err(|error| SettingsError::file(&below, error))?;
        }
        Layout::at(dir)
    }

    /// Do the options fit, at a first start among each other, at a later one to the plan? Changes nothing.
    ///
    /// # Errors
    /// As [`Layout::plan`].
    pub fn check(&self, shape: &Shape) -> Result<(), LayoutError> {
        match self.read_plan()? {
            Some(plan) => shape.check(&plan),
            None => shape.first().map(|_| ()),
        }
    }

    /// DIR/logs.
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// DIR/disks/NAME.
    pub fn disk(&self, name: &str) -> PathBuf {
        self.dir.join("disks").join(name)
    }

    /// DIR/NAME.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Takes the lock, held until the file is dropped.
    ///
    /// # Errors
    /// [`LayoutError::Locked`].
    pub fn lock(&self) -> Result<File, LayoutError> {
        use std::io::Write;
        let path = self.file("lock");
        let failed = |error| SettingsError::file(&path, error);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(LayoutError::Locked { dir: self.dir.clone(), by: holder(&path) });
            }
            Err(error) => return Err(failed(error.into()).into()),
        }
        // For the message above only; nothing trusts it.
        file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
        Ok(file)
    }

    /// The plan; None before the first start.
    ///
    /// # Errors
    /// It is there but cannot be used.
    pub fn read_plan(&self) -> Result<Option<Plan>, LayoutError> {
        let path = self.file("dev.json");
        if !path.exists() {
            return Ok(None);
        }
        Ok(Some(read_json(&path)?))
    }

    /// Writes the plan.
    ///
    /// # Errors
    /// As [`write_atomic`].
    pub fn write_plan(&self, plan: &Plan) -> Result<(), LayoutError> {
        write_json(&self.file("dev.json"), plan)
    }

    /// The newest map seen.
    ///
    /// # Errors
    /// It cannot be read or is no map.
    pub fn read_map(&self) -> Result<ClusterMap, LayoutError> {
        read_map(&self.file("map.json"))
    }

    /// Addresses that replaced those of the map.
    ///
    /// # Errors
    /// The file is there but cannot be used.
    pub fn read_addresses(&self) -> Result<BTreeMap<DiskId, String>, LayoutError> {
        let path = self.file("addresses.json");
        if path.exists() {
            read_json(&path)
        } else {
            Ok(BTreeMap::new())
        }
    }

    /// Makes an empty addresses file if there is none, so that everybody who watches it has something to read.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn make_addresses(&self) -> Result<(), LayoutError> {
        let path = self.file("addresses.json");
        if path.exists() {
            return Ok(());
        }
        write_json(&path, &BTreeMap::<DiskId, String>::new())
    }

    /// The plan and the first map, made at the first start and read back at every later one. The map is written before
    /// the plan, so that a plan always has a map; without a plan, whatever else lies there is made anew.
    ///
    /// # Errors
    /// Options that cannot be, or that differ from those of the first start.
    pub fn plan(&self, shape: &Shape) -> Result<(Plan, ClusterMap), LayoutError> {
        if let Some(plan) = self.read_plan()? {
            shape.check(&plan)?;
            return Ok((plan, self.read_map()?));
        }
        let (plan, map) = shape.first()?;
        write_json(&self.file("map.json"), &map)?;
        self.write_plan(&plan)?;
        Ok((plan, map))
    }
}

impl Shape {
    fn check(&self, plan: &Plan) -> Result<(), LayoutError> {
        let fixed = |option, given: &str, was: &str| LayoutError::Option {
            option,
            why: format!("this directory was made with {was}, not {given}; leave the option out, or use another --dir"),
        };
        match (self.disks, &self.scheme, self.shards) {
            (Some(disks), _, _) if usize::from(disks) != plan.disks.len() => {
                Err(fixed("--disks", &disks.to_string(), &plan.disks.len().to_string()))
            }
            (_, Some(scheme), _) if *scheme != plan.scheme => Err(fixed("--scheme", scheme, &plan.scheme)),
            (_, _, Some(shards)) if shards != plan.shards => {
                Err(fixed("--shards", &shards.to_string(), &plan.shards.to_string()))
            }
            _ => Ok(()),
        }
    }

    fn first(&self) -> Result<(Plan, ClusterMap), LayoutError> {
        let bad = |option, why: String| LayoutError::Option { option, why };
        let count = self.disks.unwrap_or(DEFAULT_DISKS);
        let shards = self.shards.unwrap_or(DEFAULT_SHARDS);
        if count == 0 || count > MAX_DISKS {
            return Err(bad("--disks", format!("must be 1 to {MAX_DISKS}, it is {count}")));
        }
        if shards == 0 || shards > MAX_SHARDS {
            return Err(bad("--shards", format!("must be 1 to {MAX_SHARDS}, it is {shards}")));
        }
        let parts: KPlusM =
            self.scheme.as_deref().unwrap_or("4+2").parse().map_err(|error| bad("--scheme", format!("{error}")))?;
        let scheme =
            Scheme::new(parts.k, parts.m, FailureDomain::Disk).map_err(|error| bad("--scheme", error.to_string()))?;
        if usize::from(count) < scheme.width() {
            let why = format!("scheme {scheme} needs at least {} disks, {count} were asked for", scheme.width());
            return Err(bad("--disks", why));
        }
        let servers = self.servers.unwrap_or(1);
        if servers == 0 || servers > count {
            return Err(bad("--servers", format!("must be 1 to the number of disks, it is {servers}")));
        }
        let server = |at: usize| match (servers, at % usize::from(servers) + 1) {
            (1, _) => "localhost".to_owned(),
            (_, number) => format!("server-{number}"),
        };
        let replicas = default_replicas(parts.m, count.into());
        let addresses = free_addresses(count.into())
            .map_err(|error| bad("--disks", format!("no free port on 127.0.0.1: {error}")))?;
        let disk = |at: usize, address: &String| -> Result<NewDisk, LayoutError> {
            Ok(NewDisk {
                uuid: DiskUuid(random16()?),
                address: address.clone(),
                location: Location { zone: "local".into(), rack: "local".into(), server: server(at) },
                weight: 100,
                roles: Roles { storage: true, metadata: at < replicas },
            })
        };
        let disks =
            addresses.iter().enumerate().map(|(at, address)| disk(at, address)).collect::<Result<Vec<_>, _>>()?;
        let cluster_id = ClusterId(random16()?);
        let map = new_map(NewCluster {
            cluster_id,
            disks,
            scheme_name: scheme.to_string(),
            scheme,
            object_shards: shards,
            replicas: Some(replicas),
            groups_per_disk: DEFAULT_GROUPS_PER_DISK,
        })?;
        let slot = |(at, map_address)| Slot { name: format!("disk-{}", at + 1), map_address };
        let disks = addresses.into_iter().enumerate().map(slot).collect();
        Ok((
            Plan {
                version: DATA_VERSION,
                made_by: env!("CARGO_PKG_VERSION").to_owned(),
                cluster_id,
                scheme: scheme.to_string(),
                shards,
                disks,
                formatted: false,
                formed: false,
            },
            map,
        ))
    }
}

/// ` (process N)` by a lock that is held; empty when it does not say.
pub(super) fn holder(lock: &Path) -> String {
    let text = fs::read_to_string(lock).unwrap_or_default();
    text.trim().parse::<u32>().map_or(String::new(), |pid| format!(" (process {pid})"))
}

/// Format and maker of the data by `dev.json`, whatever else that holds; None when it is not there.
///
/// # Errors
/// It is there, but is no `dev.json` of any version.
pub(super) fn version_of(path: &Path) -> Result<Option<(u64, String)>, LayoutError> {
    if !path.exists() {
        return Ok(None);
    }
    let plan: serde_json::Value = read_json(path)?;
    let version = plan.get("version").and_then(serde_json::Value::as_u64);
    let version =
        version.ok_or_else(|| LayoutError::Bad { path: path.to_owned(), why: "names no version".to_owned() })?;
    // Format 1 did not name its maker; there was only one.
    let maker = plan.get("made_by").and_then(serde_json::Value::as_str).unwrap_or("0.1.0");
    Ok(Some((version, maker.chars().filter(|char| !char.is_control()).take(40).collect())))
}

/// The disk in service whose address in the map is that.
pub fn disk_at<'a>(map: &'a ClusterMap, map_address: &str) -> Option<&'a Disk> {
    map.disks.values().find(|disk| disk.state != DiskState::Out && disk.address == map_address)
}

/// A map from a JSON file, checked.
///
/// # Errors
/// It cannot be read or is no valid map.
pub fn read_map(path: &Path) -> Result<ClusterMap, LayoutError> {
    use std::io::Read;
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_MAP_BYTES).read_to_end(&mut text));
    read.map_err(|error| SettingsError::file(path, error))?;
    let bad = |why: String| LayoutError::Bad { path: path.to_owned(), why };
    let map: ClusterMap = serde_json::from_slice(&text).map_err(|error| bad(format!("not a cluster map: {error}")))?;
    map.validate().map_err(|error| bad(error.to_string()))?;
    Ok(map)
}

/// A small JSON file.
///
/// # Errors
/// It cannot be read or does not fit.
pub fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, LayoutError> {
    let text = read_small(path)?;
    serde_json::from_slice(&text).map_err(|error| LayoutError::Bad { path: path.to_owned(), why: error.to_string() })
}

/// Writes JSON atomically, readable for people.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), LayoutError> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|error| LayoutError::Bad { path: path.to_owned(), why: error.to_string() })?;
    text.push(b'\n');
    Ok(write_atomic(path, &text, 0o644)?)
}

/// 16 random bytes.
///
/// # Errors
/// The system gives none.
pub fn random16() -> Result<[u8; 16], LayoutError> {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes).map_err(SettingsError::Random)?;
    Ok(bytes)
}

/// So many addresses on the loopback interface that nobody listens on, all different.
pub fn free_addresses(count: usize) -> io::Result<Vec<String>> {
    // All are held until the last is found, or the system might give one twice.
    let held = (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<io::Result<Vec<_>>>()?;
    held.iter().map(|listener| listener.local_addr().map(|address| address.to_string())).collect()
}

/// Can this address be listened on?
pub fn is_free(address: &str) -> bool {
    address.parse::<SocketAddr>().is_ok_and(|address| TcpListener::bind(address).is_ok())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn the_shape_is_decided_once_and_a_differing_option_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::open(directory.path()).unwrap();
        let (plan, map) =
            layout.plan(&Shape { disks: Some(7), scheme: Some("4+2".into()), shards: Some(3), servers: None }).unwrap();
        assert_eq!((plan.disks.len(), map.disks.len(), map.shards.len()), (7, 7, 4));
        assert_eq!(map.disks.values().filter(|disk| disk.roles.metadata).count(), 5);
        assert!(map.shards.iter().all(|shard| shard.members.len() == 5));
        let (again, same) = layout.plan(&Shape::default()).unwrap();
        assert_eq!((again, same), (plan, map));
        for (shape, option) in [
            (Shape { disks: Some(6), ..Shape::default() }, "--disks"),
            (Shape { scheme: Some("2+1".into()), ..Shape::default() }, "--scheme"),
            (Shape { shards: Some(16), ..Shape::default() }, "--shards"),
        ] {
            let error = layout.plan(&shape).unwrap_err().to_string();
            assert!(error.starts_with(option) && error.contains("was made with"), "{error}");
        }
    }

    #[test]
    fn impossible_shapes_are_refused_with_the_option_and_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::open(directory.path()).unwrap();
        for (disks, scheme, shards, option) in [
            (Some(5), None, None, "--disks"),
            (Some(0), None, None, "--disks"),
            (None, Some("4"), None, "--scheme"),
            (None, Some("0+2"), None, "--scheme"),
            (None, None, Some(0), "--shards"),
        ] {
            let error = layout
                .plan(&Shape { disks, scheme: scheme.map(str::to_owned), shards, servers: None })
                .unwrap_err()
                .to_string();
            assert!(error.starts_with(option), "{error}");
        }
        assert!(layout.read_plan().unwrap().is_none());
    }

    #[test]
    fn a_second_start_on_the_same_directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::open(directory.path()).unwrap();
        let held = layout.lock().unwrap();
        let error = layout.lock().unwrap_err().to_string();
        assert!(error.contains("another granary dev") && error.contains(&std::process::id().to_string()), "{error}");
        drop(held);
        layout.lock().unwrap();
    }
}
