//! Rotary position embedding (arXiv 2104.09864) in the Hugging Face channel order: channel j is
//! rotated with channel j + rotary_dim/2; channels from rotary_dim on stay.
//!
//! Burn's `RotaryEncoding` rotates neighbouring channels and starts every row at the same
//! position; checkpoints need the first otherwise, and rows of different lengths the second. Angles
//! are computed for the positions at hand: a table of all that a model allows takes longer to make
//! than most programs run.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use thiserror::Error;

use crate::config::RopeConfig;
use crate::kernels;

/// By how much every pair of channels turns from one position to the next.
///
/// ```
/// use burn::tensor::Tensor;
/// use fusedkv::backend::{Flex, FlexDevice};
/// use fusedkv::config::RopeConfig;
/// use fusedkv::decoder::Rope;
///
/// let rope = Rope::new(8, RopeConfig::new(1e4));
/// let query = Tensor::<Flex, 4>::ones([1, 2, 3, 8], &FlexDevice);
/// let turned = rope.range(5, 3, &FlexDevice).apply(query)?;
/// assert_eq!(turned.dims(), [1, 2, 3, 8]);
/// # Ok::<(), fusedkv::decoder::RopeError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    config: RopeConfig,
    head_dim: usize,
}

/// The angles of one chunk of tokens, shared by all layers.
///
/// Both tables are `[1 or batch, 1, seq, rotary_dim / 2]`.
#[derive(Clone, Debug)]
pub struct RopeAngles<B: Backend> {
    cos: Tensor<B, 4>,
    sin: Tensor<B, 4>,
    head_dim: usize,
}

/// Positions or tensors that cannot be rotated.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RopeError {
    /// Positions of no row.
    #[error("positions of no rows, expected at least 1")]
    NoRows,
    /// Rows with different numbers of positions.
    #[error("row {row} has {found} positions, expected {expected} as the first row has")]
    Ragged {
        /// The row.
        row: usize,
        /// Its positions.
        found: usize,
        /// Those of the first row.
        expected: usize,
    },
    /// A tensor that the angles are not for.
    #[error("a tensor of shape {found:?}, expected [{batch}, heads, {seq}, {head_dim}]")]
    Shape {
        /// Its shape.
        found: [usize; 4],
        /// Rows of the angles; "any" where all rows have the same.
        batch: String,
        /// Positions of the angles.
        seq: usize,
        /// Channels of a head.
        head_dim: usize,
    },
}

impl Rope {
    /// That of heads of `head_dim` channels.
    pub fn new(head_dim: usize, config: RopeConfig) -> Self {
        Self { config, head_dim }
    }

    /// The angles of positions `start..start + seq`, the same for every row; computed in f64, kept
    /// in the backend's float type.
    pub fn range<B: Backend>(&self, start: usize, seq: usize, device: &B::Device) -> RopeAngles<B> {
        self.angles([1, seq], start..start + seq, start + seq, device)
    }

    /// The angles of one position per row and token, `positions[row][token]`.
    ///
    /// # Errors
    /// [`RopeError::NoRows`], [`RopeError::Ragged`].
    pub fn gather<B: Backend>(
        &self,
        positions: &[Vec<usize>],
        device: &B::Device,
    ) -> Result<RopeAngles<B>, RopeError> {
        let seq = positions.first().ok_or(RopeError::NoRows)?.len();
        if let Some(row) = positions.iter().position(|row| row.len() != seq) {
            return Err(RopeError::Ragged {
                row,
                found: positions[row].len(),
                expected: seq,
            });
        }
        let shape = [positions.len(), seq];
        let positions = positions.iter().flatten().copied();
        let reach = positions.clone().max().map_or(0, |last| last + 1);
        Ok(self.angles(shape, positions, reach, device))
    }

