//! One model for several plans: what is learned, kept, resumed, taken out, refused.

use fusedkv::train::compare::Method;
use fusedkv::train::{EpochLosses, Routing, RoutingError, Trainable, distill};
use fusedkv::{ConfigError, LoraConfig, PlanError};

use super::*;

fn plans() -> Vec<KvPlan> {
    let n = 2;
    vec![
        KvPlan::Standard,
        KvPlan::FusedKv { storage_layers: n },
        KvPlan::FusedKvLite { storage_layers: n },
        KvPlan::YocoPlusPlus { storage_layers: n },
    ]
}

fn among(plans: Vec<KvPlan>) -> TrainingConfig {
    let config = TrainingConfig {
        model: decoder(KvPlan::Standard),
        ..config()
    };
    config.with_routing(Some(Routing::new(plans)))
}

/// What a plan is shown as is what it is asked for by.
#[test]
fn plans_are_named_as_methods_are() {
    let base = decoder(KvPlan::Standard);
    for n in 1..4 {
        for method in KvPlan::methods() {
            let mut plan = KvPlan::from_method(method, 4).unwrap();
            match &mut plan {
                KvPlan::Cla { factor } => *factor = n,
                plan => {
                    if let Some(storage_layers) = plan.storage_layers_mut() {
                        *storage_layers = n.max(2);
                    }
                }
            }
            let method = Method::parse(&plan.to_string(), &base).unwrap();
            assert_eq!(method.model.plan, plan);
            assert_eq!(format!("{plan:<30}|").len(), 31);
        }
    }
}

fn drawn(directory: &Path) -> Vec<usize> {
    let lines = log(directory).into_iter();
    lines
        .filter_map(|line| match line {
            LogLine::Train { plan, .. } => Some(plan.unwrap()),
            LogLine::Valid { .. } => None,
        })
        .collect()
}

#[test]
fn one_model_learns_a_text_under_every_plan() {
    let directory = tempdir().unwrap();
    let config = TrainingConfig {
        steps: 120,
        ..among(plans())
    };
    let weights = vec![1.0, 2.0, 1.0, 1.0];
    let routing = Routing::new(plans()).with_weights(Some(weights.clone()));
    let config = config.with_routing(Some(routing));
    let trained = run(&config, directory.path(), false).unwrap();
    let (first, last) = (&trained.epochs[0], &trained.epochs[3]);
    assert_eq!(trained.plans.len(), 4);
    let (_, valid) = TokenWindows::split(tokens(), config.context, 0.2).unwrap();
    for (place, plan) in plans().iter().enumerate() {
        let found = &trained.plans[place];
        assert_eq!(found.model.config().plan, *plan);
        assert_eq!(found.valid_loss, last.plans[place]);
        assert!(
            last.plans[place] < 0.5 * first.plans[place],
            "{plan}: {first:?} {last:?}"
        );
        let alone = evaluate(&found.model, &valid, 4, None).unwrap().loss;
        assert!((alone - found.valid_loss).abs() < 1e-5, "{plan}: {alone}");
    }
    let mean = |epoch: &EpochLosses| {
        let parts = epoch.plans.iter().zip(&weights);
        parts.map(|(loss, weight)| loss * weight / 5.0).sum::<f64>()
    };
    for epoch in &trained.epochs {
        assert!((mean(epoch) - epoch.valid).abs() < 1e-5, "{epoch:?}");
    }
    assert_eq!(trained.valid_loss, last.valid);
    // The model is that of the first plan.
    let model = |model| logits(model, &FlexDevice);
    assert_eq!(model(&trained.model), model(&trained.plans[0].model));

    let steps = drawn(directory.path());
    assert_eq!(BTreeSet::from_iter(steps), BTreeSet::from([0, 1, 2, 3]));
    let validations = log(directory.path())
        .into_iter()
        .filter_map(|line| match line {
            LogLine::Valid { plans, .. } => Some(plans),
            LogLine::Train { .. } => None,
        });
    for (plans, epoch) in validations.zip(&trained.epochs) {
        assert_eq!(plans, epoch.plans);
    }
}

