//! Every kernel against Burn's operations, over shapes that fill vectors, tiles and threads, and
//! shapes that do not.

use std::sync::Arc;

use burn::nn::RmsNormConfig;
use burn::tensor::activation::silu;
use burn::tensor::{BasicOps, DType, Distribution, Tolerance};
use burn_flex::FlexDevice;
use proptest::prelude::*;
#[cfg(target_arch = "x86_64")]
use pulp::x86::{V3, V4};
use pulp::{Scalar, Simd, WithSimd};

use super::*;
use crate::holes::Holes;
use crate::kernels::attention::generic_attention;
use crate::kernels::operands::{Factor, Term, Visibility};
use crate::kernels::packed::{Codes, Packed, PackedRows};
use crate::kernels::stored::Stored;
use crate::numbers::numbers;

fn random<const D: usize>(shape: [usize; D]) -> Tensor<Flex, D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &FlexDevice)
}

fn assert_same<const D: usize>(found: Option<Tensor<Flex, D>>, expected: Tensor<Flex, D>) {
    let found = found.expect("a kernel for f32 on Flex").into_data();
    let tolerance = Tolerance::<f32>::rel_abs(1e-4, 1e-4);
    found.assert_approx_eq(&expected.into_data(), tolerance);
}

/// A matrix in each of the ways that few rows are multiplied with one.
fn factor(format: usize, [input, output]: [usize; 2]) -> Factor<Flex> {
    let weight = random([output, input]);
    match format {
        0 => Factor::Float(random([input, output])),
        1 => Factor::Float(weight.transpose()),
        2 => Factor::Float(weight.cast(DType::F16).transpose()),
        _ => {
            let codes = [Codes::Int8, Codes::Int4][format - 3];
            let mut packed = PackedRows::new(codes, output, input);
            packed.write(&numbers(weight)).unwrap();
            Factor::Packed(Packed::new(packed, &FlexDevice).transpose())
        }
    }
}

fn stored(numbers: u8, dims: [usize; 4]) -> Stored<Flex> {
    // A view into a larger capacity, as a cache has it.
    let [batch, heads, keys, width] = dims;
    let x = random([batch, heads, keys + 3, width]);
    let dtype = [DType::F32, DType::F16, DType::BF16, DType::I8][usize::from(numbers % 4)];
    let stored = Stored::zeros(x.dims(), dtype, &FlexDevice)
        .assign(0, x)
        .narrow(2, keys);
    match (numbers < 4, stored) {
        (true, stored) => stored,
        (false, Stored::Float(x)) => Stored::Float(apart(x)),
        (false, Stored::Int8 { codes, scales }) => Stored::Int8 {
            codes: apart(codes),
            scales: apart(scales),
        },
    }
}

/// The same numbers as a view of rows of twice the width.
fn apart<K: BasicOps<Flex>>(x: Tensor<Flex, 4, K>) -> Tensor<Flex, 4, K> {
    let width = x.dims()[3];
    Tensor::cat(vec![x.clone(), x], 3).narrow(3, 0, width)
}

