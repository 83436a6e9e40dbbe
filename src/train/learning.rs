//! From configuration, models and windows to a trained model.

use std::io::{self, IsTerminal};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend, BackendTypes};
use burn_train::metric::LearningRateMetric;
use burn_train::{
    ExecutionStrategy, Interrupter, Learner, LearningComponentsTypes, MultiDeviceOptim,
    SupervisedTraining, TrainingStrategy,
};

use super::checkpoint::{
    CompleteFileRecorder, EpochEnd, History, KeepLastAndBest, Patience, Reports, Unwritten,
};
use super::config::TrainingConfig;
use super::data::{Windows, read_window};
use super::directory::{DataMark, RunDirectory};
use super::error::TrainError;
use super::learning_rate::WarmupCosine;
use super::loader::{Failure, Schedule, TrainLoader, ValidLoader};
use super::log::JsonLines;
use super::metrics::{
    DivergenceMetric, GradientNormMetric, LossMetric, MemoryMetric, PerplexityMetric,
    TokenRateMetric,
};
use super::objective::Teacher;
use super::optimizer::optimizer;
use super::plan_losses::PlanLossMetric;
use super::precision::at_least_f32;
use super::progress::{PlainRenderer, Progress};
use super::run::{Run, Trained, TrainedPlan};
use super::saved::load_checked;
use super::trainable::choose;
use super::trainee::{Trainee, fingerprint};
use crate::decoder::FusedKvDecoder;

/// How often plain progress is printed.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// The models of a training.
pub(super) struct Models<B: AutodiffBackend> {
    /// What it starts with; none: random weights.
    pub start: Option<FusedKvDecoder<B>>,
    pub teacher: Option<FusedKvDecoder<B::InnerBackend>>,
}

impl<B: AutodiffBackend> Models<B> {
    /// Without a teacher.
    pub fn starting_with(start: Option<FusedKvDecoder<B>>) -> Self {
        Self {
            start,
            teacher: None,
        }
    }
}

