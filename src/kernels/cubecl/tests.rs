//! The kernel against Burn's operations on Flex, over shapes that fill tiles, parts and units, and
//! shapes that do not; on whatever device wgpu finds, and on CUDA's.

use std::cell::Cell;
use std::sync::Arc;
use std::thread;

use burn::module::Module;
use burn::record::{BinBytesRecorder, FullPrecisionSettings, Recorder};
use burn::tensor::{DType, Distribution, Int, Tolerance};
use burn_flex::{Flex, FlexDevice};
use proptest::prelude::*;

use super::*;
use crate::holes::Holes;
use crate::kernels::attention::generic_attention;
use crate::kernels::linear_packed;
use crate::kernels::packed::{Codes, Packed, PackedRows};
use crate::kernels::stored::Stored;
use crate::{CacheDtype, FusedKvDecoder, FusedKvDecoderConfig, KvPlan, Logits, TokenBatch};

thread_local! {
    /// How often this thread was served.
    pub static SERVED: Cell<usize> = const { Cell::new(0) };
}

type Case = (
    Tensor<Flex, 4>,
    Vec<Term<Flex>>,
    Vec<Term<Flex>>,
    Visibility<Flex>,
);

/// A device.
struct On<B: Backend> {
    device: B::Device,
    /// What codes of 8 bits are kept as.
    codes: DType,
    /// How far off products are.
    products: f32,
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<Flex, D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &FlexDevice)
}

/// The first `keys` rows of a tensor that has room for more, as a cache has.
fn stored(dtype: DType, [batch, heads, keys, width]: [usize; 4]) -> Stored<Flex> {
    let x = random([batch, heads, keys + 3, width]);
    Stored::zeros(x.dims(), dtype, &FlexDevice)
        .assign(0, x)
        .narrow(0, keys)
}

impl<B: Backend> On<B> {
    fn floats(&self, x: &Tensor<Flex, 4>) -> Tensor<B, 4> {
        Tensor::from_data(x.to_data(), (&self.device, x.dtype()))
    }

    /// The same, read from the middle of a larger one.
    fn view(&self, x: &Tensor<Flex, 4>) -> Tensor<B, 4> {
        let [batch, heads, keys, width] = x.dims();
        let room = [batch + 1, heads + 1, keys + 7, width];
        let room = Tensor::<B, 4>::ones(room, (&self.device, x.dtype()));
        let place = [1..batch + 1, 0..heads, 0..keys, 0..width];
        room.slice_assign(place.clone(), self.floats(x))
            .slice(place)
    }

    fn term(&self, term: &Term<Flex>) -> Term<B> {
        let source = match &term.source {
            Stored::Float(x) => Stored::Float(self.view(x)),
            Stored::Int8 { codes, scales } => {
                let codes = codes.to_data().convert_dtype(self.codes);
                Stored::Int8 {
                    codes: Tensor::<B, 4, Int>::from_data(codes, (&self.device, self.codes)),
                    scales: self.view(scales),
                }
            }
        };
        let weight = term.weight.as_ref().map(|weight| self.floats(weight));
        Term { source, weight }
    }

    fn terms(&self, terms: &[Term<Flex>]) -> Vec<Term<B>> {
        terms.iter().map(|term| self.term(term)).collect()
    }

    fn found(&self, (query, keys, values, visibility): &Case) -> Option<Tensor<B, 4>> {
        CubeclKernels::attention::<B>(
            &self.floats(query),
            &self.terms(keys),
            &self.terms(values),
            &visibility.on(),
        )
    }
}

/// In f32, whatever the numbers are.
fn expected((query, keys, values, visibility): Case) -> Tensor<Flex, 4> {
    let wide = |terms: Vec<Term<Flex>>| {
        let wide = |term: Term<Flex>| Term {
            weight: term.weight.map(|weight| weight.cast(DType::F32)),
            ..term
        };
        terms.into_iter().map(wide).collect()
    };
    let query = query.cast(DType::F32);
    generic_attention(None, query, wide(keys), wide(values), &visibility, None)
}

fn assert_same<B: Backend>(found: Option<Tensor<B, 4>>, expected: Tensor<Flex, 4>) {
    let found = found.expect("a kernel for few queries");
    // Sums are in f32; a result in fewer bits is rounded once.
    let tolerance = match found.dtype() {
        DType::BF16 => 6e-3,
        DType::F16 => 1e-3,
        _ => 1e-4,
    };
    let found = found.into_data().convert::<f32>();
    let tolerance = Tolerance::<f32>::rel_abs(tolerance, tolerance);
    found.assert_approx_eq(&expected.into_data(), tolerance);
}

