//! Gradients of every fusion and residual weight against finite differences.

use burn::module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};
use fusedkv::backend::Autodiff;
use fusedkv::{CacheError, FusedKvDecoder, FusedKvDecoderConfig, KvPlan, TokenBatch};

use crate::models::{F64, model, small, values};

type A64 = Autodiff<F64>;

const TOKENS: [[u32; 6]; 2] = [[1, 4, 2, 2, 7, 5], [3, 0, 6, 1, 1, 4]];

/// A scalar that every logit matters to, differently.
fn objective<B: Backend>(model: &FusedKvDecoder<B>) -> Tensor<B, 1> {
    let batch = TokenBatch::from_rows(&TOKENS, 8, &Default::default()).unwrap();
    (model.forward(batch).unwrap() * 0.3).sin().sum()
}

/// Ids, elements and gradients of the learned weights outside the trunk.
struct Collect<'g>(
    Vec<(ParamId, Vec<f64>)>,
    &'g <A64 as AutodiffBackend>::Gradients,
    bool,
);

impl ModuleVisitor<A64> for Collect<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.2 |= name.starts_with("kv_");
    }
    fn exit_module(&mut self, name: &str, _container: &str) {
        self.2 &= !name.starts_with("kv_");
    }
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<A64, D>>) {
        if self.2 {
            self.0
                .push((param.id, values(&param.val().grad(self.1).unwrap())));
        }
    }
}

/// Adds `step` to one element of one parameter.
struct Nudge(ParamId, usize, f64);

impl<B: Backend> ModuleMapper<B> for Nudge {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if param.id != self.0 {
            return param;
        }
        param.map(|old| {
            let mut data = old.to_data();
            data.as_mut_slice::<f64>().unwrap()[self.1] += self.2;
            Tensor::from_data(data, &old.device())
        })
    }
}

fn check(plan: KvPlan, expected_weights: usize) {
    let config = FusedKvDecoderConfig {
        vocab_size: 8,
        ..small(plan)
    }
    .with_rope_theta(100.0);
    let decoder = model::<A64>(&config, 5);
    let gradients = objective(&decoder).backward();
    let mut collect = Collect(vec![], &gradients, false);
    decoder.visit(&mut collect);
    let inner = burn::module::AutodiffModule::valid(&decoder);
    let at = |id, i, step| values(&objective(&inner.clone().map(&mut Nudge(id, i, step))))[0];
    let mut checked = 0;
    for (id, gradient) in collect.0 {
        for (i, found) in gradient.into_iter().enumerate() {
            // Fourth order, with a step that drowns the f32 rounding in Burn's RmsNorm.
            let h = 0.02;
            let expected = (8.0 * (at(id, i, h) - at(id, i, -h))
                - (at(id, i, 2.0 * h) - at(id, i, -2.0 * h)))
                / (12.0 * h);
            let error = (found - expected).abs() / expected.abs().max(0.05);
            assert!(
                error < 1e-3,
                "{} {i}: {found} for {expected}",
                config.plan.method()
            );
            checked += 1;
        }
    }
    assert_eq!(checked, expected_weights);
}

#[test]
fn fused_kv() {
    // Two reusing layers, two sources, two kv heads, 2 + 4 channels.
    check(KvPlan::FusedKv { storage_layers: 2 }, 2 * 2 * 2 * (2 + 4));
}

#[test]
fn lite_learnable() {
    check(
        KvPlan::FusedKvLiteLearnable { storage_layers: 2 },
        2 * 2 * (2 + 4),
    );
}

#[test]
fn dense_fusion() {
    check(KvPlan::DenseFusion { storage_layers: 3 }, 3 * 2);
}

#[test]
fn yoco_plus_plus() {
    check(KvPlan::YocoPlusPlus { storage_layers: 3 }, 2 * 2);
}

#[test]
fn a_decoder_that_tracks_gradients_has_no_cache() {
    let config = FusedKvDecoderConfig::new(8, KvPlan::Standard)
        .with_hidden_size(8)
        .with_n_layers(2)
        .with_n_heads(2)
        .with_n_kv_heads(1)
        .with_head_dim(4)
        .with_ffn_size(8);
    let training = model::<A64>(&config, 1);
    let error = training.new_cache(1, 4).unwrap_err();
    assert!(
        matches!(&error, CacheError::Autodiff { backend } if backend.contains("autodiff")),
        "{error}"
    );
    assert!(error.to_string().contains(".valid()"), "{error}");
    assert!(training.valid().new_cache(1, 4).is_ok());
}
