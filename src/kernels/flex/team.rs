//! Threads that stay awake while a pass goes through its many small parallel steps.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder, Yield, yield_now};

/// As many threads as rayon's global pool has, for one pass at a time, and only threads that were there before
/// it began ([`Door`]): beneath all that a thread helps with there is then nothing but its own place in the
/// team, so that no two wait for each other. None where the threads are not to be had.
static TEAM: LazyLock<Option<Mutex<ThreadPool>>> = LazyLock::new(|| {
    let threads = ThreadPoolBuilder::new().thread_name(|i| format!("fusedkv-{i}"));
    threads.build().ok().map(Mutex::new)
});

/// How often a thread looks for work in vain before it lets others of the machine go first.
const PATIENCE: usize = 1 << 12;

/// How long a pass waits for its team before it begins: longer than a thread takes to wake on a machine that
/// has nothing else to do.
const MUSTER: Duration = Duration::from_micros(100);

/// Which threads are there before the work begins.
///
/// Those that come later must not stay: rayon may call a thread to the team while it waits within a share of the
/// same work, which it took from a thread that was there first. The share ends when the thread
/// does, and the thread would look for work until the share has ended.
struct Door(AtomicUsize);

impl Door {
    const CLOSED: usize = 1 << (usize::BITS - 1);

    fn new() -> Self {
        Self(AtomicUsize::new(0))
    }

    /// Whether the thread came in time.
    fn enter(&self) -> bool {
        self.0.fetch_add(1, Ordering::AcqRel) & Self::CLOSED == 0
    }

    /// Lets `others` in, and nobody once they are there or the time is over.
    fn close(&self, others: usize) {
        let until = Instant::now() + MUSTER;
        while self.0.load(Ordering::Acquire) < others && Instant::now() < until {
            spin_loop();
        }
        self.0.fetch_or(Self::CLOSED, Ordering::AcqRel);
    }
}

/// Does `work` on one thread of a team whose other threads look for shares of it all the while.
///
/// A decoded token has some hundred parallel steps of a few microseconds each: a thread that sleeps
/// between two of them takes as long to wake as the step takes.
///
/// On a thread of a pool it is done there, among that pool's threads; and in rayon's global pool while
/// another pass has the team.
pub(super) fn among_threads<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    if rayon::current_thread_index().is_some() {
        return work();
    }
    let team = match TEAM.as_ref().map(Mutex::try_lock) {
        Some(Ok(team)) => team,
        // All that a panic leaves behind is idle threads.
        Some(Err(TryLockError::Poisoned(team))) => team.into_inner(),
        Some(Err(TryLockError::WouldBlock)) | None => return rayon::scope(|_| work()),
    };
    within(&team, work)
}

/// Does `work` on the first thread of a pool while the others help.
fn within<R: Send>(team: &ThreadPool, work: impl FnOnce() -> R + Send) -> R {
    let work = Mutex::new(Some(work));
    let (door, over) = (Door::new(), AtomicBool::new(false));
    let results = team.broadcast(|thread| {
        if thread.index() > 0 {
            if door.enter() {
                help(&over);
            }
            return None;
        }
        let _panic_or_not = Ends(&over);
        door.close(thread.num_threads() - 1);
        let work = work.lock().unwrap_or_else(PoisonError::into_inner).take();
        work.map(|work| work())
    });
    let result = results.into_iter().flatten().next();
    result.expect("the first thread of a team does the work")
}

/// Takes shares of the work until it is over.
fn help(over: &AtomicBool) {
    let mut in_vain = 0;
    while !over.load(Ordering::Acquire) {
        if let Some(Yield::Executed) = yield_now() {
            in_vain = 0;
        } else if in_vain < PATIENCE {
            in_vain += 1;
            spin_loop();
        } else {
            thread::yield_now();
        }
    }
}

/// Says so when it is dropped.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;

    use rayon::prelude::*;

    use super::*;

    fn sum() -> u64 {
        (0..1000u64).into_par_iter().sum()
    }

    /// A thread that has a share of the work before it is called to the team, and is called while it waits within
    /// that share.
    #[test]
    fn a_thread_that_comes_late_goes_on_with_its_share() {
        let pool = ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let [begun, taken, done] = [(); 3].map(|()| Arc::new(AtomicBool::new(false)));
        let until = |flag: &AtomicBool, look: fn()| {
            let late = Instant::now() + Duration::from_secs(10);
            while !flag.load(Ordering::Acquire) {
                assert!(Instant::now() < late, "threads wait for each other");
                look();
            }
        };
        let flags = [&begun, &taken, &done].map(Arc::clone);
        pool.spawn_broadcast(move |thread| {
            let [begun, taken, done] = &flags;
            if thread.index() == 1 {
                until(begun, spin_loop);
                rayon::join(
                    || until(taken, spin_loop),
                    || {
                        taken.store(true, Ordering::Release);
                        thread::sleep(Duration::from_millis(50));
                    },
                );
                done.store(true, Ordering::Release);
            }
        });
        within(&pool, || {
            begun.store(true, Ordering::Release);
            // Takes the second half from the other thread, which waits for it.
            until(&done, || {
                yield_now();
            });
        });
    }

    #[test]
    fn passes_side_by_side_and_after_a_panic_give_what_they_compute() {
        let passes = || {
            for _ in 0..50 {
                assert_eq!(
                    among_threads(|| (sum(), among_threads(sum))),
                    (499_500, 499_500)
                );
            }
        };
        thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(passes))));
        let failed = catch_unwind(AssertUnwindSafe(|| {
            among_threads(|| assert_eq!(sum(), 0, "the pass that fails"))
        }));
        assert!(failed.is_err());
        passes();
    }
}
