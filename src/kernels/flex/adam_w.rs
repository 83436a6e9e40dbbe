//! AdamW's update in one pass, in place where nobody else holds the numbers.

use burn::tensor::{DType, Tensor, TensorPrimitive, backend::Backend};
use burn_flex::{Flex, FlexTensor};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::pointwise::CHUNK;
use super::{ARCH, downcast};
use crate::kernels::AdamWRates;

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
