//! Matrices in fewer bits than a float has.

use std::ops::Range;

use burn::tensor::{
    DType, ElementConversion, Int, IntDType, Tensor, TensorData, backend::Backend, f16,
};

use super::select_rows;

/// Neighbours in a row that share a scale.
pub(crate) const GROUP: usize = 32;

/// How the numbers of a group are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codes {
    /// code · scale, a code being a byte from −127 to 127.
    Int8,
    /// code · scale + offset, a code being half a byte, 0 to 15: byte j of a group's 16 has number j
    /// in its lower half and number j + 16 in its upper.
    Int4,
}

impl Codes {
    /// Bytes of a group's codes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Int8 => GROUP,
            Self::Int4 => GROUP / 2,
        }
    }
}

/// Rows of a matrix as they are packed, one after another.
///
/// A row that is no multiple of 32 wide ends with a group whose last numbers are 0 and nobody's.
#[derive(Clone, Debug)]
pub(crate) struct PackedRows {
    pub codes: Codes,
    pub columns: usize,
    /// `[rows, groups, bytes of a group]`.
    pub bytes: Vec<i8>,
    /// `[rows, groups]`.
    pub scales: Vec<f16>,
    /// `[rows, groups]` where numbers have them.
    pub offsets: Vec<f16>,
}

impl PackedRows {
    /// Rows of zeros, to be written.
    pub fn new(codes: Codes, rows: usize, columns: usize) -> Self {
        let groups = rows * columns.div_ceil(GROUP);
        let offsets = if codes == Codes::Int4 { groups } else { 0 };
        Self {
            codes,
            columns,
            bytes: vec![0; groups * codes.bytes()],
            scales: vec![f16::ZERO; groups],
            offsets: vec![f16::ZERO; offsets],
        }
    }

    /// Packs all rows.
    ///
    /// # Errors
    /// As [`RowsMut::write`].
    pub fn write(&mut self, rows: &[f32]) -> Result<(), f32> {
        let all = self.scales.len();
        let mut parts = self.parts(all).into_iter();
        parts.try_for_each(|mut part| part.write(rows))
    }

    /// Parts of up to so many rows, which can be written apart.
    pub fn parts(&mut self, rows: usize) -> Vec<RowsMut<'_>> {
        let groups = rows.max(1) * self.columns.div_ceil(GROUP).max(1);
        let bytes = self.bytes.chunks_mut(groups * self.codes.bytes());
        let scales = self.scales.chunks_mut(groups);
        let mut offsets = self.offsets.chunks_mut(groups);
        let part = |(bytes, scales)| RowsMut {
            codes: self.codes,
            columns: self.columns,
            bytes,
            scales,
            offsets: offsets.next().unwrap_or_default(),
        };
        bytes.zip(scales).map(part).collect()
    }

    /// 8-bit codes as files have them: none beyond a row's columns.
    #[cfg(feature = "checkpoint")]
    pub fn code_bytes(&self) -> Vec<u8> {
        let rows = self.bytes.chunks(self.columns.next_multiple_of(GROUP));
        let codes = rows.flat_map(|row| &row[..self.columns]);
        codes.map(|&code| code as u8).collect()
    }

    /// Scales as files have them.
    #[cfg(feature = "checkpoint")]
    pub fn scale_bytes(&self) -> Vec<u8> {
        let scales = self.scales.iter();
        scales.flat_map(|scale| scale.to_le_bytes()).collect()
    }
}

/// Some of the rows of [`PackedRows`].
#[derive(Debug)]
pub(crate) struct RowsMut<'r> {
    pub codes: Codes,
    pub columns: usize,
    pub bytes: &'r mut [i8],
    pub scales: &'r mut [f16],
    pub offsets: &'r mut [f16],
}

impl RowsMut<'_> {
    /// Packs numbers, row after row.
    ///
    /// # Errors
    /// A number that is none, or that no scale is large enough for.
    pub fn write(&mut self, rows: &[f32]) -> Result<(), f32> {
        let limit = match self.codes {
            Codes::Int8 => f16::MAX.to_f32() * 127.0,
            // An offset is f16 itself, and a scale spans twice the largest.
            Codes::Int4 => f16::MAX.to_f32(),
        };
        // What is no number is within no limit. Without an early end, so that it is done in vectors.
        let within = |x: &f32| x.abs() <= limit;
        if !rows.iter().fold(true, |all, x| all & within(x)) {
            return rows.iter().find(|x| !within(x)).map_or(Ok(()), |&x| Err(x));
        }
        let pack = Pack { rows, to: self };
        #[cfg(feature = "flex")]
        pulp::Arch::new().dispatch(pack);
        #[cfg(not(feature = "flex"))]
        pack.pack();
        Ok(())
    }
}

