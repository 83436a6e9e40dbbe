//! Checkpoints against the training beside them.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use burn_dataset::Dataset;
use fusedkv::train::{TokenWindow, Windows, train_on};

use super::*;

/// Windows that note the epochs that begin before the checkpoint of the one before is complete.
struct Watching {
    windows: TokenWindows,
    checkpoints: PathBuf,
    per_epoch: usize,
    reads: AtomicUsize,
    early: Arc<Mutex<BTreeSet<usize>>>,
}

impl Dataset<TokenWindow> for Watching {
    fn get(&self, index: usize) -> Option<TokenWindow> {
        let done = self.reads.fetch_add(1, Ordering::Relaxed) / self.per_epoch;
        let is_there = |part| {
            let name = format!("{part}-{done}.mpk");
            self.checkpoints.join(name).exists()
        };
        if done > 0 && !["model", "optim", "scheduler"].into_iter().all(is_there) {
            self.early.lock().unwrap().insert(done + 1);
        }
        self.windows.get(index)
    }

    fn len(&self) -> usize {
        self.windows.len()
    }
}

impl Windows for Watching {
    fn context(&self) -> usize {
        self.windows.context()
    }

    fn check_vocabulary(&self, vocab_size: usize) -> Result<(), TrainError> {
        self.windows.check_vocabulary(vocab_size)
    }

    fn fingerprint(&self) -> u64 {
        self.windows.fingerprint()
    }

    // Without reading any.
    fn has_answers(&self) -> bool {
        false
    }
}

/// A backend that fuses operations does not survive tensors that one thread reads while another
/// goes on with them (docs/decisions/cubecl-faults.md).
#[test]
fn training_waits_for_the_checkpoint_of_an_epoch() {
    let directory = tempdir().unwrap();
    let early = Arc::new(Mutex::new(BTreeSet::new()));
    let config = config();
    let (windows, valid) = TokenWindows::split(tokens(), config.context, 0.2).unwrap();
    let watching = Watching {
        windows,
        checkpoints: directory.path().join("checkpoint"),
        per_epoch: config.steps / config.epochs * config.batch_size,
        reads: AtomicUsize::new(0),
        early: early.clone(),
    };
    let run = Run::new(directory.path()).with_progress(Progress::Quiet);
    in_turn(|| train_on::<Autodiff<Flex>>(&config, watching, valid, &run, &[FlexDevice])).unwrap();
    assert_eq!(*early.lock().unwrap(), BTreeSet::new());
}
