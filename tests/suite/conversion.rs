//! Conversion: what is kept, that fits are least squares, and that streams come closer.

use std::iter;

use burn::tensor::Tensor;
use fusedkv::convert::{
    ConversionConfig, ConversionReport, ConvertError, SourceError, Stage, choose_plan, convert,
    convert_fitted, convert_in_stages,
};
use fusedkv::{
    BlendWeights, FusedKvDecoder, KvPart, KvPlan, KvSource, LayerKv, Logits, LoraConfig,
    ScoreConfig, ScoreError, TokenBatch, information_flow, score,
};
use proptest::prelude::*;

use crate::models::{Case, F64, VOCAB, any_case, changed, difference, plans, values};

/// A standard decoder, another plan for it, and a text.
fn any_conversion() -> impl Strategy<Value = (Case, KvPlan)> {
    any_case(8..20).prop_flat_map(|case| {
        let mut case = case.of_one_kind();
        let n_layers = case.config.n_layers;
        case.config.plan = KvPlan::Standard;
        (Just(case), prop::sample::select(plans(n_layers)))
    })
}

/// The keys and values of every layer of a standard decoder, `[layer] -> (keys, values)`, each
/// `[n_kv_heads, seq, head_dim]`.
fn originals(model: &FusedKvDecoder<F64>, tokens: &[u32]) -> Vec<(Vec<f64>, Vec<f64>)> {
    let mut cache = model.new_cache(1, tokens.len()).unwrap();
    let batch = TokenBatch::from_rows(&[tokens], VOCAB, &Default::default()).unwrap();
    model
        .forward_cached(batch, &mut cache, Logits::Last)
        .unwrap();
    (0..model.config().n_layers)
        .map(|layer| {
            let [key, value] = KvPart::BOTH.map(|part| cache.get(part, layer).unwrap());
            (values(&key), values(&value))
        })
        .collect()
}

