//! A routed step against a decoder of the plan drawn that was built by itself.

use std::collections::BTreeMap;
use std::sync::mpsc::channel;

use burn::backend::Autodiff;
use burn::optim::{GradientsParams, Optimizer};
use burn::tensor::{Distribution, Int, TensorData};
use burn_ndarray::{NdArray, NdArrayDevice};

use super::*;
use crate::train::optimizer::optimizer;
use crate::train::small_decoder;
use crate::train::trainable::choose;
use crate::{BlendWeights, FusionInit, KvPlan, KvSource, LayerKv};

type F64 = NdArray<f64>;
type Train = Autodiff<F64>;

const DEVICE: NdArrayDevice = NdArrayDevice::Cpu;

/// One of every kind of source, with nothing at its start that another has.
fn plans() -> Vec<KvPlan> {
    let n = 2;
    let blend = |sources: &[usize]| KvSource::Blend {
        sources: sources.to_vec(),
        weights: BlendWeights::PerLayer,
    };
    let custom = [
        LayerKv::OWN,
        LayerKv {
            key: KvSource::OWN,
            value: KvSource::AsIs(0),
        },
        LayerKv {
            key: blend(&[1, 2]),
            value: KvSource::Own { residual: Some(0) },
        },
        LayerKv {
            key: KvSource::AsIs(2),
            value: blend(&[0, 2]),
        },
    ];
    let custom = KvPlan::Custom {
        layers: custom.into(),
    };
    let mut plans: Vec<_> = KvPlan::methods()
        .map(|method| KvPlan::from_method(method, 4).unwrap())
        .collect();
    plans.extend([KvPlan::FusedKv { storage_layers: 3 }, custom]);
    assert_eq!(plans[1], KvPlan::FusedKv { storage_layers: n });
    plans
}

fn config(plans: Vec<KvPlan>) -> TrainingConfig {
    let init = FusionInit::equal().with_noise(0.3).with_residual(0.7);
    let model = small_decoder(KvPlan::Standard)
        .with_init_std(0.3)
        .with_fusion_init(init);
    TrainingConfig::new(model, 8, 2, 10).with_routing(Some(Routing::new(plans)))
}

fn trainee(config: &TrainingConfig) -> Trainee<Train> {
    let trainee = Trainee::start(config, None, &DEVICE).unwrap();
    let layouts = trainee.layouts();
    choose(trainee, &layouts, config.trainable.as_ref()).unwrap()
}

fn lesson(plan: Option<usize>) -> Lesson<Train> {
    let below = Distribution::Uniform(0.0, 32.0);
    let [tokens, targets] = [0, 1].map(|_| Tensor::<Train, 2, Int>::random([2, 8], below, &DEVICE));
    let batch = LanguageBatch {
        tokens,
        targets,
        mask: None,
    };
    Lesson {
        plan,
        ..batch.into()
    }
}

/// Parameters and their gradients by the names that checkpoints have.
#[derive(Default)]
struct Named<'g> {
    path: ModulePath,
    grads: Option<&'g GradientsParams>,
    values: BTreeMap<String, TensorData>,
    gradients: BTreeMap<String, TensorData>,
}

impl ModuleVisitor<Train> for Named<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
        let name = self.path.tensor();
        let grad = self.grads.and_then(|grads| grads.get::<F64, D>(param.id));
        if let Some(grad) = grad {
            self.gradients.insert(name.clone(), grad.into_data());
        }
        let twice = self.values.insert(name, param.val().into_data());
        assert!(twice.is_none());
    }
}

fn named<'g>(module: &impl Module<Train>, grads: Option<&'g GradientsParams>) -> Named<'g> {
    let mut named = Named {
        grads,
        ..Named::default()
    };
    module.visit(&mut named);
    named
}

/// What a trainee has under one of its plans, by the names that a decoder of that plan has: the
/// parameters that all plans share, and those of the plan. None but these has a gradient.
fn of_plan<'g>(
    trainee: &Trainee<Train>,
    plan: usize,
    grads: Option<&'g GradientsParams>,
) -> Named<'g> {
    let Kind::Routed { plans, .. } = &trainee.kind else {
        panic!("a routed trainee");
    };
    let mut all = named(&trainee.model, grads);
    for (place, other) in plans.iter().enumerate() {
        let added = named(other, grads);
        if place == plan {
            all.values.extend(added.values);
            all.gradients.extend(added.gradients);
        } else {
            assert!(added.gradients.is_empty());
        }
    }
    all
}

struct Set<'v>(ModulePath, &'v BTreeMap<String, TensorData>);

impl ModuleMapper<Train> for Set<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.0.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.0.exit();
    }

    fn map_float<const D: usize>(
        &mut self,
        param: Param<Tensor<Train, D>>,
    ) -> Param<Tensor<Train, D>> {
        let data = self.1[&self.0.tensor()].clone();
        param.map(|_| Tensor::from_data(data, &DEVICE).require_grad())
    }
}