prop_compose! {
    fn any_attention()(
        batch in 1usize..3,
        kv_heads in 1usize..4,
        group in 1usize..4,
        queries in prop_oneof![1usize..4, 12usize..20, 40usize..110],
        more_keys in prop_oneof![Just(0usize), 1usize..5, 60usize..700],
        width in prop_oneof![1usize..5, 8usize..12, 15usize..18, 31usize..34, 40usize..41],
        n_keys in 1usize..4,
        n_values in 1usize..4,
        // Of each type one behind the other, and apart.
        numbers in 0u8..8,
        weighted in any::<bool>(),
        hidden in 0..2,
        window in prop_oneof![Just(0usize), 1usize..20],
    ) -> [usize; 12] {
        [batch, kv_heads, group, queries, more_keys, 2 * width, n_keys, n_values,
         usize::from(numbers), usize::from(weighted), hidden as usize, window]
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn attention_is_that_of_stock_operations(case in any_attention()) {
        let [batch, kv_heads, group, queries, more, width, n_keys, n_values, numbers, weighted, hidden, window] = case;
        let keys = queries + more;
        let term = || Term {
            source: stored(numbers as u8, [batch, kv_heads, keys, width]),
            weight: (weighted == 1).then(|| random([1, kv_heads, 1, width])),
        };
        let query = random([batch, kv_heads * group, queries, width]);
        let key_terms: Vec<_> = (0..n_keys).map(|_| term()).collect();
        let value_terms: Vec<_> = (0..n_values).map(|_| term()).collect();
        // Holes on the left, and below the queries' own slots, which all hold a token; some slots
        // before the first key are gone.
        let (gone, own) = (3 * window, more);
        let holes = (0..batch).map(|row| {
            let mut holes = Holes::default();
            holes.push(0..(gone + own) / (row + 3));
            holes.push((gone + own) / 2..(gone + own) * 2 / 3);
            holes
        });
        let holes = match hidden {
            0 => Arc::default(),
            _ => holes.collect(),
        };
        let window = (window > 0).then_some(window * window);
        let visibility = Visibility::new(window, holes, gone + keys);
        let found = attention(&query, &key_terms, &value_terms, &visibility);
        let expected = generic_attention(None, query, key_terms, value_terms, &visibility, None);
        assert_same(found, expected);
    }

    #[test]
    fn few_rows_times_a_matrix_are_that_product(
        rows in 1usize..17,
        input in 120usize..700,
        output in 300usize..2100,
        transposed in any::<bool>(),
    ) {
        let x = random([1, rows, input]);
        let weight = match transposed {
            true => random([output, input]).transpose(),
            false => random([input, output]),
        };
        let expected = burn::tensor::module::linear(x.clone(), weight.clone(), None);
        let scale = (input as f64).sqrt().recip();
        let found = linear(&x, &weight).map(|found| found * scale);
        assert_same(found, expected * scale);
    }

    /// Each to the bit what it is by itself, whatever it stands beside.
    #[test]
    fn products_by_several_matrices_are_each_ones(
        rows in 1usize..20,
        input in 1usize..300,
        outputs in prop::collection::vec(1usize..900, 1..4),
        formats in prop::collection::vec(0usize..5, 3),
    ) {
        let x = random([1, rows, input]);
        let weight = |(output, format): (&usize, &usize)| factor(*format, [input, *output]);
        let weights: Vec<_> = outputs.iter().zip(&formats).map(weight).collect();
        let together = crate::kernels::linear_each(&x, &weights);
        prop_assert_eq!(together.len(), weights.len());
        for (found, weight) in together.into_iter().zip(weights) {
            let alone = match weight {
                Factor::Float(weight) => crate::kernels::linear(x.clone(), weight),
                Factor::Packed(weight) => crate::kernels::linear_packed(x.clone(), &weight),
            };
            found.into_data().assert_eq(&alone.into_data(), true);
        }
    }

    /// Each to the bit what it is alone, whatever the others are and how many.
    #[test]
    fn a_rows_products_are_its_own(
        rows in 2usize..17,
        // Of what is worth threads.
        input in prop_oneof![64usize..80, 250usize..340],
        output in prop_oneof![520usize..600, 1025usize..1040, 1300usize..2100],
        format in 0usize..5,
    ) {
        let x = random([1, rows, input]);
        let weights = [factor(format, [input, output])];
        let together = crate::kernels::linear_each(&x, &weights).remove(0);
        for row in 0..rows {
            let x = x.clone().narrow(1, row, 1);
            let alone = crate::kernels::linear_each(&x, &weights).remove(0);
            let found = together.clone().narrow(1, row, 1);
            found.into_data().assert_eq(&alone.into_data(), true);
        }
    }

    /// Widths that do and do not fill a group or a vector, rows on both sides of where tiles begin.
    #[test]
    fn a_matrix_in_fewer_bits_is_multiplied_as_what_it_is(
        rows in prop_oneof![1usize..20, 30usize..70],
        input in prop_oneof![1usize..300, 1000usize..1100],
        output in 1usize..300,
        format in 0usize..4,
    ) {
        let x = random([1, rows, input]);
        let weight = random([output, input]);
        let found = match format {
            0 | 1 => {
                let weight = weight.cast([DType::F16, DType::BF16][format]).transpose();
                let wide = weight.clone().cast(DType::F32);
                (linear(&x, &weight), wide)
            }
            _ => {
                let codes = [Codes::Int8, Codes::Int4][format - 2];
                let mut packed = PackedRows::new(codes, output, input);
                packed.write(&numbers(weight)).unwrap();
                let weight = Packed::new(packed, &FlexDevice).transpose();
                (linear_packed(&x, &weight), weight.widen(DType::F32))
            }
        };
        let expected = burn::tensor::module::linear(x, found.1, None);
        let scale = (input as f64).sqrt().recip();
        assert_same(found.0.map(|found| found * scale), expected * scale);
    }

    /// On both sides of what threads share, of matrices that are transposed, a part of others, or one row
    /// again and again.
    #[test]
    fn products_of_many_rows_are_burns(
        rows in prop_oneof![1usize..20, 100usize..300],
        depth in prop_oneof![1usize..20, 100usize..600],
        columns in prop_oneof![1usize..20, 100usize..300],
        transposed in any::<[bool; 2]>(),
        part in any::<[bool; 2]>(),
        repeated in any::<bool>(),
    ) {
        let operand = |[rows, columns]: [usize; 2], of: usize| {
            let around = if part[of] { 3 } else { 0 };
            let whole = [rows + around, columns + 2 * around];
            let whole = match transposed[of] {
                true => random([whole[1], whole[0]]).transpose(),
                false => random(whole),
            };
            whole.slice([around..around + rows, around..around + columns])
        };
        let x = match repeated {
            true => random([1, depth]).expand([rows, depth]),
            false => operand([rows, depth], 0),
        };
        let weight = operand([depth, columns], 1);
        let scale = (depth as f64).sqrt().recip();
        let found = crate::kernels::matmul(x.clone(), weight.clone()) * scale;
        assert_same(Some(found), x.matmul(weight) * scale);
    }

    #[test]
    fn norms_are_burns(rows in 1usize..200, width in 1usize..400) {
        let mut norm = RmsNormConfig::new(width).with_epsilon(1e-5).init::<Flex>(&FlexDevice);
        norm.gamma = norm.gamma.map(|_| random([width]));
        let x = random([2, rows, width]);
        let found = rms_norm(&x, &norm.gamma.val(), norm.epsilon);
        assert_same(found, norm.forward(x));
    }

    #[test]
    fn swiglu_is_silu_times_up(seq in 1usize..200, width in 1usize..400) {
        // Gates up to a few hundred: e to their power overflows f32.
        let (gate, up) = (random([1, seq, width]) * 90.0, random([1, seq, width]));
        assert_same(swiglu(&gate, &up), silu(gate) * up);
    }

    #[test]
    fn heads_are_exchanged_and_rotated(
        batch in 1usize..3,
        heads in 1usize..5,
        seq in 1usize..200,
        pairs in 1usize..40,
        per_row in any::<bool>(),
    ) {
        let x = random([batch, seq, heads, 2 * pairs]);
        assert_same(swap_heads(&x), x.clone().swap_dims(1, 2));
        let rows = if per_row { batch } else { 1 };
        let (cos, sin) = (random([rows, 1, seq, pairs]), random([rows, 1, seq, pairs]));
        let x = x.swap_dims(1, 2);
        let found = rope(&x, &cos, &sin);
        let low = x.clone().narrow(3, 0, pairs);
        let high = x.narrow(3, pairs, pairs);
        let expected = Tensor::cat(
            vec![
                low.clone() * cos.clone() - high.clone() * sin.clone(),
                high * cos + low * sin,
            ],
            3,
        );
        assert_same(found, expected);
    }
}

/// A matrix that is widened in several tiles, the last of them smaller.
#[test]
fn a_large_matrix_is_widened_in_tiles() {
    let (input, output) = (2100, 2100);
    let (x, weight) = (random([1, 17, input]), random([output, input]));
    let weight = weight.cast(DType::BF16).transpose();
    let expected = burn::tensor::module::linear(x.clone(), weight.clone().cast(DType::F32), None);
    let scale = (input as f64).sqrt().recip();
    let found = linear(&x, &weight).map(|found| found * scale);
    assert_same(found, expected * scale);
}

#[test]
fn other_types_are_left_to_burn() {
    let x = random([1, 4, 300]).cast(DType::F64);
    let weight = random([300, 300]).cast(DType::F64);
    assert!(linear(&x, &weight).is_none());
    assert!(swiglu(&x, &x).is_none());
}

#[test]
fn a_query_that_sees_nothing_gets_numbers() {
    let (query, x) = (random([1, 1, 1, 4]), random([1, 1, 70, 4]));
    let term = || Term {
        source: Stored::Float(x.clone()),
        weight: None,
    };
    let mut all = Holes::default();
    all.push(0..70);
    let visibility = Visibility::new(None, Arc::new([all]), 70);
    let output = attention(&query, &[term()], &[term()], &visibility);
    let output = output.unwrap().into_data();
    assert!(output.iter::<f32>().all(f32::is_finite));
}

proptest! {
    #[test]
    fn rows_are_assigned_in_place_unless_shared(
        batch in 1usize..3,
        heads in 1usize..4,
        width in 1usize..9,
        (seq, start, len) in (2usize..9).prop_flat_map(|seq| (Just(seq), 0..seq))
            .prop_flat_map(|(seq, start)| (Just(seq), Just(start), 1..=seq - start)),
        shared in any::<bool>(),
    ) {
        let target = random([batch, heads, seq, width]);
        let before = target.to_data();
        let rows = random([batch, heads, len, width]);
        let range = [0..batch, 0..heads, start..start + len, 0..width];
        let expected = Tensor::<Flex, 4>::from_data(before.clone(), &FlexDevice)
            .slice_assign(range, rows.clone());
        let address = |x: &Tensor<Flex, 4>| {
            f32_tensor(x).expect("f32 on Flex").storage::<f32>().as_ptr()
        };
        let old = address(&target);
        let fork = shared.then(|| target.clone());
        let Ok(found) = assign_rows((target, rows), start) else {
            panic!("a kernel for Flex")
        };
        prop_assert_eq!(address(&found) == old, !shared);
        prop_assert_eq!(found.to_data(), expected.to_data());
        if let Some(fork) = fork {
            prop_assert_eq!(fork.to_data(), before);
        }
    }
}

/// However many blocks of queries a thread takes together, which is fewer the more threads there are.
#[test]
fn a_querys_attention_is_its_own() {
    let [heads, queries, keys, width] = [4, 500, 700, 24];
    let query = random([1, heads, queries, width]);
    let terms = |numbers| -> Vec<_> {
        let term = |_| Term {
            source: stored(numbers, [1, heads, keys, width]),
            weight: Some(random([1, heads, 1, width])),
        };
        (0..2).map(term).collect()
    };
    let mut holes = Holes::default();
    holes.push(0..130);
    holes.push(170..180);
    let cases: [(_, _, _, Arc<[Holes]>); 2] = [
        (terms(0), terms(0), None, Arc::default()),
        (terms(1), terms(3), Some(150), Arc::from([holes])),
    ];
    for (key, value, window, holes) in cases {
        let [few, many] = [1, 64].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().expect("threads can be started");
            let found = pool.install(|| {
                let visibility = Visibility::new(window, holes.clone(), keys);
                attention(&query, &key, &value, &visibility)
            });
            found.expect("a kernel for f32 on Flex").into_data()
        });
        assert_eq!(few, many);
    }
}