    /// The angles of `[rows, seq]` positions, row after row, of texts whose positions are below `reach`.
    pub(super) fn angles<B: Backend>(
        &self,
        [rows, seq]: [usize; 2],
        positions: impl Iterator<Item = usize>,
        reach: usize,
        device: &B::Device,
    ) -> RopeAngles<B> {
        let frequencies = self.config.frequencies(self.head_dim, reach);
        let factor = self.config.attention_factor();
        let pairs = frequencies.len();
        let numbers = rows * seq * pairs;
        let (mut cos, mut sin) = (Vec::with_capacity(numbers), Vec::with_capacity(numbers));
        for position in positions {
            for frequency in &frequencies {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push(c * factor);
                sin.push(s * factor);
            }
        }
        let table =
            |numbers| Tensor::from_data(TensorData::new(numbers, [rows, 1, seq, pairs]), device);
        RopeAngles {
            cos: table(cos),
            sin: table(sin),
            head_dim: self.head_dim,
        }
    }
}

impl<B: Backend> RopeAngles<B> {
    /// Rotates queries or keys.
    ///
    /// # Shapes
    /// - x, output: `[batch, heads, seq, head_dim]`
    ///
    /// # Errors
    /// [`RopeError::Shape`] if the angles are of other rows, positions or channels.
    pub fn apply(&self, x: Tensor<B, 4>) -> Result<Tensor<B, 4>, RopeError> {
        let found @ [batch, _, seq, head_dim] = x.dims();
        let [rows, _, positions, _] = self.cos.dims();
        if (rows != 1 && batch != rows) || seq != positions || head_dim != self.head_dim {
            return Err(RopeError::Shape {
                found,
                batch: match rows {
                    1 => "any".to_owned(),
                    rows => rows.to_string(),
                },
                seq: positions,
                head_dim: self.head_dim,
            });
        }
        Ok(self.rotate(x))
    }

    /// [`apply`](Self::apply) to a tensor that fits.
    pub(crate) fn rotate(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let dtype = x.dtype();
        let (cos, sin) = (self.cos.clone().cast(dtype), self.sin.clone().cast(dtype));
        let [_, _, _, pairs] = cos.dims();
        let rotary_dim = 2 * pairs;
        if rotary_dim == self.head_dim {
            return kernels::rope(x, cos, sin);
        }
        let rotated = kernels::rope(x.clone().narrow(3, 0, rotary_dim), cos, sin);
        let stays = x.narrow(3, rotary_dim, self.head_dim - rotary_dim);
        Tensor::cat(vec![rotated, stays], 3)
    }

    /// The angles of the last `len` tokens.
    pub(crate) fn last(&self, len: usize) -> Self {
        let last = |table: &Tensor<B, 4>| {
            let [_, _, seq, _] = table.dims();
            match seq == len {
                true => table.clone(),
                false => table.clone().narrow(2, seq - len, len),
            }
        };
        Self {
            cos: last(&self.cos),
            sin: last(&self.sin),
            head_dim: self.head_dim,
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn_flex::{Flex, FlexDevice};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The angles at hand are some rows of the table of all positions.
        #[test]
        fn angles_are_those_of_the_whole_table(
            start in 0usize..200,
            seq in 1usize..20,
            head_dim in (1usize..9).prop_map(|pairs| 2 * pairs),
        ) {
            let rope = Rope::new(head_dim, RopeConfig::new(1e4));
            let table = rope.range::<Flex>(0, start + seq, &FlexDevice).last(seq);
            let positions = vec![(start..start + seq).collect()];
            let gathered = rope.gather::<Flex>(&positions, &FlexDevice).unwrap();
            for found in [rope.range(start, seq, &FlexDevice), gathered] {
                prop_assert_eq!(found.cos.into_data(), table.cos.clone().into_data());
                prop_assert_eq!(found.sin.into_data(), table.sin.clone().into_data());
            }
        }
    }

    /// However far a model's positions reach, those of a pass are all that is computed.
    #[test]
    fn the_last_of_a_million_positions_is_one_row() {
        let rope = Rope::new(64, RopeConfig::new(1e6));
        let angles = rope.range::<Flex>((1 << 20) - 1, 1, &FlexDevice);
        assert_eq!(angles.cos.dims(), [1, 1, 1, 32]);
        let found: Vec<f32> = angles.cos.into_data().iter().collect();
        for (pair, found) in found.into_iter().enumerate() {
            let frequency = 1e6f64.powf(-(pair as f64) / 32.0);
            let expected = (((1 << 20) - 1) as f64 * frequency).cos();
            assert!(
                (f64::from(found) - expected).abs() < 1e-6,
                "{found} {expected}"
            );
        }
    }
}