/// Numbers on their way to codes.
struct Pack<'p, 'r> {
    rows: &'p [f32],
    to: &'p mut RowsMut<'r>,
}

#[cfg(feature = "flex")]
impl pulp::WithSimd for Pack<'_, '_> {
    type Output = ();

    // In the vectors that the processor has.
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        self.pack();
    }
}

impl Pack<'_, '_> {
    #[inline(always)]
    fn pack(self) {
        let Self { rows, to } = self;
        let per_row = to.columns.div_ceil(GROUP);
        for (i, row) in rows.chunks(to.columns).enumerate() {
            for (j, group) in row.chunks(GROUP).enumerate() {
                let at = i * per_row + j;
                let mut numbers = [0.0; GROUP];
                numbers[..group.len()].copy_from_slice(group);
                let bytes = &mut to.bytes[at * to.codes.bytes()..][..to.codes.bytes()];
                match to.codes {
                    Codes::Int8 => to.scales[at] = int8(&numbers, bytes),
                    Codes::Int4 => {
                        let (scale, offset) = int4(&numbers, group.len(), bytes);
                        (to.scales[at], to.offsets[at]) = (scale, offset);
                    }
                }
            }
        }
    }
}

// Loops instead of closures from here on: closures are functions of their own, which are compiled for
// no processor in particular.

/// The scale is the largest magnitude / 127, rounded so that no code is beyond 127.
#[inline(always)]
fn int8(group: &[f32; GROUP], codes: &mut [i8]) -> f16 {
    let mut magnitudes = [0.0; GROUP];
    for (magnitude, x) in magnitudes.iter_mut().zip(group) {
        *magnitude = x.abs();
    }
    let scale = not_below(maximum(&magnitudes) / 127.0);
    let inverse = inverse(scale);
    for (code, x) in codes.iter_mut().zip(group) {
        *code = nearest((x * inverse).clamp(-127.0, 127.0)) as i8;
    }
    scale
}

/// Scale and offset are those of the smallest squared error among a few: from the least to the
/// largest number, and what linear regression on the codes makes of it. Of a group that is not whole
/// the first `len` count.
#[inline(always)]
fn int4(group: &[f32; GROUP], len: usize, bytes: &mut [i8]) -> (f16, f16) {
    // What does not count is neither least nor largest, nor in a sum.
    let (mut filled, mut negative, mut counts) = (*group, [0.0; GROUP], [0.0; GROUP]);
    filled[len..].fill(group[0]);
    counts[..len].fill(1.0);
    for (negative, x) in negative.iter_mut().zip(&filled) {
        *negative = -x;
    }
    let (least, most) = (-maximum(&negative), maximum(&filled));
    let n = len as f32;
    let mean = sum(group) / n;
    let mut tried = (not_below((most - least) / 15.0), f16::from_f32(least));
    let (mut best, mut error) = (tried, f32::INFINITY);
    let mut codes = [0.0; GROUP];
    let mut terms = [0.0; GROUP];
    for _ in 0..5 {
        let (scale, offset, inverse) = (tried.0.to_f32(), tried.1.to_f32(), inverse(tried.0));
        let each = terms
            .iter_mut()
            .zip(&mut codes)
            .zip(group.iter().zip(&counts));
        for ((term, code), (&x, count)) in each {
            *code = nibble(x, offset, inverse) as f32;
            let off = (*code * scale + offset - x) * count;
            *term = off * off;
        }
        let now = sum(&terms);
        // Nor what has become too large for an f16.
        if now.is_nan() || now >= error {
            break;
        }
        (best, error) = (tried, now);
        for ((term, code), count) in terms.iter_mut().zip(&codes).zip(&counts) {
            *term = code * count;
        }
        let mean_code = sum(&terms) / n;
        let mut squares = [0.0; GROUP];
        let each = terms.iter_mut().zip(&mut squares).zip(&codes);
        for (((term, square), code), (x, count)) in each.zip(group.iter().zip(&counts)) {
            let from_mean = (code - mean_code) * count;
            *square = from_mean * from_mean;
            *term = from_mean * (x - mean);
        }
        let variance = sum(&squares);
        if variance == 0.0 {
            break;
        }
        let slope = sum(&terms) / variance;
        tried = (
            f16::from_f32(slope),
            f16::from_f32(mean - slope * mean_code),
        );
    }
    let (offset, inverse) = (best.1.to_f32(), inverse(best.0));
    let (low, high) = group.split_at(GROUP / 2);
    for ((byte, &low), &high) in bytes.iter_mut().zip(low).zip(high) {
        let (low, high) = (nibble(low, offset, inverse), nibble(high, offset, inverse));
        *byte = (low | high << 4) as i8;
    }
    best
}

