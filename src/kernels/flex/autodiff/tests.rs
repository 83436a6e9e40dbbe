//! Every operation's output and gradients against those of Burn's operations.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::strategy::{BalancedCheckpointing, CheckpointStrategy};
use burn::tensor::activation::silu;
use burn::tensor::{Distribution, Tolerance};
use burn_flex::FlexDevice;
use proptest::prelude::*;

use super::*;
use crate::holes::Holes;
use crate::kernels::attention::generic_attention;
use crate::kernels::operands::{Term, Visibility};
use crate::kernels::packed::{Codes, Packed, PackedRows};
use crate::kernels::stored::Stored;
use crate::numbers::numbers;

type Train = Autodiff<Flex>;

/// A gradient per input, where there is one.
type Found<const E: usize> = Vec<Option<Tensor<Flex, E>>>;

fn random<const D: usize>(shape: [usize; D]) -> Tensor<Flex, D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &FlexDevice)
}

fn assert_near<const D: usize>(found: Tensor<Flex, D>, expected: Tensor<Flex, D>) {
    let tolerance = Tolerance::<f32>::rel_abs(2e-4, 2e-4);
    found
        .into_data()
        .assert_approx_eq(&expected.into_data(), tolerance);
}

/// The output of new leaves with these numbers, and their gradients where the output's is `seed`.
/// The leaves are new because a backward pass forgets the graph, leaves included.
fn run<const D: usize, const E: usize>(
    inputs: &[Tensor<Flex, E>],
    operation: impl FnOnce(&[Tensor<Train, E>]) -> Tensor<Train, D>,
) -> (Tensor<Flex, D>, impl FnOnce(Tensor<Flex, D>) -> Found<E>) {
    let leaf = |x: &Tensor<Flex, E>| Tensor::from_inner(x.clone()).require_grad();
    let leaves: Vec<_> = inputs.iter().map(leaf).collect();
    let output = operation(&leaves);
    (output.clone().inner(), move |seed| {
        let gradients = (output * Tensor::from_inner(seed)).sum().backward();
        leaves.iter().map(|x| x.grad(&gradients)).collect()
    })
}

/// Both ways give the same output, and the same gradients of the same inputs.
fn assert_same<const D: usize, const E: usize>(
    inputs: &[Tensor<Flex, E>],
    found: impl FnOnce(&[Tensor<Train, E>]) -> Option<Tensor<Train, D>>,
    expected: impl FnOnce(&[Tensor<Train, E>]) -> Tensor<Train, D>,
) {
    let (output, found) = run(inputs, |x| found(x).expect("an operation for f32 on Flex"));
    let seed = random(output.dims());
    let found = found(seed.clone());
    let (expected_output, expected) = run(inputs, expected);
    assert_near(output, expected_output);
    let expected = expected(seed);
    for (found, expected) in found.into_iter().zip(expected) {
        match (found, expected) {
            (Some(found), Some(expected)) => assert_near(found, expected),
            (None, None) => {}
            (found, expected) => panic!("{} or {}", found.is_some(), expected.is_some()),
        }
    }
}

/// Which weights a blend has.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Weights {
    /// None, if there is one source.
    None,
    Scalar,
    PerChannel,
}

