//! The weights of a directory: one safetensors file, or shards and their index.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype;

use super::error::CheckpointError;
use super::read::Rows;
use super::safetensors::{Place, SafetensorsFile, weight_dtype};
use super::stored::{FloatRows, Int8Rows};
use super::tensors::{FileTensor, TensorFiles};
use super::{INDEX, WEIGHTS, keys};
use crate::kernels::packed::GROUP;
use crate::parameters::{EMBEDDING, HEAD, TensorSpec};

/// All files of weights of a directory, open.
#[derive(Debug)]
pub(super) struct Weights {
    /// The file, or the index of several.
    path: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Which file a tensor is in.
    tensors: BTreeMap<String, usize>,
}

impl Weights {
    /// Opens `model.safetensors` or else the shards of `model.safetensors.index.json`.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        let single = directory.join(WEIGHTS);
        if single.is_file() {
            let file = SafetensorsFile::open(&single)?;
            let tensors = file.tensors().keys().map(|name| (name.clone(), 0));
            return Ok(Self {
                path: single,
                tensors: tensors.collect(),
                files: vec![file],
            });
        }
        let index = directory.join(INDEX);
        if !index.is_file() {
            return Err(CheckpointError::MissingFile {
                directory: directory.to_owned(),
                file: "model.safetensors, nor a model.safetensors.index.json",
            });
        }
        Self::open_shards(directory, index)
    }

    fn open_shards(directory: &Path, index: PathBuf) -> Result<Self, CheckpointError> {
        let json = keys::read_object(&index)?;
        let setting = |key: &str, found: String, expected: &str| CheckpointError::Setting {
            path: index.clone(),
            key: key.to_owned(),
            found,
            expected: expected.to_owned(),
        };
        let map = json.get("weight_map").ok_or_else(|| {
            setting(
                "weight_map",
                "missing".into(),
                "an object of tensors and files",
            )
        })?;
        let map = map.as_object().ok_or_else(|| {
            setting(
                "weight_map",
                keys::shown(map),
                "an object of tensors and files",
            )
        })?;
        let mut shards: BTreeMap<&str, usize> = BTreeMap::new();
        let mut files = Vec::new();
        let mut tensors = BTreeMap::new();
        for (tensor, shard) in map {
            let shard = shard.as_str().ok_or_else(|| {
                let key = format!("weight_map.{tensor}");
                setting(&key, keys::shown(shard), "the name of a file")
            })?;
            let file = match shards.entry(shard) {
                Entry::Occupied(entry) => *entry.get(),
                Entry::Vacant(entry) => {
                    let path = directory.join(shard);
                    // A name, not a path to somewhere else.
                    let mut parts = Path::new(shard).components();
                    let is_name = matches!(
                        (parts.next(), parts.next()),
                        (Some(Component::Normal(_)), None)
                    );
                    if !is_name || !path.is_file() {
                        return Err(CheckpointError::Shard {
                            path: index,
                            tensor: tensor.clone(),
                            shard: shard.to_owned(),
                            reason: "is no file in the directory",
                        });
                    }
                    files.push(SafetensorsFile::open(&path)?);
                    *entry.insert(files.len() - 1)
                }
            };
            if !files[file].tensors().contains_key(tensor) {
                return Err(CheckpointError::Shard {
                    path: index,
                    tensor: tensor.clone(),
                    shard: shard.to_owned(),
                    reason: "does not have it",
                });
            }
            tensors.insert(tensor.clone(), file);
        }
        for (number, file) in files.iter().enumerate() {
            for tensor in file.tensors().keys() {
                if tensors.get(tensor) != Some(&number) {
                    return Err(CheckpointError::UnexpectedTensor {
                        path: file.path().to_owned(),
                        tensor: tensor.clone(),
                        reason: "the index does not place there",
                    });
                }
            }
        }
        Ok(Self {
            path: index,
            files,
            tensors,
        })
    }

    /// Number of tensors in all files.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    pub fn contains(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    /// Has the files be without some tensors.
    pub fn forget(&mut self, unread: impl Fn(&str) -> bool) {
        self.tensors.retain(|tensor, _| !unread(tensor));
    }

    fn find(&self, spec: &TensorSpec) -> Result<(usize, Place), CheckpointError> {
        let found = self.tensors.get(&spec.name).and_then(|&file| {
            let place = self.files[file].tensors().get(&spec.name)?;
            Some((file, place.clone()))
        });
        found.ok_or_else(|| self.missing(spec))
    }

    /// Whether a tensor is there as 8-bit codes and scales, and not as floats.
    fn is_int8(&self, tensor: &str) -> bool {
        !self.contains(tensor) && int8_names(tensor).iter().any(|name| self.contains(name))
    }

    /// Whether one tensor is there as the decoder needs it.
    pub fn check(&self, spec: &TensorSpec) -> Result<(), CheckpointError> {
        if !self.is_int8(&spec.name) {
            return self.check_as(spec, None);
        }
        for (spec, dtype) in int8_tensors(spec) {
            self.check_as(&spec, Some(dtype))?;
        }
        Ok(())
    }

    /// Whether a tensor is there, of this type or else of any float type.
    fn check_as(&self, spec: &TensorSpec, dtype: Option<Dtype>) -> Result<(), CheckpointError> {
        let (file, place) = self.find(spec)?;
        let path = self.files[file].path();
        match dtype {
            None => {
                weight_dtype(path, &spec.name, &place)?;
            }
            Some(dtype) if place.dtype != dtype => {
                return Err(CheckpointError::Dtype {
                    path: path.to_owned(),
                    tensor: spec.name.clone(),
                    found: place.dtype.to_string(),
                });
            }
            Some(_) => {}
        }
        if place.shape != spec.shape {
            return Err(CheckpointError::Shape {
                path: path.to_owned(),
                tensor: spec.name.clone(),
                found: place.shape,
                expected: spec.shape.clone(),
            });
        }
        Ok(())
    }

    /// Whether all `expected` tensors are there and no other, except for a head that repeats the
    /// embedding: some tied models on the hub have one.
    pub fn check_all(&mut self, expected: &[FileTensor]) -> Result<(), CheckpointError> {
        for tensor in expected {
            self.check(&tensor.spec)?;
        }
        let known = expected.iter().flat_map(|tensor| {
            let name = &tensor.spec.name;
            match self.is_int8(name) {
                true => int8_names(name).to_vec(),
                false => vec![name.clone()],
            }
        });
        let known: BTreeSet<String> = known.collect();
        let left_over = (self.tensors.iter()).find(|(name, _)| !known.contains(*name));
        let left_over: Option<(String, usize)> = left_over.map(|(n, &file)| (n.clone(), file));
        match left_over {
            None => Ok(()),
            Some((name, file)) if name == HEAD => {
                if self.head_is_embedding()? {
                    self.tensors.remove(HEAD);
                    return self.check_all(expected);
                }
                Err(self.unexpected(name, file, "is not the embedding, with tied embeddings"))
            }
            Some((name, file)) => {
                Err(self.unexpected(name, file, "a decoder of this configuration does not have"))
            }
        }
    }

    fn unexpected(&self, tensor: String, file: usize, reason: &'static str) -> CheckpointError {
        CheckpointError::UnexpectedTensor {
            path: self.files[file].path().to_owned(),
            tensor,
            reason,
        }
    }

    fn head_is_embedding(&self) -> Result<bool, CheckpointError> {
        let (Some(&head), Some(&embedding)) = (self.tensors.get(HEAD), self.tensors.get(EMBEDDING))
        else {
            return Ok(false);
        };
        let place = |file: usize, name| self.files[file].tensors().get(name).cloned();
        let (Some(a), Some(b)) = (place(head, HEAD), place(embedding, EMBEDDING)) else {
            return Ok(false);
        };
        self.files[head].same(&a, &self.files[embedding], &b)
    }
}

