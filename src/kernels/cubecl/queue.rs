//! Tensors as fusion's queue of operations knows them.
//!
//! Burn's GPU backends queue operations, which run when somebody reads a result. A kernel of our own
//! goes into the same queue, so that it runs after what computes its inputs, and for that it needs
//! their numbers ([`TensorId`]). `Dispatch` has its tensors' in a private field; there is no way to
//! the tensor inside (docs/decisions/cubecl-attention.md). But every operation on a tensor gives its
//! result the next number of a counter of the process, which anybody may ask for a number: where two
//! of ours are two apart, the one between them is the operation's.

use std::any::Any;

use burn::tensor::{BasicOps, DType, Tensor, backend::Backend};
use burn_cubecl::CubeRuntime;
use burn_cubecl::fusion::FusionCubeRuntime;
use burn_fusion::client::GlobalFusionClient;
use burn_fusion::stream::{Operation, OperationStreams};
use burn_ir::{CustomOpIr, OperationIr, TensorId, TensorIr, TensorStatus};

/// How often other threads may come between before a tensor's number counts as unknown.
const ATTEMPTS: usize = 16;

/// The queue of one device, and the tensors of an operation about to join it.
pub(super) struct Queue<R: CubeRuntime> {
    client: GlobalFusionClient<FusionCubeRuntime<R>>,
    inputs: Vec<TensorIr>,
    /// They must not be dropped before the operation is queued.
    kept: Vec<Box<dyn Any>>,
}

impl<R: CubeRuntime> Queue<R> {
    pub fn new(device: &R::CubeDevice) -> Self {
        Self {
            client: GlobalFusionClient::load(device),
            inputs: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// An input, expanded to `shape`.
    pub fn input<B: Backend, K: BasicOps<B> + 'static>(
        &mut self,
        tensor: &Tensor<B, 4, K>,
        shape: [usize; 4],
    ) -> Option<TensorIr> {
        // A view, made on this thread: the queue of a thread that made the tensor is waited for.
        let (id, view) = self.numbered(|| tensor.clone().expand(shape))?;
        let ir = TensorIr {
            id,
            shape: shape.into(),
            status: TensorStatus::ReadOnly,
            dtype: view.dtype(),
        };
        self.kept.push(Box::new(view));
        self.inputs.push(ir.clone());
        Some(ir)
    }

    /// A float tensor for an operation to write.
    pub fn output<B: Backend>(
        &self,
        shape: [usize; 4],
        device: &B::Device,
        dtype: DType,
    ) -> Option<(TensorIr, Tensor<B, 4>)> {
        let (id, tensor) = self.numbered(|| Tensor::<B, 4>::empty(shape, (device, dtype)))?;
        let ir = TensorIr {
            id,
            shape: shape.into(),
            status: TensorStatus::ReadOnly,
            dtype,
        };
        Some((ir, tensor))
    }

    /// Queues an operation on the inputs, which writes what the tensor `output` has.
    pub fn register(
        self,
        name: &'static str,
        output: TensorIr,
        operation: impl Operation<FusionCubeRuntime<R>> + 'static,
    ) {
        let output = TensorIr {
            status: TensorStatus::NotInit,
            ..output
        };
        let ir = CustomOpIr::new(name, &self.inputs, &[output]);
        let streams = OperationStreams::default();
        let outputs = self
            .client
            .register(streams, OperationIr::Custom(ir), operation);
        // A second tensor of the output's number: dropping it would free what the first one has.
        for output in outputs {
            output.into_ir();
        }
    }

    /// What `make` returns, a tensor that one operation makes, and its number.
    fn numbered<T>(&self, make: impl Fn() -> T) -> Option<(TensorId, T)> {
        (0..ATTEMPTS).find_map(|_| {
            let before = self.client.create_empty_handle().value();
            let tensor = make();
            let after = self.client.create_empty_handle().value();
            (after == before + 2).then(|| (TensorId::new(before + 1), tensor))
        })
    }
}