/// Terms of the first sources; takes their weights from `weights`.
fn terms<'a>(
    kind: Weights,
    n: usize,
    sources: &[Tensor<Train, 4>],
    weights: &mut impl Iterator<Item = &'a Tensor<Train, 4>>,
) -> Vec<Term<Train>> {
    let terms = sources[..n].iter().map(|source| Term {
        source: Stored::Float(source.clone()),
        weight: match kind {
            Weights::None if n == 1 => None,
            _ => weights.next().cloned(),
        },
    });
    terms.collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn attention_has_the_gradients_of_stock_operations(
        batch in 1usize..3,
        kv_heads in 1usize..4,
        group in 1usize..4,
        queries in prop_oneof![1usize..20, 40usize..110],
        more in prop_oneof![Just(0usize), 1usize..70],
        width in prop_oneof![1usize..5, 8usize..12, 15usize..18, 31usize..34],
        n_keys in 1usize..6,
        n_values in 1usize..4,
        weights in prop::sample::select(vec![Weights::None, Weights::Scalar, Weights::PerChannel]),
        hidden in 0u8..2,
        window in prop_oneof![Just(0usize), 1usize..12],
    ) {
        let width = 2 * width;
        let mut inputs = vec![random([batch, kv_heads * group, queries, width])];
        // Keys and values share sources, as where layers do.
        let n_sources = n_keys.max(n_values);
        inputs.extend((0..n_sources).map(|_| random([batch, kv_heads, queries + more, width])));
        let weight = || match weights {
            Weights::Scalar => random([1, 1, 1, 1]),
            Weights::None | Weights::PerChannel => random([1, kv_heads, 1, width]),
        };
        inputs.extend((0..n_keys + n_values).map(|_| weight()));
        let case = |leaves: &[Tensor<Train, 4>]| {
            let (sources, rest) = leaves[1..].split_at(n_sources);
            let mut rest = rest.iter();
            let keys = terms(weights, n_keys, sources, &mut rest);
            let values = terms(weights, n_values, sources, &mut rest);
            (leaves[0].clone(), keys, values)
        };
        // Holes below the queries' own slots, which all hold a token.
        let holes = (0..batch).map(|row| {
            let mut holes = Holes::default();
            holes.push(0..more / (row + 3));
            holes.push(more / 2..more * 2 / 3);
            holes
        });
        let holes = match hidden {
            0 => Arc::default(),
            _ => holes.collect(),
        };
        let window = (window > 0).then_some(window * window);
        let visibility = Visibility::new(window, holes, queries + more);
        let found = |leaves: &[_]| {
            let (query, keys, values) = case(leaves);
            attention(&query, &keys, &values, &visibility)
        };
        let expected = |leaves: &[_]| {
            let (query, keys, values) = case(leaves);
            generic_attention(None, query, keys, values, &visibility, None)
        };
        assert_same(&inputs, found, expected);
    }

    #[test]
    fn products_have_their_gradients(
        batch in 1usize..4,
        seq in 1usize..40,
        input in 1usize..70,
        output in 1usize..70,
        transposed in any::<bool>(),
    ) {
        let weight = random(if transposed { [1, output, input] } else { [1, input, output] });
        let inputs = [random([1, batch * seq, input]), weight];
        let case = |leaves: &[Tensor<Train, 3>]| {
            let weight = leaves[1].clone().squeeze_dim::<2>(0);
            let weight = if transposed { weight.transpose() } else { weight };
            (leaves[0].clone().reshape([batch, seq, input]), weight)
        };
        let found = |leaves: &[_]| {
            let (x, weight) = case(leaves);
            linear(&x, &weight)
        };
        let expected = |leaves: &[_]| {
            let (x, weight) = case(leaves);
            burn::tensor::module::linear(x, weight, None)
        };
        assert_same(&inputs, found, expected);
    }

    #[test]
    fn products_by_matrices_in_fewer_bits_have_their_gradients(
        seq in 1usize..60,
        input in 1usize..100,
        output in 1usize..100,
        codes in prop::sample::select(vec![Codes::Int8, Codes::Int4]),
    ) {
        let mut rows = PackedRows::new(codes, output, input);
        rows.write(&numbers(random([output, input]))).unwrap();
        let weight = Packed::<Train>::new(rows, &FlexDevice).transpose();
        let wide = weight.clone().widen(DType::F32);
        let inputs = [random([2, seq, input])];
        let scale = (input as f64).sqrt().recip();
        assert_same(
            &inputs,
            |leaves| linear_packed(&leaves[0], &weight).map(|found| found * scale),
            |leaves| burn::tensor::module::linear(leaves[0].clone(), wide, None) * scale,
        );
    }

    #[test]
    fn norms_have_their_gradients(rows in 1usize..200, width in 1usize..200) {
        let inputs = [random([rows, width]), random([1, width])];
        let scale = (rows as f64).sqrt().recip();
        let found = |leaves: &[Tensor<Train, 2>]| {
            let gamma = leaves[1].clone().squeeze_dim::<1>(0);
            rms_norm(&leaves[0], &gamma, 1e-5).map(|normed| normed * scale)
        };
        let expected = |leaves: &[Tensor<Train, 2>]| {
            let x = leaves[0].clone();
            let mean = x.clone().powf_scalar(2.0).mean_dim(1);
            x / (mean + 1e-5).sqrt() * leaves[1].clone() * scale
        };
        assert_same(&inputs, found, expected);
    }

    #[test]
    fn swiglu_has_its_gradients(seq in 1usize..200, width in 1usize..200) {
        let inputs = [random([1, seq, width]), random([1, seq, width])];
        // Gates of which e to their power overflows f32.
        let gate = |leaves: &[Tensor<Train, 3>]| leaves[0].clone() * 40.0;
        assert_same(
            &inputs,
            |leaves| swiglu(&gate(leaves), &leaves[1]),
            |leaves| silu(gate(leaves)) * leaves[1].clone(),
        );
    }

    #[test]
    fn exchanged_and_rotated_heads_have_their_gradients(
        batch in 1usize..3,
        heads in 1usize..5,
        seq in 1usize..100,
        pairs in 1usize..40,
        per_row in any::<bool>(),
    ) {
        let inputs = [random([batch, seq, heads, 2 * pairs])];
        let swap = |leaves: &[Tensor<Train, 4>]| leaves[0].clone().swap_dims(1, 2);
        assert_same(&inputs, |leaves| swap_heads(&leaves[0]), swap);
        let rows = if per_row { batch } else { 1 };
        let table = || Tensor::<Train, 4>::from_inner(random([rows, 1, seq, pairs]));
        let (cos, sin) = (table(), table());
        let expected = |leaves: &[Tensor<Train, 4>]| {
            let low = swap(leaves).narrow(3, 0, pairs);
            let high = swap(leaves).narrow(3, pairs, pairs);
            let turned = vec![
                low.clone() * cos.clone() - high.clone() * sin.clone(),
                high * cos.clone() + low * sin.clone(),
            ];
            Tensor::cat(turned, 3)
        };
        assert_same(&inputs, |leaves| rope(&swap(leaves), &cos, &sin), expected);
    }
}

