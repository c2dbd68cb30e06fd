//! Clusters for the durability tests.
#![allow(dead_code, clippy::unwrap_used)]

use granary_placement::durability::{Cluster, Failures, Latent, Layout, Metadata, Repair};
use granary_placement::scheme::{FailureDomain, Scheme};

pub fn scheme(k: u8, m: u8) -> Scheme {
    Scheme::new(k, m, FailureDomain::Server).unwrap()
}

/// Ordinary figures, without server failures and latent errors.
pub fn cluster(scheme: Scheme, layout: Layout) -> Cluster {
    Cluster {
        scheme,
        layout,
        failures: Failures {
            disk_afr: 0.014,
            server_losses_per_year: 0.0,
            server_outages_per_year: 0.0,
            server_return_hours: 1.0,
        },
        repair: Repair { grace_hours: 1.0 / 6.0, disk_hours: 10.0, slot_hours: 1.0, server_hours: 100.0 },
        latent: Latent { errors_per_disk_year: 0.0, scrub_hours: 336.0, extents_per_group: 1000.0 },
        metadata: Metadata { shards: 17, voters: 5, disks: 1000, repair_hours: 1.0, operator_hours: 24.0 },
    }
}
