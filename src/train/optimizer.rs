//! AdamW as language models are trained with it: matrices decay, fusion weights have a learning rate
//! and a decay of their own, and the norm of all gradients together is clipped.

use std::sync::mpsc::{Sender, channel};

use burn::module::{AutodiffModule, ModuleMapper, ModuleVisitor, Param};
use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::record::AdaptorRecord;
use burn::optim::{GradientsParams, MultiGradientsParams, Optimizer, SimpleOptimizer};
use burn::tensor::Tensor;
use burn::tensor::backend::AutodiffBackend;

use super::adam_w::DecoderAdamW;
use super::config::TrainingConfig;
use super::gradients::{Squares, clip_to_norm, scale};
use super::roles::{Role, Roles};

/// States by parameter, in the form of Burn's own adaptor of optimizers.
type Records<M, B> = <OptimizerAdaptor<DecoderAdamW, M, B> as Optimizer<M, B>>::Record;

impl TrainingConfig {
    /// The optimizer that [`train`](super::train) uses, for a loop of one's own: AdamW (arXiv 1711.05101) at
    /// the rates and decays that the configuration has for matrices, embeddings, gains and fusion weights,
    /// after the norm of all gradients together was clipped to [`grad_clip`](Self::grad_clip). On Flex each
    /// update is one pass over memory.
    ///
    /// A step expects the sum of the gradients of [`accumulation`](Self::accumulation) parts of a batch. The
    /// learning rate is the step's own: [`learning_rate`](Self::learning_rate) and warmup are not read.
    ///
    /// ```
    /// use burn::optim::{GradientsParams, Optimizer};
    /// use burn::tensor::{Int, Tensor};
    /// use fusedkv::backend::{Autodiff, Flex};
    /// use fusedkv::train::TrainingConfig;
    /// use fusedkv::{FusedKvDecoder, FusedKvDecoderConfig, KvPlan};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// type Train = Autodiff<Flex>;
    /// let device = Default::default();
    /// let model = FusedKvDecoderConfig::tiny(512, KvPlan::FusedKv { storage_layers: 3 });
    /// let mut decoder: FusedKvDecoder<Train> = model.init(&device)?;
    /// let mut optimizer = TrainingConfig::new(model, 8, 1, 100).optimizer();
    /// let tokens = Tensor::<Train, 2, Int>::zeros([1, 8], &device);
    /// let loss = decoder.forward(tokens)?.powi_scalar(2).mean();
    /// let gradients = GradientsParams::from_grads(loss.backward(), &decoder);
    /// decoder = optimizer.step(1e-3, decoder, gradients);
    /// # Ok(())
    /// # }
    /// ```
    pub fn optimizer<B: AutodiffBackend, M: AutodiffModule<B>>(
        &self,
    ) -> impl Optimizer<M, B> + use<B, M> {
        optimizer(self, 1, channel().0)
    }
}

/// The optimizer of a training, which sends the gradients' squares of every step to `report`.
pub(super) fn optimizer<B: AutodiffBackend, M: AutodiffModule<B>>(
    config: &TrainingConfig,
    devices: usize,
    report: Sender<Squares<B::InnerBackend>>,
) -> DecoderOptimizer<M, B> {
    let adam_w = |weight_decay, learning_rate_ratio| DecoderAdamW {
        betas: [config.beta_1, config.beta_2],
        weight_decay,
        learning_rate_ratio,
    };
    DecoderOptimizer {
        rules: Rules {
            matrix: adam_w(config.weight_decay, 1.0),
            embedding: adam_w(
                config.weight_decay,
                config.embedding_learning_rate_ratio.unwrap_or(1.0),
            ),
            // Pulling a norm's gain towards zero regularises nothing.
            gain: adam_w(0.0, config.gain_learning_rate_ratio.unwrap_or(1.0)),
            fusion: adam_w(
                config.fusion_weight_decay,
                config.fusion_learning_rate_ratio,
            ),
        },
        roles: None,
        records: Records::<M, B>::default(),
        max_norm: config.grad_clip,
        summed: config.accumulation * devices,
        report,
    }
}

