use proptest::prelude::*;
use rand::SeedableRng;

use super::*;

fn sample(logits: &[f32], config: &GenerationConfig, rng: &mut ChaCha8Rng) -> Option<u32> {
    Sampler::default().sample(&mut logits.to_vec(), &[], config, rng)
}

fn drawn(logits: &[f32], config: &GenerationConfig) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut sampler = Sampler::default();
    let mut draw = || sampler.sample(&mut logits.to_vec(), &[], config, &mut rng);
    let mut tokens: Vec<u32> = (0..2000).map(|_| draw().unwrap()).collect();
    tokens.sort_unstable();
    tokens
}

fn distinct(mut tokens: Vec<u32>) -> Vec<u32> {
    tokens.dedup();
    tokens
}

/// Every token that is a number above −∞ with its weight, likeliest first, of equals the smaller
/// id: all sorted, in f64.
fn ranked(logits: &[f32], temperature: f64) -> Vec<(u32, f64)> {
    let mut all: Vec<(u32, f64)> = (0..)
        .zip(logits.iter().map(|&logit| f64::from(logit)))
        .filter(|(_, logit)| *logit > f64::NEG_INFINITY)
        .collect();
    all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap());
    let largest = all.first().map_or(0.0, |first| first.1);
    for (_, logit) in &mut all {
        *logit = ((*logit - largest) / temperature).exp();
    }
    all
}

/// Logits of 1 to 1500 tokens: many or all that are equal, some of probability 0, some that are no
/// number.
fn any_logits() -> impl Strategy<Value = Vec<f32>> {
    let equals = prop_oneof![
        8 => (-3i8..3).prop_map(f32::from),
        1 => Just(-0.0),
        1 => Just(f32::NAN),
        1 => Just(f32::NEG_INFINITY),
    ];
    let logit = prop_oneof![equals.clone(), -30.0f32..10.0];
    let len = prop_oneof![1usize..20, 1usize..1500];
    len.prop_flat_map(move |len| {
        prop_oneof![
            prop::collection::vec(equals.clone(), len),
            prop::collection::vec(logit.clone(), len),
        ]
    })
}

prop_compose! {
    fn any_config()(
        temperature in prop_oneof![8 => 0.05..5.0, 1 => Just(1e-300), 1 => Just(1e300)],
        top_k in prop::option::of(prop_oneof![1usize..10, 1usize..2000]),
        top_p in prop::option::of(prop_oneof![8 => 0.01..1.0, 1 => Just(1.0), 1 => Just(1e-9)]),
    ) -> GenerationConfig {
        GenerationConfig::new().with_temperature(temperature).with_top_k(top_k).with_top_p(top_p)
    }
}

/// Whose difference is too small to be divided by.
#[test]
fn nearly_equal_logits_have_a_nucleus() {
    let config = GenerationConfig::new()
        .with_temperature(1.0)
        .with_top_p(Some(0.7));
    let logits = [1e-37, 0.0, 1e-37, 0.0];
    assert_eq!(distinct(drawn(&logits, &config)), [0, 1, 2]);
}

