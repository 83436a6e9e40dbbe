//! The kernel against Burn's operations on Flex, over shapes that fill tiles, parts and units, and
//! shapes that do not; on whatever device wgpu finds.

use std::cell::Cell;
use std::sync::Arc;
use std::thread;

use burn::module::Module;
use burn::record::{BinBytesRecorder, FullPrecisionSettings, Recorder};
use burn::tensor::{DType, Distribution, Int, Tolerance};
use burn_flex::{Flex, FlexDevice};
use burn_wgpu::Wgpu;
use proptest::prelude::*;

use super::*;
use crate::holes::Holes;
use crate::kernels::attention::generic_attention;
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

/// A backend that computes on wgpu.
trait OnWgpu: Backend {
    fn device() -> Self::Device;
}

impl OnWgpu for Dispatch {
    fn device() -> DispatchDevice {
        DispatchDevice::Wgpu(Default::default())
    }
}

impl OnWgpu for Wgpu {
    fn device() -> burn_wgpu::WgpuDevice {
        Default::default()
    }
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

fn floats<B: OnWgpu>(x: &Tensor<Flex, 4>) -> Tensor<B, 4> {
    Tensor::from_data(x.to_data(), (&B::device(), x.dtype()))
}

/// The same, read from the middle of a larger one.
fn view<B: OnWgpu>(x: &Tensor<Flex, 4>) -> Tensor<B, 4> {
    let [batch, heads, keys, width] = x.dims();
    let room = [batch + 1, heads + 1, keys + 7, width];
    let room = Tensor::<B, 4>::ones(room, (&B::device(), x.dtype()));
    room.slice_assign([1..batch + 1, 0..heads, 0..keys, 0..width], floats(x))
        .slice([1..batch + 1, 0..heads, 0..keys, 0..width])
}

fn term<B: OnWgpu>(term: &Term<Flex>) -> Term<B> {
    let source = match &term.source {
        Stored::Float(x) => Stored::Float(view(x)),
        Stored::Int8 { codes, scales } => {
            // WGSL has no integers of 8 bits.
            let codes = codes.to_data().convert::<i32>();
            Stored::Int8 {
                codes: Tensor::<B, 4, Int>::from_data(codes, (&B::device(), DType::I32)),
                scales: view(scales),
            }
        }
    };
    let weight = term.weight.as_ref().map(floats);
    Term { source, weight }
}

fn found<B: OnWgpu>((query, keys, values, visibility): &Case) -> Option<Tensor<B, 4>> {
    let terms = |terms: &[Term<Flex>]| terms.iter().map(term).collect::<Vec<_>>();
    let visibility = visibility.on();
    CubeclKernels::attention::<B>(&floats(query), &terms(keys), &terms(values), &visibility)
}

fn expected((query, keys, values, visibility): Case) -> Tensor<Flex, 4> {
    generic_attention(None, query, keys, values, &visibility, None)
}

fn assert_same<B: Backend>(found: Option<Tensor<B, 4>>, expected: Tensor<Flex, 4>) {
    let found = found.expect("a kernel for few queries in f32").into_data();
    let tolerance = Tolerance::<f32>::rel_abs(1e-4, 1e-4);
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
    dtype: DType,
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
            source: stored(self.dtype, [batch, kv_heads, keys, width]),
            weight: self.weighted.then(|| random([1, kv_heads, 1, width])),
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
            random([batch, kv_heads * group, queries, width]),
            (0..n_keys).map(|_| term()).collect(),
            (0..n_values).map(|_| term()).collect(),
            visibility,
        )
    }
}

