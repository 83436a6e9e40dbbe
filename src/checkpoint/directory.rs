//! Replacing a directory as a whole.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::error::CheckpointError;
use crate::file;

/// Makes `target` the directory that `write` fills, in one step once it is complete. Files of the
/// old directory stay, except those whose names are `replaced`.
///
/// `write` is given a directory beside the target, so that both are on one file system.
pub(super) fn replace<E: From<CheckpointError>>(
    target: &Path,
    replaced: impl Fn(&str) -> bool,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let [parent, target, partial] = begin(target)?;
    let result = write(&partial).and_then(|()| {
        let done = commit(&parent, &target, &partial, replaced);
        Ok(done.map_err(failed(&target))?)
    });
    if result.is_err() {
        // The error before it says more.
        let _ = remove(&partial);
    }
    result
}

/// Whether a directory can be put in a place, for work whose result is to be saved there: what would be
/// wrong at its end is wrong before it begins.
///
/// Makes the directories above it, and tries one beside it that is gone again. That there is room enough is
/// not looked at, nor does anybody keep the place.
///
/// # Errors
/// [`CheckpointError::Write`]: the place is a file, or where another file system begins, or not to be written
/// to.
pub fn check_destination(directory: impl AsRef<Path>) -> Result<(), CheckpointError> {
    let [_, _, partial] = begin(directory.as_ref())?;
    fs::remove_dir(&partial).map_err(failed(&partial))
}

/// The directory that `target` is in, the target without links, and a new directory beside it.
fn begin(target: &Path) -> Result<[PathBuf; 3], CheckpointError> {
    let (parent, target) = place(target).map_err(failed(target))?;
    let partial = beside(&parent, &target, "saving");
    // What a save that was killed has left.
    remove(&partial).map_err(failed(&partial))?;
    fs::create_dir(&partial).map_err(failed(&partial))?;
    Ok([parent, target, partial])
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Write { path, source }
}

/// The directory that `target` is in, made if need be, and the target without links.
fn place(target: &Path) -> io::Result<(PathBuf, PathBuf)> {
    let not_a_place = || io::Error::new(ErrorKind::InvalidInput, "not the name of a directory");
    if target.exists() {
        let target = target.canonicalize()?;
        if !target.is_dir() {
            return Err(io::Error::new(ErrorKind::NotADirectory, "not a directory"));
        }
        let parent = target.parent().ok_or_else(not_a_place)?.to_owned();
        if is_mounted(&target, &parent)? {
            let kind = ErrorKind::CrossesDevices;
            return Err(io::Error::new(
                kind,
                "another file system begins there, expected a directory in it",
            ));
        }
        return Ok((parent, target));
    }
    let name = target.file_name().ok_or_else(not_a_place)?;
    let parent = match target.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent)?;
    let parent = parent.canonicalize()?;
    let target = parent.join(name);
    Ok((parent, target))
}

/// Whether a directory and the one it is in are on two file systems, so that no other can take its place.
fn is_mounted(directory: &Path, parent: &Path) -> io::Result<bool> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        Ok(fs::metadata(directory)?.dev() != fs::metadata(parent)?.dev())
    }
    #[cfg(not(unix))]
    {
        let _ = (directory, parent);
        Ok(false)
    }
}

fn beside(parent: &Path, target: &Path, role: &str) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    parent.join(format!(".{name}.{role}"))
}

fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn commit(
    parent: &Path,
    target: &Path,
    partial: &Path,
    replaced: impl Fn(&str) -> bool,
) -> io::Result<()> {
    let exists = target.exists();
    if exists {
        for entry in fs::read_dir(target)? {
            let entry = entry?;
            if !entry.file_name().to_str().is_some_and(&replaced) {
                link(&entry.path(), &partial.join(entry.file_name()))?;
            }
        }
    }
    file::sync_directory(partial)?;
    if exists {
        fs::set_permissions(partial, fs::metadata(target)?.permissions())?;
        exchange(parent, target, partial)?;
        remove(partial)?;
    } else {
        fs::rename(partial, target)?;
    }
    file::sync_directory(parent)
}

/// The same file under another name; directories are made again.
fn link(from: &Path, to: &Path) -> io::Result<()> {
    if fs::symlink_metadata(from)?.is_dir() {
        fs::create_dir(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            link(&entry.path(), &to.join(entry.file_name()))?;
        }
        return fs::set_permissions(to, fs::metadata(from)?.permissions());
    }
    // Not every file system has links.
    fs::hard_link(from, to).or_else(|_| fs::copy(from, to).map(|_| ()))
}

/// Afterwards `target` is what `partial` was, and the reverse if both exist still.
fn exchange(parent: &Path, target: &Path, partial: &Path) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, partial, CWD, target, RenameFlags::EXCHANGE) {
            Ok(()) => return Ok(()),
            // The file system does not know how.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let old = beside(parent, target, "old");
    remove(&old)?;
    fs::rename(target, &old)?;
    if let Err(error) = fs::rename(partial, target) {
        fs::rename(&old, target)?;
        return Err(error);
    }
    remove(&old)
}