/// The gradient of a leaf through `norm(x) + x`, where x is computed from it.
fn through<C: CheckpointStrategy>(numbers: &Tensor<Flex, 2>) -> Tensor<Flex, 2> {
    let leaf = Tensor::<Autodiff<Flex, C>, 2>::from_inner(numbers.clone()).require_grad();
    let gamma = Tensor::<Autodiff<Flex, C>, 1>::ones([8], &FlexDevice);
    let x = leaf.clone().exp();
    let normed = rms_norm(&x, &gamma, 1e-5).expect("an operation of every strategy");
    let gradients = (normed + x).powf_scalar(2.0).sum().backward();
    leaf.grad(&gradients).expect("a gradient")
}

#[test]
fn the_strategy_changes_no_gradient() {
    let numbers = random([3, 8]);
    assert_near(
        through::<BalancedCheckpointing>(&numbers),
        through::<NoCheckpointing>(&numbers),
    );
}

#[test]
fn inputs_that_are_not_tracked_get_none() {
    let x = Tensor::<Train, 3>::from_inner(random([1, 4, 8]));
    let weight = Tensor::<Train, 2>::from_inner(random([8, 8])).require_grad();
    let output = linear(&x, &weight).expect("an operation for f32 on Flex");
    let gradients = output.sum().backward();
    assert!(x.grad(&gradients).is_none());
    assert!(weight.grad(&gradients).is_some());
}

#[test]
fn other_types_and_backends_are_left_to_burn() {
    let x = Tensor::<Train, 3>::from_inner(random([1, 4, 8]));
    let double = x.cast(DType::F64);
    assert!(swiglu(&double, &double).is_none());
    let plain = random([1, 4, 8]);
    assert!(swiglu(&plain, &plain).is_none());
}
