//! Checkpoints of a run, read back.

use burn::lr_scheduler::LrScheduler;
use burn::module::Module;
use burn::optim::Optimizer;
use burn::record::{Record, Recorder};
use burn::tensor::backend::{AutodiffBackend, Backend};

use super::checkpoint::CompleteFileRecorder;
use super::directory::RunDirectory;
use super::error::TrainError;
use super::trainee::{OtherRecord, Trainee, TraineeRecord};

/// The model of a checkpoint, all of whose files are read: Burn's learner panics where it cannot, or
/// where they are of another decoder.
pub(super) fn load_checked<B: AutodiffBackend, O, S: LrScheduler>(
    directory: &RunDirectory,
    epoch: usize,
    model: Trainee<B>,
    _optimizer: &O,
    _scheduler: &S,
    device: &B::Device,
) -> Result<Trainee<B>, TrainError>
where
    O: Optimizer<Trainee<B>, B>,
{
    let model = load_model(directory, epoch, model, device)?;
    read_part::<B, O::Record>(directory, "optim", epoch, device)?;
    read_part::<B, S::Record<B>>(directory, "scheduler", epoch, device)?;
    Ok(model)
}

/// A model with what the checkpoint of an epoch keeps of it.
pub(super) fn load_model<B: Backend>(
    directory: &RunDirectory,
    epoch: usize,
    model: Trainee<B>,
    device: &B::Device,
) -> Result<Trainee<B>, TrainError> {
    let record: TraineeRecord<B> = read_part(directory, "model", epoch, device)?;
    match model.check_record(&record) {
        Ok(()) => Ok(model.load_record(record)),
        Err(OtherRecord::Base) => Err(TrainError::OtherBase(directory.path().to_owned())),
        Err(error) => Err(TrainError::Unreadable {
            path: directory.part("model", epoch).with_extension("mpk"),
            reason: error.to_string(),
        }),
    }
}

/// Reads a file of an epoch's checkpoint.
pub(super) fn read_part<B: Backend, R: Record<B>>(
    directory: &RunDirectory,
    part: &str,
    epoch: usize,
    device: &B::Device,
) -> Result<R, TrainError> {
    let path = directory.part(part, epoch);
    let recorder = CompleteFileRecorder::default();
    Recorder::<B>::load(&recorder, path.clone(), device).map_err(|error| TrainError::Unreadable {
        path: path.with_extension("mpk"),
        reason: error.to_string(),
    })
}
