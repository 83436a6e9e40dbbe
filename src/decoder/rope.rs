//! Rotary position embedding (arXiv 2104.09864) in the Hugging Face channel order: channel j is
//! rotated with channel j + head_dim/2.
//!
//! Burn's `RotaryEncoding` rotates neighbouring channels and starts every row at the same
//! position; checkpoints need the first otherwise, and rows of different lengths the second.

use burn::module::Module;
use burn::tensor::{Int, Tensor, TensorData, backend::Backend};

use crate::kernels;

/// Tables of cos and sin for every position and pair of channels.
#[derive(Module, Debug)]
pub struct Rope<B: Backend> {
    cos: Tensor<B, 2>,
    sin: Tensor<B, 2>,
}

/// The angles of one chunk of tokens, shared by all layers.
///
/// Both tables are `[1 or batch, 1, seq, head_dim / 2]`.
#[derive(Clone, Debug)]
pub struct RopeAngles<B: Backend> {
    cos: Tensor<B, 4>,
    sin: Tensor<B, 4>,
}

impl<B: Backend> Rope<B> {
    /// Tables for positions `0..max_positions`. Pair j turns by `position · theta^(−2j/head_dim)`;
    /// computed in f64, kept in the backend's float type.
    pub fn new(max_positions: usize, head_dim: usize, theta: f64, device: &B::Device) -> Self {
        let pairs = head_dim / 2;
        let angles = (0..max_positions).flat_map(|position| {
            (0..pairs).map(move |j| position as f64 * theta.powf(-2.0 * j as f64 / head_dim as f64))
        });
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f64> = angles.clone().map(f).collect();
            Tensor::from_data(TensorData::new(values, [max_positions, pairs]), device)
        };
        Self {
            cos: table(f64::cos),
            sin: table(f64::sin),
        }
    }

    /// The angles of positions `start..start + seq`, the same for every row.
    ///
    /// # Panics
    /// If the range ends beyond `max_positions`.
    pub fn range(&self, start: usize, seq: usize) -> RopeAngles<B> {
        let rows = |table: &Tensor<B, 2>| table.clone().narrow(0, start, seq).unsqueeze::<4>();
        RopeAngles {
            cos: rows(&self.cos),
            sin: rows(&self.sin),
        }
    }

    /// The angles of one position per row and token, `positions[row][token]`.
    ///
    /// # Panics
    /// If the rows differ in length.
    pub fn gather(&self, positions: &[Vec<usize>], device: &B::Device) -> RopeAngles<B> {
        let (batch, seq) = (positions.len(), positions[0].len());
        let flat: Vec<i64> = positions.iter().flatten().map(|&p| p as i64).collect();
        let index = Tensor::<B, 1, Int>::from_data(TensorData::new(flat, [batch * seq]), device);
        let rows = |table: &Tensor<B, 2>| {
            let [_, pairs] = table.dims();
            let chosen = table.clone().select(0, index.clone());
            chosen.reshape([batch, 1, seq, pairs])
        };
        RopeAngles {
            cos: rows(&self.cos),
            sin: rows(&self.sin),
        }
    }
}

impl<B: Backend> RopeAngles<B> {
    /// Rotates queries or keys.
    ///
    /// # Shapes
    /// - x, output: `[batch, heads, seq, head_dim]`
    pub fn apply(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let dtype = x.dtype();
        let (cos, sin) = (self.cos.clone().cast(dtype), self.sin.clone().cast(dtype));
        kernels::rope(x, cos, sin)
    }

    /// The last token's angles.
    pub(crate) fn last(self) -> Self {
        let last = |table: Tensor<B, 4>| {
            let [_, _, seq, _] = table.dims();
            table.narrow(2, seq - 1, 1)
        };
        Self {
            cos: last(self.cos),
            sin: last(self.sin),
        }
    }
}