/// Weights are in single precision.
const ERROR: f64 = 1e-5;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Against all sorted: what may be drawn, with what probability, and that a draw inverts the
    /// cumulative probabilities in the order of ids.
    #[test]
    fn selection_is_sorting(
        logits in any_logits(),
        config in any_config(),
        seed in any::<u64>(),
    ) {
        let mut sampler = Sampler::default();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let token = sampler.sample(&mut logits.clone(), &[], &config, &mut rng);
        let mut ranked = ranked(&logits, config.temperature);
        if ranked.is_empty() {
            prop_assert_eq!(token, None);
            return Ok(());
        }
        ranked.truncate(config.top_k.unwrap_or(usize::MAX));
        let cut = config.top_k.is_some_and(|k| k < logits.len())
            || config.top_p.is_some_and(|p| p < 1.0);
        if cut {
            let kept = sampler.candidates.len();
            let sum = |n: usize| ranked[..n].iter().map(|(_, weight)| weight).sum::<f64>();
            if let Some(p) = config.top_p.filter(|&p| p < 1.0) {
                let mass = p * sum(ranked.len());
                prop_assert!(kept == 1 || sum(kept - 1) < mass * (1.0 + ERROR));
                prop_assert!(sum(kept) > mass * (1.0 - ERROR));
                ranked.truncate(kept);
            }
            ranked.sort_by_key(|(id, _)| *id);
            let found: Vec<u32> = sampler.candidates.iter().map(|c| c.id).collect();
            let expected: Vec<u32> = ranked.iter().map(|(id, _)| *id).collect();
            prop_assert_eq!(found, expected);
            for (found, (_, expected)) in sampler.candidates.iter().zip(&ranked) {
                prop_assert!((found.weight - expected).abs() <= ERROR * expected + 1e-30);
            }
        }
        ranked.sort_by_key(|(id, _)| *id);
        let total: f64 = ranked.iter().map(|(_, weight)| weight).sum();
        let share = ChaCha8Rng::seed_from_u64(seed).random::<f64>();
        let at = ranked.iter().position(|(id, _)| Some(*id) == token).unwrap();
        let below: f64 = ranked[..at].iter().map(|(_, weight)| weight).sum();
        let to = below + ranked[at].1;
        prop_assert!(ranked[at].1 > 0.0);
        prop_assert!(below / total < share + ERROR && share - ERROR < to / total);
    }

    /// At temperature 0 the first of the largest, whatever else is set.
    #[test]
    fn greedy_takes_the_first_largest(logits in any_logits(), config in any_config()) {
        let config = config.with_temperature(0.0);
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let expected = ranked(&logits, 1.0).first().map(|(id, _)| *id);
        prop_assert_eq!(sample(&logits, &config, &mut rng), expected);
    }

    /// What a sampler has drawn before does not matter.
    #[test]
    fn buffers_are_no_memory(
        rows in prop::collection::vec((any_logits(), any_config()), 1..5),
        seed in any::<u64>(),
    ) {
        let mut sampler = Sampler::default();
        for (logits, config) in rows {
            let rng = || ChaCha8Rng::seed_from_u64(seed);
            let again = sampler.sample(&mut logits.clone(), &[], &config, &mut rng());
            prop_assert_eq!(again, sample(&logits, &config, &mut rng()));
        }
    }
}

/// What has no weight is found neither below nor above what has.
#[test]
fn a_share_falls_to_what_has_weight() {
    let weights = [0.0, 1.0, 0.0, 2.0, 0.0];
    let found = |share: f64| find(weights.into_iter(), &mut share.clone());
    assert_eq!([0.0, 0.9, 1.0, 2.9].map(found), [1, 1, 3, 3]);
    assert_eq!(found(3.1), 3, "as rounding may leave it");
}

#[test]
fn frequencies_follow_the_softmax() {
    let config = GenerationConfig::new().with_temperature(2.0);
    let logits = [0.0, 2.0, -1.0];
    let weights = logits.map(|l: f32| (f64::from(l) / 2.0).exp());
    let tokens = drawn(&logits, &config);
    for (token, weight) in (0..).zip(weights) {
        let expected = weight / weights.iter().sum::<f64>();
        let found = tokens.iter().filter(|&&t| t == token).count() as f64 / 2000.0;
        // Four standard deviations of a binomial share.
        let bound = 4.0 * (expected * (1.0 - expected) / 2000.0).sqrt();
        assert!(
            (found - expected).abs() < bound,
            "{token}: {found} for {expected}"
        );
    }
}

#[test]
fn top_k_and_top_p_cut_the_tail() {
    let config = GenerationConfig::new().with_temperature(1.0);
    let logits = [0.0, 1.0, 0.5, -9.0];
    let top_k = config.clone().with_top_k(Some(2));
    assert_eq!(distinct(drawn(&logits, &top_k)), [1, 2]);
    // Token 1 has probability 0.51.
    let top_p = config.clone().with_top_p(Some(0.5));
    assert_eq!(distinct(drawn(&logits, &top_p)), [1]);
    let top_p = config.with_top_p(Some(0.52));
    assert_eq!(distinct(drawn(&logits, &top_p)), [1, 2]);
}

#[test]
fn repetition_penalty_moves_both_signs_down() {
    let mut logits = [2.0, -2.0, 1.0];
    penalise(&mut logits, &[0, 1], 2.0);
    assert_eq!(logits, [1.0, -4.0, 1.0]);
}

#[test]
fn not_a_number_is_never_drawn() {
    let config = GenerationConfig::new().with_temperature(1.0);
    for config in [
        config.clone(),
        config.clone().with_top_k(Some(1)),
        config.clone().with_top_p(Some(0.9)),
    ] {
        assert_eq!(distinct(drawn(&[f32::NAN, 0.0], &config)), [1]);
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for hopeless in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(sample(&[hopeless; 3], &config, &mut rng), None);
        }
        let unbounded = [0.0, f32::INFINITY];
        assert_eq!(sample(&unbounded, &config, &mut rng), None);
    }
}