/// Batch, kv heads, group, queries, keys, channels, sources of keys and of values, their numbers,
/// whether they have weights, and which keys are hidden: later ones alone, holes, or by a window.
#[derive(Clone, Debug)]
struct Shape {
    batch: usize,
    kv_heads: usize,
    group: usize,
    queries: usize,
    keys: usize,
    width: usize,
    sources: [usize; 2],
    /// Of queries and weights.
    dtype: DType,
    stored: DType,
    weighted: bool,
    hidden: u8,
}

impl Shape {
    fn case(&self) -> Case {
        let &Self {
            batch,
            kv_heads,
            group,
            queries,
            keys,
            width,
            ..
        } = self;
        let term = || Term {
            source: stored(self.stored, [batch, kv_heads, keys, width]),
            weight: (self.weighted).then(|| random([1, kv_heads, 1, width]).cast(self.dtype)),
        };
        let [n_keys, n_values] = self.sources;
        let holes = (0..batch).map(|row| {
            let mut holes = Holes::default();
            let below = keys.saturating_sub(queries);
            holes.push(0..below / (row + 3));
            holes.push(below / 2..below * 2 / 3);
            holes
        });
        let visibility = match self.hidden {
            0 => Visibility::causal(),
            1 => Visibility::new(None, holes.collect(), keys),
            _ => Visibility::new(Some(keys / 3 + 1), Arc::default(), keys),
        };
        (
            random([batch, kv_heads * group, queries, width]).cast(self.dtype),
            (0..n_keys).map(|_| term()).collect(),
            (0..n_values).map(|_| term()).collect(),
            visibility,
        )
    }
}

prop_compose! {
    fn shapes(floats: &'static [DType])(
        batch in 1usize..4,
        kv_heads in 1usize..4,
        group in 1usize..5,
        queries in prop_oneof![Just(1usize), 2usize..17],
        more in prop_oneof![Just(0usize), 1usize..5, 20usize..300, 500usize..600],
        width in prop_oneof![prop::sample::select(vec![32usize, 64, 80, 128]), 1usize..150],
        sources in [1usize..4, 1usize..4],
        dtype in prop::sample::select(floats),
        stored in prop::sample::select([floats, &[DType::I8]].concat()),
        weighted in any::<bool>(),
        hidden in 0u8..3,
    ) -> Shape {
        let keys = queries + more;
        Shape { batch, kv_heads, group, queries, keys, width, sources, dtype, stored, weighted, hidden }
    }
}

/// A shape that decoding has.
const DECODING: Shape = Shape {
    batch: 2,
    kv_heads: 2,
    group: 2,
    queries: 1,
    keys: 40,
    width: 32,
    sources: [2, 2],
    dtype: DType::F32,
    stored: DType::F32,
    weighted: true,
    hidden: 0,
};

/// Logits of a prompt, of single tokens and of a few at once.
fn decoded<B: Backend>(
    model: &FusedKvDecoder<B>,
    dtype: CacheDtype,
    device: &B::Device,
) -> Vec<Vec<f64>> {
    let mut cache = model.new_cache_of(dtype, 2, 64).unwrap();
    let lens = [19, 1, 1, 5, 1, 16, 1, 1];
    let logits = lens.iter().enumerate().map(|(step, &len)| {
        let token = |row: usize, i: usize| ((step * 7 + row * 5 + i * i * 3 + len) % 50) as u32;
        let rows: Vec<Vec<u32>> = (0..2)
            .map(|row| (0..len).map(|i| token(row, i)).collect())
            .collect();
        let batch = TokenBatch::from_rows(&rows, 50, device).unwrap();
        let logits = model
            .forward_cached(batch, &mut cache, Logits::Last)
            .unwrap();
        logits.into_data().iter().collect()
    });
    logits.collect()
}

