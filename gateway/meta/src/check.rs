//! What a command must look like before the state is asked at all. Pure: the same answer on every replica, for ever.
//!
//! A rule here is part of the replicated history: changing one makes replicas of two builds disagree. A new rule needs
//! a new command.

use crate::level::{AWAY_LEVEL, MAX_FEATURE_LEVEL};
use crate::record::{ExtentRef, ObjectData};
use crate::{ChunkRef, Command};
use granary_placement::id::ExtentId;
use granary_placement::lease::LeaseStamp;
use granary_placement::map::ClusterMap;
use std::collections::BTreeSet;

/// Longest key, in bytes; S3's limit.
pub const MAX_KEY_BYTES: usize = 1024;
/// Longest payload in a record, in bytes. The gateway's own limit is lower.
pub const MAX_INLINE_BYTES: usize = 256 * 1024;
/// Most parts of an upload.
pub const MAX_PART_NUMBER: u16 = 10_000;

/// A key that can be stored: not empty, not too long, without NUL (which separates the parts of database keys).
///
/// # Errors
/// What is wrong with it.
pub fn check_key(key: &str) -> Result<(), String> {
    if key.is_empty() || key.len() > MAX_KEY_BYTES {
        return Err(format!("key of {} bytes", key.len()));
    }
    if key.as_bytes().contains(&0) {
        return Err("key with a NUL byte".to_owned());
    }
    Ok(())
}

/// Longest value of a cluster setting, in bytes.
pub const MAX_SETTING_VALUE_BYTES: usize = 256;
/// Longest name of a cluster setting, in bytes.
pub const MAX_SETTING_NAME_BYTES: usize = 64;

/// The form of a cluster setting. Whether there is such a setting is for the sender to check: see
/// [`crate::Command::SetSetting`].
///
/// # Errors
/// What is wrong with it.
pub fn check_setting(name: &str, value: Option<&str>) -> Result<(), String> {
    let fits = |byte: &u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.');
    if name.is_empty() || name.len() > MAX_SETTING_NAME_BYTES || !name.as_bytes().iter().all(fits) {
        return Err("not the name of a setting".to_owned());
    }
    match value {
        Some(value) if value.len() > MAX_SETTING_VALUE_BYTES => Err(format!("a setting of {} bytes", value.len())),
        _ => Ok(()),
    }
}

/// A feature level that this build knows, and nothing that a build of the shard's `level` could not read. For the
/// leader's host, before a command enters the log: there it could no longer be refused by some replicas and applied by
/// others.
///
/// # Errors
/// What is wrong with it.
pub fn check_level(command: &Command, level: u32) -> Result<(), String> {
    match command {
        Command::SetMap { map } => check_map(map, level),
        Command::SetFeatureLevel { level } if *level > MAX_FEATURE_LEVEL => {
            Err(format!("feature level {level} is not known to this build, which knows {MAX_FEATURE_LEVEL}"))
        }
        _ => Ok(()),
    }
}

/// A map that builds of a feature level can read.
///
/// # Errors
/// What is wrong with it.
pub fn check_map(map: &ClusterMap, level: u32) -> Result<(), String> {
    if level < AWAY_LEVEL && map.has_away() {
        return Err(format!(
            "disks can go out of service by themselves from feature level {AWAY_LEVEL} on, and the root shard has {level}: once \
             all disk nodes and gateways run this release, `granary cluster feature-level --raise`"
        ));
    }
    Ok(())
}

/// The name of a background task.
///
/// # Errors
/// What is wrong with it.
pub fn check_task(task: &str) -> Result<(), String> {
    if LeaseStamp::is_task(task) {
        Ok(())
    } else {
        Err("not the name of a task".to_owned())
    }
}

fn check_extent(extent: &ExtentRef) -> Result<(), String> {
    let width = usize::from(extent.k) + usize::from(extent.m);
    let id = extent.extent;
    if extent.k == 0 || extent.m == 0 {
        return Err(format!("extent {id}: {}+{} survives nothing", extent.k, extent.m));
    }
    if extent.slots.len() != width {
        return Err(format!("extent {id}: {} slots for {width} chunks", extent.slots.len()));
    }
    if extent.slots.iter().collect::<BTreeSet<_>>().len() != width {
        return Err(format!("extent {id}: two chunks in one slot"));
    }
    if extent.len_bytes == 0 || extent.unit_bytes == 0 {
        return Err(format!("extent {id}: empty"));
    }
    Ok(())
}

/// A payload that agrees with its size and its checksum, whose every extent has at least K+1 chunks: data that was
/// acknowledged must survive one more failure.
///
/// # Errors
/// What is wrong with it.
pub fn check_data(data: &ObjectData, size_bytes: u64, missing: &[ChunkRef]) -> Result<(), String> {
    let mut ids: BTreeSet<ExtentId> = BTreeSet::new();
    match data {
        ObjectData::Inline { bytes, crc32 } => {
            if bytes.len() as u64 != size_bytes || bytes.len() > MAX_INLINE_BYTES {
                return Err(format!("{} inline bytes for a size of {size_bytes}", bytes.len()));
            }
            if crc32fast::hash(bytes) != *crc32 {
                return Err("inline bytes do not agree with their checksum".to_owned());
            }
        }
        ObjectData::Extents(extents) => {
            let mut sum = 0u64;
            for extent in extents {
                check_extent(extent)?;
                if !ids.insert(extent.extent) {
                    return Err(format!("extent {} named twice", extent.extent));
                }
                sum = sum.saturating_add(extent.len_bytes);
            }
            if sum != size_bytes {
                return Err(format!("extents of {sum} bytes for a size of {size_bytes}"));
            }
        }
    }
    check_missing(data.extents(), missing)
}

fn check_missing(extents: &[ExtentRef], missing: &[ChunkRef]) -> Result<(), String> {
    let distinct: BTreeSet<ChunkRef> = missing.iter().copied().collect();
    let mut named = 0;
    for extent in extents {
        let of_extent = distinct.iter().filter(|chunk| chunk.extent == extent.extent && chunk.group == extent.group);
        let mut lost = 0usize;
        for chunk in of_extent {
            if usize::from(chunk.index) >= extent.slots.len() {
                return Err(format!("extent {} has no chunk {}", extent.extent, chunk.index));
            }
            lost += 1;
        }
        if lost >= usize::from(extent.m) {
            return Err(format!(
                "extent {}: {lost} of {} chunks missing leaves no spare",
                extent.extent,
                extent.slots.len()
            ));
        }
        named += lost;
    }
    if named != distinct.len() {
        return Err("a missing chunk of another extent".to_owned());
    }
    Ok(())
}
