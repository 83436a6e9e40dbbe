//! Kernels with gradients of their own, for training on Flex: `Autodiff<Flex, C>` of any
//! checkpointing strategy `C`.
//!
//! What they have over the gradients that Burn derives: nothing of the size of the attention's
//! scores is kept or written, gradients come out in the order of dimensions in which the next
//! operation reads them, and every operation is one pass over memory on all threads. What an
//! operation needs in its backward pass it keeps itself, whatever the strategy.
//!
//! Sums over rows are formed in blocks of a fixed size and added up in their order, so that
//! gradients do not depend on the number of threads or on which of them was first.

mod attention;
mod blend;
mod heads;
mod linear;
mod pointwise;
#[cfg(test)]
mod tests;

use std::any::TypeId;
use std::fmt::Debug;

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Tensor, TensorData, TensorPrimitive};
use burn_flex::{Flex, FlexTensor};

use super::downcast;

pub(super) use attention::attention;
pub(super) use heads::{rope, swap_heads};
pub(super) use linear::{linear, linear_packed};
pub(super) use pointwise::{rms_norm, swiglu};

/// A tensor of `Autodiff<Flex, C>`, which is the same for every C.
type Tracked = FloatTensor<Autodiff<Flex>>;

/// An operation on N f32 tensors, and its gradients.
trait Operation<const N: usize>: Debug + Send + 'static {
    /// What the backward pass needs.
    type State: Clone + Debug + Send + 'static;

    /// The output; none if the operation does not know such inputs.
    fn forward(&self, inputs: [FlexTensor; N]) -> Option<(FlexTensor, Self::State)>;

    /// The gradients of the inputs, given that of the output; at least of those wanted.
    fn backward(
        &self,
        state: Self::State,
        gradient: FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N];
}

/// An [`Operation`] in Burn's graph.
#[derive(Debug)]
struct Recorded<O>(O);

impl<O: Operation<N>, const N: usize> Backward<Flex, N> for Recorded<O> {
    type State = O::State;

    fn backward(self, ops: Ops<O::State, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = gradients.consume::<Flex>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let found = self.0.backward(ops.state, gradient, wanted);
        for (parent, gradient) in ops.parents.into_iter().zip(found) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

/// Runs an operation and records it; none if it does not know such inputs.
fn record<O: Operation<N>, const N: usize>(operation: O, inputs: [Tracked; N]) -> Option<Tracked> {
    let nodes = inputs.each_ref().map(|input| input.node.clone());
    let numbers = inputs.each_ref().map(|input| input.primitive.clone());
    if numbers.iter().any(|numbers| numbers.dtype() != DType::F32) {
        return None;
    }
    let (output, state) = operation.forward(numbers)?;
    // The strategy says what memory-bound operations do; this is none.
    let kind = Recorded(operation)
        .prepare::<NoCheckpointing>(nodes)
        .compute_bound()
        .stateful();
    Some(match kind {
        OpsKind::Tracked(prepared) => prepared.finish(state, output),
        OpsKind::UnTracked(prepared) => prepared.finish(output),
    })
}

/// The tensor as one of autodiff on Flex, if that is what it is.
fn tracked<B: Backend, const D: usize>(tensor: &Tensor<B, D>) -> Option<Tracked> {
    if TypeId::of::<FloatTensor<B>>() != TypeId::of::<Tracked>() {
        return None;
    }
    match tensor.clone().into_primitive() {
        TensorPrimitive::Float(tensor) => downcast(tensor).ok(),
        TensorPrimitive::QFloat(_) => None,
    }
}

/// The numbers of an f32 tensor through which no gradient flows.
fn constant<B: Backend, const D: usize>(tensor: &Tensor<B, D>) -> Option<FlexTensor> {
    let tensor = tracked(tensor)?;
    let usable = !tensor.is_tracked() && tensor.primitive.dtype() == DType::F32;
    usable.then(|| tensor.primitive.to_contiguous())
}

/// The other way; `B` is autodiff on Flex.
fn untyped<B: Backend, const D: usize>(tensor: Tracked) -> Option<Tensor<B, D>> {
    let tensor = downcast(tensor).ok()?;
    Some(Tensor::from_primitive(TensorPrimitive::Float(tensor)))
}

/// A new tensor.
fn flex<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

/// Zeros in the shape of another tensor.
fn shaped_as(values: Vec<f32>, other: &FlexTensor) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, other.layout().shape().clone()))
}