/// Keys as a decoder makes them, a view whose heads and tokens are swapped of what was just computed:
/// a code is off by half a scale at most, the scale is Flex's, and both widen to what they say, as do
/// some of the rows.
fn assert_rounds_as_on_flex<B: Backend>(on: &On<B>) {
    for shape @ [_, _, _, width] in [
        [3, 19, 1, 16],
        [1, 1, 2, 64],
        [8, 1, 3, 80],
        [2, 33, 4, 32],
        [1, 300, 3, 149],
    ] {
        let x = random(shape);
        let keys = |x: Tensor<Flex, 4>| (x * 1.5 + 0.25).swap_dims(1, 2);
        let (_, scales) = Stored::rounded(keys(x.clone()));
        let computed = (on.floats(&x) * 1.5 + 0.25).swap_dims(1, 2);
        let (found, found_scales) = Stored::rounded(computed);
        let widened = Stored::Int8 {
            codes: found.clone().cast(on.codes),
            scales: found_scales.clone(),
        };
        let tolerance = Tolerance::<f32>::rel_abs(1e-6, 1e-9);
        let last = shape[0] as i32 - 1;
        let rows = [last, 0, last, last / 2];
        let some = widened.clone().select(Tensor::from_data(rows, &on.device));
        let all = widened.clone().float(DType::F32).into_data();
        let all = Tensor::<Flex, 4>::from_data(all, &FlexDevice);
        let rows = Tensor::from_data(rows, &FlexDevice);
        let some = some.float(DType::F32).into_data();
        some.assert_approx_eq(&all.select(0, rows).into_data(), tolerance);
        let found_scales = found_scales.into_data();
        found_scales.assert_approx_eq(&scales.clone().into_data(), tolerance);
        let floats = |data: burn::tensor::TensorData| data.iter::<f32>().collect::<Vec<_>>();
        let x = floats(keys(x).into_data());
        let scales = floats(scales.into_data());
        let codes = floats(found.into_data());
        let widened = floats(widened.float(DType::F32).into_data());
        for (i, (x, code)) in x.iter().zip(&codes).enumerate() {
            let scale = scales[i / width];
            assert!((code * scale - x).abs() <= scale * 0.50001, "{shape:?} {i}");
            assert!(
                (code * scale - widened[i]).abs() <= scale * 1e-4,
                "{shape:?} {i}"
            );
        }
    }
}

/// Matrices of 8 and 4 bits: whole, some rows, rows by their numbers, and transposed.
fn assert_widens_as_on_flex<B: Backend>(on: &On<B>) {
    for (kind, rows, columns) in [
        (Codes::Int8, 24, 64),
        (Codes::Int8, 7, 80),
        (Codes::Int8, 9, 32),
        (Codes::Int8, 12, 8),
        (Codes::Int4, 24, 64),
        (Codes::Int4, 5, 37),
    ] {
        let mut packed = PackedRows::new(kind, rows, columns);
        let numbers = random([rows, columns]).into_data();
        packed.write(numbers.as_slice().unwrap()).unwrap();
        let packed = Packed::<Flex>::new(packed, &FlexDevice);
        let there: Packed<B> = packed.clone().map(
            |codes| {
                let codes = codes.into_data().convert_dtype(on.codes);
                Tensor::from_data(codes, (&on.device, on.codes))
            },
            |floats| {
                let dtype = floats.dtype();
                Tensor::from_data(floats.into_data(), (&on.device, dtype))
            },
        );
        let ids = [rows as i32 - 1, 0, 3, 3, 1];
        let found = there.clone().select(Tensor::from_data(ids, &on.device));
        let expected = packed.clone().select(Tensor::from_data(ids, &FlexDevice));
        let found = (found.widen(DType::F32) * 2.0).into_data();
        let expected = (expected.widen(DType::F32) * 2.0).into_data();
        found.assert_approx_eq(&expected, Tolerance::<f32>::rel_abs(1e-6, 1e-6));
        let some = rows / 3..rows - 1;
        for (found, expected) in [
            (there.clone(), packed.clone()),
            (there.clone().transpose(), packed.clone().transpose()),
            (there.narrow(some.clone()), packed.narrow(some)),
        ] {
            // With something for fusion to go on with: an operation, and products of one row and more.
            let widened = (found.clone().widen(DType::F32) * 2.0).into_data();
            let tolerance = Tolerance::<f32>::rel_abs(1e-6, 1e-6);
            let expected_widened = (expected.clone().widen(DType::F32) * 2.0).into_data();
            widened.assert_approx_eq(&expected_widened, tolerance);
            for seq in [1, 2, 5, 32, 57] {
                let [width, _] = expected.dims();
                let x = random([1, seq, width]);
                let there = Tensor::from_data(x.to_data(), (&on.device, DType::F32));
                let added = linear_packed(there, &found) + 1.0;
                let expected = linear_packed(x, &expected) + 1.0;
                let tolerance = Tolerance::<f32>::rel_abs(on.products, on.products);
                (added.into_data()).assert_approx_eq(&expected.into_data(), tolerance);
            }
        }
    }
}