prop_compose! {
    fn shapes()(
        batch in 1usize..4,
        kv_heads in 1usize..4,
        group in 1usize..5,
        queries in prop_oneof![Just(1usize), 2usize..17],
        more in prop_oneof![Just(0usize), 1usize..5, 20usize..300, 500usize..600],
        width in prop_oneof![prop::sample::select(vec![32usize, 64, 80, 128]), 1usize..150],
        sources in [1usize..4, 1usize..4],
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::I8]),
        weighted in any::<bool>(),
        hidden in 0u8..3,
    ) -> Shape {
        Shape { batch, kv_heads, group, queries, keys: queries + more, width, sources, dtype, weighted, hidden }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn attention_is_that_of_stock_operations(shape in shapes()) {
        let case = shape.case();
        assert_same(found::<Dispatch>(&case), expected(case));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn it_is_the_same_without_dispatch(shape in shapes()) {
        let case = shape.case();
        assert_same(found::<Wgpu>(&case), expected(case));
    }

    /// As a window needs it: keys before the first are as if they were not there.
    #[test]
    fn no_key_before_the_first_is_seen(shape in shapes(), first in 0usize..400) {
        let shape = Shape { hidden: 0, ..shape };
        let first_key = first % (shape.keys - shape.queries + 1);
        let (query, keys, values, visibility) = shape.case();
        let terms = |terms: &[Term<Flex>]| terms.iter().map(term).collect::<Vec<_>>();
        let visible = Visible::<Dispatch> { hidden: None, causal: shape.queries > 1, first_key };
        let device = Default::default();
        let found = attention::<WgpuRuntime, Dispatch>(
            &device, &floats(&query), &terms(&keys), &terms(&values), &visible,
        );
        let seen = |terms: Vec<Term<Flex>>| terms.into_iter().map(|term| Term {
            source: term.source.narrow(first_key, shape.keys - first_key),
            ..term
        }).collect();
        assert_same(found, expected((query, seen(keys), seen(values), visibility)));
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
    weighted: true,
    hidden: 0,
};

/// The numbers of tensors are told by those of their neighbours: other threads come between.
#[test]
fn threads_do_not_take_each_others_tensors() {
    let worker = |_| {
        thread::spawn(|| {
            let mut taken = 0;
            for _ in 0..40 {
                let case = DECODING.case();
                if let Some(found) = found::<Dispatch>(&case) {
                    // Something for fusion to do with it.
                    assert_same(Some(found * 2.0), expected(case) * 2.0);
                    taken += 1;
                }
            }
            taken
        })
    };
    let workers: Vec<_> = (0..4).map(worker).collect();
    let taken: usize = workers
        .into_iter()
        .map(|worker| worker.join().unwrap())
        .sum();
    assert!(taken > 0);
}

/// Inputs that another thread's queue has still to compute.
#[test]
fn inputs_may_be_another_threads() {
    for _ in 0..10 {
        let case = DECODING.case();
        let (query, keys, values, _) = &case;
        let terms = |terms: &[Term<Flex>]| terms.iter().map(term::<Dispatch>).collect::<Vec<_>>();
        let (query, keys, values) = thread::scope(|scope| {
            let made = scope.spawn(|| {
                (
                    floats::<Dispatch>(query) * 0.5 + 0.25,
                    terms(keys),
                    terms(values),
                )
            });
            made.join().unwrap()
        });
        let found =
            CubeclKernels::attention::<Dispatch>(&query, &keys, &values, &Visibility::causal());
        let (query, keys, values, visibility) = case;
        assert_same(
            found,
            expected((query * 0.5 + 0.25, keys, values, visibility)),
        );
    }
}

#[test]
fn what_the_kernel_is_not_for_is_left_to_burn() {
    let many = Shape {
        queries: 17,
        ..DECODING
    };
    assert!(found::<Dispatch>(&many.case()).is_none());
    let (query, keys, values, visibility) = DECODING.case();
    let half = (
        query.clone().cast(DType::F16),
        keys.clone(),
        values.clone(),
        visibility.clone(),
    );
    assert!(found::<Dispatch>(&half).is_none());
    let mixed = vec![
        values[0].clone(),
        Shape {
            dtype: DType::F16,
            ..DECODING
        }
        .case()
        .2
        .remove(0),
    ];
    assert!(found::<Dispatch>(&(query.clone(), keys.clone(), mixed, visibility.clone())).is_none());
    let of_rows = Term {
        source: stored(DType::F32, [2, 2, 40, 32]),
        weight: Some(random([2, 2, 1, 32])),
    };
    let of_rows = (
        query.clone(),
        vec![of_rows],
        values.clone(),
        visibility.clone(),
    );
    assert!(found::<Dispatch>(&of_rows).is_none());
    // On another backend.
    assert!(CubeclKernels::attention::<Flex>(&query, &keys, &values, &visibility).is_none());
}

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

#[test]
fn a_decoder_decodes_as_on_flex() {
    let device = <Dispatch as OnWgpu>::device();
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
        let model = config.init::<Dispatch>(&device).unwrap();
        let there = recorder.load(record, &device).unwrap();
        let model = model.try_load_record(there).unwrap();
        let expected = decoded(&reference, dtype, &FlexDevice);
        SERVED.set(0);
        let found = decoded(&model, dtype, &device);
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
