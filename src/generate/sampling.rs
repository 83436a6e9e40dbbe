//! From logits to a token.

use rand::RngExt;
use rand::rngs::ChaCha8Rng;

use super::GenerationConfig;

/// Draws a token from one row's logits, given the tokens it has so far; none if no logit is a
/// number that can be drawn.
///
/// Repetition penalty first, then temperature, top-k, top-p; at temperature 0 the largest logit,
/// the first of equals.
pub(super) fn sample(
    mut logits: Vec<f32>,
    seen: &[u32],
    config: &GenerationConfig,
    rng: &mut ChaCha8Rng,
) -> Option<u32> {
    penalise(&mut logits, seen, config.repetition_penalty);
    let mut candidates: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&l| f64::from(l))).collect();
    candidates.retain(|(_, logit)| !logit.is_nan());
    // Stable, so that equal logits keep the order of their ids.
    candidates.sort_by(|a, b| b.1.total_cmp(&a.1));
    let &(first, largest) = candidates.first()?;
    if !largest.is_finite() {
        return None;
    }
    if config.temperature == 0.0 {
        return Some(first);
    }
    candidates.truncate(config.top_k.unwrap_or(usize::MAX));
    for (_, logit) in &mut candidates {
        *logit = ((*logit - largest) / config.temperature).exp();
    }
    let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
    let nucleus = nucleus(&candidates, config.top_p.unwrap_or(1.0) * total);
    let candidates = &candidates[..nucleus];
    let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
    let mut rest = rng.random::<f64>() * total;
    for &(token, weight) in candidates {
        rest -= weight;
        if rest < 0.0 {
            return Some(token);
        }
    }
    // Rounding left a trace: it belongs to the last candidate.
    candidates.last().map(|&(token, _)| token)
}

/// Divides the positive and multiplies the negative logits of tokens already there
/// (arXiv 1909.05858).
fn penalise(logits: &mut [f32], seen: &[u32], penalty: f64) {
    if penalty == 1.0 {
        return;
    }
    let penalty = penalty as f32;
    let mut seen = seen.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        let logit = &mut logits[token as usize];
        *logit = if *logit > 0.0 {
            *logit / penalty
        } else {
            *logit * penalty
        };
    }
}

/// How many candidates, most likely first, it takes to reach `mass`; at least one.
fn nucleus(candidates: &[(u32, f64)], mass: f64) -> usize {
    let mut sum = 0.0;
    for (i, (_, weight)) in candidates.iter().enumerate() {
        sum += weight;
        if sum >= mass {
            return i + 1;
        }
    }
    candidates.len()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn drawn(logits: &[f32], seen: &[u32], config: &GenerationConfig) -> Vec<u32> {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut draw = || sample(logits.to_vec(), seen, config, &mut rng).unwrap();
        let mut tokens: Vec<u32> = (0..2000).map(|_| draw()).collect();
        tokens.sort_unstable();
        tokens
    }

    fn distinct(mut tokens: Vec<u32>) -> Vec<u32> {
        tokens.dedup();
        tokens
    }

    #[test]
    fn temperature_zero_takes_the_first_largest() {
        let config = GenerationConfig::new().with_temperature(0.0);
        assert_eq!(distinct(drawn(&[0.0, 2.0, 2.0], &[], &config)), [1]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let config = GenerationConfig::new().with_temperature(2.0);
        let logits = [0.0, 2.0, -1.0];
        let weights = logits.map(|l: f32| (f64::from(l) / 2.0).exp());
        let tokens = drawn(&logits, &[], &config);
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
        assert_eq!(distinct(drawn(&logits, &[], &top_k)), [1, 2]);
        // Token 1 has probability 0.51.
        let top_p = config.clone().with_top_p(Some(0.5));
        assert_eq!(distinct(drawn(&logits, &[], &top_p)), [1]);
        let top_p = config.with_top_p(Some(0.52));
        assert_eq!(distinct(drawn(&logits, &[], &top_p)), [1, 2]);
    }

    #[test]
    fn repetition_penalty_moves_both_signs_down() {
        let mut logits = [2.0, -2.0, 1.0];
        penalise(&mut logits, &[0, 1, 0], 2.0);
        assert_eq!(logits, [1.0, -4.0, 1.0]);
    }

    #[test]
    fn not_a_number_is_never_drawn() {
        let config = GenerationConfig::new().with_temperature(1.0);
        assert_eq!(distinct(drawn(&[f32::NAN, 0.0], &[], &config)), [1]);
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for hopeless in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(sample(vec![hopeless; 3], &[], &config, &mut rng), None);
        }
    }
}