fn assert_decodes_as_on_flex(device: &DispatchDevice) {
    let recorder = BinBytesRecorder::<FullPrecisionSettings>::new();
    for (plan, dtype) in [
        (KvPlan::Standard, CacheDtype::Model),
        (KvPlan::FusedKv { storage_layers: 2 }, CacheDtype::Model),
        (KvPlan::FusedKv { storage_layers: 2 }, CacheDtype::F16),
        (
            KvPlan::YocoPlusPlus { storage_layers: 2 },
            CacheDtype::Model,
        ),
    ] {
        let config = FusedKvDecoderConfig::new(50, plan)
            .with_hidden_size(48)
            .with_n_layers(4)
            .with_n_heads(4)
            .with_n_kv_heads(2)
            .with_head_dim(32)
            .with_ffn_size(72);
        // Parameters are drawn when they are first used, by a clone anew.
        let drawn = config.init::<Flex>(&FlexDevice).unwrap().into_record();
        let record = recorder.record(drawn, ()).unwrap();
        let reference = config.init::<Flex>(&FlexDevice).unwrap();
        let there = recorder.load(record.clone(), &FlexDevice).unwrap();
        let reference = reference.try_load_record(there).unwrap();
        let model = config.init::<Dispatch>(device).unwrap();
        let there = recorder.load(record, device).unwrap();
        let model = model.try_load_record(there).unwrap();
        let expected = decoded(&reference, dtype, &FlexDevice);
        SERVED.set(0);
        let found = decoded(&model, dtype, device);
        // All but the prompt in every layer, and of the prompt where only its last token is needed.
        assert!(SERVED.get() >= 4 * (expected.len() - 1));
        // A number that lies between two of the cache's may be rounded to either.
        let tolerance = if dtype == CacheDtype::F16 { 2e-3 } else { 1e-4 };
        for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let scale = expected.iter().fold(0f64, |max, x| max.max(x.abs()));
            let off = found
                .iter()
                .zip(expected)
                .map(|(x, y)| (x - y).abs() / scale);
            let off = off.fold(0f64, |max, x| {
                if x.is_nan() {
                    f64::INFINITY
                } else {
                    max.max(x)
                }
            });
            assert!(
                off <= tolerance,
                "{} step {step}: {off:.1e}",
                config.plan.method()
            );
        }
    }
}