#[test]
fn a_resumed_routing_ends_like_one_that_was_not_interrupted() {
    let directory = tempdir().unwrap();
    let path = directory.path();
    let config = among(plans()).with_accumulation(2);
    let whole = run(&config, path, false).unwrap();
    let (steps, lines) = (drawn(path), log(path));

    // As if it had died while the last checkpoint was written.
    fs::remove_file(path.join("checkpoint/optim-4.mpk")).unwrap();
    let resumed = run(&config, path, true).unwrap();
    assert_eq!(resumed.epochs, whole.epochs);
    assert_eq!((drawn(path), log(path)), (steps, lines));
    let model = |model: &FusedKvDecoder<Flex>| logits(model, &FlexDevice);
    for (resumed, whole) in resumed.plans.iter().zip(&whole.plans) {
        assert_eq!(model(&resumed.model), model(&whole.model));
    }

    // Taken out of the run, or saved by itself, a plan's decoder is the one that was trained.
    let run = Run::new(path);
    for (plan, trained) in plans().iter().zip(&whole.plans) {
        let (last, losses) = in_turn(|| run.last_under::<Flex>(plan, &FlexDevice)).unwrap();
        assert_eq!(losses, whole.epochs[3]);
        assert_eq!(last.config().plan, *plan);
        assert_eq!(model(&last), model(&trained.model));
        let saved = tempdir().unwrap();
        save_checkpoint(saved.path(), &trained.model, &SaveOptions::new()).unwrap();
        let loaded = load_checkpoint::<Flex>(saved.path(), WeightDtype::F32, &FlexDevice).unwrap();
        assert_eq!(loaded.model.config().plan, *plan);
        assert_eq!(model(&loaded.model), model(&trained.model));
    }
    let (first, _) = in_turn(|| run.last::<Flex>(&FlexDevice)).unwrap();
    assert_eq!(model(&first), model(&whole.model));
    // By what its layers do, not by its name.
    let same = KvPlan::Cla { factor: 1 };
    let (named_otherwise, _) = in_turn(|| run.best_under::<Flex>(&same, &FlexDevice)).unwrap();
    let (best, _) = in_turn(|| run.best::<Flex>(&FlexDevice)).unwrap();
    assert_eq!(model(&named_otherwise), model(&best));
    let other = KvPlan::Yoco { storage_layers: 3 };
    let error = in_turn(|| run.best_under::<Flex>(&other, &FlexDevice)).unwrap_err();
    let TrainError::Routing(RoutingError::NotTrained { plan, plans: set }) = error else {
        panic!("{error}");
    };
    assert_eq!((plan, set), (other, plans()));
}

#[test]
fn parts_and_devices_share_the_plan_of_a_step() {
    let losses = |accumulation, devices| {
        let directory = tempdir().unwrap();
        let config = among(plans()).with_accumulation(accumulation);
        let (train, valid) = TokenWindows::split(tokens(), config.context, 0.2).unwrap();
        let run = Run::new(directory.path()).with_progress(Progress::Quiet);
        let devices = vec![FlexDevice; devices];
        let trained =
            in_turn(|| train_on::<Autodiff<Flex>>(&config, train, valid, &run, &devices)).unwrap();
        trained.epochs[3].plans.clone()
    };
    let whole = losses(1, 1);
    for (accumulation, devices) in [(2, 1), (1, 2)] {
        let parts = losses(accumulation, devices);
        for (a, b) in whole.iter().zip(&parts) {
            assert!((a - b).abs() < 1e-3, "{whole:?} {parts:?}");
        }
    }
}

#[test]
fn a_model_to_start_with_is_trained_on_for_all_plans() {
    let directory = tempdir().unwrap();
    let config = TrainingConfig {
        model: decoder(KvPlan::Standard),
        ..config()
    };
    let standard = run(&config, directory.path(), false).unwrap().model;
    let start = || burn::module::AutodiffModule::from_inner(standard.clone());
    let go = |config: &TrainingConfig| {
        let directory = tempdir().unwrap();
        let run = Run::new(directory.path()).with_progress(Progress::Quiet);
        in_turn(|| train_from::<Autodiff<Flex>>(config, start(), tokens(), &run, &FlexDevice))
            .unwrap()
    };
    let routed = among(plans());
    // What no plan changes stays, and so does what none of them has: the standard decoder's own.
    let frozen = go(&routed.clone().with_trainable(Some(Trainable::Fusion)));
    let model = |model: &FusedKvDecoder<Flex>| logits(model, &FlexDevice);
    assert_eq!(model(&frozen.plans[0].model), model(&standard));
    assert_eq!(frozen.epochs[0].plans[0], frozen.epochs[3].plans[0]);
    assert!(frozen.epochs[3].plans[1] < frozen.epochs[0].plans[1]);
    // Two layers reuse under some plan.
    let reusing = go(&routed.with_trainable(Some(Trainable::Reusing)));
    let moved = |layer: usize| {
        let name = format!("model.layers.{layer}.mlp.up_proj.weight");
        let of = |model: &FusedKvDecoder<Flex>| model.parameter::<2>(&name).unwrap().into_data();
        of(&reusing.model) != of(&standard)
    };
    assert_eq!([0, 1, 2, 3].map(moved), [false, false, true, true]);
    assert!(reusing.epochs[3].valid < frozen.epochs[3].valid);
}

