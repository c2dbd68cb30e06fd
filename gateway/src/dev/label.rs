//! Reads the label of a disk directory: enough to know whose it is. The format is the disk node's
//! (docs/formats/chunk-store.md).

use super::ready::Label;
use granary_placement::id::{ClusterId, DiskId, DiskUuid};
use serde::Deserialize;
use std::io::ErrorKind;
use std::path::Path;

/// Name of the label in a disk's directory.
const LABEL_FILE: &str = "label.json";

/// Version of the labels that this build knows.
const LABEL_VERSION: u64 = 1;

#[derive(Deserialize)]
struct LabelJson {
    cluster: ClusterId,
    disk: DiskId,
    uuid: DiskUuid,
}

/// The label; None when the directory or the label is not there.
///
/// # Errors
/// There is one that cannot be read; the text goes on from the directory's name.
pub fn read(dir: &Path) -> Result<Option<Label>, String> {
    let path = dir.join(LABEL_FILE);
    match std::fs::metadata(&path) {
        Ok(_) => {}
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(error) => return Err(format!("cannot be read: {error}")),
    }
    let text =
        crate::settings::read_small(&path).map_err(|error| format!("has a label that cannot be read: {error}"))?;
    let nonsense = |error: serde_json::Error| format!("has a label that makes no sense: {error}");
    let label: serde_json::Value = serde_json::from_slice(&text).map_err(nonsense)?;
    match label.get("version").and_then(serde_json::Value::as_u64) {
        Some(LABEL_VERSION) => {}
        Some(other) => return Err(format!("is a disk of format {other}; this granary knows {LABEL_VERSION}")),
        None => return Err("has a label that names no version".to_owned()),
    }
    let label: LabelJson = serde_json::from_value(label).map_err(nonsense)?;
    Ok(Some(Label { cluster: label.cluster, disk: label.disk, uuid: label.uuid }))
}
