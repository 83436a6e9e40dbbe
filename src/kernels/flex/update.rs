//! What is done with every gradient of a step, each in one pass over memory and in place where nobody
//! else holds the numbers: its squares, its clipping, and AdamW's update.

use burn::tensor::{DType, Tensor, TensorPrimitive, backend::Backend};
use burn_flex::{Flex, FlexTensor};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::pointwise::CHUNK;
use super::simd::dot;
use super::{ARCH, downcast, f32_tensor, for_each_block, tensor, typed};
use crate::kernels::AdamWRates;

/// Σ x², `[1]`; the same for any number of threads.
pub(crate) fn sum_of_squares<B: Backend, const D: usize>(x: &Tensor<B, D>) -> Option<Tensor<B, 1>> {
    let x = f32_tensor(x)?.to_contiguous();
    let parts = x.as_slice::<f32>()?.par_chunks(CHUNK);
    let parts: Vec<f32> = parts.map(|x| ARCH.dispatch(Squares(x))).collect();
    let sum: f64 = parts.into_iter().map(f64::from).sum();
    tensor(vec![sum as f32], [1])
}

/// A thread's part.
struct Squares<'a>(&'a [f32]);

impl WithSimd for Squares<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        dot(simd, self.0, self.0)
    }
}

/// `x` times a factor, `[1]`; back as it came if it is not f32 on Flex.
pub(crate) fn scaled<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    factor: &Tensor<B, 1>,
) -> Result<Tensor<B, D>, Tensor<B, D>> {
    let Some(factor) = f32_tensor(factor).filter(|_| x.dtype() == DType::F32) else {
        return Err(x);
    };
    let mut x = contiguous::<D>(downcast(x)?);
    let factor = factor.storage::<f32>()[factor.layout().start_offset()];
    if factor != 1.0 {
        for_each_block(x.storage_mut(), CHUNK, |_, x| {
            x.iter_mut().for_each(|x| *x *= factor);
        });
    }
    Ok(typed(x).unwrap_or_else(|| unreachable!("B is Flex")))
}

/// Parameter, gradient and both moments to parameter and moments; back as they came if they are not
/// f32 on Flex.
pub(crate) fn adam_w<B: Backend, const D: usize>(
    rates: &AdamWRates,
    tensors: [Tensor<B, D>; 4],
) -> Result<[Tensor<B, D>; 3], [Tensor<B, D>; 4]> {
    if tensors.iter().any(|tensor| tensor.dtype() != DType::F32) {
        return Err(tensors);
    }
    let tensors: [Tensor<Flex, D>; 4] = downcast(tensors)?;
    let [mut parameter, gradient, mut first, mut second] = tensors.map(contiguous);
    parameter
        .storage_mut::<f32>()
        .par_chunks_mut(CHUNK)
        .zip(first.storage_mut::<f32>().par_chunks_mut(CHUNK))
        .zip(second.storage_mut::<f32>().par_chunks_mut(CHUNK))
        .zip(gradient.storage::<f32>().par_chunks(CHUNK))
        .for_each(|(((parameter, first), second), gradient)| {
            ARCH.dispatch(Update {
                rates,
                parameter,
                gradient,
                first,
                second,
            });
        });
    let updated = [parameter, first, second]
        .map(|tensor| Tensor::<Flex, D>::from_primitive(TensorPrimitive::Float(tensor)));
    Ok(downcast(updated).unwrap_or_else(|_| unreachable!("B is Flex")))
}

fn contiguous<const D: usize>(tensor: Tensor<Flex, D>) -> FlexTensor {
    let tensor = tensor.into_primitive().tensor();
    // A tensor that stays as it is must not be shared with its copy.
    let copy = tensor.to_contiguous();
    drop(tensor);
    copy
}

/// A thread's part.
struct Update<'a> {
    rates: &'a AdamWRates,
    parameter: &'a mut [f32],
    gradient: &'a [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
}

impl WithSimd for Update<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let AdamWRates {
            beta_1,
            beta_2,
            epsilon,
            keep,
            step,
            root,
        } = *self.rates;
        let moments = self.first.iter_mut().zip(self.second);
        let parameters = self.parameter.iter_mut().zip(self.gradient);
        for ((parameter, gradient), (first, second)) in parameters.zip(moments) {
            *first = *first * beta_1 + gradient * (1.0 - beta_1);
            *second = *second * beta_2 + gradient * gradient * (1.0 - beta_2);
            *parameter = *parameter * keep - step * *first / (second.sqrt() * root + epsilon);
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, Tolerance};
    use burn_flex::FlexDevice;
    use proptest::prelude::*;

    use super::*;
    use crate::numbers::numbers;

    proptest! {
        #[test]
        fn gradients_are_squared_and_scaled_as_numbers_are(
            rows in prop_oneof![1usize..5, 200usize..300],
            width in prop_oneof![1usize..9, 200usize..400],
            transposed in any::<bool>(),
            factor in prop_oneof![Just(1f32), 0.01f32..0.99],
        ) {
            let x = Tensor::<Flex, 2>::random([rows, width], Distribution::Normal(0.0, 1.0), &FlexDevice);
            let x = if transposed { x.transpose() } else { x };
            let before = numbers(x.clone());

            let squares: f64 = before.iter().map(|&x| f64::from(x).powi(2)).sum();
            let found = f64::from(sum_of_squares(&x).unwrap().into_scalar());
            prop_assert!((found - squares).abs() <= 1e-5 * squares, "{found} {squares}");

            let by = Tensor::<Flex, 1>::from_data([0.5, factor], &FlexDevice).narrow(0, 1, 1);
            let found = scaled(x.clone(), &by).unwrap().into_data();
            let expected: Vec<f32> = before.iter().map(|x| x * factor).collect();
            let expected = burn::tensor::TensorData::new(expected, x.shape());
            found.assert_approx_eq::<f32>(&expected, Tolerance::rel_abs(1e-6, 1e-9));
            // Held by another, it stays what it was.
            prop_assert_eq!(numbers(x), before);
        }
    }

    #[test]
    fn other_numbers_come_back_as_they_were() {
        let x = Tensor::<Flex, 1>::ones([3], &FlexDevice);
        let half = x.clone().cast(DType::F16);
        assert!(sum_of_squares(&half).is_none());
        assert!(scaled(half.clone(), &x.clone().narrow(0, 0, 1)).is_err());
        assert!(scaled(x, &half.narrow(0, 0, 1)).is_err());
    }
}
