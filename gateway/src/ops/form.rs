//! The description of a new cluster, as an operator writes it, becomes the cluster's first map. Pure.
//!
//! ```json
//! { "cluster_id": "32 hex digits", "scheme": "4+2", "failure_domain": "server", "shards": 16,
//!   "disks": [ { "uuid": "32 hex digits", "address": "10.0.0.1:7300", "zone": "a", "rack": "1", "server": "s1",
//!                "weight": 1000, "storage": true, "metadata": true } ] }
//! ```

use granary_placement::id::{ClusterId, DiskUuid};
use granary_placement::map::{ClusterMap, Location, Roles};
use granary_placement::place::{new_map, NewCluster, NewDisk, PlaceError, DEFAULT_GROUPS_PER_DISK};
use granary_placement::scheme::{FailureDomain, KPlusM, Scheme, SchemeError};
use serde::Deserialize;

/// A cluster to be formed. Disks get their places in the list as ids, from 1.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterConfig {
    /// Its id.
    pub cluster_id: ClusterId,
    /// K+M.
    pub scheme: String,
    /// What may fail as one.
    pub failure_domain: FailureDomain,
    /// Metadata shards for objects.
    pub shards: u16,
    /// Replicas of each shard; None: 2M+1, at most 5.
    pub replicas: Option<usize>,
    /// The disks.
    pub disks: Vec<DiskConfig>,
}

/// A disk of it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// On its label.
    pub uuid: DiskUuid,
    /// `host:port` of its node.
    pub address: String,
    /// Data centre or availability zone.
    pub zone: String,
    /// Rack in the zone.
    pub rack: String,
    /// Server in the rack.
    pub server: String,
    /// Share of the data.
    pub weight: u32,
    /// Stores chunks.
    #[serde(default = "yes")]
    pub storage: bool,
    /// Holds shard replicas.
    #[serde(default)]
    pub metadata: bool,
}

fn yes() -> bool {
    true
}

/// Why there can be no such cluster.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not K+M, or K or M out of bounds.
    #[error(transparent)]
    Scheme(#[from] SchemeError),
    /// The disks cannot keep it.
    #[error(transparent)]
    Place(#[from] PlaceError),
}

/// The first map of the cluster described.
///
/// # Errors
/// [`ConfigError`].
pub fn first_map(config: ClusterConfig) -> Result<ClusterMap, ConfigError> {
    let parts: KPlusM = config.scheme.parse()?;
    let scheme = Scheme::new(parts.k, parts.m, config.failure_domain)?;
    let disks = config.disks.into_iter().map(|disk| NewDisk {
        uuid: disk.uuid,
        address: disk.address,
        location: Location { zone: disk.zone, rack: disk.rack, server: disk.server },
        weight: disk.weight,
        roles: Roles { storage: disk.storage, metadata: disk.metadata },
    });
    Ok(new_map(NewCluster {
        cluster_id: config.cluster_id,
        disks: disks.collect(),
        scheme_name: scheme.to_string(),
        scheme,
        object_shards: config.shards,
        replicas: config.replicas,
        groups_per_disk: DEFAULT_GROUPS_PER_DISK,
    })?)
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use granary_placement::id::DiskId;

    fn config(disks: u8, scheme: &str, domain: &str) -> String {
        let disk = |number: u8| {
            let uuid = DiskUuid([number; 16]);
            format!(
                r#"{{"uuid":"{uuid}","address":"10.0.0.{number}:7300","zone":"a","rack":"1","server":"s{number}","weight":1000,"metadata":true}}"#
            )
        };
        let disks: Vec<String> = (1..=disks).map(disk).collect();
        let id = ClusterId([7; 16]);
        format!(
            r#"{{"cluster_id":"{id}","scheme":"{scheme}","failure_domain":"{domain}","shards":4,"disks":[{}]}}"#,
            disks.join(",")
        )
    }

    /// A cluster of that many disks, each in a server of its own, 4+2.
    pub(crate) fn cluster(disks: u8) -> ClusterMap {
        first_map(serde_json::from_str(&config(disks, "4+2", "disk")).unwrap()).unwrap()
    }

    #[test]
    fn a_description_becomes_the_first_map_or_a_reason() {
        let map = cluster(6);
        assert_eq!((map.epoch.0, map.disks.len(), map.object_shards()), (1, 6, 4));
        let second = map.disk(DiskId(2)).unwrap();
        assert_eq!((second.uuid, second.address.as_str()), (DiskUuid([2; 16]), "10.0.0.2:7300"));
        assert!(second.roles.storage && second.roles.metadata && second.weight == 1000);
        // (disks, scheme, failure domain, what the reason says)
        for (disks, scheme, domain, why) in [
            (6, "four", "disk", "four"),
            (6, "4+0", "disk", "4+0"),
            (5, "4+2", "disk", "add 1"),
            (6, "4+2", "zone", "zone"),
        ] {
            let refused = first_map(serde_json::from_str(&config(disks, scheme, domain)).unwrap()).unwrap_err();
            assert!(refused.to_string().contains(why), "{disks} {scheme} {domain}: {refused}");
        }
        let misspelt = config(6, "4+2", "disk").replace("weight", "wheight");
        assert!(serde_json::from_str::<ClusterConfig>(&misspelt).is_err());
    }
}