/// A decoder of a plan by itself, with these numbers.
fn alone(
    config: &TrainingConfig,
    plan: &KvPlan,
    values: &BTreeMap<String, TensorData>,
) -> FusedKvDecoder<Train> {
    let mut config = config.model.clone();
    config.plan = plan.clone();
    let model = config.init(&DEVICE).unwrap();
    model.map(&mut Set(ModulePath::default(), values))
}

#[test]
fn a_step_is_that_of_a_decoder_of_the_plan_drawn() {
    let config = config(plans());
    let trainee = trainee(&config);
    for (place, plan) in plans().iter().enumerate() {
        let lesson = lesson(Some(place));
        let output = TrainStep::step(&trainee, lesson.clone());
        let found = of_plan(&trainee, place, Some(&output.grads));

        let alone = alone(&config, plan, &found.values);
        let expected = TrainStep::step(&alone, lesson.clone());
        let gradients = named(&alone, Some(&expected.grads)).gradients;
        // Every parameter of the decoder has one, and what it does not have none.
        assert_eq!(gradients.len(), named(&alone, None).values.len());
        assert_eq!(found.gradients, gradients, "{plan}");
        assert_eq!(
            output.item.losses.into_data(),
            expected.item.losses.into_data()
        );

        let tokens = lesson.batch.tokens.inner();
        let decoder = &trainee.valid().decoders()[place];
        assert_eq!(
            decoder.forward(tokens.clone()).unwrap().into_data(),
            alone.valid().forward(tokens).unwrap().into_data()
        );
        assert_eq!(decoder.config().plan, *plan);
    }
}

#[test]
fn what_the_plan_drawn_does_not_read_stays_as_it_is() {
    let set = vec![
        KvPlan::Standard,
        KvPlan::FusedKv { storage_layers: 2 },
        KvPlan::YocoPlusPlus { storage_layers: 3 },
    ];
    let config = config(set).with_fusion_weight_decay(0.1);
    let mut trainee = trainee(&config);
    let (report, _squares) = channel();
    let mut adam_w = optimizer::<Train, Trainee<Train>>(&config, 1, report);
    let all = |trainee: &Trainee<Train>| [0, 1, 2].map(|plan| of_plan(trainee, plan, None).values);
    // Every plan has moments before the one that is looked at.
    for plan in [0, 1, 2, 1, 0, 2] {
        let before = all(&trainee);
        let output = TrainStep::step(&trainee, lesson(Some(plan)));
        let read = of_plan(&trainee, plan, Some(&output.grads)).gradients;
        trainee = adam_w.step(1e-2, trainee, output.grads);
        let after = all(&trainee);
        for other in 0..3 {
            for (name, value) in &before[other] {
                let of_another = other != plan && name.contains(".kv_");
                let changes = read.contains_key(name) && !of_another;
                assert_eq!(
                    after[other][name] != *value,
                    changes,
                    "{plan} {other} {name}"
                );
            }
        }
    }
}

#[test]
fn validation_is_under_every_plan() {
    let set = vec![KvPlan::Standard, KvPlan::FusedKv { storage_layers: 2 }];
    let mut config = config(set);
    let routing = config.routing.take().unwrap();
    config.routing = Some(routing.with_weights(Some(vec![1.0, 3.0])));
    let trainee = trainee(&config).valid();
    let Lesson { batch, .. } = lesson(None);
    let batch = LanguageBatch {
        tokens: batch.tokens.inner(),
        targets: batch.targets.inner(),
        mask: None,
    };
    let losses =
        |output: LanguageOutput<F64>| output.losses.into_data().iter().collect::<Vec<f64>>();
    let decoders = trainee.decoders();
    let alone = decoders
        .iter()
        .map(|decoder| InferenceStep::step(decoder, batch.clone()));
    let alone: Vec<_> = alone.map(losses).collect();
    let output = InferenceStep::step(&trainee, batch);
    for (found, expected) in output.by_plan.iter().zip(&alone) {
        assert_eq!(found.to_data().iter().collect::<Vec<f64>>(), *expected);
    }
    let both = alone[0].iter().zip(&alone[1]);
    for (found, (a, b)) in losses(output).into_iter().zip(both) {
        assert!((found - (0.25 * a + 0.75 * b)).abs() < 1e-12);
    }
}

#[test]
fn a_record_of_other_plans_is_refused() {
    let set = |n| vec![KvPlan::Standard, KvPlan::FusedKv { storage_layers: n }];
    let more = [set(2), vec![KvPlan::Yoco { storage_layers: 2 }]].concat();
    let routed = trainee(&config(set(2)));
    let record = |trainee: Trainee<Train>| trainee.into_record();
    assert!(
        routed
            .check_record(&record(trainee(&config(set(2)))))
            .is_ok()
    );
    let plain = config(set(2)).with_routing(None);
    for other in [config(set(3)), config(more), plain.clone()] {
        let error = routed.check_record(&record(trainee(&other))).unwrap_err();
        assert!(matches!(error, OtherRecord::Plans), "{error}");
    }
    let error = trainee(&plain).check_record(&record(routed)).unwrap_err();
    assert!(matches!(error, OtherRecord::Plans), "{error}");
}
