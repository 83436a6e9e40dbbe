//! Attention of few queries over blends of stored keys and values, read where they lie: one pass
//! with an online softmax (arXiv 1805.02867, 2205.14135), the keys in parts that a second, short
//! kernel merges.

use burn::tensor::{Bool, DType, Shape, Tensor, backend::Backend};
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::fusion::FusionCubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime};
use burn_fusion::FusionRuntime;
use burn_fusion::stream::Operation;
use burn_ir::{HandleContainer, TensorIr};

use super::kernel::{Form, SourceLaunch, attend_part, merge_parts};
use super::queue::Queue;
use crate::kernels::operands::{Term, Visibility};
use crate::kernels::stored::Stored;

/// Queries per head that the kernel is for: with more, products by a matrix unit win.
const FEW: usize = 16;
/// Keys of a part: a number of cubes at long contexts, and the same sums on every device.
const KEYS_PER_PART: usize = 256;
/// Keys in shared memory at a time; fewer where it is small.
const TILE: usize = 32;
/// Queries of a kv head, over its whole group, that a cube takes, and reads keys and values once
/// for; fewer where shared memory is small.
const ROWS: usize = 16;
const UNITS: usize = 128;

/// [`kernels::attention`](crate::kernels::attention) on a device of `R`, on which `B` computes.
pub(super) fn attention<R: CubeRuntime, B: Backend>(
    device: &R::CubeDevice,
    query: &Tensor<B, 4>,
    keys: &[Term<B>],
    values: &[Term<B>],
    visible: &Visible<B>,
) -> Option<Tensor<B, 4>> {
    let shape @ [batch, n_heads, n_queries, head_dim] = query.dims();
    let [_, n_kv_heads, n_keys, _] = keys[0].source.dims();
    if query.dtype() != DType::F32 || n_queries > FEW {
        return None;
    }
    let form = form::<R>(
        device,
        n_heads / n_kv_heads * n_queries,
        head_dim,
        visible.causal,
    )?;
    let sources = [keys, values].concat();
    let stored = numbers(&sources)?;
    let bindings = |term: &Term<B>| match term {
        Term {
            source: Stored::Float(_),
            weight,
        } => 1 + usize::from(weight.is_some()),
        Term { weight, .. } => 2 + usize::from(weight.is_some()),
    };
    // The query, the mask, the parts, and what the kernel is told of sizes and strides.
    let bindings = 4 + sources.iter().map(bindings).sum::<usize>();
    if bindings > R::client(device).properties().hardware.max_bindings as usize {
        return None;
    }

    let mut queue = Queue::<R>::new(device);
    let query_ir = queue.input(query, shape)?;
    let keys = terms(&mut queue, keys)?;
    let values = terms(&mut queue, values)?;
    let hidden = match &visible.hidden {
        None => None,
        Some(hidden) => Some(queue.input(hidden, [batch, 1, n_queries, n_keys])?),
    };
    let (output, tensor) = queue.output(shape, &query.device(), DType::F32)?;
    let operation = Attention {
        query: query_ir,
        keys,
        values,
        hidden,
        first_key: visible.first_key,
        stored,
        form,
        output: output.clone(),
    };
    queue.register("fusedkv::attention", output, operation);
    #[cfg(all(test, feature = "wgpu"))]
    super::tests::SERVED.set(super::tests::SERVED.get() + 1);
    Some(tensor)
}

/// What a query may see, as the kernel takes it.
pub(super) struct Visible<B: Backend> {
    /// `true` for hidden keys, `[1 or batch, 1, queries, keys]`.
    pub hidden: Option<Tensor<B, 4, Bool>>,
    /// The last query stands at the last key, and no query sees a later key than its own.
    pub causal: bool,
    /// No query sees a key before it.
    pub first_key: usize,
}

impl<B: Backend> Visible<B> {
    /// Of so many queries and keys.
    pub fn of(
        visibility: &Visibility<B>,
        shape @ [queries, keys]: [usize; 2],
        device: &B::Device,
    ) -> Self {
        let causal = visibility.seen.is_causal(keys);
        Self {
            hidden: match causal {
                true => None,
                false => visibility.mask(shape, device),
            },
            causal: causal && queries > 1,
            first_key: visibility.seen.first_key(shape),
        }
    }
}

/// The type of the numbers of all sources, if they are of one kind and type.
fn numbers<B: Backend>(sources: &[Term<B>]) -> Option<DType> {
    let dtype = |term: &Term<B>| match &term.source {
        Stored::Float(x) => x.dtype(),
        Stored::Int8 { codes, .. } => codes.dtype(),
    };
    let first = dtype(&sources[0]);
    sources
        .iter()
        .all(|term| dtype(term) == first)
        .then_some(first)
}

/// How the kernel is compiled for `rows` queries of a kv head, if their `head_dim` channels fit.
fn form<R: CubeRuntime>(
    device: &R::CubeDevice,
    rows: usize,
    head_dim: usize,
    causal: bool,
) -> Option<Form> {
    let client = R::client(device);
    let hardware = &client.properties().hardware;
    let units = UNITS.min(hardware.max_units_per_cube as usize);
    let mut form = Form {
        head_dim,
        rows: rows.min(ROWS).min(units),
        part: KEYS_PER_PART,
        tile: TILE,
        slices: 1,
        units,
        causal,
    };
    while form.shared_bytes() > hardware.max_shared_memory_size {
        match form {
            Form { tile: 9.., .. } => form.tile /= 2,
            Form { rows: 2.., .. } => form.rows /= 2,
            _ => return None,
        }
    }
    // With few queries, several units share a score.
    while form.rows * form.tile * form.slices * 2 <= units {
        let finer = Form {
            slices: form.slices * 2,
            ..form
        };
        if finer.shared_bytes() > hardware.max_shared_memory_size {
            break;
        }
        form = finer;
    }
    Some(form)
}