/// Sums that are taken side by side, in vectors.
const LANES: usize = 8;

#[inline(always)]
fn sum(group: &[f32; GROUP]) -> f32 {
    let mut sums = [0.0; LANES];
    for of_lanes in group.as_chunks::<LANES>().0 {
        for (sum, x) in sums.iter_mut().zip(of_lanes) {
            *sum += x;
        }
    }
    let mut sum = 0.0;
    for of_lane in sums {
        sum += of_lane;
    }
    sum
}

#[inline(always)]
fn maximum(group: &[f32; GROUP]) -> f32 {
    let mut most = [f32::NEG_INFINITY; LANES];
    for of_lanes in group.as_chunks::<LANES>().0 {
        for (most, &x) in most.iter_mut().zip(of_lanes) {
            // `max` minds what is no number, which takes longer.
            *most = if x > *most { x } else { *most };
        }
    }
    let mut maximum = f32::NEG_INFINITY;
    for of_lane in most {
        maximum = maximum.max(of_lane);
    }
    maximum
}

/// The code of a number, 0 to 15.
#[inline(always)]
fn nibble(x: f32, offset: f32, inverse: f32) -> i32 {
    nearest(((x - offset) * inverse).clamp(0.0, 15.0))
}

/// To the nearest, halves away from 0, of what is below 2^22: `round` is a call where a processor may
/// lack it, and a conversion that minds what no integer is takes numbers one by one.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    /// Beside it floats are integers.
    const WHOLE: f32 = 1.5 * (1 << 23) as f32;
    let shifted = x + WHOLE;
    // Halves have gone to the even neighbour.
    let rest = x - (shifted - WHOLE);
    let whole = shifted.to_bits() as i32 - WHOLE.to_bits() as i32;
    whole + i32::from(rest == 0.5 && x > 0.0) - i32::from(rest == -0.5 && x < 0.0)
}

/// The f16 next to `x`, or above it where the next one is too small by so much that codes would be
/// cut off: among the subnormal ones.
#[inline(always)]
fn not_below(x: f32) -> f16 {
    let next = f16::from_f32(x);
    match next.to_f32() * 1.003 < x {
        true => f16::from_bits(next.to_bits() + 1),
        false => next,
    }
}

/// 1 / scale; 0 where all numbers are the same, whose codes are then 0.
#[inline(always)]
fn inverse(scale: f16) -> f32 {
    match scale.to_f32() {
        0.0 => 0.0,
        scale => scale.recip(),
    }
}

/// A matrix `[rows, columns]` in groups of [`GROUP`] along its rows, or the transpose of one.
#[derive(Clone, Debug)]
pub(crate) struct Packed<B: Backend> {
    pub kind: Codes,
    pub columns: usize,
    /// `[rows, groups · bytes of a group]`, bytes.
    pub codes: Tensor<B, 2, Int>,
    /// `[rows, groups]`, f16 where the backend has it: each is the same in f32.
    pub scales: Tensor<B, 2>,
    /// The same, where numbers have them.
    pub offsets: Option<Tensor<B, 2>>,
    /// Whether it is the transpose.
    pub transposed: bool,
}

impl<B: Backend> Packed<B> {
    pub fn new(rows: PackedRows, device: &B::Device) -> Self {
        let groups = rows.columns.div_ceil(GROUP);
        let n_rows = rows.scales.len() / groups;
        let dtype = match B::supports_dtype(device, DType::F16) {
            true => DType::F16,
            false => DType::F32,
        };
        let floats = |numbers: Vec<f16>| {
            Tensor::from_data(TensorData::new(numbers, [n_rows, groups]), (device, dtype))
        };
        let codes = TensorData::new(rows.bytes, [n_rows, groups * rows.codes.bytes()]);
        Self {
            kind: rows.codes,
            columns: rows.columns,
            codes: Tensor::from_data(codes, (device, DType::I8)),
            scales: floats(rows.scales),
            offsets: (rows.codes == Codes::Int4).then(|| floats(rows.offsets)),
            transposed: false,
        }
    }

