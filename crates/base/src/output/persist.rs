//! The modes of outputs, and their durability.

use std::fs::File;
use std::path::Path;

/// Gives a temporary file, which is private, the usual mode.
pub(super) fn share(path: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = if path.is_dir() { 0o755 } else { 0o644 };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    }
    // Other systems have no modes.
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

/// Makes a rename in `folder` survive a power cut.
pub(super) fn sync_folder(folder: &Path) -> std::io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// Syncs a folder with all that is in it, and gives each file and folder in it the usual mode.
pub(super) fn sync_tree(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        share(&path)?;
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            // Windows only syncs what is open for writing.
            File::options().read(true).write(cfg!(windows)).open(&path)?.sync_all()?;
        }
    }
    sync_folder(folder)
}
