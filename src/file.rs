//! Files that are either the old or the new one, whenever the process dies or the power fails.

use std::fs::{self, File};
#[cfg(feature = "train")]
use std::fs::{OpenOptions, TryLockError};
use std::io::{self, BufWriter, IntoInnerError, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile};

/// A file that takes the place of the one at its path once it is [finished](Self::finish). Until
/// then it has a name of its own beside it; dropped unfinished, it is gone.
#[derive(Debug)]
pub(crate) struct Replacement {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
}

impl Replacement {
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            file: BufWriter::new(partial(path)?),
        })
    }

    /// Gives the file its name, when its content is on the disk.
    pub fn finish(self) -> io::Result<()> {
        let file = self.file.into_inner().map_err(IntoInnerError::into_error)?;
        file.as_file().sync_all()?;
        file.persist(&self.path)?;
        sync_directory(directory_of(&self.path))
    }
}

impl Write for Replacement {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Replaces a file by these bytes.
pub(crate) fn write(path: &Path, bytes: impl AsRef<[u8]>) -> io::Result<()> {
    let mut file = Replacement::create(path)?;
    file.write_all(bytes.as_ref())?;
    file.finish()
}

/// Replaces a file through a writer that opens files itself, at the name it is given.
#[cfg(feature = "train")]
pub(crate) fn write_by_name(
    path: &Path,
    write: impl FnOnce(&Path) -> io::Result<()>,
) -> io::Result<()> {
    let partial = partial(path)?.into_temp_path();
    write(&partial)?;
    // The writer may have made the file anew.
    let written = OpenOptions::new().write(true).open(&partial)?;
    written.sync_all()?;
    drop(written);
    partial.persist(path)?;
    sync_directory(directory_of(path))
}

/// The file by which a directory is locked. It stays: who deletes it may delete the next one's.
#[cfg(feature = "train")]
pub(crate) const LOCK: &str = "writer.lock";

/// Makes the caller the only one that writes to a directory, among those that ask: until the file is
/// dropped or its process dies.
#[cfg(feature = "train")]
pub(crate) fn lock(directory: &Path) -> Result<File, TryLockError> {
    let mut options = OpenOptions::new();
    let options = options.create(true).truncate(false).write(true);
    let file = options.open(directory.join(LOCK));
    let file = file.map_err(TryLockError::Error)?;
    match file.try_lock() {
        // Some file systems have no locks, and say so in more ways than one.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
        taken => taken.map(|()| file),
    }
}

/// Makes what was renamed in a directory outlast a loss of power, where directories can be synced.
pub(crate) fn sync_directory(directory: &Path) -> io::Result<()> {
    match cfg!(unix) {
        true => File::open(directory)?.sync_all(),
        false => Ok(()),
    }
}

/// What names begin with of files that are not yet, or were never, finished.
fn partial_prefix(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    format!(".{name}.partial-")
}

/// Whether a file beside `path` is what a process that was killed has left of it.
#[cfg(feature = "train")]
pub(crate) fn is_partial(name: &std::ffi::OsStr, path: &Path) -> bool {
    name.to_string_lossy().starts_with(&partial_prefix(path))
}

/// A file beside `path` with its extension, by which some writers choose a format, and hidden from
/// those who read the directory. What a process that was killed has left of the same file is
/// deleted.
fn partial(path: &Path) -> io::Result<NamedTempFile> {
    let directory = directory_of(path);
    let prefix = partial_prefix(path);
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            fs::remove_file(entry.path())?;
        }
    }
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    let suffix = match &*extension {
        "" => String::new(),
        extension => format!(".{extension}"),
    };
    let mut builder = Builder::new();
    builder.prefix(&prefix).suffix(&suffix);
    // Temporary files are their owner's alone; this one is to be a file like others.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(directory)
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::tempdir;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_the_old_one_until_the_new_one_is_finished() {
        let directory = tempdir().unwrap();
        let path = directory.path().join("file.json");
        write(&path, "old").unwrap();
        let mut file = Replacement::create(&path).unwrap();
        file.write_all(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(directory.path()), ["file.json"]);

        let mut file = Replacement::create(&path).unwrap();
        file.write_all(b"new").unwrap();
        file.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(directory.path()), ["file.json"]);
    }

    #[cfg(feature = "train")]
    #[test]
    fn writers_by_name_leave_nothing_when_they_fail() {
        let directory = tempdir().unwrap();
        let path = directory.path().join("file.mpk");
        for made_anew in [false, true] {
            let write = |bytes: &[u8], result| {
                write_by_name(&path, |partial| {
                    assert_eq!(partial.extension(), path.extension());
                    if made_anew {
                        fs::remove_file(partial)?;
                    }
                    fs::write(partial, bytes)?;
                    result
                })
            };
            write(b"whole", Ok(())).unwrap();
            write(b"half", Err(io::Error::other("full"))).unwrap_err();
            assert_eq!(fs::read(&path).unwrap(), b"whole");
            assert_eq!(names(directory.path()), ["file.mpk"]);
        }
    }

    #[test]
    fn what_a_killed_process_left_of_a_file_is_deleted_with_the_next() {
        let directory = tempdir().unwrap();
        for name in ["model-1.mpk", "model-10.mpk"] {
            fs::write(directory.path().join(format!(".{name}.partial-ab.mpk")), "").unwrap();
        }
        write(&directory.path().join("model-1.mpk"), "").unwrap();
        let left = [".model-10.mpk.partial-ab.mpk", "model-1.mpk"];
        assert_eq!(names(directory.path()), left);
    }

    #[cfg(unix)]
    #[test]
    fn new_files_have_the_permissions_of_others() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempdir().unwrap();
        let [plain, written] = ["plain", "written"].map(|name| directory.path().join(name));
        fs::write(&plain, "").unwrap();
        write(&written, "").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&written), mode(&plain));
    }
}