/// Checks everything before anything is trained, and has Burn's learner train.
pub(super) fn run_training<B: AutodiffBackend>(
    config: &TrainingConfig,
    Models {
        start: model,
        teacher,
    }: Models<B>,
    train_windows: impl Windows + 'static,
    valid_windows: impl Windows + 'static,
    run: &Run,
    devices: &[B::Device],
) -> Result<Trained<B::InnerBackend>, TrainError> {
    let start = Instant::now();
    config.validate()?;
    let taught = teacher.zip(config.distillation);
    match (&taught, config.distillation) {
        (None, Some(_)) => return Err(TrainError::NoTeacher),
        (Some((teacher, distillation)), _) => Teacher::check(teacher, config, *distillation)?,
        (None, None) => {}
    }
    let parts = devices.len() * config.accumulation;
    let device = match devices {
        [first, ..] if config.batch_size.is_multiple_of(parts) => first,
        _ => {
            return Err(TrainError::Setting {
                field: "devices",
                value: devices.len() as f64,
                expected: "1 or more, among which batch_size can be divided, accumulation included",
            });
        }
    };
    for windows in [&train_windows as &dyn Windows, &valid_windows] {
        windows.check_vocabulary(config.model.vocab_size)?;
        for (field, value, fits, expected) in [
            (
                "context of the data",
                windows.context(),
                windows.context() == config.context,
                "the configuration's context",
            ),
            ("windows", windows.len(), !windows.is_empty(), "1 or more"),
        ] {
            if !fits {
                return Err(TrainError::Setting {
                    field,
                    value: value as f64,
                    expected,
                });
            }
        }
    }
    check_targets(&valid_windows)?;

    B::seed(device, config.seed);
    let trainee = Trainee::start(config, model, device)?.map(&mut KeepPrecision);
    let layouts = trainee.layouts();
    let mut model = choose(trainee, &layouts, config.trainable.as_ref())?;
    let (squares, squares_of_steps) = channel();
    let optimizer = optimizer::<B, Trainee<B>>(config, devices.len(), squares);
    let scheduler = WarmupCosine::new(config);

    let data = DataMark::new(
        train_windows.fingerprint(),
        valid_windows.fingerprint(),
        taught
            .as_ref()
            .map(|(teacher, _)| fingerprint(teacher, |_| true)),
    );
    let (directory, done, losses) = if run.resume {
        let (directory, epoch, losses) = RunDirectory::resume(&run.directory, config, &data)?;
        model = load_checked(&directory, epoch, model, &optimizer, &scheduler, device)?;
        (directory, epoch, losses)
    } else {
        let directory = RunDirectory::start(&run.directory, config, &data)?;
        (directory, 0, Vec::new())
    };

    let teacher =
        taught.map(|(teacher, of)| Arc::new(Teacher::new(teacher, &model.model, &layouts, of)));

    let history: History = Arc::new(Mutex::new(losses));
    let patience = config.patience.map(|epochs| Patience {
        history: history.clone(),
        epochs,
    });
    // A run that ended early has nothing left to do.
    let ended = patience.as_ref().is_some_and(Patience::is_over);
    let last_epoch = if ended { done } else { config.epochs };
    let interrupter = Interrupter::new();
    let unwritten = Unwritten::default();
    let (train_report, train_losses) = channel();
    let (valid_report, valid_losses) = channel();
    let (norm_report, gradient_norms) = channel();
    let plans = config.routing.iter().flat_map(|routing| &routing.plans);
    let (plan_reports, plan_losses): (Vec<_>, _) = plans.map(|_| channel()).unzip();
    let strategy = KeepLastAndBest::new(
        directory.clone(),
        history.clone(),
        Reports {
            train: train_losses,
            valid: valid_losses,
            plans: plan_losses,
            gradient_norms,
        },
        interrupter.clone(),
        unwritten.clone(),
    );
    let log = JsonLines::open(&directory.log(), config, done, parts, interrupter.clone());
    let log = log.map_err(|source| TrainError::Write {
        path: directory.log(),
        source,
    })?;
    let schedule = Schedule::new(config);
    let failure = Failure::new(interrupter.clone());
    let train_windows = Arc::new(train_windows);
    let (first, distilled) = (done + 1, teacher.is_some());
    let train_loader = TrainLoader::new(
        train_windows,
        schedule,
        first,
        teacher,
        failure.clone(),
        device,
    );
    let valid_loader = ValidLoader::<B::InnerBackend>::new(
        Arc::new(valid_windows),
        config.batch_size,
        failure.clone(),
        device,
    );
    let mut training = SupervisedTraining::new(
        directory.path(),
        Arc::new(train_loader),
        Arc::new(valid_loader),
    )
    .metric_train_numeric(LossMetric::reporting(train_report))
    .metric_valid_numeric(LossMetric::reporting(valid_report))
    .metrics((PerplexityMetric::new(),))
    .metric_train_numeric(LearningRateMetric::new())
    .metric_train_numeric(TokenRateMetric::new(config.tokens_per_step(), parts))
    .metric_train_numeric(GradientNormMetric::new(
        squares_of_steps,
        parts,
        norm_report,
    ))
    .with_metric_logger(log)
    .with_file_checkpointer(CompleteFileRecorder::telling(unwritten.clone()))
    .with_checkpointing_strategy(strategy)
    .early_stopping(EpochEnd {
        unwritten,
        interrupter: interrupter.clone(),
        patience,
    })
    .with_interrupter(interrupter.clone())
    // A library does not install a logger, nor a panic hook.
    .with_application_logger(None)
    .with_training_strategy(strategy_of(devices))
    .grads_accumulation(config.accumulation)
    .num_epochs(last_epoch);
    if distilled {
        training = training.metric_train_numeric(DivergenceMetric::new());
    }
    if let Some(routing) = &config.routing {
        for (place, report) in plan_reports.into_iter().enumerate() {
            let loss = PlanLossMetric::reporting(routing, place, report);
            training = training.metric_valid_numeric(loss);
        }
    }
    if let Some(memory) = MemoryMetric::new() {
        training = training.metric_train_numeric(memory);
    }
    if done > 0 {
        training = training.checkpoint(done);
    }
    training = match run.progress {
        Progress::Auto if cfg!(feature = "tui") && io::stdout().is_terminal() => training,
        Progress::Auto | Progress::Plain => training.renderer(
            PlainRenderer::new(io::stdout(), config, parts, LINE_INTERVAL)
                .with_observer(run.observer.clone()),
        ),
        Progress::Quiet => training.renderer(
            PlainRenderer::new(io::sink(), config, parts, LINE_INTERVAL)
                .with_observer(run.observer.clone()),
        ),
    };
    let result = training.launch(Learner::new(model, optimizer, scheduler));

    if let Some(error) = failure.take() {
        return Err(error);
    }
    let epochs = history
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    for losses in &epochs {
        for loss in [losses.train, losses.valid] {
            if !loss.is_finite() {
                return Err(TrainError::Diverged {
                    epoch: losses.epoch,
                    loss,
                });
            }
        }
    }
    let interrupted = || {
        let message = interrupter.get_message();
        TrainError::Interrupted(message.unwrap_or_else(|| "no reason given".to_owned()))
    };
    if interrupter.should_stop() {
        return Err(interrupted());
    }
    let last = epochs.last().ok_or_else(interrupted)?;
    let decoders = result.model.decoders();
    let model = decoders[0].clone();
    let plans = decoders.into_iter().zip(&last.plans);
    let plans = plans.map(|(model, &valid_loss)| TrainedPlan { model, valid_loss });
    Ok(Trained {
        model,
        plans: plans.collect(),
        train_loss: last.train,
        valid_loss: last.valid,
        tokens: config.tokens_until(last.epoch),
        epochs,
        elapsed: start.elapsed(),
    })
}

/// One device by itself; several with the weights updated on the first. Burn's sharded optimizer
/// could not clip by the norm of all gradients.
fn strategy_of<LC: LearningComponentsTypes>(
    devices: &[<LC::Backend as BackendTypes>::Device],
) -> TrainingStrategy<LC> {
    let main = MultiDeviceOptim::OptimMainDevice;
    TrainingStrategy::Default(ExecutionStrategy::multi(devices.to_vec(), main))
}

/// Checks that there is a target to validate with.
fn check_targets(windows: &impl Windows) -> Result<(), TrainError> {
    let has_answers = windows.has_answers();
    for index in 0..windows.len() {
        if read_window(windows, index, has_answers)?.counted() > 0 {
            return Ok(());
        }
    }
    Err(TrainError::NoTargets { step: None })
}

/// Has parameters of less precision than f32 stay so when a checkpoint is loaded, whose numbers are
/// f32.
struct KeepPrecision;

impl<B: Backend> ModuleMapper<B> for KeepPrecision {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let dtype = param.val().dtype();
        if at_least_f32(dtype) == dtype {
            return param;
        }
        param.load_mapper(move |tensor| tensor.cast(dtype).detach())
    }
}
