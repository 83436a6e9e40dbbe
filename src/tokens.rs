//! Batches of token ids whose rows may differ in length.

use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use thiserror::Error;

use crate::holes::Holes;

/// Tokens no decoder can read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TokensError {
    /// A batch without rows.
    #[error("the batch has no rows, expected at least 1")]
    NoRows,
    /// A row without tokens.
    #[error("row {row} has no tokens, expected at least 1")]
    EmptyRow {
        /// The row.
        row: usize,
    },
    /// One padding length per row is needed.
    #[error("{found} padding lengths for {rows} rows")]
    PaddingRows {
        /// Padding lengths given.
        found: usize,
        /// Rows in the batch.
        rows: usize,
    },
    /// A token the vocabulary does not have.
    #[error("token {token} at row {row}, position {position}, expected below {vocab_size}")]
    OutOfVocabulary {
        /// The row.
        row: usize,
        /// Position within the row.
        position: usize,
        /// The token id.
        token: u32,
        /// The vocabulary's size.
        vocab_size: usize,
    },
}

/// Token ids `[batch, seq]`, each row with some padding on its left.
///
/// Padding on the left makes every row end, and continue, in the same column. What ids stand in
/// the padding does not matter. A tensor without padding converts with [`From`].
#[derive(Clone, Debug)]
pub struct TokenBatch<B: Backend> {
    tokens: Tensor<B, 2, Int>,
    padding: Vec<usize>,
}

impl<B: Backend> From<Tensor<B, 2, Int>> for TokenBatch<B> {
    fn from(tokens: Tensor<B, 2, Int>) -> Self {
        let [batch, _] = tokens.dims();
        Self {
            tokens,
            padding: vec![0; batch],
        }
    }
}

impl<B: Backend> TokenBatch<B> {
    /// A batch of rows of any lengths, padded on the left to the longest.
    ///
    /// # Errors
    /// [`TokensError`] if there is no row, a row is empty, or a token is not below `vocab_size`.
    pub fn from_rows(
        rows: &[impl AsRef<[u32]>],
        vocab_size: usize,
        device: &B::Device,
    ) -> Result<Self, TokensError> {
        let seq = rows.iter().map(|row| row.as_ref().len()).max();
        let seq = seq.ok_or(TokensError::NoRows)?;
        let mut ids = Vec::with_capacity(rows.len() * seq);
        let mut padding = Vec::with_capacity(rows.len());
        for (row, tokens) in rows.iter().enumerate() {
            let tokens = tokens.as_ref();
            if tokens.is_empty() {
                return Err(TokensError::EmptyRow { row });
            }
            if let Some(position) = tokens.iter().position(|&t| t as usize >= vocab_size) {
                return Err(TokensError::OutOfVocabulary {
                    row,
                    position,
                    token: tokens[position],
                    vocab_size,
                });
            }
            padding.push(seq - tokens.len());
            ids.resize(ids.len() + seq - tokens.len(), 0);
            ids.extend(tokens.iter().map(|&token| i64::from(token)));
        }
        Ok(Self {
            tokens: Tensor::from_data(TensorData::new(ids, [rows.len(), seq]), device),
            padding,
        })
    }

    /// Token ids that are already on a device, with `padding[row]` columns of padding on the left
    /// of each row.
    ///
    /// # Errors
    /// [`TokensError`] if there is no row, a row is all padding, or `padding` has another number of
    /// rows.
    pub fn left_padded(
        tokens: Tensor<B, 2, Int>,
        padding: Vec<usize>,
    ) -> Result<Self, TokensError> {
        let [rows, _] = tokens.dims();
        if padding.len() != rows {
            return Err(TokensError::PaddingRows {
                found: padding.len(),
                rows,
            });
        }
        let batch = Self { tokens, padding };
        batch.check()?;
        Ok(batch)
    }

    /// Every batch has a row and every row a token.
    pub(crate) fn check(&self) -> Result<(), TokensError> {
        let [rows, seq] = self.dims();
        if rows == 0 {
            return Err(TokensError::NoRows);
        }
        match self.padding.iter().position(|&padding| padding >= seq) {
            Some(row) => Err(TokensError::EmptyRow { row }),
            None => Ok(()),
        }
    }

    /// `[batch, seq]`.
    pub fn dims(&self) -> [usize; 2] {
        self.tokens.dims()
    }

    /// Columns of padding on the left of each row.
    pub fn padding(&self) -> &[usize] {
        &self.padding
    }

    /// The ids, `[batch, seq]`.
    pub fn into_tensor(self) -> Tensor<B, 2, Int> {
        self.tokens
    }

    /// Chunks of equal length with no more than about `most` tokens in all rows, in order, the last
    /// by itself. A row of a chunk may be all padding.
    pub(crate) fn split(self, most: usize) -> (Vec<Self>, Self) {
        let [rows, seq] = self.dims();
        let chunks = seq.div_ceil((most / rows).max(1));
        let len = seq.div_ceil(chunks);
        let chunk = |start: usize| {
            let len = len.min(seq - start);
            let padding = self.padding.iter();
            Self {
                tokens: self.tokens.clone().narrow(1, start, len),
                padding: padding
                    .map(|padding| padding.saturating_sub(start).min(len))
                    .collect(),
            }
        };
        let last = (seq - 1) / len * len;
        ((0..last).step_by(len).map(chunk).collect(), chunk(last))
    }

    pub(crate) fn device(&self) -> B::Device {
        self.tokens.device()
    }

    /// Which of `cached` slots with `holes` and of these tokens hold no token, row by row; no rows
    /// where every one does.
    pub(crate) fn holes(&self, holes: &[Holes], cached: usize) -> Arc<[Holes]> {
        if holes.iter().all(Holes::is_empty) && self.padding.iter().all(|&padding| padding == 0) {
            return Arc::default();
        }
        let rows = self.padding.iter().enumerate().map(|(row, &padding)| {
            let mut holes = holes.get(row).cloned().unwrap_or_default();
            holes.push(cached..cached + padding);
            holes
        });
        rows.collect()
    }
}
