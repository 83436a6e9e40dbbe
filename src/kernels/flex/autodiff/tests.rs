//! Every operation's output and gradients against those of Burn's operations.

use burn::backend::autodiff::checkpoint::strategy::{BalancedCheckpointing, CheckpointStrategy};
use burn::nn::{RmsNorm, RmsNormConfig};
use burn::tensor::activation::silu;
use burn::tensor::{Distribution, Int, Tolerance};
use burn_flex::FlexDevice;
use proptest::prelude::*;

use super::*;
use crate::decoder::attend::{Term, Visibility, attend_with_stock_operations};
use crate::decoder::kv::Stored;

type Train = Autodiff<Flex>;

fn random<const D: usize>(shape: [usize; D]) -> Tensor<Flex, D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &FlexDevice)
}

fn leaf<const D: usize>(shape: [usize; D]) -> Tensor<Train, D> {
    Tensor::from_inner(random(shape)).require_grad()
}

fn assert_near<const D: usize>(found: Tensor<Flex, D>, expected: Tensor<Flex, D>) {
    let tolerance = Tolerance::<f32>::rel_abs(2e-4, 2e-4);
    found
        .into_data()
        .assert_approx_eq(&expected.into_data(), tolerance);
}

/// Gradients of `inputs`, where the output's is `seed`.
fn gradients<const D: usize, const E: usize>(
    output: Tensor<Train, D>,
    seed: &Tensor<Flex, D>,
    inputs: &[Tensor<Train, E>],
) -> Vec<Option<Tensor<Flex, E>>> {
    let gradients = (output * Tensor::from_inner(seed.clone())).sum().backward();
    inputs.iter().map(|x| x.grad(&gradients)).collect()
}

/// Both ways give the same output, and the same gradients of the same inputs. What lies between
/// inputs and operations belongs into both: a backward pass forgets it.
fn assert_same<const D: usize, const E: usize>(
    found: impl FnOnce() -> Option<Tensor<Train, D>>,
    expected: impl FnOnce() -> Tensor<Train, D>,
    inputs: &[Tensor<Train, E>],
) {
    let (found, expected) = (found(), expected());
    let found = found.expect("an operation for f32 on Flex");
    assert_near(found.clone().inner(), expected.clone().inner());
    let seed = random(expected.dims());
    let found = gradients(found, &seed, inputs);
    let expected = gradients(expected, &seed, inputs);
    for (found, expected) in found.into_iter().zip(expected) {
        match (found, expected) {
            (Some(found), Some(expected)) => assert_near(found, expected),
            (None, None) => {}
            (found, expected) => panic!("{} or {}", found.is_some(), expected.is_some()),
        }
    }
}

/// Queries, sources of keys and values, and weights.
struct Case {
    query: Tensor<Train, 4>,
    keys: Vec<Term<Train>>,
    values: Vec<Term<Train>>,
    inputs: Vec<Tensor<Train, 4>>,
}