/// Does something by each of the processor's instruction sets, not only the one that is taken.
pub(super) fn by_each_instruction_set(of: impl WithSimd<Output = ()> + Copy) {
    Simd::vectorize(Scalar::new(), of);
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = V3::try_new() {
            Simd::vectorize(simd, of);
        }
        if let Some(simd) = V4::try_new() {
            Simd::vectorize(simd, of);
        }
    }
}

/// What a process of tests may be told to compute by instead of the best the processor has.
const INSTRUCTIONS: &str = "FUSEDKV_TEST_INSTRUCTIONS";

/// Instruction sets of the processor other than the best, by name.
fn lesser_archs() -> Vec<(&'static str, Arch)> {
    match Arch::new() {
        Arch::Scalar => vec![],
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) => {
            let avx2 = V3::try_new().expect("what has AVX-512 has AVX2");
            vec![("avx2", Arch::V3(avx2)), ("scalar", Arch::Scalar)]
        }
        _ => vec![("scalar", Arch::Scalar)],
    }
}

/// The instruction set that this process was told to use.
pub(super) fn lesser_arch() -> Option<Arch> {
    let name = std::env::var(INSTRUCTIONS).ok()?;
    let found = lesser_archs().into_iter().find(|(known, _)| *known == name);
    Some(found.expect("an instruction set of this processor").1)
}