    pub fn dims(&self) -> [usize; 2] {
        let [rows, _] = self.codes.dims();
        match self.transposed {
            true => [self.columns, rows],
            false => [rows, self.columns],
        }
    }

    pub fn transpose(mut self) -> Self {
        self.transposed = !self.transposed;
        self
    }

    pub fn device(&self) -> B::Device {
        self.codes.device()
    }

    /// Every tensor through a function of its own kind.
    pub fn map<C: Backend>(
        self,
        codes: impl FnOnce(Tensor<B, 2, Int>) -> Tensor<C, 2, Int>,
        floats: impl Fn(Tensor<B, 2>) -> Tensor<C, 2>,
    ) -> Packed<C> {
        Packed {
            kind: self.kind,
            columns: self.columns,
            codes: codes(self.codes),
            scales: floats(self.scales),
            offsets: self.offsets.map(floats),
            transposed: self.transposed,
        }
    }

    /// Some rows of what is not transposed.
    pub fn narrow(self, rows: Range<usize>) -> Self {
        let (start, len) = (rows.start, rows.len());
        self.map(
            |codes| codes.narrow(0, start, len),
            |floats| floats.narrow(0, start, len),
        )
    }

    /// Rows of what is not transposed, by their numbers.
    pub fn select(self, rows: Tensor<B, 1, Int>) -> Self {
        let codes = |codes| select_rows(codes, rows.clone());
        self.map(codes, |floats| select_rows(floats, rows.clone()))
    }

    /// What it is made of, on the host, of what is not transposed.
    #[cfg(feature = "checkpoint")]
    pub fn into_rows(self) -> PackedRows {
        let floats = |x: Tensor<B, 2>| x.into_data().iter().collect();
        PackedRows {
            codes: self.kind,
            columns: self.columns,
            bytes: self.codes.into_data().iter().collect(),
            scales: floats(self.scales),
            offsets: self.offsets.map(floats).unwrap_or_default(),
        }
    }

    /// As floats of type `dtype`, computed in f32.
    pub fn widen(self, dtype: DType) -> Tensor<B, 2> {
        let (transposed, columns) = (self.transposed, self.columns);
        let [rows, groups] = self.scales.dims();
        let codes = self.codes.reshape([rows, groups, self.kind.bytes()]);
        let codes = match self.kind {
            Codes::Int8 => codes,
            Codes::Int4 => {
                let bytes = codes.cast(IntDType::I32).bitwise_and_scalar(0xff.elem());
                let low = bytes.clone().bitwise_and_scalar(0x0f.elem());
                Tensor::cat(vec![low, bytes.bitwise_right_shift_scalar(4.elem())], 2)
            }
        };
        let of_groups = |floats: Tensor<B, 2>| floats.cast(DType::F32).unsqueeze_dim::<3>(2);
        let numbers = codes.float().cast(DType::F32) * of_groups(self.scales);
        let numbers = match self.offsets {
            Some(offsets) => numbers + of_groups(offsets),
            None => numbers,
        };
        let numbers = numbers
            .reshape([rows, groups * GROUP])
            .narrow(1, 0, columns);
        let numbers = match transposed {
            true => numbers.transpose(),
            false => numbers,
        };
        numbers.cast(dtype)
    }

