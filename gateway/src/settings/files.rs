//! Small files: read whole, written so that a crash leaves the old or the new.

use super::SettingsError;
use std::io;
use std::path::Path;

/// A file longer than this is not one of ours.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// A small file whole.
///
/// # Errors
/// It cannot be read, or is longer than settings are.
pub fn read_small(path: &Path) -> Result<Vec<u8>, SettingsError> {
    use std::io::Read;
    let file = std::fs::File::open(path).map_err(|error| SettingsError::file(path, error))?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| SettingsError::file(path, error))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(SettingsError::invalid(path.display().to_string(), format!("longer than {MAX_FILE_BYTES} bytes")));
    }
    Ok(bytes)
}

/// Writes a file so that a crash leaves the old or the new content, never a part: a new file, synced, renamed over the
/// old one, and the directory synced. `mode` is the new file's permission bits from its first moment on.
///
/// # Errors
/// [`SettingsError::File`].
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<(), SettingsError> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let failed = |error| SettingsError::file(path, error);
    let directory =
        path.parent().ok_or_else(|| SettingsError::invalid(path.display().to_string(), "has no directory"))?;
    // The parent of a bare file name is the empty path, which cannot be opened.
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = directory.join(name);
    // A leftover of a crash may have other permissions: the mode of `open` counts only for a file it makes.
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    std::fs::rename(&temporary, path).map_err(failed)?;
    std::fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_bare_file_name_is_written_into_the_working_directory() {
        let name = format!("granary-bare-name-{}", std::process::id());
        write_atomic(Path::new(&name), b"here", 0o600).unwrap();
        let read = std::fs::read(&name);
        std::fs::remove_file(&name).unwrap();
        assert_eq!(read.unwrap(), b"here");
    }

    #[test]
    fn a_leftover_of_a_crashed_write_does_not_lend_its_permissions() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        std::fs::write(directory.path().join("token.new"), "left over").unwrap();
        write_atomic(&path, b"new", 0o600).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