/// The kernels' tests by every other instruction set of the processor, each in a process of its own.
#[test]
fn other_instruction_sets_pass() {
    for (name, _) in lesser_archs() {
        let tests = std::env::current_exe().expect("this program has a path");
        let found = std::process::Command::new(tests)
            .args(["kernels::flex", "--skip", "other_instruction_sets_pass"])
            .env(INSTRUCTIONS, name)
            .output()
            .expect("this program can be run");
        let report = String::from_utf8_lossy(&found.stdout);
        assert!(found.status.success(), "{name}:\n{report}");
        for test in [
            "attention_is_that_of_stock_operations",
            "the_instruction_set_is_the_one_told",
        ] {
            assert!(
                report.contains(&format!("{test} ... ok")),
                "{name}:\n{report}"
            );
        }
    }
}

#[test]
fn the_instruction_set_is_the_one_told() {
    let told = lesser_arch().unwrap_or_default();
    assert_eq!(format!("{:?}", *ARCH), format!("{told:?}"));
}

/// The widest vectors that the processor has and the kernels are compiled for.
#[test]
fn vectors_are_the_processors() {
    #[cfg(target_arch = "x86_64")]
    match Arch::new() {
        Arch::V4(_) => assert!(std::is_x86_feature_detected!("avx512f")),
        Arch::V3(_) => {
            let all = ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"];
            let has = [
                std::is_x86_feature_detected!("avx512f"),
                std::is_x86_feature_detected!("avx512bw"),
                std::is_x86_feature_detected!("avx512cd"),
                std::is_x86_feature_detected!("avx512dq"),
                std::is_x86_feature_detected!("avx512vl"),
            ];
            // benches/without_avx512.sh builds what is not told of them.
            let denied = std::env::var_os("FUSEDKV_WITHOUT_AVX512").is_some();
            let unused = has.iter().all(|&has| has) && !denied;
            assert!(!unused, "{all:?} are there, unused");
        }
        _ => assert!(!std::is_x86_feature_detected!("avx2")),
    }
    #[cfg(target_arch = "aarch64")]
    assert!(matches!(Arch::new(), Arch::Neon(_)));
}