    /// Bytes of the tensors as allocated.
    pub fn bytes(&self) -> usize {
        let floats = |x: &Tensor<B, 2>| x.shape().num_elements() * x.dtype().size();
        self.codes.shape().num_elements() * self.codes.dtype().size()
            + floats(&self.scales)
            + self.offsets.as_ref().map_or(0, floats)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the codes say, by the definition.
    fn numbers(packed: &PackedRows) -> Vec<f64> {
        let per_row = packed.columns.div_ceil(GROUP);
        let mut numbers = Vec::new();
        for (row, scales) in packed.scales.chunks(per_row).enumerate() {
            for column in 0..packed.columns {
                let (group, j) = (column / GROUP, column % GROUP);
                let bytes = &packed.bytes[(row * per_row + group) * packed.codes.bytes()..];
                let scale = scales[group].to_f64();
                numbers.push(match packed.codes {
                    Codes::Int8 => f64::from(bytes[j]) * scale,
                    Codes::Int4 => {
                        let byte = bytes[j % 16] as u8;
                        let code = if j < 16 { byte & 15 } else { byte >> 4 };
                        f64::from(code) * scale + packed.offsets[row * per_row + group].to_f64()
                    }
                });
            }
        }
        numbers
    }

    fn any_rows() -> impl Strategy<Value = (usize, Vec<f32>)> {
        (1usize..4, 1usize..80, -18i32..9, -1f32..1.0).prop_flat_map(
            |(rows, columns, exponent, shift)| {
                let number = (-1f32..1.0).prop_map(move |x| (x + shift) * 2f32.powi(exponent));
                prop::collection::vec(number, rows * columns).prop_map(move |x| (columns, x))
            },
        )
    }

    #[test]
    fn the_nearest_integer_is_that_of_round() {
        let mut x = -127.0f32;
        while x <= 127.0 {
            for x in [x, x.next_up(), x.next_down()] {
                assert_eq!(nearest(x), x.round() as i32, "{x}");
            }
            x += 0.125;
        }
    }

    proptest! {
        #[test]
        fn a_number_is_off_by_half_a_step_of_its_group(
            (columns, x) in any_rows(),
            codes in prop::sample::select(vec![Codes::Int8, Codes::Int4]),
        ) {
            let mut packed = PackedRows::new(codes, x.len() / columns, columns);
            packed.write(&x).unwrap();
            let found = numbers(&packed);
            for (x, found) in x.chunks(columns).zip(found.chunks(columns)) {
                for (x, found) in x.chunks(GROUP).zip(found.chunks(GROUP)) {
                    let largest = x.iter().fold(0f64, |max, x| max.max(f64::from(x.abs())));
                    let (least, most) = x.iter().fold((f64::MAX, f64::MIN), |(least, most), &x| {
                        (least.min(x.into()), most.max(x.into()))
                    });
                    let squares = x.iter().zip(found).map(|(x, y)| (f64::from(*x) - y).powi(2));
                    let rms = (squares.sum::<f64>() / x.len() as f64).sqrt();
                    // Half a step, what f16 makes of the scale over all codes, and its least number.
                    let step = match codes {
                        Codes::Int8 => largest / 127.0 * 1.01,
                        Codes::Int4 => (most - least) / 15.0 * 1.01 + largest * 2f64.powi(-9),
                    } + 2f64.powi(-24);
                    prop_assert!(rms <= step / 2.0 + 15.0 * 2f64.powi(-24), "{rms} {step}");
                    if codes == Codes::Int8 {
                        for (x, y) in x.iter().zip(found) {
                            let off = (f64::from(*x) - y).abs();
                            prop_assert!(off <= step * 0.7, "{x} {y} {step}");
                        }
                    }
                }
            }
        }

        /// Numbers that are on a grid of 16 steps are kept.
        #[test]
        fn a_grid_of_sixteen_is_exact(
            codes in prop::collection::vec(0u8..16, GROUP),
            scale in 1u8..100,
            offset in -100i8..100,
        ) {
            let mut codes = codes;
            (codes[3], codes[20]) = (0, 15);
            let number = |&code: &u8| f32::from(code) * f32::from(scale) / 1024.0 + f32::from(offset) / 64.0;
            let x: Vec<f32> = codes.iter().map(number).collect();
            let mut packed = PackedRows::new(Codes::Int4, 1, GROUP);
            packed.write(&x).unwrap();
            let found: Vec<f32> = numbers(&packed).iter().map(|&x| x as f32).collect();
            prop_assert_eq!(found, x);
        }
    }

    #[cfg(feature = "flex")]
    proptest! {
        #[test]
        fn widening_is_the_definition(
            (columns, x) in any_rows(),
            codes in prop::sample::select(vec![Codes::Int8, Codes::Int4]),
            transposed in any::<bool>(),
        ) {
            use burn_flex::{Flex, FlexDevice};

            let mut rows = PackedRows::new(codes, x.len() / columns, columns);
            rows.write(&x).unwrap();
            let expected = numbers(&rows);
            let packed = Packed::<Flex>::new(rows, &FlexDevice);
            let found = match transposed {
                true => packed.transpose().widen(DType::F32).transpose(),
                false => packed.widen(DType::F32),
            };
            prop_assert_eq!(found.dims(), [x.len() / columns, columns]);
            for (found, expected) in found.into_data().iter::<f64>().zip(expected) {
                prop_assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1e-2), "{found} {expected}");
            }
        }
    }
}
