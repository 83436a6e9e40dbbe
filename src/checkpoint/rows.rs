//! A matrix written to a safetensors file row by row.

use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::error::CheckpointError;
use super::save::header;
use crate::file::Replacement;
use crate::parameters::TensorSpec;

/// Writes one f32 tensor `[rows, width]` to a safetensors file, without holding it: logits of a long
/// text. The file appears when it is [finished](Self::finish); of a writer that is dropped before,
/// nothing is left.
#[derive(Debug)]
pub struct RowWriter {
    path: PathBuf,
    file: Replacement,
    /// Numbers still to come.
    left: usize,
    elements: usize,
}

impl RowWriter {
    /// Starts the tensor `name`.
    ///
    /// # Errors
    /// [`CheckpointError::Write`].
    pub fn create(
        path: impl AsRef<Path>,
        name: &str,
        [rows, width]: [usize; 2],
    ) -> Result<Self, CheckpointError> {
        let path = path.as_ref().to_owned();
        let spec = TensorSpec {
            name: name.to_owned(),
            shape: vec![rows, width],
        };
        let elements = spec.elements();
        let start = || {
            let mut file = Replacement::create(&path)?;
            file.write_all(&header(&[(spec, Dtype::F32)]))?;
            Ok(file)
        };
        match start() {
            Ok(file) => Ok(Self {
                path,
                file,
                left: elements,
                elements,
            }),
            Err(source) => Err(CheckpointError::Write { path, source }),
        }
    }

    /// Appends any number of rows.
    ///
    /// # Errors
    /// [`CheckpointError::Write`]; [`CheckpointError::Rows`] for more numbers than announced.
    pub fn write(&mut self, numbers: &[f32]) -> Result<(), CheckpointError> {
        let Some(left) = self.left.checked_sub(numbers.len()) else {
            return Err(self.rows(self.elements - self.left + numbers.len()));
        };
        for number in numbers {
            let written = self.file.write_all(&number.to_le_bytes());
            written.map_err(|source| CheckpointError::Write {
                path: self.path.clone(),
                source,
            })?;
        }
        self.left = left;
        Ok(())
    }

    /// Ends the file and gives it its name.
    ///
    /// # Errors
    /// [`CheckpointError::Write`]; [`CheckpointError::Rows`] for fewer numbers than announced.
    pub fn finish(self) -> Result<(), CheckpointError> {
        if self.left > 0 {
            return Err(self.rows(self.elements - self.left));
        }
        self.file.finish().map_err(|source| CheckpointError::Write {
            path: self.path,
            source,
        })
    }

    fn rows(&self, found: usize) -> CheckpointError {
        CheckpointError::Rows {
            path: self.path.clone(),
            found,
            expected: self.elements,
        }
    }
}