/// AdamW by what a parameter is, after the norm of all gradients together was clipped and reported.
///
/// Burn's own adaptor shows an optimizer a tensor, not where in the module it is.
#[derive(Clone)]
pub(super) struct DecoderOptimizer<M: AutodiffModule<B>, B: AutodiffBackend> {
    rules: Rules,
    /// Once a module was seen.
    roles: Option<Roles>,
    records: Records<M, B>,
    max_norm: f64,
    /// Burn sums the gradients of this many parts of a batch; the update takes their mean.
    summed: usize,
    report: Sender<Squares<B::InnerBackend>>,
}

/// How parameters of each role are updated.
#[derive(Clone, Copy, Debug)]
struct Rules {
    matrix: DecoderAdamW,
    embedding: DecoderAdamW,
    gain: DecoderAdamW,
    fusion: DecoderAdamW,
}

impl Rules {
    fn of(&self, role: Role) -> &DecoderAdamW {
        match role {
            Role::Matrix => &self.matrix,
            Role::Embedding => &self.embedding,
            Role::Gain => &self.gain,
            Role::Fusion => &self.fusion,
        }
    }
}

impl<M: AutodiffModule<B>, B: AutodiffBackend> Optimizer<M, B> for DecoderOptimizer<M, B> {
    type Record = Records<M, B>;

    fn step(&mut self, lr: f64, module: M, mut grads: GradientsParams) -> M {
        if self.summed > 1 {
            let factor = 1.0 / self.summed as f32;
            let device = module.devices().into_iter().next().unwrap_or_default();
            scale(&module, &mut grads, Tensor::from_data([factor], &device));
        }
        if let Some(squares) = Squares::of(&module, &grads) {
            clip_to_norm(&module, &mut grads, &squares, self.max_norm);
            // Nobody listens where nothing is measured.
            let _ = self.report.send(squares);
        }
        let roles = self.roles.get_or_insert_with(|| Roles::of(&module));
        module.map(&mut Update::<M, B> {
            lr,
            rules: &self.rules,
            roles,
            records: &mut self.records,
            grads,
        })
    }

    /// The sum of all devices' gradients is formed before it is clipped.
    fn step_multi(&mut self, lr: f64, module: M, mut grads: MultiGradientsParams) -> M {
        let mut sums = GradientsParams::new();
        module.visit(&mut Sum::<'_> {
            grads: &mut grads,
            sums: &mut sums,
        });
        self.step(lr, module, sums)
    }

    fn to_record(&self) -> Self::Record {
        self.records.clone()
    }

    fn load_record(self, records: Self::Record) -> Self {
        Self {
            roles: None,
            records,
            ..self
        }
    }
}

/// Updates the parameters that have a gradient.
struct Update<'o, M: AutodiffModule<B>, B: AutodiffBackend> {
    lr: f64,
    rules: &'o Rules,
    roles: &'o Roles,
    records: &'o mut Records<M, B>,
    grads: GradientsParams,
}

impl<M: AutodiffModule<B>, B: AutodiffBackend> ModuleMapper<B> for Update<'_, M, B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some(grad) = self.grads.remove::<B::InnerBackend, D>(param.id) else {
            return param;
        };
        let role = self.roles.get(param.id);
        let role = role.expect("a module's parameters keep their names while it is trained");
        let rule = self.rules.of(role);
        let (id, tensor, mapper) = param.consume();
        let device = grad.device();
        let state = self.records.remove(&id).map(|record| {
            let state = record.into_state();
            <DecoderAdamW as SimpleOptimizer<B::InnerBackend>>::to_device(state, &device)
        });
        let tracked = tensor.is_require_grad();
        let tensor = tensor.inner().to_device(&device);
        let (tensor, state) = rule.step(self.lr, tensor, grad, state);
        if let Some(state) = state {
            self.records.insert(id, AdaptorRecord::from_state(state));
        }
        let tensor = Tensor::from_inner(tensor).set_require_grad(tracked);
        Param::from_mapped_value(id, tensor, mapper)
    }
}