/// Sources 0 and 1 of the values are those of the keys, as where layers share them.
fn case(dims: [usize; 5], more: usize, n_keys: usize, n_values: usize, weights: u8) -> Case {
    let [batch, kv_heads, group, queries, width] = dims;
    let query = leaf([batch, kv_heads * group, queries, width]);
    let mut inputs = vec![query.clone()];
    let sources: Vec<_> = (0..n_keys.max(n_values))
        .map(|_| leaf([batch, kv_heads, queries + more, width]))
        .collect();
    inputs.extend(sources.clone());
    let mut terms = |n: usize| -> Vec<_> {
        let terms = sources[..n].iter().map(|source| {
            let weight = match weights {
                0 if n == 1 => None,
                1 => Some(leaf([1, 1, 1, 1])),
                _ => Some(leaf([1, kv_heads, 1, width])),
            };
            inputs.extend(weight.clone());
            Term {
                source: Stored::Float(source.clone()),
                weight,
            }
        });
        terms.collect()
    };
    let (keys, values) = (terms(n_keys), terms(n_values));
    Case {
        query,
        keys,
        values,
        inputs,
    }
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
        weights in 0u8..3,
        hidden in 0u8..3,
    ) {
        let dims = [batch, kv_heads, group, queries, 2 * width];
        let Case { query, keys, values, inputs } = case(dims, more, n_keys, n_values, weights);
        let visibility = match hidden {
            0 => Visibility::All,
            1 => Visibility::Causal,
            _ => {
                // Every query sees the last key at least.
                let seen = Tensor::<Flex, 4>::zeros([batch, 1, queries, 1], &FlexDevice);
                let others = random([batch, 1, queries, queries + more - 1]);
                let all = Tensor::cat(vec![others, seen], 3).greater_elem(0.5);
                Visibility::Except(Tensor::from_inner(all))
            }
        };
        let found = || attention(&query, &keys, &values, &visibility);
        let (q, k, v) = (query.clone(), keys.clone(), values.clone());
        let expected = || attend_with_stock_operations(None, q, k, v, &visibility);
        assert_same(found, expected, &inputs);
    }

    #[test]
    fn products_have_their_gradients(
        batch in 1usize..4,
        seq in 1usize..40,
        input in 1usize..70,
        output in 1usize..70,
        transposed in any::<bool>(),
    ) {
        let x = leaf([1, batch * seq, input]);
        let stored = leaf(if transposed { [output, input] } else { [input, output] });
        let inputs = || {
            let weight = stored.clone();
            let weight = if transposed { weight.transpose() } else { weight };
            (x.clone().reshape([batch, seq, input]), weight)
        };
        let found = || {
            let (x, weight) = inputs();
            linear(&x, &weight)
        };
        let expected = || {
            let (x, weight) = inputs();
            burn::tensor::module::linear(x, weight, None)
        };
        assert_same(found, expected, std::slice::from_ref(&x));
        assert_same(found, expected, std::slice::from_ref(&stored));
    }

    #[test]
    fn norms_have_their_gradients(rows in 1usize..200, width in 1usize..200) {
        let mut norm: RmsNorm<Train> = RmsNormConfig::new(width).init(&FlexDevice);
        norm.gamma = norm.gamma.map(|_| leaf([width]));
        let (x, gamma) = (leaf([2, rows, width]), norm.gamma.val());
        let scale = (rows as f64).sqrt().recip();
        let found = || rms_norm(&x, &gamma, norm.epsilon).map(|found| found * scale);
        let expected = || norm.forward(x.clone()) * scale;
        assert_same(found, expected, std::slice::from_ref(&x));
        assert_same(found, expected, std::slice::from_ref(&gamma));
    }

    #[test]
    fn swiglu_has_its_gradients(seq in 1usize..200, width in 1usize..200) {
        let inputs = [leaf([1, seq, width]), leaf([1, seq, width])];
        let [gate, up] = &inputs;
        // Gates of which e to their power overflows f32.
        let gate = || gate.clone() * 40.0;
        assert_same(|| swiglu(&gate(), up), || silu(gate()) * up.clone(), &inputs);
    }

    #[test]
    fn exchanged_and_rotated_heads_have_their_gradients(
        batch in 1usize..3,
        heads in 1usize..5,
        seq in 1usize..100,
        pairs in 1usize..40,
        per_row in any::<bool>(),
    ) {
        let inputs = [leaf([batch, seq, heads, 2 * pairs])];
        let x = inputs[0].clone();
        assert_same(|| swap_heads(&x), || x.clone().swap_dims(1, 2), &inputs);
        let rows = if per_row { batch } else { 1 };
        let table = || Tensor::<Train, 4>::from_inner(random([rows, 1, seq, pairs]));
        let (cos, sin) = (table(), table());
        let x = || x.clone().swap_dims(1, 2);
        let expected = || {
            let low = x().narrow(3, 0, pairs);
            let high = x().narrow(3, pairs, pairs);
            let turned = vec![
                low.clone() * cos.clone() - high.clone() * sin.clone(),
                high * cos.clone() + low * sin.clone(),
            ];
            Tensor::cat(turned, 3)
        };
        assert_same(|| rope(&x(), &cos, &sin), expected, &inputs);
    }

    #[test]
    fn cross_entropy_has_its_gradients(
        targets in prop::collection::vec(0usize..150, 1..60),
        more in 0usize..40,
    ) {
        let inputs = [leaf([targets.len(), 150 + more])];
        let ids: Vec<i64> = targets.iter().map(|id| *id as i64).collect();
        let ids = Tensor::<Train, 1, Int>::from_data(&ids[..], &FlexDevice).unsqueeze_dim(1);
        // Far apart: exponentials of some overflow.
        let logits = || inputs[0].clone() * 50.0;
        let expected = || {
            let log_softmax = burn::tensor::activation::log_softmax(logits(), 1);
            log_softmax.gather(1, ids.clone()).neg()
        };
        assert_same(|| cross_entropy(&logits(), &ids), expected, &inputs);
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
    let weight = leaf([8, 8]);
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