/// ‖blend − original‖² / ‖original‖² with `weights` `[sources, heads or 1, channels or 1]`.
fn error(
    sources: &[&Vec<f64>],
    original: &[f64],
    weights: &[f64],
    dims: [usize; 3],
    head_dim: usize,
) -> f64 {
    let [_, heads, channels] = dims;
    let per_head = original.len() / heads;
    let (mut off, mut all) = (0.0, 0.0);
    for (i, y) in original.iter().enumerate() {
        // Rotated pairs come first; their second channels lie behind the first ones.
        let (channel, pairs) = (i % head_dim, head_dim - channels);
        let weight = match (channels, channel < pairs) {
            (1, _) => 0,
            (_, true) => channel,
            (_, false) => channel - pairs,
        };
        let weight = i / per_head * channels + weight;
        let blend: f64 = (0..sources.len())
            .map(|s| weights[s * heads * channels + weight] * sources[s][i])
            .sum();
        off += (blend - y).powi(2);
        all += y * y;
    }
    off / all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Storing every layer's keys and values, whatever the plan calls it, nothing changes; where
    /// layers reuse, everything but their keys and values is kept.
    #[test]
    fn what_is_not_shared_is_kept((case, plan) in any_conversion()) {
        let standard = case.model::<F64>();
        let batch = || TokenBatch::from_rows(&case.tokens, VOCAB, &Default::default()).unwrap();
        let same = convert(&standard, &KvPlan::Cla { factor: 1 }).unwrap();
        let logits = |model: &FusedKvDecoder<F64>| model.forward(batch()).unwrap();
        prop_assert!(difference(&logits(&same), &logits(&standard)) < 1e-12);

        // Lite's weights: as the plan that takes the same sources as they are.
        let converted = convert(&standard, &plan).unwrap();
        let layers = converted.layout().layers().iter().enumerate();
        let lite = layers.map(|(i, layer)| {
            let lite = |source: &KvSource, pick: fn(&[usize]) -> usize| match source {
                KvSource::Blend { sources, .. } if pick(sources) == i => KvSource::OWN,
                KvSource::Blend { sources, .. } => KvSource::AsIs(pick(sources)),
                KvSource::Own { .. } => KvSource::OWN,
                other => other.clone(),
            };
            LayerKv {
                key: lite(&layer.key, |sources| *sources.iter().max().unwrap()),
                value: lite(&layer.value, |sources| *sources.iter().min().unwrap()),
            }
        });
        let lite = convert(&standard, &KvPlan::Custom { layers: lite.collect() }).unwrap();
        prop_assert!(difference(&logits(&converted), &logits(&lite)) < 1e-6);
    }

    /// The reported errors are those of the weights, fitting never makes them larger, and moving a
    /// fitted weight does not make them smaller.
    #[test]
    fn fits_are_least_squares((case, plan) in any_conversion(), context in 1usize..30, step in -0.1..0.1) {
        let standard = case.model::<F64>();
        let tokens = &case.tokens[0];
        let context = context.max(tokens.len()); // one window, so that one pass gives all
        let (fitted, fits) = convert_fitted(&standard, &plan, tokens, context).unwrap();
        let originals = originals(&standard, tokens);
        let head_dim = case.config.layer(0).kv.head_dim; // all are of one kind
        for fit in fits {
            let layer = fit.layer;
            prop_assert!(*fitted.layout().layer(layer) != LayerKv::OWN);
            let [key, value] = KvPart::BOTH.map(|part| fitted.layout().sources(part, layer));
            let weights = |part| {
                let name = format!("model.layers.{layer}.self_attn.kv_fusion.{part}_weight");
                fitted.parameter::<3>(&name)
            };
            let parts = [
                (key, fit.key, weights("key"), 0),
                (value, fit.value, weights("value"), 1),
            ];
            for (read, fit, weight, part) in parts {
                let of = |layer: usize| match part {
                    0 => &originals[layer].0,
                    _ => &originals[layer].1,
                };
                let sources: Vec<_> = read.iter().map(|&s| of(s)).collect();
                prop_assert!(fit.after <= fit.before + 1e-9);
                let (weights, dims) = match &weight {
                    Some(weight) => (values(weight), weight.dims()),
                    None => (vec![1.0], [1, 1, 1]),
                };
                let found = error(&sources, of(layer), &weights, dims, head_dim);
                prop_assert!((found - fit.after).abs() < 1e-6, "{} {}", found, fit.after);
                if weight.is_none() {
                    prop_assert_eq!(fit.before, fit.after);
                    continue;
                }
                for i in 0..weights.len() {
                    let mut moved = weights.clone();
                    moved[i] += step;
                    let moved = error(&sources, of(layer), &moved, dims, head_dim);
                    prop_assert!(moved > found - 1e-5, "{} {}", moved, found);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the plan and the block: no layer's stream ends farther from the standard decoder's than
    /// it was, what is reported of the held-out text is its score, the report survives JSON, and the
    /// order of windows does not matter.
    #[test]
    fn streams_come_closer(
        (case, plan) in any_conversion(),
        context in 1usize..9,
        ridge in 0.01f64..30.0,
        turn in 0usize..40,
    ) {
        let standard = case.model::<F64>();
        let text: Vec<u32> = (case.tokens.iter().flatten().cycle()).take(40 * context).copied().collect();
        let held_out = &case.tokens[0];
        let settings = ConversionConfig::new(context).with_ridge(ridge);
        let mut seen = Vec::new();
        let (converted, report) =
            convert_in_stages(&standard, &plan, &text, held_out, &settings, |stage| seen.push(stage.stage))
                .unwrap();
        prop_assert_eq!(seen, [Stage::Weights, Stage::Blends, Stage::Layers]);
        let fitted = &report.stages[2];
        let reused = converted.layout().layers().iter().position(|kv| *kv != LayerKv::OWN);
        let above = reused.map_or(0, |lowest| case.config.n_layers - lowest);
        prop_assert_eq!(fitted.layers.len(), above);
        for layer in &fitted.layers {
            for error in [layer.attention, layer.feed_forward] {
                prop_assert!(error.after >= 0.0 && error.after <= error.before, "{:?}", layer);
            }
        }
        let scored = score(&converted, held_out, &ScoreConfig::new(context)).unwrap().perplexity();
        prop_assert_eq!(fitted.perplexity, Some(scored));
        let read: ConversionReport =
            serde_json::from_str(&serde_json::to_string(&report).unwrap()).unwrap();
        prop_assert_eq!(read, report);

        let mut turned = text.clone();
        turned.rotate_left(turn * context);
        let (other, _) =
            convert_in_stages(&standard, &plan, &turned, &[], &settings, |_| ()).unwrap();
        let batch = || TokenBatch::from_rows(&case.tokens, VOCAB, &Default::default()).unwrap();
        let [a, b] = [&converted, &other].map(|model| model.forward(batch()).unwrap());
        prop_assert!(difference(&a, &b) < 1e-3, "{}", difference(&a, &b));
    }

    /// A beginning of every window is as if the text had it there.
    #[test]
    fn windows_begin_as_they_are_told(
        (case, plan) in any_conversion(),
        context in 1usize..9,
        bos in 0..VOCAB as u32,
    ) {
        let standard = case.model::<F64>();
        let text: Vec<u32> = (case.tokens.iter().flatten().cycle()).take(20 * context).copied().collect();
        let spelled: Vec<u32> = (text.chunks(context))
            .flat_map(|window| iter::once(bos).chain(window.iter().copied()))
            .collect();
        let held_out = &case.tokens[0];
        let settings = ConversionConfig::new(context).with_bos(Some(bos));
        let (told, report) =
            convert_in_stages(&standard, &plan, &text, held_out, &settings, |_| ()).unwrap();
        let settings = ConversionConfig::new(context + 1);
        let (other, _) =
            convert_in_stages(&standard, &plan, &spelled, &[], &settings, |_| ()).unwrap();
        let batch = || TokenBatch::from_rows(&case.tokens, VOCAB, &Default::default()).unwrap();
        let [a, b] = [&told, &other].map(|model| model.forward(batch()).unwrap());
        prop_assert!(difference(&a, &b) < 1e-6, "{}", difference(&a, &b));
        let config = ScoreConfig::new(context).with_bos(Some(bos));
        let scored = score(&told, held_out, &config).unwrap().perplexity();
        prop_assert_eq!(report.stages[2].perplexity, Some(scored));
    }

    /// Of any model a plan is chosen that stores what was asked for, the best of those tried.
    #[test]
    fn a_chosen_plan_stores_its_share(case in any_case(8..20), share in 0.0f64..1.0) {
        let mut case = case;
        case.config.plan = KvPlan::Standard;
        let standard = case.model::<F64>();
        let text: Vec<u32> = (case.tokens.iter().flatten().cycle()).take(200).copied().collect();
        let stored = (share * case.config.n_layers as f64) as usize;
        match choose_plan(&standard, share, &text, &ConversionConfig::new(10)) {
            Ok(choice) => {
                let converted = convert(&standard, &choice.plan).unwrap();
                for part in KvPart::BOTH {
                    prop_assert_eq!(converted.layout().n_stored(part), stored);
                }
                let chosen = choice.tried.iter().find(|tried| tried.plan == choice.plan).unwrap();
                for tried in &choice.tried {
                    prop_assert!(chosen.perplexity <= tried.perplexity);
                }
            }
            Err(error) => {
                let expected = ConvertError::Setting {
                    field: "cache",
                    value: share,
                    expected: "below 1 and enough for a layer of every kind",
                };
                prop_assert_eq!(error, expected);
                // Two kinds at most.
                prop_assert!(stored < 2);
            }
        }
    }
}

/// Windows of several passes, and a last one that is not full.
#[test]
fn how_windows_are_batched_does_not_matter() {
    let standard = crate::models::model::<F64>(&crate::models::fixed(KvPlan::Standard), 5);
    let plan = KvPlan::FusedKv { storage_layers: 2 };
    let text: Vec<u32> = (0..4600u32)
        .map(|i| (i * i / 7 + i) % VOCAB as u32)
        .collect();
    let settings = ConversionConfig::new(20);
    let fitted =
        |text: &[u32]| convert_in_stages(&standard, &plan, text, &[], &settings, |_| ()).unwrap();
    let (whole, report) = fitted(&text);
    let mut turned = text.clone();
    turned.rotate_left(17 * 20);
    let (other, turned) = fitted(&turned);
    let batch = || TokenBatch::from_rows(&[&text[..40]], VOCAB, &Default::default()).unwrap();
    let [a, b] = [&whole, &other].map(|model| model.forward(batch()).unwrap());
    assert!(difference(&a, &b) < 1e-5, "{}", difference(&a, &b));
    for (a, b) in report.stages[2].layers.iter().zip(&turned.stages[2].layers) {
        let (a, b) = (a.feed_forward.after, b.feed_forward.after);
        assert!((a / b - 1.0).abs() < 1e-4, "{a} {b}");
    }
}

/// A decoder whose layer 2 has layer 1's keys and values, each times 2.
fn doubled() -> FusedKvDecoder<F64> {
    let mut config = crate::models::fixed(KvPlan::Standard);
    config.n_layers = 4;
    let standard = crate::models::model::<F64>(&config, 3);
    // Layer 2 computes the same keys and values as layer 1 does: nothing between changes the
    // stream.
    let nothing = |weight: Tensor<F64, 2>| weight * 0.0;
    let standard = changed(standard, "model.layers.1.self_attn.o_proj.weight", nothing);
    let standard = changed(standard, "model.layers.1.mlp.down_proj.weight", nothing);
    let standard = of_lower::<1>(standard, "input_layernorm", |gamma| gamma);
    let standard = of_lower::<2>(standard, "self_attn.k_proj", |weight| weight);
    let standard = of_lower::<1>(standard, "self_attn.k_norm", |gamma| gamma * 2.0);
    of_lower::<2>(standard, "self_attn.v_proj", |weight| weight * 2.0)
}

/// With a weight in layer 2 that is what `change` makes of layer 1's.
fn of_lower<const D: usize>(
    model: FusedKvDecoder<F64>,
    module: &str,
    change: impl FnOnce(Tensor<F64, D>) -> Tensor<F64, D>,
) -> FusedKvDecoder<F64> {
    let [lower, upper] = [1, 2].map(|layer| format!("model.layers.{layer}.{module}.weight"));
    let lower = model.parameter::<D>(&lower).unwrap();
    changed(model, &upper, |_| change(lower))
}

/// A layer that is twice a stored one is fitted by weights of 2.
#[test]
fn a_blend_that_exists_is_found() {
    let standard = doubled();
    let text: Vec<u32> = (0..40).map(|i| i * i % VOCAB as u32).collect();
    for plan in [
        KvPlan::FusedKv { storage_layers: 2 },
        KvPlan::DenseFusion { storage_layers: 2 },
    ] {
        // Windows that the last does not fill.
        let (fitted, fits) = convert_fitted(&standard, &plan, &text, 12).unwrap();
        assert_eq!(fits[0].layer, 2);
        assert!(
            fits[0].key.before > 0.2 && fits[0].value.before > 0.2,
            "{fits:?}"
        );
        assert!(
            fits[0].key.after < 1e-9 && fits[0].value.after < 1e-9,
            "{fits:?}"
        );
        let flow = information_flow(&fitted);
        for layer in [&flow.keys[0], &flow.values[0]] {
            assert_eq!((layer.layer, &layer.sources[..]), (2, &[0, 1][..]));
            assert!(layer.weights[0] < 1e-3, "{layer:?}");
            assert!((layer.weights[1] - 2.0).abs() < 1e-3, "{layer:?}");
        }
    }
}

/// Layer 2 of [`doubled`] alone reads `source`.
fn second_reads(source: KvSource) -> KvPlan {
    let mut layers = vec![LayerKv::OWN; 4];
    layers[2] = LayerKv {
        key: source.clone(),
        value: source,
    };
    KvPlan::Custom { layers }
}

/// Nothing is lost where a plan can give what there was: by its blends, or by what the last projection
/// makes of values that are other combinations of the same.
#[test]
fn a_plan_that_loses_nothing_is_recovered() {
    let text: Vec<u32> = (0..3000u32)
        .map(|i| (i * i / 3 + i) % VOCAB as u32)
        .collect();
    let batch = || TokenBatch::from_rows(&[&text[..30]], VOCAB, &Default::default()).unwrap();
    let mixed = {
        let standard = of_lower::<1>(doubled(), "self_attn.k_norm", |gamma| gamma);
        // Channels of both heads alike, so that a projection can undo it whichever head reads.
        let mix = [[1.0, 0.5, 0.0], [-0.5, 1.0, 0.0], [0.0, 0.3, 2.0]];
        let mix = Tensor::<F64, 2>::from_data(mix, &Default::default());
        let mut whole = Tensor::<F64, 2>::zeros([12, 12], &Default::default());
        for block in 0..4 {
            let range = [3 * block..3 * block + 3, 3 * block..3 * block + 3];
            whole = whole.slice_assign(range, mix.clone());
        }
        of_lower::<2>(standard, "self_attn.v_proj", |weight| weight.matmul(whole))
    };
    let blend = KvSource::Blend {
        sources: vec![0, 1],
        weights: BlendWeights::PerChannel,
    };
    for (standard, source, lost) in [(doubled(), blend, 1e-4), (mixed, KvSource::AsIs(1), 1e-3)] {
        let plan = second_reads(source);
        let settings = ConversionConfig::new(30)
            .with_ridge(1e-3)
            .with_blends(false);
        let (recovered, report) =
            convert_in_stages(&standard, &plan, &text, &[], &settings, |_| ()).unwrap();
        let layer = report.stages[1].layers[0];
        assert!(layer.attention.before > 1e-3, "{layer:?}");
        assert!(
            layer.attention.after < 1e-6 * layer.attention.before,
            "{layer:?}"
        );
        let [a, b, taken] = [&recovered, &standard, &convert(&standard, &plan).unwrap()]
            .map(|model| model.forward(batch()).unwrap());
        assert!(difference(&a, &b) < lost, "{}", difference(&a, &b));
        assert!(
            difference(&taken, &b) > 10.0 * lost,
            "{}",
            difference(&taken, &b)
        );
    }
}

/// A layer whose attention adds nothing goes first, and a layer reads what it can copy without loss.
#[test]
fn what_costs_least_goes_first() {
    let text: Vec<u32> = (0..2000u32)
        .map(|i| (i * i / 3 + i) % VOCAB as u32)
        .collect();
    let choice = choose_plan(&doubled(), 0.75, &text, &ConversionConfig::new(20)).unwrap();
    let found = choice.tried[0].plan.resolve(4).unwrap();
    let stored: Vec<_> = (0..4)
        .filter(|&layer| found.stores(KvPart::Key, layer))
        .collect();
    assert_eq!(stored, [0, 2, 3], "{choice:?}");
    let of = |source| {
        let read = |e: &&SourceError| (e.layer, e.source) == (2, source);
        choice.errors.iter().find(read).unwrap().error
    };
    assert!(of(1) < 1e-6 * of(0), "{choice:?}");
}

/// Random weights are drawn late; a conversion has the same ones all the same.
#[test]
fn weights_not_yet_drawn_are_shared() {
    let config = crate::models::fixed(KvPlan::Standard);
    let standard = config.init::<F64>(&Default::default()).unwrap();
    let same = convert(&standard, &KvPlan::Cla { factor: 1 }).unwrap();
    let batch = || TokenBatch::from_rows(&[[1, 2, 3]], VOCAB, &Default::default()).unwrap();
    let (a, b) = (
        standard.forward(batch()).unwrap(),
        same.forward(batch()).unwrap(),
    );
    assert_eq!(difference(&a, &b), 0.0);
}

#[test]
fn what_cannot_be_converted_is_said() {
    let standard = crate::models::model::<F64>(&crate::models::fixed(KvPlan::Standard), 0);
    let plan = KvPlan::FusedKv { storage_layers: 2 };
    let fused = convert(&standard, &plan).unwrap();
    assert_eq!(
        convert(&fused, &plan).unwrap_err(),
        ConvertError::NotStandard { method: "fused_kv" }
    );
    let adapted = standard
        .clone()
        .with_lora(&LoraConfig::new(2, 2.0))
        .unwrap();
    assert_eq!(convert(&adapted, &plan).unwrap_err(), ConvertError::Adapted);
    let error = convert(&standard, &KvPlan::Yoco { storage_layers: 4 }).unwrap_err();
    assert!(matches!(error, ConvertError::Config(_)), "{error}");
    let fails =
        |tokens: &[u32], context| convert_fitted(&standard, &plan, tokens, context).unwrap_err();
    for context in [0, 65] {
        let expected = ConvertError::Context {
            context,
            max_positions: 64,
        };
        assert_eq!(fails(&[1, 2], context), expected);
    }
    for tokens in [&[][..], &[99]] {
        let error = fails(tokens, 8);
        assert!(matches!(error, ConvertError::Forward(_)), "{error}");
    }

    let staged = |text: &[u32], held_out: &[u32], settings: &ConversionConfig| {
        convert_in_stages(&standard, &plan, text, held_out, settings, |_| ()).unwrap_err()
    };
    let settings = ConversionConfig::new(8);
    for ridge in [0.0, -1.0, f64::INFINITY] {
        let expected = ConvertError::Setting {
            field: "ridge",
            value: ridge,
            expected: "a number above 0",
        };
        assert_eq!(staged(&[1, 2], &[], &settings.with_ridge(ridge)), expected);
    }
    assert_eq!(
        staged(&[1, 2], &[1], &settings),
        ConvertError::Score(ScoreError::TooFewTokens(1))
    );
    assert!(matches!(
        staged(&[], &[], &settings),
        ConvertError::Forward(_)
    ));
    // A beginning takes a position.
    let whole = ConversionConfig::new(64).with_bos(Some(1));
    let too_long = ConvertError::Context {
        context: 64,
        max_positions: 63,
    };
    assert_eq!(staged(&[1, 2], &[], &whole), too_long);
    for cache in [0.2, 1.0, -1.0, f64::INFINITY] {
        let expected = ConvertError::Setting {
            field: "cache",
            value: cache,
            expected: "below 1 and enough for a layer of every kind",
        };
        assert_eq!(
            choose_plan(&standard, cache, &[1, 2], &settings).unwrap_err(),
            expected
        );
    }
}