/// Sums each parameter's gradients of several devices on its own.
struct Sum<'g> {
    grads: &'g mut MultiGradientsParams,
    sums: &'g mut GradientsParams,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Sum<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some((grad, _)) = self.grads.remove::<B::InnerBackend, D>(param.id) {
            let grad = grad.to_device(&param.val().device());
            self.sums.register(param.id, grad);
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn::module::Module;
    use burn::optim::{AdamW, AdamWConfig};
    use burn::prelude::DeviceOps;
    use burn::record::{Record, Recorder};
    use burn::tensor::{Distribution, Tolerance};
    use burn_flex::{Flex, FlexDevice};

    use super::*;
    use crate::train::checkpoint::CompleteFileRecorder;
    use crate::train::small_decoder;
    use crate::{FusedKvDecoder, FusionInit, KvPlan};

    type Train = Autodiff<Flex>;
    type Model = FusedKvDecoder<Train>;

    const LR: f64 = 0.01;

    fn config(plan: KvPlan) -> TrainingConfig {
        let model = small_decoder(plan).with_fusion_init(FusionInit::equal().with_residual(0.5));
        TrainingConfig::new(model, 8, 4, 10)
            .with_grad_clip(1e9)
            .with_beta_1(0.8)
            .with_beta_2(0.99)
            .with_weight_decay(0.1)
            .with_fusion_weight_decay(0.3)
            .with_fusion_learning_rate_ratio(0.5)
            .with_embedding_learning_rate_ratio(Some(0.25))
            .with_gain_learning_rate_ratio(Some(2.0))
    }

    /// Values and new random gradients of all parameters, as vectors by their names.
    #[derive(Default)]
    struct Vectors {
        path: Vec<String>,
        names: Vec<String>,
        values: Vec<Tensor<Flex, 1>>,
        vectors: Vec<Tensor<Flex, 1>>,
        grads: GradientsParams,
    }

    impl Vectors {
        fn of(model: &Model) -> Self {
            let mut vectors = Self::default();
            model.visit(&mut vectors);
            vectors
        }
    }

    impl ModuleVisitor<Train> for Vectors {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.to_owned());
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
            let value = param.val().inner();
            let numbers = value.shape().num_elements();
            // So small that an ε which is not far below them shows.
            let spread = Distribution::Normal(0.0, 1e-5);
            let grad = Tensor::<Flex, D>::random(value.shape(), spread, &FlexDevice);
            self.names.push(self.path.join("."));
            self.values.push(value.reshape([numbers]));
            self.vectors.push(grad.clone().reshape([numbers]));
            self.grads.register::<Flex, D>(param.id, grad);
        }
    }

    fn assert_close(found: &Tensor<Flex, 1>, expected: &Tensor<Flex, 1>) {
        let (found, expected) = (found.to_data(), expected.to_data());
        found.assert_approx_eq::<f32>(&expected, Tolerance::rel_abs(1e-5, 1e-6));
    }

    #[test]
    fn every_parameter_is_updated_as_burns_adam_w_does_at_the_rates_of_its_role() {
        for plan in [
            KvPlan::FusedKv { storage_layers: 2 },
            KvPlan::YocoPlusPlus { storage_layers: 2 },
        ] {
            let config = config(plan);
            let mut model: Model = config.model.init(&FlexDevice).unwrap();
            let mut optimizer = optimizer::<Train, Model>(&config, 1, channel().0);
            let Vectors { names, values, .. } = Vectors::of(&model);
            assert!(names.iter().any(|name| name.contains(".kv_")));
            let mut expected: Vec<_> = values.into_iter().map(|value| (value, None)).collect();
            for _ in 0..3 {
                let step = Vectors::of(&model);
                model = optimizer.step(LR, model, step.grads);
                for ((name, parameter), grad) in names.iter().zip(&mut expected).zip(step.vectors) {
                    let (lr, decay) = if name.contains(".kv_") {
                        (LR * 0.5, 0.3)
                    } else if name.ends_with("gamma") {
                        (LR * 2.0, 0.0)
                    } else if name.starts_with("embed_tokens") {
                        (LR * 0.25, 0.1)
                    } else {
                        (LR, 0.1)
                    };
                    let rule: AdamW = AdamWConfig::new()
                        .with_beta_1(0.8)
                        .with_beta_2(0.99)
                        .with_epsilon(1e-8)
                        .with_weight_decay(decay)
                        .build();
                    let (value, state) = parameter.clone();
                    *parameter = rule.step(lr, value, grad, state);
                }
            }
            for (found, (expected, _)) in Vectors::of(&model).values.iter().zip(&expected) {
                assert_close(found, expected);
            }
        }
    }

    #[test]
    fn the_gradients_of_all_parts_are_averaged_before_they_are_clipped() {
        let config = config(KvPlan::Standard).with_accumulation(2);
        let model: Model = config.model.init(&FlexDevice).unwrap();
        let (report, squares) = channel();
        let mut optimizer = optimizer::<Train, Model>(&config, 3, report);
        let step = Vectors::of(&model);
        let sum = Squares::of(&model, &step.grads).unwrap().norms().all;
        optimizer.step(LR, model, step.grads);
        let mean = squares.recv().unwrap().norms().all;
        assert!((mean - sum / 6.0).abs() < 1e-5 * mean, "{mean} {sum}");
    }

    #[test]
    fn gradients_of_several_devices_are_summed() {
        let config = config(KvPlan::Standard);
        let model: Model = config.model.init(&FlexDevice).unwrap();
        let (report, squares) = channel();
        let mut optimizer = optimizer::<Train, Model>(&config, 1, report);
        let step = Vectors::of(&model);
        let one = Squares::of(&model, &step.grads).unwrap().norms().all;
        let mut copies = [GradientsParams::new(), GradientsParams::new()];
        model.visit(&mut Twice {
            from: &step.grads,
            to: &mut copies,
        });
        let both = MultiGradientsParams {
            grads: copies.map(|grads| (grads, FlexDevice.to_id())).into(),
        };
        optimizer.step_multi(LR, model, both);
        let sum = squares.recv().unwrap().norms().all;
        assert!((sum - 2.0 * one).abs() < 1e-5 * sum, "{sum} {one}");
    }

    fn through_a_file<R: Record<Train>, S: Record<Train>>(record: R) -> S {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("optim-1");
        let recorder = CompleteFileRecorder::default();
        Recorder::<Train>::record(&recorder, record, path.clone()).unwrap();
        Recorder::<Train>::load(&recorder, path, &FlexDevice).unwrap()
    }

    #[test]
    fn records_are_read_as_those_of_burns_adam_w_and_the_other_way() {
        let config = config(KvPlan::Standard)
            .with_weight_decay(0.0)
            .with_fusion_weight_decay(0.0)
            .with_embedding_learning_rate_ratio(None)
            .with_gain_learning_rate_ratio(None);
        let model: Model = config.model.init(&FlexDevice).unwrap();
        let mut burns = AdamWConfig::new()
            .with_beta_1(0.8)
            .with_beta_2(0.99)
            .with_epsilon(1e-8)
            .with_weight_decay(0.0)
            .init::<Train, Model>();
        let model = burns.step(LR, model.clone(), Vectors::of(&model).grads);
        let record = through_a_file(burns.to_record());
        let mut ours = optimizer::<Train, Model>(&config, 1, channel().0).load_record(record);
        for _ in 0..2 {
            let seed = Vectors::of(&model);
            let mut both = [GradientsParams::new(), GradientsParams::new()];
            model.visit(&mut Twice {
                from: &seed.grads,
                to: &mut both,
            });
            let [a, b] = both;
            let expected = Vectors::of(&burns.step(LR, model.clone(), a));
            let found = Vectors::of(&ours.step(LR, model.clone(), b));
            for (found, expected) in found.values.iter().zip(&expected.values) {
                assert_close(found, expected);
            }
            let record = through_a_file(ours.to_record());
            burns = burns.load_record(record);
        }
    }

    /// Two copies of gradients.
    struct Twice<'g> {
        from: &'g GradientsParams,
        to: &'g mut [GradientsParams; 2],
    }

    impl ModuleVisitor<Train> for Twice<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
            let grad = self.from.get::<Flex, D>(param.id).unwrap();
            for to in self.to.iter_mut() {
                to.register::<Flex, D>(param.id, grad.clone());
            }
        }
    }
}