/// The tests of one device, in a module of its name; `Dispatch` computes there, and `$named` too.
macro_rules! on {
    ($name:ident, $named:ty, $runtime:ty, $device:expr, $floats:expr, $codes:expr, $products:expr) => {
        mod $name {
            use super::*;

            const FLOATS: &[DType] = &$floats;

            fn dispatch() -> On<Dispatch> {
                On {
                    device: $device.into(),
                    codes: $codes,
                    products: $products,
                }
            }

            proptest! {
                #![proptest_config(ProptestConfig::with_cases(48))]

                #[test]
                fn attention_is_that_of_stock_operations(shape in shapes(FLOATS)) {
                    let case = shape.case();
                    assert_same(dispatch().found(&case), expected(case));
                }
            }

            proptest! {
                #![proptest_config(ProptestConfig::with_cases(8))]

                #[test]
                fn it_is_the_same_without_dispatch(shape in shapes(FLOATS)) {
                    let named = On::<$named> { device: $device, codes: $codes, products: $products };
                    let case = shape.case();
                    assert_same(named.found(&case), expected(case));
                }

                /// As a window needs it: keys before the first are as if they were not there.
                #[test]
                fn no_key_before_the_first_is_seen(shape in shapes(FLOATS), first in 0usize..400) {
                    let shape = Shape { hidden: 0, ..shape };
                    let first_key = first % (shape.keys - shape.queries + 1);
                    let (query, keys, values, visibility) = shape.case();
                    let on = dispatch();
                    let visible = Visible { hidden: None, causal: shape.queries > 1, first_key };
                    let (floats, k, v) = (on.floats(&query), on.terms(&keys), on.terms(&values));
                    let found = attention::<$runtime, _>(&$device, &floats, &k, &v, &visible);
                    let seen = |terms: Vec<Term<Flex>>| terms.into_iter().map(|term| Term {
                        source: term.source.narrow(first_key, shape.keys - first_key),
                        ..term
                    }).collect();
                    assert_same(found, expected((query, seen(keys), seen(values), visibility)));
                }
            }

            /// The numbers of tensors are told by those of their neighbours: other threads come
            /// between.
            #[test]
            fn threads_do_not_take_each_others_tensors() {
                let worker = || {
                    let mut taken = 0;
                    for _ in 0..40 {
                        let case = DECODING.case();
                        if let Some(found) = dispatch().found(&case) {
                            // Something for fusion to do with it.
                            assert_same(Some(found * 2.0), expected(case) * 2.0);
                            taken += 1;
                        }
                    }
                    taken
                };
                let workers: Vec<_> = (0..4).map(|_| thread::spawn(worker)).collect();
                let taken = workers.into_iter().map(|worker| worker.join().unwrap());
                assert!(taken.sum::<usize>() > 0);
            }

            /// Inputs that another thread's queue has still to compute.
            #[test]
            fn inputs_may_be_another_threads() {
                for _ in 0..10 {
                    let (query, keys, values, visibility) = DECODING.case();
                    let on = dispatch();
                    let make = || {
                        let query = on.floats(&query) * 0.5 + 0.25;
                        (query, on.terms(&keys), on.terms(&values))
                    };
                    let made = thread::scope(|scope| scope.spawn(make).join().unwrap());
                    let (found_query, found_keys, found_values) = made;
                    let found = CubeclKernels::attention::<Dispatch>(
                        &found_query,
                        &found_keys,
                        &found_values,
                        &Visibility::causal(),
                    );
                    let case = (query * 0.5 + 0.25, keys, values, visibility);
                    assert_same(found, expected(case));
                }
            }

            #[test]
            fn what_the_kernel_is_not_for_is_left_to_burn() {
                let on = dispatch();
                let many = Shape {
                    queries: 17,
                    ..DECODING
                };
                assert!(on.found(&many.case()).is_none());
                let (query, keys, values, visibility) = DECODING.case();
                let other_type = Shape {
                    stored: DType::F16,
                    ..DECODING
                }
                .case()
                .2
                .remove(0);
                let mixed = vec![values[0].clone(), other_type];
                let mixed = (query.clone(), keys.clone(), mixed, visibility.clone());
                assert!(on.found(&mixed).is_none());
                for weight in [
                    random([2, 2, 1, 32]),
                    random([1, 2, 1, 32]).cast(DType::F16),
                ] {
                    let source = stored(DType::F32, [2, 2, 40, 32]);
                    let term = Term {
                        source,
                        weight: Some(weight),
                    };
                    let case = (
                        query.clone(),
                        vec![term],
                        values.clone(),
                        visibility.clone(),
                    );
                    assert!(on.found(&case).is_none());
                }
                // On another backend.
                let found = CubeclKernels::attention::<Flex>(&query, &keys, &values, &visibility);
                assert!(found.is_none());
            }

            #[test]
            fn eight_bit_caches_are_those_of_flex() {
                assert_rounds_as_on_flex(&dispatch());
            }

            #[test]
            fn packed_weights_are_those_of_flex() {
                assert_widens_as_on_flex(&dispatch());
            }

            #[test]
            fn a_decoder_decodes_as_on_flex() {
                assert_decodes_as_on_flex(&dispatch().device);
            }
        }
    };
}

#[cfg(feature = "wgpu")]
// WGSL has no integers of 8 bits, and no bf16.
on!(
    wgpu,
    burn_wgpu::Wgpu,
    WgpuRuntime,
    burn_wgpu::WgpuDevice::default(),
    [DType::F32, DType::F16],
    DType::I32,
    1e-4
);

#[cfg(feature = "cuda")]
on!(
    cuda,
    burn_cuda::Cuda,
    CudaRuntime,
    burn_cuda::CudaDevice::default(),
    [DType::F32, DType::F16, DType::BF16],
    DType::I8,
    // TF32.
    2e-2
);