impl TensorFiles for Weights {
    fn path(&self) -> &Path {
        &self.path
    }

    fn rows(
        &self,
        tensor: &FileTensor,
        part: usize,
    ) -> Result<Box<dyn Rows + '_>, CheckpointError> {
        let dims = matrix(&tensor.parts[part]);
        let name = tensor.spec.name.clone();
        let find = |spec: &TensorSpec| {
            let (file, place) = self.find(spec)?;
            Ok::<_, CheckpointError>((&self.files[file], part_of(tensor, part, place)))
        };
        if self.is_int8(&name) {
            let [(codes, _), (scales, _)] = int8_tensors(&tensor.spec);
            return Ok(Box::new(Int8Rows {
                codes: find(&codes)?,
                scales: find(&scales)?,
                name,
                dims,
            }));
        }
        let tensor = find(&tensor.spec)?;
        Ok(Box::new(FloatRows {
            dtype: weight_dtype(tensor.0.path(), &name, &tensor.1)?,
            tensor,
            name,
            dims,
        }))
    }
}

fn part_of(tensor: &FileTensor, part: usize, place: Place) -> Place {
    let before = tensor.parts[..part].iter().map(|part| part.shape[0]).sum();
    match &tensor.parts[..] {
        [_] => place,
        parts => place.rows(before, parts[part].shape[0]),
    }
}

/// `[rows, columns]`; a vector's numbers are rows.
fn matrix(spec: &TensorSpec) -> [usize; 2] {
    [spec.shape[0], spec.shape[1..].iter().product()]
}

/// What a matrix's codes and scales are called.
fn int8_names(tensor: &str) -> [String; 2] {
    [format!("{tensor}.q8"), format!("{tensor}.scale")]
}

/// The tensors that a matrix of 8-bit codes is in files: of each output in groups of 32.
pub(super) fn int8_tensors(spec: &TensorSpec) -> [(TensorSpec, Dtype); 2] {
    let [codes, scales] = int8_names(&spec.name);
    let mut groups = spec.shape.clone();
    if let Some(columns) = groups.last_mut() {
        *columns = columns.div_ceil(GROUP);
    }
    let of = |name, shape| TensorSpec { name, shape };
    [
        (of(codes, spec.shape.clone()), Dtype::I8),
        (of(scales, groups), Dtype::F16),
    ]
}
