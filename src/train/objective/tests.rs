//! A step's losses and gradients against autodiff of the loss as it is written, all logits at once.

use std::sync::Arc;

use burn::backend::Autodiff;
use burn::module::{AutodiffModule, Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Distribution, Int, Tensor};
use burn_flex::{Flex, FlexDevice};
use burn_train::TrainStep;
use proptest::prelude::*;

use super::*;
use crate::convert::convert;
use crate::train::TargetMask;
use crate::train::small_decoder;
use crate::train::trainable::{Trainable, choose};
use crate::{FusedKvDecoder, FusedKvDecoderConfig, KvPlan};

type Train = Autodiff<Flex>;
type Model = FusedKvDecoder<Train>;

const BATCH: [usize; 2] = [2, 9];

fn batch(vocab_size: usize, masked: bool) -> LanguageBatch<Train> {
    let ids = |_| {
        let below = Distribution::Uniform(0.0, vocab_size as f64);
        Tensor::<Train, 2, Int>::random(BATCH, below, &FlexDevice)
    };
    let [tokens, targets] = [0, 1].map(ids);
    let counts = Tensor::<Train, 2>::random(BATCH, Distribution::Bernoulli(0.5), &FlexDevice);
    let mask = masked.then(|| TargetMask {
        targets: counts.clone().sum().into_scalar() as usize,
        weights: counts,
        divisor: 7.0,
    });
    LanguageBatch {
        tokens,
        targets,
        mask,
    }
}

/// The gradients of the loss, written out.
fn expected(
    model: &Model,
    batch: &LanguageBatch<Train>,
    teacher: Option<(&FusedKvDecoder<Flex>, Distillation, Vec<usize>)>,
) -> GradientsParams {
    let of = |logits: Tensor<Train, 3>, t: f64| log_softmax(logits / t, 2);
    let mut own_streams = Vec::new();
    let states = model.states(batch.tokens.clone(), None, &mut |_, x| {
        own_streams.push(x.clone())
    });
    let logits = model.logits(states.unwrap());
    let targets = batch.targets.clone().unsqueeze_dim(2);
    let mut losses = of(logits.clone(), 1.0).gather(2, targets).neg();
    let weights = match &batch.mask {
        Some(mask) => mask.weights.clone() / mask.divisor,
        None => Tensor::ones(BATCH, &FlexDevice) / (BATCH[0] * BATCH[1]) as f64,
    };
    if let Some((teacher, config, layers)) = teacher {
        let mut streams = Vec::new();
        let tokens = batch.tokens.clone().inner();
        let states = teacher.states(tokens, None, &mut |_, x| streams.push(x.clone()));
        let t = config.temperature;
        let from = of(Tensor::from_inner(teacher.logits(states.unwrap())), t);
        let divergence = (from.clone().exp() * (from - of(logits, t))).sum_dim(2);
        let c = config.target_share;
        losses = losses * c + divergence * ((1.0 - c) * t * t);
        for &layer in &layers {
            let (s, t) = (
                own_streams[layer].clone(),
                Tensor::from_inner(streams[layer].clone()),
            );
            let error = (s - t.clone()).square().sum_dim(2) / t.square().sum_dim(2);
            losses = losses + error * (config.hidden_weight / layers.len() as f64);
        }
    }
    let loss = (losses * weights.unsqueeze_dim(2)).sum();
    GradientsParams::from_grads(loss.backward(), model)
}

/// Compares all gradients of a model.
struct Same<'g>([&'g GradientsParams; 2], usize);

impl ModuleVisitor<Train> for Same<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
        let [found, expected] = self.0.map(|grads| grads.get::<Flex, D>(param.id));
        assert_eq!(found.is_some(), param.is_require_grad());
        let (Some(found), Some(expected)) = (found, expected) else {
            return;
        };
        let scale = expected.clone().abs().max().into_scalar();
        let error = (found - expected).abs().max().into_scalar();
        assert!(
            error <= 1e-3 * scale + 1e-6,
            "{error} {scale} {:?}",
            param.dims()
        );
        self.1 += 1;
    }
}

fn check(model: &Model, lesson: Lesson<Train>, expected: &GradientsParams) {
    let output = model.step(lesson);
    let mut same = Same([&output.grads, expected], 0);
    model.visit(&mut same);
    assert!(same.1 > 0);
}

fn untrained(tied: bool, softcap: Option<f64>) -> FusedKvDecoderConfig {
    let mut config = small_decoder(KvPlan::Standard)
        .with_tie_embeddings(tied)
        // Far from uniform.
        .with_init_std(0.5);
    config.block.logit_softcap = softcap;
    config
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn gradients_are_those_of_the_loss(
        tied in any::<bool>(),
        softcap in prop_oneof![Just(None), Just(Some(2.0))],
        masked in any::<bool>(),
        trainable in prop_oneof![
            Just(None),
            Just(Some(Trainable::Fusion)),
            Just(Some(Trainable::Reusing)),
            Just(Some(Trainable::Named(vec!["model.norm.weight".to_owned()]))),
        ],
        temperature in 0.5f64..3.0,
        target_share in 0.0f64..1.0,
        hidden_weight in prop_oneof![Just(0.0), Just(0.7)],
        taught in any::<bool>(),
    ) {
        let config = untrained(tied, softcap);
        // Parameters draw their values when first used, and so would every copy.
        let standard = config.init::<Train>(&FlexDevice).unwrap().fork(&FlexDevice);
        let teacher = standard.valid();
        let plan = KvPlan::FusedKv { storage_layers: 2 };
        let student = convert(&standard, &plan).unwrap();
        let layouts = [student.layout().clone()];
        let student = choose(student, &layouts, trainable.as_ref()).unwrap();
        let batch = batch(config.vocab_size, masked);
        if !taught {
            let expected = expected(&student, &batch, None);
            check(&student, batch.into(), &expected);
            return Ok(());
        }
        let distillation = Distillation { temperature, target_share, hidden_weight };
        let (lowest, shared) = match trainable {
            None => (Some(0), None),
            Some(Trainable::Named(_)) => (None, Some(2)),
            _ => (Some(2), Some(2)),
        };
        let layers = match lowest {
            Some(lowest) if hidden_weight > 0.0 => (lowest + 1..=4).collect(),
            _ => Vec::new(),
        };
        let of = Teacher::new(teacher.clone(), &student, &layouts, distillation);
        for layer in 0..=4 {
            prop_assert_eq!(of.goes_on_from(layer), shared == Some(layer));
            prop_assert_eq!(of.matches(layer), layers.contains(&layer));
        }
        let expected = expected(&student, &batch, Some((&teacher, distillation, layers)));
        check(&student, Lesson { batch, teacher: Some(Arc::new(of)), plan: None }, &expected);
    }
}
