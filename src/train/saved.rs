//! Checkpoints of a run, read back.

use burn::lr_scheduler::LrScheduler;
use burn::module::Module;
use burn::optim::Optimizer;
use burn::record::{Record, Recorder};
use burn::tensor::backend::{AutodiffBackend, Backend};

use super::checkpoint::{CompleteFileRecorder, RunDirectory};
use super::error::TrainError;
use crate::decoder::{DecoderRecord, FusedKvDecoder};

/// The model of a checkpoint, all of whose files are read: Burn's learner panics where it cannot, or
/// where they are of another decoder.
pub(super) fn load_checked<B: AutodiffBackend, O, S: LrScheduler>(
    directory: &RunDirectory,
    epoch: usize,
    model: FusedKvDecoder<B>,
    _optimizer: &O,
    _scheduler: &S,
    device: &B::Device,
) -> Result<FusedKvDecoder<B>, TrainError>
where
    O: Optimizer<FusedKvDecoder<B>, B>,
{
    let record = read_part(directory, "model", epoch, device)?;
    check_record(directory, epoch, &model, &record)?;
    read_part::<B, O::Record>(directory, "optim", epoch, device)?;
    read_part::<B, S::Record<B>>(directory, "scheduler", epoch, device)?;
    Ok(model.load_record(record))
}

/// That a record is of the decoder.
pub(super) fn check_record<B: Backend>(
    directory: &RunDirectory,
    epoch: usize,
    model: &FusedKvDecoder<B>,
    record: &DecoderRecord<B>,
) -> Result<(), TrainError> {
    let checked = model.check_record(record);
    checked.map_err(|error| TrainError::Unreadable {
        path: directory.part("model", epoch).with_extension("mpk"),
        reason: error.to_string(),
    })
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