fn terms<R: CubeRuntime, B: Backend>(
    queue: &mut Queue<R>,
    terms: &[Term<B>],
) -> Option<Vec<Inputs>> {
    terms.iter().map(|term| Inputs::of(queue, term)).collect()
}

/// A term's tensors.
#[derive(Debug)]
struct Inputs {
    rows: TensorIr,
    scales: Option<TensorIr>,
    weight: Option<TensorIr>,
}

impl Inputs {
    fn of<R: CubeRuntime, B: Backend>(queue: &mut Queue<R>, term: &Term<B>) -> Option<Self> {
        let dims @ [batch, n_kv_heads, n_keys, head_dim] = term.source.dims();
        let (rows, scales) = match &term.source {
            Stored::Float(x) => (queue.input(x, dims)?, None),
            Stored::Int8 { codes, scales } => {
                let scales = queue.input(scales, [batch, n_kv_heads, n_keys, 1])?;
                (queue.input(codes, dims)?, Some(scales))
            }
        };
        let weight = match &term.weight {
            None => None,
            Some(weight) => match (weight.dtype(), weight.dims()) {
                // One for all rows and tokens.
                (DType::F32, [1, _, 1, _]) => {
                    Some(queue.input(weight, [1, n_kv_heads, 1, head_dim])?)
                }
                _ => return None,
            },
        };
        Some(Self {
            rows,
            scales,
            weight,
        })
    }

    fn tensors<R: CubeRuntime>(&self, handles: &mut Handles<R>) -> [Option<CubeTensor<R>>; 3] {
        let mut get = |ir| tensor(handles, ir);
        [
            Some(get(&self.rows)),
            self.scales.as_ref().map(&mut get),
            self.weight.as_ref().map(&mut get),
        ]
    }
}

type Handles<R> = HandleContainer<<FusionCubeRuntime<R> as FusionRuntime>::FusionHandle>;

fn tensor<R: CubeRuntime>(handles: &mut Handles<R>, ir: &TensorIr) -> CubeTensor<R> {
    // The backend's element types have no say in it.
    handles.get_float_tensor::<CubeBackend<R, f32, i32, u32>>(ir)
}

/// One call, queued.
#[derive(Debug)]
struct Attention {
    query: TensorIr,
    keys: Vec<Inputs>,
    values: Vec<Inputs>,
    hidden: Option<TensorIr>,
    first_key: usize,
    /// The type of the sources' numbers.
    stored: DType,
    form: Form,
    output: TensorIr,
}

impl<R: CubeRuntime> Operation<FusionCubeRuntime<R>> for Attention {
    fn execute(&self, handles: &mut Handles<R>) {
        let Form {
            head_dim,
            rows,
            units,
            ..
        } = self.form;
        let query: CubeTensor<R> = tensor(handles, &self.query);
        let output: CubeTensor<R> = tensor(handles, &self.output);
        let client = query.client.clone();
        let [batch, n_heads, n_queries, _] = self.query.shape.dims();
        let [_, n_kv_heads, n_keys, _] = self.keys[0].rows.shape.dims();

        let parts = (n_keys - self.first_key).div_ceil(KEYS_PER_PART);
        let shape = Shape::new([batch, n_heads, n_queries, parts, head_dim + 2]);
        let buffer = client.empty(shape.num_elements() * size_of::<f32>());
        let partial = CubeTensor::new_contiguous(
            client.clone(),
            query.device.clone(),
            shape,
            buffer,
            DType::F32,
        );

        let mut largest = [&query, &output, &partial]
            .map(CubeTensor::required_address_type)
            .into_iter()
            .max()
            .unwrap_or_default();
        let hidden = self.hidden.as_ref().map(|ir| tensor(handles, ir));
        let hidden_type = hidden.as_ref().map_or(DType::U32, |hidden| hidden.dtype);
        let mut sources = |terms: &[Inputs]| {
            let mut sources = SequenceArg::new();
            for term in terms {
                let tensors = term.tensors(handles);
                for tensor in tensors.iter().flatten() {
                    largest = largest.max(tensor.required_address_type());
                }
                let [rows, scales, weight] =
                    tensors.map(|tensor| tensor.map(CubeTensor::into_tensor_arg));
                sources.push(SourceLaunch::new(
                    rows.expect("a source has rows"),
                    scales.into(),
                    weight.into(),
                ));
            }
            sources
        };
        let (keys, values) = (sources(&self.keys), sources(&self.values));

        let blocks = (n_heads / n_kv_heads * n_queries).div_ceil(rows);
        let units = CubeDim::new_1d(units as u32);
        attend_part::launch::<R>(
            &client,
            CubeCount::Static((n_kv_heads * blocks) as u32, batch as u32, parts as u32),
            units,
            largest,
            query.into_tensor_arg(),
            keys,
            values,
            hidden.map(CubeTensor::into_tensor_arg).into(),
            partial.clone().into_tensor_arg(),
            self.first_key,
            self.form,
            [self.stored.into(), hidden_type.into()],
        );
        let numbers = batch * n_heads * n_queries * head_dim;
        merge_parts::launch::<R>(
            &client,
            CubeCount::Static(numbers.div_ceil(UNITS) as u32, 1, 1),
            units,
            largest,
            partial.into_tensor_arg(),
            output.into_tensor_arg(),
            parts,
            head_dim,
        );
    }
}