/// What student and teacher share is computed once: not where a plan has it compute something else.
#[test]
fn a_teacher_is_followed_under_every_plan() {
    let mut config = TrainingConfig {
        steps: 4,
        ..among(plans())
    };
    config.model.fusion_init = FusionInit::lite().with_residual(0.5);
    let teacher = in_turn(|| {
        Flex::seed(&FlexDevice, 3);
        let model = config.model.init::<Flex>(&FlexDevice).unwrap();
        burn::module::Module::fork(model, &FlexDevice)
    });
    let first = |plans: Vec<KvPlan>, trainable| {
        let weights = Some(vec![1e9, 1.0]);
        let routing = Routing::new(plans).with_weights(weights);
        let config = config
            .clone()
            .with_routing(Some(routing))
            .with_trainable(trainable);
        let directory = tempdir().unwrap();
        let run = Run::new(directory.path()).with_progress(Progress::Quiet);
        let (train, valid) = TokenWindows::split(tokens(), config.context, 0.2).unwrap();
        let student = burn::module::AutodiffModule::from_inner(teacher.clone());
        let teacher = teacher.clone();
        let devices = [FlexDevice];
        in_turn(|| {
            distill::<Autodiff<Flex>>(&config, student, teacher, train, valid, &run, &devices)
        })
        .unwrap();
        assert_eq!(drawn(directory.path())[0], 0);
        let LogLine::Train { divergence, .. } = &log(directory.path())[0] else {
            panic!("a step comes first");
        };
        divergence.unwrap()
    };
    for plan in plans() {
        let other = KvPlan::Yoco { storage_layers: 3 };
        // Where all trains nothing is shared.
        let apart = first(vec![plan.clone(), other.clone()], None);
        let shared = first(vec![plan.clone(), other], Some(Trainable::Reusing));
        assert!((shared - apart).abs() < 1e-5, "{plan}: {shared} {apart}");
        assert_eq!(apart > 1e-4, plan != KvPlan::Standard, "{plan}: {apart}");
    }
}

#[test]
fn sets_that_no_model_can_be_trained_for_are_refused() {
    let directory = tempdir().unwrap();
    let refused = |config: TrainingConfig| {
        let error = run(&config, directory.path(), false).unwrap_err();
        match error {
            TrainError::Routing(error) => error,
            error => panic!("{error}"),
        }
    };
    for found in [0, 1] {
        let error = refused(among(plans()[..found].to_vec()));
        assert_eq!(error, RoutingError::TooFewPlans { found });
    }
    let mut other = among(plans());
    other.model.plan = KvPlan::Yoco { storage_layers: 2 };
    let error = refused(other);
    assert_eq!(
        error.to_string(),
        "a routed model of the plan `yoco:n=2`, expected `standard`, which serves any plan"
    );
    let deep = KvPlan::FusedKv { storage_layers: 4 };
    let error = refused(among([plans(), vec![deep.clone()]].concat()));
    let RoutingError::Plan {
        index: 4,
        plan,
        source: ConfigError::Plan(PlanError::StorageLayers { .. }),
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!(plan, deep);
    // The same by another name.
    let again = KvPlan::Cla { factor: 1 };
    let error = refused(among([plans(), vec![again.clone()]].concat()));
    assert_eq!(
        error,
        RoutingError::Duplicate {
            first: 0,
            second: 4,
            plan: again
        }
    );
    let weighted = |weights: &[f64]| {
        let routing = Routing::new(plans()).with_weights(Some(weights.to_vec()));
        refused(among(plans()).with_routing(Some(routing)))
    };
    assert_eq!(
        weighted(&[1.0; 3]),
        RoutingError::WeightCount {
            found: 3,
            expected: 4
        }
    );
    for wrong in [0.0, -1.0, f64::INFINITY, f64::NAN] {
        let error = weighted(&[1.0, 1.0, wrong, 1.0]);
        assert!(
            matches!(error, RoutingError::Weight { index: 2, found } if found.total_cmp(&wrong).is_eq()),
            "{error}"
        );
    }
    let lora = Trainable::Lora(LoraConfig::new(2, 4.0));
    let error = refused(among(plans()).with_trainable(Some(lora)));
    assert_eq!(error, RoutingError::Adapters);
    // Refused before anything was made.
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);

    run(&among(plans()), directory.path(), false).unwrap();
    let fewer = among(plans()[..3].to_vec());
    let error = run(&fewer, directory.path(), true).unwrap_err();
    assert!(
        matches!(&error, TrainError::OtherRun { field, .. } if field == "routing.plans"),
        "{error}"
    );
}
