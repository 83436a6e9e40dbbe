//! Blending post-RoPE keys keeps scores a function of relative position exactly if the weights of
//! a rotated pair are tied.

use burn::tensor::{Distribution, Tensor};
use fusedkv::backend::Flex;
use fusedkv::config::{RopeConfig, RopeScaling};
use fusedkv::decoder::{Rope, RopeAngles, RopeError};
use fusedkv::{
    BlendWeights, FusionInit, KvFusionConfig, KvPart, KvPlan, KvShape, KvSource, Logits, TokenBatch,
};
use proptest::prelude::*;

use crate::models::{F64, VOCAB, difference, model, small};

const SEQ: usize = 5;
const HEADS: usize = 2;

/// Scores of SEQ queries over SEQ blended keys, all at positions `start..`.
fn scores(
    start: usize,
    x: &[Tensor<F64, 4>; 3],
    weights: &[Tensor<F64, 4>],
    theta: f64,
) -> Tensor<F64, 4> {
    let head_dim = x[0].dims()[3];
    let angles = Rope::new(head_dim, RopeConfig::new(theta)).range(start, SEQ, &Default::default());
    let [query, bottom, middle] = x.clone().map(|x| angles.apply(x).unwrap());
    let key = bottom * weights[0].clone() + middle * weights[1].clone();
    query.matmul(key.swap_dims(2, 3))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn tied_pairs_and_only_they_keep_scores_relative(
        pairs in 1usize..5,
        shift in 1usize..190,
        theta in 10.0..1e6,
    ) {
        let device = Default::default();
        let head_dim = 2 * pairs;
        let normal = || Tensor::<F64, 4>::random(
            [1, HEADS, SEQ, head_dim], Distribution::Normal(0.0, 1.0), &device,
        );
        let x = [normal(), normal(), normal()];
        let blend = KvSource::Blend { sources: vec![0, 3], weights: BlendWeights::PerChannel };
        let fusion = KvFusionConfig {
            kv: KvShape { n_kv_heads: HEADS, head_dim, rotary_dim: head_dim },
            key: blend.clone(),
            value: blend,
            init: FusionInit::equal().with_noise(1.0),
        };
        let tied = fusion.init::<F64>(&device).unwrap().weights(KvPart::Key).unwrap();
        let moved = difference(&scores(0, &x, &tied, theta), &scores(shift, &x, &tied, theta));
        prop_assert!(moved < 1e-9, "tied: {moved}");

        // Break the tie: negate the weights of the first pair's second channel.
        let sign = (0..head_dim).map(|j| if j == pairs { -1.0 } else { 1.0 }).collect::<Vec<_>>();
        let sign = Tensor::<F64, 1>::from_floats(sign.as_slice(), &device).unsqueeze::<4>();
        let broken: Vec<_> = tied.iter().map(|w| w.clone() * sign.clone()).collect();
        let moved = difference(&scores(0, &x, &broken, theta), &scores(shift, &x, &broken, theta));
        prop_assert!(moved > 1e-6, "broken: {moved}");
    }

    /// Channel j turns with channel j + head_dim/2, by position · theta^(−2j/head_dim).
    #[test]
    fn rope_rotates_halves(pairs in 1usize..5, position in 0usize..100, theta in 10.0..1e6) {
        let device = Default::default();
        let x = Tensor::<F64, 4>::random([1, 1, 1, 2 * pairs], Distribution::Normal(0.0, 1.0), &device);
        let rope = Rope::new(2 * pairs, RopeConfig::new(theta));
        let values = |t: Tensor<F64, 4>| t.into_data().to_vec::<f64>().unwrap();
        let turned = values(rope.range(position, 1, &device).apply(x.clone()).unwrap());
        let gathered = rope.gather(&[vec![position]], &device).unwrap();
        let gathered = values(gathered.apply(x.clone()).unwrap());
        let x = values(x);
        for j in 0..pairs {
            let angle = position as f64 * theta.powf(-(j as f64) / pairs as f64);
            let (a, b) = (x[j], x[j + pairs]);
            prop_assert!((turned[j] - (a * angle.cos() - b * angle.sin())).abs() < 1e-9);
            prop_assert!((turned[j + pairs] - (b * angle.cos() + a * angle.sin())).abs() < 1e-9);
        }
        prop_assert_eq!(turned, gathered);
    }
}

#[test]
fn positions_and_tensors_that_do_not_fit_are_refused() {
    let rope = Rope::new(8, RopeConfig::new(1e4));
    let device = Default::default();
    let none = rope.gather::<Flex>(&[], &device).unwrap_err();
    assert_eq!(none, RopeError::NoRows);
    let ragged = rope.gather::<Flex>(&[vec![0, 1], vec![0]], &device);
    assert_eq!(
        ragged.unwrap_err(),
        RopeError::Ragged {
            row: 1,
            found: 1,
            expected: 2
        }
    );
    let shape = |angles: &RopeAngles<Flex>, dims| {
        let turned = angles.apply(Tensor::ones(dims, &device));
        turned.map(|turned| turned.dims())
    };
    let angles = rope.range(0, 3, &device);
    assert_eq!(shape(&angles, [5, 1, 3, 8]), Ok([5, 1, 3, 8]));
    for found in [[1, 1, 3, 16], [1, 1, 3, 4], [1, 1, 2, 8], [1, 1, 4, 8]] {
        assert_eq!(
            shape(&angles, found),
            Err(RopeError::Shape {
                found,
                batch: "any".to_owned(),
                seq: 3,
                head_dim: 8
            })
        );
    }
    let rows = rope.gather(&[vec![0], vec![3]], &device).unwrap();
    assert!(shape(&rows, [2, 4, 1, 8]).is_ok());
    assert!(matches!(
        shape(&rows, [3, 4, 1, 8]),
        Err(RopeError::Shape { batch, .. }) if batch == "2"
    ));
}

/// Frequencies that depend on the length of a text are those of all that is read at once, whatever passes it is
/// read in, and of the longest row.
#[test]
fn scaling_by_length_is_the_same_in_every_pass() {
    let long_rope = RopeScaling::LongRope {
        short_factor: vec![1.0, 1.5],
        long_factor: vec![2.0, 6.0],
        attention_factor: 1.2,
        positions: 8,
    };
    let dynamic = RopeScaling::Dynamic {
        factor: 4.0,
        positions: 8,
    };
    for scaling in [long_rope, dynamic] {
        let mut config = small(KvPlan::FusedKv { storage_layers: 2 });
        config.block.rope_scaling = scaling.clone();
        let model = model::<F64>(&config, 7);
        let rows = [(0..20).map(|i| i % 11).collect(), vec![1, 2, 3]];
        let read = |chunk: usize, rows: &[Vec<u32>]| {
            let model = model.clone().with_prefill_chunk(chunk);
            let tokens = TokenBatch::from_rows(rows, VOCAB, &Default::default()).unwrap();
            let mut cache = model.new_cache(rows.len(), 20).unwrap();
            model
                .forward_cached(tokens, &mut cache, Logits::Last)
                .unwrap()
        };
        for rows in [&rows[..1], &rows] {
            let whole = read(1000, rows);
            for chunk in [1, 6, 19] {
                let error = difference(&whole, &read(chunk, rows));
                assert!(error < 1e-9, "{scaling:?}, passes of {chunk}: {error}");
            }
        }
    }
}
