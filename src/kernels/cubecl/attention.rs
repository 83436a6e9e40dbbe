//! Attention of few queries over blends of stored keys and values, read where they lie: the keys in
//! parts, each with a softmax of its own (arXiv 2205.14135), that a second, short kernel merges.

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
/// Keys of a part: many cubes at long contexts, and shared memory for a score of each.
const KEYS_PER_PART: usize = 256;
/// Keys in shared memory at a time; fewer where it is small.
const TILE: usize = 32;
/// Queries of a kv head, over its whole group, that a cube takes, and reads keys and values once
/// for; fewer where shared memory is small.
const ROWS: usize = 16;
const UNITS: usize = 128;
/// Channels read at once at most: as f32 they are what registers should hold of it.
const MAX_VECTOR: usize = 8;

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
    let dtype = query.dtype();
    if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) || n_queries > FEW {
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
    let keys = terms(&mut queue, keys, dtype)?;
    let values = terms(&mut queue, values, dtype)?;
    let hidden = match &visible.hidden {
        None => None,
        Some(hidden) => Some(queue.input(hidden, [batch, 1, n_queries, n_keys])?),
    };
    let (output, tensor) = queue.output(shape, &query.device(), dtype)?;
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
    #[cfg(test)]
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
        form.slices *= 2;
    }
    Some(form)
}

/// The inputs of terms whose weights are of type `dtype`.
fn terms<R: CubeRuntime, B: Backend>(
    queue: &mut Queue<R>,
    terms: &[Term<B>],
    dtype: DType,
) -> Option<Vec<Inputs>> {
    let inputs = |term| Inputs::of(queue, term, dtype);
    terms.iter().map(inputs).collect()
}

/// A term's tensors.
#[derive(Debug)]
struct Inputs {
    rows: TensorIr,
    scales: Option<TensorIr>,
    weight: Option<TensorIr>,
}

impl Inputs {
    fn of<R: CubeRuntime, B: Backend>(
        queue: &mut Queue<R>,
        term: &Term<B>,
        dtype: DType,
    ) -> Option<Self> {
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
            Some(weight) => match weight.dims() {
                // One for all rows and tokens.
                [1, _, 1, _] if weight.dtype() == dtype => {
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

    fn tensors<R: CubeRuntime>(&self, handles: &mut Handles<R>) -> Tensors<R> {
        let mut get = |ir| tensor(handles, ir);
        Tensors {
            rows: get(&self.rows),
            scales: self.scales.as_ref().map(&mut get),
            weight: self.weight.as_ref().map(&mut get),
        }
    }
}

/// A term's tensors, where they lie.
struct Tensors<R: CubeRuntime> {
    rows: CubeTensor<R>,
    scales: Option<CubeTensor<R>>,
    weight: Option<CubeTensor<R>>,
}

impl<R: CubeRuntime> Tensors<R> {
    fn all(&self) -> impl Iterator<Item = &CubeTensor<R>> {
        self.by_vectors().chain(&self.scales)
    }

    /// Those whose channels are read several at a time.
    fn by_vectors(&self) -> impl Iterator<Item = &CubeTensor<R>> {
        [&self.rows].into_iter().chain(&self.weight)
    }
}

/// How many neighbouring channels of `tensor` can be read at once wherever a row begins.
fn vector_size<R: CubeRuntime>(tensor: &CubeTensor<R>) -> usize {
    let size = tensor.dtype.size();
    let offset = tensor.handle.offset_start.unwrap_or(0) as usize;
    let (channels, rows) = (tensor.meta.shape()[3], &tensor.meta.strides()[..3]);
    let fits = |n: usize| {
        n <= MAX_VECTOR
            && channels.is_multiple_of(n)
            && rows.iter().all(|stride| stride.is_multiple_of(n))
            && offset.is_multiple_of(n * size)
    };
    let mut sizes = tensor.client.io_optimized_vector_sizes(size);
    match tensor.meta.strides()[3] {
        1 => sizes.find(|&n| fits(n)).unwrap_or(1),
        _ => 1,
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

        let parts = (n_keys - self.first_key).div_ceil(self.form.part);
        let shape = Shape::new([batch, n_heads, n_queries, parts, head_dim + 2]);
        let buffer = client.empty(shape.num_elements() * size_of::<f32>());
        let partial = CubeTensor::new_contiguous(
            client.clone(),
            query.device.clone(),
            shape,
            buffer,
            DType::F32,
        );

        let hidden = self.hidden.as_ref().map(|ir| tensor(handles, ir));
        let hidden_type = hidden.as_ref().map_or(DType::U32, |hidden| hidden.dtype);
        let mut tensors = |terms: &[Inputs]| -> Vec<Tensors<R>> {
            terms.iter().map(|term| term.tensors(handles)).collect()
        };
        let (keys, values) = (tensors(&self.keys), tensors(&self.values));
        let sources = || keys.iter().chain(&values);
        let vector = sources().flat_map(Tensors::by_vectors).map(vector_size);
        let vector = vector.min().unwrap_or(1);
        let address = [&query, &output, &partial]
            .into_iter()
            .chain(&hidden)
            .chain(sources().flat_map(Tensors::all))
            .map(CubeTensor::required_address_type)
            .max()
            .unwrap_or_default();
        let sources = |tensors: Vec<Tensors<R>>| {
            let mut sources = SequenceArg::new();
            for tensors in tensors {
                sources.push(SourceLaunch::new(
                    tensors.rows.into_tensor_arg(),
                    tensors.scales.map(CubeTensor::into_tensor_arg).into(),
                    tensors.weight.map(CubeTensor::into_tensor_arg).into(),
                ));
            }
            sources
        };

        let blocks = (n_heads / n_kv_heads * n_queries).div_ceil(rows);
        let dim = CubeDim::new_1d(units as u32);
        let dtype: StorageType = self.query.dtype.into();
        attend_part::launch::<R>(
            &client,
            CubeCount::Static((n_kv_heads * blocks) as u32, batch as u32, parts as u32),
            dim,
            address,
            vector,
            query.into_tensor_arg(),
            sources(keys),
            sources(values),
            hidden.map(CubeTensor::into_tensor_arg).into(),
            partial.clone().into_tensor_arg(),
            self.first_key,
            self.form,
            [dtype, self.stored.into(), hidden_type.into()],
        );
        merge_parts::launch::<R>(
            &client,
            CubeCount::Static((n_heads * n_queries) as u32, batch as u32, 1),
            dim,
            address,
            partial.into_tensor_arg(),
            output.into_tensor_arg(),
            parts,
            head_dim,
            units,
            dtype,
        );
    }
}
