//! Keys and values as they are stored.

use std::ops::Range;

use burn::tensor::{DType, Int, IntDType, Numeric, Tensor, backend::Backend};

use super::{assign_rows, select_rows};

/// Keys or values of one layer as they are stored, `[batch, n_kv_heads, seq, head_dim]`.
#[derive(Clone, Debug)]
pub(crate) enum Stored<B: Backend> {
    /// Floats of any type.
    Float(Tensor<B, 4>),
    /// 8-bit integers, times a scale per token and head, `[batch, n_kv_heads, seq, 1]`.
    Int8 {
        codes: Tensor<B, 4, Int>,
        scales: Tensor<B, 4>,
    },
}

impl<B: Backend> Stored<B> {
    /// Largest code; the smallest is its negative.
    const CODES: f64 = 127.0;

    /// Zeros of type `dtype`, which is a float type or 8-bit integers.
    pub fn zeros(dims: [usize; 4], dtype: DType, device: &B::Device) -> Self {
        if dtype != DType::I8 {
            return Self::Float(Tensor::zeros(dims, (device, dtype)));
        }
        let [batch, heads, seq, _] = dims;
        Self::Int8 {
            codes: Tensor::zeros(dims, (device, DType::I8)),
            scales: Tensor::zeros([batch, heads, seq, 1], (device, DType::F32)),
        }
    }

    /// Codes and scales, the codes as integers of 8 bits.
    fn int8(x: Tensor<B, 4>) -> (Tensor<B, 4, Int>, Tensor<B, 4>) {
        let (codes, scales) = Self::rounded(x);
        (codes.cast(IntDType::I8), scales)
    }

    /// Codes round(x / scale) and scales, where a scale is a token's and head's largest magnitude /
    /// 127: an element is off by at most half its scale. Computed in f32 whatever x is: in f16 the
    /// scale of a small head would be subnormal, and codes in bf16 are off by a half already.
    pub fn rounded(x: Tensor<B, 4>) -> (Tensor<B, 4, Int>, Tensor<B, 4>) {
        let x = x.cast(DType::F32);
        // Without the floor, a row of zeros would be divided by zero.
        // (NdArray's `abs`, of Burn 0.21, is wrong where dimensions were swapped.)
        let largest = (x.clone().max_dim(3))
            .max_pair(x.clone().min_dim(3).neg())
            .clamp_min(f64::from(f32::MIN_POSITIVE) * 1e3);
        let scales = largest.div_scalar(Self::CODES);
        let codes = (x / scales.clone()).round().int();
        (codes, scales)
    }

    /// `[batch, n_kv_heads, seq, head_dim]`.
    pub fn dims(&self) -> [usize; 4] {
        match self {
            Self::Float(x) => x.dims(),
            Self::Int8 { codes, .. } => codes.dims(),
        }
    }

    /// As floats of type `dtype`; free if they are that already.
    pub fn float(self, dtype: DType) -> Tensor<B, 4> {
        match self {
            Self::Float(x) => x.cast(dtype),
            Self::Int8 { codes, scales } => (codes.float().cast(DType::F32) * scales).cast(dtype),
        }
    }

    /// Positions `start..start + len`.
    pub fn narrow(self, start: usize, len: usize) -> Self {
        match self {
            Self::Float(x) => Self::Float(x.narrow(2, start, len)),
            Self::Int8 { codes, scales } => Self::Int8 {
                codes: codes.narrow(2, start, len),
                scales: scales.narrow(2, start, len),
            },
        }
    }

    /// The last `len` positions.
    pub fn tail(self, len: usize) -> Self {
        let [_, _, seq, _] = self.dims();
        match seq == len {
            true => self,
            false => self.narrow(seq - len, len),
        }
    }

    /// Rows of the batch.
    pub fn select(self, rows: Tensor<B, 1, Int>) -> Self {
        match self {
            Self::Float(x) => Self::Float(select_rows(x, rows)),
            Self::Int8 { codes, scales } => Self::Int8 {
                codes: select_rows(codes, rows.clone()),
                scales: select_rows(scales, rows),
            },
        }
    }

    /// Writes `x` at positions from `start`, in place if nobody else holds this.
    pub fn assign(self, start: usize, x: Tensor<B, 4>) -> Self {
        match self {
            Self::Float(old) => {
                let dtype = old.dtype();
                Self::Float(assign_rows(old, start, x.cast(dtype)))
            }
            Self::Int8 { codes, scales } => {
                let (new_codes, new_scales) = Self::int8(x);
                Self::Int8 {
                    codes: assign_rows(codes, start, new_codes),
                    scales: assign_rows(scales, start, new_scales),
                }
            }
        }
    }

    /// Positions `start..start + len` at the front of memory for `rows`, the rest zeros.
    pub fn moved(self, start: usize, len: usize, rows: usize) -> Self {
        fn moved<B: Backend, K: Numeric<B> + 'static>(
            from: Tensor<B, 4, K>,
            start: usize,
            len: usize,
            rows: usize,
        ) -> Tensor<B, 4, K> {
            let [batch, heads, _, width] = from.dims();
            let to = Tensor::zeros([batch, heads, rows, width], (&from.device(), from.dtype()));
            match len {
                0 => to,
                _ => assign_rows(to, 0, from.narrow(2, start, len)),
            }
        }
        match self {
            Self::Float(x) => Self::Float(moved(x, start, len, rows)),
            Self::Int8 { codes, scales } => Self::Int8 {
                codes: moved(codes, start, len, rows),
                scales: moved(scales, start, len, rows),
            },
        }
    }

    /// The last of the positions in each row's runs, `len` of them behind zeros where there are fewer,
    /// at the front of memory for `rows`.
    pub fn gathered(self, runs: &[Vec<Range<usize>>], len: usize, rows: usize) -> Self {
        fn gathered<B: Backend, K: Numeric<B> + 'static>(
            from: Tensor<B, 4, K>,
            runs: &[Vec<Range<usize>>],
            len: usize,
            rows: usize,
        ) -> Tensor<B, 4, K> {
            let [batch, heads, _, width] = from.dims();
            let options = (from.device(), from.dtype());
            let zeros = |batch, len| {
                Tensor::<B, 4, K>::zeros([batch, heads, len, width], (&options.0, options.1))
            };
            let row = |(row, runs): (usize, &Vec<Range<usize>>)| {
                let of_row = from.clone().narrow(0, row, 1);
                let mut left = len;
                let mut parts = Vec::new();
                for run in runs.iter().rev() {
                    let taken = run.len().min(left);
                    left -= taken;
                    if taken > 0 {
                        parts.push(of_row.clone().narrow(2, run.end - taken, taken));
                    }
                }
                if left > 0 {
                    parts.push(zeros(1, left));
                }
                parts.reverse();
                Tensor::cat(parts, 2)
            };
            let to = zeros(batch, rows);
            match len {
                0 => to,
                _ => {
                    let all = runs.iter().enumerate().map(row).collect();
                    assign_rows(to, 0, Tensor::cat(all, 0))
                }
            }
        }
        match self {
            Self::Float(x) => Self::Float(gathered(x, runs, len, rows)),
            Self::Int8 { codes, scales } => Self::Int8 {
                codes: gathered(codes, runs, len, rows),
                scales: gathered(scales, runs, len, rows),
            },
        }
    }

    /// Bytes of the tensors as allocated.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Float(x) => x.shape().num_elements() * x.dtype().size(),
            Self::Int8 { codes, scales } => {
                codes.shape().num_elements() * codes.dtype().size()
                    + scales.shape().num_elements() * scales.dtype().size()
            }
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn_flex::{Flex, FlexDevice};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Also of heads whose scale would be subnormal in f16, and of numbers that bf16 has few of.
        #[test]
        fn codes_are_within_half_a_scale_whatever_the_model_is_of(
            row in prop::collection::vec(-1.0f32..1.0, 1..70),
            exponent in -20i32..8,
            dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
        ) {
            let row: Vec<f32> = row.iter().map(|x| x * 2f32.powi(exponent)).collect();
            let x = Tensor::<Flex, 1>::from_floats(row.as_slice(), &FlexDevice).cast(dtype);
            let x: Tensor<Flex, 4> = x.unsqueeze();
            let stored = Stored::zeros(x.dims(), DType::I8, &FlexDevice).assign(0, x.clone());
            let numbers = |x: Tensor<Flex, 4>| -> Vec<f64> { x.into_data().iter().collect() };
            let (x, stored) = (numbers(x), numbers(stored.float(DType::F32)));
            let largest = x.iter().fold(0f64, |max, x| max.max(x.abs()));
            for (x, y) in x.iter().zip(stored) {
                prop_assert!((x - y).abs() <= largest / 254.0 * (1.0 + 1e-5), "{x} {y}");
            }
        }
    }
}
